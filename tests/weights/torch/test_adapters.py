"""Adapters against the library peft: outputs, gradients, merged weights, and its folders."""

import functools
import json

import jax
import nano
import numpy as np
import pytest
import safetensors.numpy
from programs import compiled

torch = pytest.importorskip('torch')
from torch_peers import close, numpy_state, randomize  # noqa: E402

from lavit_jax.models import lavit, lora  # noqa: E402
from lavit_jax.models.sequence import prompt_mask, prompt_positions  # noqa: E402
from lavit_jax.weights.store import folder  # noqa: E402
from lavit_jax.weights.torch import adapters, convert, name_tables  # noqa: E402
from lavit_jax.weights.torch.adapters import Adapters  # noqa: E402
from lavit_jax.weights.torch.mapping import from_state_dict, to_torch  # noqa: E402
from lavit_jax.weights.torch.names_llama import llama_rules  # noqa: E402

nano.install()
MODEL = lavit.build('nano')
IDS = np.random.default_rng(0).integers(0, 2066, (2, 7)).astype(np.int32)


@pytest.fixture(scope='module')
def peer(tmp_path_factory):
  """A peft model, its folder, the parameters of its base here, and its merged weights."""
  import peft
  from transformers import LlamaConfig, LlamaForCausalLM

  sizes = nano.NANO['llama']
  config = LlamaConfig(
    vocab_size=MODEL.vocabulary.size,
    hidden_size=sizes['hidden_size'],
    intermediate_size=sizes['mlp_dim'],
    num_hidden_layers=sizes['num_layers'],
    num_attention_heads=sizes['num_heads'],
    num_key_value_heads=sizes['num_kv_heads'],
    rms_norm_eps=1e-5,
  )
  base = randomize(LlamaForCausalLM(config))
  params = from_state_dict(
    llama_rules(), numpy_state(base), name_tables.module_shapes(MODEL, ['llama'])['llama']
  )
  options = peft.LoraConfig(
    r=4,
    lora_alpha=6,
    use_rslora=True,
    target_modules=['q_proj', 'v_proj', 'o_proj', 'down_proj'],
    modules_to_save=['lm_head'],
    task_type='CAUSAL_LM',
  )
  model = peft.get_peft_model(base, options)
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'lora_' in name or 'modules_to_save' in name:
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
  path = tmp_path_factory.mktemp('peft') / 'adapter'
  model.save_pretrained(path)
  return model.eval(), path, params


def test_outputs_and_gradients_are_pefts(peer):
  model, path, params = peer
  adapter = adapters.load_adapters(path, MODEL).modules['llama']
  weights = np.random.default_rng(1).standard_normal((2, 7, 2066), np.float32) / 50
  mask = np.ones(IDS.shape, bool)

  def logits(trained):
    attached = lora.attach(params, trained, adapter.scale)
    apply = functools.partial(MODEL.llama.apply, {'params': attached})
    hidden, _ = apply(apply(IDS, method='embed'), prompt_positions(mask), prompt_mask(mask))
    return apply(hidden, method='logits')

  def loss(trained):
    values = logits(trained)
    return (values * weights).sum(), values

  gradient, values = compiled(jax.grad(loss, has_aux=True))(adapter.trained)
  reference = model(torch.tensor(IDS, dtype=torch.long)).logits
  close(values, reference)
  (reference * torch.tensor(weights)).sum().backward()
  gradients = {}
  for name, parameter in model.named_parameters():
    if parameter.grad is not None:
      name = name.replace('.default', '').replace('modules_to_save.', '')
      gradients[name] = parameter.grad.numpy()
  ours = adapters.to_tensors(MODEL, 'llama', gradient)
  assert ours.keys() == gradients.keys() and len(ours) == 2 * 2 * 4 + 1
  for name, array in gradients.items():
    close(ours[name], array)


def test_a_folder_of_peft_comes_back_bit_for_bit_and_loads_there(peer, tmp_path):
  import peft
  from transformers import LlamaForCausalLM

  model, path, _ = peer
  found = adapters.load_adapters(path, MODEL)
  adapters.save_adapters(tmp_path / 'again', MODEL, found)
  stored, again = (
    safetensors.numpy.load_file(where / 'adapter_model.safetensors')
    for where in (path, tmp_path / 'again/llama')
  )
  assert stored.keys() == again.keys()
  for name, array in stored.items():
    assert array.dtype == again[name].dtype and np.array_equal(array, again[name]), name
  configs = [
    json.loads((where / 'adapter_config.json').read_text())
    for where in (path, tmp_path / 'again/llama')
  ]
  assert configs[0] == configs[1]
  # A config that is written here says the same to peft.
  fields = dict(r=4, lora_alpha=6.0, use_rslora=True)
  config = adapters.peft_config(MODEL, 'llama', found.modules['llama'].trained, fields)
  changed = Adapters({'llama': found.modules['llama']._replace(config=config)}, {})
  adapters.save_adapters(tmp_path / 'ours', MODEL, changed)
  base = randomize(LlamaForCausalLM(model.config))
  loaded = peft.PeftModel.from_pretrained(base, tmp_path / 'ours/llama').eval()
  ids = torch.tensor(IDS, dtype=torch.long)
  with torch.no_grad():
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_merged_weights_are_pefts_and_load_in_transformers(peer, tmp_path):
  from transformers import LlamaForCausalLM

  model, path, params = peer
  folder.save_params(tmp_path / 'base', 'nano', {'llama': params})
  convert.plan_conversion(tmp_path / 'base', tmp_path / 'merged', adapter=path).run(lambda _: None)
  merged = folder.load_params(tmp_path / 'merged')['llama']
  import copy

  reference = numpy_state(copy.deepcopy(model).merge_and_unload())
  tensors = to_torch(llama_rules(), merged)
  assert tensors.keys() == reference.keys()
  for name, array in reference.items():
    np.testing.assert_allclose(tensors[name], array, rtol=0, atol=1e-6)
  convert.plan_conversion(tmp_path / 'merged', tmp_path / 'torch').run(lambda _: None)
  loaded = LlamaForCausalLM.from_pretrained(tmp_path / 'torch/language_model').eval()
  ids = torch.tensor(IDS, dtype=torch.long)
  with torch.no_grad():
    close(loaded(ids).logits.numpy(), model(ids).logits, 1e-4)
