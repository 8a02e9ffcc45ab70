"""Implements flow matching and classifier-free guidance as plain functions of tensors.

The convention is openpi's (`models/pi0.py`): t = 1 is noise, t = 0 is data,
x_t = t·noise + (1 - t)·action, and the velocity to learn is noise - action.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NULL = -1  # the label of ∅: no condition
POSITIVE = 1  # o = 1: optimal
NEGATIVE = 0  # o = 0: used by the binary form only


class NonFiniteError(FloatingPointError):
    """Raised when a training or a policy gives numbers that aren't finite."""


# openpi, models/pi0.py: t ~ Beta(1.5, 1)·0.999 + 0.001
TIME_ALPHA, TIME_SCALE, TIME_OFFSET = 1.5, 0.999, 0.001


def sample_time(batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw training times t ~ Beta(1.5, 1)·0.999 + 0.001, shape (batch,), float32.

    Beta(a, 1) has the distribution function x^a, so u^(1/a) with u uniform is a draw from it.
    """
    source = device if generator is None else generator.device
    uniform = torch.rand(batch, generator=generator, device=source).to(device)
    return uniform ** (1.0 / TIME_ALPHA) * TIME_SCALE + TIME_OFFSET


def sample_noise(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Draw standard normal noise, float32, on the generator's device and move it to `device`."""
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


def interpolate(actions: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = t·noise + (1 - t)·actions, (batch, horizon, width), for times t (batch,)."""
    t = t[:, None, None]
    return t * noise + (1 - t) * actions


def guide(v_null: Tensor, v_positive: Tensor, cfg_scale: float) -> Tensor:
    """Apply classifier-free guidance to velocities: v = v_∅ + w·(v_1 - v_∅) (arXiv 2505.23458)."""
    return v_null + cfg_scale * (v_positive - v_null)


def masked_mse(prediction: Tensor, target: Tensor, is_pad: Tensor, action_dim: int) -> Tensor:
    """Compute each sample's mean squared error over executed steps and real action dimensions.

    :param prediction: (batch, horizon, width)
    :param target: (batch, horizon, width)
    :param is_pad: bool (batch, horizon), True for steps that were never executed
    :param action_dim: number of leading dimensions that are real actions; the rest is padding
    :return: (batch,)
    """
    error = (prediction - target)[..., :action_dim].square().mean(-1)  # (batch, horizon)
    executed = (~is_pad).to(error.dtype)
    return (error * executed).sum(-1) / executed.sum(-1).clamp(min=1.0)


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 (noise) to t = 0 in equal steps.

    :param velocity: (x (batch, ...), t (batch,)) -> (batch, ...)
    """
    x = noise
    for step in range(num_steps):
        t = torch.full((x.shape[0],), 1.0 - step / num_steps, device=x.device)
        x = x - velocity(x, t) / num_steps
    return x
