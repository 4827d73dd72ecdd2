"""Images for people to look at: kept patches, features as colors, grids."""

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax import visualization


def test_kept_patches_stay_and_dropped_ones_fade():
  images = np.full((2, 8, 8, 3), 50, np.uint8)
  keep = np.zeros((2, 16), bool)
  keep[0, 5] = True  # second row, second column
  shaded = np.asarray(visualization.shade_dropped_patches(images, keep))
  assert shaded.dtype == np.uint8 and (shaded[0, 2:4, 2:4] == 50).all()
  assert (shaded == 50).sum() == 4 * 3 and shaded.max() > 230
  as_floats = visualization.shade_dropped_patches(images, keep.astype(np.float32))
  np.testing.assert_array_equal(as_floats, shaded)


def test_colors_of_probabilities_become_lighter():
  probabilities = np.linspace(0, 1, 64, dtype=np.float32)[None]
  colors = visualization.probability_colors(probabilities, 16)
  assert colors.shape == (1, 16, 16, 3) and colors.dtype == np.uint8
  squares = colors[0].reshape(8, 2, 8, 2, 3)
  assert (np.ptp(squares, axis=(1, 3)) == 0).all()
  # Luminance by the weights of Rec. 709; patches are in raster order.
  luminance = squares[:, 0, :, 0].reshape(64, 3) @ [0.2126, 0.7152, 0.0722]
  assert (np.diff(luminance) > 0).all()
  assert luminance[0] < 20 and luminance[-1] > 230


def test_equal_features_have_equal_colors():
  features = jax.random.normal(jax.random.key(0), (2, 16, 8))
  original, rebuilt = visualization.feature_colors(features, 3 * features, size=8)
  assert original.shape == (2, 8, 8, 3) and original.dtype == jnp.uint8
  # The length of a feature does not show.
  assert np.abs(original.astype(int) - rebuilt.astype(int)).max() <= 1
  _, other = visualization.feature_colors(features, -features, size=8)
  assert np.abs(original.astype(int) - other.astype(int)).max() > 20


def test_a_grid_has_a_row_for_each_array():
  rows = [np.full((3, 4, 4, 3), value, np.uint8) for value in (10, 200)]
  grid = visualization.image_grid(*rows)
  assert grid.shape == (8, 12, 3) and (grid[:4] == 10).all() and (grid[4:] == 200).all()
