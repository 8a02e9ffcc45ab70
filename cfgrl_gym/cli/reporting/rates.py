"""Represents success by counts, so that it can be pooled and always has an interval."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cfgrl_gym.algorithms.evaluation import wilson_interval

VELOCITY = "velocity"  # the guidance of a run that doesn't name it


@dataclass(frozen=True)
class Rate:
    """Counts successes among a number of episodes, or anything else with two outcomes."""

    successes: int
    episodes: int

    def __post_init__(self) -> None:
        wilson_interval(self.successes, self.episodes)  # refuses impossible counts

    @property
    def share(self) -> float:
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95% Wilson interval."""
        return wilson_interval(self.successes, self.episodes)

    def contains(self, probability: float) -> bool:
        """Tell whether the interval holds this value, up to the rounding of its ends."""
        low, high = self.interval
        return low - 1e-9 <= probability <= high + 1e-9

    @property
    def counts(self) -> str:
        """Return the counts as text, such as: 93 of 150, 95% interval 54% to 69%."""
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
    """Pool the counts of several rates."""
    rates = list(rates)
    return Rate(sum(r.successes for r in rates), sum(r.episodes for r in rates))


@dataclass(frozen=True)
class Setting:
    """Says what success was measured on; rates of different settings aren't compared."""

    suite: str
    tasks: tuple[int, ...]
    guidance: str = VELOCITY

    def __str__(self) -> str:
        how = "" if self.guidance == VELOCITY else f", guidance {self.guidance}"
        if len(self.tasks) == 1:
            return f"{self.suite} task {self.tasks[0]}{how}"
        if len(self.tasks) <= 4:
            return f"{self.suite} tasks {', '.join(map(str, self.tasks))}{how}"
        return f"{self.suite}, {len(self.tasks)} tasks{how}"

    def as_json(self) -> dict[str, Any]:
        return {"suite": self.suite, "tasks": list(self.tasks), "guidance": self.guidance}


@dataclass(frozen=True)
class Episode:
    """Holds the outcome of one evaluated episode."""

    task_id: int
    init_state_id: int
    success: bool
    control_steps: int


@dataclass(frozen=True)
class Result:
    """Holds success in one setting at one cfg_scale, of one policy or pooled over several.

    :param guidance_gap: mean difference of v_1 and v_∅; None if it wasn't measured
    :param sources: the runs in which it was measured
    """

    setting: Setting
    cfg_scale: float
    rate: Rate
    tasks: dict[int, Rate]
    guidance_gap: float | None
    episodes: tuple[Episode, ...]
    sources: tuple[str, ...]
    policies: int = 1

    @property
    def key(self) -> tuple[Setting, float]:
        """Return the key; results with the same key may be pooled and compared."""
        return self.setting, self.cfg_scale

    @property
    def rank(self) -> tuple[float, float]:
        """Return the sort key of results: by success, then the lowest cfg_scale is the best."""
        return self.rate.share, -self.cfg_scale

    @property
    def parts(self) -> list["Result"]:
        """Return the result itself and, if it has several tasks, the result on each of them."""
        single = [
            replace(
                self,
                setting=replace(self.setting, tasks=(task,)),
                rate=rate,
                tasks={task: rate},
                guidance_gap=None,
                episodes=tuple(e for e in self.episodes if e.task_id == task),
            )
            for task, rate in self.tasks.items()
        ]
        return [self, *(single if len(single) > 1 else [])]

    def as_json(self) -> dict[str, Any]:
        """Return the rate and its sources in JSON's types."""
        about = {"policies": self.policies, "sources": list(self.sources)}
        return self.rate.as_json() | about


def pool(results: Sequence[Result], policies: int = 1) -> Result:
    """Pool results with the same key; the guidance gap is the mean of the known ones."""
    gaps = [result.guidance_gap for result in results if result.guidance_gap is not None]
    return replace(
        results[0],
        rate=total(result.rate for result in results),
        tasks={task: total(r.tasks[task] for r in results) for task in results[0].tasks},
        guidance_gap=sum(gaps) / len(gaps) if gaps else None,
        episodes=tuple(episode for result in results for episode in result.episodes),
        sources=tuple(dict.fromkeys(source for r in results for source in r.sources)),
        policies=policies,
    )


def percent(share: float, episodes: int) -> str:
    """Format a share without decimals that the number of episodes doesn't support."""
    return f"{share:.1%}" if episodes > 200 else f"{share:.0%}"


def count(number: int, noun: str) -> str:
    """Format a number with its noun: 1 seed, 2 seeds."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"
