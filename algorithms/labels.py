"""Computes RLOO advantages, optimality labels, and condition dropout.

All functions are pure. A group is given as lists over its K episodes: `rewards[i]` float (T_i,),
the reward of each control step, and `starts[i]` int (n_i,), the control steps at which its
windows start.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cfgrl_gym.algorithms.flow import NEGATIVE, NULL, POSITIVE

LabelSource = Literal["episode_rloo", "window_rloo", "window_return", "success", "value"]
Negatives = Literal["null", "zero"]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Labelling:
    """Holds the settings by which windows get their labels.

    :param source: how advantages are computed, see `group_advantages`, or `value.py` for "value"
    :param threshold: a window whose advantage reaches this is optimal
    :param negatives: label of the windows that are not optimal: "null" is ∅, "zero" is o = 0
    :param gamma: discount of a reward for each control step before it, see `discounted`
    :param optimal_share: largest share of a task's windows that may be optimal. None: all
    """

    source: LabelSource
    threshold: float
    negatives: Negatives
    gamma: float = 1.0
    optimal_share: float | None = None


def discounted(rewards: FloatArray, gamma: float) -> FloatArray:
    """Return γ^t·r_t for the rewards of an episode's control steps t = 0, 1, ..., (T,)."""
    return rewards * gamma ** np.arange(len(rewards))


def rloo_advantages(returns: Any) -> Any:
    """Compute leave-one-out advantages A_i = R_i - mean of the other K - 1 returns.

    RLOO: Kool et al. 2019; Ahmadian et al. 2024 (arXiv 2402.14740), section 3.3.

    :param returns: (groups, K), an array, a tensor or nested lists
    :return: (groups, K); a tensor for a tensor, else a float64 array
    :raises ValueError: for another number of dimensions or K < 2
    """
    if not isinstance(returns, torch.Tensor):
        returns = np.asarray(returns, dtype=np.float64)
    if returns.ndim != 2 or returns.shape[1] < 2:
        raise ValueError(
            "returns must be (groups, K) with K >= 2, because each episode is compared with the "
            f"others of its group; got shape {tuple(returns.shape)}"
        )
    others = returns.sum(-1)[:, None] - returns  # (groups, K)
    return returns - others / (returns.shape[1] - 1)


def window_advantages(
    rewards: list[FloatArray], starts: list[IntArray], source: LabelSource, horizon: int
) -> list[FloatArray]:
    """Compute the advantage of every window of one group, (n_i,) for each episode.

    - episode_rloo: the episode's own RLOO advantage.
    - window_rloo: reward-to-go from the window's start, minus the mean over the other episodes of
      their reward-to-go at the same control step; an episode that has ended by then counts with the
      value at its last window.
    - window_return: reward collected in [start, start + horizon), minus the mean over all windows
      of the group.
    """
    if source == "episode_rloo":
        advantages = rloo_advantages([[r.sum() for r in rewards]])[0]
        return [np.full(len(s), a) for s, a in zip(starts, advantages, strict=True)]
    if source == "window_rloo":
        to_go = [np.cumsum(r[::-1])[::-1] for r in rewards]  # (T_i,)

        def value(episode: int, steps: IntArray) -> FloatArray:
            running = steps < len(to_go[episode])
            return to_go[episode][np.where(running, steps, starts[episode][-1])]

        result = []
        for i, steps in enumerate(starts):
            # (K, n_i); each column is treated as a group of its own
            values = np.stack([value(j, steps) for j in range(len(rewards))])
            result.append(rloo_advantages(values.T)[:, i])
        return result
    collected = [
        np.array([r[s : s + horizon].sum() for s in steps])
        for r, steps in zip(rewards, starts, strict=True)
    ]
    baseline = np.concatenate(collected).mean()
    return [c - baseline for c in collected]


def returns_to_go(rewards: FloatArray, gamma: float) -> FloatArray:
    """Compute G_t = Σ_k γ^k·r_{t+k} of every control step, and 0 for the end, (T + 1,)."""
    returns = np.zeros(len(rewards) + 1)
    for t in reversed(range(len(rewards))):
        returns[t] = rewards[t] + gamma * returns[t + 1]
    return returns


def value_advantages(
    returns: FloatArray, values: FloatArray, starts: IntArray, chunk_size: int, gamma: float
) -> FloatArray:
    """Compute the advantage of each window of an episode from values, (n,).

    RECAP (Physical Intelligence 2025, "π*0.6: a VLA that learns from experience"):
    A(o_t, a_t) = Σ_{k<N} γ^k·r_{t+k} + γ^N·V(o_{t+N}) - V(o_t), where V is 0 at the episode's end.
    The window that follows is the first that begins when the chunk is over. The rewards until then
    sum to G_t - γ^N·G_{t+N}, so that A = (G_t - V(o_t)) - γ^N·(G_{t+N} - V(o_{t+N})).

    :param returns: see `returns_to_go`, (T + 1,)
    :param values: of the observations at `starts`, the control steps where windows begin, (n,)
    """
    begins = np.append(starts, len(returns) - 1)  # (n + 1,), with the episode's end
    beyond = returns[begins] - np.append(values, 0.0)  # (n + 1,)
    following = np.searchsorted(starts, starts + chunk_size)  # (n,), n for the end
    discounts = gamma ** (begins[following] - starts)
    return beyond[:-1] - discounts * beyond[following]


