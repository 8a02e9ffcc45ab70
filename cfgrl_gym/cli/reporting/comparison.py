"""Compares success before and after training, over cfg_scale, and between methods."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cfgrl_gym.cli.reporting.methods import Method, plain_policy, value_text
from cfgrl_gym.cli.reporting.rates import VELOCITY, Result, Setting, pool
from cfgrl_gym.cli.reporting.runs import EvaluationRun, Runs, Training
from cfgrl_gym.cli.run_folder import MODEL_FILE

HIGHER, LOWER, UNDECIDED = "higher", "lower", "not distinguishable at 95%"
# Options of an evaluation that change what is measured; null is the policy's own.
_PROTOCOL = ("chunk_size", "max_episode_steps", "num_inference_steps")
FEWEST_SCALES = 3  # of a sweep that is drawn


def verdict(reference: Result | None, other: Result | None) -> str | None:
    """Say how `other` compares: distinguishable only if the 95% intervals don't overlap.

    :return: None if one of them wasn't measured
    """
    if reference is None or other is None:
        return None
    if other.rate.interval[0] > reference.rate.interval[1]:
        return HIGHER
    if other.rate.interval[1] < reference.rate.interval[0]:
        return LOWER
    return UNDECIDED


# Which evaluation belongs to which training ------------------------------------------------------


@dataclass
class Links:
    """Holds the evaluations of each training's policy after it, and of its start before it."""

    after: dict[Training, list[EvaluationRun]] = field(default_factory=dict)
    before: dict[Training, list[EvaluationRun]] = field(default_factory=dict)

    def role(self, evaluation: EvaluationRun) -> str:
        """Tell whether an evaluation came "before" or "after" a training, else "evaluation"."""
        for name, groups in (("after", self.after), ("before", self.before)):
            if any(evaluation in group for group in groups.values()):
                return name
        return "evaluation"


def link(runs: Runs) -> Links:
    """Assign evaluations to trainings: "before" if of the policy that a training started from, else
    "after" if inside its folder or of its own policy."""
    links = Links()
    owners = {evaluation: _owner(evaluation, runs.trainings) for evaluation in runs.evaluations}
    for training in runs.trainings:
        out, start = training.config.get("out"), start_policy(training)
        own = {str(training.folder)} | ({plain_policy(str(out))} if out else set())
        own |= {f"{name}/{MODEL_FILE}" for name in own}
        links.after[training], links.before[training] = [], []
        for evaluation, owner in owners.items():
            policy = plain_policy(evaluation.policy)
            if policy in own or (owner is training and policy != start):
                links.after[training].append(evaluation)
            elif policy == start:
                links.before[training].append(evaluation)
    return links


def start_policy(training: Training) -> str:
    """Return the policy that a training started from, with its path normalised."""
    return plain_policy(str(training.config.get("policy")))


def _owner(evaluation: EvaluationRun, trainings: Sequence[Training]) -> Training | None:
    """Return the training in whose folder an evaluation is, the innermost one."""
    owners = [t for t in trainings if t.folder in evaluation.folder.parents]
    return max(owners, key=lambda t: len(t.folder.parts), default=None)


# Before and after --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Comparison:
    """Compares a method before and after training, at one cfg_scale in one setting.

    :param before: result pooled over the policies that the trainings started from
    :param after: result pooled over the trainings
    :param by_seed: result of each training afterwards
    """

    method: Method
    setting: Setting
    cfg_scale: float
    before: Result | None
    after: Result | None
    by_seed: tuple[tuple[Training, Result], ...]

    @property
    def verdict(self) -> str | None:
        """Return the verdict of after against before."""
        return verdict(self.before, self.after)


