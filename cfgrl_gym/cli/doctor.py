"""`cfgrl doctor`: is everything there that the project needs?"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from cfgrl_gym.cli.doctor_checks import CHECKS, Finding

TIMEOUT_S = 180
PARALLEL = 2


@dataclass(frozen=True)
class Diagnosis:
    """What one check found. `fix` is empty where nothing is wrong."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def check(name: str) -> Diagnosis:
    """Run one check in a process of its own, because what it tries may crash or hang."""
    command = [sys.executable, "-m", "cfgrl_gym.cli.doctor_checks", name]
    # Only warnings and the like would be lost: the finding comes on stdout.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Diagnosis(name, False, f"no answer in {TIMEOUT_S} s", f"run {' '.join(command)}")
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


def diagnose() -> Iterator[Diagnosis]:
    """All checks, in their order, as they are done."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        yield from pool.map(check, CHECKS)


def run(as_json: bool = False) -> int:
    """Print what was found; returns 1 if something is broken, else 0."""
    found = []
    for diagnosis in diagnose():
        found.append(diagnosis)
        if as_json:
            continue
        mark = "ok     " if diagnosis.ok else "problem"
        print(f"{mark}  {diagnosis.name:<13} {diagnosis.detail}", flush=True)
        if not diagnosis.ok:
            print(f"{'':9}{'':13} fix: {diagnosis.fix}", flush=True)
    ok = all(diagnosis.ok for diagnosis in found)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [asdict(d) for d in found]}, indent=2))
    else:
        broken = sum(not diagnosis.ok for diagnosis in found)
        print("all is well" if ok else f"{broken} of {len(found)} checks found a problem")
    return 0 if ok else 1
