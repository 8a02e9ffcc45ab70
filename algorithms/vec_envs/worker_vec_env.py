"""Environments in worker processes that are replaced when they fail."""

import multiprocessing
from collections.abc import Callable

import gymnasium as gym

from cfgrl_gym.algorithms.vec_envs.remote_vec_env import RemoteVecEnv, number_of_workers
from cfgrl_gym.algorithms.vec_envs.requests import pickled
from cfgrl_gym.algorithms.vec_envs.worker import Worker, refuse_unguarded_script
from cfgrl_gym.envs.rendering import processors


class WorkerVecEnv(RemoteVecEnv):
    """SB3's `SubprocVecEnv` for long runs: a worker that dies, hangs or raises is replaced.

    The episodes that were running in it are over then, with nothing to learn from their end: the
    next `step` returns done, reward 0 and the reason in `info["episode_lost"]`, with the first
    observation of the next episode. (`CFGRL` runs such an episode again.) A worker steps several
    environments one after another, which share compiled models and render contexts.

    :param env_fns: functions that make the environments
    :param workers: number of processes. None: one for each processor, at most one for each
        environment
    :param timeout: seconds that a worker may take to step its environments before it counts as hung
    :param max_failures: how often in a row a worker may fail without a step in between
    :param start_method: of multiprocessing. None: "forkserver", or "spawn" where there is none. A
        script needs `if __name__ == "__main__":` with both, as with `SubprocVecEnv`
    :raises StartError: the worker processes can't start: there is no `if __name__ ...`, say
    :raises ValueError: `workers` is out of range, or env_fns can't be pickled
    :raises Exception: what an environment raises when it is made
    """

    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env]],
        workers: int | None = None,
        timeout: float = 300.0,
        max_failures: int = 3,
        start_method: str | None = None,
    ) -> None:
        refuse_unguarded_script()
        count = number_of_workers(workers, len(env_fns), processors())
        if start_method is None:
            methods = multiprocessing.get_all_start_methods()
            start_method = "forkserver" if "forkserver" in methods else "spawn"
        context = multiprocessing.get_context(start_method)
        # Does nothing for another start method, or where a server is running already: workers are
        # forked from a process that has imported the slow part. Not the user's script, which may
        # not be fit for it: that would end the server.
        context.set_forkserver_preload(["cfgrl_gym.fork_server", Worker.__module__])
        parts = [pickled(env_fns[first::count]) for first in range(count)]
        self.workers: list[Worker] = [Worker(context, part, timeout) for part in parts]
        super().__init__(self.workers, len(env_fns), max_failures)
