"""The methods that `comparison.py` and `other_envs.py` compare: variants of CFGRL, and controls."""

from dataclasses import dataclass, field
from typing import Any

from controls import (
    AdvantageWeighted,
    AdvantageWeightedAsCondition,
    DiffusionNFT,
    FilteredBC,
    FilteredBCAsCondition,
)

from cfgrl_gym.algorithms import CFGRL

GUIDED = (0.0, 1.0, 2.0, 3.0)  # the scales w at which the policies of CFGRL are evaluated


@dataclass(frozen=True)
class Method:
    """One method and how it differs from the study's settings, or from CFGRL's defaults.

    :param algorithm: what trains
    :param options: of the algorithm
    :param policy_options: of the policy
    :param scales: w at which the end is evaluated
    """

    algorithm: type[CFGRL] = CFGRL
    options: dict[str, Any] = field(default_factory=dict)
    policy_options: dict[str, Any] = field(default_factory=dict)
    scales: tuple[float, ...] = GUIDED


def control(algorithm: type[CFGRL]) -> Method:
    """Make a method without a condition, which collects and acts as v_∅ alone."""
    return Method(algorithm, {"cfg_scale": 0.0, "positive_share": None}, scales=(0.0,))


def guided_control(algorithm: type[CFGRL]) -> Method:
    """Make a control that acts and collects as v_1, and is guided against the start at its end."""
    options = {"cfg_scale": 1.0, "positive_share": None, "dropout_prob": 0.0}
    return Method(algorithm, options, AGAINST_START, AGAINST_START_SCALES)


AGAINST_START = {"cfg_reference": "start"}
AGAINST_START_SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)
OPTIMAL_ONLY = {"positive_share": 1.0, "dropout_prob": 0.0, "cfg_scale": 1.0}
MARGINAL, SPEED = {"null_rate": 0.3}, {"gamma": 0.99}
METHODS = {
    "CFGRL": Method(),
    "marginal": Method(options=MARGINAL),
    # Collecting at w = 1, it learns what CFGRL learns. At w = 0 it is the start.
    "reference": Method(policy_options=AGAINST_START, scales=(0.0, *AGAINST_START_SCALES)),
    "reference, w = 1.5": Method(
        options={"cfg_scale": 1.5}, policy_options=AGAINST_START, scales=(1.0, 1.5, 2.0, 3.0)
    ),
    # v_1 alone is trained; ∅ stays what it was at the start.
    "optimal only": Method(CFGRL, OPTIMAL_ONLY, AGAINST_START, AGAINST_START_SCALES),
    "successes only": Method(
        CFGRL, OPTIMAL_ONLY | {"label_source": "success"}, AGAINST_START, AGAINST_START_SCALES
    ),
    "speed": Method(options=SPEED),
    "marginal, speed": Method(options=MARGINAL | SPEED | {"optimal_share": 0.4}),
    # Fewer whole episodes, so that the control steps are about as many.
    "midway": Method(options={"groups_per_iteration": 5, "midway_groups": 4}),
    "FilteredBC": control(FilteredBC),
    "AdvantageWeighted": control(AdvantageWeighted),
    "DiffusionNFT": control(DiffusionNFT),
    "FilteredBC, reference": guided_control(FilteredBCAsCondition),
    "AdvantageWeighted, reference": guided_control(AdvantageWeightedAsCondition),
}
# Where a training is dear, these are had without: against_start.py guides a finished policy.
TRAINED_ALIKE = ("reference", "FilteredBC, reference", "AdvantageWeighted, reference")
CONTROLS = [name for name, method in METHODS.items() if method.algorithm is not CFGRL]
# What is tried of every method, one at a time, before the comparison and on another task.
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "learning_rate=0.00025": {"learning_rate": 2.5e-4},
    "learning_rate=0.001": {"learning_rate": 1e-3},
    "n_epochs=6": {"n_epochs": 6},
    "n_epochs=24": {"n_epochs": 24},
}
