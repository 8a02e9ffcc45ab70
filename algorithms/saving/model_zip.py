"""Writes and reads a model's .zip without pickles: JSON for arguments, safetensors for weights.

`model.json` has the spaces, the arguments of algorithm and policy, and the counters of the
training; `policy.safetensors` and `optimizer.safetensors` have the tensors. Reading them runs no
code, whoever wrote the file.
"""

import io
import json
import os
import warnings
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import safetensors.torch
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.utils import check_for_correct_spaces, get_system_info
from torch import Tensor

from cfgrl_gym._version import __version__
from cfgrl_gym.algorithms.checks import check_parameters, constructor_parameters
from cfgrl_gym.algorithms.groups import Randomness
from cfgrl_gym.algorithms.metrics import EpisodeStatistics
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.saving.json_values import from_json, to_json
from cfgrl_gym.whole_files import whole_file

FORMAT = 1
MODEL_PART, POLICY_PART, OPTIMIZER_PART, SYSTEM_PART = PARTS = (
    *("model.json", "policy.safetensors", "optimizer.safetensors"),
    "system_info.txt",  # as in SB3's .zip
)
SB3_PART = "data"  # in a .zip of SB3's own form
_COUNTERS = ("iteration", "num_timesteps", "_n_updates", "skipped_in_a_row")
_EPISODE_COUNTERS = ("num_episodes", "num_control_steps")
_BEFORE_ARGUMENTS = ("policy_class", "observation_space", "action_space")
SelfModel = TypeVar("SelfModel", bound="PickleFreeSaving")


