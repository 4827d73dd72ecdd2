"""The trainings (specification, Training): what each learns, from what, and how well it does.

    encoder       pictures, captions             -> vit                   contrastive     } tiny variants only
    autoencoder   pictures                       -> vae                   L1, a little KL } (foundations.py)
    tokenizer     vit                            -> tokenizer, decoder    stage 1
    detokenizer   vit, tokenizer, decoder, vae   -> unet, decoder         stage 1b
    lm            vit, tokenizer                 -> llama, understanding  stage 2

A stage is a handful of pure functions (stage.py); the loop (loop.py) is the same for all. Axes: B images, N patches, D width of the
features, C of the codes, R packed rows of S slots, V vocabulary.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from lavit_jax.data import loader
from lavit_jax.errors import UserError
from lavit_jax.inference.diffusion import sample_latents
from lavit_jax.models import lavit
from lavit_jax.models import noise_schedule as diffusion
from lavit_jax.models import vae as pixels
from lavit_jax.models.decoder import null_context
from lavit_jax.models.initialization import init_params
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.row_random import draw_rows
from lavit_jax.models.sequence import compact, embed_sources, pack_pairs
from lavit_jax.models.tokenizer import gumbel_keep
from lavit_jax.sharding import per_shard
from lavit_jax.training import codebook
from lavit_jax.training.foundations import autoencoder, encoder
from lavit_jax.training.stage import (
  Average,
  Mean,
  Stage,
  Sum,
  apply_module,
  cosine_similarity,
  feature_colors,
  image_features,
  initialize_params,
  row_keys,
  shade_dropped,
  vit_images,
)

SELECTOR = r'^tokenizer/selector/'
PAGES = dict(  # data.task of each stage, and what its page alone has
  encoder=('contrastive', 'text_tower'),
  autoencoder=('images', 'kl_weight'),
  tokenizer=('images', 'tokenizer'),
  detokenizer=('images', 'detokenizer'),
  lm=('lm', 'lm'),
)


def build_stage(config, model: LavitModules, shards: int) -> Stage:
  """The stage that `config.stage` names; `shards` is the number of pieces that a batch is split into."""
  _known(config.stage)
  stages = dict(
    encoder=encoder,
    autoencoder=autoencoder,
    tokenizer=tokenizer,
    detokenizer=detokenizer,
    lm=language_model,
  )
  return stages[config.stage](config, model, shards)


def _known(stage: str) -> tuple[str, str]:
  if stage not in PAGES:
    raise UserError(f'unknown stage {stage!r}; known: {", ".join(PAGES)}')
  return PAGES[stage]


def validate_stage(config) -> None:
  """Raises UserError for a stage that is not the page's, and for pictures of a size that it cannot take."""
  task, own = _known(config.stage)
  if config.data.task != task or own not in config:
    raise UserError(
      f'stage={config.stage!r} needs data.task={task!r} (now {config.data.task!r}) and {own!r} in the page; take configs/{config.stage}.py'
    )
  model, size = lavit.build(config.variant), config.data.image_size
  if config.stage == 'encoder' and size != model.image_size:
    raise UserError(
      f'data.image_size={size}: the encoder of variant {config.variant} learns from {model.image_size} pixels a side'
    )
  latents = dict(autoencoder=1, detokenizer=2 ** (len(model.unet.block_out_channels) - 1)).get(
    config.stage
  )
  shaded = config.picture_every and config.stage in (
    'tokenizer',
    'detokenizer',
    'lm',
  )  # patch by patch
  multiple = math.lcm(
    latents * model.vae.factor if latents else 1,
    model.image_size // model.vit.patch_size if shaded else 1,
  )
  if size % multiple:
    raise UserError(
      f'data.image_size={size} must be a multiple of {multiple} for stage {config.stage} of variant {config.variant}'
    )


def warnings(config, stage: Stage, parts: dict) -> list[str]:
  """What of a run's options will not do what one may think, a line each."""
  lines = []
  if config.init_from and not any(
    name in parts for name in stage.takes if name not in stage.starts
  ):
    lines.append(
      f'init_from={config.init_from} has none of {", ".join(stage.takes)}, which stage {config.stage} trains: they begin anew'
    )
  if config.stage != 'tokenizer':
    return lines
  first = config.tokenizer.quantize_from
  if codebook.is_offered(parts):
    lines.append(
      'the codebook of init_from goes on: quantisation begins with the first step, whatever tokenizer.quantize_from says'
    )
  elif config.num_steps <= first:
    lines.append(
      f'num_steps={config.num_steps} ends before quantisation begins (tokenizer.quantize_from={first}): the codebook stays untrained, '
      'and later stages will refuse the export'
    )
  return lines


