"""Implements a scripted pick-and-place expert that reads the simulator's privileged state.

It solves tasks of the form "pick up X and place it in/on Y", as in libero_object. Except for the
grasp it is a function of the current state, so a policy without memory can imitate it.
"""

import numpy as np

from cfgrl_gym.envs.simulator import Simulator

# OSC_POSE (robosuite, controllers/config/osc_pose.json): an action of 1 is 5 cm or 0.5 rad.
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5
OPEN, CLOSE = -1.0, 1.0
MAX_SPEED, MAX_ROTATION = 0.8, 0.3  # of an action
CLOSE_STEPS = 8  # control steps until the fingers hold the object
# Metres.
APPROACH_HEIGHT = 0.10
FUNNEL_RADIUS = 0.03  # the hand descends once its horizontal distance is below this
GRASP_TOLERANCE = 0.012
LIFT_HEIGHT = 0.20
RELEASE_HEIGHT = 0.12  # of the object above the target's origin
RELEASE_RADIUS = 0.02
# An object whose top is further than this above its origin is grasped below its top instead of at
# its origin, which the fingers don't reach: the palm meets the top first (33 mm above the grasp).
TALL = 0.045
GRASP_DEPTH = 0.025


class ExpertUnavailableError(ValueError):
    """Raised when a task is not a pick-and-place that the scripted expert knows."""