class PickleFreeSaving(BaseAlgorithm):
    """Implements SB3's `save` and `load` with JSON and safetensors, which can't run code.

    A .zip needs no other file to be loaded, except for the weights of a frozen base checkpoint, of
    which it keeps the path and the hash. What JSON can't hold is left out, with a warning, and has
    to be given to `load`: a learning rate that is a function (SB3's schedules are kept), a policy
    that has no name in `policy_aliases`, an optimizer that is not torch's.
    """

    policy: FlowPolicy  # type: ignore[assignment]
    randomness: Randomness
    statistics: EpisodeStatistics
    skipped_in_a_row: int  # optimizer steps that weren't finite

    def training_state(self) -> dict[str, Any]:
        """Return the counters, statistics and seed from which a training resumes, as JSON.

        Weights, optimizer and replayed windows are kept apart. To be called between two iterations.
        """
        return {
            "counters": {name.lstrip("_"): getattr(self, name) for name in _COUNTERS}
            | {name: getattr(self.statistics, name) for name in _EPISODE_COUNTERS}
            | {"entropy": self.randomness.seed},
            "ep_info": list(self.ep_info_buffer or ()),
            "ep_success": list(self.ep_success_buffer or ()),
            "task_successes": self.statistics.successes(),
            "task_groups": [list(each) for each in self.statistics.groups.items()],
        }

    def set_training_state(self, state: dict[str, Any]) -> None:
        """Restore what `training_state` returned."""
        counters = state["counters"]
        for name in _COUNTERS:
            setattr(self, name, counters[name.lstrip("_")])
        self.randomness = Randomness(counters["entropy"])
        window = self._stats_window_size
        self.ep_info_buffer = deque(state["ep_info"], maxlen=window)
        self.ep_success_buffer = deque(state["ep_success"], maxlen=window)
        groups = state.get("task_groups", ())  # an earlier version wrote none
        self.statistics = EpisodeStatistics(window, state["task_successes"], groups)
        for name in _EPISODE_COUNTERS:
            setattr(self.statistics, name, counters[name])

    @classmethod
    def _arguments(cls) -> dict[str, Any]:
        """Return the annotations of those constructor parameters that are saved as attributes."""
        annotations = constructor_parameters(cls, PickleFreeSaving)
        for name in ("policy", "env", "policy_kwargs", "device", "_init_setup_model"):
            annotations.pop(name, None)
        return annotations

    def save(
        self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
    ) -> None:
        """Save the model to a .zip, which replaces an earlier one once it is complete.

        :param path: path of the file, whose ".zip" may be left out, or an open file
        :param exclude: arguments that are not to be saved; a loaded model has their defaults
        :param include: further attributes, as far as JSON can hold them
        """
        names = [*_BEFORE_ARGUMENTS, *self._arguments(), *(include or ())]
        values = {
            name: getattr(self, name, getattr(self, f"_{name}", None))  # _stats_window_size
            for name in dict.fromkeys(names)
            if name not in (exclude or ())
        }
        for name in (*self.policy_aliases, self.policy_class.__name__):
            try:
                if self._get_policy_from_name(name) is self.policy_class:
                    values["policy_class"] = name
            except ValueError:
                continue
        held, left_out = _split(values)
        policy_kwargs, left_out_of_policy = _split(
            self.policy.constructor_arguments(), self.policy.saved_types
        )
        left_out |= {f"policy_kwargs.{n}": reason for n, reason in left_out_of_policy.items()}
        for name, reason in left_out.items():
            warnings.warn(f"the .zip leaves out {_remedy(self, name, reason)}", stacklevel=2)
        document = {
            "format": FORMAT,
            "cfgrl_gym": __version__,
            "n_envs": self.n_envs,
            "values": held,
            "policy_kwargs": policy_kwargs,
            "left_out": left_out,
            "training": self.training_state(),
        }
        states = self.get_parameters()
        optimizer = {
            f"{index}.{name}": value
            for index, state in states["policy.optimizer"]["state"].items()
            for name, value in state.items()
            if value is not None
        }
        contents = (
            json.dumps(document, indent=1).encode(),
            _to_safetensors(states["policy"]),
            _to_safetensors(optimizer),
            get_system_info(print_info=False)[1].encode(),
        )
        if isinstance(path, str | os.PathLike):
            target = Path(path) if Path(path).suffix else Path(f"{os.fspath(path)}.zip")
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as new:
                _write(new, contents)
        else:
            _write(path, contents)

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfModel],
        path: Any,
        env: Any = None,
        device: Any = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        checkpoint: Any = None,
        **kwargs: Any,
    ) -> SelfModel:
        """Load a model that `save` wrote; no code from the file runs.

        :param path: path of the file, whose ".zip" may be left out, or an open file
        :param env: environment to continue learning in; None for predicting only
        :param custom_objects: values to use instead of the file's, by the name of the argument;
            those of "policy_kwargs" are replaced one by one, "policy_class" is a `FlowPolicy`
        :param print_system_info: print the system that saved the model, and this one
        :param force_reset: has no effect: a loaded model always resets its environments first
        :param checkpoint: path of the policy's base checkpoint, if it has moved
        :param kwargs: as custom_objects
        :raises FileNotFoundError: the file or the base doesn't exist
        :raises ValueError: the file is damaged or not from `save`, something that it leaves out
            isn't given, or the base has changed
        """
        parts = _read(path)
        if print_system_info:
            print("== CURRENT SYSTEM INFO ==")
            get_system_info()
            print("== SAVED MODEL SYSTEM INFO ==")
            print(parts[SYSTEM_PART].decode(errors="replace"))
        given = {**(custom_objects or {}), **kwargs}
        check_parameters(given)
        given_to_policy = given.pop("policy_kwargs", None) or {}
        annotations = cls._arguments()
        with _about(path):
            document = json.loads(parts[MODEL_PART])
            if document["format"] != FORMAT:
                raise ValueError(
                    f"it has format {document['format']!r:.50}, this version reads {FORMAT}; use "
                    f"the cfgrl-gym that wrote it, {document['cfgrl_gym']!r:.50}"
                )
            for name, reason in document["left_out"].items():
                if name not in given and name.removeprefix("policy_kwargs.") not in given_to_policy:
                    raise ValueError(f"it leaves out {_remedy(cls, name, reason)}")
            values = {n: from_json(v) for n, v in document["values"].items() if n not in given}
            _check_types(values, annotations)
            policy, *spaces = ((values | given)[name] for name in _BEFORE_ARGUMENTS)
        if env is not None:
            env = cls._wrap_env(env, given.get("verbose", values.get("verbose", 0)))
            check_for_correct_spaces(env, *spaces)
        with _about(path):
            arguments = {n: v for n, v in (values | given).items() if n in annotations}
            model = cls(policy, env, device=device, _init_setup_model=False, **arguments)  # type: ignore[call-arg]
            if env is None:
                model.observation_space, model.action_space = spaces
                model.n_envs = int(document["n_envs"])
            _check_training(document["training"], model.training_state())
            model.set_training_state(document["training"])
            kind: Any = model.policy_class
            policy_kwargs = from_json(document["policy_kwargs"], kind.saved_types)
            _check_types(policy_kwargs, constructor_parameters(kind, FlowPolicy))
            model.policy_kwargs = policy_kwargs | given_to_policy
            if checkpoint is not None:
                if model.policy_kwargs.get("base") is None:
                    raise ValueError("it holds all of its weights; leave checkpoint out")
                model.policy_kwargs["checkpoint"] = str(checkpoint)
            model._setup_model()
            model.set_parameters(model._states(parts), device=device)
        vars(model).update({n: v for n, v in values.items() if not hasattr(model, n)})
        vars(model).update({n: v for n, v in given.items() if n not in annotations})
        return model

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """Return SB3's parameters; for a policy with a base checkpoint, only trained weights."""
        return {**super().get_parameters(), "policy": self.policy.state_to_save()}

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: Any = "auto"
    ) -> None:
        """Load parameters as SB3 does, from what `get_parameters` returned or from a .zip.

        :raises ValueError: the file is damaged, or has another kind of optimizer
        """
        parameters = load_path_or_dict
        if not isinstance(parameters, dict):
            parts = _read(load_path_or_dict)
            with _about(load_path_or_dict):
                parameters = self._states(parts)
        if "policy" in parameters:
            state = self.policy.complete_state(parameters["policy"])
            parameters = {**parameters, "policy": state}
        if "policy.optimizer" in parameters:
            _check_optimizer(parameters["policy.optimizer"], self.policy.optimizer)
        super().set_parameters(parameters, exact_match, device)

    def _states(self, parts: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """Return the state dictionaries of a .zip, as in `get_parameters`.

        The optimizer's settings are those of this model, which was made with the saved arguments.
        """
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in safetensors.torch.load(parts[OPTIMIZER_PART]).items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        groups = self.policy.optimizer.state_dict()["param_groups"]
        return {
            "policy": safetensors.torch.load(parts[POLICY_PART]),
            "policy.optimizer": {"state": state, "param_groups": groups},
        }


def _split(
    values: Mapping[str, Any], more: Iterable[type] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values that JSON can hold, and for each of the others the reason why it can't."""
    held, left_out = {}, {}
    for name, value in values.items():
        try:
            held[name] = to_json(value, more)
        except TypeError as error:
            left_out[name] = str(error)
    return held, left_out


def _remedy(algorithm: Any, name: str, reason: str) -> str:
    kind = algorithm if isinstance(algorithm, type) else type(algorithm)
    holder, _, inner = name.partition(".")
    value = f'{{"{inner}": ...}}' if inner else "..."
    return f"its {name} ({reason}): give it by {kind.__name__}.load(path, {holder}={value})"


# The file -----------------------------------------------------------------------------------------


def _to_safetensors(state: Mapping[str, Tensor]) -> bytes:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        # Tied weights, which share their memory, are written twice.
        tensors[name] = tensor.detach().clone() if place in seen else tensor.detach().contiguous()
        seen.add(place)
    return safetensors.torch.save(tensors)


def _write(file: Any, contents: Iterable[bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in zip(PARTS, contents, strict=True):
            archive.writestr(name, content)


def _read(path: Any) -> dict[str, bytes]:
    """Return the parts of a .zip, after checking their checksums.

    :raises FileNotFoundError: there is no such file
    :raises ValueError: it is damaged, or not from `save`
    """
    file: Any = open_path(path, "r", verbose=0, suffix="zip")
    try:
        with _about(path), zipfile.ZipFile(file) as archive:
            found = {info.filename: info for info in archive.infolist()}
            if SB3_PART in found:
                raise ValueError(_EARLIER_FORM)
            # A part that is compressed may have any size; `save` compresses none.
            if any(found[name].compress_type != zipfile.ZIP_STORED for name in PARTS):
                raise ValueError("its parts are compressed")
            return {name: archive.read(name) for name in PARTS}
    finally:
        if isinstance(path, io.IOBase):
            file.seek(0)  # so that it can be read again
        else:
            file.close()


_EARLIER_FORM = (
    "it is in SB3's own form, as SB3's algorithms and earlier cfgrl-gym write it: its pickles "
    "could run code and are not read. If `cfgrl train` wrote it, take the folder 'policy' beside "
    "it; otherwise carry its weights over, by torch.save(model.get_parameters(), file) in the "
    "version that wrote it and model.set_parameters(torch.load(file, weights_only=True)) on a new "
    "model"
)


@contextmanager
def _about(path: Any) -> Iterator[None]:
    """Name the file in errors of any kind about its contents.

    Errors about the base (FileNotFoundError) and the device (MemoryError) are left unchanged.
    """
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"'{path}' is no model that CFGRL saved, or needs something else: {reason}"
        ) from error


# Checks of what was read --------------------------------------------------------------------------


def _check_types(values: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Check values against those annotations that consist of classes.

    :raises ValueError: a value isn't of these classes
    """
    for name in values.keys() & annotations.keys():
        annotation, kind = annotations[name], type(values[name])
        union = get_origin(annotation) in (Union, UnionType)
        options = get_args(annotation) if union else (annotation,)
        plain = all(type(option) is type for option in options)
        if plain and kind not in options and not (kind is int and float in options):
            raise ValueError(f"its {name} is {values[name]!r:.100}")


def _check_training(saved: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Check a saved training state.

    :raises ValueError: it isn't what `training_state` returns
    """
    counters, successes = (
        saved["counters"],
        [saved["ep_success"], *saved["task_successes"].values()],
    )
    if (
        not new.keys() - {"task_groups"} <= saved.keys() <= new.keys()
        or counters.keys() != new["counters"].keys()
        or not all(type(count) is int and count >= 0 for count in counters.values())
        or not all(type(success) is bool for each in successes for success in each)
        or not all(isinstance(info[key], int | float) for info in saved["ep_info"] for key in "rl")
        or not all(
            type(count) is int and count >= 0 and (task is None or type(task) is int)
            for task, count in saved.get("task_groups", ())
        )
    ):
        raise ValueError(f"its counters and statistics are {saved!r:.200}")


def _check_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Check a saved optimizer state before it is loaded.

    :raises ValueError: with this state the optimizer would fail, but only at its next step
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Sorted, because safetensors gives its tensors in any order: the same file, the same message.
    for index, state in sorted(saved["state"].items()):
        if not 0 <= index < len(parameters):
            raise ValueError(f"the saved optimizer has a parameter {index}, of {len(parameters)}")
        for name, value in sorted(state.items()):
            one = not isinstance(value, Tensor) or value.numel() == 1  # a number of steps, say
            factored = name in ("row_var", "col_var")  # Adafactor's
            if not one and not factored and value.shape != parameters[index].shape:
                raise ValueError(
                    f"the saved optimizer's {name} has shape {tuple(value.shape)} for a parameter "
                    f"of shape {tuple(parameters[index].shape)}"
                )
