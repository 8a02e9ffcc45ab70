"""Success in the course of training, pooled over the seeds of a method."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cfgrl_gym.cli.reporting.comparison import Measured, distinct
from cfgrl_gym.cli.reporting.methods import Method
from cfgrl_gym.cli.reporting.rates import Rate, total
from cfgrl_gym.cli.reporting.runs import Checkup, Result, Setting, Training

EVALUATED, TRAINING = "evaluated", "while training"
BINS = 12  # points of a curve that is made of training episodes
CROWDED = 6  # lines, after which each cfg_scale has a panel of its own
LAST = math.inf  # stands for the last evaluation, whichever iteration that was


@dataclass(frozen=True)
class Point:
    """Success at one time. `runs`: the trainings it is pooled over."""

    episodes: float | None
    seconds: float
    rate: Rate
    runs: int


@dataclass(frozen=True, eq=False)
class Line:
    """One method in one panel, pooled and by seed. cfg_scale None: as it trained."""

    method: Method
    cfg_scale: float | None
    pooled: tuple[Point, ...]
    by_seed: tuple[tuple[Point, ...], ...]


@dataclass(frozen=True, eq=False)
class Panel:
    """Lines that may be compared: the same tasks, measured in the same way."""

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
    """Evaluations where a method has some, else its training episodes."""
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


# Evaluations ----------------------------------------------------------------------------------


def _evaluated(method: Method) -> list[tuple[Setting, Line]]:
    keys: dict[tuple[Setting, float], None] = {}
    for training in method.trainings:
        for checkup in training.evaluations:
            for result in checkup.results:
                tasks = tuple(result.tasks)
                parts = [tasks] if len(tasks) == 1 else [tasks, *((task,) for task in tasks)]
                for part in parts:
                    keys[training.setting(part), result.cfg_scale] = None
    return [(setting, _evaluated_line(method, setting, w)) for setting, w in keys]


def _evaluated_line(method: Method, setting: Setting, scale: float) -> Line:
    curves = []  # of each training: evaluation number → what was measured
    for training in method.trainings:
        if training.setting(setting.tasks) != setting:
            continue
        curve: dict[float, tuple[Checkup, Measured]] = {}
        for checkup in training.evaluations:
            for result in checkup.results:
                part = _part(result, setting)
                if result.cfg_scale == scale and part is not None:
                    measured = Measured(setting, part, (training.name,))
                    curve[checkup.iteration] = checkup, measured
        if curve:
            last = max(curve)
            if last > 0:
                # Trainings stop at a number of steps, and so after different iterations.
                curve[LAST] = curve.pop(last)
            curves.append(curve)
    shared = set.intersection(*(set(curve) for curve in curves))
    pooled = [_pool_checkups([curve[key] for curve in curves], key == 0) for key in shared]
    by_seed = tuple(
        tuple(_point([c.episodes], [c.seconds], [m.result.rate]) for c, m in curve.values())
        for curve in curves
    )
    return Line(method, scale, _sorted(pooled), tuple(map(_sorted, by_seed)))


def _part(result: Result, setting: Setting) -> Result | None:
    """What a result says of these tasks: all of its own, or one of them."""
    if tuple(result.tasks) == setting.tasks:
        return result
    if len(setting.tasks) > 1 or setting.tasks[0] not in result.tasks:
        return None
    (task,) = setting.tasks
    episodes = tuple(episode for episode in result.episodes if episode.task_id == task)
    return Result(result.cfg_scale, result.tasks[task], {}, None, episodes)


def _pool_checkups(members: list[tuple[Checkup, Measured]], first: bool) -> Point:
    measured = [m for _, m in members]
    counted = distinct(measured) if first else measured  # before training, seeds may be equal
    return _point(
        [checkup.episodes for checkup, _ in members],
        [checkup.seconds for checkup, _ in members],
        [m.result.rate for m in counted],
    )


def _point(episodes: Sequence[float], seconds: Sequence[float], rates: Sequence[Rate]) -> Point:
    at = sum(episodes) / len(episodes) if episodes else None
    return Point(at, sum(seconds) / len(seconds), total(rates), len(seconds))


def _sorted(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(sorted(points, key=lambda point: (point.seconds, point.episodes or 0)))


# Training episodes ----------------------------------------------------------------------------


def _trained(method: Method) -> list[tuple[Setting, Line]]:
    """Each iteration's own episodes, several iterations together where there are many."""
    counted = [rows for rows in map(_iterations, method.trainings) if rows]
    if not counted:
        return []
    width = math.ceil(max(map(len, counted)) / BINS)
    by_seed = []
    for rows in counted:
        parts = [rows[i : i + width] for i in range(0, len(rows), width)]
        by_seed.append([_together(part) for part in parts])
    pooled = []
    for members in zip(*by_seed, strict=False):  # as far as all of them came
        xs = [point.episodes for point in members if point.episodes is not None]
        pooled.append(_point(xs, [p.seconds for p in members], [p.rate for p in members]))
    line = Line(method, None, tuple(pooled), tuple(map(tuple, by_seed)))
    return [(_trained_on(method.trainings[0]), line)]


def _iterations(training: Training) -> list[tuple[float, float, Rate]]:
    """Episodes and seconds so far, successes of the iteration; nothing for logs without counts."""
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
            found.append((episodes, row.get("time/time_elapsed", 0.0), rate))
    return found


def _together(part: list[tuple[float, float, Rate]]) -> Point:
    episodes, seconds, _ = part[-1]
    return Point(episodes, seconds, total(rate for *_, rate in part), 1)


def _trained_on(training: Training) -> Setting:
    names = [name for row in training.rows for name in row]
    prefix = "rollout/success_rate/task_"
    tasks = sorted({int(n.removeprefix(prefix)) for n in names if n.startswith(prefix)})
    if not tasks:
        given = training.config.get("task_id")
        tasks = [given] if isinstance(given, int) else given if isinstance(given, list) else []
    return Setting(str(training.config.get("suite", "?")), tuple(tasks), training.guidance)


def without_curve(methods: Sequence[Method]) -> list[str]:
    """Trainings whose logs say how often they succeeded, but not of how many episodes."""
    return [
        training.name
        for method in methods
        for training in method.trainings
        if not training.evaluations and training.rows and not _iterations(training)
    ]