def _rotation_error(target: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Return the rotation vector (3,) from `current` to `target` (3, 3), in the world frame."""
    delta = target @ current.T
    vector = np.array(
        [delta[2, 1] - delta[1, 2], delta[0, 2] - delta[2, 0], delta[1, 0] - delta[0, 1]]
    )
    sine = np.linalg.norm(vector) / 2
    angle = np.arctan2(sine, (np.trace(delta) - 1) / 2)
    return vector / 2 * (angle / sine if sine > 1e-8 else 1.0)


def _pick_and_place(simulator: Simulator) -> tuple[str, str, str, str]:
    """Return the goal's relation, object and place, and the object that the place belongs to.

    :raises ExpertUnavailableError: the goal is of another kind
    """
    env = simulator.robosuite_env
    goals = env.parsed_problem["goal_state"]
    if len(goals) != 1 or goals[0][0] not in ("in", "on") or goals[0][1] not in env.objects_dict:
        raise ExpertUnavailableError(
            f"the scripted expert picks and places one object; the goal of "
            f"{simulator.task.name!r} is {goals}; choose a task such as those of libero_object"
        )
    relation, named, place = goals[0]
    site = env.object_sites_dict.get(place)
    target = site.parent_name if site is not None else place
    if target not in env.obj_body_id:
        raise ExpertUnavailableError(
            f"the scripted expert can't place on {place!r}; choose a task such as those of "
            "libero_object"
        )
    return relation, named, place, target


def movable_objects(simulator: Simulator) -> list[str]:
    """Return LIBERO's names of the objects that the expert may pick: the goal's, then the others
    of the scene but the target.

    :raises ExpertUnavailableError: the task is not a pick-and-place
    """
    _, named, _, target = _pick_and_place(simulator)
    others = simulator.robosuite_env.objects_dict
    return [named, *(name for name in others if name not in (named, target))]


def object_in_place(simulator: Simulator, name: str) -> bool:
    """Return whether an object is in or on the goal's target, by LIBERO's own predicate.

    :param name: one of `movable_objects`; for the goal's, this is the task's success
    :raises ExpertUnavailableError: the task is not a pick-and-place
    """
    relation, _, place, _ = _pick_and_place(simulator)
    return bool(simulator.robosuite_env._eval_predicate([relation, name, place]))


class PickPlaceExpert:
    """Acts in a `Simulator` whose goal is to put one movable object in or on another.

    :param simulator: the simulator, after a reset
    :param orientation: rotation matrix (3, 3) that the hand keeps; None: the present one
    :param chosen: LIBERO's name of the object to pick, such as "milk_1", one of
        `movable_objects`; it is placed where the goal's object should go. None: the goal's
    :raises ExpertUnavailableError: the goal is of another kind, or the scene has no such object
    """

    def __init__(
        self,
        simulator: Simulator,
        orientation: np.ndarray | None = None,
        chosen: str | None = None,
    ) -> None:
        self._simulator = simulator
        _, named, _, target = _pick_and_place(simulator)
        movable = movable_objects(simulator)
        if chosen is not None and chosen not in movable:
            raise ExpertUnavailableError(
                f"the scripted expert can't pick {chosen!r} in {simulator.task.name!r}; it "
                f"can pick {', '.join(movable)}"
            )
        self.object, self._target = chosen or named, target
        self.orientation = self._hand_orientation() if orientation is None else orientation
        top = self._top()
        self._grasp_height = top - GRASP_DEPTH if top > TALL else 0.0  # above the object's origin
        self._closing = 0
        self._carrying = False
        self._released = False

    def _body(self, name: str) -> np.ndarray:
        env = self._simulator.robosuite_env
        return env.sim.data.body_xpos[env.obj_body_id[name]].copy()

    def _top(self) -> float:
        """Return how far the object's highest point is above its origin now, in metres."""
        model, data = self._simulator.model, self._simulator.data
        body = self._simulator.robosuite_env.obj_body_id[self.object]
        solid = (model.geom_bodyid == body) & (model.geom_contype != 0)
        upward = data.geom_xmat[solid].reshape(-1, 3, 3)[:, 2]  # (n, 3), the world's z in each
        centre, half_size = model.geom_aabb[solid, :3], model.geom_aabb[solid, 3:]
        tops = data.geom_xpos[solid, 2] + (upward * centre + np.abs(upward) * half_size).sum(1)
        return float(tops.max(initial=data.xpos[body, 2]) - data.xpos[body, 2])

    def _hand(self) -> np.ndarray:
        env = self._simulator.robosuite_env
        return env.sim.data.site_xpos[env.robots[0].eef_site_id].copy()

    def _hand_orientation(self) -> np.ndarray:
        env = self._simulator.robosuite_env
        return env.sim.data.site_xmat[env.robots[0].eef_site_id].reshape(3, 3).copy()

    @property
    def reaching(self) -> bool:
        """Return whether the fingers haven't begun to close yet."""
        return not self._closing

    def act(self) -> np.ndarray:
        """Choose the next action, float64 (7,)."""
        hand, thing, target = self._hand(), self._body(self.object), self._body(self._target)
        grasp = thing + np.array([0, 0, self._grasp_height])
        grip = OPEN
        if self._released:
            goal = hand + np.array([0, 0, 0.05])
        elif not self._carrying:
            goal = grasp.copy()
            distance = np.linalg.norm((goal - hand)[:2])
            # A funnel: first move above the object, then straight down.
            goal[2] += APPROACH_HEIGHT * np.clip((distance - 0.01) / FUNNEL_RADIUS, 0, 1)
            if self._closing or np.abs(grasp - hand).max() < GRASP_TOLERANCE:
                self._closing += 1
                grip = CLOSE
                goal = hand
                self._carrying = self._closing > CLOSE_STEPS
        if self._carrying and not self._released:
            grip = CLOSE
            # A tall object hangs as much lower from the hand.
            height = target[2] + LIFT_HEIGHT + self._grasp_height
            release = target[2] + RELEASE_HEIGHT + self._grasp_height
            offset = thing - hand
            away = np.linalg.norm((target - thing)[:2])
            goal = target - offset
            goal[2] = height if away > RELEASE_RADIUS else release
            if away > 0.10 and hand[2] < height - 0.05:
                goal[:2] = hand[:2]  # up before across
            if away <= RELEASE_RADIUS and hand[2] - goal[2] < 0.02:
                self._released, grip = True, OPEN
        move = np.clip((goal - hand) / POSITION_SCALE, -MAX_SPEED, MAX_SPEED)
        turn = _rotation_error(self.orientation, self._hand_orientation()) / ROTATION_SCALE
        turn = np.clip(turn, -MAX_ROTATION, MAX_ROTATION)
        return np.concatenate([move, turn, [grip]])
