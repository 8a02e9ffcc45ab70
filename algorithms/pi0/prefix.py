"""Computes the keys and values of PI0's prefix (images and language), to be used many times."""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, apply_rotary_pos_emb

# The argument in which transformers takes a cache: renamed in 5.24, the old name goes in 5.40.
CACHE = "cache"
if CACHE not in inspect.signature(GemmaDecoderLayer.forward).parameters:
    CACHE = "past_key_values"


@dataclass(frozen=True)
class Prefix:
    """Holds the keys and values of images and language, which the action expert attends to.

    A prefix is never modified, so any number of branches, denoising steps and epochs can share it.

    :param keys_values: (batch, layers, 2, kv_heads, tokens, head_dim), in the VLM's dtype; 18 KB
        per token at full size in bfloat16
    :param attention_mask: int64 (batch, tokens), 1 for real tokens
    """

    keys_values: Tensor
    attention_mask: Tensor

    @classmethod
    def from_cache(cls, cache: Any, attention_mask: Tensor) -> "Prefix":
        """Take the keys and values from a cache that transformers' VLM filled."""
        layers = [torch.stack([layer.keys, layer.values], 1) for layer in cache.layers]
        return cls(torch.stack(layers, 1), attention_mask)

    def to_cache(self) -> DynamicCache:
        """Build a KV cache for one call of transformers' own forward, which extends it."""
        cache = DynamicCache()
        for layer in range(self.keys_values.shape[1]):
            keys, values = self.keys_values[:, layer].unbind(1)
            cache.update(keys, values, layer)
        return cache

    def rows(self) -> list["Prefix"]:
        """Split the batch into the prefixes of its samples, batch size 1 (views)."""
        return [
            Prefix(keys_values[None], mask[None])
            for keys_values, mask in zip(self.keys_values, self.attention_mask, strict=True)
        ]


def join(prefixes: list[Prefix]) -> Prefix:
    """Concatenate prefixes into one batch; shorter ones are padded with masked tokens."""
    length = max(prefix.attention_mask.shape[1] for prefix in prefixes)
    padded = [_pad(prefix, length) for prefix in prefixes]
    return Prefix(
        torch.cat([prefix.keys_values for prefix in padded]),
        torch.cat([prefix.attention_mask for prefix in padded]),
    )


def _pad(prefix: Prefix, length: int) -> Prefix:
    missing = length - prefix.attention_mask.shape[1]
    if not missing:
        return prefix
    return Prefix(
        F.pad(prefix.keys_values, (0, 0, 0, missing)), F.pad(prefix.attention_mask, (0, missing))
    )


class Recorder:
    """Stands in for a KV cache in a pass of a Gemma attention layer, and keeps keys and values."""

    keys_values: Tensor  # (batch, 2, kv_heads, tokens, head_dim)

    def update(
        self,
        keys: Tensor,
        values: Tensor,
        *_: Any,
        **__: Any,  # by position or by name, depending on the version
    ) -> tuple[Tensor, Tensor]:
        self.keys_values = torch.stack([keys, values], 1)
        return keys, values


def run_prefix(
    language_model: Any, embeds: Tensor, attention_mask: Tensor, checkpointing: bool
) -> Prefix:
    """Compute the language model's keys and values of every layer.

    The last layer's attention and MLP are skipped, because no keys or values depend on them.

    :param language_model: transformers' GemmaModel
    :param embeds: (batch, tokens, hidden): images and language embedded
    :param attention_mask: int64 (batch, tokens), 1 for real tokens; all real tokens see each other
    :param checkpointing: keep only each layer's input for the backward pass
    """
    allowed = attention_mask.bool()[:, None, None, :].expand(-1, 1, embeds.shape[1], -1)
    mask = _mask(allowed, language_model.config, embeds.dtype)
    position_ids = attention_mask.cumsum(-1) - 1
    rotary = language_model.rotary_emb(embeds, position_ids=position_ids)

    def run(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        cache = Recorder()
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, **{CACHE: cache})
        return hidden, cache.keys_values

    step = partial(checkpoint, run, use_reentrant=False) if checkpointing else run
    *layers, last = language_model.layers
    hidden, keys_values = embeds, []
    for layer in layers:
        hidden, own = step(layer, hidden)
        keys_values.append(own)
    keys_values.append(_keys_values(last, hidden, rotary))
    return Prefix(torch.stack(keys_values, 1), attention_mask)


def _mask(allowed: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """Convert a mask to the form that transformers' attention takes: bool for sdpa, else added.

    :param allowed: bool (batch, 1, tokens, tokens)
    """
    if config._attn_implementation == "eager":
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return allowed


def _keys_values(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Run transformers' GemmaAttention.forward up to the KV cache."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(normed).view(shape).transpose(1, 2)
    values = attention.v_proj(normed).view(shape).transpose(1, 2)
    _, keys = apply_rotary_pos_emb(keys, keys, *rotary)
    return torch.stack([keys, values], 1)
