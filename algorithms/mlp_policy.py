"""Implements `MlpPolicy`, a small flow-matching policy for vector observations."""

import math
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from cfgrl_gym.algorithms.flow import NULL
from cfgrl_gym.algorithms.policies import FlowPolicy, Inputs, Observation
from cfgrl_gym.envs.arguments import is_int

# Periods of the time features, log-spaced as openpi's posemb_sincos has them.
MIN_PERIOD, MAX_PERIOD, NUM_PERIODS = 4e-3, 4.0, 16
CONDITION_STD = 0.02  # of the initial condition embedding: small, but not zero
# Batches are filled up to a multiple of so many rows. In fewer, how a row is rounded can depend on
# its place (seen with AVX-512: in products with one to three columns, and in the last numbers of
# SiLU), and then what an episode does on the environment that runs it.
ROWS = 32


class MlpPolicy(FlowPolicy):
    """Predicts velocities with a multi-layer perceptron over [observation, noisy chunk, time].

    The horizon is the chunk of the action space; actions are scaled from the Box to [-1, 1].
    o = 1 (and o = 0) add a learned vector to the first hidden layer; ∅ adds nothing.

    :param observation_space: a Box of numbers; observations are flattened, but not normalised
    :param action_space: a Box (action_dim,) or (chunk, action_dim) with finite bounds
    :param lr_schedule: learning rate as a function of the progress remaining
    :param net_arch: widths of the hidden layers
    :param kwargs: of `FlowPolicy` (cfg_scale, num_inference_steps, guidance, ema_decay,
        cfg_reference) and of SB3's `BasePolicy` (optimizer_class, optimizer_kwargs)
    :raises ValueError: for image or dictionary observations
    """

    has_value_features = True
    low: Tensor
    high: Tensor
    periods: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: tuple[int, ...] | list[int] = (256, 256),
        **kwargs: Any,
    ) -> None:
        if not isinstance(observation_space, spaces.Box) or is_image_space(observation_space):
            raise ValueError(
                "MlpPolicy takes a Box of numbers as observation, not images or dictionaries; got "
                f"{observation_space}. Use 'Pi0Policy' for LIBERO, or flatten the observation "
                "with gymnasium.wrappers.FlattenObservation"
            )
        if not net_arch or not all(is_int(width) and width >= 1 for width in net_arch):
            raise ValueError(
                f"net_arch must be the widths of one or more hidden layers; got {net_arch!r:.100}"
            )
        horizon = action_space.shape[0] if len(action_space.shape) == 2 else 1
        width = action_space.shape[-1]
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            horizon=horizon,
            action_width=width,
            **kwargs,
        )
        self.net_arch = list(net_arch)
        low, high = action_space.low, action_space.high
        self.register_buffer("low", torch.as_tensor(low).reshape(horizon, width), False)
        self.register_buffer("high", torch.as_tensor(high).reshape(horizon, width), False)
        periods = np.geomspace(MIN_PERIOD, MAX_PERIOD, NUM_PERIODS)
        self.register_buffer("periods", torch.as_tensor(periods, dtype=torch.float32), False)

        obs_dim = spaces.flatdim(observation_space)
        widths = [obs_dim + horizon * width + 2 * NUM_PERIODS, *self.net_arch]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.output = nn.Linear(widths[-1], horizon * width)
        self.condition = nn.Parameter(CONDITION_STD * torch.randn(2, widths[1]))  # o = 0, o = 1
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )
        self.copy_weights()

    def encode_observation(self, obs: Observation, *, skip_prefix: bool = False) -> Inputs:
        """Convert observations (batch, ...) to {"obs": float32 (batch, obs_dim)}."""
        vector = torch.as_tensor(cast(Any, obs), dtype=torch.float32, device=self.device)
        return {"obs": vector.flatten(1)}

    def encode_actions(self, inputs: Inputs, actions: Tensor) -> Tensor:
        """Scale actions (batch, H, action_dim) from the Box to [-1, 1]."""
        return 2 * (actions.to(self.device) - self.low) / (self.high - self.low) - 1

    def decode_actions(self, inputs: Inputs, model_actions: Tensor) -> Tensor:
        """Scale actions back from [-1, 1] to the Box, without clipping."""
        return self.low + (model_actions + 1) / 2 * (self.high - self.low)

    def value_features(self, inputs: Inputs, prefix: Any) -> Tensor:
        """Return the observations themselves, (batch, obs_dim)."""
        return inputs["obs"]

    def velocity(
        self, inputs: Inputs, x_t: Tensor, t: Tensor, labels: Tensor, prefix: Any = None
    ) -> Tensor:
        """Compute the conditional velocity, (batch, horizon, action_width)."""
        angles = 2 * math.pi * t[:, None] / self.periods  # (batch, NUM_PERIODS)
        features = torch.cat([inputs["obs"], x_t.flatten(1), angles.sin(), angles.cos()], -1)
        batch = len(features)
        features = nn.functional.pad(features, (0, 0, 0, -batch % ROWS))
        labels = nn.functional.pad(labels, (0, -batch % ROWS))
        condition = self.condition[labels.clamp(min=0)]  # (batch, hidden)
        condition = torch.where((labels == NULL)[:, None], 0.0, condition)
        hidden = nn.functional.silu(self.hidden[0](features) + condition)
        for layer in self.hidden[1:]:
            hidden = nn.functional.silu(layer(hidden))
        return self.output(hidden)[:batch].unflatten(-1, (self.horizon, self.action_width))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "net_arch": self.net_arch}
