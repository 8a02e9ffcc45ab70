"""One optimizer step's gradients, computed in parts that fit the device."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from cfgrl_gym.algorithms.memory.out_of_memory import is_out_of_memory


class MicroBatches:
    """Splits a step's samples into parts of at most `size`, and into smaller ones from then on when
    the device runs out of memory. The gradients are the same however the samples are split, to
    rounding: each sample weighs the same.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def backward(
        self, loss: Callable[[Tensor], Tensor], count: int, optimizer: torch.optim.Optimizer
    ) -> Tensor:
        """Leave the gradients of the mean loss in the parameters.

        :param loss: samples' indices int64 (n,) -> their losses (n,), the same each time
        :param count: samples of the step
        :return: every sample's loss, (count,), detached
        :raises RuntimeError: the device has no memory for a single sample
        """
        while True:
            optimizer.zero_grad()
            losses = []
            for part in torch.arange(count).split(self.size):
                computed = self._attempt(loss, part, count)
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

    def _attempt(self, loss: Callable[[Tensor], Tensor], part: Tensor, count: int) -> Tensor | None:
        try:
            losses = loss(part)
            (losses.sum() / count).backward()
        except (RuntimeError, MemoryError) as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
            return None
        return losses.detach()
