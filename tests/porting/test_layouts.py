"""Tables against every part at every size, by shape only; and which files are whose."""

import jax
import numpy as np
import pytest

from lavit_jax.models import lavit
from lavit_jax.porting import layouts
from lavit_jax.porting.engine import slots_of, torch_shapes
from lavit_jax.porting.leaves import flatten


@pytest.mark.parametrize(('variant', 'part'), [
    (variant, part) for variant in lavit.VARIANTS for part in layouts.TABLES if getattr(lavit.build(variant), part, part) is not None])
def test_tables_cover_every_leaf(variant, part):
  """`slots_of` raises for a leaf that no row claims, or two rows; counted here as well, on both sides."""
  model = lavit.build(variant)
  tree = layouts.shapes(model, [part])[part]
  flat = flatten(tree)
  for rows in layouts.tables(model, part):
    slots = slots_of(rows, flat)
    assert {slot.leaf for slot in slots.values()} == flat.keys()
    shapes = torch_shapes(rows, layouts.like_of(tree))
    assert sum(map(np.prod, shapes.values())) == sum(x.size for x in flat.values())


def test_the_safety_checker_at_full_size():
  """Every weight of diffusers' checker on CLIP ViT-L/14, by its published (nested) name and by transformers' present one."""
  torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
  peers = pytest.importorskip('diffusers.pipelines.stable_diffusion.safety_checker')
  model = lavit.build('lavit_7b')
  config = transformers.CLIPConfig(**layouts.safety_config(model.safety_checker))
  with torch.device('meta'):
    want = {name: tuple(p.shape) for name, p in peers.StableDiffusionSafetyChecker(config).state_dict().items()}
  tree = layouts.shapes(model, ['safety_checker'])['safety_checker']
  assert sum(x.size for x in jax.tree.leaves(tree)) == 303_981_588
  nested, flat = (torch_shapes(rows, tree) for rows in layouts.tables(model, 'safety_checker'))
  assert want in (nested, flat)
  assert {name.replace('vision_model.vision_model.', 'vision_model.'): shape for name, shape in nested.items()} == flat
