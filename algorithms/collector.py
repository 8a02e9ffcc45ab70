"""Runs the episodes of a plan on a `VecEnv` and keeps every environment busy."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from cfgrl_gym.algorithms.assignment import Assignment
from cfgrl_gym.algorithms.distributed.ranks import ALONE, Ranks
from cfgrl_gym.algorithms.distributed.shared_returns import SharedReturns
from cfgrl_gym.algorithms.flow import NonFiniteError
from cfgrl_gym.algorithms.groups import GroupPlan, Selection, Start
from cfgrl_gym.algorithms.labels import discounted
from cfgrl_gym.algorithms.memory.prefix_cache import PrefixCache
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.vec_envs.next_starts import NextStarts
from cfgrl_gym.algorithms.vec_envs.remote_vec_env import LOST
from cfgrl_gym.algorithms.vec_envs.requests import WorkerError

MAX_TIMES_LOST = 10  # of one episode: after that, its start is taken to be what ends the workers
LONG_EPISODE = 1001  # steps after which a warning asks about it; MuJoCo and dm_control have 1,000

Row = NDArray[Any] | dict[str, NDArray[Any]]  # one environment's observation, no batch dimension


@dataclass(frozen=True)
class Chunk:
    """Holds what one environment observed, sampled and executed in one step of the `VecEnv`."""

    observation: Row
    model_actions: NDArray[np.float32]  # (horizon, action_width), as sampled
    actions: NDArray[np.float32]  # (n_steps, action_dim), as executed
    rewards: NDArray[np.float64]  # (n_steps,)
    observations: dict[int, Row]  # inside the chunk, by offset, if the environment returns them
    prefix_keys: dict[int, int]  # of the observations by offset, including 0: see `PrefixCache`
    snapshot: Any = None  # of the environment after the chunk, if it gives them


@dataclass(eq=False)
class Episode:
    """Holds one of a group's K episodes; `success` is what the environment reports at its end."""

    group: int
    member: int
    start: Start
    chunks: list[Chunk] = field(default_factory=list)
    success: bool | None = None
    unstable: bool = False  # its physics blew up, which ended it
    times_lost: int = 0  # how often a worker failed while it ran the episode

    @property
    def rewards(self) -> NDArray[np.float64]:
        """Return the reward of every control step, (T,)."""
        return np.concatenate([chunk.rewards for chunk in self.chunks])

    @property
    def total_reward(self) -> float:
        """Return the sum of the episode's rewards, undiscounted."""
        return float(self.rewards.sum())

    def discounted_return(self, gamma: float) -> float:
        """Return Σ_t γ^t·r_t over its control steps, by which the episodes of a group compare."""
        return float(discounted(self.rewards, gamma).sum())

    @property
    def succeeded(self) -> bool:
        """Return the environment's success flag, or else whether the return is positive."""
        return self.outcome.succeeded

    @property
    def outcome(self) -> "Outcome":
        """Return what the statistics need of it."""
        midway = self.start.snapshot is not None
        return Outcome(
            (self.group, self.member),
            self.start.task_id,
            midway,
            self.success,
            self.total_reward,
            len(self.chunks),
            len(self.rewards),
            self.unstable,
        )


@dataclass(frozen=True)
class Outcome:
    """Holds the outcome of an episode, without what was seen and done in it."""

    place: tuple[int, int]  # group and member, by which episodes are ordered
    task_id: int | None
    midway: bool  # it went on from a moment of another episode
    success: bool | None  # None: the environment doesn't say
    total_reward: float
    num_chunks: int
    control_steps: int
    unstable: bool

    @property
    def succeeded(self) -> bool:
        """Return the environment's success flag, or else whether the return is positive."""
        return self.total_reward > 0 if self.success is None else self.success

    @property
    def info(self) -> dict[str, Any]:
        """Return what SB3's `Monitor` would report at its end, with each chunk as one step."""
        episode = {"r": self.total_reward, "l": self.num_chunks}
        return {"episode": episode, "is_success": self.success}


def stack(rows: list[Row]) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """Stack the observations of single environments into a batch."""
    first = rows[0]
    if isinstance(first, dict):
        return {key: np.stack([row[key] for row in rows]) for key in first}  # type: ignore[call-overload]
    return np.stack(rows)  # type: ignore[arg-type]


