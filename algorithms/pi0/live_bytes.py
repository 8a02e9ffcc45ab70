"""Counting the bytes that a computation would hold, by running it on tensors without storage."""

import copy
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def fake_copy(model: ModuleT, mode: FakeTensorMode) -> ModuleT:
    """A copy of `model` whose tensors claim to lie on the CPU and have no storage.

    :param model: on any device, the meta device included; it is neither changed nor moved
    """
    memo: dict[int, Any] = {}
    with mode:
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(model, memo)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside it make, for as long as they live.

    Memory that an operation takes and gives back before it returns isn't seen, except, where
    `cuda`, the largest of it: PyTorch's memory-efficient attention, which is what a mask of blocks
    gets on CUDA, adds up the gradients of keys and values in float32
    (ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h, kNeedsAccumGradK).

    :ivar now: bytes alive
    :ivar peak: the most bytes that were alive at once

    >>> with FakeTensorMode(), LiveBytes() as live:
    ...     total = (torch.ones(1000) * 2).sum()
    >>> live.peak, live.now
    (8000, 4)
    """

    def __init__(self, cuda: bool = False) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._cuda = cuda
        self._known: set[int] = set()  # storages alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._add((args, kwargs), new=False)
        output = func(*args, **(kwargs or {}))
        self._add(output, new=True)
        if self._cuda and func is _ATTENTION_BACKWARD:
            _, _, keys, values, *_ = args
            self.peak = max(self.peak, self.now + 4 * (keys.numel() + values.numel()))
        return output

    def _add(self, tree: Any, new: bool) -> None:
        """Take note of the storages that aren't known yet; what was there before costs nothing."""
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage._cdata in self._known:
                continue
            size = storage.nbytes() if new else 0
            self._known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
