"""The key-value cache of PI0's prefix (images and language): computed once, forked for each use."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


def fork_cache(cache: DynamicCache) -> DynamicCache:
    """A cache that shares `cache`'s tensors but grows on its own.

    The expert appends the suffix's keys and values to the cache it is given. An append is an
    out-of-place concatenation, so copying the cache and its layer objects, and no tensor, keeps
    the original as it was; without a fork the next call attends to this call's action tokens.
    """
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


@dataclass(frozen=True)
class Prefix:
    """The prefix's keys and values and the mask that says which of its tokens exist.

    :param cache: keys and values of every VLM layer, (batch, kv_heads, tokens, head_dim)
    :param attention_mask: int64 (batch, tokens), 1 for real tokens
    """

    cache: DynamicCache
    attention_mask: Tensor

    def fork(self) -> DynamicCache:
        """A cache for one forward pass of the expert."""
        return fork_cache(self.cache)


def select_rows(rows: Tensor, yes: Prefix, no: Prefix) -> Prefix:
    """The prefix whose row i is `yes`' where rows[i] and `no`'s elsewhere; rows bool (batch,)."""
    cache: Any = fork_cache(yes.cache)
    pick = rows[:, None, None, None]
    others: Any = no.cache.layers
    for layer, other in zip(cache.layers, others, strict=True):
        layer.keys = torch.where(pick, layer.keys, other.keys)
        layer.values = torch.where(pick, layer.values, other.values)
    mask = torch.where(rows[:, None], yes.attention_mask, no.attention_mask)
    return Prefix(cache, mask)
