"""Writes and reads a training's checkpoints, from which it resumes as if it had not been stopped.

A checkpoint is a folder named after its iteration: `model.pt` (trained weights, optimizer, random
generators) and `replay.pt` (windows of earlier iterations, where there are any) hold tensors and
load with `torch.load(weights_only=True)`; `state.json` has the counters and the SHA-256 of each
file. It appears under its name only when all of it is on the disk.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from cfgrl_gym.algorithms.cfgrl import CFGRL
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.windows import WindowBatch, join_windows
from cfgrl_gym.whole_files import remove_folder, sha256, whole_file, whole_folder

FORMAT = 1
STATE_FILE, SCORE_FILE = "state.json", "score.json"
MODEL_FILE, REPLAY_FILE = "model.pt", "replay.pt"


class CheckpointStore:
    """Saves the checkpoints of one training and deletes old ones.

    :param folder: the folder of the checkpoints
    :param keep: number of latest checkpoints to keep, besides the best one
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep

    def iterations(self) -> list[int]:
        """List the iterations of the existing checkpoints, in ascending order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def path(self, iteration: int) -> Path:
        """Return the folder of an iteration's checkpoint."""
        return self.folder / f"{iteration:06d}"

    def save(self, model: CFGRL, about: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint of a model between two iterations, then delete old ones.

        Of several ranks, all have to call this and the first one writes; any number of them can
        load it.

        :param about: further values in JSON's types, which `load_checkpoint` returns
        :raises OSError: it could not be written; the earlier ones are intact
        """
        folder = self.path(model.iteration)
        iterations = model.replay_iterations + model.untrained  # the last still wait
        recent = model.replay.of_all(model.ranks, iterations)
        if not model.ranks.first:
            return folder
        try:
            with whole_folder(folder, durable=True) as new:
                _write(new, model, recent, about or {})
        except OSError as error:
            raise OSError(
                f"checkpoint '{folder}' cannot be written ({error}); earlier ones are intact: "
                "free disk space or repair the folder, and resume from them"
            ) from error
        self._delete_old()
        return folder

    def rate(self, iteration: int, success_rate: float) -> None:
        """Record the success rate of a checkpoint's policy, by which the best one is chosen."""
        folder = self.path(iteration)
        if folder.is_dir():
            with whole_file(folder / SCORE_FILE) as new:
                new.write_text(json.dumps({"success_rate": success_rate}) + "\n", encoding="utf-8")

    def success_rate(self, iteration: int) -> float:
        """Return what `rate` recorded, or minus infinity where it recorded nothing."""
        try:
            text = (self.path(iteration) / SCORE_FILE).read_text(encoding="utf-8")
            return float(json.loads(text)["success_rate"])
        except (OSError, ValueError, KeyError, TypeError):
            return -math.inf

    def best(self) -> int | None:
        """Return the iteration with the highest success rate, the latest if several are equal."""
        return max(self.iterations(), key=lambda i: (self.success_rate(i), i), default=None)

    def _delete_old(self) -> None:
        iterations = self.iterations()
        for iteration in set(iterations[: -self.keep]) - {self.best()}:
            remove_folder(self.path(iteration))


def load_checkpoint(model: CFGRL, path: Path) -> dict[str, Any]:
    """Restore the state of a model that was made with the arguments of the saved one.

    :return: `about`, as it was saved
    :raises ValueError: files are missing, damaged or another model's
    """
    state, parts = _read(path)
    has_replay = REPLAY_FILE in state["files"]
    replay = torch.load(path / REPLAY_FILE, weights_only=True) if has_replay else []
    with _same_model(path):
        model.set_parameters(
            {"policy": parts["policy"], "policy.optimizer": parts["optimizer"]},
            device=model.device,
        )
    _set_generators(parts["generators"])
    batches = [_windows(batch, number) for number, batch in enumerate(replay)]
    model.replay.put(model.ranks, batches)
    model.untrained = state.get("untrained", False)  # an earlier version wrote none
    model.windows = join_windows(model.replay.batches) if model.untrained else None
    model.set_training_state(state)
    about: dict[str, Any] = state["about"]
    return about


def load_policy_state(policy: FlowPolicy, path: Path) -> None:
    """Load a checkpoint's weights into a policy, ready to act.

    :raises ValueError: files are missing, damaged or another model's
    """
    _, parts = _read(path)
    with _same_model(path):
        policy.load_state_dict(policy.complete_state(parts["policy"]))
    policy.set_training_mode(False)


@contextmanager
def _same_model(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint '{path}' is of another model: {error}; give the configuration and the "
            "policy that its training began with"
        ) from error


# Files --------------------------------------------------------------------------------------------


def _write(folder: Path, model: CFGRL, recent: list[WindowBatch], about: dict[str, Any]) -> None:
    parts = {
        "policy": model.policy.state_to_save(),
        "optimizer": model.policy.optimizer.state_dict(),
        "generators": _generators(),
    }
    _save(parts, folder / MODEL_FILE)
    if recent:
        _save([_tensors(batch) for batch in recent], folder / REPLAY_FILE)
    state = {
        "format": FORMAT,
        "files": {file.name: sha256(file) for file in sorted(folder.iterdir())},
        **model.training_state(),
        "untrained": model.untrained,
        "about": about,
    }
    content = {"sha256": _digest_of(state), "state": state}
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _save(tensors: Any, file: Path) -> None:
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # what torch raises for a full disk
        raise OSError(f"{file.name}: {error}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of state.json and model.pt, after checking every file's checksum."""
    remedy = (
        "remove that folder to resume from the checkpoint before it, or begin the training anew"
    )
    try:
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        state: dict[str, Any] = content["state"]
        sound = content["sha256"] == _digest_of(state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path / STATE_FILE}' cannot be read ({error}); {remedy}") from error
    if not sound:
        raise ValueError(f"'{path / STATE_FILE}' is damaged (wrong checksum); {remedy}")
    if state["format"] != FORMAT:
        raise ValueError(
            f"checkpoint '{path}' has format {state['format']}, this version reads {FORMAT}; use "
            "the version of cfgrl-gym that wrote it"
        )
    for name, digest in state["files"].items():
        file = path / name
        if not file.is_file() or sha256(file) != digest:
            raise ValueError(f"'{file}' is missing or damaged (wrong checksum); {remedy}")
    return state, torch.load(path / MODEL_FILE, map_location="cpu", weights_only=True)


def _digest_of(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# Tensors ------------------------------------------------------------------------------------------


def _tensors(batch: WindowBatch) -> dict[str, Any]:
    tensors = vars(batch) | {"observations": tree_map(torch.from_numpy, batch.observations)}
    del tensors["prefix_keys"]  # no prefix is saved
    return tensors


def _windows(tensors: dict[str, Any], number: int) -> WindowBatch:
    observations = tree_map(Tensor.numpy, tensors["observations"])
    # Negative, so that none equals the key of a prefix in a running cache.
    keys = -1 - torch.arange(len(tensors["labels"])) - (number << 32)
    groups = torch.zeros(len(keys), dtype=torch.int64)  # where an earlier version wrote none
    more = {"observations": observations, "prefix_keys": keys}
    return WindowBatch(**{"groups": groups} | tensors | more)


def _generators() -> dict[str, Any]:
    """Return the states of the global generators; CFGRL's own follow from seed and iteration."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": [name, torch.from_numpy(np.array(keys).astype(np.int64)), *rest],
        "python": [version, torch.tensor(numbers), gauss],
    }


def _set_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():  # else: resumed on another machine
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
