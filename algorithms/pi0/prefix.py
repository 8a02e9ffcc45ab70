"""The keys and values of PI0's prefix (images and language): computed once, used by everything."""

import inspect
from dataclasses import dataclass
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
    """What the action expert attends to besides its own tokens. Nothing ever writes to it, so any
    number of branches, denoising steps and epochs can share one.

    :param keys_values: (batch, layers, 2, kv_heads, tokens, head_dim), in the VLM's dtype; 18 KB a
        token at full size in bfloat16
    :param attention_mask: int64 (batch, tokens), 1 for real tokens
    """

    keys_values: Tensor
    attention_mask: Tensor

    @classmethod
    def from_cache(cls, cache: Any, attention_mask: Tensor | None) -> "Prefix":
        """What transformers' VLM put into its cache. Without a mask every token is real."""
        layers = [torch.stack([layer.keys, layer.values], 1) for layer in cache.layers]
        keys_values = torch.stack(layers, 1)
        if attention_mask is None:
            batch, tokens = keys_values.shape[0], keys_values.shape[-2]
            attention_mask = torch.ones(batch, tokens, dtype=torch.int64, device=keys_values.device)
        return cls(keys_values, attention_mask)

    def to_cache(self) -> DynamicCache:
        """For transformers' own forward, which lengthens the cache it gets: one for each call."""
        cache = DynamicCache()
        for layer in range(self.keys_values.shape[1]):
            keys, values = self.keys_values[:, layer].unbind(1)
            cache.update(keys, values, layer)
        return cache

    def rows(self) -> list["Prefix"]:
        """The prefix of each sample, batch size 1 (views)."""
        return [
            Prefix(keys_values[None], mask[None])
            for keys_values, mask in zip(self.keys_values, self.attention_mask, strict=True)
        ]


def join(prefixes: list[Prefix]) -> Prefix:
    """One batch of several; shorter ones are padded with tokens that don't exist."""
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


def select_rows(rows: Tensor, yes: Prefix, no: Prefix) -> Prefix:
    """The prefix whose row i is `yes`' where rows[i] and `no`'s elsewhere; rows bool (batch,)."""
    return Prefix(
        torch.where(rows[:, None, None, None, None, None], yes.keys_values, no.keys_values),
        torch.where(rows[:, None], yes.attention_mask, no.attention_mask),
    )


class Recorder:
    """What a Gemma attention layer asks of a cache; keeps the keys and values that it is shown."""

    keys_values: Tensor  # (batch, 2, kv_heads, tokens, head_dim)

    def update(
        self,
        keys: Tensor,
        values: Tensor,
        *_: Any,
        **__: Any,  # by position or name, by version
    ) -> tuple[Tensor, Tensor]:
        self.keys_values = torch.stack([keys, values], 1)
        return keys, values


def run_prefix(
    language_model: Any, embeds: Tensor, attention_mask: Tensor, checkpointing: bool
) -> Prefix:
    """The language model's keys and values of every layer, and nothing that isn't needed for them:
    of the last layer neither attention nor MLP.

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

    *layers, last = language_model.layers
    hidden, keys_values = embeds, []
    for layer in layers:
        if checkpointing:
            hidden, own = checkpoint(run, layer, hidden, use_reentrant=False)
        else:
            hidden, own = run(layer, hidden)
        keys_values.append(own)
    keys_values.append(_keys_values(last, hidden, rotary))
    return Prefix(torch.stack(keys_values, 1), attention_mask)


def _mask(allowed: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """In the form that transformers' attention takes: bool for sdpa, added for eager.

    :param allowed: bool (batch, 1, tokens, tokens)
    """
    if config._attn_implementation == "eager":
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return allowed


def _keys_values(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """transformers' GemmaAttention.forward as far as the cache."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(normed).view(shape).transpose(1, 2)
    values = attention.v_proj(normed).view(shape).transpose(1, 2)
    _, keys = apply_rotary_pos_emb(keys, keys, *rotary)
    return torch.stack([keys, values], 1)
