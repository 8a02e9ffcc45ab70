"""Makes curves of success during training, pooled over the seeds of a method."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cfgrl_gym.cli.reporting.comparison import distinct
from cfgrl_gym.cli.reporting.methods import Method
from cfgrl_gym.cli.reporting.rates import Rate, Result, Setting, total
from cfgrl_gym.cli.reporting.runs import Training

EVALUATED, TRAINING = "evaluated", "while training"
BINS = 12  # points of a curve that is made from training episodes
CROWDED = 6  # lines in a panel, above which each cfg_scale gets a panel of its own
LAST = math.inf  # stands for the last evaluation, at whatever iteration it was


@dataclass(frozen=True)
class Point:
    """Holds success at one time; `runs` is the number of trainings it is pooled over."""

    episodes: float
    seconds: float
    rate: Rate
    runs: int = 1

    def as_json(self) -> dict[str, Any]:
        times = {"training_episodes": self.episodes, "training_seconds": self.seconds}
        return times | {"runs": self.runs} | self.rate.as_json()


@dataclass(frozen=True, eq=False)
class Line:
    """Holds one method's curve in a panel, pooled and by seed; cfg_scale None: the training's."""

    method: Method
    cfg_scale: float | None
    pooled: tuple[Point, ...]
    by_seed: tuple[tuple[Point, ...], ...]


@dataclass(frozen=True, eq=False)
class Panel:
    """Holds lines that may be compared: the same tasks, measured in the same way."""

    setting: Setting
    kind: str
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        scales = {line.cfg_scale for line in self.lines}
        (one,) = scales if len(scales) == 1 else (None,)
        at = "" if one is None else f", w = {one:g}"
        return f"{self.setting}{at}" if self.kind == EVALUATED else f"{self.setting}, {TRAINING}"


def learning_curves(methods: Sequence[Method]) -> list[Panel]:
    """Make the curves from each method's evaluations, or else from its training episodes."""
    lines: dict[tuple[Setting, str], list[Line]] = {}
    for method in methods:
        for setting, line in _evaluated(method) or _trained(method):
            kind = TRAINING if line.cfg_scale is None else EVALUATED
            lines.setdefault((setting, kind), []).append(line)
    order = sorted(lines, key=lambda k: (k[1], k[0].suite, len(k[0].tasks), k[0].tasks))
    panels = []
    for setting, kind in order:
        members = lines[setting, kind]
        groups = [members]
        if len(members) > CROWDED:
            scales = dict.fromkeys(line.cfg_scale for line in members)
            groups = [[line for line in members if line.cfg_scale == w] for w in scales]
        panels += [Panel(setting, kind, tuple(group)) for group in groups]
    return panels


def _mean(points: Sequence[Point], rates: Iterable[Rate]) -> Point:
    """Return a point at the mean time of these points, with these rates pooled."""
    episodes = sum(point.episodes for point in points) / len(points)
    seconds = sum(point.seconds for point in points) / len(points)
    return Point(episodes, seconds, total(rates), len(points))


# Evaluations -------------------------------------------------------------------------------------


def _evaluated(method: Method) -> list[tuple[Setting, Line]]:
    """Make a line for each setting and cfg_scale, all tasks together and one by one."""
    # For each key and training: iteration → what was measured.
    found: dict[tuple[Setting, float], dict[Training, dict[float, tuple[Point, Result]]]] = {}
    for training in method.trainings:
        for evaluation in training.evaluations:
            for part in (part for result in evaluation.results for part in result.parts):
                curve = found.setdefault(part.key, {}).setdefault(training, {})
                point = Point(float(evaluation.episodes), evaluation.seconds, part.rate)
                curve[evaluation.iteration] = point, part
    lines = []
    for (setting, scale), by_training in found.items():
        curves = list(by_training.values())
        for curve in curves:
            last = max(curve)
            if last > 0:
                # Trainings stop at a number of steps, and so after different iterations.
                curve[LAST] = curve.pop(last)
        pooled = []
        for iteration in set.intersection(*map(set, curves)):
            points, results = zip(*(curve[iteration] for curve in curves), strict=True)
            # Before training, seeds may be equal.
            counted = distinct(results) if iteration == 0 else results
            pooled.append(_mean(points, [result.rate for result in counted]))
        by_seed = tuple(_sorted(point for point, _ in curve.values()) for curve in curves)
        lines.append((setting, Line(method, scale, _sorted(pooled), by_seed)))
    return lines


def _sorted(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(sorted(points, key=lambda point: (point.seconds, point.episodes)))


# Training episodes -------------------------------------------------------------------------------


def _trained(method: Method) -> list[tuple[Setting, Line]]:
    """Make lines of each iteration's episodes, with iterations pooled if there are many."""
    counted = [points for points in map(_iterations, method.trainings) if points]
    if not counted:
        return []
    width = math.ceil(max(map(len, counted)) / BINS)
    by_seed = []
    for points in counted:
        parts = [points[i : i + width] for i in range(0, len(points), width)]
        curve = [Point(p[-1].episodes, p[-1].seconds, total(x.rate for x in p)) for p in parts]
        by_seed.append(tuple(curve))
    members = zip(*by_seed, strict=False)  # up to the point that all seeds reached
    pooled = tuple(_mean(points, [point.rate for point in points]) for points in members)
    return [(_trained_on(method.trainings[0]), Line(method, None, pooled, tuple(by_seed)))]


def _iterations(training: Training) -> list[Point]:
    """Return the success of each iteration's episodes; an empty list for logs without counts."""
    found = []
    before = 0.0
    for row in training.rows:
        episodes = row.get("rollout/episodes")
        share = row.get("rollout/iteration_success_rate")
        if episodes is None or share is None or math.isnan(share):
            continue
        count = round(episodes - before)
        before = episodes
        if count > 0:
            rate = Rate(round(share * count), count)
            found.append(Point(episodes, row.get("time/time_elapsed", 0.0), rate))
    return found


def _trained_on(training: Training) -> Setting:
    names = [name for row in training.rows for name in row]
    prefix = "rollout/success_rate/task_"
    tasks = sorted({int(n.removeprefix(prefix)) for n in names if n.startswith(prefix)})
    if not tasks:
        given = training.config.get("task_id")
        tasks = [given] if isinstance(given, int) else given if isinstance(given, list) else []
    return Setting(str(training.config.get("suite", "?")), tuple(tasks), training.guidance)


def without_curve(methods: Sequence[Method]) -> list[str]:
    """List trainings whose logs have a success rate, but no number of episodes."""
    return [
        training.name
        for method in methods
        for training in method.trainings
        if not training.evaluations and training.rows and not _iterations(training)
    ]
