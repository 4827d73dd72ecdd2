"""Conversations as users train on them: a few steps, continued, and the model that answers."""

import json
import shutil
from typing import Any

import chex
import nano
import numpy as np
import pytest
from nano import rows
from numbered_images import image_file, write_folder

from lavit_jax.data.chat import TEMPLATES
from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import lavit
from lavit_jax.training.loop import train
from lavit_jax.training.run import resolve
from lavit_jax.weights.torch import adapters

nano.install()
IMAGES = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3), np.uint8)


@pytest.fixture
def config(base, tmp_path):
  """Of adapters: conversations with up to two images, and images to draw."""
  pictures = tmp_path / 'pictures'
  pictures.mkdir()
  pairs = write_folder(pictures, 8)
  (pictures / 'own.png').write_bytes(image_file(1))
  turns = [
    {'from': 'human', 'value': 'Is <image> like <image>?'},
    {'from': 'gpt', 'value': 'no'},
    {'from': 'human', 'value': 'Why?'},
    {'from': 'gpt', 'value': 'it is larger'},
  ]
  record = {'image': ['own.png', 'pictures/2.png'], 'conversations': turns}
  (pictures / 'chat.jsonl').write_text(json.dumps(record))
  chats = dict(format='folder', path=str(pictures), captions='chat.jsonl', use='chat')
  shares = dict(caption=0.0, draw=0.5, chat=0.5, answer=0.0, text=0.0)
  return nano.config(
    'lm',
    frozen=str(base),
    lora__rank=2,
    optim__learning_rate=0.05,
    optim__warmup_steps=0,
    num_steps=2,
    checkpoint_every=1,
    data__sources=(chats, pairs),
    data__shares=shares,
    data__max_images=2,
    data__chat_template='vicuna',
    data__text_length=120,
    lm__row_length=256,
  )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures('without_flops')
def test_a_run_continues_exactly_and_the_model_answers_by_the_template(base, config, tmp_path):
  train(config, tmp_path / 'whole')
  lines = rows(tmp_path / 'whole')
  assert len(lines) == 2
  for line in lines:
    assert line['overflow'] == 0
    assert all(line[f'loss_{kind}'] > 0 for kind in ('chat', 'text_to_image'))
  shutil.copytree(tmp_path / 'whole/checkpoints/1', tmp_path / 'half/checkpoints/1')
  train(config, tmp_path / 'half')
  exports = [tmp_path / name / 'export' for name in ('whole', 'half')]
  found = [adapters.load_adapters(export, lavit.build('nano')) for export in exports]
  chex.assert_trees_all_equal(*(each.modules['llama'].trained for each in found))
  assert rows(tmp_path / 'half') == lines[1:]

  model = Lavit.from_pretrained(base, adapter=exports[0])
  plain = Lavit.from_pretrained(base)
  assert model.chat_template == TEMPLATES['vicuna'] and plain.chat_template == TEMPLATES['lavit']
  options: dict[str, Any] = dict(seed=None, num_beams=1, min_new_tokens=3, max_new_tokens=3)
  (answer,) = model.answer_outputs(IMAGES, ['Why?'], **options)
  assert len(answer.ids) == 3
  model.unload_adapter()
  (without,) = model.answer_outputs(IMAGES, ['Why?'], **options)
  (expected,) = plain.answer_outputs(IMAGES, ['Why?'], **options)
  np.testing.assert_array_equal(without.ids, expected.ids)

  with config.unlocked():
    config.data.chat_template = 'lavit'
  with pytest.raises(UserError, match="trained with data.chat_template='vicuna'"):
    train(config, tmp_path / 'half')


def test_a_model_by_layers_reads_one_image_of_a_conversation(config, tmp_path):
  with config.unlocked():
    config.interface = 'flamingo'
    config.lora.rank = 0
    config.data.shares.draw = 0.0
    config.data.shares.caption = 0.5
  with pytest.raises(
    UserError, match='data.max_images=2: with interface=.flamingo. a conversation'
  ):
    resolve(config, tmp_path / 'run')
