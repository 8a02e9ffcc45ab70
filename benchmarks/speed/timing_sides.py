"""One measurement of LIBERO's own environment, or of this package's, in a process of its own.

What `env_throughput.py` starts again and again, so that neither side warms the other:

    python benchmarks/speed/timing_sides.py chunk libero
    python benchmarks/speed/timing_sides.py chunk here

prints one line of JSON. Both sides start at benchmark state 0 of the task as LIBERO's evaluation
does (`seed(0)`, hard reset, `set_init_state`), and take the same actions.
"""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from time import perf_counter, process_time
from typing import Any

import numpy as np
from timing_common import (
    CHUNK,
    IMAGE_SIZE,
    NO_LIMIT,
    PASSES,
    add_task,
    arguments,
    random_actions,
    seconds,
)

CONTROL_STEPS = 100  # of the measurement without images
IMAGES = 15  # of each camera
SETTLE_STEPS = 20
SETTLE_ACTION = np.array([0, 0, 0, 0, 0, 0, -1.0])
SEED = 0  # LIBERO's evaluation seeds its environments so
CAMERAS = ("agentview", "robot0_eye_in_hand")


def actions(kind: str, seed: int) -> np.ndarray:
    """Draw float64 (CONTROL_STEPS, 7): in the air ("free"), or pushing down ("contact")."""
    from cfgrl_gym.envs.exactness import downward_actions

    return (random_actions if kind == "free" else downward_actions)(CONTROL_STEPS, seed)


class Libero:
    """LIBERO's evaluation environment."""

    def __init__(self, args: argparse.Namespace, cameras: bool = True) -> None:
        from cfgrl_gym.envs.installation import import_libero

        benchmark = import_libero("benchmark").get_benchmark_dict()[args.suite]()
        wrapper = import_libero("envs.env_wrapper")
        self._init_state = benchmark.get_task_init_states(args.task_id)[0]
        bddl = benchmark.get_task_bddl_file_path(args.task_id)
        if cameras:
            self.env = wrapper.OffScreenRenderEnv(
                bddl_file_name=bddl, camera_heights=IMAGE_SIZE, camera_widths=IMAGE_SIZE
            )
        else:
            self.env = wrapper.ControlEnv(
                bddl_file_name=bddl, use_camera_obs=False, has_offscreen_renderer=False
            )
        self.start()

    def start(self, with_images: bool = True) -> None:
        self.env.seed(SEED)
        self.env.reset()
        self._show_cameras(with_images)
        self.env.set_init_state(self._init_state)

    def run(self, actions: Sequence[np.ndarray] | np.ndarray) -> None:
        for action in actions:
            self.env.step(action)

    def image(self, camera: str) -> None:
        self.env.sim.render(width=IMAGE_SIZE, height=IMAGE_SIZE, camera_name=camera)

    def steps(self, seed: int) -> dict[str, Any]:
        result = {}
        for kind in ("free", "contact"):
            self.start()
            spent = seconds(functools.partial(self.run, actions(kind, seed)))
            result[kind] = {"step_ms": 1000 * spent / CONTROL_STEPS}
        return result

    def resets(self) -> dict[str, float]:
        def reset() -> None:
            self.start()
            self.run([SETTLE_ACTION] * SETTLE_STEPS)

        def reset_seeing_the_end() -> None:
            self.start(with_images=False)
            self.run([SETTLE_ACTION] * (SETTLE_STEPS - 1))
            self._show_cameras(True)
            self.run([SETTLE_ACTION])

        return {"reset_s": seconds(reset), "reset_seeing_the_end_s": seconds(reset_seeing_the_end)}

    def _show_cameras(self, shown: bool) -> None:
        for name, observable in self.env.env._observables.items():
            if name.endswith("_image"):
                observable.set_enabled(shown)


