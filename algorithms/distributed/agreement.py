"""What ranks must have in common before they train together."""

import hashlib
import inspect
import platform
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from cfgrl_gym._version import __version__
from cfgrl_gym.algorithms.distributed.ranks import Ranks

SAMPLED = 1000  # numbers of each tensor that a digest is made from
OF_A_RANK = ("env", "device", "verbose", "device_memory", "prefix_memory", "tensorboard_log")


def check_agreement(ranks: Ranks, model: BaseAlgorithm, **more: Any) -> None:
    """Check that all ranks train the same policy on the same tasks with the same settings.

    :param more: other values that have to be the same
    :raises ValueError: on every rank, if something differs
    """
    parameters = inspect.signature(type(model).__init__).parameters
    settings = {
        name: vars(model)[name]
        for name in parameters
        if name in vars(model) and name not in OF_A_RANK and not callable(vars(model)[name])
    }
    versions = {
        "the version of cfgrl-gym": __version__,
        "the version of torch": torch.__version__,
        "Python": platform.python_version(),
    }
    about = {
        "algorithm": type(model).__name__,
        "policy": type(model.policy).__name__,
        "observation_space": str(model.observation_space),
        "action_space": str(model.action_space),
        "num_timesteps": model.num_timesteps,
    }
    weights = {"the digest of the policy's weights": digest(model.policy)}
    ranks.check_equal(versions | about | settings | more | weights)


@torch.no_grad()
def digest(module: nn.Module) -> str:
    """Return a digest of some numbers of every parameter and buffer."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            numbers = tensor.flatten()[:SAMPLED].double().cpu().numpy()
            found.update(name.encode() + numbers.tobytes())
    return found.hexdigest()[:16]
