"""Cuts episodes into labelled windows, each one sample of the flow-matching loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from cfgrl_gym.algorithms.collector import Chunk, Episode, Row, stack
from cfgrl_gym.algorithms.distributed.ranks import ALONE, Ranks
from cfgrl_gym.algorithms.flow import NULL
from cfgrl_gym.algorithms.labels import Labelling, group_advantages, label_advantages
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.value import ValueData, ValueSource

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
    groups: Tensor  # int64 (batch,), the index of each window's group in its iteration
    value_data: ValueData | None = None  # what they were labelled by, if by values

    @property
    def samples(self) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Return the first four fields, in the order of `FlowPolicy.flow_matching_loss`."""
        return self.observations, self.model_actions, self.action_is_pad, self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> "WindowBatch":
        """Return the samples at these indices, int64 (n,), without their value data."""
        rows = indices.numpy()
        return WindowBatch(
            {key: value[rows] for key, value in self.observations.items()}
            if isinstance(self.observations, dict)
            else self.observations[rows],
            self.model_actions[indices],
            self.action_is_pad[indices],
            self.labels[indices],
            self.prefix_keys[indices],
            self.groups[indices],
        )


def batch_windows(
    windows: list[Window],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    value_data: ValueData | None = None,
) -> WindowBatch:
    """Stack windows, their labels and group indices into a batch, in their order."""
    return WindowBatch(
        stack([window.observation for window in windows]),
        torch.from_numpy(np.stack([window.model_actions for window in windows])),
        torch.from_numpy(np.stack([window.action_is_pad for window in windows])),
        torch.from_numpy(labels),
        torch.tensor([window.prefix_key for window in windows]),
        torch.from_numpy(groups),
        value_data,
    )


def join_windows(batches: Sequence[WindowBatch]) -> WindowBatch:
    """Join the windows of several batches, in their order."""
    if len(batches) == 1:
        return batches[0]
    observations = [batch.observations for batch in batches]
    data = [batch.value_data for batch in batches if batch.value_data is not None]
    return WindowBatch(
        {key: np.concatenate([o[key] for o in observations]) for key in observations[0]}
        if isinstance(observations[0], dict)
        else np.concatenate(observations),
        torch.cat([batch.model_actions for batch in batches]),
        torch.cat([batch.action_is_pad for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.prefix_keys for batch in batches]),
        torch.cat([batch.groups for batch in batches]),
        {key: torch.cat([each[key] for each in data]) for key in data[0]}
        if len(data) == len(batches)
        else None,
    )


def blank_windows(policy: FlowPolicy, count: int) -> WindowBatch:
    """Make so many windows of zeros, labelled ∅: none for a rank of several that has none, one
    where a rank has to compute with others but has nothing to compute."""

    def blank(space: spaces.Space) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: blank(sub) for key, sub in space.items()}
        return np.zeros((count, *(space.shape or ())), space.dtype)

    null = torch.full((count,), NULL)
    keys = torch.full((count,), torch.iinfo(torch.int64).min)  # no other window's
    actions = torch.zeros(count, policy.horizon, policy.action_width)
    is_pad = torch.zeros(count, policy.horizon, dtype=torch.bool)
    groups = torch.zeros(count, dtype=torch.int64)
    return WindowBatch(blank(policy.observation_space), actions, is_pad, null, keys, groups)


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

    def of_all(self, ranks: Ranks, iterations: int) -> list[WindowBatch]:
        """Return the windows of this many iterations, those of all ranks in one rank's order."""
        joined = [join_windows(ranks.gather(batch)) for batch in self.last(iterations)]
        if ranks.size == 1:
            return joined
        return [batch[batch.groups.argsort(stable=True)] for batch in joined]

    def put(self, ranks: Ranks, batches: Sequence[WindowBatch]) -> None:
        """Keep this rank's part of what `of_all` returned, on whatever number of ranks."""
        if ranks.size > 1:
            batches = [batch[ranks.has(batch.groups).nonzero()[:, 0]] for batch in batches]
        self.batches = list(batches)

    @property
    def places(self) -> Tensor:
        """Return a number for each window that orders iterations and groups, int64 (n,)."""
        return torch.cat([(i << 32) + batch.groups for i, batch in enumerate(self.batches)])


def label_windows(
    groups: Sequence[Sequence[Episode]],
    policy: FlowPolicy,
    stride: int,
    labelling: Labelling,
    reach: int | None = None,
    value_source: ValueSource | None = None,
    ranks: Ranks = ALONE,
) -> WindowBatch | None:
    """Cut and label the windows of these groups, group by group; None if there is no group.

    :param groups: the K finished episodes of each group
    :param stride: control steps between windows, see `cut_windows`
    :param reach: only the windows that begin before this control step. None: all
    :param value_source: gives the advantages, if they are from values
    :param ranks: that have the other groups of the iteration; with an optimal share, all call this
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
    cut = [[windows_of(episode) for episode in episodes] for episodes in groups]
    every = [window for of_group in cut for of_episode in of_group for window in of_episode]
    if not every:
        if labelling.optimal_share is not None:
            ranks.gather((np.empty(0), np.empty(0, np.int64)))
        return None
    reached = np.array([reach is None or window.start < reach for window in every])
    sizes = [sum(map(len, of_group)) for of_group in cut]
    tasks = np.repeat([episodes[0].start.task_id or 0 for episodes in groups], sizes)
    indices = np.repeat([episodes[0].group for episodes in groups], sizes)
    value_data = None
    if value_source is None:
        of_groups = [
            group_advantages(
                [episode.rewards for episode in episodes],
                [_starts(of_episode, reach) for of_episode in of_group],
                [episode.succeeded for episode in episodes],
                policy.horizon,
                labelling,
            )
            for episodes, of_group in zip(groups, cut, strict=True)
        ]
        advantages = np.concatenate(of_groups)
    else:
        starts = [_starts(of_episode) for of_group in cut for of_episode in of_group]
        features = value_source.features(
            [window.observation for window in every], [window.prefix_key for window in every]
        )
        of_every, data = value_source.evaluate(groups, starts, features)
        advantages = of_every[reached]
        value_data = {name: tensor[torch.from_numpy(reached)] for name, tensor in data.items()}
    everywhere = None
    if labelling.optimal_share is not None:
        parts = ranks.gather((advantages, tasks[reached]))
        everywhere = np.concatenate([a for a, _ in parts]), np.concatenate([t for _, t in parts])
    labels = label_advantages(advantages, tasks[reached], labelling, everywhere)
    return batch_windows(list(compress(every, reached)), labels, indices[reached], value_data)


def _starts(windows: Sequence[Window], reach: int | None = None) -> NDArray[np.int64]:
    """Return the control steps at which these windows begin, those before `reach`."""
    return np.array([w.start for w in windows if reach is None or w.start < reach])


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
