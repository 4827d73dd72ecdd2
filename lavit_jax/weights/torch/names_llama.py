"""Name rules of the language model: LlamaForCausalLM of transformers <-> `models.llama.Llama`.

Both sides rotate positions in the half-split layout, so no head is permuted (specification,
Checkpoint layout).
"""

from __future__ import annotations

from lavit_jax.weights.torch.name_rules import NameRule

_LAYER = 'model.layers.{i}.'


def llama_rules() -> list[NameRule]:
  """`Llama` of any size. Old files also hold the rotary frequencies, which are computed here."""
  return [
    NameRule('model.embed_tokens.weight', 'embedding'),
    NameRule(_LAYER + 'input_layernorm.weight', 'layers/attention_norm/scale'),
    NameRule(_LAYER + 'self_attn.q_proj.weight', 'layers/attention/query/kernel', 'linear'),
    NameRule(_LAYER + 'self_attn.k_proj.weight', 'layers/attention/key/kernel', 'linear'),
    NameRule(_LAYER + 'self_attn.v_proj.weight', 'layers/attention/value/kernel', 'linear'),
    NameRule(_LAYER + 'self_attn.o_proj.weight', 'layers/attention/proj/kernel', 'linear'),
    NameRule(_LAYER + 'post_attention_layernorm.weight', 'layers/mlp_norm/scale'),
    NameRule(_LAYER + 'mlp.gate_proj.weight', 'layers/mlp/gate/kernel', 'linear'),
    NameRule(_LAYER + 'mlp.up_proj.weight', 'layers/mlp/up/kernel', 'linear'),
    NameRule(_LAYER + 'mlp.down_proj.weight', 'layers/mlp/down/kernel', 'linear'),
    NameRule(_LAYER + 'self_attn.rotary_emb.inv_freq', None),
    NameRule('model.norm.weight', 'norm/scale'),
    NameRule('lm_head.weight', 'head', 'linear'),
  ]
