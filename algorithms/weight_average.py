"""Keeps an exponential moving average of a policy's trained weights, which acts in their place."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(nn.Module):
    """Holds the copy of every trained parameter that isn't in use: the average while the optimizer
    works, the optimizer's weights while the average acts.

    Until the first step the average equals the weights, even if these are changed after the
    constructor. Values are exchanged in place, so that optimizers, compiled code and CUDA graphs
    keep their tensors. The copies are buffers: they are saved and loaded with the policy, together
    with a flag for which of the two it has.

    :param policy: its parameters that require a gradient are averaged, beginning with their values
        now
    :param decay: factor by which the average decays in each optimizer step
    """

    in_use: Tensor  # bool: the policy has the average, and the optimizer's weights are here

    def __init__(self, policy: nn.Module, decay: float) -> None:
        super().__init__()
        named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        self._parameters_of_policy = tuple(parameter for _, parameter in named)
        self._names = tuple(name.replace(".", "/") for name, _ in named)
        self._update = get_ema_multi_avg_fn(decay)
        self._begun = False
        self.register_buffer("in_use", torch.tensor(False))
        for name, parameter in zip(self._names, self._parameters_of_policy, strict=True):
            self.register_buffer(name, parameter.detach().clone())

    @property
    def _copies(self) -> list[Tensor]:
        return [self.get_buffer(name) for name in self._names]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the optimizer's weights.

        :raises RuntimeError: the policy has the average instead of the optimizer's weights
        """
        if self.in_use:
            raise RuntimeError("weights are averaged in training mode: set_training_mode(True)")
        self._begun = True
        parameters = [parameter.detach() for parameter in self._parameters_of_policy]
        self._update(self._copies, parameters, None)

    @torch.no_grad()
    def set_in_use(self, average: bool) -> None:
        """Give the policy the average, or else the optimizer's weights."""
        if bool(self.in_use) == average:
            return
        for parameter, copy in zip(self._parameters_of_policy, self._copies, strict=True):
            if not self._begun:
                copy.copy_(parameter)
            value = parameter.clone()
            parameter.copy_(copy)
            copy.copy_(value)
        self.in_use.fill_(average)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._begun = self._begun or f"{prefix}in_use" in state_dict
