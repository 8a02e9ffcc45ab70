"""Checks parameters, environments and starts, with errors that say what to do instead."""

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.vec_env import VecEnv

from cfgrl_gym.algorithms.collector import Episode, Row
from cfgrl_gym.algorithms.distributed.ranks import Ranks
from cfgrl_gym.algorithms.groups import groups_needed
from cfgrl_gym.algorithms.labels import LabelSource, Negatives
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.envs.arguments import is_finite, is_int

_INTS = (
    *("rloo_batch_size", "groups_per_iteration", "n_epochs", "batch_size"),
    *("gradient_accumulation_steps", "replay_iterations", "stats_window_size", "verbose"),
    "midway_groups",
)
_OPTIONAL_INTS = ("max_groups_tried", "window_stride", "seed")
_NUMBERS = (
    *("early_stop_percentage", "gamma", "dropout_prob", "label_threshold", "rollout_noise"),
    "max_grad_norm",
)
_OPTIONAL_NUMBERS = (
    *("optimal_share", "positive_share", "null_rate", "cfg_scale", "device_memory"),
    "prefix_memory",
)
_CHOICES = {
    "label_source": get_args(LabelSource),
    "negatives": get_args(Negatives),
    "enable_dynamic_sampling": (True, False),
    "curriculum": (True, False),
    "overlap": (True, False),
    "fsdp": (True, False),
}
_PARAMETERS = (
    *(*_INTS, *_OPTIONAL_INTS, *_NUMBERS, *_OPTIONAL_NUMBERS, *_CHOICES),
    "learning_rate",
)

_Rule = tuple[Callable[[Any], bool], str]
_AT_LEAST_1: _Rule = (lambda n: n >= 1, "must be at least 1")
_GIB: _Rule = (lambda gib: gib >= 0, "is in GiB and must not be negative")
_RULES: dict[str, _Rule] = {
    "rloo_batch_size": (
        lambda k: k >= 2,
        "must be at least 2, because each episode is compared with the others of its group",
    ),
    "groups_per_iteration": _AT_LEAST_1,
    "n_epochs": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "replay_iterations": (
        lambda n: n >= 0,
        "must be 0 (none) or the number of earlier iterations to learn from",
    ),
    "gamma": (lambda gamma: 0 < gamma <= 1, "must be in (0, 1]; 1 discounts nothing"),
    "midway_groups": (lambda n: n >= 0, "must be 0 (none) or a number of groups"),
    "dropout_prob": (lambda p: 0 <= p <= 1, "must be in [0, 1]"),
    "optimal_share": (
        lambda share: 0 < share <= 1,
        "must be in (0, 1], or None for all that reach label_threshold",
    ),
    "null_rate": (
        lambda rate: 0 < rate < 1,
        "must be in (0, 1), or None: ∅ then learns from what isn't optimal and what is dropped",
    ),
    "rollout_noise": (lambda scale: scale > 0, "must be more than 0; 1 is the policy's own"),
    "positive_share": (
        lambda share: 0 < share <= 1,
        "must be in (0, 1], or None for every window once an epoch",
    ),
    "early_stop_percentage": (lambda share: 0 < share <= 1, "must be in (0, 1]"),
    "max_grad_norm": (lambda norm: norm > 0, "must be positive; a large one clips nothing"),
    "stats_window_size": _AT_LEAST_1,
    "seed": (lambda seed: 0 <= seed < 2**32, "must be from 0 to 2**32 - 1"),
    "learning_rate": (
        lambda rate: rate is None or callable(rate) or (is_finite(rate) and rate >= 0),
        "must be a number that isn't negative, a function of the progress remaining, or None",
    ),
    "device_memory": _GIB,
    "prefix_memory": _GIB,
}