def row_of(observation: Any, space: spaces.Space, index: int | None = None) -> Row:
    """Return one environment's observation in the space's dtypes; `index` picks it from a batch."""
    if isinstance(space, spaces.Dict):
        return {key: row_of(observation[key], sub, index) for key, sub in space.items()}  # type: ignore[misc]
    value = observation if index is None else observation[index]
    return np.array(value, dtype=space.dtype)  # a copy: environments may reuse theirs


class Collector:
    """Runs the episodes of a plan, in its order, on any number of environments.

    An environment is told its next start while it still runs, so that the autoreset of the `VecEnv`
    begins the planned episode; when the plan has no episode left, the environment rests
    (`NextStarts` says which environments can). An environment that can't be told is reset a second
    time; one that can't rest gets a constant action, and its results are dropped. An episode that
    was lost with its worker (`WorkerVecEnv`) is run again from its beginning, before all others.

    The policy always acts on a batch of `num_envs` rows, because a matrix product rounds
    differently for another number of rows. An episode is therefore the same, bit for bit, whatever
    runs beside it.

    :param env: its actions must be chunks (chunk, action_dim) or single steps (action_dim,)
    :param plan: the groups, and the number of episodes of each
    :param noise: (group, member, chunk index) -> (horizon, action_width), so that an episode's
        randomness doesn't depend on where or when it runs
    :param cfg_scale: guidance scale while collecting; None: the policy's own
    :param prefixes: keeps the prefix of each observation for the update. None: nothing is kept
    :param snapshots: whether the environments give the moments from which an episode can go on
    :param ranks: the processes that share the plan; this one runs its part of the groups
    """

    def __init__(
        self,
        env: VecEnv,
        policy: FlowPolicy,
        plan: GroupPlan,
        noise: Callable[[int, int, int], torch.Tensor],
        cfg_scale: float | None = None,
        prefixes: PrefixCache | None = None,
        snapshots: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.snapshots = snapshots
        self.prefixes = PrefixCache(policy) if prefixes is None else prefixes
        self.plan = plan
        self.env = env
        self.policy = policy
        self.noise = noise
        self.cfg_scale = cfg_scale
        assert isinstance(env.action_space, spaces.Box)
        self.action_space = env.action_space
        self.observation_space = env.observation_space
        self.next_starts = NextStarts(env)
        self.assignment = Assignment(env, plan)
        self.pending = [
            Episode(group.index, member, group.start)
            for group in plan.groups
            if ranks.has(group.index)
            for member in range(plan.group_size)
        ]
        self.ranks = ranks
        self.shared = SharedReturns(ranks, plan)
        self.running: list[Episode | None] = [None] * env.num_envs
        self.rows: list[Row | None] = [None] * env.num_envs
        self.actions = np.empty(0)
        self.model_actions: dict[int, NDArray[np.float32]] = {}
        self.prefix_keys: dict[int, int] = {}
        self.finished: list[Episode] = []
        self.episodes_lost = 0
        self.returns: dict[int, list[float]] = {}  # of the finished episodes of each group
        self.selection = Selection([], [], complete=False)  # from the returns known so far
        self.control_steps = 0
        self.seconds_simulation = 0.0
        self.seconds_inference = 0.0

    def reset(self) -> None:
        """Begin the plan's first episodes, one in each environment."""
        began = perf_counter()
        self.next_starts.forget()
        self._ask_for_snapshots(self.snapshots)
        # Not by env_method("reset"): this way the environments reset in parallel.
        free = list(self.pending)
        for i in range(self.env.num_envs):
            self.next_starts.tell(i, self._take_next(i, free).start if free else None)
        observations = self.env.reset()
        for i in range(self.env.num_envs):
            self._begin_episode(i, row_of(observations, self.observation_space, i))
        self.seconds_simulation += perf_counter() - began

    def act(self) -> NDArray[Any]:
        """Sample the next action of every environment, (num_envs, *action_space.shape)."""
        self._tell_ahead()
        began = perf_counter()
        space = self.action_space
        idle = np.clip(np.zeros(space.shape, space.dtype), space.low, space.high)
        self.actions = np.stack([idle] * self.env.num_envs)
        busy = [i for i, episode in enumerate(self.running) if episode is not None]
        if busy:
            # The rows of idle environments repeat the first row.
            rows = busy + [busy[0]] * (self.env.num_envs - len(busy))
            noise = torch.stack([self._noise(i) for i in rows])
            observations = stack([self.rows[i] for i in rows])  # type: ignore[misc]
            acted = self.policy.act(observations, noise=noise, cfg_scale=self.cfg_scale)
            sampled = acted.model_actions.cpu().numpy()
            self.model_actions = dict(zip(busy, sampled, strict=False))
            actions = acted.actions.cpu().numpy().reshape(len(rows), *space.shape)
            self.actions[busy] = actions[: len(busy)]
            keys = self.prefixes.keep(acted.prefixes, len(busy))
            self.prefix_keys = dict(zip(busy, keys, strict=True))
        self.seconds_inference += perf_counter() - began
        return self.actions

    def step(self) -> tuple[Any, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Step every environment with its action, keep the results and begin the next episodes.

        :return: what `VecEnv.step` returned
        """
        actions = self.act()
        began = perf_counter()
        observations, rewards, dones, given = self.env.step(actions)
        discarded = self.selection.discarded
        infos = list(given)  # a tuple, from SB3's SubprocVecEnv
        for i, episode in enumerate(self.running):
            if episode is None:
                if LOST in infos[i]:
                    self.next_starts.rest(i)
                rewards[i], dones[i], infos[i] = 0, False, {}  # it belongs to no episode
                continue
            if LOST in infos[i]:
                self._run_again(i, episode, infos[i][LOST])
                continue
            chunk = self._chunk(i, episode, float(rewards[i]), infos[i])
            episode.chunks.append(chunk)
            if len(episode.chunks) == LONG_EPISODE:
                warnings.warn(
                    f"the episode from {episode.start} has taken {LONG_EPISODE} steps of the "
                    "environment and isn't over; learning waits for its end. If the environment "
                    "doesn't end episodes itself, wrap it: gymnasium.wrappers.TimeLimit(env, "
                    "max_episode_steps=...)",
                    stacklevel=2,
                )
            self.control_steps += len(chunk.rewards)
            self.rows[i] = row_of(observations, self.observation_space, i)
            if dones[i]:
                success = infos[i].get("is_success")
                episode.success = None if success is None else bool(success)
                episode.unstable = bool(infos[i].get("unstable", False))
                self.finished.append(episode)
                returned = episode.discounted_return(self.plan.gamma)
                self.returns.setdefault(episode.group, []).append(returned)
                self.select()
                self._begin_episode(i, self.rows[i])
        self.seconds_simulation += perf_counter() - began
        if self.ranks.size > 1:
            self.select()  # other ranks' groups may be complete
        if self.selection.discarded != discarded:  # rare, and it goes through every chunk
            episodes = [e for e in (*self.finished, *self.running) if e is not None]
            gone = [e for e in episodes if e.group in self.selection.discarded]
            chunks = [chunk for episode in gone for chunk in episode.chunks]
            self.prefixes.drop(key for chunk in chunks for key in chunk.prefix_keys.values())
        return observations, rewards, dones, infos

    def select(self) -> None:
        """Decide about the groups, by the returns that all ranks know."""
        self.selection = self.plan.select(self.shared.update(self.returns))

    @property
    def idle(self) -> bool:
        """Return whether this rank has run its groups, while the others haven't run theirs."""
        return all(episode is None for episode in self.running)

    def wait(self) -> None:
        """Wait until more is known of the other ranks' groups."""
        self.shared.wait()
        self.select()

    @property
    def kept(self) -> list[list[Episode]]:
        """Return the K episodes of this rank's groups that are kept, in the order of the plan."""
        return [self.episodes(group) for group in self.selection.kept if self.ranks.has(group)]

    @property
    def decided(self) -> list[Episode]:
        """Return the episodes of its groups that are kept or discarded, in the order of the plan.

        They are the same whichever environments ran them, and however often one was lost.
        """
        groups = sorted((*self.selection.kept, *self.selection.discarded))
        return [episode for group in groups for episode in self.episodes(group)]

    @property
    def num_chunks(self) -> int:
        """Count the chunks executed in groups that are certain to be decided, lost episodes aside.

        At the end these are the chunks of `decided`.
        """
        certain = self.plan.certain(self.selection)
        episodes = (*self.finished, *self.running)
        return sum(len(e.chunks) for e in episodes if e is not None and e.group in certain)

    def close(self) -> None:
        """Withdraw what environments were told."""
        self.next_starts.release()
        self._ask_for_snapshots(False)

    def episodes(self, group: int) -> list[Episode]:
        """Return the finished episodes of a group, ordered by member."""
        finished = [episode for episode in self.finished if episode.group == group]
        return sorted(finished, key=lambda episode: episode.member)

    def take_finished(self) -> list[Episode]:
        """Return the episodes that ended since the last call, and keep none of them."""
        finished, self.finished = self.finished, []
        return finished

    def _ask_for_snapshots(self, enabled: bool, indices: list[int] | None = None) -> None:
        if self.snapshots:
            self.env.env_method("give_snapshots", enabled, indices=indices)

    def _noise(self, index: int) -> torch.Tensor:
        episode = self.running[index]
        assert episode is not None
        return self.noise(episode.group, episode.member, len(episode.chunks))

    def _run_again(self, index: int, episode: Episode, reason: str) -> None:
        """Discard what was collected of an episode and plan it again."""
        self.episodes_lost += 1
        self.control_steps -= sum(len(chunk.rewards) for chunk in episode.chunks)
        again = replace(episode, chunks=[], times_lost=episode.times_lost + 1)
        if again.times_lost >= MAX_TIMES_LOST:
            raise WorkerError(
                f"the episode from {episode.start} was lost {again.times_lost} times, the last "
                f"time so: {reason}"
            )
        self.pending.insert(0, again)
        self.next_starts.forget([index])  # the fresh environment doesn't know it
        self._ask_for_snapshots(True, [index])
        self._begin_episode(index, None)

    def _chunk(self, index: int, episode: Episode, reward: float, info: dict[str, Any]) -> Chunk:
        actions = self.actions[index].reshape(self.policy.chunk_size, self.policy.action_dim)
        rewards = np.array([reward])
        if len(self.action_space.shape) == 2:
            missing = [key for key in ("rewards", "n_steps") if key not in info]
            if missing:
                raise ValueError(
                    f"an environment that takes chunks of actions must give 'rewards' and "
                    f"'n_steps' in info, as cfgrl_gym.wrappers.ActionChunk does; {missing} missing"
                )
            rewards = np.asarray(info["rewards"], dtype=np.float64)[: info["n_steps"]]
        if not np.isfinite(rewards).all():
            raise NonFiniteError(
                f"environment {index} gave a reward that isn't finite ({rewards.tolist()!r:.100}) "
                f"in an episode from {episode.start}; a group with it can't be compared. Have its "
                "step give a number, and end the episode where there is none"
            )
        inside = {
            int(offset): row_of(observation, self.observation_space)
            for offset, observation in info.get("observations", ())
        }
        row = self.rows[index]
        assert row is not None
        return Chunk(
            row,
            self.model_actions[index],
            actions[: len(rewards)],
            rewards,
            inside,
            {0: self.prefix_keys[index]}
            | dict(zip(inside, self.prefixes.new_keys(len(inside)), strict=True)),
            info.get("snapshot"),
        )

    def _tell_ahead(self) -> None:
        """Tell every busy environment the start of the episode that it would run next.

        Those whose episodes have run longest choose first. With fewer episodes left than
        environments, the last start is told to several: the one that finishes first takes it. A
        single environment whose episode may be the last is told to rest.
        """
        busy = [i for i, episode in enumerate(self.running) if episode is not None]
        busy.sort(key=lambda i: -len(self.running[i].chunks))  # type: ignore[union-attr]
        pending = self.pending
        if len(busy) == 1 and pending and pending[0].group not in self.plan.certain(self.selection):
            pending = []
        free = list(pending)
        for i in busy:
            next_one = self._take_next(i, free or pending[-1:]) if pending else None
            self.next_starts.tell(i, None if next_one is None else next_one.start)

    def _take_next(self, index: int, pending: list[Episode]) -> Episode:
        """Take an environment's next episode out of these, one of those that are sure to count."""
        return pending.pop(self.assignment.choose(index, self._sure_starts(pending)))

    def _sure_starts(self, pending: list[Episode]) -> Iterator[Start]:
        certain = self.plan.certain(self.selection)
        for episode in takewhile(lambda episode: episode.group in certain, pending):
            yield episode.start

    def _begin_episode(self, index: int, row: Row | None) -> None:
        """Begin a planned episode in an environment that was just reset."""
        started = self.next_starts.begun(index)
        episode = next((e for e in self.pending if e.start == started), None)
        if episode is None and self.pending and not self.selection.complete:
            episode = self._take_next(index, list(self.pending))
            arguments = episode.start.reset_arguments()
            ((observation, _),) = self.env.env_method("reset", indices=[index], **arguments)
            row = row_of(observation, self.observation_space)
        if episode is None:
            self.next_starts.rest(index)
        else:
            self.pending.remove(episode)
            self.assignment.begun(index)
        self.running[index], self.rows[index] = episode, row
