"""Defines what CFGRL asks of a policy: a conditional velocity field over action chunks.

`FlowPolicy` is an SB3 `BasePolicy`. It implements sampling, guidance and the flow-matching loss;
a subclass implements the network (`velocity`), the prefix that is computed once for all denoising
steps (`encode_prefix`), and the maps between the environment's and the model's spaces.
"""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from cfgrl_gym.algorithms.acting_weights import ActingWeights
from cfgrl_gym.algorithms.flow import (
    NULL,
    POSITIVE,
    NonFiniteError,
    euler,
    guide,
    interpolate,
    masked_mse,
    sample_noise,
    sample_time,
)
from cfgrl_gym.algorithms.guidance import (
    BRANCHES,
    CfgReference,
    Guidance,
    check_choice,
    default_cfg_scale,
    needed_branches,
)
from cfgrl_gym.envs.arguments import LONGEST, check_int, is_finite

Observation = np.ndarray | dict[str, np.ndarray] | Tensor | dict[str, Tensor]
Inputs = dict[str, Tensor]
Prefixes = dict[int, Any]  # by label: what `encode_prefix` gave where all rows have that label
PrefixRow = dict[str, Tensor]  # what `encode_prefix` gave for one sample, batch size 1
DETERMINISTIC_SEED = 0  # predict(deterministic=True) starts every chunk from this seed's noise


class Acted(NamedTuple):
    """Holds what a policy sampled: model_actions (batch, horizon, action_width), actions (batch,
    chunk, action_dim) within the action space, and the prefixes they were sampled from."""

    model_actions: Tensor
    actions: Tensor
    prefixes: Prefixes


class UpdatePlan(NamedTuple):
    """Says how an update fits the device: batch_size, windows per forward pass; needed, its bytes
    (None: not known); room, bytes left there for keeping prefixes."""

    batch_size: int
    needed: int | None
    room: int


