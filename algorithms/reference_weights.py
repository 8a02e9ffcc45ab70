"""Keeps the weights of guidance's reference: a policy from before, whose ∅ branch is guided."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cfgrl_gym.algorithms.weight_copies import WeightCopies


class ReferenceWeights(WeightCopies):
    """Holds the reference's values of the parameters that train; all others are shared.

    Until `take` or `put` the reference is the policy itself, and nothing is held. What is held is
    saved and loaded with the policy; a state without a reference makes the policy its own.

    :ivar in_use: the policy has the reference's weights, inside a `with in_place()`
    """

    in_use = False

    @property
    def held(self) -> bool:
        """Return whether there are weights, so that the reference is not the policy itself."""
        return bool(self._buffers)

    @property
    def holds_frozen(self) -> bool:
        """Return whether the reference differs in parameters that don't train, too."""
        return any(not parameter.requires_grad for parameter, _ in self.pairs())

    @property
    def size(self) -> int:
        """Return the bytes of the weights on the policy's device, also before they are taken."""
        return sum(self._parameters_of_policy[name].nbytes for name in self._names())

    def take(self) -> None:
        """Take the weights that the policy has now."""
        for name in self._names():
            self.copy(name)

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self.trained, *self.copied]))

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Take these weights, by the names of parameters, and the policy's own of all others.

        Of parameters that don't train only those are held in which the reference differs.
        """
        self.take()
        for name, value in weights.items():
            own = self._parameters_of_policy[name]
            value = value.to(own)
            if own.requires_grad or not torch.equal(value, own):
                self.copy(name)
                self.get_buffer(self._buffer_of[name]).copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the policy the reference's weights inside the block, without copying any.

        Parameters and copies exchange their memory. The policy has its own back afterwards, at the
        addresses where optimizers and CUDA graphs know it.
        """
        pairs = self.pairs()
        self._exchange_memory(pairs)
        self.in_use = True
        try:
            yield
        finally:
            self.in_use = False
            self._exchange_memory(pairs)

    @staticmethod
    def _exchange_memory(pairs: list[tuple[Any, Tensor]]) -> None:
        for parameter, copy in pairs:
            parameter.data, copy.data = copy.data, parameter.data
        torch.clear_autocast_cache()  # it has the parameters' casts, by parameter and not by value

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        saved = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        for name in self.copied:
            delattr(self, self._buffer_of[name])
        for name, parameter in self._parameters_of_policy.items():
            if saved and (parameter.requires_grad or self._buffer_of[name] in saved):
                self.copy(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
