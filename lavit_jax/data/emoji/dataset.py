"""The tensorflow-datasets builder of the emoji sprites. TensorFlow is neither needed nor imported.

Images are handed over as PNG bytes: encoding arrays is the one step for which tensorflow-datasets would call TensorFlow.
"""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from lavit_jax.data.emoji import colors, rendering

LICENCES = {
  'twemoji': 'Twemoji, (c) Twitter, Inc. and other contributors, CC BY 4.0, https://creativecommons.org/licenses/by/4.0/',
  'openmoji': 'OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/',
  'noto': 'Noto Color Emoji, (c) Google LLC, SIL Open Font License 1.1, https://openfontlicense.org',
}
SAMPLE = (  # Common things of every category; the last four are held out altogether (splits.py).
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


class Emoji(tfds.core.GeneratorBasedBuilder):
  """RGBA sprites with names. Splits: `plain` (without skin tones) and `toned`; train / held out is `splits.py`."""

  VERSION = tfds.core.Version('1.0.1')
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name='full', description='Every emoji in three styles.'),
    tfds.core.BuilderConfig(
      name='sample', description='Two dozen emoji in three styles, for tests and the demo.'
    ),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description='Emoji as 96 px RGBA sprites in three styles, with names, keywords and groups. Changes to the art: '
      'rasterised, cropped to the ink, centred; in the sample, at most 128 colours.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(rendering.SPRITE_SIZE, rendering.SPRITE_SIZE, 4), encoding_format='png'
          ),
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

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded: the art comes with the pip packages.
    chosen = rendering.concepts()
    if self.builder_config.name == 'sample':
      return {
        'plain': self._generate_examples([concept for concept in chosen if concept.name in SAMPLE])
      }
    return {
      'plain': self._generate_examples([concept for concept in chosen if not concept.skin_tone]),
      'toned': self._generate_examples([concept for concept in chosen if concept.skin_tone]),
    }

  def _generate_examples(self, chosen: list[rendering.Concept]) -> Iterator[tuple[str, dict]]:
    sample = self.builder_config.name == 'sample'
    for concept in chosen:
      for style in rendering.STYLES:
        sprite = rendering.render(concept, style)
        if sample:  # Half the bytes, to travel with the package.
          sprite = sprite.quantize(128, Image.Quantize.FASTOCTREE).convert('RGBA')
        png = io.BytesIO()
        sprite.save(png, 'PNG', optimize=sample)
        yield (
          f'{concept.codepoint} {style}',
          {
            'image': png.getvalue(),
            'style': style,
            'colour': colors.dominant(np.asarray(sprite)),
            **concept._asdict(),
          },
        )
