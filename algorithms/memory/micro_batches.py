"""Computes the gradients of one optimizer step in micro-batches that fit the device."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# An allocation that fails outside torch's own CUDA allocator raises a plain RuntimeError, which can
# only be told by its text: c10/core/impl/alloc_cpu.cpp, the CUDA driver, cuBLAS and cuDNN.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is a failed allocation of the device's or the host's memory.

    True for torch.OutOfMemoryError, MemoryError (Python's and NumPy's), and the RuntimeErrors
    of torch's CPU allocator, the CUDA driver, cuBLAS and cuDNN.
    """
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


class MicroBatches:
    """Splits a step's samples into micro-batches of at most `size`, which becomes smaller for good
    when the device runs out of memory.

    Up to rounding, the gradients don't depend on the split: each sample has the same weight.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def backward(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
        *samples: Any,
        batch_size: int,
    ) -> Tensor:
        """Set the parameters' gradients to those of the sum of losses divided by `batch_size`.

        :param loss: some of the samples -> the loss of each, (n,)
        :param samples: arguments of `loss`, each indexed by rows, int64 (n,)
        :param batch_size: samples of the optimizer step, on all ranks
        :return: every sample's loss, (n,), detached
        :raises RuntimeError: the device has no memory for a single sample
        """
        count = len(samples[0])
        if count == 0:
            optimizer.zero_grad()
            return torch.empty(0)
        while True:
            optimizer.zero_grad()
            losses = []
            for rows in torch.arange(count).split(self.size):
                of_rows = [sample[rows] for sample in samples]
                computed = self._attempt(loss, of_rows, batch_size)
                if computed is None:
                    break
                losses.append(computed)
            else:
                return torch.cat(losses)
            self.size = (min(self.size, count) + 1) // 2
            warnings.warn(
                f"out of memory: going on with micro-batches of {self.size}, which changes memory "
                "and speed only; a smaller batch_size with more gradient_accumulation_steps "
                "avoids this",
                stacklevel=2,
            )
            # Only here, outside the except clause, are all tensors of the failed attempt freed.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _attempt(
        self, loss: Callable[..., Tensor], samples: list[Any], batch_size: int
    ) -> Tensor | None:
        try:
            losses = loss(*samples)
            (losses.sum() / batch_size).backward()
        except (RuntimeError, MemoryError) as error:
            if len(samples[0]) == 1 or not is_out_of_memory(error):
                raise
            return None
        return losses.detach()
