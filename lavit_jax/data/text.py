"""Text tokenizers: LLaMA's, and the byte-level BPE of the tiny variants.

Both have the first ids 0 (unknown), 1 (begin) and 2 (end). This command trains the latter:

    python -m lavit_jax.data.text --source DATA_DIR --output FOLDER

`TextTokenizer` reads a folder by the library that wrote it, sentencepiece or tokenizers, and needs
neither transformers nor torch. `save_tokenizer` and `complete_tokenizer_folder` write what
transformers needs to load the folder by `AutoTokenizer.from_pretrained`.
"""

import argparse
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home

UNKNOWN = 0
BEGIN = 1
END = 2
_SPECIAL_TOKENS = ('<unk>', '<s>', '</s>')  # by id
_SENTENCEPIECE_FILE = 'tokenizer.model'
_JSON_FILE = 'tokenizer.json'
_CONFIG_FILE = 'tokenizer_config.json'
_CACHE_SIZE = 1 << 16  # texts


class TextTokenizer:
  """Text to ids and back.

  A text begins with a space of its own, as LLaMA's do (sentencepiece's dummy prefix). With a
  `tokenizer.model`, ids are those of sentencepiece, where special tokens such as `<s>` in a text
  are plain characters.

  Attributes:
    vocab_size: number of ids; the visual ids of a model follow.
  """

  def __init__(self, backend: '_Backend'):
    self._backend = backend
    self._cached_encode = functools.lru_cache(_CACHE_SIZE)(backend.encode)
    self.vocab_size = backend.vocab_size

  @classmethod
  def load(cls, folder: str | os.PathLike, vocab_size: int | None = None) -> 'TextTokenizer':
    """Loads a Hugging Face tokenizer folder.

    The folder has the `tokenizer.model` of sentencepiece, which the published code uses, or else a
    `tokenizer.json`. Truncation and padding in a `tokenizer.json` are ignored, as transformers does
    by default.

    Args:
      folder: its path; `lavit_jax/...` may be inside the installed package.
      vocab_size: size of the text vocabulary of the model. Tokens that were added after it, such
        as a `<pad>`, are plain characters: the model has no embeddings for them, and their ids
        belong to visual tokens.

    Raises:
      UserError: the folder has neither file, the file is damaged, it does not have `vocab_size`
        ids, or `<s>` and `</s>` have other ids than the model's.
    """
    path = _find_tokenizer(expand_home(folder))
    try:
      if path.endswith(_SENTENCEPIECE_FILE):
        tokenizer = cls(_SentencePiece(path))
      else:
        tokenizer = cls(_JsonTokenizer(path, vocab_size))
    except Exception as error:  # both libraries raise exceptions of all kinds
      raise UserError(f'{path} is damaged ({error}); copy it again') from None
    if vocab_size is not None:
      tokenizer._check_vocabulary(path, vocab_size)
    return tokenizer

  def _check_vocabulary(self, path: str, vocab_size: int) -> None:
    for token, expected in (('<s>', BEGIN), ('</s>', END)):
      token_id = self.token_to_id(token)
      if token_id not in (None, expected):
        raise UserError(
          f'{path} has {token} under the id {token_id}, and the model reads and writes it as '
          f"{expected}; give the model's own tokenizer"
        )
    if self.vocab_size != vocab_size:
      raise UserError(
        f'{path} has {self.vocab_size} ids, but the text vocabulary of the model has '
        f"{vocab_size}; give the model's own"
      )

  def token_to_id(self, token: str) -> int | None:
    """Returns the id of a token of the vocabulary; None if it has no such token."""
    return self._backend.token_to_id(token)

  def encode(self, text: str) -> tuple[int, ...]:
    """Returns the ids of a text, without begin and end; recent texts are cached."""
    return self._cached_encode(text)

  def encode_uncached(self, text: str) -> tuple[int, ...]:
    """Returns what `encode` does, without its cache: for long texts, which rarely come again."""
    return self._backend.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, without special tokens and without the space before the first word.

    Ids beyond the vocabulary, such as visual ones, are left out.
    """
    return self._backend.decode([int(i) for i in ids if 0 <= i < self.vocab_size])


# -------------------------------------------------------------------------------------- backends


class _Backend(Protocol):
  """A tokenizer of one library."""

  vocab_size: int

  def token_to_id(self, token: str) -> int | None: ...

  def encode(self, text: str) -> tuple[int, ...]: ...

  def decode(self, ids: list[int]) -> str: ...


class _SentencePiece:
  """A `tokenizer.model`."""

  def __init__(self, path: str):
    self._processor: Any = SentencePieceProcessor()  # its stubs lack most methods
    content = pathlib.Path(path).read_bytes()
    # Not by the argument `model_proto` of the constructor, which ignores an empty file.
    self._processor.LoadFromSerializedProto(content)
    self.vocab_size: int = self._processor.vocab_size()

  def token_to_id(self, token: str) -> int | None:
    token_id = self._processor.piece_to_id(token)
    return None if self._processor.is_unknown(token_id) else token_id

  def encode(self, text: str) -> tuple[int, ...]:
    return tuple(self._processor.encode(text))

  def decode(self, ids: list[int]) -> str:
    return self._processor.decode([i for i in ids if not self._is_special(i)])

  def _is_special(self, token_id: int) -> bool:
    return self._processor.is_control(token_id) or self._processor.is_unknown(token_id)


class _JsonTokenizer:
  """A `tokenizer.json`, without truncation and padding, and without tokens after `vocab_size`."""

  def __init__(self, path: str, vocab_size: int | None):
    content = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    if vocab_size is not None:
      added_tokens = content.get('added_tokens') or ()
      content['added_tokens'] = [token for token in added_tokens if token['id'] < vocab_size]
    self._tokenizer = Tokenizer.from_str(json.dumps(content))
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.vocab_size = self._tokenizer.get_vocab_size()

  def token_to_id(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)

  def encode(self, text: str) -> tuple[int, ...]:
    return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

  def decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=True)


def _find_tokenizer(folder: str | os.PathLike) -> str:
  """Returns the path of the tokenizer in a folder; `tokenizer.model` before `tokenizer.json`."""
  folder = _resolve_packaged(folder)
  for name in (_SENTENCEPIECE_FILE, _JSON_FILE):
    path = os.path.join(folder, name)
    if os.path.exists(path):
      return path
  raise UserError(
    f'{os.path.join(folder, _JSON_FILE)} does not exist, nor {_SENTENCEPIECE_FILE} beside it; give '
    'the folder of a Hugging Face tokenizer'
  )


def _resolve_packaged(folder: str | os.PathLike) -> str | os.PathLike:
  """Returns `lavit_jax/...` inside the installed package, unless it exists as it is written."""
  parts = pathlib.PurePath(folder).parts
  if os.path.exists(folder) or parts[:1] != ('lavit_jax',):
    return folder
  packaged = pathlib.Path(__file__).parents[1].joinpath(*parts[1:])
  return packaged if packaged.exists() else folder


# --------------------------------------------------------------------------------------- writing


def train_tokenizer(corpus: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
  """Trains a byte-level BPE: ids 0 to 2 are special, then come the 256 bytes, then merges.

  A word has the same ids at the beginning of a text and inside it.

  Args:
    corpus: texts.
    vocab_size: the most ids.
  """
  tokenizer = Tokenizer(models.BPE(unk_token='<unk>'))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(' ', 1, 0)])
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(corpus, trainer)
  tokenizer.post_processor = processors.TemplateProcessing(  # begin and no end, as LLaMA's
    single='<s> $A', pair='<s> $A $B', special_tokens=[('<s>', BEGIN)]
  )
  return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
  """Writes the folder that `TextTokenizer.load` and `AutoTokenizer.from_pretrained` read."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(os.fspath(folder / _JSON_FILE))
  unknown, begin, end = _SPECIAL_TOKENS
  special_tokens = {
    'unk_token': unknown,
    'bos_token': begin,
    'eos_token': end,
    'pad_token': unknown,
  }
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    **special_tokens,
    'clean_up_tokenization_spaces': False,
    'model_max_length': 2048,
  }
  _write_json(folder / _CONFIG_FILE, config)
  _write_json(folder / 'special_tokens_map.json', special_tokens)


