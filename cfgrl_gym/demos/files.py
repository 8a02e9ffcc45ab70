"""LIBERO's demonstration files: HDF5 with `data/demo_*/{actions, states, obs/...}`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cfgrl_gym.whole_files import whole_file

# obs/ key: width, or None for images
_OBS_KEYS = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}
_IMAGE_KEYS = ("agentview_rgb", "eye_in_hand_rgb")
# Which rows of the images were drawn; written only where not all were (see `record`).
RENDERED_KEY = "images_rendered"


class DemonstrationFileError(ValueError):
    """A file that is not a readable demonstration file in LIBERO's format."""


@dataclass(frozen=True)
class Demonstration:
    """One episode of T control steps; observations are those on which the action was chosen."""

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
        """float32 (T, 8): the policy's state vector."""
        return np.concatenate([self.ee_pos, self.ee_ori, self.gripper_states], 1).astype(np.float32)


def write_demonstrations(
    path: Path, demonstrations: list[Demonstration], *, problem: str, bddl_file: Path
) -> None:
    """Write a file in LIBERO's layout; an existing file is replaced only when all is written."""
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


def _instruction(data: Any, path: Path) -> str:
    try:
        info = json.loads(data.attrs["problem_info"])
        text = info["language_instruction"]
    except (KeyError, ValueError, TypeError) as error:
        raise DemonstrationFileError(
            f"{path}: the attribute problem_info of 'data' must be JSON with a "
            f"'language_instruction' ({error!r})"
        ) from error
    # Some of LIBERO's own files hold a list of characters.
    if not isinstance(text, str | list) or not all(isinstance(part, str) for part in text):
        raise DemonstrationFileError(f"{path}: language_instruction must be text; got {text!r:.80}")
    return "".join(text).strip().strip('"')


def _own(group: Any, key: str, kind: type, path: Path) -> Any:
    """A member of a group, if its content is in this file: HDF5 has three ways to show that of
    any other file instead.

    :raises DemonstrationFileError: it is somewhere else, of another kind, or not there
    """
    link = group.get(key, getlink=True)
    inside = isinstance(link, h5py.HardLink)
    member = group[key] if inside else None
    if inside and isinstance(member, h5py.Dataset):
        inside = member.external is None and not member.is_virtual
    if not inside or not isinstance(member, kind):
        raise DemonstrationFileError(
            f"{path}: {group.name}/{key} must be a {kind.__name__.lower()} in the file itself; "
            "links and other files are not followed"
        )
    return member


def _numbers(group: Any, key: str, path: Path) -> np.ndarray:
    dataset = _own(group, key, h5py.Dataset, path)
    if dataset.dtype.kind not in "fiub":
        raise DemonstrationFileError(f"{path}: {group.name}/{key} must hold numbers")
    return np.asarray(dataset)


def _read_one(group: Any, name: str, path: Path, prompt: str) -> Demonstration:
    missing = [key for key in ("actions", "obs") if key not in group]
    obs = _own(group, "obs", h5py.Group, path) if "obs" in group else {}
    missing += [f"obs/{key}" for key in (*_OBS_KEYS, *_IMAGE_KEYS) if key not in obs]
    if missing:
        raise DemonstrationFileError(
            f"{path}: data/{name} lacks {', '.join(missing)}; LIBERO's files have actions and "
            f"obs/{{{', '.join((*_OBS_KEYS, *_IMAGE_KEYS))}}}"
        )
    actions = np.atleast_1d(_numbers(group, "actions", path)).astype(np.float64)
    length = len(actions)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "actions": (actions.shape, (length, 7))
    }
    arrays: dict[str, np.ndarray] = {}
    for key, width in _OBS_KEYS.items():
        arrays[key] = _numbers(obs, key, path).astype(np.float64)
        shapes[f"obs/{key}"] = (arrays[key].shape, (length, width))
    for key in _IMAGE_KEYS:
        arrays[key] = _numbers(obs, key, path)
        shape = arrays[key].shape
        expected = (length, *shape[1:3], 3) if len(shape) == 4 else (length, -1, -1, 3)
        shapes[f"obs/{key}"] = (shape, expected)
        if arrays[key].dtype != np.uint8:
            raise DemonstrationFileError(f"{path}: data/{name}/obs/{key} must be uint8 images")
    rendered = np.ones(length, dtype=bool)
    if RENDERED_KEY in obs:
        rendered = _numbers(obs, RENDERED_KEY, path).astype(bool)
        shapes[f"obs/{RENDERED_KEY}"] = (rendered.shape, (length,))
    wrong = [
        f"{key} {given}, expected {want}" for key, (given, want) in shapes.items() if given != want
    ]
    if wrong or length == 0:
        raise DemonstrationFileError(
            f"{path}: data/{name}: wrong shape: {'; '.join(wrong) or 'empty'}"
        )
    if not np.isfinite(actions).all() or not all(np.isfinite(arrays[k]).all() for k in _OBS_KEYS):
        raise DemonstrationFileError(f"{path}: data/{name} holds NaN or infinity")
    return Demonstration(
        actions=actions,
        states=_numbers(group, "states", path) if "states" in group else np.empty((length, 0)),
        joint_states=_numbers(obs, "joint_states", path)
        if "joint_states" in obs
        else np.empty((length, 0)),
        images_rendered=rendered,
        prompt=prompt,
        **arrays,
    )


def read_demonstrations(path: str | Path) -> list[Demonstration]:
    """All demonstrations of a file, the project's or LIBERO's own.

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
            data = _own(file, "data", h5py.Group, path) if "data" in file else {}
            if not any(n.startswith("demo_") for n in data):
                raise DemonstrationFileError(f"{path}: no data/demo_* group; is it a LIBERO file?")
            prompt = _instruction(data, path)
            names = [n for n in data if n.startswith("demo_")]
            odd = [n for n in names if not n[5:].isdecimal()]
            if odd:
                raise DemonstrationFileError(f"{path}: data/{odd[0]} is not named demo_<number>")
            names.sort(key=lambda n: int(n[5:]))
            return [
                _read_one(_own(data, name, h5py.Group, path), name, path, prompt) for name in names
            ]
    except DemonstrationFileError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # what HDF5 says
        raise DemonstrationFileError(
            f"{path}: not a readable HDF5 file ({error}); truncated? make or copy it again"
        ) from error
