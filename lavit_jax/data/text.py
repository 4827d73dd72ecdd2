"""Words: LLaMA's, as its folders hold them, and the tiny variants' own, a byte-level BPE with the same first ids (0 unknown, 1 begin, 2 end).

    python -m lavit_jax.data.text --source DATA_DIR --output FOLDER

trains the latter. transformers loads its folder (`AutoTokenizer.from_pretrained`) as it does a LLaMA's; `TextTokenizer` needs neither it nor
torch.
"""

import argparse
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home

UNKNOWN, BEGIN, END = 0, 1, 2
_SPECIAL = ('<unk>', '<s>', '</s>')
_PIECES, _FILE = 'tokenizer.model', 'tokenizer.json'


def packaged(folder: str | os.PathLike) -> str | os.PathLike:
  """The folder itself, or, if it is not there and is named `lavit_jax/...`, the one of that name in the installed package."""
  parts = pathlib.PurePath(folder).parts
  if os.path.exists(folder) or parts[:1] != ('lavit_jax',):
    return folder
  found = pathlib.Path(__file__).parents[1].joinpath(*parts[1:])
  return found if found.exists() else folder


class TextTokenizer:
  """Words to ids and back. `vocab_size` ids; the visual ids of a model follow after them.

  A text begins with a space of its own, as LLaMA's do (sentencepiece's dummy prefix); beside `tokenizer.model` that is what
  transformers' slow tokenizer gives for a text without `<s>` and its like, which are letters here and end nothing.
  """

  def __init__(self, tokenizer: Tokenizer | SentencePieceProcessor):
    self._tokenizer, self._pieces = tokenizer, isinstance(tokenizer, SentencePieceProcessor)
    self.vocab_size = tokenizer.vocab_size() if self._pieces else tokenizer.get_vocab_size()
    self.encode = functools.lru_cache(maxsize=1 << 16)(self._encode)

  @classmethod
  def load(cls, folder: str | os.PathLike, vocab_size: int | None = None) -> 'TextTokenizer':
    """Reads a Hugging Face tokenizer folder: its `tokenizer.model` of sentencepiece, by which the published code reads and writes, or,
    where there is none, its `tokenizer.json`.

    What a `tokenizer.json` says of truncation and padding is left out, as transformers leaves it out unless it is asked for. With
    `vocab_size`, so are tokens that were added behind it, such as a `<pad>`: the model has no rows for them, and here their ids are the
    visual tokens'. Their text is then letters like any other.

    Raises UserError when neither is in it or it is damaged, or when it has not `vocab_size` ids.
    """
    folder = packaged(expand_home(folder))
    path = next(
      (path for name in (_PIECES, _FILE) if os.path.exists(path := os.path.join(folder, name))),
      None,
    )
    if path is None:
      raise UserError(
        f'{os.path.join(folder, _FILE)} does not exist, nor {_PIECES} beside it; give the folder of a Hugging Face tokenizer'
      )
    try:
      words = cls(_read_pieces(path) if path.endswith(_PIECES) else _read_json(path, vocab_size))
    except Exception as error:  # neither library raises anything narrower
      raise UserError(f'{path} is damaged ({error}); copy it again') from None
    for token, expected in (('<s>', BEGIN), ('</s>', END)):
      found = words.id_of(token)
      if vocab_size is not None and found not in (None, expected):
        raise UserError(
          f'{path} has {token} under the id {found}, and the model reads and writes it as '
          f"{expected}; give the model's own tokenizer"
        )
    if vocab_size not in (None, words.vocab_size):
      raise UserError(
        f"{path} has {words.vocab_size} ids, but the text vocabulary of the model has {vocab_size}; give the model's own"
      )
    return words

  def id_of(self, token: str) -> int | None:
    """The id of a token that the vocabulary has as a whole; None if it has it not."""
    if not self._pieces:
      return self._tokenizer.token_to_id(token)
    found = self._tokenizer.piece_to_id(token)
    return None if self._tokenizer.is_unknown(found) else found

  def encode_once(self, text: str) -> tuple[int, ...]:
    """`encode` without its cache, for texts that hardly come again."""
    return self._encode(text)

  def _encode(self, text: str) -> tuple[int, ...]:
    return tuple(
      self._tokenizer.encode(text)
      if self._pieces
      else self._tokenizer.encode(text, add_special_tokens=False).ids
    )

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, special tokens left out, without the space that precedes every first word."""
    ids = [int(i) for i in ids if 0 <= i < self.vocab_size]  # the others are no words
    if not self._pieces:
      return self._tokenizer.decode(ids, skip_special_tokens=True)
    return self._tokenizer.decode(
      [i for i in ids if not (self._tokenizer.is_control(i) or self._tokenizer.is_unknown(i))]
    )


def _read_json(path: str, vocab_size: int | None) -> Tokenizer:
  """The tokenizer of a `tokenizer.json`, as `TextTokenizer.load` says."""
  with open(path, encoding='utf-8') as file:
    content = json.load(file)
  if vocab_size is not None:
    content['added_tokens'] = [
      token for token in content.get('added_tokens') or () if token['id'] < vocab_size
    ]
  tokenizer = Tokenizer.from_str(json.dumps(content))
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _read_pieces(path: str) -> SentencePieceProcessor:
  pieces = SentencePieceProcessor()
  with open(path, 'rb') as file:
    pieces.LoadFromSerializedProto(
      file.read()
    )  # its argument `model_proto` takes an empty file for none
  return pieces


def train(corpus: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
  """Learns the merges: ids 0-2 special, then the 256 bytes, then merges. A word has the same ids wherever it stands."""
  tokenizer = Tokenizer(models.BPE(unk_token='<unk>'))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(' ', 1, 0)])
  special = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
  tokenizer.train_from_iterator(
    corpus,
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=special,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', pair='<s> $A $B', special_tokens=[('<s>', BEGIN)]
  )  # As LLaMA's: begin, never end.
  return tokenizer


def save(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
  """Writes the folder that `TextTokenizer.load` and transformers read."""
  os.makedirs(folder, exist_ok=True)
  tokenizer.save(os.path.join(folder, _FILE))
  unknown, begin, end = _SPECIAL
  files = {
    'tokenizer_config.json': {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'unk_token': unknown,
      'bos_token': begin,
      'eos_token': end,
      'pad_token': unknown,
      'clean_up_tokenization_spaces': False,
      'model_max_length': 2048,
    },
    'special_tokens_map.json': {
      'unk_token': unknown,
      'bos_token': begin,
      'eos_token': end,
      'pad_token': unknown,
    },
  }
  for name, content in files.items():
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
      json.dump(content, file, indent=2)


if __name__ == '__main__':
  from lavit_jax.data.emoji import corpus

  parser = argparse.ArgumentParser(description='Train the tokenizer on the training captions.')
  parser.add_argument(
    '--source', default='embedded', help="'embedded' or the data_dir of the emoji data set"
  )
  parser.add_argument('--output', required=True)
  arguments = parser.parse_args()
  save(train(corpus.training_texts(arguments.source)), arguments.output)
