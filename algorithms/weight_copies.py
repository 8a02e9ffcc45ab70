"""Keeps copies of a policy's parameters, which are saved, loaded and moved with it."""

import torch
from torch import Tensor, nn


class WeightCopies(nn.Module):
    """Holds copies of some of a policy's parameters as buffers.

    :param policy: the policy, with all of its parameters
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._parameters_of_policy = dict(policy.named_parameters())
        self._buffer_of = {name: name.replace(".", "/") for name in self._parameters_of_policy}

    @property
    def trained(self) -> list[str]:
        """Return the names of the policy's parameters that train."""
        return [name for name, p in self._parameters_of_policy.items() if p.requires_grad]

    @property
    def copied(self) -> list[str]:
        """Return the names of the parameters of which there are copies."""
        return [name for name, buffer in self._buffer_of.items() if buffer in self._buffers]

    def pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters of which there are copies, each with its copy."""
        pairs = []
        for name in self.copied:
            copy = self._buffers[self._buffer_of[name]]
            assert copy is not None
            pairs.append((self._parameters_of_policy[name], copy))
        return pairs

    @torch.no_grad()
    def copy(self, name: str) -> None:
        """Make the copy of this parameter, or give the one that exists the parameter's value."""
        parameter, buffer = self._parameters_of_policy[name], self._buffer_of[name]
        if buffer in self._buffers:
            self.get_buffer(buffer).copy_(parameter)
        else:
            self.register_buffer(buffer, parameter.detach().clone())
