"""Exported folders are loaded by transformers and diffusers, which compute the same."""

import functools
import itertools

import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
from nano import jit
from torch_folders import run, whole_variant, write

from lavit_jax.data.emoji import corpus
from lavit_jax.models import lavit, vit
from lavit_jax.weights.store import folder
from lavit_jax.weights.torch import name_tables


@pytest.fixture(scope='module', autouse=True)
def variant():
  with whole_variant():
    yield


def random_params(modules, scale, rng):
  shapes = name_tables.module_shapes(lavit.build('whole'), modules)
  return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(np.float32), shapes)


def export(params, tmp_path):
  """A LaVIT folder with these modules."""
  folder.save_params(tmp_path / 'checkpoint', 'whole', params)
  run(tmp_path / 'checkpoint', tmp_path / 'exported')
  return tmp_path / 'exported'


def test_transformers_loads_the_language_model(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model = lavit.build('whole')
  rng = np.random.default_rng(0)
  params = random_params(['llama'], 0.1, rng)
  exported = export(params, tmp_path)
  ids = rng.integers(0, model.vocabulary.size, (2, 5))
  reference = transformers.LlamaForCausalLM.from_pretrained(
    exported / 'language_model', dtype=torch.float32
  ).eval()
  with torch.no_grad():
    expected = reference(torch.from_numpy(ids)).logits.numpy()

  variables = {'params': params['llama']}
  positions = np.broadcast_to(np.arange(5), ids.shape)
  mask = np.tril(np.ones((1, 1, 5, 5), bool))

  @jit
  def logits(variables):
    embedded = model.llama.apply(variables, ids, method='embed')
    hidden, _ = model.llama.apply(variables, embedded, positions, mask)
    return model.llama.apply(variables, hidden, method='logits')

  np.testing.assert_allclose(logits(variables), expected, atol=1e-4)


def test_transformers_loads_the_tokenizer(tmp_path):
  """Of a model that was trained with a `tokenizer.model` alone, with the ids of sentencepiece."""
  transformers = pytest.importorskip('transformers')
  source = tmp_path / 'tokenizer'
  source.mkdir()
  with (source / 'tokenizer.model').open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=itertools.islice(corpus.training_texts(), 500),
      model_writer=file,
      model_type='bpe',
      vocab_size=400,
      byte_fallback=True,
      remove_extra_whitespaces=False,
      minloglevel=2,
    )
  params = random_params(['llama'], 0.1, np.random.default_rng(0))
  folder.save_params(tmp_path / 'checkpoint', 'whole', params, tokenizer=source)
  run(tmp_path / 'checkpoint', tmp_path / 'exported')
  exported = tmp_path / 'exported' / 'language_model'
  tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
  reference = sentencepiece.SentencePieceProcessor(model_file=str(source / 'tokenizer.model'))
  for text in ('red apple on a blue background', '', '12 owls, noto style'):
    assert tokenizer(text)['input_ids'] == [1, *reference.encode(text)]
    assert tokenizer.decode(reference.encode(text)) == text


