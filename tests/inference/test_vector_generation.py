"""Images drawn as vectors, by Emu's interface."""

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax.errors import InputError, UserError
from lavit_jax.inference import image_decoder
from lavit_jax.inference.generation_config import VARIANT_DEFAULTS, VariantDefaults
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.inference.rng import Purpose
from lavit_jax.models import lavit
from lavit_jax.models.initialization import init_params

nano.install()
TOKENIZER = nano.ROOT / 'lavit_jax/assets/tiny/language_model'
SETTINGS = {'interface': {'name': 'emu'}, 'condition': {'name': 'emu'}}
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
LENGTH = 48


@pytest.fixture(scope='module')
def params():
  """Random ones, in which the vectors matter: they are as large as the embeddings."""
  modules = lavit.build('nano', settings=SETTINGS)
  names = ('vit', 'interface', 'llama', 'unet', 'vae')
  shapes = jax.eval_shape(lambda: init_params(modules, jax.random.key(0), names))
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == 'scale':
      return np.ones(leaf.shape, np.float32)
    deviation = np.prod(leaf.shape[-3:-1]) ** -0.5 if path[-1].key == 'kernel' else 0.2
    return rng.normal(0, deviation, leaf.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope='module')
def model(params):
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(
      VARIANT_DEFAULTS, 'nano', VariantDefaults(output_size=16, highres_sizes=((32, 32),))
    )
    yield Lavit(lavit.build('nano', settings=SETTINGS), params, TOKENIZER)


def test_each_vector_follows_from_the_whole_sequence_before_it(model, params):
  """Without a cache, one prompt at a time: a text, an image and a text, and none."""
  modules = model.modules
  vocabulary = modules.vocabulary
  prompts = [['a cat'], [IMAGE, 'in the snow'], []]
  vectors = model.regress_vectors(prompts)
  assert vectors.shape == (3, 4, 32) and vectors.dtype == np.float32

  @nano.jit
  def see(image):
    features = modules.tower.features(params['vit'], image)
    return modules.interface.apply({'params': params['interface']}, features).vectors

  @nano.jit
  def next_vector(embedded, last):
    causal = jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH), bool))
    positions = jnp.arange(LENGTH)[None]
    llama = {'params': params['llama']}
    hidden, _ = modules.llama.apply(llama, embedded[None], positions, causal)
    return hidden[0, last] @ params['interface']['head']['kernel']

  start, end = vocabulary.image_start, vocabulary.image_end
  cat, snow = map(model.tokenizer.encode, ('a cat', 'in the snow'))
  for row, ids in enumerate(([*cat, start], [start, 0, 0, 0, 0, end, *snow, start], [start])):
    embedded = params['llama']['embedding'][ids + [0] * (LENGTH - len(ids))]
    if row == 1:
      embedded[1:5] = see(IMAGE[None])[0]
    for number in range(4):
      last = len(ids) - 1 + number
      want = np.asarray(next_vector(embedded, last))
      np.testing.assert_allclose(vectors[row, number], want, rtol=1e-4, atol=1e-4)
      embedded[last + 1] = want
  assert np.abs(vectors[0] - vectors[2]).max() > 0.01  # the text matters


def test_images_are_drawn_from_their_vectors(model, params):
  """Two of a prompt; guidance leads away from the vectors of the empty prompt."""
  options = dict(num_inference_steps=1, sampler='pndm', seed=[5])
  drawn = model.generate_outputs(['a cat'], num_return_sequences=2, **options)
  images = drawn.images
  assert images.shape == (2, 16, 16, 3) and drawn.codes == [] and not drawn.flagged.any()
  vectors, null_vectors = (model.regress_vectors([prompt]) for prompt in (['a cat'], []))
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.fold_in(jax.random.key(5), Purpose.LATENTS), np.arange(2)
  )
  config = image_decoder.DecodingConfig(
    image_decoder.VECTORS, (16, 16), 1, 'pndm', scheduler=model.modules.scheduler
  )
  decoder_params = {name: params[name] for name in ('unet', 'vae')}

  def decode(vectors, guidance_scale):
    decoded = image_decoder.decode_vectors(
      model.modules,
      decoder_params,
      np.repeat(vectors, 2, axis=0),
      keys,
      None,
      null_vectors=null_vectors[0],
      guidance_scale=guidance_scale,
      config=config,
    )
    return np.asarray(decoded.images, int)

  np.testing.assert_allclose(images, decode(vectors, 7.5), atol=1)
  null = decode(null_vectors, 1.0)
  np.testing.assert_allclose(decode(vectors, 0.0), null, atol=1)
  assert np.abs(images - null).max() > 10 < np.abs(null[0] - null[1]).max()


def test_what_drawing_by_vectors_refuses(model, params):
  with pytest.raises(InputError, match='the text is empty'):
    model.regress_vectors([[' ']])
  with pytest.raises(InputError, match='tokens long; shorten it to 4092'):
    model.regress_vectors([['cat ' * 5000]])
  with pytest.raises(UserError, match='^temperature has no effect: this model regresses'):
    model.generate(['a cat'], temperature=0.5)
  with pytest.raises(UserError, match='^negative_prompt: the text is empty'):
    model.generate(['a cat'], negative_prompt=' ')
  with pytest.raises(UserError, match='^32x32 is decoded from codes, .* choose 16x16'):
    model.generate(['a cat'], size=(32, 32))
  with pytest.raises(
    UserError, match='^the U-Net .* reads vectors of the interface .emu., not codes'
  ):
    model.decode_images([np.array([1])])
  with pytest.raises(UserError, match='has no codes: .* draws vectors; to draw codes, open'):
    model.sample_codes([['a cat']])
  for settings, message in (
    ({'interface': {'name': 'emu'}}, 'no U-Net that reads them; train one .*condition=emu'),
    ({'interface': {'name': 'mlp'}}, "interface 'mlp', whose vectors are not regressed"),
  ):
    other = Lavit(lavit.build('nano', settings=settings), {}, TOKENIZER)
    with pytest.raises(UserError, match=message):
      other.generate(['a cat']) if 'emu' in message else other.regress_vectors([['a cat']])
