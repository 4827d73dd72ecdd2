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
  'fluent': (
    'Fluent Emoji, MIT License, Copyright (c) Microsoft Corporation. Permission is hereby granted, '
    'free of charge, to any person obtaining a copy of this software and associated documentation '
    'files (the "Software"), to deal in the Software without restriction, including without '
    'limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or '
    'sell copies of the Software, and to permit persons to whom the Software is furnished to do '
    'so, subject to the following conditions: The above copyright notice and this permission '
    'notice shall be included in all copies or substantial portions of the Software. THE SOFTWARE '
    'IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT '
    'LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND '
    'NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, '
    'DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING '
    'FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.'
  ),
  'blob': (
    'Noto Emoji before 2017, (c) Google Inc., Apache License 2.0, '
    'https://www.apache.org/licenses/LICENSE-2.0'
  ),
  'firefox': (
    'FxEmojis, (c) Mozilla Foundation, Apache License 2.0, '
    'https://www.apache.org/licenses/LICENSE-2.0'
  ),
  'streamline': (
    'Streamline Emojis, (c) Streamline, CC BY 4.0, https://creativecommons.org/licenses/by/4.0/'
  ),
  'emojione': (
    'EmojiOne 2, (c) Ranks.com Inc., CC BY 4.0, https://creativecommons.org/licenses/by/4.0/'
  ),
}
_DESCRIPTION = (
  'Emoji as 96 px RGBA sprites in several styles, with names, keywords and groups. '
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

  The only split is `plain`; splits.py divides it into training and held-out examples.

  Args:
    npm_folder: with the npm packages of `rendering.NPM_STYLES`; '': only the styles of the extra
      `[emoji]`.
    **options: of every builder.
  """

  VERSION = tfds.core.Version('2.0.0')
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(
      name='full', description='All concepts, in the styles whose art is installed.'
    ),
    tfds.core.BuilderConfig(
      name='sample', description='Two dozen concepts in three styles, for tests and the demo.'
    ),
  ]

  def __init__(self, *, npm_folder: str = '', **options):
    self._npm_folder = npm_folder
    super().__init__(**options)

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
        }
      ),
      license='\n'.join(LICENCES.values()),
      homepage='https://www.unicode.org/emoji/',
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager  # nothing is downloaded: the art comes with the pip packages
    concepts = rendering.concepts()
    if self._is_sample:
      concepts = [concept for concept in concepts if concept.name in SAMPLE]
    return {'plain': self._generate_examples(concepts)}

  def _generate_examples(
    self, concepts: list[rendering.Concept]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    styles = rendering.STYLES
    if self._npm_folder:
      styles = (*styles, *rendering.NPM_STYLES)
    for concept in concepts:
      for style in styles:
        try:
          sprite = rendering.render(concept, style, self._npm_folder)
        except LookupError:
          if style in rendering.STYLES:  # these have every concept
            raise
          continue
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