@pytest.mark.parametrize('prefix', ['', 'highres_'])
def test_diffusers_loads_the_image_decoders(tmp_path, prefix):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  model = lavit.build('whole')
  unet = getattr(model, f'{prefix}unet')
  vae = getattr(model, f'{prefix}vae')
  rng = np.random.default_rng(0)
  params = random_params([f'{prefix}unet', f'{prefix}vae'], 0.1, rng)
  exported = export(params, tmp_path) / f'{prefix}pixel_decoding'
  latents = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
  torch_latents = torch.from_numpy(latents.transpose(0, 3, 1, 2))
  context = rng.normal(size=(2, 5, unet.cross_attention_dim)).astype(np.float32)
  timesteps = np.array([3, 500])
  added = None
  options = {}
  if unet.pooled_dim is not None:
    pooled = rng.normal(size=(2, unet.pooled_dim)).astype(np.float32)
    sizes = np.full((2, 6), 64, np.float32)
    added = (pooled, sizes)
    conditions = dict(text_embeds=torch.from_numpy(pooled), time_ids=torch.from_numpy(sizes))
    options = dict(added_cond_kwargs=conditions)

  reference_unet = diffusers.UNet2DConditionModel.from_pretrained(exported / 'unet').eval()
  with torch.no_grad():
    expected = reference_unet(
      torch_latents, torch.from_numpy(timesteps), torch.from_numpy(context), **options
    ).sample.numpy()
  variables = {'params': params[f'{prefix}unet']}
  noise = jit(unet.apply)(variables, latents, timesteps, context, None, added)
  np.testing.assert_allclose(noise, expected.transpose(0, 2, 3, 1), atol=1e-4)

  reference_vae = diffusers.AutoencoderKL.from_pretrained(exported / 'vae').eval()
  assert reference_vae.config.scaling_factor == vae.scaling_factor
  with torch.no_grad():
    expected = reference_vae.decode(torch_latents).sample.numpy()
  decode = jit(functools.partial(vae.apply, method='decode'))
  images = decode({'params': params[f'{prefix}vae']}, latents)
  np.testing.assert_allclose(images, expected.transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize('nested', [True, False])
def test_the_safety_checker_agrees_with_diffusers(tmp_path, nested):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  reference = pytest.importorskip('diffusers.pipelines.stable_diffusion.safety_checker')
  checker = lavit.build('whole').safety_checker
  check = jit(checker.apply)
  rng = np.random.default_rng(0)
  params = random_params(['safety_checker'], 0.5, rng)['safety_checker']
  images = rng.normal(size=(32, 16, 16, 3)).astype(np.float32)

  def cosines(concepts):
    without_thresholds = {
      'concepts': concepts,
      'concepts_thresholds': np.zeros(17, np.float32),
      'special_thresholds': np.ones(3, np.float32),
    }
    return check({'params': params | without_thresholds}, images)[1]

  # Each list finds some of the images, but not all.
  special_cosines = cosines(np.resize(params['special'], (17, 12)))[:, :3]
  special_thresholds = np.quantile(special_cosines, 0.9, axis=0).astype(np.float32)
  params['special_thresholds'] = special_thresholds
  thresholds = np.quantile(cosines(params['concepts']), 0.98, axis=0).astype(np.float32)
  params['concepts_thresholds'] = thresholds
  exported = export({'safety_checker': params}, tmp_path) / 'pixel_decoding'
  if not nested:  # as transformers 5 writes it
    file = exported / 'safety_checker' / 'model.safetensors'
    state = {
      name.replace('vision_model.vision_model.', 'vision_model.'): x
      for name, x in safetensors.numpy.load_file(file).items()
    }
    write(exported / 'safety_checker', 'model', state)
    run(tmp_path / 'exported', tmp_path / 'again')
    again = folder.load_params(tmp_path / 'again')['safety_checker']
    jax.tree.map(np.testing.assert_array_equal, again, params)

  peer = reference.StableDiffusionSafetyChecker.from_pretrained(exported / 'safety_checker').eval()
  extractor = transformers.CLIPImageProcessor.from_pretrained(exported / 'feature_extractor')
  assert extractor.crop_size['height'] == 16
  assert list(extractor.image_mean) == list(vit.MEAN)
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  unsafe, scores = check({'params': params}, images)
  _, expected_unsafe = peer(pixels, images.copy())
  with torch.no_grad():
    embedded = peer.visual_projection(peer.vision_model(pixels)[1])
    concepts = reference.cosine_distance(embedded, peer.concept_embeds).numpy()
    special = reference.cosine_distance(embedded, peer.special_care_embeds).numpy()
  special = special - special_thresholds
  has_special = (special.round(3) > 0).any(-1, keepdims=True)
  expected = concepts - thresholds + 0.01 * has_special
  rounding = 5e-4  # our scores have three decimal places
  np.testing.assert_allclose(scores, expected, atol=rounding + 1e-4)
  assert list(unsafe) == expected_unsafe
  assert 4 < sum(expected_unsafe) < 28
  assert 4 < (special > 0).any(-1).sum() < 28