def abstract_inputs(config, model: LavitModules, stage: Stage) -> tuple[dict, dict]:
  """(the parts that the stage needs or starts from, a batch of all processes) as ShapeDtypeStructs."""
  parts = jax.eval_shape(lambda: init_params(model, jax.random.key(0), stage.needs + stage.starts))
  data = config.data
  batch = loader.batch_shapes(
    data.task,
    config.batch_size,
    data.image_size,
    data.get('text_length', 0),
    vit_size(config, model),
  )
  return parts, {name: jax.ShapeDtypeStruct(*like) for name, like in batch.items()}


def vit_size(config, model: LavitModules) -> int | None:
  """The side of the images that the loader makes for the ViT beside those of `data.image_size`.

  None if there is no need: those have that size, or the stage has no ViT.
  """
  needless = config.stage == 'autoencoder' or config.data.image_size == model.image_size
  return None if needless else model.image_size


def tokens_per_step(config) -> int:
  """What a step has room for: slots of packed rows of the language model (`packed_share` of them hold a token), patches of the others."""
  if config.stage == 'lm':
    return config.lm.num_rows * config.lm.row_length
  return config.batch_size * lavit.build(config.variant).num_patches


def tokenizer(config, model: LavitModules, shards: int) -> Stage:
  """Stage 1: as few tokens as needed to reconstruct the features, first continuous, from `quantize_from` on quantised.

  The codebook is state: k-means on the first quantised batch, then moving averages. At `freeze_selector_from` (-1: when
  quantisation begins) the selector stops: still training, it would buy back with more tokens what quantisation costs.

  A codebook that `init_from` offers goes on as it is, and so quantisation begins with the first step. Where the offered tokenizer has none
  (its own training ended before), k-means begins it as ever.
  """
  del shards
  c = config.tokenizer
  code_dim = model.tokenizer.code_dim
  freeze_from = c.quantize_from if c.freeze_selector_from < 0 else c.freeze_selector_from

  def init(key, parts):
    fresh = init_params(model, key, ('tokenizer', 'decoder'))
    offered = codebook.is_offered(parts)
    if 'tokenizer' in parts and not offered:
      quantizer = {
        **parts['tokenizer']['quantizer'],
        'embedding': fresh['tokenizer']['quantizer']['embedding'],
      }
      parts = {**parts, 'tokenizer': {**parts['tokenizer'], 'quantizer': quantizer}}
    params, embedding = codebook.take_out(initialize_params(fresh, parts))
    return params, codebook.init_codebook(embedding, started=offered)

  def hold_of(parts):
    start = 0 if codebook.is_offered(parts) and c.freeze_selector_from < 0 else freeze_from
    return ((SELECTOR, start),)

  def whole(params, book):
    """The tokenizer's parameters with the codebook in its place."""
    return codebook.put_in(params, book.embedding)['tokenizer']

  def encode(params, book, x, key):
    """Features [B, N, D] -> (keep f32[B, N], unit vectors before quantisation f32[B, N, C])."""
    tok = whole(params, book)
    keep = gumbel_keep(apply_module(model.tokenizer, tok, x, method='select'), key=key)
    merged = apply_module(model.tokenizer, tok, x, keep, method='merge')
    return keep, apply_module(model.tokenizer, tok, merged, method='quantize')[1]

  def reconstruct(params, codes, keep):
    """codes [B, N, C] * keep f32[B, N], through which the gradient reaches the selector -> features [B, N, D]."""
    return apply_module(model.decoder, params['decoder'], *compact(codes * keep[..., None], keep))

  def loss(params, frozen, book, batch, key, train):
    k1, k2, k3 = jax.random.split(key, 3)
    x = image_features(model, frozen['vit'], vit_images(batch))[:, 1:].astype(jnp.float32)
    keep, z = encode(params, book, x, k1)
    flat, weight = jax.lax.stop_gradient((z.reshape(-1, code_dim), keep.reshape(-1)))
    if train:  # the first quantised batch of the training, never one that is only looked at
      due = (book.step >= c.quantize_from) & ~book.started
      book = jax.lax.cond(
        due, lambda b: codebook.start_from_kmeans(k2, b, flat, weight), lambda b: b, book
      )
    quantizing = book.started
    ids = codebook.nearest_code(flat, book.embedding)
    e = book.embedding[ids].reshape(z.shape)
    commitment = (keep * jnp.square(z - e).sum(-1)).sum() / keep.sum()
    codes = jnp.where(quantizing, z + jax.lax.stop_gradient(e - z), z)

    cosine = 1 - cosine_similarity(x, reconstruct(params, codes, keep)).mean()
    ratio = jnp.square(c.keep_ratio - keep.mean(-1)).mean()
    value = (
      cosine + c.ratio_weight * ratio + jnp.where(quantizing, c.commitment_weight * commitment, 0.0)
    )

    moved = codebook.update_codebook(k3, book, flat, weight, ids, c.decay, c.revive_after)
    book = moved._replace(
      embedding=jnp.where(quantizing, moved.embedding, book.embedding), step=book.step + 1
    )
    metrics = dict(cosine=cosine, ratio=ratio, commitment=commitment, keep_ratio=keep.mean())
    count, _ = codebook.count_assignments(flat, weight, ids, len(book.embedding))
    metrics |= dict(batch_codes=(count > 0).mean(), batch_perplexity=codebook.perplexity(count))
    return value, (
      book,
      metrics | codebook.usage_metrics(book) if train else metrics,
    )  # a held-out batch is all that it can tell of

  def part(average, book):
    params, embedding = codebook.take_out(average)
    return params, book._replace(embedding=embedding)

  def settle(average, old, new):
    params, embedding = codebook.take_out(average)
    return codebook.put_in(params, codebook.settle(embedding, old, new, c.revive_after))

  average = Average(lambda params, book: codebook.put_in(params, book.embedding), part, settle)

  def export(params, book):
    return dict(tokenizer=whole(params, book), decoder=params['decoder'])

  def about(book):
    return dict(codebook='trained' if book.started else 'untrained')

  def draw(params, frozen, book, batch, key):
    images = batch['image'][:8]
    x = image_features(model, frozen['vit'], vit_images(batch)[:8])[:, 1:].astype(jnp.float32)
    keep, z = encode(params, book, x, key)
    codes = jnp.where(book.started, book.embedding[codebook.nearest_code(z, book.embedding)], z)
    return [
      images,
      shade_dropped(images, keep),
      *feature_colors(x, reconstruct(params, codes, keep), images.shape[1]),
    ]

  hold = ((SELECTOR, freeze_from),)
  return Stage(
    ('vit',),
    (),
    init,
    loss,
    export,
    draw,
    hold,
    takes=('tokenizer', 'decoder'),
    hold_of=hold_of,
    average=average,
    about=about,
  )


