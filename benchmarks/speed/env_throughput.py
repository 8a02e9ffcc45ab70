"""How fast LIBERO is here, beside LIBERO's own `OffScreenRenderEnv` doing the same actions.

Every measurement runs in a fresh process (`timing_sides.py`), the two sides in turns. Writes every
single value, medians and the ratios against their goals to <out>, and prints a table. Several
environments at once, and their memory, are `vec_envs.py`'s subject.

    python benchmarks/speed/env_throughput.py --help
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from timing_common import IMAGE_SIZE, add_task, arguments, write_timing
from tqdm import tqdm

from cfgrl_gym.envs.compiled_models import CACHE_VARIABLE
from cfgrl_gym.envs.render_backend import choose_backend

SCRIPTS = Path(__file__).parent
SIDES = ("libero", "here")
COLD = "construct cold/here"
Row = dict[str, Any]


def plan(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """List the key and the command of every measurement, in order."""
    task = [f"--suite={args.suite}", f"--task-id={args.task_id}", f"--seed={args.seed}"]

    def here(what: str, side: str) -> list[str]:
        return [sys.executable, str(SCRIPTS / "timing_sides.py"), what, side, *task]

    # Not counted: fills the caches of compiled models, of numba, and of the file system.
    jobs = [(f"warm-up/{side}", here("construct", side)) for side in SIDES]
    for repeat in range(args.repeats):
        for what in ("chunk", "steps", "reset", "construct"):
            turns = SIDES if repeat % 2 == 0 else SIDES[::-1]
            jobs += [(f"{what}/{side}", here(what, side)) for side in turns]
        jobs.append((COLD, here("construct", "here")))
        if args.lerobot_python:
            lerobot = [args.lerobot_python, str(SCRIPTS / "lerobot_env.py"), *task]
            jobs += [("lerobot", lerobot), ("lerobot soft", [*lerobot, "--soft-reset"])]
    return jobs


def run(key: str, command: list[str]) -> dict[str, Any]:
    """Run a command and return what it prints; `COLD` starts with an empty cache of models."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ({CACHE_VARIABLE: folder} if key == COLD else {})
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
        )
    if done.returncode:
        raise RuntimeError(f"{key} failed:\n{done.stderr[-3000:]}")
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


class Values(dict[str, list[dict[str, Any]]]):
    """What the processes printed, for each kind of measurement a list of its repetitions."""

    def median(self, path: str) -> float:
        """Return a value's median over repetitions: "<key of the measurement>:<name>:<name>..."."""
        key, *names = path.split(":")
        found: list[Any] = self[key]
        for name in names:
            found = [value[name] for value in found]
        return median(found)

    def row(self, what: str, unit: str, other: str | None, here: str, goal: float = 0) -> Row:
        """Make a row of the table: two medians, of which less is better, and their ratio."""
        mine = self.median(here)
        row: Row = {"what": what, "unit": unit, "other": None, "here": mine, "ratio": None}
        if other is not None:
            row |= {"other": self.median(other), "ratio": self.median(other) / mine}
            row |= {"goal": f">= {goal:g}x", "met": row["ratio"] >= goal} if goal else {}
        return row


def rows(values: Values) -> list[Row]:
    def pair(what: str, unit: str, measured: str, name: str, goal: float = 0) -> Row:
        return values.row(what, unit, *(f"{measured}/{side}:{name}" for side in SIDES), goal=goal)

    table = [pair("50-step chunk, both images at its end", "s", "chunk", "chunk_s", 20)]
    for kind, name in (("free", "random actions"), ("contact", "random, pushing down")):
        steps = f"steps/here:{kind}:"
        share = values.row("  share outside the physics", "", None, steps + "share_outside")
        table += [
            pair(f"control step with observation, {name}", "ms", "steps", f"{kind}:step_ms", 4),
            values.row("  without observation", "ms", None, steps + "advance_ms"),
            values.row("  of this, physics alone", "ms", None, steps + "physics_floor_ms"),
            share | {"goal": "< 1/3", "met": share["here"] < 1 / 3},
        ]
    first, seeing_the_end = "first_observation_s", "reset/libero:reset_seeing_the_end_s"
    return [
        *table,
        pair("reset and 20 settle steps", "s", "reset", "reset_s", 10),
        values.row("  LIBERO rendering at the end only", "s", seeing_the_end, "reset/here:reset_s"),
        pair("construction to first observation", "s", "construct", first, 3),
        pair("  of another one in the same process", "s", "construct", "second_observation_s"),
        pair("  imports before that", "s", "construct", "imports_s"),
        values.row(
            "  with an empty model cache", "s", f"construct/libero:{first}", f"{COLD}:{first}"
        ),
        *(
            pair(f"image of {camera}", "ms", "chunk", f"image_ms:{camera}")
            for camera in ("agentview", "robot0_eye_in_hand")
        ),
    ]


def lerobot_rows(values: Values) -> list[Row]:
    return [
        values.row(f"{what}, {name}", "s", f"{key}:{measured}", f"{here}:{measured}")
        for key, name in (("lerobot", "hard resets"), ("lerobot soft", "soft resets"))
        for what, measured, here in (
            ("50 steps with images", "chunk_s", "chunk/here"),
            ("reset and 20 settle steps", "reset_s", "reset/here"),
            ("construction to first observation", "first_observation_s", "construct/here"),
        )
    ]


def print_rows(title: str, other: str, rows: list[Row]) -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    table = Table("what", other, "here", "ratio", "goal", "met", title=title)
    for row in rows:
        met = {True: "yes", False: "NO", None: ""}[row.get("met")]
        what = f"{row['what']} ({row['unit']})" if row["unit"] else row["what"]
        values = (number(row[name]) for name in ("other", "here", "ratio"))
        table.add_row(what, *values, row.get("goal", ""), met)
    Console(width=100).print(table)


def main() -> None:
    parser = arguments(__doc__, "env_throughput.json")
    add_task(parser)
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (%(default)s)")
    parser.add_argument(
        "--lerobot-python",
        help="the python of another environment in which LeRobot is installed; its LiberoEnv is "
        "then timed too (lerobot_env.py says how to install it)",
    )
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    choose_backend()  # the same for all processes
    values = Values()
    load = os.getloadavg()
    with tqdm(plan(args), unit="run") as bar:
        for key, command in bar:
            bar.set_description(key.ljust(20))
            values.setdefault(key, []).append(run(key, command))
    table = rows(values)
    beside = lerobot_rows(values) if args.lerobot_python else []
    if args.lerobot_python:  # a place on this machine
        sys.argv = [word.replace(args.lerobot_python, "LEROBOT_PYTHON") for word in sys.argv]
    write_timing(
        args.out,
        suite=args.suite,
        task_id=args.task_id,
        image_size=IMAGE_SIZE,
        load_average_before=load,
        table=table,
        lerobot_table=beside,
        repetitions=values,
    )
    task = f"{args.suite} task {args.task_id}, {IMAGE_SIZE} px, {args.repeats} repetitions"
    print_rows(f"{task}: medians", "LIBERO", table)
    if beside:
        print_rows("LeRobot's LiberoEnv", "LeRobot", beside)


if __name__ == "__main__":
    main()
