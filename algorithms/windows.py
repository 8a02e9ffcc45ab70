"""Cuts episodes into labelled windows, each one sample of the flow-matching loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfgrl_gym.algorithms.collector import Chunk, Episode, Row, stack
from cfgrl_gym.algorithms.labels import Labelling, group_advantages, label_advantages
from cfgrl_gym.algorithms.policies import FlowPolicy

# (batched observations, environment actions (n, H, action_dim)) -> model space (n, H, width)
Encode = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Window:
    """Holds an observation and the H action steps that follow it.

    Steps that were never executed are padding. They hold the sampled action where there is one,
    else a copy of the last executed action: the network sees them, the loss does not.
    """

    observation: Row
    start: int  # control step of the episode
    model_actions: NDArray[np.float32]  # (horizon, action_width)
    action_is_pad: NDArray[np.bool_]  # (horizon,)
    prefix_key: int  # of the observation, see `PrefixCache`


@dataclass(frozen=True)
class WindowBatch:
    """Holds windows with their labels, on the CPU."""

    observations: Any  # (batch, ...) array or dictionary of arrays
    model_actions: Tensor  # float32 (batch, horizon, action_width)
    action_is_pad: Tensor  # bool (batch, horizon)
    labels: Tensor  # int64 (batch,)
    prefix_keys: Tensor  # int64 (batch,), see `PrefixCache`

    @property
    def samples(self) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Return the first four fields, in the order of `FlowPolicy.flow_matching_loss`."""
        return self.observations, self.model_actions, self.action_is_pad, self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> "WindowBatch":
        """Return the samples at these indices, int64 (n,)."""
        rows = indices.numpy()
        return WindowBatch(
            {key: value[rows] for key, value in self.observations.items()}
            if isinstance(self.observations, dict)
            else self.observations[rows],
            self.model_actions[indices],
            self.action_is_pad[indices],
            self.labels[indices],
            self.prefix_keys[indices],
        )


def batch_windows(windows: list[Window], labels: NDArray[np.int64]) -> WindowBatch:
    """Stack windows and their labels into a batch, in their order."""
    return WindowBatch(
        stack([window.observation for window in windows]),
        torch.from_numpy(np.stack([window.model_actions for window in windows])),
        torch.from_numpy(np.stack([window.action_is_pad for window in windows])),
        torch.from_numpy(labels),
        torch.tensor([window.prefix_key for window in windows]),
    )


def join_windows(batches: Sequence[WindowBatch]) -> WindowBatch:
    """Join the windows of several batches, in their order."""
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
        torch.cat([batch.prefix_keys for batch in batches]),
    )


class Replay:
    """Keeps the windows of earlier iterations, which an update uses besides those of its own."""

    def __init__(self) -> None:
        self.batches: list[WindowBatch] = []  # of each iteration, the newest one last

    def last(self, iterations: int) -> list[WindowBatch]:
        """Return the windows of this many iterations, the newest one last."""
        return self.batches[-iterations:] if iterations else []

    def keep_last(self, iterations: int) -> None:
        """Drop all windows but those of this many latest iterations."""
        self.batches = self.last(iterations)

    def add(self, windows: WindowBatch) -> WindowBatch:
        """Add an iteration's windows and return all that are kept."""
        self.batches.append(windows)
        return join_windows(self.batches)


def label_windows(
    groups: Sequence[Sequence[Episode]],
    policy: FlowPolicy,
    stride: int,
    labelling: Labelling,
    reach: int | None = None,
) -> WindowBatch | None:
    """Cut and label the windows of these groups, group by group; None if there is no group.

    :param groups: the K finished episodes of each group
    :param stride: control steps between windows, see `cut_windows`
    :param reach: only the windows that begin before this control step. None: all
    """

    @torch.no_grad()
    def encode(observations: Any, actions: Tensor) -> Tensor:
        inputs = policy.encode_observation(observations, skip_prefix=True)
        return policy.encode_actions(inputs, actions)

    windows_of = partial(
        cut_windows,
        horizon=policy.horizon,
        chunk_size=policy.chunk_size,
        stride=stride,
        encode=encode,
    )
    windows: list[Window] = []
    advantages: list[NDArray[np.float64]] = []
    tasks: list[int] = []
    for episodes in groups:
        cut = [
            [window for window in windows_of(episode) if reach is None or window.start < reach]
            for episode in episodes
        ]
        of_group = group_advantages(
            [episode.rewards for episode in episodes],
            [np.array([window.start for window in of_episode]) for of_episode in cut],
            [episode.succeeded for episode in episodes],
            policy.horizon,
            labelling,
        )
        advantages.append(of_group)
        tasks += [episodes[0].start.task_id or 0] * len(of_group)
        windows += [window for of_episode in cut for window in of_episode]
    if not windows:
        return None
    labels = label_advantages(np.concatenate(advantages), np.array(tasks), labelling)
    return batch_windows(windows, labels)


def cut_windows(
    episode: Episode, *, horizon: int, chunk_size: int, stride: int, encode: Encode
) -> list[Window]:
    """Cut the windows of an episode, in order of time.

    A window begins at every chunk's start (at every `stride / chunk_size`-th chunk if the stride is
    longer than a chunk); with a shorter stride, also at each multiple of it inside a chunk. In a
    window at a chunk's start, that chunk's targets are the model-space actions that were sampled;
    all other targets are the executed environment actions, encoded with the window's own
    observation.

    :raises ValueError: a window needs an observation inside a chunk that wasn't returned
    """
    executed = np.concatenate([chunk.actions for chunk in episode.chunks])  # (T, action_dim)
    every = max(1, stride // chunk_size)
    rows: list[Row] = []
    starts: list[int] = []
    keys: list[int] = []
    sampled: list[NDArray[np.float32]] = []  # (horizon, action_width)
    sampled_steps: list[int] = []  # how many of them were executed
    begin = 0
    for index, chunk in enumerate(episode.chunks):
        n_steps = len(chunk.rewards)
        for offset in range(0, n_steps, stride) if index % every == 0 else ():
            rows.append(chunk.observation if offset == 0 else _inside(chunk, offset, stride))
            starts.append(begin + offset)
            keys.append(chunk.prefix_keys[offset])
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
    return [Window(*parts) for parts in zip(rows, starts, targets, is_pad, keys, strict=True)]


def _inside(chunk: Chunk, offset: int, stride: int) -> Row:
    if offset not in chunk.observations:
        raise ValueError(
            f"window_stride={stride} needs the observation {offset} control steps into a chunk, "
            f"but the environment gave those at {sorted(chunk.observations)}; make it with "
            f"observation_stride={stride}"
        )
    return chunk.observations[offset]
