"""`cfgrl doctor`: is everything there that the project needs?"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from cfgrl_gym.cli.doctor_checks import CHECKS, EXACTNESS, EXACTNESS_TASKS, Finding

TIMEOUT_S = 180
EXACTNESS_TIMEOUT_S = 900  # a first run compiles models and numba functions as well
PARALLEL = 2


@dataclass(frozen=True)
class Diagnosis:
    """What one check found. `fix` is empty where nothing is wrong."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def check(name: str) -> Diagnosis:
    """Run one check in a process of its own, because what it tries may crash or hang.

    :param name: one of CHECKS, or exactness:<suite>
    """
    timeout = EXACTNESS_TIMEOUT_S if name.startswith(EXACTNESS) else TIMEOUT_S
    command = [sys.executable, "-m", "cfgrl_gym.cli.doctor_checks", name]
    # Only warnings and the like would be lost: the finding comes on stdout.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Diagnosis(name, False, f"no answer in {timeout} s", f"run {' '.join(command)}")
    except OSError as error:
        return Diagnosis(name, False, f"the check can't be started: {error}", "see the message")
    lines = done.stdout.strip().splitlines()
    try:
        finding = Finding(**json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        said = " ".join(done.stderr.split())[-300:]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        detail = f"the check died with {how}{': ' + said if said else ''}"
        return Diagnosis(name, False, detail, f"to see it alone, run: {' '.join(command)}")
    return Diagnosis(name, finding.ok, finding.detail, finding.fix)


def diagnose(names: Sequence[str]) -> Iterator[Diagnosis]:
    """These checks, in their order, as they are done."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        yield from pool.map(check, names)


def run(as_json: bool = False, exactness: bool = False) -> int:
    """Print what was found; returns 1 if something is broken, else 0.

    :param exactness: also compare the simulator with LIBERO's own, a suite after the other
    """
    names = list(CHECKS)
    if exactness:
        names += [f"{EXACTNESS}:{suite}" for suite in EXACTNESS_TASKS]
    width = max(13, *map(len, names))
    found = []
    for diagnosis in diagnose(names):
        found.append(diagnosis)
        if as_json:
            continue
        mark = "ok     " if diagnosis.ok else "problem"
        print(f"{mark}  {diagnosis.name:<{width}} {diagnosis.detail}", flush=True)
        if not diagnosis.ok:
            print(f"{'':9}{'':{width}} fix: {diagnosis.fix}", flush=True)
    ok = all(diagnosis.ok for diagnosis in found)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [asdict(d) for d in found]}, indent=2))
    else:
        broken = sum(not diagnosis.ok for diagnosis in found)
        print("all is well" if ok else f"{broken} of {len(found)} checks found a problem")
    return 0 if ok else 1