def compare(method: Method, links: Links) -> list[Comparison]:
    """Compare before and after for every setting and cfg_scale that was evaluated."""
    before: dict[tuple[Setting, float], list[Result]] = {}
    for start in dict.fromkeys(map(start_policy, method.trainings)):
        for result in _before(start, links):
            before.setdefault(result.key, []).append(result)
    after: dict[tuple[Setting, float], list[tuple[Training, Result]]] = {}
    for training in method.trainings:
        results = [*_in_training(training, -1), *_of_policy(links.after[training])]
        for key, result in {result.key: result for result in results}.items():
            after.setdefault(key, []).append((training, result))
    # A start may have been evaluated in more settings than this method.
    settings = {setting for setting, _ in after}
    before = {key: ones for key, ones in before.items() if not after or key[0] in settings}
    return [
        Comparison(
            method,
            *key,
            before=pool(before[key], len(before[key])) if key in before else None,
            after=pool([r for _, r in after[key]], len(after[key])) if key in after else None,
            by_seed=tuple(after.get(key, ())),
        )
        for key in sorted({*before, *after}, key=_order)
    ]


def _order(key: tuple[Setting, float]) -> Any:
    setting, scale = key
    return setting.suite, setting.tasks, setting.guidance != VELOCITY, scale


def _before(start: str, links: Links) -> list[Result]:
    """Return the results of a policy before any training, one for each key: its own evaluations,
    else those at the beginning of its trainings, where equal episodes count once."""
    trainings = [training for training in links.before if start_policy(training) == start]
    found: dict[tuple[Setting, float], list[Result]] = {}
    for training in trainings:
        for result in _in_training(training, 0):
            found.setdefault(result.key, []).append(result)
    runs = dict.fromkeys(run for training in trainings for run in links.before[training])
    measured = {key: pool(distinct(results)) for key, results in found.items()}
    return list((measured | {result.key: result for result in _of_policy(list(runs))}).values())


def _in_training(training: Training, position: int) -> tuple[Result, ...]:
    """Return a training's own evaluation before (0) or after (-1), if there is one."""
    if not training.evaluations:
        return ()
    evaluation = training.evaluations[position]
    return evaluation.results if (evaluation.iteration == 0) == (position == 0) else ()


def _of_policy(evaluations: Sequence[EvaluationRun]) -> list[Result]:
    """Combine all evaluations of one policy into a result for each key. Those with equal seeds may
    share episodes: only the largest of them counts. Those with different seeds are pooled."""
    found: dict[tuple[Setting, float], dict[str, Result]] = {}  # of each seed
    pairs = [(value_text(run.seed), result) for run in evaluations for result in run.results]
    for seed, result in sorted(pairs, key=lambda pair: pair[1].rate.episodes):
        found.setdefault(result.key, {})[seed] = result
    return [pool(list(of_seeds.values())) for of_seeds in found.values()]


def distinct(results: Iterable[Result]) -> list[Result]:
    """Drop results whose episodes all equal another's: the same policy was measured again."""
    kept: dict[object, Result] = {}
    for result in results:
        kept.setdefault(result.episodes or result.sources, result)
    return list(kept.values())


def protocol_notes(method: Method, links: Links) -> list[str]:
    """List options in which evaluations before and after differ, which may explain a change."""
    notes = set()
    for training in method.trainings:
        for after in links.after[training]:
            for before in links.before[training]:
                for name in _PROTOCOL:
                    a, b = before.config.get(name), after.config.get(name)
                    if a != b:
                        one, two = value_text(a), value_text(b)
                        notes.add(f"{before.name} has {name} {one}, {after.name} has {two}")
    return sorted(notes)


def against_baseline(row: Comparison, comparisons: Sequence[Comparison]) -> str | None:
    """Compare a method after training with the baseline at the same cfg_scale."""
    if row.method.is_baseline:
        return None
    place = row.setting, row.cfg_scale
    same = (r for r in comparisons if r.method.is_baseline and (r.setting, r.cfg_scale) == place)
    return verdict(next((baseline.after for baseline in same), None), row.after)


@dataclass(frozen=True)
class Highlight:
    """Holds the best results before and after training in one setting.

    :param before: result of the method that was best afterwards; None if not evaluated before
    :param compared: number of methods and scales from which the best afterwards was picked
    :param compared_before: number of scales from which the best before was picked
    """

    method: Method
    before: Result | None
    after: Result
    compared: int
    compared_before: int

    @property
    def verdict(self) -> str | None:
        """Return the verdict of after against before."""
        return verdict(self.before, self.after)

    @property
    def sentence(self) -> str:
        """Return the conclusion that the intervals allow, as a sentence."""
        if self.verdict is None:
            return "Nothing was evaluated before training, so there is no change to speak of."
        if self.verdict == UNDECIDED:
            return "Not distinguishable at 95%: the two intervals overlap."
        return f"Success is {self.verdict} after training: the two 95% intervals don't overlap."


