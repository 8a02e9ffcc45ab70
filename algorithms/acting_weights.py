"""Decides which weights a policy has: the optimizer's, their average, or the reference's."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from cfgrl_gym.algorithms.guidance import CfgReference, check_choice
from cfgrl_gym.algorithms.reference_weights import ReferenceWeights
from cfgrl_gym.algorithms.saving.policy_state import PolicyState
from cfgrl_gym.algorithms.weight_average import WeightAverage

SelfWeights = TypeVar("SelfWeights", bound="ActingWeights")


class ActingWeights(PolicyState):
    """Serves as the part of `FlowPolicy` that keeps the weights it acts with.

    :ivar average: the weights' moving average, if `ema_decay` is set
    :ivar reference: what guidance starts from, unless `cfg_reference` is "null"
    """

    # Whether training leaves the prefix unchanged, so that one computed earlier may be used again.
    frozen_prefix = False
    ema_decay: float | None
    _cfg_reference: CfgReference
    average: WeightAverage | None
    reference: ReferenceWeights | None

    def copy_weights(self) -> None:
        """Make the average and the reference of the weights that train now, where there are any.

        A subclass calls this at the end of its constructor.
        """
        if self.ema_decay is not None:
            self.average = WeightAverage(self, self.ema_decay)
        self.cfg_reference = self._cfg_reference

    @property
    def cfg_reference(self) -> CfgReference:
        """Return whose ∅ branch guidance starts from; setting "null" forgets the reference."""
        return self._cfg_reference

    @cfg_reference.setter
    def cfg_reference(self, value: CfgReference) -> None:
        check_choice("cfg_reference", value, CfgReference)
        self._cfg_reference = value
        if value == "null":
            self.reference = None
        elif self.reference is None:
            self.reference = ReferenceWeights(self)

    def before_update(self) -> None:
        """Take the reference, if it is the policy as it acts now; to be called before each update,
        which may be any number of optimizer steps."""
        reference = self.reference
        if reference is not None and (self.cfg_reference == "previous" or not reference.held):
            with self.acting():
                reference.take()

    def after_optimizer_step(self) -> None:
        """Update the average; to be called after each optimizer step, in training mode."""
        if self.average is not None:
            self.average.update()

    def set_training_mode(self, mode: bool) -> None:
        """Switch between training and acting, which affects layers such as dropout, and whether the
        policy has the optimizer's weights or their average."""
        super().set_training_mode(mode)
        if self.average is not None:
            self.average.set_in_use(not mode)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Switch to the mode for acting inside the block; see `set_training_mode`."""
        training = self.training
        if training:
            self.set_training_mode(False)
        try:
            yield
        finally:
            if training:
                self.set_training_mode(True)

    def reference_shares_prefix(self) -> bool:
        """Return whether guidance's reference has the prefix that the policy itself has."""
        reference = self.reference
        if reference is None or not reference.held:
            return True
        return self.frozen_prefix and not reference.holds_frozen

    def copy_to_train(self: SelfWeights, *, bare: bool = False) -> SelfWeights:
        """Copy the policy and its optimizer for an update beside acting.

        The weights that don't train are shared.

        :param bare: leave out optimizer, average and reference
        """
        shared: dict[int, Any] = {id(p): p for p in self.parameters() if not p.requires_grad}
        if bare:
            shared |= {id(each): None for each in (self.optimizer, self.average, self.reference)}
        return copy.deepcopy(self, shared)

    def take_weights(self, weights: Iterable[tuple[str, Tensor]], reference: bool) -> None:
        """Take these values, one after the other, for tensors of the state that acting has.

        :param weights: by their names in the state dict
        :param reference: some are of a reference, which may not be held yet
        """
        self.set_training_mode(False)
        if self.average is not None:
            self.average.begin()
        if reference and self.reference is not None:
            self.reference.take()
        own = self.state_dict()
        with torch.no_grad():
            for name, value in weights:
                own[name].copy_(value)

    def take_over(self, trained: "ActingWeights") -> None:
        """Take weights and optimizer state of a copy that was trained; `cfg_scale` stays."""
        cfg_scale = self.cfg_scale
        trained.set_training_mode(False)
        self.set_training_mode(False)
        self.load_state_dict(trained.state_dict())
        self.optimizer.load_state_dict(trained.optimizer.state_dict())
        self.cfg_scale = cfg_scale
