"""Success and guidance gap over cfg_scale, where at least three were evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass

from cfgrl_gym.cli.reporting.comparison import Comparison, Links, mean_gap
from cfgrl_gym.cli.reporting.rates import UNDECIDED, Pooled, verdict
from cfgrl_gym.cli.reporting.runs import EvaluationRun, Result, Setting

FEWEST = 3


@dataclass(frozen=True)
class ScalePoint:
    """Success and mean guidance gap at one cfg_scale."""

    cfg_scale: float
    pooled: Pooled
    gap: float | None


@dataclass(frozen=True, eq=False)
class Sweep:
    """One policy's evaluation, or those of a method's seeds together.

    :param by_run: the results of each, by cfg_scale
    """

    title: str
    setting: Setting
    points: tuple[ScalePoint, ...]
    by_run: tuple[tuple[Result, ...], ...]

    @property
    def best(self) -> ScalePoint:
        """The highest success; of equals, the lowest cfg_scale."""
        return max(self.points, key=lambda p: (p.pooled.rate.share, -p.cfg_scale))

    @property
    def rivals(self) -> list[float]:
        """The other scales that can't be distinguished from the best."""
        top = self.best
        return [
            point.cfg_scale
            for point in self.points
            if point is not top and verdict(top.pooled.rate, point.pooled.rate) == UNDECIDED
        ]


def sweeps(
    comparisons: Sequence[Comparison], evaluations: Sequence[EvaluationRun], links: Links
) -> list[Sweep]:
    """Methods after training, then every evaluation that came after none."""
    found = []
    groups: dict[tuple[int, Setting], list[Comparison]] = {}
    for row in comparisons:
        if row.after is not None:
            groups.setdefault((id(row.method), row.setting), []).append(row)
    for rows in groups.values():
        if len(rows) >= FEWEST:
            found.append(_of_method(rows))
    for evaluation in evaluations:
        if links.role(evaluation) != "after" and len(evaluation.results) >= FEWEST:
            found.append(_of_evaluation(evaluation, links.role(evaluation)))
    return found


def _of_method(rows: Sequence[Comparison]) -> Sweep:
    points = []
    by_training: dict[str, list[Result]] = {}
    for row in rows:
        assert row.after is not None
        results = [result for _, result in row.by_seed]
        points.append(ScalePoint(row.cfg_scale, row.after, mean_gap(results)))
        for training, result in row.by_seed:
            by_training.setdefault(training.name, []).append(result)
    by_run = tuple(tuple(results) for results in by_training.values())
    return Sweep(f"{rows[0].method.label} (after training)", rows[0].setting, tuple(points), by_run)


def _of_evaluation(evaluation: EvaluationRun, role: str) -> Sweep:
    results = sorted(evaluation.results, key=lambda result: result.cfg_scale)
    points = tuple(
        ScalePoint(r.cfg_scale, Pooled(r.rate, 1, (evaluation.name,)), r.guidance_gap)
        for r in results
    )
    about = f"{evaluation.name} (before training)" if role == "before" else evaluation.name
    return Sweep(about, evaluation.setting(results[0].tasks), points, (tuple(results),))
