"""Plans an iteration: which groups of K episodes run, and from which starts.

A plan is plain data. It is drawn before the first step, and does not depend on the number or the
speed of the environments. It can be pickled, sliced by groups, and drawn again from its seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cfgrl_gym.algorithms.labels import is_uniform

UNBOUNDED = 2**31  # exclusive upper bound of reset seeds
# Purposes of random numbers, the first key after the seed.
PLAN, NOISE, UPDATE, MIDWAY, VALUE = range(5)


@dataclass(frozen=True)
class Start:
    """Says where an episode starts: a task and initial state, or else a reset seed.

    :param snapshot: of an episode from there, which is continued; what `info["snapshot"]` held
    """

    task_id: int | None = None
    init_state_id: int | None = None
    seed: int | None = None
    snapshot: Any = field(default=None, repr=False)

    def reset_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments with which `Env.reset` begins here."""
        if self.snapshot is not None:
            return {"options": {"snapshot": self.snapshot}}
        if self.seed is not None:
            return {"seed": self.seed}
        return {"options": {"task_id": self.task_id, "init_state_id": self.init_state_id}}


@dataclass(frozen=True)
class Group:
    """Stands for K episodes from one start; `index` is unique within the iteration."""

    index: int
    start: Start


@dataclass(frozen=True)
class GroupPlan:
    """Holds the groups of one iteration, in the order in which they are tried.

    :param group_size: K, episodes of a group
    :param needed: how many valid groups suffice. None: all are run
    :param dynamic_sampling: a group whose K returns are all equal is discarded
    :param gamma: discount of these returns, see `labels.discounted`
    """

    groups: tuple[Group, ...]
    group_size: int
    needed: int | None = None
    dynamic_sampling: bool = False
    gamma: float = 1.0

    def certain(self, selection: "Selection") -> set[int]:
        """Return the indices of the groups that will be kept or discarded, whatever they return."""
        needed = len(self.groups) if self.needed is None else self.needed
        return {group.index for group in self.groups[: needed + len(selection.discarded)]}

    def select(self, returns: Mapping[int, Sequence[float]]) -> "Selection":
        """Keep the first valid groups, in the order of the plan.

        Because groups are taken in the plan's order and not as they finish, the outcome does not
        depend on the number of environments or on their speed.

        :param returns: for each group index, the returns of its finished episodes
        """
        kept: list[int] = []
        discarded: list[int] = []
        for group in self.groups:
            finished = returns.get(group.index, ())
            if len(finished) < self.group_size:
                return Selection(kept, discarded, complete=False)
            discard = self.dynamic_sampling and is_uniform(np.asarray(finished))
            (discarded if discard else kept).append(group.index)
            if len(kept) == self.needed:
                break
        return Selection(kept, discarded, complete=True)


@dataclass(frozen=True)
class Selection:
    """Holds the indices of the groups kept and discarded so far, and whether collection may end."""

    kept: list[int]
    discarded: list[int]
    complete: bool


def seed_sequence(seed: int, *key: int) -> np.random.SeedSequence:
    """Return the seed sequence for a key: the same numbers in whatever order it is called."""
    return np.random.SeedSequence((seed, *key))


def torch_generator(seed: int, *key: int) -> torch.Generator:
    """Return a CPU generator seeded by `seed_sequence`."""
    state = seed_sequence(seed, *key).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


@dataclass(frozen=True)
class Randomness:
    """Gives all random numbers of a training, each from the seed, the purpose and the iteration.

    No generator has a state that must be kept: a resumed training draws the same numbers as an
    uninterrupted one, and an episode has the same noise wherever and whenever it runs.
    """

    seed: int

    @classmethod
    def of(cls, seed: int | None) -> "Randomness":
        """Make that of a seed; None draws one from the operating system's entropy."""
        return cls(int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed)

    def rng(self, purpose: int, *key: int) -> np.random.Generator:
        """Return a NumPy generator for one purpose."""
        return np.random.default_rng(seed_sequence(self.seed, purpose, *key))

    def generator(self, purpose: int, *key: int) -> torch.Generator:
        """Return a torch generator on the CPU for one purpose."""
        return torch_generator(self.seed, purpose, *key)

    def noise(
        self, iteration: int, shape: tuple[int, ...], scale: float = 1.0
    ) -> Callable[[int, int, int], torch.Tensor]:
        """Return a function (group, member, chunk) -> noise of this shape, for one iteration.

        :param scale: standard deviation of the noise
        """

        def draw(group: int, member: int, chunk: int) -> torch.Tensor:
            generator = self.generator(NOISE, iteration, group, member, chunk)
            return torch.randn(shape, generator=generator) * scale

        return draw


def groups_needed(
    groups_per_iteration: int, dynamic_sampling: bool, early_stop_percentage: float
) -> int:
    """Return the number of valid groups with which a collection ends."""
    share = early_stop_percentage if dynamic_sampling else 1.0
    return math.ceil(round(share * groups_per_iteration, 9))
