"""What SB3's .zip of a CFGRL keeps beside its weights, read without running code.

SB3 pickles every attribute that JSON can't hold, and unpickling calls whatever a file names. Of
what CFGRL itself saves with ordinary arguments all names are known, and only these are read.
"""

import base64
import binascii
import json
import pathlib
from collections import OrderedDict, deque
from collections.abc import Mapping
from functools import cache
from typing import Any

import stable_baselines3.common.utils as sb3
import torch
from gymnasium import spaces

from cfgrl_gym.restricted_pickle import (
    GENERATORS,
    NUMBERS,
    Allowed,
    ForbiddenNameError,
    Name,
    read_pickle,
)
from cfgrl_gym.wrappers.norm_stats import Moments, NormStats

SERIALIZED = ":serialized:"  # SB3's key of a pickled value
# Made anew from the learning rate; SB3 before 2.7 saved even a constant one as a function's code.
REMADE = ("lr_schedule",)
# SB3 takes a saved environment for its own, and Gymnasium imports the module in its name.
NEVER_SAVED = ("env", "policy", "device", "_logger", "_custom_logger", "_vec_normalize_env")
_PI0 = b"cfgrl_gym.algorithms.pi0."
_OPTIMIZERS = (
    *(torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.Adamax),
    *(torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop),
    torch.optim.SGD,
)


class UntrustedFileError(ValueError):
    """A file that would run code if it were read; it has not been."""


def read_values(text: str, path: Any, custom_objects: Mapping[str, Any]) -> dict[str, Any]:
    """All values of the .zip's `data`, as SB3's `json_to_data` gives them.

    :param text: the JSON
    :param path: of the .zip, for error messages
    :param custom_objects: values to take instead of the file's, which are then not looked at
    :raises UntrustedFileError: a value that could run code; none has run
    :raises ValueError: damaged
    """
    try:
        saved = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}': its data is not JSON ({error}); copy it again") from error
    if not isinstance(saved, dict):
        raise ValueError(f"'{path}': its data is no JSON object; it is no model that CFGRL saved")
    values: dict[str, Any] = {}
    for key, value in saved.items():
        if key in custom_objects:
            values[key] = custom_objects[key]
        elif key in NEVER_SAVED:
            raise UntrustedFileError(
                f"'{path}' was not loaded: it has a value of '{key}', which CFGRL doesn't save; "
                "if you trust where the file comes from: CFGRL.load(path, trusted=True)"
            )
        elif not isinstance(value, dict) or SERIALIZED not in value:
            values[key] = value
        elif key in REMADE:
            values[key] = None
        else:
            values[key] = _unpickled(key, value[SERIALIZED], path)
    return values


def _unpickled(key: str, text: Any, path: Any) -> Any:
    try:
        content = base64.b64decode(text, validate=True)
        return read_pickle(content, _allowed(pi0=_PI0 in content))
    except ForbiddenNameError as error:
        raise UntrustedFileError(
            f"'{path}' was not loaded: its '{key}' needs {error.name}, which can run code, and is "
            "nothing that CFGRL saves with ordinary arguments. If you trust where the file comes "
            "from: CFGRL.load(path, trusted=True), or --trusted true on the command line. If you "
            f"have the value itself: custom_objects={{'{key}': ...}}"
        ) from error
    except (ValueError, TypeError, binascii.Error) as error:
        raise ValueError(f"'{path}': its '{key}' is damaged ({error}); copy it again") from error


def _by_name(*kinds: type) -> dict[Name, type]:
    return {(kind.__module__, kind.__qualname__): kind for kind in kinds}


@cache
def _allowed(pi0: bool) -> Allowed:
    """What the values of a CFGRL may name.

    :param pi0: PI0's classes too, whose import takes seconds
    """
    from cfgrl_gym.algorithms.groups import Randomness
    from cfgrl_gym.algorithms.metrics import TaskSuccesses
    from cfgrl_gym.algorithms.mlp_policy import MlpPolicy

    policies: list[type] = [MlpPolicy]
    if pi0:
        from cfgrl_gym.algorithms.pi0.policy import Pi0Policy

        policies.append(Pi0Policy)
    schedules = [
        getattr(sb3, name)
        for name in ("FloatSchedule", "ConstantSchedule", "LinearSchedule")
        if hasattr(sb3, name)
    ]
    paths: dict[Name, Any] = {
        (module, name): getattr(pathlib, name)
        for module in ("pathlib", "pathlib._local")  # the latter in Python 3.13
        for name in ("PosixPath", "PurePosixPath")
    }
    numbers: dict[Name, Any] = {
        ("torch", name): getattr(torch, name)
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool")
    }
    own = Allowed(
        calls={**_by_name(OrderedDict, deque), **paths, ("torch", "device"): torch.device},
        classes=_by_name(
            *(spaces.Box, spaces.Dict, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete),
            *(NormStats, Moments, Randomness, TaskSuccesses, *schedules),
        ),
        values={**_by_name(*policies, *_OPTIMIZERS), **numbers},
    )
    return NUMBERS | GENERATORS | own
