"""Detects whether the physics of a simulation have blown up.

When numbers are huge or not finite, MuJoCo resets its whole state to the model's defaults and
counts a warning. The simulation then looks sound, but it is another scene: an episode must not go
on from there, let alone succeed.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

# Metres from the origin, which is in the middle of LIBERO's room. What hits the floor at 4 m/s, ten
# times the speed of the hand, comes to rest within about 1 m; what the simulation hurls away at
# 600 m/s is beyond 20 m after 0.1 s, where the drag of the air has slowed it to 100 m/s.
MAX_DISTANCE = 20.0
# Of a joint, in m/s or rad/s. Sound episodes stay below 30; MuJoCo itself complains at 1e10 only.
MAX_SPEED = 1e4

# By the array of MjData in which MuJoCo found NaN, infinity or more than 1e10. With what it warns
# of otherwise, such as full buffers, it goes on simulating, and so does LIBERO.
_FATAL = {
    "qpos": "mjWARN_BADQPOS",
    "qvel": "mjWARN_BADQVEL",
    "qacc": "mjWARN_BADQACC",
    "ctrl": "mjWARN_BADCTRL",
}

Result = TypeVar("Result")


def find_fault(model: Any, data: Any) -> str | None:
    """Say what has gone wrong in the physics since MuJoCo's last reset, or None.

    :param model: `mujoco.MjModel`
    :param data: `mujoco.MjData`
    """
    # After every control step, so the usual case is cheap. NaN fails a comparison as well.
    if (
        np.abs(data.qpos).max() <= MAX_DISTANCE
        and np.abs(data.qvel).max() <= MAX_SPEED
        and not data.warning.number.any()
    ):
        return None
    return _closer_look(model, data)


def _closer_look(model: Any, data: Any) -> str | None:
    import mujoco

    for array, name in _FATAL.items():
        warning = data.warning[getattr(mujoco.mjtWarning, name)]
        if warning.number:
            return f"MuJoCo met NaN, infinity or a huge number in {array}[{warning.lastinfo}]"
    too_fast = ~(np.abs(data.qvel) <= MAX_SPEED)
    if too_fast.any():
        dof = too_fast.argmax()
        joint = model.joint(model.dof_jntid[dof]).name
        return f"the speed of joint {joint!r} is {data.qvel[dof]:.3g}; sound is up to {MAX_SPEED:g}"
    ends = np.append(model.jnt_qposadr[1:], model.nq)
    for number, (first, end) in enumerate(zip(model.jnt_qposadr, ends, strict=True)):
        joint, place = model.joint(number).name, data.qpos[first:end]
        if not np.isfinite(place).all():
            return f"the position of joint {joint!r} is {place}"
        is_free = model.jnt_type[number] == mujoco.mjtJoint.mjJNT_FREE
        if is_free and np.abs(place[:3]).max() > MAX_DISTANCE:
            return f"joint {joint!r} is at {place[:3]}, more than {MAX_DISTANCE:g} m away"
    return None


def attempt(
    run: Callable[[], Result], fault: Callable[[], str | None]
) -> tuple[Result | None, str | None]:
    """Run a part of a simulation, and return its result and what went wrong in the physics.

    LIBERO and robosuite may raise exceptions at numbers that aren't finite. An exception is passed
    on only if the physics are sound, because then it has another cause.
    """
    try:
        return run(), fault()
    except Exception as error:
        found = fault()
        if found is None:
            raise
        return None, f"{found} ({type(error).__name__}: {error})"


def keep_log_out_of_the_working_directory() -> None:
    """Keep MuJoCo from writing MUJOCO_LOG.TXT to the working directory; it warns on the console.

    An older MuJoCo has no such setting; a log file of another name is the user's choice, and kept.
    """
    import mujoco

    if hasattr(mujoco, "MjLogConfig"):
        config = mujoco.MjLogConfig.get()
        if config.logfile == "MUJOCO_LOG.TXT":
            config.logto_file = False
            config.set()
