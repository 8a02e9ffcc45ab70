"""Runs a program that uses LIBERO, unchanged, with the fast simulator.

    python -m cfgrl_gym.accelerate SCRIPT.py ARGUMENTS ...
    python -m cfgrl_gym.accelerate -m MODULE ARGUMENTS ...

The Python processes that it starts have it too.
"""

import os
import runpy
import sys
from pathlib import Path

from cfgrl_gym.envs.acceleration import accelerate_libero

CHILDREN = Path(__file__).parent / "accelerated_children"  # has a sitecustomize.py


def main() -> None:
    arguments = sys.argv[1:]
    as_module = arguments[:1] == ["-m"]
    arguments = arguments[as_module:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    path = [str(CHILDREN), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    accelerate_libero()
    sys.argv = arguments
    program = arguments[0]
    if as_module:
        sys.path[0] = os.getcwd()
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    if not Path(program).is_file():
        sys.exit(f"there is no file '{program}'; give the script to run, or -m and a module")
    sys.path[0] = str(Path(program).resolve().parent)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
