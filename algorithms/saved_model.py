"""SB3's .zip of a model, for policies most of which may lie elsewhere."""

import zipfile
from typing import Any, TypeVar

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import json_to_data, load_from_zip_file, open_path

from cfgrl_gym.algorithms.policies import FlowPolicy

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
        cls: type[SelfSaves], path: Any, *args: Any, checkpoint: Any = None, **kwargs: Any
    ) -> SelfSaves:
        """SB3's `load`.

        :param checkpoint: where the policy's base is now, if it isn't where it was
        :raises FileNotFoundError: the base isn't there
        :raises ValueError: the base has changed, or there is none
        """
        if checkpoint is not None:
            objects = kwargs.get("custom_objects") or {}
            policy_kwargs = saved_policy_kwargs(path)
            if policy_kwargs.get("base") is None:
                raise ValueError(f"'{path}' holds all of its weights; leave checkpoint out")
            policy_kwargs = {**policy_kwargs, "checkpoint": str(checkpoint)}
            kwargs["custom_objects"] = {**objects, "policy_kwargs": policy_kwargs}
        return super().load(path, *args, **kwargs)

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """SB3's, of the policy only what was trained where it has a base."""
        return {**super().get_parameters(), "policy": self.policy.state_to_save()}

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: Any = "auto"
    ) -> None:
        """SB3's, for what `get_parameters` gave."""
        parameters = load_path_or_dict
        if not isinstance(parameters, dict):
            _, parameters, _ = load_from_zip_file(parameters, device=device, load_data=False)
        if "policy" in parameters:
            state = self.policy.complete_state(parameters["policy"])
            parameters = {**parameters, "policy": state}
        super().set_parameters(parameters, exact_match, device)


def saved_policy_kwargs(path: Any) -> dict[str, Any]:
    """The policy's arguments that a model was saved with.

    :param path: of the .zip, which may be left out, or an open file
    :raises FileNotFoundError: no such file
    """
    file = open_path(path, "r", verbose=0, suffix="zip")
    with zipfile.ZipFile(file) as archive:
        arguments: dict[str, Any] = json_to_data(archive.read("data").decode())["policy_kwargs"]
    if hasattr(path, "seek"):
        path.seek(0)  # for who reads it next
    else:
        file.close()
    return arguments
