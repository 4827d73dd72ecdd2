"""Images drawn as vectors, by Emu's interface."""

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from lavit_jax.errors import InputError, UserError
from lavit_jax.inference.generation_config import VARIANT_DEFAULTS, VariantDefaults
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import diffusion, lavit, vae
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
  return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)


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
  def embed(ids):
    return modules.llama.apply({'params': params['llama']}, ids, method='embed')

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
    embedded = np.array(embed(np.array(ids + [0] * (LENGTH - len(ids)))))
    if row == 1:
      embedded[1:5] = see(IMAGE[None])[0]
    for number in range(4):
      last = len(ids) - 1 + number
      want = np.asarray(next_vector(embedded, last))
      np.testing.assert_allclose(vectors[row, number], want, rtol=1e-4, atol=1e-4)
      embedded[last + 1] = want
  assert np.abs(vectors[0] - vectors[2]).max() > 0.01  # the text matters


def test_images_are_drawn_from_their_vectors(model, params):
  """Two of each prompt; guidance leads away from the vectors of the empty prompt."""
  options = dict(num_inference_steps=2, sampler='pndm', decoder_guidance_scale=3.0, seed=[4, 5])
  images = model.generate(['a cat', 'snow'], num_return_sequences=2, **options)
  assert images.shape == (4, 16, 16, 3) and len({image.tobytes() for image in images}) == 4
  alone = model.generate_outputs(['snow'], **{**options, 'seed': [5]})
  np.testing.assert_allclose(images[2].astype(int), alone.images[0], atol=1)
  assert alone.codes == [] and not alone.flagged.any()
  modules = model.modules
  vectors = model.regress_vectors([['snow'], []])
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 2), 0)

  @nano.jit
  def decode(vectors, null_vectors):
    def denoise(latents, t, context):
      return modules.unet.apply({'params': params['unet']}, latents, t, context)

    latents = diffusion.sample_latents(
      denoise,
      jax.random.normal(key, (1, 8, 8, 4)),
      (vectors[None],),
      (null_vectors[None],),
      steps=2,
      sampler='pndm',
      guidance_scale=3.0,
      scheduler=modules.scheduler,
    )
    return modules.vae.apply(
      {'params': params['vae']}, modules.vae.from_unet(latents), method='decode'
    )

  want = vae.postprocess(decode(*vectors))[0]
  np.testing.assert_allclose(alone.images[0].astype(int), want, atol=1)


def test_what_drawing_by_vectors_refuses(model, params):
  with pytest.raises(InputError, match='the text is empty'):
    model.regress_vectors([[' ']])
  with pytest.raises(InputError, match='tokens long; shorten it to 4092'):
    model.regress_vectors([['cat ' * 5000]])
  with pytest.raises(UserError, match='^temperature has no effect: this model regresses'):
    model.generate(['a cat'], temperature=0.5)
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
