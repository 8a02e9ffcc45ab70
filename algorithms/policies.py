"""What CFGRL asks of a policy: a conditional velocity field over action chunks.

`FlowPolicy` is an SB3 `BasePolicy`. It owns sampling, guidance and the flow-matching loss;
a subclass brings the network (`velocity`), what can be computed once for all denoising steps
(`encode_prefix`), and the maps between the environment's and the model's spaces.
"""

import os
from abc import abstractmethod
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from cfgrl_gym.algorithms.flow import (
    NEGATIVE,
    NULL,
    POSITIVE,
    euler,
    guide,
    interpolate,
    masked_mse,
    sample_noise,
    sample_time,
)

Observation = np.ndarray | dict[str, np.ndarray] | Tensor | dict[str, Tensor]
Inputs = dict[str, Tensor]
CFG_SCALE_VARIABLE = "PI0_CFG_SCALE"
DETERMINISTIC_SEED = 0  # predict(deterministic=True) starts every chunk from this one noise


def default_cfg_scale() -> float:
    """1.0, or what the environment variable PI0_CFG_SCALE says."""
    text = os.environ.get(CFG_SCALE_VARIABLE, "1.0")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"PI0_CFG_SCALE must be a number such as 1.5; it is {text!r}") from None


def forced_label() -> int | None:
    """The branch that PI0_IS_POSITIVE ∈ {0, 1, none} forces; None when the variable is not set."""
    text = os.environ.get("PI0_IS_POSITIVE")
    if text is None:
        return None
    labels = {"0": NEGATIVE, "1": POSITIVE, "none": NULL}
    if text.lower() not in labels:
        raise ValueError(f"PI0_IS_POSITIVE must be 0, 1 or none; it is {text!r}")
    return labels[text.lower()]


