"""Values of CFGRL's parameters that can't work, refused with what to do instead."""

import math
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from cfgrl_gym.algorithms.labels import LabelSource, Negatives
from cfgrl_gym.envs.arguments import is_int

_INTS = (
    *("rloo_batch_size", "groups_per_iteration", "n_epochs", "batch_size"),
    *("gradient_accumulation_steps", "replay_iterations"),
)
_OPTIONAL_INTS = ("max_groups_tried", "window_stride")
_NUMBERS = ("early_stop_percentage", "dropout_prob", "label_threshold")
_OPTIONAL_NUMBERS = ("positive_share", "cfg_scale", "device_memory", "prefix_memory")


def check_parameters(values: Mapping[str, Any]) -> None:
    """Check CFGRL's parameters by name; other names are passed over.

    :raises ValueError: for a parameter of the constructor that is out of its range, or is no
        number where it should be one
    """
    for name in (*_INTS, *_OPTIONAL_INTS):
        value = values[name]
        if not is_int(value) and not (value is None and name in _OPTIONAL_INTS):
            raise ValueError(f"{name} must be an int; got {value!r:.100}")
    for name in (*_NUMBERS, *_OPTIONAL_NUMBERS):
        value = values[name]
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        finite = number and math.isfinite(value)
        if not finite and not (value is None and name in _OPTIONAL_NUMBERS):
            raise ValueError(f"{name} must be a finite number; got {value!r:.100}")
    if values["rloo_batch_size"] < 2:
        raise ValueError(
            "rloo_batch_size must be at least 2, because each episode is compared with the others "
            f"of its group; got {values['rloo_batch_size']}"
        )
    for name in ("groups_per_iteration", "n_epochs", "batch_size", "gradient_accumulation_steps"):
        if values[name] < 1:
            raise ValueError(f"{name} must be at least 1; got {values[name]}")
    if values["replay_iterations"] < 0:
        raise ValueError(
            "replay_iterations must be 0 (none) or the number of earlier iterations to learn from; "
            f"got {values['replay_iterations']}"
        )
    if not 0 <= values["dropout_prob"] <= 1:
        raise ValueError(f"dropout_prob must be in [0, 1]; got {values['dropout_prob']}")
    positive_share = values["positive_share"]
    if positive_share is not None and not 0 < positive_share < 1:
        raise ValueError(
            "positive_share must be in (0, 1), or None for every window once an epoch; "
            f"got {positive_share}"
        )
    share = values["early_stop_percentage"]
    if not 0 < share <= 1:
        raise ValueError(f"early_stop_percentage must be in (0, 1]; got {share}")
    for name in ("device_memory", "prefix_memory"):
        gib = values[name]
        if gib is not None and not gib >= 0:
            raise ValueError(f"{name} is in GiB and must not be negative; got {gib}")
    tried, needed = values["max_groups_tried"], groups_needed(values)
    if tried is not None and tried < needed:
        raise ValueError(f"max_groups_tried={tried} can't give the {needed} valid groups asked for")
    for name, kind in (("label_source", LabelSource), ("negatives", Negatives)):
        if values[name] not in get_args(kind):
            raise ValueError(
                f"{name} must be one of {', '.join(get_args(kind))}; got {values[name]!r}"
            )


def groups_needed(values: Mapping[str, Any]) -> int:
    """Valid groups with which a collection ends."""
    share = values["early_stop_percentage"] if values["enable_dynamic_sampling"] else 1.0
    return math.ceil(round(share * values["groups_per_iteration"], 9))


def check_stride(stride: int, chunk_size: int) -> None:
    """:raises ValueError: for a window stride that doesn't fit chunks of this size."""
    if stride < 1 or (stride > chunk_size and stride % chunk_size):
        raise ValueError(
            f"window_stride must be between 1 and the chunk size {chunk_size}, or a multiple of "
            f"it; got {stride}"
        )
