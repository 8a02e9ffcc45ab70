"""Success before and after training: which evaluation belongs to which training, and pooling."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cfgrl_gym.cli.reporting.methods import Method, plain_policy, value_text
from cfgrl_gym.cli.reporting.rates import Pooled, Rate, total, verdict
from cfgrl_gym.cli.reporting.runs import (
    VELOCITY,
    EvaluationRun,
    Result,
    Runs,
    Setting,
    Training,
)
from cfgrl_gym.cli.run_folder import MODEL_FILE

# Options of an evaluation that change what is measured; null is the policy's own.
_PROTOCOL = ("chunk_size", "max_episode_steps", "num_inference_steps")


_Key = tuple[Setting, float]  # and cfg_scale


@dataclass(frozen=True)
class Measured:
    """One result and where it comes from."""

    setting: Setting
    result: Result
    sources: tuple[str, ...]


@dataclass
class Links:
    """What belongs together. `after` and `before`: of a training's name, evaluations;
    `started_from`: of a policy, trainings."""

    after: dict[str, list[EvaluationRun]] = field(default_factory=dict)
    before: dict[str, list[EvaluationRun]] = field(default_factory=dict)
    started_from: dict[str, list[Training]] = field(default_factory=dict)

    def role(self, evaluation: EvaluationRun) -> str:
        """before, after, or neither."""
        for name, groups in (("after", self.after), ("before", self.before)):
            if any(evaluation in group for group in groups.values()):
                return name
        return "evaluation"


def link(runs: Runs) -> Links:
    """An evaluation of the policy that a training started from was before it; any other inside its
    folder, or of its own policy, came after it."""
    links = Links()
    for training in runs.trainings:
        own = _own_policies(training)
        start = start_policy(training)
        links.started_from.setdefault(start, []).append(training)
        inside = [
            evaluation
            for evaluation in runs.evaluations
            if plain_policy(evaluation.policy) in own
            or (
                _owner(evaluation, runs.trainings) is training
                and plain_policy(evaluation.policy) != start
            )
        ]
        links.after[training.name] = inside
        links.before[training.name] = [
            evaluation
            for evaluation in runs.evaluations
            if evaluation not in inside and plain_policy(evaluation.policy) == start
        ]
    return links


def start_policy(training: Training) -> str:
    """The policy that it started from, in one spelling."""
    return plain_policy(str(training.config.get("policy")))


def _owner(evaluation: EvaluationRun, trainings: Sequence[Training]) -> Training | None:
    """The training in whose folder it lies, the innermost."""
    owners = [t for t in trainings if t.folder in evaluation.folder.parents]
    return max(owners, key=lambda t: len(t.folder.parts), default=None)


def _own_policies(training: Training) -> set[str]:
    names = {str(training.folder)}
    if training.config.get("out"):
        names.add(plain_policy(str(training.config["out"])))
    return names | {f"{name}/{MODEL_FILE}" for name in names}


def _of_run(evaluation: EvaluationRun) -> list[Measured]:
    return [
        Measured(evaluation.setting(result.tasks), result, (evaluation.name,))
        for result in evaluation.results
    ]


def _of_checkup(training: Training, position: int) -> list[Measured]:
    if not training.evaluations:
        return []
    checkup = training.evaluations[position]
    if (checkup.iteration == 0) != (position == 0):
        return []  # nothing was evaluated before the training, or nothing since
    sources = (f"{training.name}, iteration {checkup.iteration}",)
    return [Measured(training.setting(r.tasks), r, sources) for r in checkup.results]


@dataclass(frozen=True, eq=False)
class Comparison:
    """A method at one cfg_scale, in one setting.

    :param by_seed: each training's own result afterwards
    """

    method: Method
    setting: Setting
    cfg_scale: float
    before: Pooled | None
    after: Pooled | None
    by_seed: tuple[tuple[Training, Result], ...]

    @property
    def verdict(self) -> str | None:
        """Of after against before."""
        if self.before is None or self.after is None:
            return None
        return verdict(self.before.rate, self.after.rate)


def compare(method: Method, links: Links) -> list[Comparison]:
    """Before and after for every setting and cfg_scale that was evaluated."""
    before: dict[_Key, list[Measured]] = {}
    starts: Counter[_Key] = Counter()
    for start in dict.fromkeys(map(start_policy, method.trainings)):
        for key, measured in _before(start, links).items():
            before.setdefault(key, []).extend(measured)
            starts[key] += 1
    after: dict[_Key, list[tuple[Training, Measured]]] = {}
    for training in method.trainings:
        last, evaluated = _of_checkup(training, -1), _of_policy(links.after[training.name])
        for key, one in {**_by_key(last), **evaluated}.items():
            after.setdefault(key, []).append((training, one))
    # A start may have been measured on more than this method was.
    settings = {setting for setting, _ in after}
    before = {key: ones for key, ones in before.items() if not after or key[0] in settings}
    rows = []
    for key in sorted({*before, *after}, key=_order):
        ones = after.get(key, [])
        start_pooled = _pooled(before[key], starts[key]) if key in before else None
        pooled = _pooled([m for _, m in ones], len(ones)) if ones else None
        by_seed = tuple((training, m.result) for training, m in ones)
        rows.append(Comparison(method, *key, start_pooled, pooled, by_seed))
    return rows


def _order(key: _Key) -> Any:
    setting, scale = key
    return setting.suite, setting.tasks, setting.guidance != VELOCITY, scale


def _before(start: str, links: Links) -> dict[_Key, list[Measured]]:
    """What is known of a policy before any training: its own evaluations, else those that its
    trainings began with, where equal episodes count once."""
    trainings = links.started_from[start]
    found: dict[_Key, list[Measured]] = {}
    for training in trainings:
        for one in _of_checkup(training, 0):
            found.setdefault(_key(one), []).append(one)
    runs = dict.fromkeys(run for training in trainings for run in links.before[training.name])
    evaluated = {key: [one] for key, one in _of_policy(list(runs)).items()}
    return {key: distinct(ones) for key, ones in found.items()} | evaluated


def _key(measured: Measured) -> _Key:
    return measured.setting, measured.result.cfg_scale


def _by_key(measured: Sequence[Measured]) -> dict[_Key, Measured]:
    return {_key(one): one for one in measured}


def _of_policy(evaluations: Sequence[EvaluationRun]) -> dict[_Key, Measured]:
    """All evaluations of one policy together. Those with one seed may share episodes: of them the
    largest counts. Those with different seeds are pooled."""
    found: dict[_Key, dict[str, Measured]] = {}  # of each seed
    pairs = [
        (value_text(evaluation.seed), one)
        for evaluation in evaluations
        for one in _of_run(evaluation)
    ]
    for seed, one in sorted(pairs, key=lambda pair: pair[1].result.rate.episodes):
        found.setdefault(_key(one), {})[seed] = one
    return {key: _together(list(ones.values())) for key, ones in found.items()}


def _together(measured: Sequence[Measured]) -> Measured:
    results = [one.result for one in measured]
    result = Result(
        cfg_scale=results[0].cfg_scale,
        rate=total(result.rate for result in results),
        tasks={task: total(r.tasks[task] for r in results) for task in results[0].tasks},
        guidance_gap=mean_gap(results),
        episodes=tuple(episode for result in results for episode in result.episodes),
    )
    return Measured(measured[0].setting, result, tuple(s for one in measured for s in one.sources))


def mean_gap(results: Sequence[Result]) -> float | None:
    """Of those whose gap is known."""
    gaps = [result.guidance_gap for result in results if result.guidance_gap is not None]
    return sum(gaps) / len(gaps) if gaps else None


def distinct(measured: Sequence[Measured]) -> list[Measured]:
    """Without those whose episodes are, one by one, another's: a policy measured again."""
    kept: dict[object, Measured] = {}
    for one in measured:
        kept.setdefault(one.result.episodes or one.sources, one)
    return list(kept.values())


def _pooled(measured: Sequence[Measured], policies: int) -> Pooled:
    sources = tuple(dict.fromkeys(source for m in measured for source in m.sources))
    return Pooled(total(m.result.rate for m in measured), policies, sources)


def protocol_notes(method: Method, links: Links) -> list[str]:
    """Options in which evaluations before and after differ, so that a change may come from them."""
    notes = set()
    for training in method.trainings:
        for after in links.after[training.name]:
            for before in links.before[training.name]:
                for name in _PROTOCOL:
                    a, b = before.config.get(name), after.config.get(name)
                    if a != b:
                        one, two = value_text(a), value_text(b)
                        notes.add(f"{before.name} has {name} {one}, {after.name} has {two}")
    return sorted(notes)


def best(rows: Sequence[Comparison], phase: str) -> tuple[Comparison, Rate] | None:
    """The comparison with the highest success in a phase; of equals, the lowest cfg_scale.

    :param phase: before or after
    """
    found = [(row, getattr(row, phase)) for row in rows if getattr(row, phase) is not None]
    if not found:
        return None
    row, pooled = max(found, key=lambda pair: (pair[1].rate.share, -pair[0].cfg_scale))
    return row, pooled.rate
