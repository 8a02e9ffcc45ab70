"""The returns of all ranks' groups, by which they end a collection together."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from cfgrl_gym.algorithms.distributed.ranks import RankError, Ranks, RanksStopped, reaching_others
from cfgrl_gym.algorithms.groups import GroupPlan

STOPPED, FAILED = 0, 1


class SharedReturns:
    """Tells the other ranks the returns of this one's groups, while all go on collecting.

    Ranks exchange what they have in rounds, each of which ends when the slowest has come to it.
    After a round all know the same, so that they agree on the last one.

    :param plan: of the collection, the same on all ranks
    """

    def __init__(self, ranks: Ranks, plan: GroupPlan) -> None:
        self.ranks, self.plan = ranks, plan
        self.known: dict[int, Sequence[float]] = {}
        self._own: Mapping[int, Sequence[float]] = {}
        self._round: Any = None
        self._sent = torch.empty(0)

    def update(self, own: Mapping[int, Sequence[float]]) -> Mapping[int, Sequence[float]]:
        """Return the returns of the groups that all ranks know to be complete, by group index.

        :param own: those of this rank's groups so far
        :raises RankError: another rank failed or is gone
        :raises RanksStopped: the callback of another rank asked to stop
        """
        self._own = own
        if self.ranks.size == 1:
            return own
        if self._round is not None and self._round.is_completed():
            self._end_round()
        elif self._round is None and not self.complete:
            self._begin_round()
        return self.known

    def wait(self) -> None:
        """Wait for the others to come to this round, if this rank has nothing left to do."""
        self._end_round()

    def leave(self, stopped: bool = False) -> None:
        """Tell the others that this rank's callback asked to stop, or that it failed."""
        if self.ranks.size == 1:
            return
        with suppress(RankError, RanksStopped), reaching_others():  # they may be leaving as well
            if self._round is not None:
                self._end_round(last=True)
            if self.complete:  # for the others, the collection is over
                self.ranks.leave(stopped)
            else:
                self._begin_round(STOPPED if stopped else FAILED)
                self._round.wait()

    @property
    def complete(self) -> bool:
        return self.plan.select(self.known).complete

    def _begin_round(self, status: int | None = None) -> None:
        size = self.plan.group_size
        # The returns of every group and whether it is complete; then how many ranks leave, and why.
        self._sent = torch.zeros(len(self.plan.groups) + 1, max(size + 1, 2), dtype=torch.float64)
        for row, group in enumerate(self.plan.groups):
            returns = self._own.get(group.index, ())
            if len(returns) == size:
                self._sent[row, : size + 1] = torch.tensor([*returns, 1.0])
        if status is not None:
            self._sent[-1, status] = 1.0
        with reaching_others():
            self._round = dist.all_reduce(self._sent, group=self.ranks.host, async_op=True)

    def _end_round(self, last: bool = False) -> None:
        with reaching_others():
            self._round.wait()
        self._round = None
        if self._sent[-1, FAILED]:
            raise RankError
        if self._sent[-1, STOPPED]:
            raise RanksStopped
        size = self.plan.group_size
        for row, group in enumerate(self.plan.groups):
            if self._sent[row, size]:
                self.known[group.index] = self._sent[row, :size].tolist()
        if not self.complete and not last:
            self._begin_round()
