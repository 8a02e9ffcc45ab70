"""Check the installation piece by piece, and say how to fix what is wrong.

The exit status is 1 if anything is wrong. With --exactness, the simulator is also compared with
LIBERO's own OffScreenRenderEnv on this machine: the same actions on one task of each suite
(libero_spatial, _object, _goal, _10, _90, and one of LIBERO-PRO), with state, success and
observations compared bit for bit at every step, and some images.

example:
  cfgrl doctor --exactness
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from cfgrl_gym.cli.doctor_checks import CHECKS, EXACTNESS, EXACTNESS_TASKS, Finding

TIMEOUT_S = 180
EXACTNESS_TIMEOUT_S = 900  # a first run compiles models and numba functions as well
PARALLEL = 2


def check(name: str) -> Finding:
    """Run one check in a process of its own, because it may crash or hang.

    :param name: one of CHECKS, or exactness:<suite>
    """
    timeout = EXACTNESS_TIMEOUT_S if name.startswith(EXACTNESS) else TIMEOUT_S
    command = [sys.executable, "-m", "cfgrl_gym.cli.doctor_checks", name]
    # Only warnings and the like are lost: the finding is on stdout.
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
        return Finding(False, f"no answer in {timeout} s", f"run {' '.join(command)}")
    except OSError as error:
        return Finding(False, f"the check can't be started: {error}", "see the message")
    lines = done.stdout.strip().splitlines()
    try:
        return Finding(**json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        said = " ".join(done.stderr.split())[-300:]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        detail = f"the check died with {how}{': ' + said if said else ''}"
        return Finding(False, detail, f"to see it alone, run: {' '.join(command)}")


def run(as_json: bool = False, exactness: bool = False) -> int:
    """Print the findings of all checks, and return 1 if something is broken, else 0.

    :param exactness: also compare the simulator with LIBERO's own, one suite after the other
    """
    names = list(CHECKS)
    if exactness:
        names += [f"{EXACTNESS}:{suite}" for suite in EXACTNESS_TASKS]
    width = max(13, *map(len, names))
    found: dict[str, Finding] = {}
    with ThreadPoolExecutor(PARALLEL) as pool:
        for name, finding in zip(names, pool.map(check, names), strict=True):
            found[name] = finding
            if not as_json:
                mark = "ok     " if finding.ok else "problem"
                print(f"{mark}  {name:<{width}} {finding.detail}", flush=True)
            if not as_json and not finding.ok:
                print(f"{'':9}{'':{width}} fix: {finding.fix}", flush=True)
    broken = sum(not finding.ok for finding in found.values())
    if as_json:
        checks = [{"name": name, **asdict(finding)} for name, finding in found.items()]
        print(json.dumps({"ok": not broken, "checks": checks}, indent=2))
    else:
        print(f"{broken} of {len(found)} checks found a problem" if broken else "all is well")
    return 1 if broken else 0
