"""Measures the success rate over fixed initial states, with its confidence interval."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from cfgrl_gym.algorithms.collector import Collector, Episode, stack
from cfgrl_gym.algorithms.distributed.ranks import ALONE, Ranks
from cfgrl_gym.algorithms.groups import Group, GroupPlan, Start, torch_generator
from cfgrl_gym.algorithms.policies import FlowPolicy

GAP_CHUNKS = 4  # of an episode, over which its guidance gap is averaged


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
    # Root mean square of v_1 - v_∅ where the policy acted, averaged over some of its chunks.
    guidance_gap: float


@dataclass(frozen=True)
class Evaluation:
    """Holds the outcomes of an evaluation, in the order in which the starts were given."""

    episodes: tuple[EpisodeOutcome, ...]

    @property
    def guidance_gap(self) -> float:
        """Return the mean of the episodes' guidance gaps."""
        return sum(episode.guidance_gap for episode in self.episodes) / len(self.episodes)

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
    on_outcome: Callable[[int, EpisodeOutcome], None] = lambda index, outcome: None,
    known: Mapping[int, EpisodeOutcome] = MappingProxyType({}),
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Run one episode from each start and return the outcomes.

    An episode's noise depends only on its start (and on how often that start came before), so its
    outcome depends neither on the other episodes nor on the environments.

    :param cfg_scale: guidance scale; None: the policy's own
    :param seed: seed of the sampling noise
    :param on_outcome: called with each episode's index among the starts and its outcome, when it
        has ended on this rank
    :param known: outcomes of an evaluation that was interrupted, by index: these aren't run again
    :param ranks: the processes that share the starts; all get the whole evaluation
    """
    if not starts:
        raise ValueError("no starts to evaluate from were given")

    seen: Counter[tuple[int, ...]] = Counter()
    keys: list[tuple[int, ...]] = []
    for start in starts:
        key = _key(start)
        keys.append((*key, seen[key]))
        seen[key] += 1

    def noise(group: int, member: int, chunk: int) -> torch.Tensor:
        generator = torch_generator(seed, *keys[group], chunk)
        return torch.randn(policy.horizon, policy.action_width, generator=generator)

    # A stretch of starts for each rank, so that it has few of the tasks.
    left = [index for index in ranks.part(len(starts)) if index not in known]
    own = tuple(Group(index, starts[index]) for index in left)
    collector = Collector(env, policy, GroupPlan(own, group_size=1), noise, cfg_scale)
    outcomes: dict[int, EpisodeOutcome] = {}
    policy.set_training_mode(False)
    with ranks.together():
        try:
            if own:
                collector.reset()
            while len(outcomes) < len(own):
                collector.step()
                for episode in collector.take_finished():
                    gap = _guidance_gap(
                        policy, episode, torch_generator(seed, *keys[episode.group])
                    )
                    outcomes[episode.group] = _outcome(episode, gap)
                    on_outcome(episode.group, outcomes[episode.group])
        finally:
            collector.close()
    of_all = dict(known) | dict(ranks.joined(list(outcomes.items())))
    return Evaluation(tuple(of_all[index] for index in range(len(starts))))


def _outcome(episode: Episode, guidance_gap: float) -> EpisodeOutcome:
    return EpisodeOutcome(
        task_id=episode.start.task_id,
        init_state_id=episode.start.init_state_id,
        success=episode.succeeded,
        episode_return=episode.total_reward,
        control_steps=len(episode.rewards),
        unstable=episode.unstable,
        guidance_gap=guidance_gap,
    )


def _key(start: Start) -> tuple[int, ...]:
    parts = (start.task_id, start.init_state_id, start.seed)
    return tuple(0 if part is None else 1 + part for part in parts)


def _guidance_gap(policy: FlowPolicy, episode: Episode, generator: torch.Generator) -> float:
    """Average `guidance_gap` over evenly spaced chunks of an episode."""
    chosen = episode.chunks[:: math.ceil(len(episode.chunks) / GAP_CHUNKS)]
    t, noise = policy.draw_flow(len(chosen), generator)
    actions = torch.from_numpy(np.stack([chunk.model_actions for chunk in chosen]))
    observations = stack([chunk.observation for chunk in chosen])
    return policy.guidance_gap(observations, actions, t, noise).mean().item()
