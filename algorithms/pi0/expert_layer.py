"""A layer of the action expert over a prefix's keys and values, as one attention for all heads.

transformers' layer gives the same numbers. Its attention hands PI0's one key-value head to the
kernel eight times, which in the backward pass means eight gradients of the prefix to be added up;
here the query heads that share a key-value head are queries of it, one after the other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

Rotary = tuple[Tensor, Tensor]  # cosine and sine, (batch, tokens, head_dim)


def attention_bias(allowed: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """What `run_layer` adds to the attention's logits, (batch, 1, heads_per_key · tokens, keys).

    :param allowed: which key each token sees, bool (batch, tokens, keys)
    """
    groups = config.num_attention_heads // config.num_key_value_heads
    bias = torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, float("-inf"))
    return bias.repeat(1, groups, 1)[:, None]


def run_layer(layer: Any, hidden: Tensor, rotary: Rotary, bias: Tensor, prefix: Tensor) -> Tensor:
    """transformers' GemmaDecoderLayer.forward.

    :param hidden: (batch, tokens, width)
    :param bias: see `attention_bias`
    :param prefix: (batch, 2, kv_heads, prefix tokens, head_dim), keys and values
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    queries, keys, values = (
        projection(normed).view(shape).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
    before = prefix.to(values.dtype)
    keys = torch.cat([before[:, 0], keys.to(values.dtype)], dim=2)
    values = torch.cat([before[:, 1], values], dim=2)
    kv_heads, tokens = keys.shape[1], hidden.shape[1]
    grouped = queries.to(values.dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    attended = F.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=bias.to(values.dtype), scale=attention.scaling
    )
    attended = attended.unflatten(2, (-1, tokens)).flatten(1, 2).transpose(1, 2).flatten(2)
    hidden = hidden + attention.o_proj(attended)
    output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return output
