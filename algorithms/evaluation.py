"""Measures the success rate over fixed initial states, with its confidence interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from cfgrl_gym.algorithms.collector import Chunk, Collector, Episode, stack
from cfgrl_gym.algorithms.distributed.ranks import ALONE, Ranks
from cfgrl_gym.algorithms.groups import Group, GroupPlan, Start, torch_generator
from cfgrl_gym.algorithms.policies import FlowPolicy

GAP_CHUNKS, GAP_BATCH = 256, 32  # chunks that the guidance gap is averaged over, and their batch


def wilson_interval(
    successes: int, trials: int, z: float = 1.959963984540054
) -> tuple[float, float]:
    """Compute the 95% score interval of a success rate (Wilson 1927).

    :raises ValueError: the counts are impossible
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"need 0 <= successes <= trials and trials >= 1; got {successes}, {trials}"
        )
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True)
class EpisodeOutcome:
    """Holds the outcome of one evaluation episode."""

    task_id: int | None
    init_state_id: int | None
    success: bool
    episode_return: float
    control_steps: int
    unstable: bool  # its physics blew up, which ended it


@dataclass(frozen=True)
class Evaluation:
    """Holds the outcomes of an evaluation, in the order in which the starts were given."""

    episodes: tuple[EpisodeOutcome, ...]
    # Root mean square of v_1 - v_∅ where the policy acted, averaged over chunks. It depends on the
    # batches by rounding.
    guidance_gap: float = field(compare=False)

    @property
    def successes(self) -> int:
        return sum(episode.success for episode in self.episodes)

    @property
    def success_rate(self) -> float:
        return self.successes / len(self.episodes)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95% Wilson interval of the success rate."""
        return wilson_interval(self.successes, len(self.episodes))


def evaluate(
    policy: FlowPolicy,
    env: VecEnv,
    starts: Sequence[Start],
    *,
    cfg_scale: float | None = None,
    seed: int = 0,
    on_episode: Callable[[int, int], None] = lambda episodes, successes: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Run one episode from each start and return the outcomes.

    An episode's noise depends only on its start (and on how often that start came before), so its
    outcome depends neither on the other episodes nor on the environments.

    :param cfg_scale: guidance scale; None: the policy's own
    :param seed: seed of the sampling noise
    :param on_episode: called with (episodes finished, successes so far) of this rank
    :param ranks: the processes that share the starts; all get the whole evaluation
    """
    if not starts:
        raise ValueError("no starts to evaluate from were given")

    keys = [(*_key(start), starts[:i].count(start)) for i, start in enumerate(starts)]

    def noise(group: int, member: int, chunk: int) -> torch.Tensor:
        generator = torch_generator(seed, *keys[group], chunk)
        return torch.randn(policy.horizon, policy.action_width, generator=generator)

    own = tuple(Group(i, start) for i, start in enumerate(starts) if ranks.has(i))
    collector = Collector(env, policy, GroupPlan(own, group_size=1), noise, cfg_scale)
    policy.set_training_mode(False)
    with ranks.together():
        try:
            if own:
                collector.reset()
            while len(collector.finished) < len(own):
                before = len(collector.finished)
                collector.step()
                if len(collector.finished) > before:
                    done = collector.finished
                    on_episode(len(done), sum(episode.succeeded for episode in done))
        finally:
            collector.close()
        finished = sorted(collector.finished, key=lambda episode: episode.group)
        chunks = [chunk for episode in finished for chunk in episode.chunks]
        gaps = _guidance_gaps(policy, chunks, seed)
    outcomes = ranks.joined([(episode.group, _outcome(episode)) for episode in finished])
    outcomes.sort(key=lambda numbered: numbered[0])
    gap = torch.cat(ranks.gather(gaps)).mean().item()
    return Evaluation(tuple(outcome for _, outcome in outcomes), gap)


def _outcome(episode: Episode) -> EpisodeOutcome:
    return EpisodeOutcome(
        task_id=episode.start.task_id,
        init_state_id=episode.start.init_state_id,
        success=episode.succeeded,
        episode_return=episode.total_reward,
        control_steps=len(episode.rewards),
        unstable=episode.unstable,
    )


def _key(start: Start) -> tuple[int, ...]:
    parts = (start.task_id, start.init_state_id, start.seed)
    return tuple(0 if part is None else 1 + part for part in parts)


def _guidance_gaps(policy: FlowPolicy, chunks: list[Chunk], seed: int) -> torch.Tensor:
    """Compute `guidance_gap` of evenly spaced chunks, (n,)."""
    chosen = chunks[:: max(1, math.ceil(len(chunks) / GAP_CHUNKS))]
    generator = torch_generator(seed)
    gaps = [torch.empty(0)]
    for start in range(0, len(chosen), GAP_BATCH):
        part = chosen[start : start + GAP_BATCH]
        t, noise = policy.draw_flow(len(part), generator)
        actions = torch.from_numpy(np.stack([chunk.model_actions for chunk in part]))
        observations = stack([chunk.observation for chunk in part])
        gaps.append(policy.guidance_gap(observations, actions, t, noise).cpu())
    return torch.cat(gaps)
