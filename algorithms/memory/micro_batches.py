"""One optimizer step's gradients, computed in parts that fit the device."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# An allocation that fails outside torch's own CUDA allocator is a plain RuntimeError, which only
# its text tells apart: c10/core/impl/alloc_cpu.cpp, the CUDA driver, cuBLAS and cuDNN.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a failed allocation, of the device's memory or of the host's.

    True for torch.OutOfMemoryError, MemoryError (Python's and NumPy's), and the RuntimeErrors
    of torch's CPU allocator, the CUDA driver, cuBLAS and cuDNN.
    """
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


class MicroBatches:
    """Splits a step's samples into parts of at most `size`, and into smaller ones from then on when
    the device runs out of memory. The gradients are the same however the samples are split, to
    rounding: each sample weighs the same.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def backward(
        self, optimizer: torch.optim.Optimizer, loss: Callable[..., Tensor], *samples: Any
    ) -> Tensor:
        """Leave the gradients of the mean loss in the parameters.

        :param loss: some of the samples -> the loss of each, (n,)
        :param samples: arguments of `loss`, each indexed by rows, int64 (n,)
        :return: every sample's loss, (batch,), detached
        :raises RuntimeError: the device has no memory for a single sample
        """
        count = len(samples[0])
        while True:
            optimizer.zero_grad()
            losses = []
            for rows in torch.arange(count).split(self.size):
                computed = self._attempt(loss, [sample[rows] for sample in samples], count)
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
            # Only here, outside the except clause, is nothing of the failed attempt alive.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _attempt(
        self, loss: Callable[..., Tensor], samples: list[Any], count: int
    ) -> Tensor | None:
        try:
            losses = loss(*samples)
            (losses.sum() / count).backward()
        except (RuntimeError, MemoryError) as error:
            if len(samples[0]) == 1 or not is_out_of_memory(error):
                raise
            return None
        return losses.detach()
