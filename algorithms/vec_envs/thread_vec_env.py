"""Steps several environments of one process in threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from cfgrl_gym.algorithms.vec_envs.requests import step_and_reset
from cfgrl_gym.envs.rendering import processors


class ThreadVecEnv(DummyVecEnv):
    """Steps environments as SB3's `DummyVecEnv` does, but in parallel threads, one for each core.

    It suits environments that release Python's global interpreter lock while they work, as LIBERO's
    do here in physics and rendering. Threads share compiled models and render contexts, which are
    large; processes (`SubprocVecEnv`) would each need their own.

    :param env_fns: functions that make the environments, called one after another
    :raises ValueError: as in `DummyVecEnv`
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]]) -> None:
        super().__init__(env_fns)
        self._pool = ThreadPoolExecutor(
            min(self.num_envs, processors()), thread_name_prefix="ThreadVecEnv"
        )

    def step_wait(self) -> VecEnvStepReturn:
        self._each(self._step_one)
        return (
            self._obs_from_buf(),
            self.buf_rews.copy(),
            self.buf_dones.copy(),
            [dict(info) for info in self.buf_infos],
        )

    def _step_one(self, index: int) -> None:
        obs, reward, done, info, reset_info = step_and_reset(self.envs[index], self.actions[index])
        self.buf_rews[index], self.buf_dones[index], self.buf_infos[index] = reward, done, info
        if reset_info is not None:
            self.reset_infos[index] = reset_info
        self._save_obs(index, obs)

    def reset(self) -> VecEnvObs:
        self._each(self._reset_one)
        self._reset_seeds()
        self._reset_options()
        return self._obs_from_buf()

    def _reset_one(self, index: int) -> None:
        options = {"options": self._options[index]} if self._options[index] else {}
        obs, self.reset_infos[index] = self.envs[index].reset(seed=self._seeds[index], **options)
        self._save_obs(index, obs)

    def _each(self, work: Callable[[int], None]) -> None:
        """Finish the work for all environments, then raise the first error."""
        futures = [self._pool.submit(work, index) for index in range(self.num_envs)]
        wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        self._pool.shutdown()
        super().close()
