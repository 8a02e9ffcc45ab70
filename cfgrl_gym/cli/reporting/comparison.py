"""Success before and after training: which evaluation belongs to which training, and pooling."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cfgrl_gym.cli.reporting.methods import Method, plain_policy
from cfgrl_gym.cli.reporting.rates import Pooled, Rate, total, verdict
from cfgrl_gym.cli.reporting.runs import EvaluationRun, Result, Run, Runs, Setting, Training
from cfgrl_gym.cli.run_folder import MODEL_FILE

# Options of an evaluation that change what is measured; null is the policy's own.
_PROTOCOL = ("chunk_size", "max_episode_steps", "num_inference_steps")


@dataclass(frozen=True)
class Measured:
    """One result and where it comes from."""

    setting: Setting
    result: Result
    source: str
    run: Run


@dataclass
class Links:
    """Evaluations by the policy they are of; each belongs to all the trainings it fits."""

    after: dict[str, list[EvaluationRun]] = field(default_factory=dict)
    before: dict[str, list[EvaluationRun]] = field(default_factory=dict)

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
        start = plain_policy(str(training.config.get("policy")))
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
        Measured(Setting(evaluation.suite, tuple(r.tasks)), r, evaluation.name, evaluation)
        for r in evaluation.results
    ]


def _of_checkup(training: Training, position: int) -> list[Measured]:
    if not training.evaluations:
        return []
    checkup = training.evaluations[position]
    if (checkup.iteration == 0) != (position == 0):
        return []  # nothing was evaluated before the training, or nothing since
    source = f"{training.name}, iteration {checkup.iteration}"
    suite = training.evaluated_suite
    return [Measured(Setting(suite, tuple(r.tasks)), r, source, training) for r in checkup.results]


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
    before: dict[tuple[Setting, float], Pooled] = {}
    candidates = [m for t in method.trainings for m in _before(t, links)]
    for key in _keys(candidates):
        before[key] = _pool_before([m for m in candidates if _key(m) == key], links, method)
    after: dict[tuple[Setting, float], list[tuple[Training, Measured]]] = {}
    for training in method.trainings:
        found = [m for e in links.after[training.name] for m in _of_run(e)]
        found += _of_checkup(training, -1)
        for key in _keys(found):
            # Evaluations of one policy may share episodes: the largest counts, not their sum.
            best = max((m for m in found if _key(m) == key), key=_episodes)
            after.setdefault(key, []).append((training, best))
    rows = []
    for key in sorted({*before, *after}, key=lambda k: (k[0].suite, k[0].tasks, k[1])):
        ones = after.get(key, [])
        pooled = _pooled([m for _, m in ones], len(ones)) if ones else None
        by_seed = tuple((training, m.result) for training, m in ones)
        rows.append(Comparison(method, *key, before.get(key), pooled, by_seed))
    return rows


def _before(training: Training, links: Links) -> list[Measured]:
    found = [m for e in links.before[training.name] for m in _of_run(e)]
    return found + _of_checkup(training, 0)


def _key(measured: Measured) -> tuple[Setting, float]:
    return measured.setting, measured.result.cfg_scale


def _keys(measured: Sequence[Measured]) -> list[tuple[Setting, float]]:
    return list(dict.fromkeys(map(_key, measured)))


def _episodes(measured: Measured) -> int:
    return measured.result.rate.episodes


def _pool_before(candidates: list[Measured], links: Links, method: Method) -> Pooled:
    """Every start policy once: its largest evaluation, or all of its trainings' own ones.

    Trainings that start from one policy evaluate it again and again. Where that gave the very same
    episodes, they count once.
    """
    chosen: list[Measured] = []
    starts = dict.fromkeys(plain_policy(str(t.config.get("policy"))) for t in method.trainings)
    policies = 0
    for start in starts:
        members = {
            t.name for t in method.trainings if plain_policy(str(t.config.get("policy"))) == start
        }
        standalone = [
            m
            for m in candidates
            if isinstance(m.run, EvaluationRun) and plain_policy(m.run.policy) == start
        ]
        own = distinct([m for m in candidates if m.run.name in members])
        largest = max(standalone, key=_episodes, default=None)
        if largest is None or sum(map(_episodes, own)) > _episodes(largest):
            chosen += own
        else:
            chosen.append(largest)
        policies += bool(own or standalone)
    return _pooled(chosen, policies)


def distinct(measured: Sequence[Measured]) -> list[Measured]:
    """Without those whose episodes are, one by one, another's."""
    kept: dict[object, Measured] = {}
    for one in measured:
        kept.setdefault(one.result.episodes or one.source, one)
    return list(kept.values())


def _pooled(measured: Sequence[Measured], policies: int) -> Pooled:
    sources = tuple(dict.fromkeys(m.source for m in measured))
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
                        notes.add(f"{before.name} has {name} {a}, {after.name} has {b}")
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
