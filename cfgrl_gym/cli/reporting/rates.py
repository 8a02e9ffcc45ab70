"""Success rates as counts, so that they can be pooled and always carry their interval."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cfgrl_gym.algorithms.evaluation import wilson_interval

HIGHER, LOWER, UNDECIDED = "higher", "lower", "not distinguishable at 95%"


@dataclass(frozen=True)
class Rate:
    """So many successes of so many episodes (or anything else that is counted)."""

    successes: int
    episodes: int

    def __post_init__(self) -> None:
        wilson_interval(self.successes, self.episodes)  # refuses counts that can't be

    @property
    def share(self) -> float:
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval."""
        return wilson_interval(self.successes, self.episodes)

    def contains(self, probability: float) -> bool:
        """Whether the interval holds this value; its ends are rounded numbers."""
        low, high = self.interval
        return low - 1e-9 <= probability <= high + 1e-9


def total(rates: Iterable[Rate]) -> Rate:
    """All episodes taken together."""
    rates = list(rates)
    return Rate(sum(r.successes for r in rates), sum(r.episodes for r in rates))


@dataclass(frozen=True)
class Pooled:
    """A rate over several policies, and the run folders that it was measured in."""

    rate: Rate
    policies: int
    sources: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "success_rate": self.rate.share,
            "interval_95": list(self.rate.interval),
            "successes": self.rate.successes,
            "n_episodes": self.rate.episodes,
            "policies": self.policies,
            "sources": list(self.sources),
        }


def verdict(reference: Rate, other: Rate) -> str:
    """How `other` compares: distinguishable only where the 95% intervals don't overlap."""
    if other.interval[0] > reference.interval[1]:
        return HIGHER
    if other.interval[1] < reference.interval[0]:
        return LOWER
    return UNDECIDED
