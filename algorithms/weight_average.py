"""Keeps an exponential moving average of a policy's trained weights, which acts in their place."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cfgrl_gym.algorithms.weight_copies import WeightCopies


class WeightAverage(WeightCopies):
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
        super().__init__(policy)
        self._update = get_ema_multi_avg_fn(decay)
        self._begun = False
        self.register_buffer("in_use", torch.tensor(False))
        for name in self.trained:
            self.copy(name)

    def begin(self) -> None:
        """Let the average differ from the weights from now on, as after a step."""
        self._begun = True

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the optimizer's weights.

        :raises RuntimeError: the policy has the average instead of the optimizer's weights
        """
        if self.in_use:
            raise RuntimeError("weights are averaged in training mode: set_training_mode(True)")
        self.begin()
        pairs = self.pairs()
        parameters = [parameter.detach() for parameter, _ in pairs]
        self._update([copy for _, copy in pairs], parameters, None)

    @torch.no_grad()
    def set_in_use(self, average: bool) -> None:
        """Give the policy the average, or else the optimizer's weights."""
        if bool(self.in_use) == average:
            return
        for parameter, copy in self.pairs():
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
