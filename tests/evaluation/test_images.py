"""The judges of generated images tell clear cases apart."""

import numpy as np
import pytest

from lavit_jax.data.emoji import colors, corpus
from lavit_jax.evaluation import images


@pytest.mark.parametrize('name', colors.BACKGROUNDS)
def test_the_background_is_the_color_of_the_border(name):
  image = np.empty((20, 20, 3), np.uint8)
  image[:] = np.clip(np.array(colors.BACKGROUNDS[name]) + 8, 0, 255)
  image[3:17, 3:] = 77
  assert images.background_color(image) == name


def test_background_of_real_examples():
  examples = corpus.examples('embedded', 'train', 3, 50)
  is_right = [images.background_color(e.image) == e.facts.background for e in examples]
  assert np.mean(is_right) > 0.95


def test_shrink_takes_means():
  image = np.zeros((1, 32, 32, 3), np.uint8)
  image[0, :2, :2] = [[[255] * 3, [0] * 3], [[255] * 3, [0] * 3]]
  small = images.shrink(image)
  assert small.shape == (1, 16, 16, 3)
  assert small[0, 0, 0, 0] == pytest.approx(0, abs=0.01)
  assert small[0, 1, 1, 0] == -1


def test_the_classifier_learns_from_pixels_alone():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 320)
  pixels = rng.integers(0, 120, (320, 64, 64, 3)).astype(np.uint8)
  for image, label in zip(pixels, labels):
    image[16:48, 16:48, label] += 100
  classify = images.train_classifier(pixels[:192], labels[:192], 3, epochs=4, batch_size=32)
  predicted = classify(pixels[192:])
  assert (predicted == labels[192:]).mean() > 0.9
  assert (predicted == rng.permutation(labels[192:])).mean() < 0.6