def detokenizer(config, model: LavitModules, shards: int) -> Stage:
  """Stage 1b: the U-Net learns to denoise latents under the reconstructed features, sometimes under none (for guidance).

  Of the decoder only the context heads train (the page's `optim.freeze`): the features stay what stage 1 made them.
  """
  del shards
  scheduler = model.scheduler  # of the U-Net that it starts from
  schedule = scheduler.schedule
  num_rows = model.num_patches

  def init(key, parts):
    fresh = init_params(model, key, ('decoder', 'unet', 'uncond_embeddings'))
    uncond = parts.get('uncond_embeddings', fresh.pop('uncond_embeddings'))
    return initialize_params(fresh, parts), dict(uncond_embeddings=uncond)

  def condition(params, frozen, images, key):
    x = image_features(model, frozen['vit'], images)[:, 1:]
    out = apply_module(model.tokenizer, frozen['tokenizer'], x, key)
    rebuilt = apply_module(model.decoder, params['decoder'], *compact(out.codes, out.keep))
    context, _ = apply_module(
      model.decoder, params['decoder'], jax.lax.stop_gradient(rebuilt), method='context'
    )
    return context, out.keep

  def unconditional(state, batch_size):
    context, mask = null_context(state['uncond_embeddings'], num_rows)
    return jnp.broadcast_to(context, (batch_size, *context.shape)), jnp.broadcast_to(
      mask, (batch_size, num_rows)
    )

  def loss(params, frozen, state, batch, key, train):
    del train
    images = batch['image']
    keys = [row_keys(k, batch, len(images)) for k in jax.random.split(key, 5)]
    mean, logvar = apply_module(
      model.vae, frozen['vae'], pixels.preprocess(images), method='encode'
    )
    latents = model.vae.to_unet(pixels.sample_latents(mean, logvar, keys[0]))
    context, keep = condition(params, frozen, vit_images(batch), keys[1])
    drop = (
      draw_rows(jax.random.uniform, keys[2], (len(images), 1)) < config.detokenizer.drop_condition
    )
    null, null_mask = unconditional(state, len(images))
    context, mask = jnp.where(drop[..., None], null, context), jnp.where(drop, null_mask, True)
    t = draw_rows(
      lambda key, shape: jax.random.randint(key, shape, 0, len(schedule.betas)),
      keys[3],
      (len(images),),
    )
    noise = draw_rows(jax.random.normal, keys[4], latents.shape)
    predicted = apply_module(
      model.unet, params['unet'], diffusion.add_noise(schedule, latents, noise, t), t, context, mask
    )
    target = diffusion.training_target(scheduler.prediction_type, schedule, latents, noise, t)
    value = jnp.square(predicted - target).mean()
    return value, (state, dict(keep_ratio=keep.mean(), latent_std=latents.std()))

  def draw(params, frozen, state, batch, key, num_steps=20):
    """Pictures, kept patches, and what the tokens alone give: DDIM, deterministic, with guidance."""
    images = batch['image'][:8]
    k1, k2 = jax.random.split(key)
    context, keep = condition(params, frozen, vit_images(batch)[:8], k1)
    null, null_mask = unconditional(state, len(images))
    side = images.shape[1] // model.vae.factor
    latents = jax.random.normal(k2, (len(images), side, side, model.vae.latent_channels))
    x = sample_latents(
      functools.partial(apply_module, model.unet, params['unet']),
      latents,
      (context, jnp.ones_like(null_mask)),
      (null, null_mask),
      steps=num_steps,
      guidance_scale=config.detokenizer.guidance_scale,
      scheduler=scheduler,
    )
    drawn = apply_module(model.vae, frozen['vae'], model.vae.from_unet(x), method='decode')
    return [images, shade_dropped(images, keep), pixels.postprocess(drawn)]

  def export(params, state):
    return dict(
      unet=params['unet'], decoder=params['decoder'], uncond_embeddings=state['uncond_embeddings']
    )

  return Stage(
    ('vit', 'tokenizer', 'vae'),
    ('decoder',),
    init,
    loss,
    export,
    draw,
    zeros=('uncond_embeddings',),
    takes=('decoder', 'unet', 'uncond_embeddings'),
  )


