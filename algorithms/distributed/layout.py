"""Where the windows of an update are: the whole order on every rank, the windows each on one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cfgrl_gym.algorithms.distributed.ranks import Ranks
from cfgrl_gym.algorithms.windows import Replay


@dataclass(frozen=True)
class Layout:
    """Says which windows all ranks have together, in the order in which one rank would have them.

    :param labels: int64 (n,), of all windows
    :param local: int64 (n,), the index of each on this rank; -1 if it is on another
    """

    labels: Tensor
    local: Tensor

    def find(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of these windows are on this rank, bool (m,), and their indices there.

        :param indices: in the whole order, int64 (m,)
        """
        local = self.local[indices]
        here = local >= 0
        return here, local[here]

    @classmethod
    def of(cls, ranks: Ranks, labels: Tensor, replay: Replay) -> "Layout":
        """Arrange the windows of all ranks by iteration and group; a group is on one rank.

        :param labels: int64 (m,), of this rank's windows
        :param replay: that they were joined by
        """
        if ranks.size == 1:
            return cls(labels, torch.arange(len(labels)))
        parts = ranks.gather((labels, replay.places))
        order = torch.cat([each for _, each in parts]).argsort(stable=True)
        before = sum(len(own) for own, _ in parts[: ranks.rank])
        local = order - before
        elsewhere = (local < 0) | (local >= len(labels))
        return cls(torch.cat([own for own, _ in parts])[order], local.masked_fill(elsewhere, -1))