# Sums of rewards that would be equal in exact arithmetic differ by less than this share of them.
ROUNDING = 1e-9


def is_uniform(returns: FloatArray) -> bool:
    """Return whether a group's K returns are equal up to rounding, so that it teaches nothing."""
    return bool(np.ptp(returns) <= ROUNDING * np.abs(returns).max())


def group_advantages(
    rewards: list[FloatArray],
    starts: list[IntArray],
    successes: list[bool],
    horizon: int,
    labelling: Labelling,
) -> FloatArray:
    """Compute the advantages of one group's windows, episode after episode, float64 (n,).

    Those of the source "success" are ∞ in successes and -∞ in failures, whatever the returns; for
    the others see `window_advantages`. In a uniform group all advantages are 0, and a threshold of
    0 alone would label failures optimal: there the windows of failures get -∞. What rounding may
    have taken from an advantage is added to it.
    """
    if labelling.source == "success":
        signs = [1.0 if success else -1.0 for success in successes]
        return np.repeat(signs, [len(s) for s in starts]) * np.inf
    rewards = [discounted(r, labelling.gamma) for r in rewards]
    if is_uniform(np.array([r.sum() for r in rewards])):
        advantages = [
            np.full(len(s), 0.0 if success else -np.inf)
            for s, success in zip(starts, successes, strict=True)
        ]
    else:
        advantages = window_advantages(rewards, starts, labelling.source, horizon)
    return np.concatenate(advantages) + ROUNDING * max(np.abs(r).sum() for r in rewards)


def label_advantages(
    advantages: FloatArray,
    tasks: IntArray,
    labelling: Labelling,
    everywhere: tuple[FloatArray, IntArray] | None = None,
) -> IntArray:
    """Compute the optimality labels of windows, int64 (n,).

    A window is optimal (1) if its advantage reaches the threshold and, with an `optimal_share`, the
    quantile of its task that leaves that share (as RECAP's threshold does: Physical Intelligence
    2025, "π*0.6", where 30 to 40% are positive). Otherwise it gets ∅ (-1), or 0 with
    `negatives="zero"`.

    :param advantages: float64 (n,)
    :param tasks: int64 (n,), the task of each
    :param everywhere: advantages and tasks of all windows of the iteration, if these are only some
    """
    thresholds = np.full(len(advantages), labelling.threshold)
    if labelling.optimal_share is not None:
        all_advantages, all_tasks = everywhere or (advantages, tasks)
        for task in np.unique(tasks):
            highest = np.sort(all_advantages[all_tasks == task])[::-1]
            last = max(1, round(labelling.optimal_share * len(highest))) - 1
            thresholds[tasks == task] = np.maximum(labelling.threshold, highest[last])
    otherwise = NULL if labelling.negatives == "null" else NEGATIVE
    return np.where(advantages >= thresholds, POSITIVE, otherwise).astype(np.int64)


def draw_epoch(
    labels: torch.Tensor,
    positive_share: float | None,
    null_rate: float | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the samples of one pass in random order: indices and labels of windows, int64 (n,).

    Within each kind that is drawn, a window is repeated only after all others were drawn.

    :param labels: int64 (n,)
    :param positive_share: None: every window once. Else n draws, of which this share are optimal
        windows (o = 1)
    :param null_rate: None: windows keep their labels. Else this share of n draws is of all windows
        alike, labelled ∅, so that ∅ learns their marginal; the others are of the windows that have
        a condition, with that
    """
    count = len(labels)
    every = torch.arange(count)

    def repeated(items: torch.Tensor, draws: int) -> torch.Tensor:
        passes = [
            items[torch.randperm(len(items), generator=generator)]
            for _ in range(0, draws, max(1, len(items)))
        ]
        return torch.cat([items[:0], *passes])[:draws]

    def shared(items: torch.Tensor, draws: int) -> torch.Tensor:
        optimal = labels[items] == POSITIVE
        if positive_share is None or optimal.all() or not optimal.any():
            return repeated(items, draws)
        positives = round(positive_share * draws)
        drawn = torch.cat(
            [repeated(items[optimal], positives), repeated(items[~optimal], draws - positives)]
        )
        return drawn[torch.randperm(draws, generator=generator)]

    if null_rate is None:
        drawn = shared(every, count)
        return drawn, labels[drawn]
    conditioned = every[labels != NULL]
    as_null = round(null_rate * count) if len(conditioned) else count
    drawn = torch.cat([repeated(every, as_null), shared(conditioned, count - as_null)])
    given = labels[drawn]
    given[:as_null] = NULL
    order = torch.randperm(count, generator=generator)
    return drawn[order], given[order]


def drop_condition(
    labels: torch.Tensor, probability: float, generator: torch.Generator
) -> torch.Tensor:
    """Replace each condition by ∅ with this probability; labels int64 (batch,).

    This is the condition dropout of classifier-free guidance. Negatives (0), if there are any, are
    dropped at the same rate, so that ∅ sees all data (CFGRL, arXiv 2505.23458).
    """
    dropped = torch.rand(labels.shape, generator=generator) < probability
    return torch.where(dropped, NULL, labels)
