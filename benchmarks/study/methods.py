"""The methods that `comparison.py` compares, each a variant of CFGRL or a control."""

from dataclasses import dataclass, field
from typing import Any

from controls import AdvantageWeighted, DiffusionNFT, FilteredBC

from cfgrl_gym.algorithms import CFGRL

GUIDED = (0.0, 1.0, 2.0, 3.0)  # the scales w at which the policies of CFGRL are evaluated


@dataclass(frozen=True)
class Method:
    """One method and how it differs from the study's settings.

    :param algorithm: what trains
    :param options: of `cfgrl train`, where they aren't those of `settings.training_options`
    :param collects_at: guidance scale of the rollouts
    :param scales: at which the end is evaluated
    """

    algorithm: type[CFGRL] = CFGRL
    options: dict[str, Any] = field(default_factory=dict)
    collects_at: float = 1.0
    scales: tuple[float, ...] = GUIDED


def control(algorithm: type[CFGRL], **options: Any) -> Method:
    """Make a method without a condition, which acts as v_∅ alone."""
    return Method(algorithm, {"positive_share": None} | options, 0.0, (0.0,))


MARGINAL, SPEED = {"null_rate": 0.3}, {"gamma": 0.99}
METHODS = {
    "CFGRL": Method(),
    "marginal": Method(options=MARGINAL),
    "speed": Method(options=SPEED),
    "marginal, speed": Method(options=MARGINAL | SPEED | {"optimal_share": 0.4}),
    "reference": Method(options={"cfg_reference": "start"}),
    # Fewer whole episodes, so that the control steps are about as many.
    "midway": Method(options={"groups_per_iteration": 5, "midway_groups": 4}),
    "filtered BC": control(FilteredBC),
    "AWR": control(AdvantageWeighted),
    "DiffusionNFT": control(DiffusionNFT),
}
CONTROLS = [name for name, method in METHODS.items() if method.algorithm is not CFGRL]
# What is tried of every method, one at a time, before the comparison and on another task.
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "learning_rate=0.00025": {"learning_rate": 2.5e-4},
    "learning_rate=0.001": {"learning_rate": 1e-3},
    "n_epochs=6": {"n_epochs": 6},
    "n_epochs=24": {"n_epochs": 24},
}
