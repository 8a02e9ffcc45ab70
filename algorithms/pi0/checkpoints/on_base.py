"""What is saved of a policy whose frozen weights are a checkpoint's."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cfgrl_gym.algorithms.pi0.checkpoints.base import Base, BaseReference
from cfgrl_gym.algorithms.pi0.checkpoints.build import Pi0PolicyConfig
from cfgrl_gym.algorithms.policies import FlowPolicy


class OnBase(FlowPolicy):
    """A policy that may stand on a base: then what is saved of it is what was trained, and where
    the base is."""

    base: Base | None
    config: Pi0PolicyConfig

    def _base_reference(self) -> BaseReference | None:
        """The checkpoint that the frozen weights can be had from again; None if there is none."""
        if self.base is None or all(p.requires_grad for p in self.parameters()):
            return None
        reference = self.base.reference()
        if reference is None:
            warnings.warn(
                f"the base checkpoint '{self.base.name}' has changed since it was loaded: all of "
                "the weights are saved, not only what was trained",
                stacklevel=4,
            )
        return reference

    def _frozen(self) -> set[str]:
        return {name for name, p in self.named_parameters() if not p.requires_grad}

    def constructor_arguments(self) -> dict[str, Any]:
        arguments = super().constructor_arguments()
        reference = self._base_reference()
        if reference is not None:
            assert self.base is not None
            arguments |= {"checkpoint": reference.name, "base": reference, "model_config": None}
            tokenizer = self.config.tokenizer
            if tokenizer and Path(tokenizer).resolve() == self.base.folder:
                arguments["tokenizer"] = None  # it comes, and moves, with the checkpoint
        return arguments

    def state_to_save(self) -> dict[str, Any]:
        state = self.state_dict()
        if self._base_reference() is None:
            return state
        frozen = self._frozen()
        return {name: value for name, value in state.items() if name not in frozen}

    def complete_state(self, state: dict[str, Any]) -> dict[str, Any]:
        own = dict(self.named_parameters())
        return {**{name: own[name].detach() for name in self._frozen()}, **state}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch; frozen weights that aren't the base's are then saved with the rest."""
        if self.base is not None:
            own = dict(self.named_parameters())
            if any(
                name in state_dict and not torch.equal(own[name], state_dict[name].to(own[name]))
                for name in self._frozen()
            ):
                self.base = None
        return super().load_state_dict(state_dict, strict, assign)
