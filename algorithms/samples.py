"""From finished episodes to the labelled windows that an update learns from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cfgrl_gym.algorithms.collector import Episode
from cfgrl_gym.algorithms.labels import LabelSource, Negatives, label_group
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
