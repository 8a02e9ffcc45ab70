"""SB3's .zip of a model, for policies most of which may lie elsewhere."""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import json_to_data, load_from_zip_file, open_path

from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.saving.saved_values import UntrustedFileError, read_values

SelfSaves = TypeVar("SelfSaves", bound="SavesWhatWasTrained")


class SavesWhatWasTrained(BaseAlgorithm):
    """SB3's saving and loading. A .zip needs no other file to be loaded, except where a frozen base
    makes most of the policy: of that it keeps the place and the hash."""

    policy: FlowPolicy  # type: ignore[assignment]

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """SB3's `save`."""
        self.policy_kwargs = self.policy.constructor_arguments()
        super().save(path, exclude, include)

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfSaves],
        path: Any,
        env: Any = None,
        device: Any = "auto",
        custom_objects: dict[str, Any] | None = None,
        *args: Any,
        checkpoint: Any = None,
        trusted: bool = False,
        **kwargs: Any,
    ) -> SelfSaves:
        """SB3's `load`, which of itself runs whatever code a file brings: here none runs, unless
        the file is trusted.

        :param custom_objects: values to take instead of the file's, which are then not looked at
        :param checkpoint: where the policy's base is now, if it isn't where it was
        :param trusted: read everything in the file, code too (a learning-rate schedule of yours, or
            a policy class): only for files from somebody whom you would let run programs here
        :raises UntrustedFileError: (a ValueError) there is something that could run code, and the
            file isn't trusted; nothing of it has run
        :raises FileNotFoundError: no such file, or the base isn't there
        :raises ValueError: the file is damaged, the base has changed, or there is none
        """
        with _opened(path) as file:
            values = _values(file, path, custom_objects or {}, trusted)
            if checkpoint is not None:
                policy_kwargs = values["policy_kwargs"]
                if policy_kwargs.get("base") is None:
                    raise ValueError(f"'{path}' holds all of its weights; leave checkpoint out")
                values["policy_kwargs"] = {**policy_kwargs, "checkpoint": str(checkpoint)}
            # SB3 unpickles nothing that it is given like this.
            with _only_weights(path):
                return super().load(file, env, device, values, *args, **kwargs)

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """SB3's, of the policy only what was trained where it has a base."""
        return {**super().get_parameters(), "policy": self.policy.state_to_save()}

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: Any = "auto"
    ) -> None:
        """SB3's, for what `get_parameters` gave or a .zip, of which only the weights are read:
        that runs no code.

        :raises ValueError: the file is damaged
        """
        parameters = load_path_or_dict
        if not isinstance(parameters, dict):
            with _opened(load_path_or_dict) as file, _only_weights(load_path_or_dict):
                _, parameters, _ = load_from_zip_file(file, device=device, load_data=False)
        if "policy" in parameters:
            state = self.policy.complete_state(parameters["policy"])
            parameters = {**parameters, "policy": state}
        super().set_parameters(parameters, exact_match, device)


def saved_policy_kwargs(path: Any, *, trusted: bool = False) -> dict[str, Any]:
    """The policy's arguments that a model was saved with.

    :param path: of the .zip, which may be left out, or an open file
    :param trusted: see `SavesWhatWasTrained.load`
    :raises FileNotFoundError: no such file
    :raises UntrustedFileError: (a ValueError) it could run code
    """
    with _opened(path) as file:
        arguments: dict[str, Any] = _values(file, path, {}, trusted)["policy_kwargs"]
    return arguments


@contextmanager
def _opened(path: Any) -> Iterator[io.BufferedIOBase]:
    """The .zip, opened once for all that is read of it, and whole.

    :raises FileNotFoundError: no such file
    :raises ValueError: a damaged one
    """
    file: Any = open_path(path, "r", verbose=0, suffix="zip")
    try:
        # Weights are read in pieces, which no checksum covers: so all of it is compared first.
        with _damage(path), zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"'{path}' is damaged in its part '{damaged}'; copy it again")
        yield file
    finally:
        if isinstance(path, io.IOBase):
            file.seek(0)  # for who reads it next
        else:
            file.close()


def _values(
    file: io.BufferedIOBase, path: Any, custom_objects: dict[str, Any], trusted: bool
) -> dict[str, Any]:
    """The model's attributes, as far as SB3 saves them beside the weights."""
    with _damage(path), zipfile.ZipFile(file) as archive:
        text = archive.read("data").decode()
    if trusted:
        values = json_to_data(text, custom_objects)
    else:
        values = read_values(text, path, custom_objects)
    for key, kind in _NEEDED.items():
        value = values.get(key)
        if not isinstance(value, kind):
            raise ValueError(
                f"'{path}' is no model that CFGRL saved: its {key} is {value!r:.100}, not a "
                f"{kind.__name__}"
            )
    if not issubclass(values["policy_class"], FlowPolicy):
        name = values["policy_class"].__name__
        raise ValueError(f"'{path}' is no model that CFGRL saved: its policy is a {name}")
    return values


_NEEDED: dict[str, type] = {
    "policy_class": type,
    "policy_kwargs": dict,
    "observation_space": spaces.Space,
    "action_space": spaces.Box,
    "verbose": int,
}


@contextmanager
def _only_weights(path: Any) -> Iterator[None]:
    """What torch says of a part that holds more than tensors, said plainly."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UntrustedFileError(
            f"'{path}' was not loaded: its weights are damaged, or hold something that could run "
            f"code, which no weights do ({str(error).splitlines()[0]}); get the file again from "
            "somebody whom you trust"
        ) from error


@contextmanager
def _damage(path: Any) -> Iterator[None]:
    """What a damaged .zip makes Python's readers say, said plainly."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(
            f"'{path}' is no whole .zip of a model ({error}); give what CFGRL.save or `cfgrl "
            "train` wrote, and copy it again if it is that"
        ) from error


# NotImplementedError, for a way to compress that isn't, is a RuntimeError.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, KeyError, ValueError, RuntimeError),
    *(EOFError, OSError, OverflowError),
)
