"""What `comparison.py`'s rows say: levels, the effort to reach them, paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

LEVELS = (0.7, 0.8, 0.9)
RESAMPLES = 10_000  # of the bootstrap over trainings
Row = Mapping[str, Any]  # one training
Training = tuple[str, int, int]  # suite, task, seed


def training_of(row: Row) -> Training:
    """Return what a training has in common with the ones that it is paired with."""
    return row["suite"], row["task"], row["seed"]


def effort_to(row: Row, level: float, unit: str) -> float | None:
    """Return the episodes or control steps until a training's own success reached a level.

    An iteration has 64 episodes, so two in a row must have the level on average. What is returned
    includes the first of them.

    :param unit: "episodes" or "control_steps", as counted since the training's beginning
    :return: None if it wasn't reached
    """
    iterations = row["iterations"]
    rates = [iteration["success_rate"] for iteration in iterations]
    for iteration, first, second in zip(iterations, rates, rates[1:], strict=False):
        if (first + second) / 2 >= level:
            return float(iteration[unit])
    return None


def successes(row: Row, cfg_scale: float) -> dict[int, bool] | None:
    """Return each initial state's success at a w; None if it wasn't evaluated there."""
    for result in row["final"]:
        if result["cfg_scale"] == cfg_scale:
            there = set(result["successful_states"])
            return {state: state in there for state in range(result["n_episodes"])}
    return None


@dataclass(frozen=True)
class Difference:
    """Compares one method with another on the same tasks, seeds and initial states.

    :param mean: difference of the success rates
    :param interval: 95%, by resampling trainings, so that it has the spread between them
    :param better: episodes in which only the first succeeds
    :param worse: episodes in which only the second does
    :param p_value: McNemar's exact one, which takes episodes as independent
    """

    mean: float
    interval: tuple[float, float]
    better: int
    worse: int
    p_value: float
    trainings: int


def mcnemar(better: int, worse: int) -> float:
    """Return the p-value of McNemar's exact test: as many episodes should differ either way."""
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def paired(first: Sequence[Row], w: float, second: Sequence[Row], other_w: float) -> Difference:
    """Compare the rows of two methods, each evaluated at its w, over the trainings both have.

    :raises ValueError: they have none in common
    """
    others = {training_of(row): successes(row, other_w) for row in second}
    by_training: list[list[int]] = []  # of 1 (better), 0 and -1 (worse)
    for row in first:
        mine, theirs = successes(row, w), others.get(training_of(row))
        if mine is not None and theirs is not None:
            by_training.append([int(mine[s]) - int(theirs[s]) for s in mine.keys() & theirs.keys()])
    if not by_training:
        raise ValueError("the methods have no training in common")
    means = np.array([np.mean(each) for each in by_training])
    rng = np.random.default_rng(0)
    resampled = rng.choice(means, (RESAMPLES, len(means))).mean(1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    better, worse = (sum(each.count(sign) for each in by_training) for sign in (1, -1))
    interval, p = (float(low), float(high)), mcnemar(better, worse)
    return Difference(float(means.mean()), interval, better, worse, p, len(means))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979), in their order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def method_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Summarise each method and setting over its trainings: level and effort, in order."""
    table = []
    for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in rows):
        of_method = [r for r in rows if (r["method"], r["setting"]) == (method, setting)]
        final: dict[float, list[int]] = {}
        for row in of_method:
            for result in row["final"]:
                counts = final.setdefault(result["cfg_scale"], [0, 0])
                counts[0] += result["successes"]
                counts[1] += result["n_episodes"]
        effort = {}
        for level in LEVELS:
            for unit in ("episodes", "control_steps"):
                reached = [effort_to(row, level, unit) for row in of_method]
                there = [value for value in reached if value is not None]
                effort[f"{unit}_to_{level:.0%}"] = {
                    "reached": len(there),
                    "median": float(np.median(there)) if there else None,
                }
        table.append(
            {
                "method": method,
                "setting": setting,
                "trainings": len(of_method),
                "optimizer_steps": [row["iterations"][-1]["optimizer_steps"] for row in of_method],
                "control_steps": [row["iterations"][-1]["control_steps"] for row in of_method],
                "final": {f"{w:g}": counts for w, counts in sorted(final.items())},
                "effort": effort,
            }
        )
    return table


def against(rows: Sequence[Row], reference: tuple[str, float]) -> list[dict[str, Any]]:
    """Compare every method at every w with a reference method at its w, corrected for the number.

    :param reference: the method's name and w
    """
    name, w = reference
    them = [row for row in rows if row["method"] == name]
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        for scale in sorted({result["cfg_scale"] for r in of_method for result in r["final"]}):
            shared = {training_of(r) for r in of_method} & {training_of(r) for r in them}
            if (method, scale) != reference and shared:
                found.append((method, scale, paired(of_method, scale, them, w)))
    corrected = holm([difference.p_value for _, _, difference in found])
    return [
        {"method": method, "cfg_scale": scale, **vars(difference), "p_value_corrected": p}
        for (method, scale, difference), p in zip(found, corrected, strict=True)
    ]
