"""A whole suite evaluated twice at once: undisturbed, and killed, interrupted and taken up again.

Both are `cfgrl eval` on all 10 tasks and 50 states of libero_object. One of them is killed after a
third of its episodes (SIGKILL, all of its processes but the workers, which then end themselves),
and gets Ctrl-C after two thirds; `cfgrl eval --resume` goes on each time. Their eval.json must be
equal. Writes <results>/whole_suite.json with the success for each task.

    python benchmarks/study/whole_suite.py    # about 20 minutes on 2 cores
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import write_result
from settings import EVALUATION_SEED, N_ENVS, START, SUITE, new_parser

from cfgrl_gym.cli.evaluations import find_starts
from cfgrl_gym.cli.run_folder import OUTCOMES_FILE, RESULT_FILE


def start(log: Path, *words: str) -> "subprocess.Popen[bytes]":
    """Start `cfgrl eval` as a session of its own, with its output in a file."""
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "cfgrl_gym", "eval", *words],
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def episodes(run: Path) -> int:
    """Count the episodes whose outcomes a run has written."""
    file = run / OUTCOMES_FILE
    return max(0, len(file.read_text().splitlines()) - 1) if file.is_file() else 0


def interrupt(process: "subprocess.Popen[bytes]", run: Path, after: int, number: int) -> int:
    """Send a signal once the run has so many episodes; return how many it has in the end."""
    while episodes(run) < after:
        if process.poll() is not None:
            raise RuntimeError(f"the evaluation ended with status {process.returncode}")
        time.sleep(0.1)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # as a terminal does it
    process.wait()
    return episodes(run)


def finish(process: "subprocess.Popen[bytes]") -> None:
    """Wait for a run's end.

    :raises RuntimeError: it failed
    """
    if process.wait():
        raise RuntimeError(f"the evaluation ended with status {process.returncode}")


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--policy", default=START, help="default: %(default)s")
    add("--episodes", type=int, default=50, help="states of each task (default: %(default)s)")
    add("--n_envs", type=int, default=N_ENVS, help="default: %(default)s")
    add("--out", type=Path, default=Path("runs/whole_suite"), help="default: %(default)s")
    add("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    # A shell's background jobs ignore Ctrl-C, and what they start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options: dict[str, Any] = {
        "policy": args.policy,
        "suite": SUITE,
        "task_id": "all",
        "episodes": args.episodes,
        "n_envs": args.n_envs,
        "cfg_scale": 1.0,
        "video": "false",
        "device": "cpu",
        "seed": EVALUATION_SEED,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    whole, parts = args.out / "whole", args.out / "parts"
    undisturbed = start(args.out / "whole.log", *words, "--out", str(whole))
    disturbed = start(args.out / "parts.log", *words, "--out", str(parts))
    of_all = len(find_starts(SUITE, "all", args.episodes))
    done: list[int] = []
    for share, number in ((1 / 3, signal.SIGKILL), (2 / 3, signal.SIGINT)):
        done.append(interrupt(disturbed, parts, round(share * of_all), number))
        if done[-1] == of_all:
            raise RuntimeError("the evaluation went on to its end, so that nothing was interrupted")
        disturbed = start(args.out / "parts.log", "--resume", str(parts))
    finish(disturbed)
    finish(undisturbed)
    texts = [(run / RESULT_FILE).read_text() for run in (whole, parts)]
    (result,) = json.loads(texts[0])["results"]
    print(f"equal: {texts[0] == texts[1]}; {result['successes']} of {result['n_episodes']}")
    write_result(
        args.results / "whole_suite.json",
        policy=Path(args.policy).name,
        suite=SUITE,
        seed=EVALUATION_SEED,
        equal=texts[0] == texts[1],
        interrupted_after_episodes=done,
        **{name: result[name] for name in ("successes", "n_episodes", "tasks", "episodes")},
    )


if __name__ == "__main__":
    main()
