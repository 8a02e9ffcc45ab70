"""Converts constructor arguments to JSON, and back without anything that could run code.

An object is written as its constructor's arguments and the name of its class. Reading looks that
name up among the classes listed here and those that a policy adds; no other class can be named.
"""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3.common.utils as sb3
import torch
from gymnasium import spaces

TYPE = "$type"  # the key of a class's name
MAX_ARRAY_SIZE = 10**8  # of a space's bounds; a larger one could exhaust the memory
_ARRAY, _OPTIMIZER = "array", "torch.optim"
# Names of arguments that an instance has as attributes of the same name.
_ARGUMENTS: dict[type, tuple[str, ...]] = {
    spaces.Box: ("low", "high", "dtype"),
    spaces.Dict: ("spaces",),
    spaces.Discrete: ("n", "start"),
    spaces.MultiBinary: ("n",),
    spaces.MultiDiscrete: ("nvec", "dtype", "start"),
    sb3.ConstantSchedule: ("val",),
    sb3.FloatSchedule: ("value_schedule",),
    sb3.LinearSchedule: ("start", "end", "end_fraction"),
}


def to_json(value: Any, more: Iterable[type] = ()) -> Any:
    """Convert a value to JSON's types; tuples become lists, paths become strings.

    :param more: dataclasses that may occur in it
    :raises TypeError: it is, or contains, a value of another type
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path | np.dtype):
        return str(value)
    if isinstance(value, list | tuple):
        return [to_json(each, more) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: to_json(each, more) for key, each in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        same = value.size > 0 and bool((value == value.flat[0]).all())
        numbers = value.flat[0].item() if same else value.flatten().tolist()
        about = {"dtype": str(value.dtype), "shape": list(value.shape)}
        return {TYPE: _ARRAY, **about, "numbers": numbers}
    if isinstance(value, type) and value in vars(torch.optim).values():
        return {TYPE: _OPTIMIZER, "name": value.__name__}
    kind: type = type(value)
    if kind in more:
        names: Iterable[str] = (field.name for field in dataclasses.fields(value) if field.init)
    elif kind in _ARGUMENTS:
        names = _ARGUMENTS[kind]
    else:
        named = getattr(value, "__qualname__", kind.__qualname__)
        raise TypeError(f"{kind.__name__} {named}, which JSON can't hold")
    return {TYPE: kind.__name__, **{name: to_json(getattr(value, name), more) for name in names}}


def from_json(value: Any, more: Iterable[type] = ()) -> Any:
    """Restore the value that `to_json` converted.

    :param more: dataclasses that may occur in it
    :raises ValueError: it names an unknown class, or arguments that its class doesn't take
    :raises TypeError: the same
    """
    if isinstance(value, list):
        return [from_json(each, more) for each in value]
    if not isinstance(value, dict):
        if isinstance(value, float) and math.isnan(value):
            raise ValueError("NaN is no value of an argument")
        return value
    arguments = {key: from_json(each, more) for key, each in value.items() if key != TYPE}
    if TYPE not in value:
        return arguments
    name = value[TYPE]
    if name == _ARRAY:
        return _array(**arguments)
    if name == _OPTIMIZER:
        optimizer = getattr(torch.optim, str(arguments["name"]), None)
        if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
            return optimizer
        raise ValueError(f"torch.optim has no optimizer {arguments['name']!r:.100}")
    kinds = {kind.__name__: kind for kind in (*_ARGUMENTS, *more)}
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"unknown class {name!r:.100}; known: {', '.join(kinds)}")
    if name == "Dict":  # would sort an ordinary dictionary
        return spaces.Dict(OrderedDict(arguments["spaces"]))
    return kinds[name](**arguments)


def _array(dtype: str, shape: list[int], numbers: Any) -> np.ndarray:
    size = math.prod(shape)
    if np.dtype(dtype).kind not in "biuf" or not 0 <= size <= MAX_ARRAY_SIZE:
        raise ValueError(f"an array of {dtype!r:.50} and shape {shape!r:.50} is nothing of a space")
    if isinstance(numbers, list):
        return np.array(numbers, dtype).reshape(shape)
    return np.full(shape, numbers, dtype)
