"""Compares the fast simulator with LIBERO itself on this machine, bit for bit."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfgrl_gym.envs.fast_simulator import FastSimulator
from cfgrl_gym.envs.plain_simulator import PlainSimulator
from cfgrl_gym.envs.simulator import IMAGE_KEYS, LIBERO_SEED, Simulator
from cfgrl_gym.envs.suites import Task, load_init_states

_OTHER_STEPS = 20  # control steps of each episode between the two that are compared
_ROBOT = ("robot0_", "gripper0_")  # prefixes of robosuite's names of the robot's bodies

STATE_KEYS = ("time", "qpos", "qvel", "success")
Moment = dict[str, np.ndarray]  # the above, and observations


@dataclass(frozen=True)
class Difference:
    """Describes the first value that was not equal.

    :param episode: "first", or "later": the same episode again, after others
    :param step: control steps since the reset
    :param key: time, qpos, qvel, success, or the observation's key
    :param size: largest absolute difference; infinite if the key is missing or has another shape
    """

    episode: str
    step: int
    key: str
    size: float


@dataclass(frozen=True)
class ExactnessReport:
    """Says what was compared, and whether it was equal.

    :param steps: control steps, each compared in both episodes
    :param others: episodes between the two
    :param observations: number of observation keys that are compared after the reset and after
        every step, as state and success are; images don't count
    :param images: images compared, in both episodes together
    :param contacts: the most contacts that the robot had with other things at the same time
    :param difference: the first difference, or None
    """

    steps: int
    others: int
    observations: int
    images: int
    contacts: int
    difference: Difference | None


def compare(
    task: Task,
    actions: np.ndarray,
    *,
    others: int = 2,
    image_size: int = 128,
) -> ExactnessReport:
    """Play an episode in LIBERO's `OffScreenRenderEnv`, and twice in one `FastSimulator`.

    It starts from the first benchmark state, the episodes in between from the next ones. State,
    success and observations are compared after the reset and after every step, the images of both
    cameras after the reset, in the middle and at the end.

    :param actions: (steps, 7) in [-1, 1], at least one; they go on after a success
    :param others: episodes from other states that the fast simulator plays between its two
    :param image_size: side of the images in pixels
    :raises UnknownUpstreamError: the fast simulator doesn't support the installed LIBERO
    :raises ValueError: the actions have another shape
    """
    actions = np.asarray(actions, dtype=np.float64)
    if actions.ndim != 2 or actions.shape[1] != 7 or not len(actions):
        raise ValueError(f"actions must have shape (steps, 7) with steps > 0; got {actions.shape}")
    states = load_init_states(task.suite, task.task_id)
    pictured = {0, len(actions) // 2, len(actions)}
    # The fast one first: it refuses unknown versions before anything long begins.
    with closing(FastSimulator(task, image_size)) as fast:
        with closing(PlainSimulator(task, image_size)) as plain:
            contacts = 0
            wanted = []
            for moment in play(plain, states[0], actions, pictured):
                contacts = max(contacts, touches(plain))
                wanted.append(moment)
        difference = first_difference(wanted, play(fast, states[0], actions, pictured), "first")
        if difference is None:
            for other in range(others):
                fast.reset(LIBERO_SEED, states[(1 + other) % len(states)])
                for action in downward_actions(_OTHER_STEPS, seed=other + 1):
                    fast.advance(action)
            difference = first_difference(wanted, play(fast, states[0], actions, pictured), "later")
    return ExactnessReport(
        steps=len(actions),
        others=others,
        observations=len(wanted[0].keys() - set(STATE_KEYS) - set(IMAGE_KEYS)),
        images=2 * len(pictured) * len(IMAGE_KEYS),
        contacts=contacts,
        difference=difference,
    )


def downward_actions(steps: int, seed: int = 0) -> np.ndarray:
    """Draw random actions, float64 (steps, 7), that push down to where contacts occur."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 7))
    actions[:, 2] -= 0.7
    return np.clip(actions, -1, 1)


def play(
    simulator: Simulator, init_state: np.ndarray, actions: np.ndarray, pictured: Collection[int]
) -> Iterator[Moment]:
    """Play one episode, and yield the moment after the reset, then the one after each action.

    :param init_state: (1 + nq + nv,)
    :param actions: float64 (steps, 7)
    :param pictured: numbers of the moments that also have images; 0 is the reset
    """
    simulator.reset(LIBERO_SEED, init_state)
    observables = simulator.robosuite_env._observables  # those of a reset are new
    cameras = {key: observables[key]._sensor for key in IMAGE_KEYS if key in observables}
    yield _moment(simulator, False, 0 in pictured)
    for step, action in enumerate(actions, 1):
        # LIBERO spends most of a step on images. The clocks of its cameras must advance all the
        # same, so a camera isn't disabled, but returns an empty image.
        for key, sensor in cameras.items():
            observables[key]._sensor = sensor if step in pictured else _no_image
        success = simulator.advance(action)
        yield _moment(simulator, success, step in pictured)


def first_difference(
    wanted: Iterable[Moment], given: Iterable[Moment], episode: str
) -> Difference | None:
    """Find where two episodes of the same length first differ in any bit, or return None."""
    for step, (one, other) in enumerate(zip(wanted, given, strict=True)):
        for key in dict.fromkeys((*one, *other)):
            size = _difference(one.get(key), other.get(key))
            if size is not None:
                return Difference(episode, step, key, size)
    return None


def touches(simulator: Simulator) -> int:
    """Count the contacts that the robot has now with anything else."""
    model, contact = simulator.model, simulator.data.contact
    robot = np.array([model.body(body).name.startswith(_ROBOT) for body in range(model.nbody)])
    one, other = (robot[model.geom_bodyid[geoms]] for geoms in (contact.geom1, contact.geom2))
    return int((one != other).sum())


def _moment(simulator: Simulator, success: bool, with_images: bool) -> Moment:
    data = simulator.data
    state = (data.time, data.qpos, data.qvel, success)
    moment: Moment = dict(zip(STATE_KEYS, map(np.array, state), strict=True))
    moment |= {key: np.array(value) for key, value in simulator.observe().items()}
    if with_images:
        moment |= simulator.images()
    return moment


def _difference(one: np.ndarray | None, other: np.ndarray | None) -> float | None:
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    if one.tobytes() == other.tobytes():
        return None
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())


def _no_image(cache: Any) -> np.ndarray:
    return np.zeros((1, 1, 3), np.uint8)


_no_image.__modality__ = "image"  # type: ignore[attr-defined]  # robosuite asks a sensor for it
