"""How fast LIBERO is here, beside LIBERO's own `OffScreenRenderEnv` doing the same actions.

Every measurement runs in a fresh process (`libero_timing.py`), the two sides in turns. Writes every
single value, medians and the ratios against their goals to <out>, and prints a table.

    python benchmarks/speed/env_throughput.py --help
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from throughput_table import (
    Values,
    ladder,
    lerobot_rows,
    number,
    print_rows,
    print_table,
    rows,
    scaling,
)
from timing_common import (
    CONTROL_STEPS,
    FREE_STEPS,
    IMAGE_SIZE,
    MEMORY_ENVS,
    SIDES,
    proportional_set_mib,
)
from tqdm import tqdm

from cfgrl_gym.cli.run_folder import versions
from cfgrl_gym.envs.compiled_models import CACHE_VARIABLE
from cfgrl_gym.envs.render_backend import choose_backend
from cfgrl_gym.envs.rendering import processors

SCRIPTS = Path(__file__).parent
SPARE_MIB = 3000  # of memory, that is left to others
ONE_CORE = {"LP_NUM_THREADS": "0"}  # Mesa's software renderer without threads of its own
MORE_PACKAGES = ("numba", "llvmlite", "scipy", "PyOpenGL")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", default="libero_object")
    add("--task-id", type=int, default=0)
    add("--repeats", type=int, default=3, help="of each measurement (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the actions (default: %(default)s)")
    add("--out", type=Path, default=Path("benchmarks/results/env_throughput.json"))
    add(
        "--lerobot-python",
        help="the python of another environment in which LeRobot is installed; its LiberoEnv is "
        "then timed too (lerobot_env.py says how to install it)",
    )
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    return args


class Measurements:
    """Runs measurements in processes of their own and keeps what they print."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._of_one = 0.0  # MiB of a process with one of LIBERO's environments
        self.values = Values()

    def _task(self) -> list[str]:
        args = self._args
        values = ("--suite", args.suite, "--task-id", args.task_id, "--seed", args.seed)
        return [str(value) for value in values]

    def _command(self, *arguments: object) -> list[str]:
        timing = [sys.executable, str(SCRIPTS / "libero_timing.py")]
        return [*timing, *map(str, arguments), *self._task()]

    def run(self, key: str, *arguments: object, **environment: str) -> None:
        self._run(key, self._command(*arguments), environment)

    def lerobot(self, key: str, *arguments: str) -> None:
        script = str(SCRIPTS / "lerobot_env.py")
        self._run(key, [self._args.lerobot_python, script, *arguments, *self._task()], {})

    def _run(self, key: str, command: list[str], environment: dict[str, str]) -> None:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise RuntimeError(f"{key} failed:\n{done.stderr[-3000:]}")
        self.values.setdefault(key, []).append(json.loads(done.stdout.splitlines()[-1]))

    def cold(self) -> None:
        """The construction with an empty cache of compiled models."""
        with tempfile.TemporaryDirectory() as folder:
            self.run("construct cold/here", "construct", "here", **{CACHE_VARIABLE: folder})

    def memory_libero(self, key: str) -> None:
        """LIBERO's environments, a process each."""
        command = self._command("memory", "libero")
        with contextlib.ExitStack() as stack:
            trees = [_ready(stack.enter_context(_held(command)))]
            self._of_one = sum(proportional_set_mib(trees[0]))
            count = self._room()
            others = [stack.enter_context(_held(command)) for _ in range(count - 1)]
            trees += map(_ready, others)
            self._keep_memory(key, count, trees)

    def memory_here(self, key: str, workers: str) -> None:
        """This package's environments, in threads of one process or in processes."""
        count = MEMORY_ENVS if workers == "threads" else self._room()
        command = self._command("memory", "here", "--n-envs", count, "--workers", workers)
        with _held(command) as process:
            self._keep_memory(key, count, [_ready(process)])

    def _room(self) -> int:
        """How many environments in processes the memory has room for: all, else half."""
        enough = MEMORY_ENVS * self._of_one <= available_mib() - SPARE_MIB
        return MEMORY_ENVS if enough else MEMORY_ENVS // 2

    def _keep_memory(self, key: str, count: int, trees: list[list[int]]) -> None:
        sizes = proportional_set_mib([pid for tree in trees for pid in tree])
        value = {"environments": count, "pss_mib": sum(sizes), "processes_mib": sizes}
        self.values.setdefault(key, []).append(value)


