"""Cutting episodes into windows: what one sample of the flow-matching loss is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfgrl_gym.algorithms.collector import Chunk, Episode, Row, stack
from cfgrl_gym.algorithms.memory.prefix_cache import KeptPrefix

# Batched observations and environment actions (n, H, action_dim) to model space (n, H, width).
Encode = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Window:
    """H action steps that follow an observation.

    Steps that were never executed are padding. They hold what was sampled where there is such a
    sample, else the last executed action again: the network sees them, the loss does not.
    """

    observation: Row
    start: int  # control step of the episode
    model_actions: NDArray[np.float32]  # (horizon, action_width)
    action_is_pad: NDArray[np.bool_]  # (horizon,)
    prefix: KeptPrefix = field(default_factory=KeptPrefix)  # of the observation


@dataclass(frozen=True)
class WindowBatch:
    """Windows with their labels, on the CPU."""

    observations: Any  # (batch, ...) array or dictionary of arrays
    model_actions: Tensor  # float32 (batch, horizon, action_width)
    action_is_pad: Tensor  # bool (batch, horizon)
    labels: Tensor  # int64 (batch,)
    prefixes: list[KeptPrefix]

    def __len__(self) -> int:
        return len(self.labels)

    def forget_prefixes(self) -> None:
        """Free what was kept, whoever still refers to these windows."""
        for prefix in self.prefixes:
            prefix.clear()

    def __getitem__(self, indices: Tensor) -> "WindowBatch":
        """The samples at these indices, int64 (n,)."""
        rows = indices.numpy()
        observations = (
            {key: value[rows] for key, value in self.observations.items()}
            if isinstance(self.observations, dict)
            else self.observations[rows]
        )
        return WindowBatch(
            observations,
            self.model_actions[indices],
            self.action_is_pad[indices],
            self.labels[indices],
            [self.prefixes[row] for row in rows],
        )


def batch_windows(windows: list[Window], labels: NDArray[np.int64]) -> WindowBatch:
    """Stack windows, in their order."""
    return WindowBatch(
        stack([window.observation for window in windows]),
        torch.from_numpy(np.stack([window.model_actions for window in windows])),
        torch.from_numpy(np.stack([window.action_is_pad for window in windows])),
        torch.from_numpy(labels),
        [window.prefix for window in windows],
    )


def join_windows(batches: Sequence[WindowBatch]) -> WindowBatch:
    """All the windows of several batches, in their order."""
    if len(batches) == 1:
        return batches[0]
    observations = [batch.observations for batch in batches]
    return WindowBatch(
        {key: np.concatenate([o[key] for o in observations]) for key in observations[0]}
        if isinstance(observations[0], dict)
        else np.concatenate(observations),
        torch.cat([batch.model_actions for batch in batches]),
        torch.cat([batch.action_is_pad for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        [prefix for batch in batches for prefix in batch.prefixes],
    )


def cut_windows(
    episode: Episode, *, horizon: int, chunk_size: int, stride: int, encode: Encode
) -> list[Window]:
    """The windows of an episode, in order of time.

    One at every chunk's start (every `stride / chunk_size`-th where the stride is longer than a
    chunk) and, with a shorter stride, one at each of its multiples inside a chunk. At a chunk's
    start the chunk's targets are the model-space actions that were sampled; all other targets
    are the executed environment actions, encoded with the window's own observation.

    :raises ValueError: where a window needs an observation inside a chunk that was not given
    """
    executed = np.concatenate([chunk.actions for chunk in episode.chunks])  # (T, action_dim)
    every = max(1, stride // chunk_size)
    rows: list[Row] = []
    starts: list[int] = []
    prefixes: list[KeptPrefix] = []
    sampled: list[NDArray[np.float32]] = []  # (horizon, action_width)
    sampled_steps: list[int] = []  # how many of them were executed
    begin = 0
    for index, chunk in enumerate(episode.chunks):
        n_steps = len(chunk.rewards)
        for offset in range(0, n_steps, stride) if index % every == 0 else ():
            rows.append(chunk.observation if offset == 0 else _inside(chunk, offset, stride))
            starts.append(begin + offset)
            prefixes.append(chunk.prefix if offset == 0 else KeptPrefix())
            sampled.append(chunk.model_actions)
            sampled_steps.append(n_steps if offset == 0 else 0)
        begin += n_steps

    steps = np.array(starts)[:, None] + np.arange(horizon)  # (n, horizon)
    is_pad = steps >= len(executed)
    at_chunk_start = np.array(sampled_steps)[:, None]  # (n, 1)
    keep = (np.arange(horizon) < at_chunk_start) | (is_pad & (at_chunk_start > 0))
    targets = np.stack(sampled)  # (n, horizon, action_width)
    encoded = np.flatnonzero(~keep.all(1))
    if len(encoded):
        actions = executed[np.minimum(steps[encoded], len(executed) - 1)]
        observations = stack([rows[i] for i in encoded])
        model_actions = encode(observations, torch.from_numpy(actions)).float().cpu().numpy()
        targets[encoded] = np.where(keep[encoded][..., None], targets[encoded], model_actions)
    return [Window(*parts) for parts in zip(rows, starts, targets, is_pad, prefixes, strict=True)]


def _inside(chunk: Chunk, offset: int, stride: int) -> Row:
    if offset not in chunk.observations:
        raise ValueError(
            f"window_stride={stride} needs the observation {offset} control steps into a chunk, "
            f"but the environment gave those at {sorted(chunk.observations)}; make it with "
            f"observation_stride={stride}"
        )
    return chunk.observations[offset]
