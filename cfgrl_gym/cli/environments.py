"""Makes the LIBERO environments of a command, in workers that are replaced when they fail."""

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from cfgrl_gym.algorithms.vec_envs.ray_connection import import_ray
from cfgrl_gym.algorithms.vec_envs.ray_vec_env import RayVecEnv
from cfgrl_gym.algorithms.vec_envs.worker_vec_env import WorkerVecEnv
from cfgrl_gym.cli.configs import PolicyOptions
from cfgrl_gym.envs.libero import ACTION_DIM, LiberoEnv
from cfgrl_gym.wrappers.libero_observation import CAMERA_SLOTS, two_test_space

# With the module's name, so that a fresh worker process registers it.
ENVIRONMENT = "cfgrl_gym:LiberoChunked-v0"

# The environment's name of a camera: PI0's.
SLOT_OF_CAMERA = {key.removesuffix("_image"): slot for slot, key in CAMERA_SLOTS.items()}


def libero_spaces(
    image_size: int, chunk_size: int, slots: Iterable[str] = tuple(CAMERA_SLOTS)
) -> tuple[spaces.Dict, spaces.Box]:
    """Return observation and action space of `LiberoChunked-v0`, without building one.

    :param slots: PI0's names of the cameras
    """
    image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    actions = spaces.Box(-1.0, 1.0, (chunk_size, ACTION_DIM), np.float32)
    return two_test_space(dict.fromkeys(slots, image)), actions


def environment_arguments(
    options: PolicyOptions, chunk_size: int, image_size: int, slots: Iterable[str]
) -> dict[str, Any]:
    """Return arguments of `LiberoChunked-v0`; sizes that the user didn't give are the policy's.

    :param slots: PI0's names of the cameras that the policy looks at: no other image is rendered
    """
    return {
        **options.arguments_of(LiberoEnv),
        "cameras": [camera for camera, slot in SLOT_OF_CAMERA.items() if slot in slots],
        "chunk_size": options.chunk_size or chunk_size,
        "image_size": options.image_size or image_size,
    }


def vec_env(arguments: dict[str, Any], options: PolicyOptions) -> closing[VecEnv]:
    """Make a `VecEnv` of `LiberoChunked-v0` that is closed at the end of the `with` block.

    :raises ValueError: vec_env is ray, and Ray isn't installed, or the cluster has no room
    :raises ConnectionError: there is no Ray cluster at ray_address
    """
    make: Callable[[], gym.Env[Any, Any]] = partial(gym.make, ENVIRONMENT, **arguments)
    makers = [make] * options.n_envs
    if options.vec_env == "ray":
        try:
            import_ray()
        except ImportError as error:
            raise ValueError(f"vec_env ray: {error}") from None
        return closing(RayVecEnv(makers, address=options.ray_address))
    return closing(WorkerVecEnv(makers))
