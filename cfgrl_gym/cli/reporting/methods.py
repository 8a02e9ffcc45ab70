"""Groups trainings that differ only in their seed into methods, and finds how methods differ."""

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from cfgrl_gym.cli.configs import TrainConfig
from cfgrl_gym.cli.reporting.rates import count
from cfgrl_gym.cli.reporting.runs import Training
from cfgrl_gym.cli.run_folder import POLICY_FOLDER

# Where results go, on what they were computed and how often they were looked at.
_NOT_THE_METHOD = {
    *("seed", "out", "video", "device", "device_memory", "prefix_memory"),
    *("save_every", "keep_checkpoints", "resume"),
}
_MEASURING = "eval_"
ALGORITHM = "algorithm"


@dataclass(frozen=True, eq=False)
class Method:
    """Holds the trainings of one algorithm with one configuration.

    :param label: distinguishes it from the report's other methods
    :param options: all options that define the method, including the algorithm
    :param changes: differences from the baseline: option, the baseline's value, this method's value
    :param trainings: one for each seed
    """

    label: str
    options: dict[str, Any]
    changes: tuple[tuple[str, Any, Any], ...]
    trainings: tuple[Training, ...]

    @property
    def is_baseline(self) -> bool:
        return not self.changes

    @property
    def seeds(self) -> tuple[str, ...]:
        return tuple(value_text(training.seed) for training in self.trainings)

    @property
    def training_episodes(self) -> str:
        """Return the number of episodes of its trainings, as far as their logs say."""
        known = [t.episodes for t in self.trainings if t.episodes is not None]
        if not known:
            return "not logged"
        low, high = min(known), max(known)
        text = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        every = len(known) == len(self.trainings)
        return text if every else f"{text} ({count(len(known), 'run')})"

    @property
    def change(self) -> str:
        """Return the changes as text, such as: dropout_prob 0.1 → 0."""
        return "; ".join(
            f"{name} {value_text(old)} → {value_text(new)}" for name, old, new in self.changes
        )


def value_text(value: Any) -> str:
    """Format an option's value as a user would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(value_text, value)) + "]"
    return str(value)


def plain_policy(policy: str) -> str:
    """Normalise a policy's path: a run folder stands for the policy in it."""
    path = posixpath.normpath(policy)
    name = posixpath.basename(path)
    return posixpath.dirname(path) or "." if name == POLICY_FOLDER else path


# What a run did before there was the option, where that isn't the present default.
_BEFORE_THE_OPTION = {"replay_iterations": 0, "positive_share": None, "ema_decay": None}


def method_options(training: Training) -> dict[str, Any]:
    """Return the algorithm and every option that can change what is learned.

    An option that an older run doesn't have gets the value that means what the run did. Warm starts
    that differ only in their seed count as the same.
    """
    options: dict[str, Any] = {ALGORITHM: training.algorithm}
    for field in fields(TrainConfig):
        if field.default is not MISSING:
            options[field.name] = field.default
    options |= _BEFORE_THE_OPTION | training.config
    if isinstance(options.get("policy"), str):
        policy = plain_policy(options["policy"])
        options["policy"] = re.sub(r"(?i)(seed[-_=]?)\d+", r"\1N", policy)
    return {
        name: value
        for name, value in options.items()
        if name not in _NOT_THE_METHOD and not name.startswith(_MEASURING)
    }


def group_methods(trainings: Sequence[Training]) -> list[Method]:
    """Group trainings into methods, with the baseline first: the most common, then most typical."""
    groups: dict[str, tuple[dict[str, Any], list[Training]]] = {}
    for training in trainings:
        options = method_options(training)
        key = repr(sorted((name, value_text(value)) for name, value in options.items()))
        groups.setdefault(key, (options, []))[1].append(training)
    every = [options for options, _ in groups.values()]

    def rank(group: tuple[dict[str, Any], list[Training]]) -> tuple[int, int]:
        return -len(group[1]), sum(len(_changes(group[0], other)) for other in every)

    ordered = sorted(groups.values(), key=rank)
    methods = []
    for options, members in ordered:
        changes = tuple(_changes(ordered[0][0], options))
        parts = [str(options[ALGORITHM])]
        parts += [f"{name} {value_text(new)}" for name, _, new in changes if name != ALGORITHM]
        members.sort(key=lambda training: (str(type(training.seed)), training.seed, training.name))
        methods.append(Method(", ".join(parts), options, changes, tuple(members)))
    return methods


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = list(dict.fromkeys([*new, *old]))
    pairs = [(name, old.get(name), new.get(name)) for name in names]
    return [(name, a, b) for name, a, b in pairs if value_text(a) != value_text(b)]


def varied_options(methods: Sequence[Method]) -> list[str]:
    """List the options, besides the algorithm, that aren't the same in all methods."""
    names = dict.fromkeys(name for method in methods for name, _, _ in method.changes)
    return [name for name in names if name != ALGORITHM]


def repeated_seeds(method: Method) -> list[str]:
    """List seeds that occur more than once: their runs aren't independent of each other."""
    return [seed for seed, count in Counter(method.seeds).items() if count > 1]
