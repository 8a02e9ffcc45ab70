"""Says what of a policy is saved with a model, and how a pickled policy is refused."""

import os
from typing import Any, ClassVar, TypeVar

import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from cfgrl_gym.algorithms.guidance import CFG_SCALE_VARIABLE

SelfPolicy = TypeVar("SelfPolicy", bound="PolicyState")


class PolicyState(BasePolicy):
    """Serves as the part of `FlowPolicy` that saving and loading use."""

    # Dataclasses that a saved model may contain besides JSON values, as constructor arguments.
    saved_types: ClassVar[tuple[type, ...]] = ()
    cfg_scale: float

    def get_extra_state(self) -> Tensor:
        """Return `cfg_scale`, which is saved with the weights."""
        return torch.tensor(self.cfg_scale, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore `cfg_scale`, unless PI0_CFG_SCALE overrides it."""
        if CFG_SCALE_VARIABLE not in os.environ:
            self.cfg_scale = float(state)

    def state_to_save(self) -> dict[str, Any]:
        """Return the state dict, without what `constructor_arguments` restores from elsewhere."""
        return self.state_dict()

    def complete_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Complete what `state_to_save` returned with what it left out, taken from this policy."""
        return state

    def constructor_arguments(self) -> dict[str, Any]:
        """Return the arguments that, with spaces and learning rate, rebuild this policy."""
        arguments = self._get_constructor_parameters()
        for name in ("observation_space", "action_space", "lr_schedule"):
            arguments.pop(name, None)
        return arguments

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfPolicy],
        path: str,
        device: torch.device | str = "auto",
        *,
        trusted: bool = False,
    ) -> SelfPolicy:
        """Load what SB3's `policy.save` wrote: a pickle, which can run code.

        :param trusted: True if the file may run code; `CFGRL.load` and checkpoints that
            `save_pretrained` wrote never do
        :raises ValueError: `trusted` is false
        """
        if not trusted:
            raise ValueError(
                f"'{path}' was not loaded: what policy.save writes is a pickle, which can run "
                "code. Keep policies with CFGRL.save or save_pretrained; or, if you trust where "
                "the file comes from: load(path, trusted=True)"
            )
        return super().load(path, device)
