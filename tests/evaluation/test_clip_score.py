"""The CLIP score against transformers, on random weights."""

import json

import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.evaluation.clip_score import ClipScorer

torch = pytest.importorskip('torch', reason="no torch; pip install -e '.[torch]'")
TEXTS = ['a dog', 'two cats and a dog', '', 'a cat ' * 9]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A tiny CLIPModel of transformers with its tokenizer."""
  import transformers

  folder = tmp_path_factory.mktemp('clip')
  letters = 'abcdefghijklmnopqrstuvwxyz'
  vocab = {}
  for token in [*letters, *(letter + '</w>' for letter in letters), '<|startoftext|>']:
    vocab[token] = len(vocab)
  vocab['<|endoftext|>'] = len(vocab)
  tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[])
  tokenizer.save_pretrained(folder)
  sizes = {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2}
  sizes |= {'intermediate_size': 24}
  text = {'vocab_size': len(vocab), 'max_position_embeddings': 16, 'eos_token_id': len(vocab) - 1}
  config = transformers.CLIPConfig(
    text_config=sizes | text,
    vision_config=sizes | {'image_size': 28, 'patch_size': 14},
    projection_dim=12,
  )
  torch.manual_seed(0)
  model = transformers.CLIPModel(config)
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
  model.save_pretrained(folder)
  return folder


def test_scores_are_those_of_transformers(folder):
  import transformers

  images = np.random.default_rng(0).integers(0, 256, (4, 40, 56, 3), np.uint8)
  model = transformers.CLIPModel.from_pretrained(folder).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=16, return_tensors='pt')
  processor = transformers.CLIPImageProcessorPil(
    size={'shortest_edge': 28}, crop_size={'height': 28, 'width': 28}
  )
  pixels = processor(list(images), return_tensors='pt')['pixel_values']
  with torch.no_grad():
    output = model(**tokens, pixel_values=pixels)
  expected = (output.image_embeds * output.text_embeds).sum(-1)
  scores = ClipScorer(folder).score(images, TEXTS)
  assert np.ptp(scores) > 0.05
  np.testing.assert_allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize('change', ['no config', 'gelu', 'no tokenizer'])
def test_other_folders_are_refused(change, folder, tmp_path):
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  if change == 'no config':
    (tmp_path / 'config.json').unlink()
  elif change == 'gelu':
    config = json.loads((tmp_path / 'config.json').read_text())
    config['text_config']['hidden_act'] = 'gelu'
    (tmp_path / 'config.json').write_text(json.dumps(config))
  else:
    for path in tmp_path.glob('*token*'):
      path.unlink()
  error = {'no config': 'no config.json', 'gelu': "hidden_act='gelu'"}.get(
    change, 'no tokenizer.json or merges.txt'
  )
  with pytest.raises(UserError, match=error):
    ClipScorer(tmp_path)
