"""The tensorflow-datasets builder of the emoji sprites.

It needs no TensorFlow: images are passed on as PNG bytes, because only the encoding of arrays calls
TensorFlow.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from lavit_jax.data.emoji import colors, rendering

LICENCES = {
  'twemoji': (
    'Twemoji, (c) Twitter, Inc. and other contributors, CC BY 4.0, '
    'https://creativecommons.org/licenses/by/4.0/'
  ),
  'openmoji': (
    'OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0, '
    'https://creativecommons.org/licenses/by-sa/4.0/'
  ),
  'noto': (
    'Noto Color Emoji, (c) Google LLC, SIL Open Font License 1.1, https://openfontlicense.org'
  ),
}
_DESCRIPTION = (
  'Emoji as 96 px RGBA sprites in three styles, with names, keywords and groups. '
  'Changes to the art: rasterised, cropped to the ink, centred; in the sample, at most 128 colours.'
)
SAMPLE = (  # common emoji of every category; the last four are held-out concepts (splits.py)
  'grinning face',
  'red heart',
  'skull',
  'cat face',
  'octopus',
  'sunflower',
  'red apple',
  'banana',
  'pizza',
  'automobile',
  'rocket',
  'house',
  'soccer ball',
  'guitar',
  'key',
  'umbrella',
  'light bulb',
  'alarm clock',
  'flag of france',
  'flag of japan',
  'panda',
  'candle',
  'crystal ball',
  'orange circle',
)


_SAMPLE_COLORS = 128  # of a sprite: half the bytes, because the sample is part of the package


class Emoji(tfds.core.GeneratorBasedBuilder):
  """RGBA sprites with names.

  The splits are `plain` (without skin tones) and `toned`; splits.py divides them into training and
  held-out examples.
  """

  VERSION = tfds.core.Version('1.0.1')
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name='full', description='Every emoji in three styles.'),
    tfds.core.BuilderConfig(
      name='sample', description='Two dozen emoji in three styles, for tests and the demo.'
    ),
  ]

  @property
  def _is_sample(self) -> bool:
    config = self.builder_config
    return config is not None and config.name == 'sample'

  def _info(self) -> tfds.core.DatasetInfo:
    image = tfds.features.Image(
      shape=(rendering.SPRITE_SIZE, rendering.SPRITE_SIZE, 4), encoding_format='png'
    )
    return self.dataset_info_from_configs(
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'image': image,
          'codepoint': tfds.features.Text(),
          'style': tfds.features.Text(),
          'name': tfds.features.Text(),
          'keywords': tfds.features.Text(doc='comma separated'),
          'group': tfds.features.Text(),
          'subgroup': tfds.features.Text(),
          'colour': tfds.features.Text(doc='empty when no colour dominates'),
          'skin_tone': tfds.features.Scalar(np.bool_),
        }
      ),
      license='\n'.join(LICENCES.values()),
      homepage='https://www.unicode.org/emoji/',
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager  # nothing is downloaded: the art comes with the pip packages
    concepts = rendering.concepts()
    if self._is_sample:
      sample = [concept for concept in concepts if concept.name in SAMPLE]
      return {'plain': self._generate_examples(sample)}
    plain = [concept for concept in concepts if not concept.skin_tone]
    toned = [concept for concept in concepts if concept.skin_tone]
    return {'plain': self._generate_examples(plain), 'toned': self._generate_examples(toned)}

  def _generate_examples(
    self, concepts: list[rendering.Concept]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for concept in concepts:
      for style in rendering.STYLES:
        sprite = rendering.render(concept, style)
        if self._is_sample:
          sprite = sprite.quantize(_SAMPLE_COLORS, Image.Quantize.FASTOCTREE).convert('RGBA')
        png = io.BytesIO()
        sprite.save(png, 'PNG', optimize=self._is_sample)
        record = {
          'image': png.getvalue(),
          'style': style,
          'colour': colors.dominant_color(np.asarray(sprite)),
          **concept._asdict(),
        }
        yield f'{concept.codepoint} {style}', record
