"""Computes how each method's trainings spent their time."""

from collections.abc import Sequence
from dataclasses import dataclass

from cfgrl_gym.cli.reporting.methods import Method

PARTS = ("simulation", "inference", "update")


@dataclass(frozen=True, eq=False)
class TimeSpent:
    """Holds the seconds of a method's trainings in each of PARTS, averaged over `runs` of them."""

    method: Method
    seconds: tuple[float, ...]
    runs: int

    @property
    def total(self) -> float:
        return sum(self.seconds)


def time_spent(methods: Sequence[Method]) -> list[TimeSpent]:
    """Average the times of each method whose logs have them."""
    spent = []
    for method in methods:
        each = [
            [sum(training.column(f"time/seconds_{part}")) for part in PARTS]
            for training in method.trainings
        ]
        each = [seconds for seconds in each if sum(seconds) > 0]
        if each:
            means = tuple(sum(parts) / len(each) for parts in zip(*each, strict=True))
            spent.append(TimeSpent(method, means, len(each)))
    return spent
