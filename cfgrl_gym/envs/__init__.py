"""LIBERO as Gymnasium environments, and as its own `OffScreenRenderEnv` with the fast simulator."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfgrl_gym.envs.drop_in import OffScreenRenderEnv

__all__ = ["OffScreenRenderEnv"]


def __getattr__(name: str) -> Any:
    if name == "OffScreenRenderEnv":
        from cfgrl_gym.envs import drop_in  # imports LIBERO

        return drop_in.OffScreenRenderEnv
    raise AttributeError(f"module 'cfgrl_gym.envs' has no attribute {name!r}")