class FlowPolicy(ActingWeights):
    """Serves as the base class of the policies that CFGRL trains.

    :param horizon: H, action steps that the model predicts
    :param action_width: width of a model-space action (padded)
    :param cfg_scale: w, the guidance scale; `policy.cfg_scale` may be changed at any time. None:
        the environment variable PI0_CFG_SCALE, or 1.0 if it is not set
    :param num_inference_steps: Euler steps of the sampler, 1 to 10,000
    :param guidance: "velocity" guides every denoising step; "action" combines two finished chunks
    :param ema_decay: act with an exponential moving average of the trained weights that decays by
        this factor each optimizer step; None: act with the weights themselves
    :param cfg_reference: whose ∅ branch guidance starts from, v = v_ref,∅ + w·(v_1 - v_ref,∅), so
        that w = 0 acts as the reference. "null": the policy itself; "start": the policy as it was
        before its first update; "previous": as it acted before its last update
    """

    default_learning_rate = 3e-4  # of `CFGRL`, where none is given
    has_value_features = False  # whether `value_features` is implemented

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
        guidance: Guidance = "velocity",
        ema_decay: float | None = None,
        cfg_reference: CfgReference = "null",
        **kwargs: Any,
    ) -> None:
        if ema_decay is not None and not (is_finite(ema_decay) and 0 <= ema_decay < 1):
            raise ValueError(
                f"ema_decay must be in [0, 1), or None for no average; got {ema_decay!r:.100}"
            )
        if cfg_scale is not None and not is_finite(cfg_scale):
            raise ValueError(f"cfg_scale must be a finite number or None; got {cfg_scale!r:.100}")
        check_choice("guidance", guidance, Guidance)
        check_choice("cfg_reference", cfg_reference, CfgReference)
        super().__init__(observation_space, action_space, **kwargs)
        self.lr_schedule = lr_schedule
        # An action Box is (action_dim,) for single steps or (chunk, action_dim) for chunks.
        self.chunk_size = action_space.shape[0] if len(action_space.shape) == 2 else 1
        self.action_dim = action_space.shape[-1]
        self.horizon = horizon
        self.action_width = action_width
        self.cfg_scale = default_cfg_scale() if cfg_scale is None else float(cfg_scale)
        self.num_inference_steps = check_int("num_inference_steps", num_inference_steps, 1, LONGEST)
        self.guidance = guidance
        self.ema_decay = ema_decay
        self._cfg_reference = cfg_reference
        self.average = self.reference = None  # until `copy_weights`
        if self.chunk_size > horizon:
            raise ValueError(
                f"the environment takes chunks of {self.chunk_size} actions but the model predicts "
                f"{horizon}; make the environment with chunk_size <= {horizon}"
            )

    # What a subclass implements ---------------------------------------------------------------

    @abstractmethod
    def encode_observation(self, obs: Observation, *, skip_prefix: bool = False) -> Inputs:
        """Convert an observation, batched as the environment gives it, to inputs (batch first).

        :param skip_prefix: leave out the inputs that only `encode_prefix` reads
        """

    @abstractmethod
    def velocity(
        self, inputs: Inputs, x_t: Tensor, t: Tensor, labels: Tensor, prefix: Any = None
    ) -> Tensor:
        """Compute the conditional velocity, (batch, horizon, action_width).

        :param labels: int64 (batch,): NULL (-1), 0 or 1
        :param prefix: what `encode_prefix` returned for these inputs and labels; None computes it
            here
        """

    @abstractmethod
    def encode_actions(self, inputs: Inputs, actions: Tensor) -> Tensor:
        """Convert actions (batch, H, action_dim) to model space (batch, H, action_width)."""

    @abstractmethod
    def decode_actions(self, inputs: Inputs, model_actions: Tensor) -> Tensor:
        """Invert `encode_actions`, giving (batch, H, action_dim) not clipped to the Box."""

    def encode_prefix(self, inputs: Inputs, labels: Tensor) -> Any:
        """Compute the prefix that all denoising steps share, or return None.

        :param labels: int64 (batch,); each row's prefix is that of its label
        """
        return None

    def prefix_label(self, label: int) -> int:
        """Return the label that stands for all labels with this label's prefix.

        Where the condition is not in the prefix, all have the same.
        """
        return NULL

    def encode_prefixes(self, inputs: Inputs, branches: tuple[int, ...]) -> Prefixes:
        """Compute the prefix of all rows under each of these labels, each distinct one once."""
        batch = next(iter(inputs.values())).shape[0]
        distinct = dict.fromkeys(self.prefix_label(label) for label in branches)
        prefixes = {own: self.encode_prefix(inputs, self._labels(batch, own)) for own in distinct}
        return {label: prefixes[self.prefix_label(label)] for label in branches}

    def split_prefix(self, prefix: Any) -> list[PrefixRow]:
        """Split a prefix into its samples, to be kept; only called if `frozen_prefix` is true."""
        raise NotImplementedError

    def join_prefix(self, rows: Sequence[PrefixRow]) -> Any:
        """Join the samples that `split_prefix` made into one prefix."""
        raise NotImplementedError

    def value_features(self, inputs: Inputs, prefix: Any) -> Tensor:
        """Compute what a value head sees of observations, (batch, width): `label_source="value"`.

        Training must leave it unchanged. It is only called if `has_value_features` is true.

        :param inputs: from `encode_observation(..., skip_prefix=True)`
        :param prefix: of the same observations if `frozen_prefix` is true, else None
        """
        raise NotImplementedError

    def velocities(
        self,
        inputs: Inputs,
        x_t: Tensor,
        t: Tensor,
        branches: tuple[int, ...],
        prefixes: Prefixes,
    ) -> tuple[Tensor, ...]:
        """Compute the velocity of all rows under each of these labels."""
        return tuple(
            self.velocity(inputs, x_t, t, self._labels(x_t.shape[0], label), prefixes[label])
            for label in branches
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context with the precision of acting and of the loss; here the weights' own."""
        return nullcontext()

    # Sampling ---------------------------------------------------------------------------------

    def _labels(self, batch: int, is_positive: int | Tensor) -> Tensor:
        if isinstance(is_positive, Tensor):
            return is_positive.to(self.device, torch.int64)
        return torch.full((batch,), is_positive, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def predict_velocity(
        self, obs: Observation, x_t: Tensor, t: Tensor, is_positive: int | Tensor | None = None
    ) -> Tensor:
        """Compute the model-space velocity of one branch, with the policy's own weights.

        :param obs: batched observation as the environment gives it
        :param x_t: (batch, horizon, action_width)
        :param t: (batch,)
        :param is_positive: None for ∅, 0, 1, or int (batch,) with -1 for ∅
        """
        inputs = self.encode_observation(obs)
        x_t, t = x_t.to(self.device), t.to(self.device)
        with self.acting(), self.autocast():
            if isinstance(is_positive, Tensor):
                labels = self._labels(x_t.shape[0], is_positive)
                prefix = self.encode_prefix(inputs, labels)
                return self.velocity(inputs, x_t, t, labels, prefix).float()
            branch = (NULL if is_positive is None else int(is_positive),)
            prefixes = self.encode_prefixes(inputs, branch)
            return self.velocities(inputs, x_t, t, branch, prefixes)[0].float()

    def _null_prefixes(self, inputs: Inputs, prefixes: Prefixes) -> Prefixes:
        """Return the prefix of guidance's ∅ branch: the reference's own, where it differs."""
        if self.reference_shares_prefix():
            return prefixes
        assert self.reference is not None
        with self.reference.in_place():
            return self.encode_prefixes(inputs, (NULL,))

    def _guidance_velocities(
        self,
        inputs: Inputs,
        x_t: Tensor,
        t: Tensor,
        branches: tuple[int, ...],
        prefixes: Prefixes,
        null_prefixes: Prefixes,
    ) -> tuple[Tensor, ...]:
        """Compute the velocities of guidance's branches, of which ∅ is the reference's."""
        if NULL not in branches or self.reference is None or not self.reference.held:
            return self.velocities(inputs, x_t, t, branches, prefixes)
        with self.reference.in_place():
            (v_null,) = self.velocities(inputs, x_t, t, (NULL,), null_prefixes)
        return tuple(
            v_null if label == NULL else self.velocities(inputs, x_t, t, (label,), prefixes)[0]
            for label in branches
        )

    def _sample(
        self, inputs: Inputs, prefixes: Prefixes, noise: Tensor, cfg_scale: float
    ) -> Tensor:
        """Integrate the guided flow from `noise` and return model-space actions.

        :param prefixes: of the branches that are needed for `cfg_scale`
        """
        null_prefixes = self._null_prefixes(inputs, prefixes) if NULL in prefixes else {}

        def integrate(branches: tuple[int, ...]) -> Tensor:
            def field(x: Tensor, t: Tensor) -> Tensor:
                velocities = self._guidance_velocities(
                    inputs, x, t, branches, prefixes, null_prefixes
                )
                if len(branches) == 1:
                    return velocities[0]
                return guide(velocities[0], velocities[1], cfg_scale)

            return euler(field, noise, self.num_inference_steps)

        branches = tuple(prefixes)
        if branches == BRANCHES and self.guidance == "action":
            return guide(integrate((NULL,)), integrate((POSITIVE,)), cfg_scale)
        return integrate(branches)

    @torch.no_grad()
    def act(
        self,
        obs: Observation,
        *,
        noise: Tensor | None = None,
        cfg_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Acted:
        """Sample a chunk of actions for each observation.

        :param obs: batched observation as the environment gives it
        :param noise: (batch, horizon, action_width); None draws it from `generator`
        :param cfg_scale: w; None: the policy's own
        :raises NonFiniteError: an observation or the weights aren't finite
        """
        inputs = self.encode_observation(obs)
        batch = next(iter(inputs.values())).shape[0]
        if noise is None:
            shape = (batch, self.horizon, self.action_width)
            noise = sample_noise(shape, generator, self.device)
        w = self.cfg_scale if cfg_scale is None else float(cfg_scale)
        with self.acting(), self.autocast():
            prefixes = self.encode_prefixes(inputs, needed_branches(w))
            model_actions = self._sample(inputs, prefixes, noise.to(self.device), w).float()
        if not model_actions.isfinite().all():
            raise NonFiniteError(_why_not_finite(inputs))
        actions = self.decode_actions(inputs, model_actions)[:, : self.chunk_size]
        space = cast(spaces.Box, self.action_space)
        low, high = (
            torch.as_tensor(bound, device=self.device).reshape(self.chunk_size, self.action_dim)
            for bound in (space.low, space.high)
        )
        return Acted(model_actions, actions.clamp(low, high), prefixes)

    def sample_actions(
        self, obs: Observation, noise: Tensor | None = None, cfg_scale: float | None = None
    ) -> Tensor:
        """Sample environment-space actions (batch, chunk, action_dim) for a batched observation."""
        return self.act(obs, noise=noise, cfg_scale=cfg_scale).actions

    @torch.no_grad()
    def guidance_gap(
        self,
        obs: Observation,
        model_actions: Tensor,
        t: Tensor,
        noise: Tensor,
        prefixes: Prefixes | None = None,
    ) -> Tensor:
        """Compute how far the branches differ: the root mean square of v_1 - v_∅ at x_t, (batch,).

        v_∅ is the reference's (`cfg_reference`), as in guidance.

        :param model_actions: (batch, horizon, action_width)
        :param t: and `noise`: see `draw_flow`
        :param prefixes: these observations' under each branch, if they are known
        """
        known = prefixes is not None and self.reference_shares_prefix()
        inputs = self.encode_observation(obs, skip_prefix=known)
        with self.acting(), self.autocast():
            if prefixes is None:
                prefixes = self.encode_prefixes(inputs, BRANCHES)
            x_t, t = interpolate(model_actions, noise, t).to(self.device), t.to(self.device)
            v_null, v_positive = self._guidance_velocities(
                inputs, x_t, t, BRANCHES, prefixes, self._null_prefixes(inputs, prefixes)
            )
        difference = (v_positive - v_null)[..., : self.action_dim].float()
        return difference.square().mean((-1, -2)).sqrt()

    # Training ---------------------------------------------------------------------------------

    def draw_flow(self, batch: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw training times (batch,) and noise (batch, horizon, action_width), float32."""
        source = self.device if generator is None else generator.device
        t = sample_time(batch, generator, source)
        return t, sample_noise((batch, self.horizon, self.action_width), generator, source)

    def flow_matching_loss(
        self,
        obs: Observation,
        model_actions: Tensor,
        is_pad: Tensor,
        labels: Tensor,
        t: Tensor,
        noise: Tensor,
        prefix: Any = None,
    ) -> Tensor:
        """Compute the unweighted flow-matching loss of each sample, (batch,) float32, in one pass.

        :param model_actions: (batch, horizon, action_width)
        :param is_pad: bool (batch, horizon)
        :param labels: int64 (batch,), after condition dropout
        :param t: and `noise`: see `draw_flow`
        :param prefix: the prefix of these observations under these labels, if it is known
        """
        inputs = self.encode_observation(obs, skip_prefix=prefix is not None)
        actions, is_pad, labels, t, noise = (
            tensor.to(self.device) for tensor in (model_actions, is_pad, labels, t, noise)
        )
        with self.autocast():
            v = self.velocity(inputs, interpolate(actions, noise, t), t, labels, prefix)
        return masked_mse(v.float(), noise - actions, is_pad, self.action_dim)

    def fsdp_units(self) -> list[nn.Module]:
        """Return modules whose weights FSDP gathers only while they are called, each apart.

        All other weights that train are gathered for the whole of `flow_matching_loss`.
        """
        return []

    def plan_update(self, batch_size: int, free: int) -> UpdatePlan:
        """Plan how an update fits the device; this base class makes no estimate.

        :param batch_size: requested windows per forward pass
        :param free: bytes for weights, gradients, optimizer and everything else
        :raises MemoryError: not even one window fits
        """
        return UpdatePlan(batch_size, needed=None, room=0)

    # SB3 --------------------------------------------------------------------------------------

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "lr_schedule": self._dummy_schedule,  # as SB3's policies do: schedules may not pickle
            "cfg_scale": self.cfg_scale,
            "num_inference_steps": self.num_inference_steps,
            "guidance": self.guidance,
            "ema_decay": self.ema_decay,
            "cfg_reference": self.cfg_reference,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        noise = None
        if deterministic:
            generator = torch.Generator().manual_seed(DETERMINISTIC_SEED)
            one = sample_noise((1, self.horizon, self.action_width), generator, self.device)
            parts = observation.values() if isinstance(observation, dict) else [observation]
            noise = one.expand(next(iter(parts)).shape[0], -1, -1)
        return self.act(observation, noise=noise).actions


def _why_not_finite(inputs: Inputs) -> str:
    floats = [name for name, value in inputs.items() if value.is_floating_point()]
    bad = [name for name in floats if not inputs[name].isfinite().all()]
    if bad:
        return f"the observation has NaN or infinity (in the policy's {', '.join(bad)})"
    return (
        "the policy gave actions that aren't finite, from an observation that is: its weights "
        "aren't; go back to an earlier checkpoint"
    )
