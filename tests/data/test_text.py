"""Tokenizers give the ids of the libraries that wrote them, and keep every text."""

import io
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from lavit_jax.data import text, text_fields
from lavit_jax.data.chat import Turn
from lavit_jax.data.emoji import corpus, grammar, splits
from lavit_jax.data.text import BEGIN, END, UNKNOWN, TextTokenizer
from lavit_jax.errors import UserError

FOLDER = Path(text.__file__).parent.parent / 'assets/tiny/language_model'


@pytest.fixture(scope='module')
def tokenizer():
  return TextTokenizer.load(FOLDER)


@pytest.fixture(scope='module')
def sentencepiece_folder(tmp_path_factory):
  """A folder with only a `tokenizer.model`, trained as LLaMA's was."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=itertools.islice(corpus.training_texts('embedded'), 2000),
    model_writer=model,
    model_type='bpe',
    vocab_size=700,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    split_digits=True,
    allow_whitespace_only_pieces=True,
    character_coverage=0.9999,
    minloglevel=2,
  )
  folder = tmp_path_factory.mktemp('sentencepiece')
  (folder / 'tokenizer.model').write_bytes(model.getvalue())
  return folder


@pytest.fixture(scope='module')
def processor(sentencepiece_folder):
  """The tokenizer of `sentencepiece_folder`, as sentencepiece reads it."""
  model = (sentencepiece_folder / 'tokenizer.model').read_bytes()
  return sentencepiece.SentencePieceProcessor(model_proto=model)


# --------------------------------------------------------------------------------- byte-level BPE


def test_special_tokens_have_the_ids_of_llama(tokenizer):
  ids = tokenizers.Tokenizer.from_file(str(FOLDER / 'tokenizer.json')).get_vocab()
  assert tokenizer.vocab_size == len(ids) == 2048
  assert (ids['<unk>'], ids['<s>'], ids['</s>']) == (UNKNOWN, BEGIN, END) == (0, 1, 2)
  assert sorted(ids.values()) == list(range(2048))


@pytest.mark.parametrize(
  'string',
  [
    'red apple on a blue background',
    'Question: What is this? Answer: owl',
    "côte d'ivoire",
    '東京 ☕',
    'a  b',
    'UPPER, and\nlines',
    '&#*!',
  ],
)
def test_decode_inverts_encode(tokenizer, string):
  ids = tokenizer.encode(string)
  assert tokenizer.decode(ids) == string
  assert not set(ids) & {UNKNOWN, BEGIN, END}
  assert tokenizer.encode_uncached(string) == ids
  stored = tokenizers.Tokenizer.from_file(str(FOLDER / 'tokenizer.json'))
  assert tuple(stored.encode(string, add_special_tokens=False).ids) == ids


def test_an_answer_has_the_same_ids_in_its_context(tokenizer):
  context = 'Question: What is this? Answer:'
  answer = ' red apple'
  assert tokenizer.encode(context) + tokenizer.encode(answer) == tokenizer.encode(context + answer)
  assert tokenizer.decode(tokenizer.encode(answer)) == 'red apple'


def test_captions_are_short(tokenizer):
  examples = corpus.examples(split='train', count=200)
  lengths = [len(tokenizer.encode(example.caption)) for example in examples]
  assert sum(lengths) / len(lengths) < 12


def test_special_tokens_are_left_out_of_the_text(tokenizer):
  assert tokenizer.decode([BEGIN, *tokenizer.encode('a star'), END]) == 'a star'


def test_transformers_loads_the_same_folder(tokenizer):
  transformers = pytest.importorskip('transformers')
  reference = transformers.AutoTokenizer.from_pretrained(FOLDER)
  string = 'two red hearts above an owl, noto style, on a pink background'
  assert reference(string)['input_ids'] == [BEGIN, *tokenizer.encode(string)]
  assert reference.decode(tokenizer.encode(string)) == string
  special = (reference.unk_token_id, reference.bos_token_id, reference.eos_token_id)
  assert special == (0, 1, 2)


def test_a_new_tokenizer_can_be_trained_saved_and_loaded(tmp_path):
  folder = tmp_path / 'tokenizer'
  trained = text.train_tokenizer(['the cat sat on the mat'] * 20, vocab_size=280)
  text.save_tokenizer(trained, folder)
  loaded = TextTokenizer.load(folder)
  assert loaded.vocab_size <= 280
  assert loaded.decode(loaded.encode('the cat')) == 'the cat'
  assert len(loaded.encode('the cat')) < len('the cat')
  transformers = pytest.importorskip('transformers')
  reference = transformers.AutoTokenizer.from_pretrained(folder)
  assert reference(' the cat')['input_ids'] == [BEGIN, *loaded.encode(' the cat')]


def test_the_longest_captions_and_questions_fit(tokenizer):
  names = sorted(
    splits.concept_names(),
    key=lambda name: len(tokenizer.encode(f' {grammar.plural(name)}')),
  )[-2:]
  first, second = (grammar.counted(name, 2) for name in names)
  caption = f'{first} to the right of {second}, openmoji style, on an orange background'
  question = f'Question: Are the {first} to the right of the {second}? Answer: yes'
  assert max(len(tokenizer.encode(string)) for string in (caption, question)) <= 48


def test_truncation_and_padding_of_the_file_are_ignored(tokenizer, tmp_path):
  """transformers ignores both by default, too."""
  transformers = pytest.importorskip('transformers')
  stored = transformers.AutoTokenizer.from_pretrained(FOLDER).backend_tokenizer
  stored.enable_truncation(3)
  stored.enable_padding(length=40)
  folder = tmp_path / 'tokenizer'
  shutil.copytree(FOLDER, folder)
  stored.save(str(folder / 'tokenizer.json'))
  content = json.loads((folder / 'tokenizer.json').read_text())
  assert content['truncation']['max_length'] == 3
  string = 'a red apple and a green pear on a blue background'
  reference = transformers.AutoTokenizer.from_pretrained(folder)
  expected = reference.encode(string, add_special_tokens=False)
  ids = TextTokenizer.load(folder).encode(string)
  assert len(ids) > 3
  assert list(ids) == expected == list(tokenizer.encode(string))


def test_tokens_added_behind_the_vocabulary_are_plain_characters(tokenizer, tmp_path):
  """A `<pad>` with id 2,048 would be [IMG] of the tiny variant."""
  folder = tmp_path / 'tokenizer'
  shutil.copytree(FOLDER, folder)
  file = folder / 'tokenizer.json'
  content = json.loads(file.read_text())
  content['added_tokens'].append(
    dict(
      id=2048,
      content='<pad>',
      single_word=False,
      lstrip=False,
      rstrip=False,
      normalized=False,
      special=True,
    )
  )
  file.write_text(json.dumps(content))
  loaded = TextTokenizer.load(folder, 2048)
  assert loaded.vocab_size == 2048
  ids = loaded.encode('a <pad> cat')
  assert ids == tokenizer.encode('a <pad> cat')
  assert max(loaded.encode('<pad>')) < 2048
  assert loaded.decode(ids) == 'a <pad> cat'
  with pytest.raises(UserError, match='has 2049 ids'):
    TextTokenizer.load(folder, 2050)


# ---------------------------------------------------------------------------------- sentencepiece

STRINGS = [
  'red apple on a blue background',
  ' two  spaces',
  '',
  ' ',
  'x ',
  'Ünïcödé 東京 ☕\n\ttab',
  '12345',
  '🦙\u200d',
  'ＡＢ ﬁ é',
  'e\u0301',
  '\x00a',
  'Question: What is this? Answer:',
  '\u2581x',
]


@pytest.mark.parametrize('string', STRINGS)
def test_ids_are_those_of_sentencepiece(sentencepiece_folder, processor, string):
  tokenizer = TextTokenizer.load(sentencepiece_folder, 700)
  ids = tokenizer.encode(string)
  assert list(ids) == processor.encode(string)
  assert tokenizer.vocab_size == processor.vocab_size() == 700
  assert not set(ids) & {UNKNOWN, BEGIN, END}
  decoded = tokenizer.decode([BEGIN, *ids, END, 700, 2000])
  assert decoded == processor.decode(processor.encode(string)) == string.replace('\u2581', ' ')


def test_transformers_gives_the_same_ids(sentencepiece_folder):
  """But for texts that begin with a space, to which its version 5 adds no other space."""
  transformers = pytest.importorskip('transformers')
  reference = transformers.LlamaTokenizer.from_pretrained(sentencepiece_folder)
  tokenizer = TextTokenizer.load(sentencepiece_folder)
  for string in STRINGS:
    if string[:1] not in (' ', '\u2581'):
      ids = reference(string, add_special_tokens=False)['input_ids']
      assert tuple(ids) == tokenizer.encode(string), string


def test_a_completed_folder_loads_by_auto_tokenizer(sentencepiece_folder, processor, tmp_path):
  """With the begin token and the space before the first word, which it lacks otherwise."""
  transformers = pytest.importorskip('transformers')
  folder = tmp_path / 'tokenizer'
  shutil.copytree(sentencepiece_folder, folder)
  text.complete_tokenizer_folder(folder)
  reference = transformers.AutoTokenizer.from_pretrained(folder)
  for string in STRINGS:
    if string[:1] not in (' ', '\u2581'):
      assert reference(string)['input_ids'] == [BEGIN, *processor.encode(string)], string
  special = (reference.unk_token_id, reference.bos_token_id, reference.eos_token_id)
  assert special == (UNKNOWN, BEGIN, END)


def test_a_complete_folder_stays_as_it_is(sentencepiece_folder, tmp_path):
  for folder in (FOLDER, sentencepiece_folder):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    (copy / 'tokenizer_config.json').write_text('{}')
    before = sorted(path.name for path in copy.iterdir())
    text.complete_tokenizer_folder(copy)
    assert (copy / 'tokenizer_config.json').read_text() == '{}'
    assert sorted(path.name for path in copy.iterdir()) == before
  text.complete_tokenizer_folder(tmp_path)  # has no tokenizer
  assert not (tmp_path / 'tokenizer_config.json').exists()


def test_invalid_bytes_and_special_tokens_in_a_text(sentencepiece_folder, processor):
  tokenizer = TextTokenizer.load(sentencepiece_folder)
  byte = processor.piece_to_id('<0xE6>')
  assert tokenizer.decode([byte]) == '\ufffd'
  assert tokenizer.decode([*tokenizer.encode('an owl'), byte, byte]) == 'an owl' + '\ufffd' * 2
  assert tokenizer.decode(tokenizer.encode('a</s>b')) == 'a</s>b'
  assert END not in tokenizer.encode('a</s>b')


def test_the_sentencepiece_model_goes_before_the_json(sentencepiece_folder, tmp_path):
  for file in (sentencepiece_folder / 'tokenizer.model', FOLDER / 'tokenizer.json'):
    (tmp_path / file.name).write_bytes(file.read_bytes())
  assert TextTokenizer.load(tmp_path).vocab_size == 700
  for damaged in (b'', b'version https://git-lfs.github.com/spec/v1'):
    (tmp_path / 'tokenizer.model').write_bytes(damaged)
    with pytest.raises(UserError, match='tokenizer.model is damaged'):
      TextTokenizer.load(tmp_path)
  message = 'tokenizer.model has 700 ids, but the text vocabulary of the model has 32000'
  with pytest.raises(UserError, match=message):
    TextTokenizer.load(sentencepiece_folder, 32000)


# ------------------------------------------------------------------------------------------- both


def test_an_answer_after_a_question_begins_with_one_space(sentencepiece_folder):
  for folder in (sentencepiece_folder, FOLDER):
    encoder = text_fields.TextEncoder(folder, 60)
    row = encoder.encode_turns([Turn(('Question: What is this? Answer:',), ' red apple')])
    whole = TextTokenizer.load(folder).encode('Question: What is this? Answer: red apple')
    assert tuple(row['text'][: row['text_length']]) == whole


def test_turns_end_with_an_end_token_and_answers_alone_are_learned():
  tokenizer = TextTokenizer.load(FOLDER)
  texts = [('Question: What is this? Answer:', ' cat'), ('Question: Where? Answer:', ' left')]
  turns = [Turn((prompt,), answer) for prompt, answer in texts]
  row = text_fields.TextEncoder(FOLDER, 40).encode_turns(turns)
  length = row['text_length']
  pieces = [tokenizer.encode(piece.removeprefix(' ')) for turn in texts for piece in turn]
  question, cat, where, left = pieces
  assert tuple(row['text'][:length]) == (*question, *cat, text.END, *where, *left)
  learned = row['text'][:length][row['text_weight'][:length] > 0]
  assert tuple(learned) == (*cat, text.END, *left)
  assert row['text_weight'][length] == 1 and not row['text_weight'][length + 1 :].any()
  short = text_fields.TextEncoder(FOLDER, length - 1).encode_turns(turns)
  assert short['text_length'] == len(question) + len(cat)  # no half of a turn
  with pytest.raises(ValueError, match='text_length is 3'):
    text_fields.TextEncoder(FOLDER, 3).encode_turns(turns)


def test_a_tokenizer_with_other_special_ids_is_refused(tmp_path):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  special = ('<s>', '<pad>', '<unk>', '</s>')
  tokenizer.add_special_tokens([tokenizers.AddedToken(token) for token in special])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(
    UserError, match='has <s> under the id 0, and the model reads and writes it as 1'
  ):
    TextTokenizer.load(tmp_path, 4)


def test_missing_folder_names_the_file(tmp_path):
  with pytest.raises(UserError, match='tokenizer.json.*Hugging Face'):
    TextTokenizer.load(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"version": "1.0", ')
  with pytest.raises(UserError, match='tokenizer.json is damaged'):
    TextTokenizer.load(tmp_path)
  message = 'has 2048 ids, but the text vocabulary of the model has 32000'
  with pytest.raises(UserError, match=message):
    TextTokenizer.load(FOLDER, 32000)


def test_data_import_neither_torch_nor_tensorflow():
  program = """
import sys
from lavit_jax.data import loader
batch = next(loader.batches('lm', batch_size=2, tokenizer_folder=sys.argv[1]))
assert batch['image'].shape == (2, 64, 64, 3)
assert not {'tensorflow', 'torch', 'transformers'} & sys.modules.keys()
"""
  done = subprocess.run(
    [sys.executable, '-c', program, str(FOLDER)], timeout=120, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_the_tokenizer_needs_no_loader():
  """`data/loader.py` imports `data/text.py`, and not the other way round."""
  program = """
import sys
from lavit_jax.data import text
assert not {'lavit_jax.data.loader', 'lavit_jax.data.emoji', 'jax', 'grain'} & sys.modules.keys()
"""
  done = subprocess.run(
    [sys.executable, '-c', program], timeout=120, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
