"""What it costs and saves that OpenMP's threads sleep while they wait (OMP_WAIT_POLICY=PASSIVE).

    python benchmarks/speed/passive_waiting.py    # on cores that have nothing else to do

By default they spin for a while after each operation, which is quicker where nothing else wants
the core. Processes with the default and with PASSIVE take turns; each makes CFGRL's update of the
tiny PI0 and acts with it, first alone, then beside a process for each core that never waits, as
simulators of a training do. Seconds are of the clock, processor seconds of the process itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from typing import Any

from timing_common import arguments, write_timing

POLICIES = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
BUSY = "while True: pass"
ACTS, BATCH = 5, 8


def work() -> dict[str, dict[str, float]]:
    """Seconds and processor seconds of an epoch of updates, and of acting, in this process."""
    from pi0_timing import make_observation, make_policy
    from update_cost import Update

    policy = make_policy("tiny", "cpu", 0)
    policy.set_training_mode(True)
    args = Namespace(windows=64, step=32, micro_batch=32, seed=0, size="tiny")
    update = Update(policy, args, kept=True)
    update.act()
    observation = make_observation(policy, BATCH, 0)

    def act() -> None:
        for _ in range(ACTS):
            policy.predict(observation)

    def epochs() -> None:
        policy.set_training_mode(True)
        update.epoch("update")

    found = {}
    for name, part in (("update", epochs), ("act", act)):
        part()  # warm
        began, spent = time.perf_counter(), time.process_time()
        part()
        found[name] = {
            "seconds": time.perf_counter() - began,
            "processor_seconds": time.process_time() - spent,
        }
    return found


def measure(policy: str) -> dict[str, dict[str, float]]:
    """`work` in a process whose threads wait so; OpenMP reads the variable when it is loaded."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, __file__, "--work"],
        env=kept | POLICIES[policy],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(busy: int, turns: int) -> dict[str, Any]:
    """Both policies in turns, beside so many busy processes."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    runs: dict[str, list[Any]] = {name: [] for name in POLICIES}
    try:
        for turn in range(turns):
            for name in list(POLICIES)[:: 1 if turn % 2 else -1]:
                runs[name].append(measure(name))
                print(busy, name, runs[name][-1], flush=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    medians = {
        name: {
            part: {
                clock: statistics.median(one[part][clock] for one in runs[name])
                for clock in ("seconds", "processor_seconds")
            }
            for part in ("update", "act")
        }
        for name in POLICIES
    }
    ratios = {
        f"{part}_{clock}": medians["passive"][part][clock] / medians["default"][part][clock]
        for part in ("update", "act")
        for clock in ("seconds", "processor_seconds")
    }
    return {"busy": busy, "medians": medians, "passive_to_default": ratios, "runs": runs}


def main() -> None:
    parser = arguments(__doc__, "passive_waiting.json")
    parser.add_argument("--turns", type=int, default=5, help="of each policy (%(default)s)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work()))
        return
    load = os.getloadavg()
    compared = [compare(busy, args.turns) for busy in (0, len(os.sched_getaffinity(0)))]
    write_timing(args.out, load_average_before=load, compared=compared)


if __name__ == "__main__":
    main()
