"""Estimates values by a head on the policy's frozen features, for `label_source="value"`.

The advantages are RECAP's, see `labels.value_advantages`. V is a regression of discounted returns
to go (Physical Intelligence 2025, "π*0.6: a VLA that learns from experience"), fitted afresh in
every iteration, so that nothing of it has to be saved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfgrl_gym.algorithms.collector import Episode, Row, stack
from cfgrl_gym.algorithms.flow import NULL
from cfgrl_gym.algorithms.labels import (
    FloatArray,
    IntArray,
    is_uniform,
    returns_to_go,
    value_advantages,
)
from cfgrl_gym.algorithms.memory.prefix_cache import PrefixCache

HIDDEN, EPOCHS, BATCH_SIZE, LEARNING_RATE = 256, 40, 256, 1e-3
# Of a feature: a spread that is rounding, and the largest standardised value, as heads extrapolate.
TINY, LARGEST = 1e-6, 5.0

# Of each window: "features" float32 (n, width), "returns" to go and held-out "values" float32 (n,).
ValueData = dict[str, Tensor]


def fit(features: Tensor, returns: Tensor, generator: torch.Generator) -> Callable[..., Tensor]:
    """Fit an MLP to returns (n,) by least squares; returns a function features -> values (n,).

    :param features: standardised, float32 (n, width)
    """
    width = features.shape[1]
    mean, spread = returns.mean(), returns.std(correction=0)
    targets = (returns - mean) / (spread + TINY)
    inner = torch.randn(width, HIDDEN, generator=generator) / width**0.5
    # Zeros are the biases and the output's weights, with which V begins as the mean return.
    weights = [w.requires_grad_() for w in (inner, torch.zeros(HIDDEN), torch.zeros(HIDDEN))]

    def head(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x @ weights[0] + weights[1]) @ weights[2]

    optimizer = torch.optim.Adam(weights, LEARNING_RATE)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(targets), generator=generator).split(BATCH_SIZE):
            optimizer.zero_grad()
            (head(features[batch]) - targets[batch]).square().mean().backward()
            optimizer.step()
    return lambda x: mean + spread * head(x).detach()


@dataclass(frozen=True)
class ValueSource:
    """Gives the windows of an iteration their advantages.

    :param prefixes: those kept while acting, with their policy
    :param batch_size: observations per pass of the policy
    :param gamma: discount of a reward for each control step before it
    :param generator: of the heads' first weights and the order of samples
    :param earlier: of other windows, which V is fitted to as well
    """

    prefixes: PrefixCache
    batch_size: int
    gamma: float
    generator: torch.Generator
    earlier: Sequence[ValueData] = ()

    @torch.no_grad()
    def features(self, rows: Sequence[Row], keys: Sequence[int]) -> Tensor:
        """Compute the policy's features of observations, float32 (n, width), on the CPU."""
        policy, parts = self.prefixes.policy, []
        for i in range(0, len(rows), self.batch_size):
            batch: Any = stack(list(rows[i : i + self.batch_size]))
            of_batch = keys[i : i + self.batch_size]
            prefix = self.prefixes.recall(batch, of_batch, torch.full((len(of_batch),), NULL))
            inputs = policy.encode_observation(batch, skip_prefix=True)
            parts.append(policy.value_features(inputs, prefix).float().cpu())
        return torch.cat(parts)

    def evaluate(
        self, groups: Sequence[Sequence[Episode]], starts: list[IntArray], features: Tensor
    ) -> tuple[FloatArray, ValueData]:
        """Compute the advantages of all windows of these groups, episode after episode, (n,).

        Where the K returns of a group are equal, nothing in it tells a step forward from an error
        of V: there, a window of a failure whose advantage isn't above V's own held-out error gets
        -∞. What is left are steps that clearly lead to where others succeed.

        :param starts: control steps at which each episode's windows begin
        """
        episodes = [episode for group in groups for episode in group]
        to_go = [returns_to_go(episode.rewards, self.gamma) for episode in episodes]
        returns = np.concatenate([g[s] for g, s in zip(to_go, starts, strict=True)])
        lengths = [len(s) for s in starts]
        data = {"features": features, "returns": torch.from_numpy(returns).float()}
        data["values"] = self._held_out(data, torch.from_numpy(_folds(groups).repeat(lengths)))
        error = (data["values"] - data["returns"]).square().mean().sqrt().item()

        chunk_size = self.prefixes.policy.chunk_size
        values = np.split(data["values"].double().numpy(), np.cumsum(lengths)[:-1])
        parts = zip(to_go, values, starts, strict=True)
        advantages = np.concatenate([value_advantages(*p, chunk_size, self.gamma) for p in parts])
        doubtful = []
        for group in groups:
            own = [episode.discounted_return(self.gamma) for episode in group]
            uniform = is_uniform(np.array(own))
            doubtful += [uniform and not episode.succeeded for episode in group]
        advantages[np.repeat(doubtful, lengths) & (advantages <= error)] = -np.inf
        return advantages, data

    def _held_out(self, data: ValueData, folds: Tensor) -> Tensor:
        """Return the values of each half's windows from a head fitted to the other half, (n,)."""
        # A head that was fitted to an episode repeats its outcome as its values, and nothing is
        # left of its advantages. The rest of its group gives the outcome away as well, because
        # groups are kept for being mixed; windows of earlier iterations don't.
        features = torch.cat([data["features"], *(each["features"] for each in self.earlier)])
        returns = torch.cat([data["returns"], *(each["returns"] for each in self.earlier)])
        spread = features.std(0, correction=0) + TINY
        features = ((features - features.mean(0)) / spread).clamp(-LARGEST, LARGEST)
        values = torch.zeros(len(folds))
        for fold in (0, 1):
            own = (folds == fold).nonzero()[:, 0]
            others = torch.ones(len(returns), dtype=torch.bool).index_fill(0, own, False)
            if len(own) and others.any():
                head = fit(features[others], returns[others], self.generator)
                values[own] = head(features[own])
        return values


def _folds(groups: Sequence[Sequence[Episode]]) -> IntArray:
    """Return 0 or 1 for each episode: halves of each task's groups, or of a group that is alone."""
    if len(groups) == 1:
        return np.arange(len(groups[0])) % 2
    by_task = np.argsort([group[0].start.task_id or 0 for group in groups], kind="stable")
    folds = np.empty(len(groups), np.int64)
    folds[by_task] = np.arange(len(groups)) % 2
    return folds.repeat([len(group) for group in groups])
