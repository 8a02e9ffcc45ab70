"""Where the groups of a training start: tasks and initial states take turns, in all iterations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from cfgrl_gym.algorithms.groups import PLAN, UNBOUNDED, Group, Randomness, Start

# Purposes of random numbers within the plan's.
_TASKS, _STATES, _SEEDS, _CURRICULUM = range(4)
# Of a curriculum's groups, the share that all tasks have alike, so that none is ever left alone.
EVEN_SHARE = 0.2
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly however many there are

InitStates = Mapping[int, Sequence[int] | None]


@dataclass(frozen=True)
class StartSchedule:
    """Draws starts, each task once before any comes again, and so each initial state of a task.

    The orders are drawn anew for each round. They depend on the seed, and on how many groups there
    were before: nothing else has to be kept for a training to go on where it was.

    :param init_states: ids of the initial states of each task (None: unbounded, ids are seeds);
        None for an environment that starts from a reset seed
    """

    randomness: Randomness
    init_states: InitStates | None

    def draw(
        self,
        number: int,
        used: Mapping[int | None, int],
        successes: Mapping[int, Sequence[bool]] | None = None,
    ) -> tuple[Group, ...]:
        """Draw the starts of an iteration's groups.

        :param number: of groups
        :param used: groups of each task in the iterations before; those of an environment without
            tasks under None
        :param successes: of each task's recent episodes, by which uncertain tasks come more often.
            None: all tasks take turns
        """
        before = sum(used.values())
        if self.init_states is None:
            starts = [self._seed(before + i) for i in range(number)]
        else:
            if successes is None:
                turns = self._turns(list(self.init_states), before, _TASKS)
                tasks = list(islice(turns, number))
            else:
                tasks = self._uncertain(number, before, successes)
            states = {task: self._states(task, used.get(task, 0)) for task in set(tasks)}
            starts = [Start(task_id=task, init_state_id=next(states[task])) for task in tasks]
        return tuple(Group(index, start) for index, start in enumerate(starts))

    def _uncertain(
        self, number: int, before: int, successes: Mapping[int, Sequence[bool]]
    ) -> list[int]:
        """Draw tasks, more of those whose outcome is less certain.

        A task's share grows with p(1 - p), the variance of its success, which Rutherford et al.
        (2024, "No Regrets") call its learnability; p = (s + 1) / (n + 2) after s successes in n
        episodes, so that a task never tried is the most uncertain. `EVEN_SHARE` is shared evenly.
        """
        assert self.init_states is not None
        tasks = list(self.init_states)
        done = [successes.get(task, ()) for task in tasks]
        rates = np.array([(sum(each) + 1) / (len(each) + 2) for each in done])
        variances = rates * (1 - rates)
        shares = EVEN_SHARE / len(tasks) + (1 - EVEN_SHARE) * variances / variances.sum()
        offset = self.randomness.rng(PLAN, _CURRICULUM).random()
        places = (offset + (before + np.arange(number)) * GOLDEN) % 1
        drawn = np.searchsorted(np.cumsum(shares), places, side="right")
        return [tasks[min(index, len(tasks) - 1)] for index in drawn]  # 1.0 may be rounded down

    def _turns(self, items: Sequence[int], before: int, *key: int) -> Iterator[int]:
        """Go through the items, from the turn after so many; each round has an order of its own."""
        first, skipped = divmod(before, len(items))
        for turn in count(first):
            order = self.randomness.rng(PLAN, *key, turn).permutation(items).tolist()
            yield from order[skipped:]
            skipped = 0

    def _states(self, task: int, before: int) -> Iterator[int]:
        assert self.init_states is not None
        ids = self.init_states[task]
        if ids is not None:
            return self._turns(ids, before, _STATES, task)
        rngs = (self.randomness.rng(PLAN, _STATES, task, turn) for turn in count(before))
        return (int(rng.integers(UNBOUNDED)) for rng in rngs)

    def _seed(self, number: int) -> Start:
        return Start(seed=int(self.randomness.rng(PLAN, _SEEDS, number).integers(UNBOUNDED)))
