"""The trainings (REFERENCE section 3): what each learns, from what, and how well it does.

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

from lavit_jax.data import mixtures
from lavit_jax.errors import UserError
from lavit_jax.inference.diffusion import sample
from lavit_jax.models import lavit
from lavit_jax.models import noise as diffusion
from lavit_jax.models import vae as pixels
from lavit_jax.models.decoder import null_context
from lavit_jax.models.initial import initial_parts
from lavit_jax.models.lavit import Lavit
from lavit_jax.models.layers import per_shard
from lavit_jax.models.sequence import compact, embed_sources, pack
from lavit_jax.models.tokenizer import gumbel_keep
from lavit_jax.training import codebook
from lavit_jax.training.foundations import autoencoder, encoder
from lavit_jax.training.stage import Stage, apply, begin, cosine_similarity, feature_colours, features, shade_dropped


PAGES = dict(  # data.task of each stage, and what its page alone has
    encoder=('contrastive', 'text_tower'), autoencoder=('images', 'kl_weight'), tokenizer=('images', 'tokenizer'),
    detokenizer=('images', 'detokenizer'), lm=('lm', 'lm'))
COUNTS = ('overflow', 'loss_tokens')  # metrics that add up over the pieces of a batch; the others are averaged


def build(config, model: Lavit, shards: int) -> Stage:
  """The stage that `config.stage` names; `shards` is the number of pieces that a batch is split into."""
  _known(config.stage)
  stages = dict(encoder=encoder, autoencoder=autoencoder, tokenizer=tokenizer, detokenizer=detokenizer, lm=lm)
  return stages[config.stage](config, model, shards)


def _known(stage: str) -> tuple[str, str]:
  if stage not in PAGES:
    raise UserError(f'unknown stage {stage!r}; known: {", ".join(PAGES)}')
  return PAGES[stage]


def check(config) -> None:
  """Raises UserError for a stage that is not the page's, and for pictures of a size that it cannot take."""
  task, own = _known(config.stage)
  if config.data.task != task or own not in config:
    raise UserError(f'stage={config.stage!r} needs data.task={task!r} (now {config.data.task!r}) and {own!r} in the page; take configs/{config.stage}.py')
  model, size = lavit.build(config.variant), config.data.image_size
  if config.stage == 'encoder' and size != model.image_size:
    raise UserError(f'data.image_size={size}: the encoder of variant {config.variant} learns from {model.image_size} pixels a side')
  latents = dict(autoencoder=1, detokenizer=2 ** (len(model.unet.block_out_channels) - 1)).get(config.stage)
  shaded = config.picture_every and config.stage in ('tokenizer', 'detokenizer', 'lm')  # patch by patch
  multiple = math.lcm(latents * model.vae.factor if latents else 1, model.image_size // model.vit.patch_size if shaded else 1)
  if size % multiple:
    raise UserError(f'data.image_size={size} must be a multiple of {multiple} for stage {config.stage} of variant {config.variant}')


def abstract_inputs(config, model: Lavit, stage: Stage) -> tuple[dict, dict]:
  """(the parts that the stage needs or starts from, a batch of all processes) as ShapeDtypeStructs."""
  parts = jax.eval_shape(lambda: initial_parts(model, jax.random.key(0), stage.needs + stage.starts))
  data = config.data
  batch = mixtures.shapes(data.task, config.batch_size, data.image_size, data.get('text_length', 0))
  return parts, {name: jax.ShapeDtypeStruct(*like) for name, like in batch.items()}


def tokens(config) -> int:
  """What a step has room for: slots of packed rows of the language model (`packed_share` of them hold a token), patches of the others."""
  if config.stage == 'lm':
    return config.lm.num_rows * config.lm.row_length
  return config.batch_size * lavit.build(config.variant).num_patches


def tokenizer(config, model: Lavit, shards: int) -> Stage:
  """Stage 1: as few tokens as needed to reconstruct the features, first continuous, from `quantize_from` on quantised.

  The codebook is state: k-means on the first quantised batch, then moving averages. At `freeze_selector_from` (-1: when
  quantisation begins) the selector stops: still training, it would buy back with more tokens what quantisation costs.
  """
  del shards
  c = config.tokenizer
  code_dim = model.tokenizer.code_dim
  freeze_from = c.quantize_from if c.freeze_selector_from < 0 else c.freeze_selector_from

  def init(key, parts):
    params = begin(initial_parts(model, key, ('tokenizer', 'decoder')), parts)
    quantizer = dict(params['tokenizer']['quantizer'])
    book = codebook.create(quantizer.pop('embedding'))
    return {**params, 'tokenizer': {**params['tokenizer'], 'quantizer': quantizer}}, book

  def whole(params, book):
    """The tokenizer's parameters with the codebook in its place."""
    return {**params['tokenizer'], 'quantizer': {**params['tokenizer']['quantizer'], 'embedding': book.embedding}}

  def encode(params, book, x, key):
    """Features [B, N, D] -> (keep f32[B, N], unit vectors before quantisation f32[B, N, C])."""
    tok = whole(params, book)
    keep = gumbel_keep(apply(model.tokenizer, tok, x, method='select'), key=key)
    merged = apply(model.tokenizer, tok, x, keep, method='merge')
    return keep, apply(model.tokenizer, tok, merged, method='quantize')[1]

  def reconstruct(params, codes, keep):
    """codes [B, N, C] * keep f32[B, N], through which the gradient reaches the selector -> features [B, N, D]."""
    return apply(model.decoder, params['decoder'], *compact(codes * keep[..., None], keep))

  def loss(params, frozen, book, batch, key, train):
    k1, k2, k3 = jax.random.split(key, 3)
    x = features(model, frozen['vit'], batch['image'])[:, 1:].astype(jnp.float32)
    keep, z = encode(params, book, x, k1)
    flat, weight = jax.lax.stop_gradient((z.reshape(-1, code_dim), keep.reshape(-1)))
    if train:  # the first quantised batch of the training, never one that is only looked at
      due = (book.step >= c.quantize_from) & ~book.started
      book = jax.lax.cond(due, lambda b: codebook.start(k2, b, flat, weight), lambda b: b, book)
    quantizing = book.started
    ids = codebook.nearest_code(flat, book.embedding)
    e = book.embedding[ids].reshape(z.shape)
    commitment = (keep * jnp.square(z - e).sum(-1)).sum() / keep.sum()
    codes = jnp.where(quantizing, z + jax.lax.stop_gradient(e - z), z)

    cosine = 1 - cosine_similarity(x, reconstruct(params, codes, keep)).mean()
    ratio = jnp.square(c.keep_ratio - keep.mean(-1)).mean()
    value = cosine + c.ratio_weight * ratio + jnp.where(quantizing, c.commitment_weight * commitment, 0.0)

    moved = codebook.update(k3, book, flat, weight, ids, c.decay, c.revive_after)
    book = moved._replace(embedding=jnp.where(quantizing, moved.embedding, book.embedding), step=book.step + 1)
    metrics = dict(cosine=cosine, ratio=ratio, commitment=commitment, keep_ratio=keep.mean())
    count, _ = codebook.tally(flat, weight, ids, len(book.embedding))
    metrics |= dict(batch_codes=(count > 0).mean(), batch_perplexity=codebook.perplexity(count))
    return value, (book, metrics | codebook.usage(book) if train else metrics)  # a held-out batch is all that it can tell of

  def export(params, book):
    return dict(tokenizer=whole(params, book), decoder=params['decoder'])

  def draw(params, frozen, book, batch, key):
    images = batch['image'][:8]
    x = features(model, frozen['vit'], images)[:, 1:].astype(jnp.float32)
    keep, z = encode(params, book, x, key)
    codes = jnp.where(book.started, book.embedding[codebook.nearest_code(z, book.embedding)], z)
    return [images, shade_dropped(images, keep), *feature_colours(x, reconstruct(params, codes, keep), images.shape[1])]

  hold = ((r'^tokenizer/selector/', freeze_from),)
  return Stage(('vit',), (), init, loss, export, draw, hold)


def detokenizer(config, model: Lavit, shards: int) -> Stage:
  """Stage 1b: the U-Net learns to denoise latents under the reconstructed features, sometimes under none (for guidance).

  Of the decoder only the context heads train (the page's `optim.freeze`): the features stay what stage 1 made them.
  """
  del shards
  schedule = diffusion.scaled_linear()
  num_rows = model.num_patches

  def init(key, parts):
    fresh = initial_parts(model, key, ('decoder', 'unet', 'uncond_embeddings'))
    uncond = parts.get('uncond_embeddings', fresh.pop('uncond_embeddings'))
    return begin(fresh, parts), dict(uncond_embeddings=uncond)

  def condition(params, frozen, images, key):
    x = features(model, frozen['vit'], images)[:, 1:]
    out = apply(model.tokenizer, frozen['tokenizer'], x, key)
    rebuilt = apply(model.decoder, params['decoder'], *compact(out.codes, out.keep))
    context, _ = apply(model.decoder, params['decoder'], jax.lax.stop_gradient(rebuilt), method='context')
    return context, out.keep

  def unconditional(state, batch_size):
    context, mask = null_context(state['uncond_embeddings'], num_rows)
    return jnp.broadcast_to(context, (batch_size, *context.shape)), jnp.broadcast_to(mask, (batch_size, num_rows))

  def loss(params, frozen, state, batch, key, train):
    del train
    keys = jax.random.split(key, 5)
    images = batch['image']
    mean, logvar = apply(model.vae, frozen['vae'], pixels.preprocess(images), method='encode')
    latents = model.vae.scaling_factor * pixels.sample_latents(mean, logvar, keys[0])
    context, keep = condition(params, frozen, images, keys[1])
    drop = jax.random.bernoulli(keys[2], config.detokenizer.drop_condition, (len(images), 1))
    null, null_mask = unconditional(state, len(images))
    context, mask = jnp.where(drop[..., None], null, context), jnp.where(drop, null_mask, True)
    t = jax.random.randint(keys[3], (len(images),), 0, len(schedule.betas))
    target = jax.random.normal(keys[4], latents.shape)
    predicted = apply(model.unet, params['unet'], diffusion.add_noise(schedule, latents, target, t), t, context, mask)
    value = jnp.square(predicted - target).mean()
    return value, (state, dict(keep_ratio=keep.mean(), latent_std=latents.std()))

  def draw(params, frozen, state, batch, key, num_steps=20):
    """Pictures, kept patches, and what the tokens alone give: DDIM, deterministic, with guidance."""
    images = batch['image'][:8]
    k1, k2 = jax.random.split(key)
    context, keep = condition(params, frozen, images, k1)
    null, null_mask = unconditional(state, len(images))
    side = images.shape[1] // model.vae.factor
    latents = jax.random.normal(k2, (len(images), side, side, model.vae.latent_channels))
    x = sample(functools.partial(apply, model.unet, params['unet']), latents, (context, jnp.ones_like(null_mask)), (null, null_mask),
               steps=num_steps, guidance_scale=config.detokenizer.guidance_scale, schedule=schedule)
    drawn = apply(model.vae, frozen['vae'], x / model.vae.scaling_factor, method='decode')
    return [images, shade_dropped(images, keep), pixels.postprocess(drawn)]

  def export(params, state):
    return dict(unet=params['unet'], decoder=params['decoder'], uncond_embeddings=state['uncond_embeddings'])

  return Stage(('vit', 'tokenizer', 'vae'), ('decoder',), init, loss, export, draw, zeros=('uncond_embeddings',))


def lm(config, model: Lavit, shards: int) -> Stage:
  """Stage 2: the next word or code, over one head. [image, text] reads continuous features, [text, image] code embeddings.

  The merger that understands starts as a copy of the tokenizer's and trains along; the codes stay stage 1's. Each shard
  packs its own pairs.
  """
  c = config.lm
  pieces = shards * config.accumulate
  if c.num_rows % pieces:
    raise UserError(f'lm.num_rows={c.num_rows} must be a multiple of the {pieces} pieces of a batch')
  if c.row_length % c.loss_chunks:
    raise UserError(f'lm.row_length={c.row_length} must be a multiple of lm.loss_chunks={c.loss_chunks}')
  longest, positions = config.data.text_length + model.num_patches + 3, model.llama.max_position_embeddings
  if longest > positions:
    raise UserError(f'data.text_length={config.data.text_length}: with {model.num_patches} visual tokens and 3 marks a pair may have {longest} tokens, but the '
                    f'language model of this checkpoint reads max_position_embeddings={positions}; lower data.text_length')

  def init(key, parts):
    params = initial_parts(model, key, ('llama', 'understanding'))
    params['understanding'] = {**params['understanding'], 'merger': parts['tokenizer']['merger']}
    return begin(params, parts), {}

  def pack_shard(text, text_length, text_weight, kind, codes, visual_length):
    """The pairs of one shard -> their rows, numbered within the shard, and the kind i32[R, S] of each slot's pair, -1 if it is empty."""
    rows = pack(text, text_length, text_weight, kind, codes, visual_length, model.vocabulary, num_rows=c.num_rows * len(text) // config.batch_size,
                row_length=c.row_length, image_loss=c.image_loss)
    kinds = jnp.where(rows.segments > 0, kind[jnp.maximum(rows.segments - 1, 0)], -1)
    return rows._replace(overflow=rows.overflow[None], used=rows.used[None]), kinds

  def next_token(llama, hidden, targets):
    """Negative log-likelihood and correctness f32[R, S] each, some slots at a time: logits are V wide."""

    def chunk(_, inputs):
      hidden, targets = inputs
      logits = apply(model.llama, llama, hidden, method='logits')
      chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
      return None, (jax.nn.logsumexp(logits, axis=-1) - chosen, (logits.argmax(-1) == targets).astype(jnp.float32))

    def split(x):
      return jnp.moveaxis(x.reshape(len(x), c.loss_chunks, -1, *x.shape[2:]), 1, 0)

    chunk = chunk if config.remat == 'none' else jax.checkpoint(chunk)
    _, out = jax.lax.scan(chunk, None, (split(hidden), split(targets)))
    return (jnp.moveaxis(x, 0, 1).reshape(targets.shape) for x in out)

  def loss(params, frozen, state, batch, key, train):
    del train
    x = features(model, frozen['vit'], batch['image'])[:, 1:]
    out = apply(model.tokenizer, frozen['tokenizer'], x, key)
    visual, mask = compact(apply(model.understanding, params['understanding'], x, out.keep), out.keep)
    codes, _ = compact(out.ids, out.keep)
    pairs = (batch['text'], batch['text_length'], batch['text_weight'], batch['kind'], codes, mask.sum(-1))
    rows, kind = per_shard(pack_shard, shards, *pairs)
    embedded = apply(model.llama, params['llama'], rows.ids, method='embed')
    embedded = per_shard(embed_sources, shards, embedded, rows.source, visual)
    hidden, _ = apply(model.llama, params['llama'], embedded, rows.positions, rows.segments)
    nll, correct = next_token(params['llama'], hidden, rows.targets)

    def mean(values, weights):
      return (values * weights).sum() / weights.sum()  # nan where nothing counts: that is what it is

    value = (nll * rows.weights).sum() / jnp.maximum(rows.weights.sum(), 1e-6)
    metrics = dict(token_accuracy=mean(correct, rows.weights), packed_share=rows.used.mean(), overflow=rows.overflow.sum().astype(jnp.float32),
                   loss_tokens=(rows.weights > 0).sum().astype(jnp.float32), keep_ratio=out.keep.mean())
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
    x = features(model, frozen['vit'], images)[:, 1:]
    return [images, shade_dropped(images, apply(model.tokenizer, frozen['tokenizer'], x, key).keep)]

  return Stage(('vit', 'tokenizer'), (), init, loss, export, draw)
