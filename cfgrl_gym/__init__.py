"""Provides CFGRL for PI0 on LIBERO: Gymnasium environments and an SB3-style algorithm.

Importing the package registers `Libero-v0` and `LiberoChunked-v0`. It is fast, because torch,
transformers and robosuite are imported when first needed.
"""

from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import WrapperSpec, register

from cfgrl_gym._version import __version__

if TYPE_CHECKING:
    from cfgrl_gym.algorithms import (
        CFGRL,
        MlpPolicy,
        Pi0Policy,
        RayVecEnv,
        ThreadVecEnv,
        WorkerVecEnv,
    )
    from cfgrl_gym.envs.acceleration import accelerate_libero

__all__ = [
    "CFGRL",
    "MlpPolicy",
    "Pi0Policy",
    "RayVecEnv",
    "ThreadVecEnv",
    "WorkerVecEnv",
    "__version__",
    "accelerate_libero",
]

# The environments count their own steps (their limit is in control steps, and a chunk has many),
# so Gymnasium's TimeLimit is not used.
_LIMIT = WrapperSpec("limit_control_steps", "cfgrl_gym.envs.libero:limit_control_steps", {})
register(
    id="Libero-v0",
    entry_point="cfgrl_gym.envs.libero:LiberoEnv",
    additional_wrappers=(_LIMIT,),
)
register(
    id="LiberoChunked-v0",
    entry_point="cfgrl_gym.wrappers.libero_observation:make_libero_chunked",
    additional_wrappers=(_LIMIT,),
)


def __getattr__(name: str) -> Any:
    if name == "accelerate_libero":
        from cfgrl_gym.envs.acceleration import accelerate_libero

        return accelerate_libero
    if name in __all__:
        from cfgrl_gym import algorithms

        return getattr(algorithms, name)
    raise AttributeError(f"module 'cfgrl_gym' has no attribute {name!r}")