def count_cut(batch: dict) -> jax.Array:
  """How many texts of a batch were cut, f32[]: nothing of weight follows them."""
  if batch['text_weight'].shape[1] == batch['text'].shape[1]:  # none can be
    return jnp.zeros([])
  behind = jnp.take_along_axis(batch['text_weight'], batch['text_length'][:, None], axis=1)
  return (behind == 0).sum().astype(jnp.float32)


def language_model(config, model: LavitModules, shards: int) -> Stage:
  """Stage 2: the next word or code, over one head. [image, text] reads continuous features, [text, image] code embeddings.

  The merger that understands starts as a copy of the tokenizer's and trains along; the codes stay stage 1's. Each shard
  packs its own pairs.
  """
  c = config.lm
  pieces = shards * config.accumulate
  if c.num_rows % pieces:
    raise UserError(
      f'lm.num_rows={c.num_rows} must be a multiple of the {pieces} pieces of a batch'
    )
  if c.row_length % c.loss_chunks:
    raise UserError(
      f'lm.row_length={c.row_length} must be a multiple of lm.loss_chunks={c.loss_chunks}'
    )
  longest, positions = (
    config.data.text_length + model.num_patches + 3,
    model.llama.max_position_embeddings,
  )
  if longest > positions:
    raise UserError(
      f'data.text_length={config.data.text_length}: with {model.num_patches} visual tokens and 3 marks a pair may have {longest} tokens, but the '
      f'language model of this checkpoint reads max_position_embeddings={positions}; lower data.text_length'
    )

  def init(key, parts):
    params = init_params(model, key, ('llama', 'understanding'))
    params['understanding'] = {**params['understanding'], 'merger': parts['tokenizer']['merger']}
    return initialize_params(params, parts), {}

  def pack_shard(text, text_length, text_weight, kind, codes, visual_length):
    """The pairs of one shard -> their rows, numbered within the shard, and the kind i32[R, S] of each slot's pair, -1 if it is empty."""
    rows = pack_pairs(
      text,
      text_length,
      text_weight,
      kind,
      codes,
      visual_length,
      model.vocabulary,
      num_rows=c.num_rows * len(text) // config.batch_size,
      row_length=c.row_length,
      image_loss=c.image_loss,
    )
    kinds = jnp.where(rows.segments > 0, kind[jnp.maximum(rows.segments - 1, 0)], -1)
    return rows._replace(overflow=rows.overflow[None], used=rows.used[None]), kinds

  def next_token(llama, hidden, targets):
    """Negative log-likelihood and correctness f32[R, S] each, some slots at a time: logits are V wide."""

    def chunk(_, inputs):
      hidden, targets = inputs
      logits = apply_module(model.llama, llama, hidden, method='logits')
      chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
      return None, (
        jax.nn.logsumexp(logits, axis=-1) - chosen,
        (logits.argmax(-1) == targets).astype(jnp.float32),
      )

    def split(x):
      return jnp.moveaxis(x.reshape(len(x), c.loss_chunks, -1, *x.shape[2:]), 1, 0)

    chunk = chunk if config.remat == 'none' else jax.checkpoint(chunk)
    _, out = jax.lax.scan(chunk, None, (split(hidden), split(targets)))
    return (jnp.moveaxis(x, 0, 1).reshape(targets.shape) for x in out)

  def loss(params, frozen, state, batch, key, train):
    del train
    x = image_features(model, frozen['vit'], vit_images(batch))[:, 1:]
    out = apply_module(model.tokenizer, frozen['tokenizer'], x, row_keys(key, batch, len(x)))
    visual, mask = compact(
      apply_module(model.understanding, params['understanding'], x, out.keep), out.keep
    )
    codes, _ = compact(out.ids, out.keep)
    pairs = (
      batch['text'],
      batch['text_length'],
      batch['text_weight'],
      batch['kind'],
      codes,
      mask.sum(-1),
    )
    rows, kind = per_shard(pack_shard, shards, *pairs)
    embedded = apply_module(model.llama, params['llama'], rows.ids, method='embed')
    embedded = per_shard(embed_sources, shards, embedded, rows.source, visual)
    hidden, _ = apply_module(model.llama, params['llama'], embedded, rows.positions, rows.segments)
    nll, correct = next_token(params['llama'], hidden, rows.targets)

    def mean(values, weights):
      return Mean((values * weights).sum(), weights.sum())

    total = mean(nll, rows.weights)
    value = total.total / jnp.maximum(total.weight, 1e-6)
    metrics = dict(
      loss=total,
      token_accuracy=mean(correct, rows.weights),
      packed_share=rows.used.mean(),
      overflow=Sum(rows.overflow.sum().astype(jnp.float32)),
      cut_texts=Sum(count_cut(batch)),
      loss_tokens=Sum((rows.weights > 0).sum().astype(jnp.float32)),
      keep_ratio=out.keep.mean(),
    )
    for i, name in enumerate(('image_to_text', 'text_to_image', 'text_only')):
      weights = rows.weights * (kind == i)
      metrics |= {f'loss_{name}': mean(nll, weights), f'accuracy_{name}': mean(correct, weights)}
    return value, (state, metrics)

  def export(params, state):
    del state
    return dict(llama=params['llama'], understanding=params['understanding'])

  def draw(params, frozen, state, batch, key):
    """Pictures, and the patches that the language model gets to see."""
    del params, state
    images = batch['image'][:8]
    x = image_features(model, frozen['vit'], vit_images(batch)[:8])[:, 1:]
    return [
      images,
      shade_dropped(images, apply_module(model.tokenizer, frozen['tokenizer'], x, key).keep),
    ]

  return Stage(('vit', 'tokenizer'), (), init, loss, export, draw, takes=('llama', 'understanding'))
