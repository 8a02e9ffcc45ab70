"""Success rates as counts, so that they can be pooled and always carry their interval."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cfgrl_gym.algorithms.evaluation import wilson_interval


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

    @property
    def counts(self) -> str:
        """93 of 150, 95% interval 54% to 69%."""
        low, high = (percent(end, self.episodes) for end in self.interval)
        return f"{self.successes} of {self.episodes}, 95% interval {low} to {high}"

    def __str__(self) -> str:
        return f"{percent(self.share, self.episodes)} ({self.counts})"

    def as_json(self) -> dict[str, Any]:
        return {
            "success_rate": self.share,
            "interval_95": list(self.interval),
            "successes": self.successes,
            "n_episodes": self.episodes,
        }


def total(rates: Iterable[Rate]) -> Rate:
    """All episodes taken together."""
    rates = list(rates)
    return Rate(sum(r.successes for r in rates), sum(r.episodes for r in rates))


def percent(share: float, episodes: int) -> str:
    """Without decimals that the number of episodes doesn't support."""
    return f"{share:.1%}" if episodes > 200 else f"{share:.0%}"


def count(number: int, noun: str) -> str:
    """1 seed, 2 seeds."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"
