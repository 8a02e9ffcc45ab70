"""Environments in Ray actors, on this machine or a cluster, that are replaced when they fail."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import gymnasium as gym

from cfgrl_gym.algorithms.vec_envs.ray_connection import RayConnection, import_ray
from cfgrl_gym.algorithms.vec_envs.ray_worker import EnvironmentActor, RayWorker
from cfgrl_gym.algorithms.vec_envs.remote_vec_env import RemoteVecEnv, number_of_workers
from cfgrl_gym.algorithms.vec_envs.requests import pickled
from cfgrl_gym.envs.rendering import processors

PLACING_TIMEOUT = 60.0  # seconds
ONE_CPU: Mapping[str, float] = MappingProxyType({"CPU": 1})


class RayVecEnv(RemoteVecEnv):
    """`WorkerVecEnv` on Ray: environments in actors, wherever a cluster has room for them.

    Ray restarts an actor that dies, also on another node; what is lost with it is as for
    `WorkerVecEnv`, and `CFGRL` runs such an episode again. Observations come through Ray's object
    store. Every node needs this version of cfgrl-gym, and what the environments need.

    :param env_fns: functions that make the environments
    :param workers: number of actors. None: one for each `resources` of the cluster, or each
        processor of this machine; at most one for each environment
    :param timeout: seconds that a worker may take to step its environments before it counts as hung
    :param max_failures: how often in a row a worker may fail without a step in between
    :param address: of a cluster, host:port or "auto", on one of whose nodes this runs. None: the
        Ray that this process is connected to, else the cluster that the environment variable
        RAY_ADDRESS names, else one of this machine alone, which listens on 127.0.0.1 only and ends
        when the last of its environments is closed
    :param resources: what an actor takes of a cluster, as {"CPU": 1, "GPU": 0.25}, with any of its
        custom resources; a Ray that is started here is for these actors alone and counts nothing
    :raises ImportError: Ray isn't installed
    :raises ConnectionError: there is no such cluster, or it has another version of Ray
    :raises StartError: a node of it has no cfgrl-gym, or another version
    :raises ValueError: `workers`, `address` or `resources` can't be used, the cluster has no room
        for the actors, or env_fns can't be pickled
    :raises Exception: what an environment raises when it is made
    """

    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env]],
        workers: int | None = None,
        timeout: float = 300.0,
        max_failures: int = 3,
        address: str | None = None,
        resources: Mapping[str, float] = ONE_CPU,
    ) -> None:
        if not resources or not all(amount > 0 for amount in resources.values()):
            raise ValueError(
                f"resources must be what an actor takes, such as {{'CPU': 1}}; got {resources}"
            )
        ray = import_ray()
        room = number_of_workers(workers, len(env_fns), processors())
        self._connection = RayConnection(address, room)
        self._group: Any = None  # of places in the cluster
        self.workers: list[RayWorker] = []
        try:
            if not self._connection.alone:
                fits = [int(ray.cluster_resources().get(r, 0) // n) for r, n in resources.items()]
                room = max(1, min(fits))
            count = number_of_workers(workers, len(env_fns), room)
            parts = [pickled(env_fns[first::count]) for first in range(count)]
            if not self._connection.alone:
                self._group = _places(ray, count, resources)
            for number, part in enumerate(parts):
                actor = ray.remote(EnvironmentActor).options(
                    **self._actor_options(number, resources)
                )
                self.workers.append(RayWorker(actor, part, timeout))
        except BaseException:
            self._let_go()
            raise
        super().__init__(self.workers, len(env_fns), max_failures)

    def _actor_options(self, number: int, resources: Mapping[str, float]) -> dict[str, Any]:
        """Ray's options of an actor: restarted without end, because `max_failures` says when."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options: dict[str, Any] = {"max_restarts": -1, "allow_out_of_order_execution": True}
        if self._group is None:
            return options | {"num_cpus": 0}
        others = {name: n for name, n in resources.items() if name not in ("CPU", "GPU")}
        return options | {
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
            "resources": others,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, number),
        }

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._let_go()

    def _let_go(self) -> None:
        """End what there is of actors, their places, and a connection that was made here."""
        ray = import_ray()
        for worker in self.workers:
            worker.close()
        if self._group is not None and ray.is_initialized():
            ray.util.remove_placement_group(self._group)
        self._connection.close()


def _places(ray: Any, count: int, resources: Mapping[str, float]) -> Any:
    """Reserve a place for each actor, all of them or none.

    :raises ValueError: the cluster has no room for them
    """
    group = ray.util.placement_group([dict(resources)] * count, strategy="PACK")
    if group.wait(PLACING_TIMEOUT):
        return group
    ray.util.remove_placement_group(group)
    free = {name: ray.available_resources().get(name, 0) for name in resources}
    has = {name: ray.cluster_resources().get(name, 0) for name in resources}
    raise ValueError(
        f"the Ray cluster has no room for {count} actors with {dict(resources)} each: it has "
        f"{has}, of which {free} are free; give fewer workers, or smaller resources"
    )
