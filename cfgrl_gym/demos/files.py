"""Reads and writes LIBERO's demonstrations: HDF5 with `data/demo_*/{actions, states, obs/...}`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cfgrl_gym.envs.installation import LiberoNotInstalledError
from cfgrl_gym.envs.suites import available_suites, load_tasks, read_instruction
from cfgrl_gym.whole_files import whole_file

# Vectors in obs/, with their width, and images.
_OBS_KEYS = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}
_IMAGE_KEYS = ("agentview_rgb", "eye_in_hand_rgb")
# Which rows of the images were rendered; written only where some were not (see `record`).
RENDERED_KEY = "images_rendered"


class DemonstrationFileError(ValueError):
    """Raised for a file that is not a readable demonstration file in LIBERO's format."""


@dataclass(frozen=True)
class Demonstration:
    """Holds an episode of T control steps; each row has an action and the observation before it."""

    actions: np.ndarray  # (T, 7) in [-1, 1]
    states: np.ndarray  # (T, 1 + nq + nv) before each action
    agentview_rgb: np.ndarray  # uint8 (T, H, W, 3) as robosuite gives it
    eye_in_hand_rgb: np.ndarray  # uint8 (T, H, W, 3)
    ee_pos: np.ndarray  # (T, 3) m
    ee_ori: np.ndarray  # (T, 3) axis-angle
    gripper_states: np.ndarray  # (T, 2)
    joint_states: np.ndarray  # (T, 7)
    images_rendered: np.ndarray  # bool (T,)
    prompt: str

    @property
    def state(self) -> np.ndarray:
        """Return the policy's state vector of every step, float32 (T, 8)."""
        return np.concatenate([self.ee_pos, self.ee_ori, self.gripper_states], 1).astype(np.float32)


