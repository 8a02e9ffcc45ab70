"""From finished episodes to labelled windows, and from those to losses."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfgrl_gym.algorithms.collector import Episode
from cfgrl_gym.algorithms.labels import LabelSource, Negatives, label_group
from cfgrl_gym.algorithms.memory.prefix_cache import PrefixMemory
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.windows import Window, WindowBatch, batch_windows, cut_windows


def labelled_windows(
    groups: Sequence[Sequence[Episode]],
    policy: FlowPolicy,
    *,
    stride: int,
    source: LabelSource,
    threshold: float,
    negatives: Negatives,
) -> WindowBatch | None:
    """The windows of these groups with their labels, group by group; None without any group.

    :param groups: the K finished episodes of each
    :param stride: control steps between windows, see `cut_windows`
    :param source: and `threshold`, `negatives`: see `label_group`
    """

    @torch.no_grad()
    def encode(observations: Any, actions: torch.Tensor) -> torch.Tensor:
        return policy.encode_actions(
            policy.encode_observation(observations, skip_prefix=True), actions
        )

    windows: list[Window] = []
    labels: list[NDArray[np.int64]] = []
    for episodes in groups:
        cut = [
            cut_windows(
                episode,
                horizon=policy.horizon,
                chunk_size=policy.chunk_size,
                stride=stride,
                encode=encode,
            )
            for episode in episodes
        ]
        labels += label_group(
            [episode.rewards for episode in episodes],
            [np.array([window.start for window in of_episode]) for of_episode in cut],
            [episode.succeeded for episode in episodes],
            source=source,
            horizon=policy.horizon,
            threshold=threshold,
            negatives=negatives,
        )
        windows += [window for of_episode in cut for window in of_episode]
    return batch_windows(windows, np.concatenate(labels)) if windows else None


def window_losses(
    policy: FlowPolicy,
    prefixes: PrefixMemory,
    windows: WindowBatch,
    labels: Tensor,
    t: Tensor,
    noise: Tensor,
    part: Tensor,
) -> Tensor:
    """Flow-matching losses of some of these windows, (n,).

    :param labels: int64 (batch,), condition dropout already applied
    :param t: and `noise`: of all the windows, see `FlowPolicy.draw_flow`
    :param part: which of the windows, int64 (n,)
    """
    chosen = windows[part]
    return policy.flow_matching_loss(
        chosen.observations,
        chosen.model_actions,
        chosen.action_is_pad,
        labels[part],
        t[part],
        noise[part],
        prefixes.recall(chosen.observations, chosen.prefixes),
    )
