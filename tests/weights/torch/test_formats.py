"""Tables against every part at every size, by shape only; and which files are whose."""

import jax
import numpy as np
import pytest

from lavit_jax.models import lavit
from lavit_jax.weights.store.arrays import flatten
from lavit_jax.weights.torch import formats, matching, name_tables
from lavit_jax.weights.torch.descriptions import safety_config
from lavit_jax.weights.torch.mapping import slots_for, torch_shapes


@pytest.mark.parametrize(
  ('variant', 'part'),
  [
    (variant, part)
    for variant in lavit.VARIANTS
    for part in name_tables.TABLES
    if getattr(lavit.build(variant), part, part) is not None
  ],
)
def test_tables_cover_every_leaf(variant, part):
  """`slots_for` raises for a leaf that no rule claims, or two rules; counted here as well, on both sides."""
  model = lavit.build(variant)
  tree = name_tables.module_shapes(model, [part])[part]
  flat = flatten(tree)
  for rules in name_tables.name_rules(model, part):
    slots = slots_for(rules, flat)
    assert {slot.leaf for slot in slots.values()} == flat.keys()
    shapes = torch_shapes(rules, name_tables.as_tree(tree))
    assert sum(map(np.prod, shapes.values())) == sum(x.size for x in flat.values())


def test_the_safety_checker_at_full_size():
  """Every weight of diffusers' checker on CLIP ViT-L/14, by its published (nested) name and by transformers' present one."""
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


def test_a_strange_module_is_compared_with_the_variant_that_it_is_nearest_to(tmp_path):
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
