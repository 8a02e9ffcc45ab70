"""Where the time of a LIBERO chunk goes, and what MuJoCo alone would take.

Times every part of `FastSimulator` on one task, on one core if the machine is otherwise idle, and
beside it the physical limit: 25 `mj_step` calls a control step, replayed with the same
torques. docs/performance.md quotes the result; the share of time outside MuJoCo, measured pass by
pass, is in the result of env_throughput.py.

    python benchmarks/speed/profile_chunk.py
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import mujoco
from timing_common import PASSES, downward_actions
from timing_here import recorded_physics

from cfgrl_gym.cli.run_folder import versions
from cfgrl_gym.envs import control_loop, rendering
from cfgrl_gym.envs.fast_simulator import FastSimulator
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.rendering import QUALITIES

CHUNK = 50
SUBSTEPS = 25


class Stopwatch:
    """Seconds spent in wrapped functions, call by call."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def wrap(self, owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            result = function(*args, **kwargs)
            self.seconds[label].append(perf_counter() - began)
            return result

        setattr(owner, name, timed)

    def time(self, label: str, function: Callable[[], Any], times: int) -> None:
        for _ in range(times):
            began = perf_counter()
            function()
            self.seconds[label].append(perf_counter() - began)


def profile(env: LiberoEnv, steps: int, images: int, seed: int) -> dict[str, list[float]]:
    watch = Stopwatch()
    simulator = env.simulator
    assert isinstance(simulator, FastSimulator)
    given = downward_actions(steps, seed)
    env.reset(options={"init_state_id": 0})
    replay, _ = recorded_physics(simulator, given)
    watch.seconds["25 mj_step"] = [replay()[0] / steps for _ in range(PASSES)]

    controller = simulator.robosuite_env.robots[0].controller
    controller.update(force=True)
    matrices = (controller.mass_matrix, controller.J_full, controller.J_pos, controller.J_ori)
    from robosuite.utils.control_utils import opspace_matrices

    def inversions() -> None:
        for _ in range(SUBSTEPS):
            opspace_matrices(*matrices)

    watch.time("25 opspace_matrices", inversions, steps)

    env.reset(options={"init_state_id": 0})
    # Afresh for every part, since a timed function costs its caller a little.
    for owner, name, label in (
        (simulator, "advance", "control step"),
        (control_loop, "_run", "control step: physics and controller, compiled"),
        (simulator._loop, "advance", "control step: the same and the goal"),
        (simulator.robosuite_env, "_post_action", "control step: LIBERO's reward and objects"),
        (simulator.robosuite_env, "_check_success", "control step: LIBERO's success, each time"),
    ):
        original = getattr(owner, name)
        watch.wrap(owner, name, label)
        for action in given:
            simulator.advance(action)
        setattr(owner, name, original)

    watch.time("observation: poses and robosuite's observables", lambda: observed(simulator), steps)
    for camera in simulator.cameras:
        simulator.cameras = (camera,)
        for quality in QUALITIES:
            simulator._quality = quality
            simulator.images()  # the first one makes the context
            kind = "image" if quality == "benchmark" else f"{quality} image"
            watch.time(f"{kind}: {camera}", simulator.images, images)
    simulator._quality = "benchmark"
    for name in ("mjv_updateScene", "mjr_render", "mjr_readPixels"):
        original = getattr(mujoco, name)
        watch.wrap(mujoco, name, f"image: {camera}: {name}")
        for _ in range(images):
            simulator.images()
        setattr(mujoco, name, original)
    return watch.seconds


def observed(simulator: FastSimulator) -> None:
    simulator._measured_is_current = False
    simulator.observe()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--task_id", type=int, default=0)
    parser.add_argument("--image_size", type=int, default=224, help="pixels (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="control steps (%(default)s)")
    parser.add_argument("--images", type=int, default=30, help="of each camera (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the actions (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/profile_chunk.json"))
    args = parser.parse_args()
    env = LiberoEnv(args.suite, args.task_id, args.image_size, max_episode_steps=10**6)
    env.reset(options={"init_state_id": 0})
    seconds = profile(env, args.steps, args.images, args.seed)
    contacts = env.simulator.data.ncon
    env.close()

    median = {label: statistics.median(values) * 1e3 for label, values in seconds.items()}
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "versions": versions(),
        "cores": rendering.processors(),
        "contacts at the end": contacts,
        "median_ms": median,
        "seconds": seconds,
    }
    args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
