"""The loss of DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117) and what it needs of windows."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.windows import WindowBatch

STD_FLOOR = 1e-4  # flow_grpo/stat_tracking.py of the authors' code
LEAST_ERROR = 1e-5  # scripts/train_nft_sd3.py


@dataclass(frozen=True)
class NftWindows(WindowBatch):
    """Holds windows with the probability that each is optimal."""

    optimality: Tensor = field(kw_only=True)  # float32 (batch,), in [0, 1]

    @classmethod
    def of(cls, windows: WindowBatch, optimality: Tensor) -> "NftWindows":
        """Add the probabilities, (batch,), to windows."""
        return cls(*windows.samples, windows.prefix_keys, windows.groups, optimality=optimality)

    def __getitem__(self, indices: Tensor) -> "NftWindows":
        return self.of(super().__getitem__(indices), self.optimality[indices])


class Velocity(nn.Module):
    """Makes a policy's `velocity` the call of a module, which `functional_call` needs."""

    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *arguments: Any) -> Tensor:
        return self.policy.velocity(*arguments)


def optimality_probabilities(returns: NDArray[np.float64], clip: float) -> NDArray[np.float64]:
    """Compute r = ½ + ½ clip((R - mean of the group) / Z, -1, 1) of returns (groups, K).

    As in the authors' code, Z is `clip` times the standard deviation of all returns together.
    """
    advantages = (returns - returns.mean(1, keepdims=True)) / (returns.std() + STD_FLOOR)
    return 0.5 + 0.5 * np.clip(advantages / clip, -1, 1)


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    target: Tensor,
    optimality: Tensor,
    counted: Tensor,
    beta: float,
    t: Tensor | None = None,
) -> Tensor:
    """Compute r |v⁺ - v|² + (1 - r) |v⁻ - v|² of each sample, (batch,): the paper's Theorem 3.2.

    v⁺ = (1 - β) v_old + β v_θ and v⁻ = (1 + β) v_old - β v_θ are the implicit positive and negative
    velocities. Its minimiser is v_θ = v_old + (2r - 1) (v - v_old) / β.

    :param v: v_θ, (batch, horizon, action_dim)
    :param v_old: of the policy that collected, and `target`: noise - actions; of the same shape
    :param optimality: r, (batch,)
    :param counted: bool, of the same shape as v: what errors are averaged over
    :param t: (batch,). If given, each square is divided by the mean error of its sample, without a
        gradient, both of the clean action x_t - t v that the velocity predicts (the paper's
        adaptive weighting); that error is t times the velocity's
    """
    count = counted.sum((1, 2)).clamp(min=1)

    def term(velocity: Tensor) -> Tensor:
        error = (velocity.float() - target) * counted
        square = error.square().sum((1, 2)) / count
        if t is None:
            return square
        mean = error.detach().abs().sum((1, 2)) / count
        return t * square / mean.clamp(min=LEAST_ERROR)

    positive = term((1 - beta) * v_old + beta * v)
    negative = term((1 + beta) * v_old - beta * v)
    return optimality * positive + (1 - optimality) * negative
