"""Where the time of a LIBERO chunk goes, and what MuJoCo alone would take.

Times every part of `FastSimulator` on one task, on one core if the machine is otherwise idle, and
beside it the physical limit: 25 `mj_step` calls a control step, replayed with the same
torques. docs/performance.md quotes the result; the share of time outside MuJoCo, measured pass by
pass, is in the result of env_throughput.py.

    python benchmarks/speed/profile_chunk.py
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any
from unittest.mock import patch

import mujoco
from timing_common import CHUNK, NO_LIMIT, PASSES, add_task, arguments, seconds, write_timing
from timing_sides import recorded_physics

from cfgrl_gym.envs import control_loop
from cfgrl_gym.envs.exactness import downward_actions
from cfgrl_gym.envs.fast_simulator import FastSimulator
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.rendering import QUALITIES

SUBSTEPS = 25


@contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Note the seconds of every call of a function within the block."""
    function, spent = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        began = perf_counter()
        result = function(*args, **kwargs)
        spent.append(perf_counter() - began)
        return result

    with patch.object(owner, name, call):
        yield spent


def profile(env: LiberoEnv, steps: int, images: int, seed: int) -> dict[str, list[float]]:
    from robosuite.utils.control_utils import opspace_matrices

    simulator = env.simulator
    assert isinstance(simulator, FastSimulator)
    given = downward_actions(steps, seed)
    env.reset(options={"init_state_id": 0})
    replay, _ = recorded_physics(simulator, given)
    found = {"25 mj_step": [replay()[0] / steps for _ in range(PASSES)]}

    controller = simulator.robosuite_env.robots[0].controller
    controller.update(force=True)
    matrices = (controller.mass_matrix, controller.J_full, controller.J_pos, controller.J_ori)

    def inversions() -> None:
        for _ in range(SUBSTEPS):
            opspace_matrices(*matrices)

    found["25 opspace_matrices"] = [seconds(inversions) for _ in range(steps)]

    env.reset(options={"init_state_id": 0})
    # Afresh for every part, since a timed function costs its caller a little.
    for owner, name, label in (
        (simulator, "advance", "control step"),
        (control_loop, "_run", "control step: physics and controller, compiled"),
        (control_loop.ControlLoop, "advance", "control step: the same and the goal"),
        (simulator.robosuite_env, "_post_action", "control step: LIBERO's reward and objects"),
        (simulator.robosuite_env, "_check_success", "control step: LIBERO's success, each time"),
        (simulator, "observe", "observation: poses and robosuite's observables"),
    ):
        with timed(owner, name) as found[label]:
            for action in given:
                simulator.advance(action)
                if name == "observe":
                    simulator.observe()

    for camera in simulator.cameras:
        simulator.cameras = (camera,)
        for quality in QUALITIES:
            simulator.quality = quality
            simulator.images()  # the first one makes the context
            kind = "image" if quality == "benchmark" else f"{quality} image"
            found[f"{kind}: {camera}"] = [seconds(simulator.images) for _ in range(images)]
    simulator.quality = "benchmark"
    for name in ("mjv_updateScene", "mjr_render", "mjr_readPixels"):
        with timed(mujoco, name) as found[f"image: {camera}: {name}"]:
            for _ in range(images):
                simulator.images()
    return found


def main() -> None:
    parser = arguments(__doc__, "profile_chunk.json")
    add_task(parser)
    parser.add_argument("--image_size", type=int, default=224, help="pixels (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="control steps (%(default)s)")
    parser.add_argument("--images", type=int, default=30, help="of each camera (%(default)s)")
    args = parser.parse_args()
    env = LiberoEnv(args.suite, args.task_id, args.image_size, max_episode_steps=NO_LIMIT)
    env.reset(options={"init_state_id": 0})
    spent = profile(env, args.steps, args.images, args.seed)
    contacts = env.simulator.data.ncon
    env.close()

    median = {label: statistics.median(values) * 1e3 for label, values in spent.items()}
    median["chunk: 50 control steps, an observation, two images"] = (
        CHUNK * median["control step"]
        + median["observation: poses and robosuite's observables"]
        + sum(
            ms
            for label, ms in median.items()
            if label.startswith("image:") and label.count(":") < 2
        )
    )
    print(f"{'median ms':>10}")
    for label, ms in median.items():
        print(f"{ms:10.3f}  {label}")
    write_timing(args.out, contacts_at_the_end=contacts, median_ms=median, seconds=spent)


if __name__ == "__main__":
    main()
