"""Names the forms of guidance, and reads the environment variables that override it."""

import os
from typing import Any, Literal, get_args

from cfgrl_gym.algorithms.flow import NEGATIVE, NULL, POSITIVE

Guidance = Literal["velocity", "action"]
CfgReference = Literal["null", "start", "previous"]
BRANCHES = (NULL, POSITIVE)  # that guidance combines
CFG_SCALE_VARIABLE = "PI0_CFG_SCALE"


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Check the value of an argument that has the type `choices`, a Literal of texts.

    :raises ValueError: it is none of them
    """
    known = get_args(choices)
    if value not in known:
        *others, last = (f"'{choice}'" for choice in known)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}; got {value!r:.100}")


def default_cfg_scale() -> float:
    """Return the environment variable PI0_CFG_SCALE, or 1.0 if it is not set."""
    text = os.environ.get(CFG_SCALE_VARIABLE, "1.0")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"PI0_CFG_SCALE must be a number such as 1.5; it is {text!r}") from None


def forced_label() -> int | None:
    """Return the branch that PI0_IS_POSITIVE ∈ {0, 1, none} forces; None if it is not set."""
    text = os.environ.get("PI0_IS_POSITIVE")
    if text is None:
        return None
    labels = {"0": NEGATIVE, "1": POSITIVE, "none": NULL}
    if text.lower() not in labels:
        raise ValueError(f"PI0_IS_POSITIVE must be 0, 1 or none; it is {text!r}")
    return labels[text.lower()]


def needed_branches(cfg_scale: float) -> tuple[int, ...]:
    """Return the labels of the branches that guidance needs.

    With w = 1 it is v_1 alone, with w = 0 v_∅, and otherwise both: (NULL, POSITIVE).
    """
    forced = forced_label()
    single = {1.0: POSITIVE, 0.0: NULL}.get(cfg_scale) if forced is None else forced
    return BRANCHES if single is None else (single,)
