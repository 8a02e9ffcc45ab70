"""What CFGRL is compared with: the same collection, windows, optimizer and budget, another lesson.

All controls train and act unconditionally: every window is ∅, and they collect and are evaluated at
cfg_scale 0, where the policy is v_∅ alone. Two of them are here a second time, with every window as
o = 1: they learn the same with the branch v_1, so that they can be guided against the start.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nft_loss import NftWindows, Velocity, nft_loss, optimality_probabilities
from torch import Tensor
from torch.func import functional_call

from cfgrl_gym.algorithms import CFGRL, rloo_advantages
from cfgrl_gym.algorithms.collector import Episode
from cfgrl_gym.algorithms.flow import NULL, POSITIVE, interpolate
from cfgrl_gym.algorithms.windows import WindowBatch

RESAMPLE = 1_000_003  # purpose of random numbers, beside those of `CFGRL`


def of_each_window(groups: list[list[Episode]], values: Sequence[Any]) -> np.ndarray:
    """Repeat the values of episodes, (K,) for each group, for each of their windows.

    Windows come group by group, episode by episode, and one to a chunk.
    """
    chunks = [[len(episode.chunks) for episode in group] for group in groups]
    return np.concatenate([np.repeat(v, n) for v, n in zip(values, chunks, strict=True)])


class FilteredBC(CFGRL):
    """Filtered behaviour cloning: flow matching on the successful episodes alone.

    Their windows are repeated until there are as many as of all episodes, as evenly as that goes,
    so that the control makes as many optimizer steps as CFGRL and draws as many samples.
    """

    LABEL = NULL

    def label(self, groups: list[list[Episode]]) -> WindowBatch | None:
        successes = [[e for e in episodes if e.succeeded] for episodes in groups]
        windows = super().label([episodes for episodes in successes if episodes])
        if windows is None:
            return None
        windows.labels.fill_(self.LABEL)
        # One to a chunk, as in the other controls.
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
    LABEL = NULL

    def label(self, groups: list[list[Episode]]) -> WindowBatch | None:
        windows = super().label(groups)
        if windows is None:
            return None
        returns = [[e.total_reward for e in group] for group in groups]
        advantages = of_each_window(groups, rloo_advantages(returns))
        weights = np.exp(np.minimum(advantages / self.BETA, np.log(self.MAX_WEIGHT)))
        rng = self.randomness.rng(RESAMPLE, self.iteration)
        drawn = rng.choice(len(windows), len(windows) * self.n_epochs, p=weights / weights.sum())
        chosen = windows[torch.from_numpy(drawn)]
        chosen.labels.fill_(self.LABEL)
        return chosen

    def train(self) -> None:
        """Make one pass, since `label` drew the windows of all epochs."""
        epochs, self.n_epochs = self.n_epochs, 1
        super().train()
        self.n_epochs = epochs


class FilteredBCAsCondition(FilteredBC):
    """Filtered behaviour cloning of v_1."""

    LABEL = POSITIVE


class AdvantageWeightedAsCondition(AdvantageWeighted):
    """Advantage-weighted regression of v_1."""

    LABEL = POSITIVE


class DiffusionNFT(CFGRL):
    """Negative-aware fine-tuning (Zheng et al. 2025, arXiv 2509.16117), without a critic.

    Every window has the probability r that its episode is optimal, from the advantage in its group,
    and the loss is `nft_loss`: failures push v_θ away from v_old as successes draw it nearer.
    The policy that collected is v_old, kept fixed during an update. The authors' soft update,
    v_old ← η v_old + (1 - η) v_θ with η = min(0.001 i, 0.5) after step i, begins with η = 0, where
    a training of a few iterations stays; a policy with `ema_decay` collects with an average, which
    is such an update too. Their penalty of 10⁻⁴ on the distance to the first policy is left out.

    `BETA` is what decides whether it learns. With v_old exact, the minimiser is
    v_old + E[(2r - 1) (v - v_old)] / β, where `CLIP` makes |2r - 1| about a fifth of a normalised
    advantage: of binary rewards, β = 1 goes an eighth of the way from v_old to filtered behaviour
    cloning if 30% succeed, a fifth if 50% do, and β = 0.1 ten times as far.
    """

    BETA = 0.1  # the authors' config/nft.py, sd3_ocr and sd3_multi_reward; 1 elsewhere there
    CLIP = 5.0  # of normalised advantages: config/base.py, adv_clip_max
    ADAPTIVE = True  # the loss is weighted as in scripts/train_nft_sd3.py

    def label(self, groups: list[list[Episode]]) -> WindowBatch | None:
        windows = super().label(groups)
        if windows is None:
            return None
        windows.labels.fill_(NULL)
        returns = np.array([[e.total_reward for e in group] for group in groups])
        r = of_each_window(groups, optimality_probabilities(returns, self.CLIP))
        return NftWindows.of(windows, torch.from_numpy(r).float())

    def train(self) -> None:
        """Update the policy, with the weights that acted until now as v_old."""
        assert self.windows is not None
        # Joined by the replay, the windows of several iterations have lost it.
        optimality = torch.cat([batch.optimality for batch in self.replay.batches])  # type: ignore[attr-defined]
        self.windows = NftWindows.of(self.windows, optimality)
        self.policy.set_training_mode(False)
        self._old = {
            f"policy.{name}": parameter.detach().clone()
            for name, parameter in self.policy.named_parameters()
            if parameter.requires_grad
        }
        super().train()
        del self._old  # or it would be saved with the model

    def window_losses(self, batch: WindowBatch, t: Tensor, noise: Tensor) -> Tensor:
        assert isinstance(batch, NftWindows)
        policy = self.policy
        prefix = self._prefixes.recall(batch.observations, batch.prefix_keys, batch.labels)
        inputs = policy.encode_observation(batch.observations, skip_prefix=prefix is not None)
        _, *tensors = batch.samples
        actions, is_pad, labels, r, t, noise = (
            tensor.to(policy.device) for tensor in (*tensors, batch.optimality, t, noise)
        )
        arguments = (inputs, interpolate(actions, noise, t), t, labels, prefix)
        with policy.autocast():
            v = policy.velocity(*arguments)
            with torch.no_grad():
                v_old = functional_call(Velocity(policy), self._old, arguments)
        # Steps that were never executed and padding of the action's width don't count.
        counted = (~is_pad)[..., None].expand(*is_pad.shape, policy.action_dim)
        velocities = (each[..., : policy.action_dim] for each in (v, v_old, noise - actions))
        loss = nft_loss(*velocities, r, counted, self.BETA, t if self.ADAPTIVE else None)
        # The authors' scale, which counts where gradients are clipped: for small steps, the
        # gradient of flow matching times the normalised advantage.
        return loss * self.CLIP / self.BETA