def check_parameters(values: Mapping[str, Any]) -> None:
    """Check those of the values that are parameters of CFGRL, and ignore all others.

    :raises ValueError: a parameter is out of its range, or isn't a number where it should be one
    """
    given = {name: values[name] for name in _PARAMETERS if name in values}
    for name, value in given.items():
        if value is None and name in (*_OPTIONAL_INTS, *_OPTIONAL_NUMBERS):
            continue
        if name in (*_INTS, *_OPTIONAL_INTS) and not is_int(value):
            raise ValueError(f"{name} must be an int; got {value!r:.100}")
        if name in (*_NUMBERS, *_OPTIONAL_NUMBERS) and not is_finite(value):
            raise ValueError(f"{name} must be a finite number; got {value!r:.100}")
        if name in _CHOICES and not any(value is one or value == one for one in _CHOICES[name]):
            known = ", ".join(map(str, _CHOICES[name]))
            raise ValueError(f"{name} must be one of {known}; got {value!r:.100}")
        if name in _RULES and not _RULES[name][0](value):
            raise ValueError(f"{name} {_RULES[name][1]}; got {value!r:.100}")
    tried = given.get("max_groups_tried")
    decides = ("groups_per_iteration", "enable_dynamic_sampling", "early_stop_percentage")
    if tried is not None and given.keys() >= set(decides):
        needed = groups_needed(*(given[name] for name in decides))
        if tried < needed:
            raise ValueError(
                f"max_groups_tried={tried} can't give the {needed} valid groups asked for"
            )


def constructor_parameters(kind: type, root: type) -> dict[str, Any]:
    """Return the annotations of the constructor's parameters, including bases up to `root`."""
    annotations: dict[str, Any] = {}
    for each in kind.__mro__:
        if issubclass(each, root) and "__init__" in vars(each):
            for name, parameter in inspect.signature(each).parameters.items():
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    annotations.setdefault(name, parameter.annotation)
    return annotations


def check_policy_kwargs(policy_class: type[BasePolicy], policy_kwargs: Mapping[str, Any]) -> None:
    """Check that the policy's constructor has these arguments.

    :raises ValueError: it lacks some of them
    """
    given_by_sb3 = ("observation_space", "action_space", "lr_schedule")
    known = constructor_parameters(policy_class, BaseModel).keys() - set(given_by_sb3)
    for name in policy_kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            guess = f"did you mean '{close[0]}'? It takes" if close else "it takes"
            raise ValueError(
                f"policy_kwargs has '{name}', which {policy_class.__name__} doesn't take; {guess} "
                f"{', '.join(sorted(known))}"
            )


def check_stride(stride: int, chunk_size: int) -> None:
    """Check that a window stride fits chunks of this size.

    :raises ValueError: it doesn't
    """
    if stride < 1 or (stride > chunk_size and stride % chunk_size):
        raise ValueError(
            f"window_stride must be between 1 and the chunk size {chunk_size}, or a multiple of "
            f"it; got {stride}"
        )


def check_ranks(ranks: Ranks, given: Mapping[str, Any]) -> None:
    """Check that these ranks, more than one, can share the work.

    :param given: the parameters of CFGRL
    :raises ValueError: there are too few groups, or an option needs all episodes in one place
    """
    groups = given["groups_per_iteration"]
    if groups < ranks.size:
        raise ValueError(
            f"groups_per_iteration={groups} gives {ranks.size} ranks less than a group each; ask "
            "for at least as many groups, or start fewer ranks"
        )
    for name, needs_all in (
        ("label_source", given["label_source"] == "value"),
        ("midway_groups", given["midway_groups"] > 0),
    ):
        if needs_all:
            raise ValueError(
                f"{name}={given[name]!r} compares the episodes of all groups, which only a single "
                "rank has; start one, or leave it out"
            )


def check_label_source(label_source: LabelSource, policy: FlowPolicy) -> None:
    """Check that the policy gives what windows are to be labelled by.

    :raises ValueError: it has no features for a value head
    """
    if label_source == "value" and not policy.has_value_features:
        raise ValueError(
            f"label_source='value' needs features that training leaves unchanged, which this "
            f"{type(policy).__name__} doesn't have: take Pi0Policy with trainable='expert' (the "
            "vision-language model is then frozen), MlpPolicy, or a FlowPolicy with value_features "
            "and has_value_features = True; or another label_source"
        )