@contextlib.contextmanager
def _held(command: list[str]) -> Any:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()  # it waits for that
        process.stdout.read()
        process.wait()


def _ready(process: Any) -> list[int]:
    for line in process.stdout:
        if line.startswith('{"ready"'):
            pids: list[int] = json.loads(line)["ready"]
            return pids
    raise RuntimeError(f"{' '.join(process.args)} ended early; run it to see why")


def available_mib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable"))


# What is done -----------------------------------------------------------------------------------


def plan(args: argparse.Namespace, measured: Measurements) -> list[tuple[str, Callable[[], None]]]:
    """All that is measured, in the order in which it is run."""
    jobs: list[tuple[str, Callable[[], None]]] = []

    def add(work: Callable[..., None], key: str, *arguments: object, **more: Any) -> None:
        jobs.append((key, lambda: work(key, *arguments, **more)))

    # Not counted: fills the caches of compiled models, of numba, and of the file system.
    for side in SIDES:
        add(measured.run, f"warm-up/{side}", "construct", side)
    for repeat in range(args.repeats):
        for what in ("chunk", "steps", "reset", "construct"):
            for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                add(measured.run, f"{what}/{side}", what, side)
        jobs.append(("construct cold/here", measured.cold))
        for key, arguments in ladder():
            add(measured.run, key, *arguments)
            # All of them once, and each time those that the table compares.
            compared = key in ("chunks 1 threads", "chunks 2 threads")
            if arguments[0] == "chunks" and (repeat == 0 or compared):
                add(measured.run, f"{key}, one core", *arguments, **ONE_CORE)
        if args.lerobot_python:
            add(measured.lerobot, "lerobot")
            add(measured.lerobot, "lerobot soft", "--soft-reset")
    add(measured.memory_libero, "memory/libero")
    for workers in ("threads", "processes"):
        add(measured.memory_here, f"memory {workers}/here", workers)
    return jobs


def machine(measured: Measurements) -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text()
    models = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    warm_up = measured.values["warm-up/here"][0]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": models[0] if models else "unknown",
        "cores": processors(),
        "memory_gib": round(pages / 2**30, 1),
        "gl_backend": os.environ["MUJOCO_GL"],
        "gl_renderer": warm_up["gl_renderer"],
        "load_average_after": os.getloadavg(),
    }


def recorded_versions() -> dict[str, Any]:
    """Without what would name places on this machine."""
    found = versions()
    del found["command_line"]
    for name in MORE_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["packages"][name] = importlib.metadata.version(name)
    return found


def main() -> None:
    args = parse()
    choose_backend()  # the same for all processes
    measured = Measurements(args)
    began, load, started = perf_counter(), os.getloadavg(), datetime.now().astimezone()
    with tqdm(plan(args, measured), unit="run") as bar:
        for name, work in bar:
            bar.set_description(name.ljust(30))
            work()
    table, rungs = rows(measured.values), scaling(measured.values)
    beside = lerobot_rows(measured.values) if args.lerobot_python else []

    command = ["python", *sys.argv]
    if args.lerobot_python:
        command = [word.replace(args.lerobot_python, "LEROBOT_PYTHON") for word in command]
    shown = {"suite": args.suite, "task_id": args.task_id, "repeats": args.repeats}
    result = {
        "command": " ".join(command),
        **recorded_versions(),
        "started": started.isoformat(timespec="seconds"),
        "machine": machine(measured) | {"load_average_before": load},
        "seed": args.seed,
        "arguments": shown
        | {"image_size": IMAGE_SIZE, "control_steps": CONTROL_STEPS, "free_steps": FREE_STEPS},
        "seconds": round(perf_counter() - began, 1),
        "table": [asdict(row) for row in table],
        "scaling": rungs,
        "lerobot_table": [asdict(row) for row in beside],
        "repetitions": measured.values,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    task = f"{args.suite} task {args.task_id}, {IMAGE_SIZE} px, {args.repeats} repetitions"
    print_rows(f"{task}: medians", "LIBERO", table)
    lines = [
        [
            rung["what"],
            number(rung["per_s"]),
            f"{rung['to_one']:.2f}x",
            f"{rung['cpu_per_wall']:.2f}",
        ]
        for rung in rungs
    ]
    head = ["here, all environments together", "a second", "to one", "CPU s / s"]
    print_table(f"{processors()} cores", head, lines)
    if beside:
        print_rows("LeRobot's LiberoEnv", "LeRobot", beside)
    print(f"\n{result['seconds']:.0f} s; every value in {args.out}")


if __name__ == "__main__":
    main()
