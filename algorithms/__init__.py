"""Provides CFGRL, an SB3 algorithm, and the flow-matching policies it trains."""

from typing import TYPE_CHECKING, Any

from cfgrl_gym.algorithms.cfgrl import CFGRL
from cfgrl_gym.algorithms.labels import rloo_advantages
from cfgrl_gym.algorithms.mlp_policy import MlpPolicy
from cfgrl_gym.algorithms.vec_envs.ray_vec_env import RayVecEnv
from cfgrl_gym.algorithms.vec_envs.thread_vec_env import ThreadVecEnv
from cfgrl_gym.algorithms.vec_envs.worker_vec_env import WorkerVecEnv

if TYPE_CHECKING:
    from cfgrl_gym.algorithms.pi0 import Pi0Policy

__all__ = [
    "CFGRL",
    "MlpPolicy",
    "Pi0Policy",
    "RayVecEnv",
    "ThreadVecEnv",
    "WorkerVecEnv",
    "rloo_advantages",
]


def __getattr__(name: str) -> Any:
    # Pi0Policy needs transformers, whose import takes seconds; MlpPolicy does not.
    if name == "Pi0Policy":
        from cfgrl_gym.algorithms.pi0 import Pi0Policy

        return Pi0Policy
    raise AttributeError(f"module 'cfgrl_gym.algorithms' has no attribute {name!r}")
