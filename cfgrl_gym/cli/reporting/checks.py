"""What each training's log says of the method at work, and where its time went."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cfgrl_gym.cli.reporting.methods import Method
from cfgrl_gym.cli.reporting.rates import Rate
from cfgrl_gym.cli.reporting.runs import Training

PARTS = ("simulation", "inference", "update")


@dataclass(frozen=True, eq=False)
class Check:
    """One training. Pairs are of the first and the last iteration that has a value.

    :param dropped: conditions dropped, of the positives' uses; None: the log doesn't count them
    :param dropped_share: the mean share over the iterations
    :param groups: kept, discarded
    """

    method: Method
    training: Training
    iterations: int
    loss: tuple[float, float] | None
    dropout_prob: float | None
    dropped: Rate | None
    dropped_share: float | None
    groups: tuple[int, int]
    grad_norm: tuple[float, float] | None
    guidance_gap: tuple[float, float] | None

    @property
    def dropped_as_asked(self) -> bool | None:
        """Whether dropout_prob lies in the interval of what was dropped."""
        if self.dropped is None or self.dropout_prob is None:
            return None
        return self.dropped.contains(self.dropout_prob)


def checks(methods: Sequence[Method]) -> list[Check]:
    """One for each training that has a log."""
    return [_check(m, training) for m in methods for training in m.trainings if training.rows]


def _check(method: Method, training: Training) -> Check:
    uses = round(sum(training.column("train/conditioned_count")))
    drops = round(sum(training.column("train/dropout_count")))
    shares = training.column("train/dropout_rate")
    asked: Any = training.config.get("dropout_prob")
    kept, discarded = (
        round(sum(training.column(f"rollout/groups_{name}"))) for name in ("kept", "discarded")
    )
    return Check(
        method=method,
        training=training,
        iterations=len(training.rows),
        loss=_ends(training, "train/loss"),
        dropout_prob=None if asked is None else float(asked),
        dropped=Rate(drops, uses) if uses else None,
        dropped_share=sum(shares) / len(shares) if shares else None,
        groups=(kept, discarded),
        grad_norm=_ends(training, "train/grad_norm"),
        guidance_gap=_ends(training, "train/guidance_gap"),
    )


def _ends(training: Training, name: str) -> tuple[float, float] | None:
    values = training.column(name)
    return (values[0], values[-1]) if values else None


@dataclass(frozen=True, eq=False)
class TimeSpent:
    """Seconds of a method's trainings in each of PARTS, the mean over `runs`."""

    method: Method
    seconds: tuple[float, ...]
    runs: int

    @property
    def total(self) -> float:
        return sum(self.seconds)


def time_spent(methods: Sequence[Method]) -> list[TimeSpent]:
    """One for each method whose logs have times."""
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