class Here:
    """This package's environment."""

    def __init__(self, args: argparse.Namespace, cameras: bool = True) -> None:
        import gymnasium as gym

        self.env = gym.make(
            "cfgrl_gym:LiberoChunked-v0",
            suite=args.suite,
            task_id=args.task_id,
            image_size=IMAGE_SIZE,
            max_episode_steps=NO_LIMIT,
            settle_steps=0,
            chunk_size=CHUNK,
        )
        self.start()
        self.simulator: Any = self.env.unwrapped.simulator  # type: ignore[attr-defined]

    def start(self) -> None:
        self.env.reset(options={"init_state_id": 0})

    def run(self, actions: np.ndarray) -> None:
        """Execute a chunk, with images at its end."""
        self.env.step(actions.astype(np.float32))

    def image(self, camera: str) -> None:
        self.simulator.cameras = (camera,)
        self.simulator.images()

    def steps(self, seed: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for kind in ("free", "contact"):
            given = actions(kind, seed)
            self.start()
            replay, contacts = recorded_physics(self.simulator, given)
            rows = []
            for _ in range(PASSES):
                row = {"step_ms": self._step_ms(given, observed=True)}
                row["advance_ms"] = self._step_ms(given, observed=False)
                spent, state = replay()
                row["physics_floor_ms"] = 1000 * spent / len(given)
                row["share_outside"] = 1 - row["physics_floor_ms"] / row["advance_ms"]
                rows.append(row)
            passes = {name: [row[name] for row in rows] for name in rows[0]}
            result[kind] = {name: float(np.median(each)) for name, each in passes.items()} | {
                "passes": passes,
                "contacts_mean": float(np.mean(contacts)),
                "contacts_most": max(contacts),
                "replay_is_exact": bool(np.array_equal(state, self.simulator.state())),
            }
        return result

    def _step_ms(self, actions: np.ndarray, observed: bool) -> float:
        self.start()
        began = perf_counter()
        for action in actions:
            self.simulator.advance(action)
            if observed:
                self.simulator.observe()
        return 1000 * (perf_counter() - began) / len(actions)

    def resets(self) -> dict[str, float]:
        self.env.unwrapped.settle_steps = SETTLE_STEPS  # type: ignore[attr-defined]
        return {"reset_s": seconds(self.start)}


def recorded_physics(simulator: Any, actions: np.ndarray) -> tuple[Callable[[], Any], list[int]]:
    """Record an episode's torques, to replay its physics without anything around them.

    robosuite's own Python controller gives the torques of every substep; MuJoCo's `rollout` steps
    through them, 25 `mj_step` a control step, within one call of C++ on the calling thread.

    :param simulator: reset; the episode is run from there
    :return: a function that gives the seconds of one replay and its last state (time, qpos, qvel),
        and the number of contacts at the end of each control step
    """
    import mujoco
    from mujoco.rollout import Rollout

    env, model, data = simulator.robosuite_env, simulator.model, simulator.data
    kind = mujoco.mjtState.mjSTATE_FULLPHYSICS
    begin = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, begin, kind)
    warmstart = data.qacc_warmstart.copy()
    torques, contacts, step = [], [], env.sim.step

    def recorded_step(*args: Any, **kwargs: Any) -> None:
        torques.append(data.ctrl.copy())
        step(*args, **kwargs)

    env.sim.step = recorded_step
    try:
        for action in actions:
            env.step(action)
            contacts.append(data.ncon)
    finally:
        del env.sim.step
    control, own, rollout = np.array(torques), mujoco.MjData(model), Rollout(nthread=0)

    def replay() -> tuple[float, np.ndarray]:
        began = perf_counter()
        rollout.rollout(model, own, begin, control, initial_warmstart=warmstart)
        spent = perf_counter() - began
        return spent, np.concatenate([[own.time], own.qpos, own.qvel])

    return replay, contacts


# Measurements -------------------------------------------------------------------------------------

Side = type[Libero] | type[Here]
SIDES: dict[str, Side] = {"libero": Libero, "here": Here}


def import_all() -> None:
    """Import what both sides need, so that constructing has nothing left to import."""
    from cfgrl_gym.envs.installation import import_libero
    from cfgrl_gym.wrappers import libero_observation

    import_libero("benchmark")
    import_libero("envs.env_wrapper")
    assert libero_observation


def construct(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    found = {"imports_s": seconds(import_all)}
    kept = []  # alive while the second is made
    for name in ("first_observation_s", "second_observation_s"):
        found[name] = seconds(lambda: kept.append(side(args)))
    return found


def chunk(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    built, given = side(args), random_actions(CHUNK, args.seed)
    cpu = process_time()
    spent = seconds(lambda: built.run(given))
    cpu = process_time() - cpu
    images: dict[str, list[float]] = {camera: [] for camera in CAMERAS}
    for camera in CAMERAS * IMAGES:
        images[camera].append(1000 * seconds(functools.partial(built.image, camera)))
    medians = {camera: float(np.median(times)) for camera, times in images.items()}
    return {"chunk_s": spent, "cpu_per_wall": cpu / spent, "image_ms": medians}


MEASUREMENTS: dict[str, Callable[[Side, argparse.Namespace], dict[str, Any]]] = {
    "construct": construct,
    "chunk": chunk,
    "steps": lambda side, args: side(args, cameras=False).steps(args.seed),
    "reset": lambda side, args: side(args).resets(),
}


def main() -> None:
    parser = arguments(__doc__)
    add_task(parser)
    parser.add_argument("what", choices=MEASUREMENTS)
    parser.add_argument("side", choices=SIDES)
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # LIBERO prints
        result = MEASUREMENTS[args.what](SIDES[args.side], args)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