class FlowPolicy(BasePolicy):
    """Base of the policies that CFGRL trains.

    :param horizon: H, action steps that the model predicts
    :param action_width: width of a model-space action (padded)
    :param cfg_scale: w; may be changed at any time. None: `default_cfg_scale()`
    :param num_inference_steps: Euler steps of the sampler
    :param guidance: "velocity" guides every denoising step; "action" combines two finished chunks
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        horizon: int,
        action_width: int,
        cfg_scale: float | None = None,
        num_inference_steps: int = 10,
        guidance: str = "velocity",
        **kwargs: Any,
    ) -> None:
        if guidance not in ("velocity", "action"):
            raise ValueError(f"guidance must be 'velocity' or 'action'; got {guidance!r}")
        super().__init__(observation_space, action_space, **kwargs)
        self.lr_schedule = lr_schedule
        # An action Box is (action_dim,) for single steps or (chunk, action_dim) for chunks.
        self.chunk_size = action_space.shape[0] if len(action_space.shape) == 2 else 1
        self.action_dim = action_space.shape[-1]
        self.horizon = horizon
        self.action_width = action_width
        self.cfg_scale = default_cfg_scale() if cfg_scale is None else float(cfg_scale)
        self.num_inference_steps = num_inference_steps
        self.guidance = guidance
        if self.chunk_size > horizon:
            raise ValueError(
                f"the environment takes chunks of {self.chunk_size} actions but the model predicts "
                f"{horizon}; make the environment with chunk_size <= {horizon}"
            )

    # What a subclass brings -------------------------------------------------------------------

    @abstractmethod
    def encode_observation(self, obs: Observation) -> Inputs:
        """Batched observation, as the environment gives it, to model inputs (batch first)."""

    @abstractmethod
    def velocity(
        self, inputs: Inputs, x_t: Tensor, t: Tensor, labels: Tensor, prefix: Any = None
    ) -> Tensor:
        """Conditional velocity, (batch, horizon, action_width).

        :param labels: int64 (batch,): NULL (-1), 0 or 1
        :param prefix: what `encode_prefix` gave for these inputs; None computes it here
        """

    @abstractmethod
    def encode_actions(self, inputs: Inputs, actions: Tensor) -> Tensor:
        """Environment actions (batch, H, action_dim) to model space (batch, H, action_width)."""

    @abstractmethod
    def decode_actions(self, inputs: Inputs, model_actions: Tensor) -> Tensor:
        """The inverse of `encode_actions`: (batch, H, action_dim), not clipped to the Box."""

    def encode_prefix(self, inputs: Inputs) -> Any:
        """What is shared by both branches and all denoising steps; None where nothing is."""
        return None

    # Sampling ---------------------------------------------------------------------------------

    def _labels(self, batch: int, is_positive: int | Tensor | None) -> Tensor:
        if isinstance(is_positive, Tensor):
            return is_positive.to(self.device, torch.int64)
        label = NULL if is_positive is None else int(is_positive)
        return torch.full((batch,), label, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def predict_velocity(
        self, obs: Observation, x_t: Tensor, t: Tensor, is_positive: int | Tensor | None = None
    ) -> Tensor:
        """Model-space velocity of one branch.

        :param obs: batched observation as the environment gives it
        :param x_t: (batch, horizon, action_width)
        :param t: (batch,)
        :param is_positive: None for ∅, 0, 1, or int (batch,) with -1 for ∅
        """
        labels = self._labels(x_t.shape[0], is_positive)
        inputs = self.encode_observation(obs)
        return self.velocity(inputs, x_t.to(self.device), t.to(self.device), labels)

    def _sample(self, inputs: Inputs, noise: Tensor, cfg_scale: float) -> Tensor:
        """Integrate the guided flow from `noise`; returns model-space actions."""
        prefix = self.encode_prefix(inputs)
        batch = noise.shape[0]
        branches: dict[int, Tensor] = {
            label: self._labels(batch, label) for label in (NULL, POSITIVE, NEGATIVE)
        }

        def branch(label: int) -> Any:
            return lambda x, t: self.velocity(inputs, x, t, branches[label], prefix)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            return guide(branch(NULL)(x, t), branch(POSITIVE)(x, t), cfg_scale)

        # w = 1 is the v_1 branch and w = 0 the v_∅ branch: one pass instead of two.
        forced = forced_label()
        single = forced if forced is not None else {1.0: POSITIVE, 0.0: NULL}.get(cfg_scale)
        if single is not None:
            return euler(branch(single), noise, self.num_inference_steps)
        if self.guidance == "action":
            finished = [
                euler(branch(label), noise, self.num_inference_steps) for label in (NULL, POSITIVE)
            ]
            return guide(finished[0], finished[1], cfg_scale)
        return euler(guided, noise, self.num_inference_steps)

    @torch.no_grad()
    def act(
        self,
        obs: Observation,
        *,
        noise: Tensor | None = None,
        cfg_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample chunks: model-space (batch, horizon, width), environment (batch, chunk, dim).

        Environment-space actions are clipped to the action space.
        """
        inputs = self.encode_observation(obs)
        batch = next(iter(inputs.values())).shape[0]
        if noise is None:
            shape = (batch, self.horizon, self.action_width)
            noise = sample_noise(shape, generator, self.device)
        w = self.cfg_scale if cfg_scale is None else float(cfg_scale)
        model_actions = self._sample(inputs, noise.to(self.device), w)
        actions = self.decode_actions(inputs, model_actions)[:, : self.chunk_size]
        space = cast(spaces.Box, self.action_space)
        low, high = (
            torch.as_tensor(bound, device=self.device).reshape(self.chunk_size, self.action_dim)
            for bound in (space.low, space.high)
        )
        return model_actions, actions.clamp(low, high)

    def sample_actions(
        self, obs: Observation, noise: Tensor | None = None, cfg_scale: float | None = None
    ) -> Tensor:
        """Environment-space actions (batch, chunk, action_dim) for a batched observation."""
        return self.act(obs, noise=noise, cfg_scale=cfg_scale)[1]

    def guidance_gap(self, obs: Observation, model_actions: Tensor, generator: Any) -> Tensor:
        """Root mean square of v_1 - v_∅ for each sample, (batch,): how far the branches differ."""
        with torch.no_grad():
            inputs = self.encode_observation(obs)
            batch = model_actions.shape[0]
            noise = sample_noise(tuple(model_actions.shape), generator, self.device)
            t = sample_time(batch, generator, self.device)
            x_t = interpolate(model_actions.to(self.device), noise, t)
            prefix = self.encode_prefix(inputs)
            v_null = self.velocity(inputs, x_t, t, self._labels(batch, NULL), prefix)
            v_positive = self.velocity(inputs, x_t, t, self._labels(batch, POSITIVE), prefix)
            difference = (v_positive - v_null)[..., : self.action_dim]
            return difference.square().mean((-1, -2)).sqrt()

    # Training ---------------------------------------------------------------------------------

    def flow_matching_loss(
        self,
        obs: Observation,
        model_actions: Tensor,
        is_pad: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Flow-matching loss of each sample, (batch,): one forward pass, no weights.

        :param model_actions: (batch, horizon, action_width)
        :param is_pad: bool (batch, horizon)
        :param labels: int64 (batch,), condition dropout already applied
        """
        inputs = self.encode_observation(obs)
        actions = model_actions.to(self.device)
        t = sample_time(actions.shape[0], generator, self.device)
        noise = sample_noise(tuple(actions.shape), generator, self.device)
        v = self.velocity(inputs, interpolate(actions, noise, t), t, labels.to(self.device))
        return masked_mse(v, noise - actions, is_pad.to(self.device), self.action_dim)

    # SB3 --------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """`cfg_scale`, which is saved with the weights."""
        return torch.tensor(self.cfg_scale, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore `cfg_scale`, unless PI0_CFG_SCALE says otherwise."""
        if CFG_SCALE_VARIABLE not in os.environ:
            self.cfg_scale = float(state)

    def constructor_arguments(self) -> dict[str, Any]:
        """What rebuilds this policy, beside spaces and learning rate, without any file."""
        arguments = self._get_constructor_parameters()
        for name in ("observation_space", "action_space", "lr_schedule"):
            arguments.pop(name, None)
        return arguments

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        noise = None
        if deterministic:
            generator = torch.Generator().manual_seed(DETERMINISTIC_SEED)
            one = sample_noise((1, self.horizon, self.action_width), generator, self.device)
            parts = observation.values() if isinstance(observation, dict) else [observation]
            noise = one.expand(next(iter(parts)).shape[0], -1, -1)
        return self.act(observation, noise=noise)[1]