def write_demonstrations(
    path: Path, demonstrations: list[Demonstration], *, problem: str, bddl_file: Path
) -> None:
    """Write a file in LIBERO's layout, which replaces an existing one once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as new, h5py.File(new, "w") as file:
        data = file.create_group("data")
        instruction = demonstrations[0].prompt
        data.attrs["env_name"] = problem
        data.attrs["bddl_file_name"] = bddl_file.name
        data.attrs["problem_info"] = json.dumps(
            {"problem_name": problem.lower(), "language_instruction": instruction}
        )
        data.attrs["num_demos"] = len(demonstrations)
        data.attrs["total"] = sum(len(demo.actions) for demo in demonstrations)
        for number, demo in enumerate(demonstrations):
            group = data.create_group(f"demo_{number}")
            length = len(demo.actions)
            group.attrs["num_samples"] = length
            group.attrs["init_state"] = demo.states[0]
            last = np.arange(length) == length - 1
            group["actions"], group["states"] = demo.actions, demo.states
            group["rewards"] = group["dones"] = last.astype(np.uint8)
            obs = group.create_group("obs")
            for key in (*_OBS_KEYS, "joint_states"):
                obs[key] = getattr(demo, key)
            obs["ee_states"] = np.concatenate([demo.ee_pos, demo.ee_ori], 1)
            for key in _IMAGE_KEYS:
                images = getattr(demo, key)
                chunks = (1, *images.shape[1:])
                obs.create_dataset(
                    key, data=images, chunks=chunks, compression="gzip", compression_opts=1
                )
            if not demo.images_rendered.all():
                obs[RENDERED_KEY] = demo.images_rendered


def _instruction(data: Any) -> str:
    try:
        info = json.loads(data.attrs["problem_info"])
        text = info["language_instruction"]
    except (KeyError, ValueError, TypeError) as error:
        raise DemonstrationFileError(
            f"the attribute problem_info of 'data' must be JSON with a 'language_instruction' "
            f"({error!r})"
        ) from error
    # In some of LIBERO's own files this is a list of characters.
    if not isinstance(text, str | list) or not all(isinstance(part, str) for part in text):
        raise DemonstrationFileError(f"language_instruction must be text; got {text!r:.80}")
    return "".join(text).strip().strip('"')


def _prompt(data: Any, path: Path) -> str:
    """A file's instruction, worded as the environment of the task that it was recorded in does.

    LIBERO's own files have the words of the BDDL file ("pick the ..."), but in the standard suites
    policies are asked with those of its name ("pick up the ...").
    """
    instruction = _instruction(data)
    bddl_file = Path(str(data.attrs.get("bddl_file_name", "")))
    names = {
        (bddl_file.parent.name, bddl_file.stem),
        (path.absolute().parent.name, path.stem.removesuffix("_demo")),  # LIBERO's layout
    }
    try:
        suites = {suite for suite, _ in names} & {*available_suites()}
    except LiberoNotInstalledError:
        return instruction
    for task in (task for suite in sorted(suites) for task in load_tasks(suite)):
        recorded_here = (task.suite, task.name) in names
        if recorded_here and read_instruction(task.bddl_file) == instruction.lower():
            return task.prompt
    return instruction


def _own(group: Any, key: str, kind: type) -> Any:
    """Return a member of a group, after checking that its content is in this file.

    HDF5 has three ways to refer to another file: external links, external storage and virtual
    datasets.

    :raises DemonstrationFileError: it is in another file, of another kind, or missing
    """
    link = group.get(key, getlink=True)
    inside = isinstance(link, h5py.HardLink)
    member = group[key] if inside else None
    if inside and isinstance(member, h5py.Dataset):
        inside = member.external is None and not member.is_virtual
    if not inside or not isinstance(member, kind):
        raise DemonstrationFileError(
            f"{group.name}/{key} must be a {kind.__name__.lower()} in the file itself; "
            "links and other files are not followed"
        )
    return member


def _numbers(group: Any, key: str, default: np.ndarray | None = None) -> np.ndarray:
    """Return the numbers of a dataset, or `default`, if given, when the dataset is missing."""
    if default is not None and key not in group:
        return default
    dataset = _own(group, key, h5py.Dataset)
    if dataset.dtype.kind not in "fiub":
        raise DemonstrationFileError(f"{group.name}/{key} must hold numbers")
    return np.asarray(dataset)


def _read_one(group: Any, prompt: str) -> Demonstration:
    missing = [key for key in ("actions", "obs") if key not in group]
    obs = _own(group, "obs", h5py.Group) if "obs" in group else {}
    missing += [f"obs/{key}" for key in (*_OBS_KEYS, *_IMAGE_KEYS) if key not in obs]
    if missing:
        raise DemonstrationFileError(
            f"{group.name} lacks {', '.join(missing)}; LIBERO's files have actions and "
            f"obs/{{{', '.join((*_OBS_KEYS, *_IMAGE_KEYS))}}}"
        )
    actions = np.atleast_1d(_numbers(group, "actions")).astype(np.float64)
    vectors = {key: _numbers(obs, key).astype(np.float64) for key in _OBS_KEYS}
    images = {key: _numbers(obs, key) for key in _IMAGE_KEYS}
    length = len(actions)
    rendered = _numbers(obs, RENDERED_KEY, np.ones(length)).astype(bool)
    checked = [
        ("actions", actions, (length, 7)),
        *((f"obs/{key}", vectors[key], (length, width)) for key, width in _OBS_KEYS.items()),
        *((f"obs/{key}", array, (length, *array.shape[1:3], 3)) for key, array in images.items()),
        (f"obs/{RENDERED_KEY}", rendered, (length,)),
    ]
    wrong = [
        f"{name} {array.shape}, expected {shape}"
        for name, array, shape in checked
        if array.shape != shape
    ]
    if wrong or length == 0:
        raise DemonstrationFileError(f"{group.name}: wrong shape: {'; '.join(wrong) or 'empty'}")
    other = [f"obs/{key}" for key, array in images.items() if array.dtype != np.uint8]
    if other:
        raise DemonstrationFileError(f"{group.name}: {', '.join(other)} must be uint8 images")
    if not all(np.isfinite(array).all() for array in (actions, *vectors.values())):
        raise DemonstrationFileError(f"{group.name} holds NaN or infinity")
    return Demonstration(
        actions=actions,
        states=_numbers(group, "states", np.empty((length, 0))),
        joint_states=_numbers(obs, "joint_states", np.empty((length, 0))),
        images_rendered=rendered,
        prompt=prompt,
        **vectors,
        **images,
    )


def read_demonstrations(path: str | Path) -> list[Demonstration]:
    """Read all demonstrations of a file, written by this project or by LIBERO.

    Where the file names a task of an installed suite, `prompt` is worded as its environment's.

    :raises DemonstrationFileError: missing, truncated, or lacking what the format needs
    """
    path = Path(path)
    if not path.is_file():
        raise DemonstrationFileError(
            f"{path}: no such file; `cfgrl demos` makes demonstrations, LIBERO's own are named "
            "<task>_demo.hdf5"
        )
    try:
        with h5py.File(path, "r") as file:
            data = _own(file, "data", h5py.Group) if "data" in file else {}
            names = [name for name in data if name.startswith("demo_")]
            if not names:
                raise DemonstrationFileError("no data/demo_* group; is it a LIBERO file?")
            prompt = _prompt(data, path)
            odd = [name for name in names if not name[5:].isdecimal()]
            if odd:
                raise DemonstrationFileError(f"data/{odd[0]} is not named demo_<number>")
            names.sort(key=lambda name: int(name[5:]))
            return [_read_one(_own(data, name, h5py.Group), prompt) for name in names]
    except DemonstrationFileError as error:
        raise DemonstrationFileError(f"{path}: {error}") from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # HDF5's own
        raise DemonstrationFileError(
            f"{path}: not a readable HDF5 file ({error}); truncated? make or copy it again"
        ) from error
