"""`lavit convert` of what was trained here, to the forms of other systems."""

import jax
import numpy as np
import pytest
import transformers
from interface_peers import (
  IDS,
  PIXELS,
  logits_of,
  peer_logits,
  read_images,
)
from torch_folders import TOKENIZER, run
from torch_peers import close

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import name_tables
from lavit_jax.weights.torch.convert import plan_conversion

SHALLOW = {'vit': {'image_size': 16, 'num_layers': 2}, 'llama': {'num_layers': 2}}


def random_checkpoint(where, name, modules=('vit', 'interface', 'llama'), **vit):
  """A checkpoint as training writes one; its model and parameters."""
  settings = {**SHALLOW, 'vit': {**SHALLOW['vit'], **vit}, 'interface': {'name': name}}
  model = lavit.build('tiny', settings=settings)
  rng = np.random.default_rng(0)
  shapes = name_tables.module_shapes(model, modules)
  params = jax.tree.map(lambda x: rng.normal(0, 0.1, size=x.shape).astype(np.float32), shapes)
  folder.save_params(where, 'tiny', params, tokenizer=TOKENIZER, settings=settings)
  return model, params


def test_a_qformer_trained_here_loads_in_transformers(tmp_path):
  """With the LLaMA as its language model."""
  model, params = random_checkpoint(tmp_path / 'trained', 'qformer')
  plan = run(tmp_path / 'trained', tmp_path / 'exported', None)
  assert plan.kind == 'blip2_transformers'
  assert 'vit: the last 1 blocks, which are not used, are left out' in plan.notes
  peer = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / 'exported')
  assert isinstance(peer.language_model, transformers.LlamaModel | transformers.LlamaForCausalLM)
  image_id = model.vocabulary.image_start
  vectors = read_images(model, params, PIXELS)
  got = logits_of(model, params['llama'], vectors, IDS)
  close(got, peer_logits(peer, image_id, 16))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mlp', 'flamingo', 'emu', 'qformer'])
def test_other_interfaces_trained_here(name, tmp_path):
  _, params = random_checkpoint(tmp_path / 'trained', name)
  plan = run(tmp_path / 'trained', tmp_path / 'exported', None)
  kinds = dict(emu='emu', mlp='llava_v1.5', flamingo='openflamingo', qformer='blip2_transformers')
  kind = kinds[name]
  assert plan.kind == kind
  left_out = {'mlp': 'vit', 'flamingo': 'llama, vit'}.get(name, '')
  note = f'not written, since {kind} has no place for it: {left_out}'
  assert (note in plan.notes) == bool(left_out)
  run(tmp_path / 'exported', tmp_path / 'again', None)
  again = folder.load_params(tmp_path / 'again')
  assert again.keys() == params.keys() - set(left_out.split(', '))
  if name == 'qformer':  # it has no place for the last block, the norm and the head
    blocks = jax.tree.map(lambda leaf: leaf[:1], params['vit']['blocks'])
    params['vit'] = dict(params['vit'], blocks=blocks)
    del params['vit']['norm'], params['vit']['head']
  for module, tree in again.items():
    jax.tree.map(np.testing.assert_array_equal, tree, params[module])


def test_a_resampler_into_the_sequence_has_no_published_form(tmp_path):
  random_checkpoint(tmp_path / 'trained', 'resampler', ['interface'])
  with pytest.raises(UserError, match="'resampler', for which no published form has a place"):
    plan_conversion(tmp_path / 'trained', tmp_path / 'exported')


@pytest.mark.slow
def test_a_llava_trained_here_loads_in_transformers(tmp_path):
  model, params = random_checkpoint(tmp_path / 'trained', 'mlp', architecture='clip')
  run(tmp_path / 'trained', tmp_path / 'exported', None)
  peer = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / 'exported')
  vectors = read_images(model, params, PIXELS)
  got = logits_of(model, params['llama'], vectors, IDS)
  close(got, peer_logits(peer, model.vocabulary.image_start, 4))
