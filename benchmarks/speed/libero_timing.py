"""One measurement of LIBERO's own environment, or of this package's, in a process of its own.

What `env_throughput.py` starts again and again, so that neither side warms the other:

    python benchmarks/speed/libero_timing.py chunk libero
    python benchmarks/speed/libero_timing.py chunk here

prints one line of JSON. Both sides start at benchmark state 0 of the task as LIBERO's evaluation
does (`seed(0)`, hard reset, `set_init_state`), and take the same actions.
"""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import timing_here
from timing_common import (
    ACTIONS,
    CHUNK,
    CONTROL_STEPS,
    HELD_STEPS,
    IMAGE_SIZE,
    SEED,
    SETTLE_ACTION,
    SETTLE_STEPS,
    hold,
    image_ms,
    import_all,
    random_actions,
    seconds,
)


class Libero:
    """LIBERO's evaluation environment, built, at benchmark state 0 after `start`."""

    def __init__(self, args: argparse.Namespace, cameras: bool = True) -> None:
        from cfgrl_gym.envs.installation import import_libero

        benchmark = import_libero("benchmark").get_benchmark_dict()[args.suite]()
        wrapper = import_libero("envs.env_wrapper")
        self.init_state = benchmark.get_task_init_states(args.task_id)[0]
        bddl = benchmark.get_task_bddl_file_path(args.task_id)
        began = perf_counter()
        if cameras:
            self.env = wrapper.OffScreenRenderEnv(
                bddl_file_name=bddl, camera_heights=IMAGE_SIZE, camera_widths=IMAGE_SIZE
            )
        else:
            self.env = wrapper.ControlEnv(
                bddl_file_name=bddl, use_camera_obs=False, has_offscreen_renderer=False
            )
        self.constructor_s = perf_counter() - began

    def start(self) -> None:
        self.env.seed(SEED)
        self.env.reset()
        self.env.set_init_state(self.init_state)

    def show_cameras(self, shown: bool) -> None:
        for name, observable in self.env.env._observables.items():
            if name.endswith("_image"):
                observable.set_enabled(shown)

    def step_all(self, actions: Any) -> None:
        for action in actions:
            self.env.step(action)


def libero_construct(args: argparse.Namespace) -> dict[str, Any]:
    imports = seconds(import_all)
    libero = Libero(args)
    first = libero.constructor_s + seconds(libero.start)
    other = Libero(args)
    second = other.constructor_s + seconds(other.start)
    return {"imports_s": imports, "first_observation_s": first, "second_observation_s": second}


def libero_chunk(args: argparse.Namespace) -> dict[str, Any]:
    libero = Libero(args)
    libero.start()
    cpu = process_time()
    chunk = seconds(lambda: libero.step_all(random_actions(CHUNK, args.seed)))
    cpu = process_time() - cpu

    def image(camera: str) -> None:
        libero.env.sim.render(width=IMAGE_SIZE, height=IMAGE_SIZE, camera_name=camera)

    return {"chunk_s": chunk, "cpu_per_wall": cpu / chunk, "image_ms": image_ms(image)}


def libero_steps(args: argparse.Namespace) -> dict[str, Any]:
    libero = Libero(args, cameras=False)
    result: dict[str, Any] = {}
    for kind, actions in ACTIONS.items():
        libero.start()
        spent = seconds(functools.partial(libero.step_all, actions(CONTROL_STEPS, args.seed)))
        result[kind] = {"step_ms": 1000 * spent / CONTROL_STEPS}
    return result


def libero_reset(args: argparse.Namespace) -> dict[str, Any]:
    libero = Libero(args)
    libero.start()

    def reset() -> None:
        libero.start()
        libero.step_all([SETTLE_ACTION] * SETTLE_STEPS)

    def reset_seeing_the_end() -> None:
        libero.env.seed(SEED)
        libero.env.reset()
        libero.show_cameras(False)
        libero.env.set_init_state(libero.init_state)
        libero.step_all([SETTLE_ACTION] * (SETTLE_STEPS - 1))
        libero.show_cameras(True)
        libero.step_all([SETTLE_ACTION])

    return {"reset_s": seconds(reset), "reset_seeing_the_end_s": seconds(reset_seeing_the_end)}


def libero_memory(args: argparse.Namespace) -> dict[str, Any]:
    libero = Libero(args)
    libero.start()
    libero.step_all(random_actions(HELD_STEPS, args.seed))
    hold()
    return {}


MEASUREMENTS: dict[tuple[str, str], Callable[[argparse.Namespace], dict[str, Any]]] = {
    ("construct", "libero"): libero_construct,
    ("construct", "here"): timing_here.construct,
    ("chunk", "libero"): libero_chunk,
    ("chunk", "here"): timing_here.chunk,
    ("steps", "libero"): libero_steps,
    ("steps", "here"): timing_here.steps,
    ("reset", "libero"): libero_reset,
    ("reset", "here"): timing_here.reset,
    ("memory", "libero"): libero_memory,
    ("memory", "here"): timing_here.memory,
    ("chunks", "here"): timing_here.chunks,
    ("free_steps", "here"): timing_here.free_steps,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted({what for what, _ in MEASUREMENTS}))
    parser.add_argument("side", choices=("libero", "here"))
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--task-id", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the actions (default: %(default)s)")
    parser.add_argument("--n-envs", type=int, default=1)
    parser.add_argument("--workers", choices=("threads", "processes"), default="threads")
    args = parser.parse_args()
    if (args.what, args.side) not in MEASUREMENTS:
        parser.error(f"{args.what!r} is measured on the other side only")
    with contextlib.redirect_stdout(sys.stderr):  # LIBERO prints
        result = MEASUREMENTS[args.what, args.side](args)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
