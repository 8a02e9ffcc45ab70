"""Provides PI0 with an optimality condition: the model, its policy and its presets."""

from cfgrl_gym.algorithms.pi0.checkpoints.build import Pi0PolicyConfig
from cfgrl_gym.algorithms.pi0.condition import CONDITION_MODES, Pi0CFGRLConfig
from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.policy import Pi0Policy
from cfgrl_gym.algorithms.pi0.presets import TinySizes
from cfgrl_gym.wrappers.norm_stats import NormStats

__all__ = [
    "CONDITION_MODES",
    "NormStats",
    "Pi0CFGRLConfig",
    "Pi0ForCFGRL",
    "Pi0Policy",
    "Pi0PolicyConfig",
    "TinySizes",
]