def check_copies(policy: FlowPolicy, option: str) -> None:
    """Check that a copy of the policy can train in its place.

    :param option: that wants it
    :raises ValueError: it can't be copied
    """
    try:
        policy.copy_to_train(bare=option == "fsdp")
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{option}=True trains a copy of the policy, but this {type(policy).__name__} can't be "
            f"copied ({error}); leave out of it what copy.deepcopy can't copy, such as locks, open "
            f"files and tensors with a gradient function, or use {option}=False"
        ) from error


def check_fsdp(policy: FlowPolicy, overlap: bool) -> None:
    """Check that several ranks can share what an update of this policy trains.

    :raises ValueError: they can't
    """
    scalars = [n for n, p in policy.named_parameters() if p.requires_grad and p.ndim == 0]
    if overlap:
        why = "overlap=True keeps a second copy of the whole policy, which fsdp is to avoid"
    elif policy.device.type == "cuda" and dist.get_backend() == "gloo":
        why = "on GPUs it needs dist.init_process_group('nccl')"
    elif isinstance(policy.optimizer, torch.optim.Adafactor):
        why = "Adafactor's state can't be shared out as the weights are; take torch.optim.AdamW"
    elif scalars:
        why = f"a parameter needs a dimension to be shared out along, which {scalars[0]} lacks"
    else:
        check_copies(policy, "fsdp")
        return
    raise ValueError(f"fsdp=True doesn't work here: {why}. Or leave fsdp out")


def check_env(env: VecEnv | None) -> VecEnv:
    """Return the environment to learn in.

    :raises ValueError: there is none
    """
    if env is None:
        raise ValueError(
            "there is no environment to learn in: CFGRL(policy, env), or for a model that was "
            "loaded, load(path, env=env) or set_env(env). env=None is for loading only"
        )
    return env


def check_gives_snapshots(env: VecEnv) -> None:
    """Check that episodes can be continued from their middle.

    :raises ValueError: the environments don't give snapshots
    """
    if not env.has_attr("give_snapshots"):
        raise ValueError(
            "midway_groups needs environments from whose moments an episode can go on: a method "
            "give_snapshots(enabled), info['snapshot'] after resets and steps while enabled, and "
            "reset(options={'snapshot': ...}), as Libero-v0 and LiberoChunked-v0 have. Use one of "
            "these, or midway_groups=0"
        )


def check_curriculum(tasks: Mapping[int, Any] | None) -> None:
    """Check that there are tasks to choose among.

    :param tasks: of the environments; None: they start from reset seeds
    :raises ValueError: there are less than two
    """
    if len(tasks or ()) < 2:
        raise ValueError(
            "curriculum chooses among several tasks, and these environments offer "
            f"{len(tasks or ()) or 'none by number'}: give more (task_id='all'), or leave it out"
        )


def check_starts(groups: Sequence[Sequence[Episode]]) -> None:
    """Warn if the episodes of a group began with different observations."""
    for episodes in groups:
        first, *others = (episode.chunks[0].observation for episode in episodes)
        if not all(_equal(first, other) for other in others):
            warnings.warn(
                f"the episodes from {episodes[0].start} began with different observations, so that "
                "the easier starts among them will be labelled optimal. They must begin alike: "
                "reset(seed=...) must decide all that is random (use self.np_random), or the "
                "environment take its start from options; see wrappers of your own, too",
                stacklevel=3,
            )
            return


def _equal(one: Row, other: Row) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_equal(one[key], other[key]) for key in one)
    return np.array_equal(one, other, equal_nan=np.issubdtype(one.dtype, np.floating))  # type: ignore[union-attr, arg-type]