def complete_tokenizer_folder(folder: str | os.PathLike) -> None:
  """Adds the `tokenizer_config.json` without which transformers misreads a `tokenizer.model`.

  `AutoTokenizer` of transformers 5 then adds no `<s>`, and drops the space before the first word. A
  folder that has a `tokenizer_config.json` or a `tokenizer.json` is left as it is.
  """
  folder = pathlib.Path(folder)
  if not (folder / _SENTENCEPIECE_FILE).exists():
    return
  if (folder / _CONFIG_FILE).exists() or (folder / _JSON_FILE).exists():
    return
  unknown, begin, end = _SPECIAL_TOKENS
  config = {
    'tokenizer_class': 'LlamaTokenizer',
    'unk_token': unknown,
    'bos_token': begin,
    'eos_token': end,
    'add_bos_token': True,
    'add_eos_token': False,
    'legacy': False,
    'clean_up_tokenization_spaces': False,
  }
  _write_json(folder / _CONFIG_FILE, config)


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2), encoding='utf-8')


def main() -> None:
  """Trains a tokenizer on the texts of the emoji data set."""
  from lavit_jax.data.emoji import corpus  # only here: `TextTokenizer` needs no emoji

  parser = argparse.ArgumentParser(description='Train the tokenizer on the training captions.')
  parser.add_argument(
    '--source', default='embedded', help="'embedded' or the data_dir of the emoji data set"
  )
  parser.add_argument('--output', required=True)
  arguments = parser.parse_args()
  save_tokenizer(train_tokenizer(corpus.training_texts(arguments.source)), arguments.output)


if __name__ == '__main__':
  main()
