"""Name tables of every module at every size, by shape; and the nearest variant."""

import jax
import numpy as np
import pytest

from lavit_jax.models import lavit
from lavit_jax.weights.store.arrays import flatten
from lavit_jax.weights.torch import formats, matching, name_tables
from lavit_jax.weights.torch.descriptions import safety_config
from lavit_jax.weights.torch.mapping import slots_for, torch_shapes


def variant_modules():
  for variant in lavit.VARIANTS:
    model = lavit.build(variant)
    for module in name_tables.TABLES:
      if getattr(model, module, module) is not None:
        yield variant, module


@pytest.mark.parametrize(('variant', 'module'), list(variant_modules()))
def test_tables_cover_every_leaf(variant, module):
  """`slots_for` raises for a leaf with no rule, or with two; here both sides are counted too."""
  model = lavit.build(variant)
  tree = name_tables.module_shapes(model, [module])[module]
  flat = flatten(tree)
  for rules in name_tables.name_rules(model, module):
    slots = slots_for(rules, flat)
    assert {slot.leaf for slot in slots.values()} == flat.keys()
    shapes = torch_shapes(rules, name_tables.as_tree(tree))
    assert sum(map(np.prod, shapes.values())) == sum(x.size for x in flat.values())


def test_the_safety_checker_at_full_size():
  """Every weight of diffusers' checker on CLIP ViT-L/14, by its nested and its present name."""
  torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
  peers = pytest.importorskip('diffusers.pipelines.stable_diffusion.safety_checker')
  model = lavit.build('lavit_7b')
  config = transformers.CLIPConfig(**safety_config(model.safety_checker))
  with torch.device('meta'):
    want = {
      name: tuple(p.shape)
      for name, p in peers.StableDiffusionSafetyChecker(config).state_dict().items()
    }
  tree = name_tables.module_shapes(model, ['safety_checker'])['safety_checker']
  assert sum(x.size for x in jax.tree.leaves(tree)) == 303_981_588
  nested, flat = (
    torch_shapes(rules, tree) for rules in name_tables.name_rules(model, 'safety_checker')
  )
  assert want in (nested, flat)
  assert {
    name.replace('vision_model.vision_model.', 'vision_model.'): shape
    for name, shape in nested.items()
  } == flat


def test_an_unknown_module_is_compared_with_the_nearest_variant(tmp_path):
  model = lavit.build('tiny')
  struct = name_tables.module_shapes(model, ['llama'])['llama']
  rules = name_tables.name_rules(model, 'llama')[0]
  shapes = dict(torch_shapes(rules, name_tables.as_tree(struct)))
  for name in shapes:
    if 'k_proj' in name or 'v_proj' in name:  # one head of five
      shapes[name] = (32, 160)
  state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
  location = formats.ModuleLocation('llama', '', ('model',))
  assert matching.find_variant([formats.SourceModule(location, state, {})]) == 'tiny'
