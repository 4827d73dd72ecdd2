"""Tables against every part at every size, by shape only; and which files are whose."""

import jax
import numpy as np
import pytest

from lavit_jax.models import lavit
from lavit_jax.weights.store.arrays import flatten
from lavit_jax.weights.torch import formats
from lavit_jax.weights.torch.mapping import slots_of, torch_shapes


@pytest.mark.parametrize(
  ('variant', 'part'),
  [
    (variant, part)
    for variant in lavit.VARIANTS
    for part in formats.TABLES
    if getattr(lavit.build(variant), part, part) is not None
  ],
)
def test_tables_cover_every_leaf(variant, part):
  """`slots_of` raises for a leaf that no row claims, or two rows; counted here as well, on both sides."""
  model = lavit.build(variant)
  tree = formats.shapes(model, [part])[part]
  flat = flatten(tree)
  for rows in formats.name_rules(model, part):
    slots = slots_of(rows, flat)
    assert {slot.leaf for slot in slots.values()} == flat.keys()
    shapes = torch_shapes(rows, formats.like_of(tree))
    assert sum(map(np.prod, shapes.values())) == sum(x.size for x in flat.values())


def test_the_safety_checker_at_full_size():
  """Every weight of diffusers' checker on CLIP ViT-L/14, by its published (nested) name and by transformers' present one."""
  torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
  peers = pytest.importorskip('diffusers.pipelines.stable_diffusion.safety_checker')
  model = lavit.build('lavit_7b')
  config = transformers.CLIPConfig(**formats.safety_config(model.safety_checker))
  with torch.device('meta'):
    want = {
      name: tuple(p.shape)
      for name, p in peers.StableDiffusionSafetyChecker(config).state_dict().items()
    }
  tree = formats.shapes(model, ['safety_checker'])['safety_checker']
  assert sum(x.size for x in jax.tree.leaves(tree)) == 303_981_588
  nested, flat = (torch_shapes(rows, tree) for rows in formats.name_rules(model, 'safety_checker'))
  assert want in (nested, flat)
  assert {
    name.replace('vision_model.vision_model.', 'vision_model.'): shape
    for name, shape in nested.items()
  } == flat


def test_a_strange_module_is_compared_with_the_variant_that_it_is_nearest_to(tmp_path):
  model = lavit.build('tiny')
  struct = formats.shapes(model, ['llama'])['llama']
  rules = formats.name_rules(model, 'llama')[0]
  shapes = dict(formats.torch_shapes(rules, formats.like_of(struct)))
  for name in shapes:
    if 'k_proj' in name or 'v_proj' in name:  # one head of five
      shapes[name] = (32, 160)
  state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
  location = formats.ModuleLocation('llama', '', ('model',))
  assert formats.find_variant([formats.SourceModule(location, state, {})]) == 'tiny'
