"""A moment of an episode, from which any environment of its task can go on, bit for bit.

A control step of robosuite leaves behind more than a state: the poses and contacts of its last
substep, the measurement that observations and images are made of, the phase of the sampling clock.
So a snapshot doesn't list all that; it holds the state before the last control step and the step's
action, and whoever continues repeats that one step. The simulation is deterministic, so everything
is then as it was, in the fast simulator and in LIBERO's own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cfgrl_gym.envs.arguments import is_finite, is_int

_TAKE = "take one by LiberoEnv.snapshot(), or from info['snapshot'] after give_snapshots(True)"


@dataclass(frozen=True, eq=False)
class ControlStep:
    """Describes a control step by all that its result depends on.

    :param before: float64 (n,): `mjSTATE_INTEGRATION` before the step: time, positions, velocities,
        the solver's warm start, controls and external forces
    :param action: float64 (7,)
    :param goal_ori: float64 (3, 3): the controller's goal, which an action without rotation keeps;
        None in the first step of an episode, whose controller is as the reset made it
    :param gripper: float64 (2,): the fingers' commands, which an action moves by a little
    :param clock: seconds since robosuite's sampling period began
    :param sampled: whether it has measured in this period
    """

    before: np.ndarray
    action: np.ndarray
    goal_ori: np.ndarray | None
    gripper: np.ndarray
    clock: float
    sampled: bool


@dataclass(frozen=True, eq=False)
class SimulatorSnapshot:
    """Holds the simulator's part of a snapshot.

    :param state: float64 (n,): `mjSTATE_INTEGRATION`, n is 280 to 400 in LIBERO's tasks
    :param last_step: the control step that led there; None right after a reset without settle steps
    """

    state: np.ndarray
    last_step: ControlStep | None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Holds a moment of an episode of `LiberoEnv`; plain data, which can be pickled, 5 to 8 KB.

    Its images and observations are not in it, for they are made again: an environment with other
    cameras or another `image_size` can go on from it, too. Neither is what code outside LIBERO may
    have changed in the model, such as colours or masses.

    :param suite: of the task
    :param task_id: of the task
    :param init_states: "benchmark" or "random": what `init_state_id` is
    :param init_state_id: where the episode began; it determines where the fixtures are
    :param settle_steps: control steps without motion that preceded the episode
    :param steps: control steps since, which count towards the time limit
    :param model: checksum of the compiled model and MuJoCo's version
    :param simulator: the state, and the control step that led there
    """

    suite: str
    task_id: int
    init_states: str
    init_state_id: int
    settle_steps: int
    steps: int
    model: int
    simulator: SimulatorSnapshot


def check_sound(snapshot: Any) -> Snapshot:
    """Return the snapshot, if it is one and all its values have their types and shapes.

    :raises ValueError: something else, a missing value, another shape, NaN or infinity
    """
    if not isinstance(snapshot, Snapshot):
        raise ValueError(f"snapshot must be a Snapshot; got {snapshot!r:.100}: {_TAKE}")
    simulator = getattr(snapshot, "simulator", None)
    step = getattr(simulator, "last_step", None)
    state = getattr(simulator, "state", None)
    size = state.shape if isinstance(state, np.ndarray) and state.ndim == 1 else None
    sound = {
        "suite": isinstance(getattr(snapshot, "suite", None), str),
        "init_states": getattr(snapshot, "init_states", None) in ("benchmark", "random"),
        "simulator": isinstance(simulator, SimulatorSnapshot),
        "simulator.state": size is not None and _is_array(state, size),
        "simulator.last_step": isinstance(step, ControlStep | None),
    }
    for name in ("task_id", "init_state_id", "settle_steps", "steps", "model"):
        value = getattr(snapshot, name, None)
        sound[name] = is_int(value) and value >= 0  # type: ignore[operator]
    if isinstance(step, ControlStep):
        goal = getattr(step, "goal_ori", np.nan)
        sound |= {
            "last_step.before": _is_array(getattr(step, "before", None), size),
            "last_step.action": _is_array(getattr(step, "action", None), (7,)),
            "last_step.goal_ori": goal is None or _is_array(goal, (3, 3)),
            "last_step.gripper": _is_array(getattr(step, "gripper", None), (2,)),
            "last_step.clock": is_finite(getattr(step, "clock", None)),
            "last_step.sampled": isinstance(getattr(step, "sampled", None), bool | np.bool_),
        }
    elif sound["steps"] and snapshot.steps + snapshot.settle_steps > 0:
        sound["simulator.last_step"] = False
    damaged = [name for name, is_sound in sound.items() if not is_sound]
    if damaged:
        raise ValueError(
            f"the snapshot is damaged: {', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} "
            f"missing, of another type or shape, or not finite; {_TAKE}"
        )
    return snapshot


def check_fits(snapshot: Snapshot, suite: str, settle_steps: int, init_states: str) -> None:
    """Refuse the snapshot of an episode that such an environment doesn't have.

    :param init_states: "benchmark" or "random"
    :raises ValueError: naming what differs
    """
    for name, own in (
        ("suite", suite),
        ("settle_steps", settle_steps),
        ("init_states", init_states),
    ):
        given = getattr(snapshot, name)
        if given != own:
            raise ValueError(
                f"the snapshot is of an episode with {name}={given!r}, this environment has "
                f"{own!r}; continue it in an environment with {name}={given!r}"
            )


def check_model(snapshot: Snapshot, model: int, state_size: int) -> None:
    """Refuse the snapshot of another compiled model.

    :param model: checksum of the model that is to go on
    :param state_size: numbers in its `mjSTATE_INTEGRATION`
    :raises ValueError: the models differ
    """
    if snapshot.model != model or snapshot.simulator.state.size != state_size:
        raise ValueError(
            f"the snapshot is of another model of {snapshot.suite} task {snapshot.task_id}: it was "
            "taken with another version of LIBERO, of its assets or of MuJoCo; take it again with "
            "the installed ones"
        )


def _is_array(value: Any, shape: tuple[int, ...] | None) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.float64
        and value.shape == shape
        and bool(np.isfinite(value).all())
    )
