"""Warm-starts a policy by flow matching on demonstrations, as o = 1 with condition dropout."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from cfgrl_gym.algorithms.flow import POSITIVE
from cfgrl_gym.algorithms.labels import drop_condition
from cfgrl_gym.algorithms.memory.device import available_host_bytes
from cfgrl_gym.algorithms.memory.micro_batches import MicroBatches
from cfgrl_gym.algorithms.memory.prefix_cache import PrefixCache
from cfgrl_gym.algorithms.pi0.policy import Pi0Policy
from cfgrl_gym.algorithms.windows import WindowBatch
from cfgrl_gym.demos.files import Demonstration
from cfgrl_gym.wrappers.libero_observation import rotate_image
from cfgrl_gym.wrappers.norm_stats import NormStats
from cfgrl_gym.wrappers.prompt import encode_prompt
from cfgrl_gym.wrappers.transforms import resize_with_pad, to_delta

# PI0's names of the cameras, and a demonstration's images.
_IMAGES = {"base_0_rgb": "agentview_rgb", "left_wrist_0_rgb": "eye_in_hand_rgb"}


@dataclass(frozen=True)
class WarmStartConfig:
    """Holds the settings with which a policy is fitted to demonstrations.

    :param steps: optimizer steps
    :param batch_size: windows in each step
    :param learning_rate: peak learning rate, reached after the first 5% of the steps; it then falls
        to a tenth
    :param window_stride: control steps between the windows that are cut from a demonstration; only
        steps whose images were rendered are used
    :param dropout_prob: share of the samples whose condition is dropped, so that ∅ is learned too
    :param max_grad_norm: gradients are clipped to this norm
    :param seed: seed of the batches, the noise and the dropout
    """

    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 1e-3
    window_stride: int = 1
    dropout_prob: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0


def demonstration_stats(
    demonstrations: Sequence[Demonstration], *, horizon: int, delta: bool, std_floor: float
) -> NormStats:
    """Compute normalisation statistics of demonstrations, with actions as the model sees them.

    As in openpi (`scripts/compute_norm_stats.py`), the actions are those of all windows, one of
    which starts at every step; steps beyond the end of a demonstration don't count.

    :param horizon: steps of a window
    :param delta: actions are relative to the window's first state in the first 6 dimensions
    :param std_floor: smallest standard deviation, so that a dimension that hardly varies in the
        demonstrations doesn't become huge when normalised elsewhere
    """
    states = np.concatenate([demo.state for demo in demonstrations])
    actions = []
    for demo in demonstrations:
        length = len(demo.actions)
        steps = np.arange(length)[:, None] + np.arange(horizon)  # (T, horizon)
        windows = demo.actions[np.minimum(steps, length - 1)]
        actions.append((to_delta(windows, demo.state) if delta else windows)[steps < length])
    return NormStats.compute(states, np.concatenate(actions), std_floor=std_floor)


def demonstration_windows(
    policy: Pi0Policy, demonstrations: Sequence[Demonstration], stride: int
) -> WindowBatch:
    """Cut windows of `policy.horizon` steps, labelled o = 1, with images in the model's size.

    :raises ValueError: a camera that the policy looks at was not recorded
    """
    size = policy.image_size
    for slot, images in _IMAGES.items():
        black = [not getattr(demo, images).any() for demo in demonstrations]
        if slot in policy.cameras and any(black):
            raise ValueError(
                f"the images {images} of a demonstration are black, and the policy looks at them; "
                "record them (`cfgrl demos --cameras`), or leave them out (`cfgrl sft --cameras`)"
            )
    parts: dict[str, list[np.ndarray]] = {}
    actions, pads = [], []
    for demo in demonstrations:
        starts = np.flatnonzero(demo.images_rendered)
        starts = starts[starts % stride == 0] if stride > 1 else starts
        steps = starts[:, None] + np.arange(policy.horizon)  # (n, horizon)
        pads.append(steps >= len(demo.actions))
        actions.append(demo.actions[np.minimum(steps, len(demo.actions) - 1)])
        prompt = encode_prompt(demo.prompt)
        for slot, images in _IMAGES.items():
            drawn = np.stack([rotate_image(image) for image in getattr(demo, images)[starts]])
            if drawn.shape[1:3] != (size, size):
                drawn = resize_with_pad(drawn, size, size)
            parts.setdefault(slot, []).append(drawn)
        parts.setdefault("state", []).append(demo.state[starts])
        parts.setdefault("prompt", []).append(np.tile(prompt, (len(starts), 1)))
    observations = {key: np.concatenate(values) for key, values in parts.items()}
    raw_state = torch.from_numpy(observations["state"]).to(policy.device)
    env_actions = torch.from_numpy(np.concatenate(actions)).float()
    model_actions = policy.encode_actions({"raw_state": raw_state}, env_actions).cpu()
    count = len(model_actions)
    return WindowBatch(
        observations,
        model_actions,
        torch.from_numpy(np.concatenate(pads)),
        torch.full((count,), POSITIVE, dtype=torch.int64),
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
    )


def warm_start(
    policy: Pi0Policy,
    demonstrations: Sequence[Demonstration],
    config: WarmStartConfig,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Fit the policy to demonstrations and return the loss of every step.

    :param on_step: called with (steps done, loss)
    :raises ValueError: no demonstrations, or none with images of a camera that the policy looks at
    """
    if not demonstrations:
        raise ValueError("no demonstrations were given; `cfgrl demos` makes some")
    windows = demonstration_windows(policy, demonstrations, config.window_stride)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = policy.optimizer
    prefixes = PrefixCache(policy, 0, available_host_bytes() // 2)
    micro_batches = MicroBatches(config.batch_size)

    def loss_of(batch: WindowBatch, t: Tensor, noise: Tensor) -> Tensor:
        prefix = prefixes.recall(batch.observations, batch.prefix_keys, batch.labels)
        return policy.flow_matching_loss(*batch.samples, t, noise, prefix)

    policy.set_training_mode(True)
    order = torch.empty(0, dtype=torch.int64)
    losses = []
    for step in range(config.steps):
        if len(order) < config.batch_size:
            order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
        indices, order = order[: config.batch_size], order[config.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        batch = windows[indices]
        labels = drop_condition(batch.labels, config.dropout_prob, generator)
        dropped = replace(batch, labels=labels)
        t, noise = policy.draw_flow(len(batch), generator)
        loss = micro_batches.backward(
            optimizer, loss_of, dropped, t, noise, batch_size=len(dropped)
        ).mean()
        clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        policy.after_optimizer_step()
        losses.append(loss.item())
        on_step(step + 1, losses[-1])
    policy.set_training_mode(False)
    return losses


def _schedule(step: int, steps: int) -> float:
    """Return the learning rate's factor: linear over the first 5%, then a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
