"""Connects CFGRL to SB3: `learn` as a loop of iterations, environments and policies by name."""

import time
from collections import deque
from typing import Any, TypeVar

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import VecEnv

from cfgrl_gym.algorithms.collector import Collector
from cfgrl_gym.algorithms.distributed.ranks import RankError, RanksStopped
from cfgrl_gym.algorithms.overlap import UpdatesBeside
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.vec_envs.left_alone import left_alone
from cfgrl_gym.algorithms.vec_envs.supported import as_vec_env

SelfLoop = TypeVar("SelfLoop", bound="IterationLoop")


def _as_list(callback: MaybeCallback) -> list[Any]:
    if callback is None:
        return []
    return callback if isinstance(callback, list) else [callback]


class TimestepsBar(ProgressBarCallback):
    """Shows SB3's progress bar, advanced by `num_timesteps` and not once per environment."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self.begun_at = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.model.num_timesteps - self.begun_at - self.pbar.n)
        return True

    def _on_training_end(self) -> None:
        # An iteration ends with its episodes, which may be beyond the steps that were asked for.
        self.pbar.total = max(self.pbar.total or 0, self.pbar.n)
        super()._on_training_end()


class IterationLoop(UpdatesBeside, OnPolicyAlgorithm):
    """Alternates between collecting episodes and one update with all of them.

    A subclass implements `collect_rollouts` and `train`.
    """

    policy: FlowPolicy  # type: ignore[assignment]

    _wrap_env = staticmethod(as_vec_env)

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name == "Pi0Policy":
            from cfgrl_gym.algorithms import Pi0Policy  # imports transformers

            return Pi0Policy
        if policy_name not in self.policy_aliases:
            known = ", ".join(f"'{name}'" for name in (*self.policy_aliases, "Pi0Policy"))
            raise ValueError(
                f"policy '{policy_name}' is unknown; known are {known}, and any subclass of "
                "cfgrl_gym.algorithms.policies.FlowPolicy, given as a class"
            )
        return super()._get_policy_from_name(policy_name)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "CFGRL",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        """Set up `learn` as SB3 does, but don't reset the environments: a collection does that."""
        self.start_time = time.time_ns()
        if reset_num_timesteps or self.ep_info_buffer is None:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if reset_num_timesteps:
            self.num_timesteps = 0
            self.statistics.num_episodes = self.statistics.num_control_steps = 0
        self._total_timesteps = total_timesteps + self.num_timesteps
        self._num_timesteps_at_start = self.num_timesteps
        if not self.ranks.first:
            callback = [
                each for each in _as_list(callback) if getattr(each, "on_every_rank", False)
            ]
            progress_bar = False
            self.set_logger(Logger(None, []))
        if not self._custom_logger:
            self._logger = configure_logger(
                self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps
            )
        return self._total_timesteps, self._init_callback(callback, progress_bar)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        callback = super()._init_callback(callback)
        if progress_bar:
            callback = CallbackList([callback, TimestepsBar()])
            callback.init_callback(self)
        return callback

    def run_plan(self, collector: Collector, env: VecEnv, callback: BaseCallback) -> bool:
        """Run a collector's plan, with the callback after every step of the environments.

        :return: False if the callback asked to stop
        """
        begun_at = self.num_timesteps
        try:
            collector.reset()
            while not collector.selection.complete:
                if collector.idle:
                    collector.wait()
                    continue
                new_obs, rewards, dones, infos = collector.step()
                actions = collector.actions
                # The number falls for a moment when an episode is lost and has to be run again.
                self.num_timesteps = max(self.num_timesteps, begun_at + collector.num_chunks)
                callback.update_locals(locals())
                with left_alone(env):
                    if not callback.on_step():
                        collector.shared.leave(stopped=True)
                        return False
        except RanksStopped:
            return False
        except RankError:
            raise
        except BaseException:
            collector.shared.leave()
            raise
        finally:
            collector.close()
        # Those of the other ranks' groups as well.
        self.num_timesteps = begun_at + sum(self.ranks.gather(collector.num_chunks))
        return True

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback) -> bool:  # type: ignore[override]
        """Run episodes and store in `windows` what `train` learns from, or None.

        Where windows of before are `untrained`, update by them at the same time.

        :return: False if the callback asked to stop
        """
        raise NotImplementedError

    def learn(
        self: SelfLoop,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "CFGRL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        max_iterations: int | None = None,
    ) -> SelfLoop:
        """Collect, label and update until `total_timesteps` environment steps were made, or after
        `max_iterations` collections and updates.

        Steps are counted as in SB3, summed over environments; a chunk of actions is one step. Only
        steps of groups that an iteration kept or discarded count: not those of episodes that were
        still running when these groups were complete, or that were lost with a worker. Unlike in
        SB3's `OnPolicyAlgorithm`, an iteration's update is logged with its rollout, and the
        learning rate is the one at the iteration's beginning. An iteration lasts until its episodes
        end, so it may go beyond `total_timesteps`.
        """
        if not total_timesteps >= 0 or (max_iterations or 0) < 0:
            raise ValueError(
                "total_timesteps and max_iterations must not be negative; got "
                f"{total_timesteps} and {max_iterations}"
            )
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        assert self.env is not None
        iteration = 0
        while self.num_timesteps < total_timesteps and iteration != max_iterations:
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            if not self.collect_rollouts(self.env, callback):
                break
            if self.windows is None:
                self.logger.warn("no group taught anything; the update is skipped")
            elif not self.untrained:  # those wait for the next collection
                self.train()
            self.iteration += 1
            iteration += 1
            if log_interval and iteration % log_interval == 0:
                self.dump_logs(self.iteration)
        last_update = self.untrained
        with self.update_beside():  # there is nothing left to collect
            self.untrained = False
        if log_interval and (last_update or iteration % log_interval != 0):
            self.dump_logs(self.iteration)
        callback.on_training_end()
        return self
