"""What CFGRL is compared with: the same collection, windows, optimizer and budget, another lesson.

Both controls train and act unconditionally: every window is ∅, and they collect and are evaluated
at cfg_scale 0, where the policy is v_∅ alone.
"""

import numpy as np
import torch

from cfgrl_gym.algorithms import CFGRL, rloo_advantages
from cfgrl_gym.algorithms.collector import Episode
from cfgrl_gym.algorithms.flow import NULL
from cfgrl_gym.algorithms.windows import WindowBatch

RESAMPLE = 1_000_003  # purpose of random numbers, beside those of `CFGRL`


class FilteredBC(CFGRL):
    """Filtered behaviour cloning: flow matching on the successful episodes alone.

    Their windows are repeated until there are as many as of all episodes, as evenly as that goes,
    so that the control makes as many optimizer steps as CFGRL and draws as many samples.
    """

    def label(self, groups: list[list[Episode]]) -> WindowBatch | None:
        successes = [[e for e in episodes if e.succeeded] for episodes in groups]
        windows = super().label([episodes for episodes in successes if episodes])
        if windows is None:
            return None
        windows.labels.fill_(NULL)
        # One to a chunk, as in `AdvantageWeighted`.
        of_all = sum(len(episode.chunks) for episodes in groups for episode in episodes)
        return windows[torch.arange(of_all) % len(windows)]


class AdvantageWeighted(CFGRL):
    """Advantage-weighted regression of the flow-matching loss (Peng et al. 2019, eq. 7).

    The weight of a window is exp(A / β), at most `MAX_WEIGHT`. Instead of being multiplied by it,
    windows are drawn with a probability in proportion to it, which has the same expected gradient
    and needs no other loss: as many draws as windows for each epoch.
    """

    BETA = 0.3
    MAX_WEIGHT = 20.0  # Peng et al. 2019, appendix

    def label(self, groups: list[list[Episode]]) -> WindowBatch | None:
        windows = super().label(groups)
        if windows is None:
            return None
        # Windows come group by group, episode by episode, and one to a chunk.
        advantages = np.concatenate(
            [
                np.repeat(advantage, len(episode.chunks))
                for group in groups
                for episode, advantage in zip(
                    group, rloo_advantages([[e.total_reward for e in group]])[0], strict=True
                )
            ]
        )
        weights = np.minimum(np.exp(advantages / self.BETA), self.MAX_WEIGHT)
        rng = self.randomness.rng(RESAMPLE, self.iteration)
        drawn = rng.choice(len(windows), len(windows) * self.n_epochs, p=weights / weights.sum())
        chosen = windows[torch.from_numpy(drawn)]
        chosen.labels.fill_(NULL)
        return chosen

    def train(self) -> None:
        """Make one pass, since `label` drew the windows of all epochs."""
        epochs, self.n_epochs = self.n_epochs, 1
        super().train()
        self.n_epochs = epochs