def highlights(comparisons: Sequence[Comparison]) -> list[Highlight]:
    """Find the best before and after in each setting that was evaluated after a training."""
    found = []
    for setting in dict.fromkeys(row.setting for row in comparisons):
        rows = [row for row in comparisons if row.setting == setting]
        after = [(row.method, row.after) for row in rows if row.after is not None]
        if after:
            method, best = max(after, key=lambda pair: pair[1].rank)
            before = [row.before for row in rows if row.method is method and row.before is not None]
            start = max(before, key=lambda result: result.rank, default=None)
            found.append(Highlight(method, start, best, len(after), len(before)))
    return found


# Over cfg_scale ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sweep:
    """Holds success over cfg_scale, of one policy or of all trainings of a method.

    :param method: the method; None if it is one policy's sweep
    :param points: a result for each cfg_scale
    :param by_run: the results of each training or evaluation that was pooled
    """

    title: str
    method: Method | None
    points: tuple[Result, ...]
    by_run: tuple[tuple[Result, ...], ...]

    @property
    def best(self) -> Result:
        """Return the point of the highest success; if several are equal, the lowest cfg_scale."""
        return max(self.points, key=lambda point: point.rank)

    @property
    def rivals(self) -> list[float]:
        """Return the other scales that can't be distinguished from the best."""
        return [
            point.cfg_scale
            for point in self.points
            if point is not self.best and verdict(self.best, point) == UNDECIDED
        ]


def sweeps(
    comparisons: Sequence[Comparison], evaluations: Sequence[EvaluationRun], links: Links
) -> list[Sweep]:
    """Collect the sweeps of methods after training, then those of evaluations that came after no
    training, if at least three scales were evaluated."""
    found = method_sweeps(comparisons)
    for run in evaluations:
        role = links.role(run)
        if role != "after":
            points = tuple(sorted(run.results, key=lambda result: result.cfg_scale))
            title = f"{run.name} (before training)" if role == "before" else run.name
            found.append(Sweep(title, None, points, (points,)))
    return [sweep for sweep in found if len(sweep.points) >= FEWEST_SCALES]


def method_sweeps(comparisons: Sequence[Comparison]) -> list[Sweep]:
    """Collect each method's results over cfg_scale in each setting, however few scales."""
    groups: dict[tuple[Method, Setting], list[Comparison]] = {}
    for row in comparisons:
        if row.after is not None:
            groups.setdefault((row.method, row.setting), []).append(row)
    found = []
    for (method, _), rows in groups.items():
        by_training: dict[Training, list[Result]] = {}
        for training, result in (pair for row in rows for pair in row.by_seed):
            by_training.setdefault(training, []).append(result)
        points = tuple(row.after for row in rows if row.after is not None)
        by_run = tuple(map(tuple, by_training.values()))
        found.append(Sweep(f"{method.label} (after training)", method, points, by_run))
    return found


def best_scales(comparisons: Sequence[Comparison]) -> list[str]:
    """Say which cfg_scale had the highest success, for each method and setting with several."""
    sentences = []
    every = method_sweeps(comparisons)
    several_settings = len({sweep.best.setting for sweep in every}) > 1
    for sweep in every:
        best, close = sweep.best, sweep.rivals
        others = [point.cfg_scale for point in sweep.points if point is not best]
        if sweep.method is None or not others:
            continue
        apart = [scale for scale in others if scale not in close]
        where = f" on {best.setting}" if several_settings else ""
        said = f"{sweep.method.label}{where}: highest at w = {best.cfg_scale:g}, {best.rate}"
        if close:
            said += f"; not distinguishable at 95% from w = {scales_text(close)}"
        if apart:
            said += f"; intervals don't overlap with w = {scales_text(apart)}"
        sentences.append(said + ".")
    return sentences


def scales_text(scales: Iterable[float]) -> str:
    """Format guidance scales as text: 1, 1.5."""
    return ", ".join(f"{scale:g}" for scale in scales)
