"""States of a training on disk, from which it goes on as if it had not been stopped.

A checkpoint is a folder named after its iteration: `model.pt` (what is trained, the optimizer,
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

from cfgrl_gym.algorithms.cfgrl import CFGRL
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.algorithms.windows import WindowBatch
from cfgrl_gym.whole_files import remove_folder, sha256, whole_file, whole_folder

FORMAT = 1
STATE_FILE, MODEL_FILE, REPLAY_FILE, SCORE_FILE = (
    "state.json",
    "model.pt",
    "replay.pt",
    "score.json",
)


class CheckpointStore:
    """The checkpoints of one training.

    :param folder: of them all
    :param keep: the last so many are kept, and the best one
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep

    def iterations(self) -> list[int]:
        """Of the checkpoints that are there, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def path(self, iteration: int) -> Path:
        return self.folder / f"{iteration:06d}"

    def save(self, model: CFGRL, about: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint of a model between two iterations, then delete what isn't kept.

        :param about: what else belongs to this state, for `load` to return
        :raises OSError: it could not be written; the earlier ones are as they were
        """
        folder = self.path(model.iteration)
        try:
            with whole_folder(folder, durable=True) as new:
                _write(new, model, about or {})
        except OSError as error:
            raise OSError(
                f"checkpoint '{folder}' cannot be written ({error}); earlier ones are intact: "
                "make room or mend the folder, and resume from them"
            ) from error
        self._delete_old()
        return folder

    def rate(self, iteration: int, success_rate: float) -> None:
        """Note how well a checkpoint's policy does, which decides on the best one."""
        folder = self.path(iteration)
        if folder.is_dir():
            with whole_file(folder / SCORE_FILE) as new:
                new.write_text(json.dumps({"success_rate": success_rate}) + "\n", encoding="utf-8")

    def success_rate(self, iteration: int) -> float:
        """What `rate` noted; below all others where it noted nothing."""
        try:
            text = (self.path(iteration) / SCORE_FILE).read_text(encoding="utf-8")
            return float(json.loads(text)["success_rate"])
        except (OSError, ValueError, KeyError, TypeError):
            return -math.inf

    def best(self) -> int | None:
        """Iteration of the checkpoint with the highest success rate, the later one of equals."""
        return max(self.iterations(), key=lambda i: (self.success_rate(i), i), default=None)

    def _delete_old(self) -> None:
        iterations = self.iterations()
        for iteration in set(iterations[: -self.keep]) - {self.best()}:
            remove_folder(self.path(iteration))


def load_checkpoint(model: CFGRL, path: Path) -> dict[str, Any]:
    """Bring a model, made with the arguments of the one that was saved, to its state.

    :return: `about`, as it was saved
    :raises ValueError: files are missing, damaged or another model's
    """
    state = _read_state(path)
    parts = torch.load(path / MODEL_FILE, map_location="cpu", weights_only=True)
    has_replay = REPLAY_FILE in state["files"]
    replay = torch.load(path / REPLAY_FILE, weights_only=True) if has_replay else []
    with _same_model(path):
        model.set_parameters(
            {"policy": parts["policy"], "policy.optimizer": parts["optimizer"]},
            device=model.device,
        )
    _set_generators(parts["generators"])
    model.replay.batches = [_windows(batch, number) for number, batch in enumerate(replay)]
    model.set_training_state(state)
    about: dict[str, Any] = state["about"]
    return about


def load_policy_state(policy: FlowPolicy, path: Path) -> None:
    """Bring a policy alone to what it is in a checkpoint, ready to act.

    :raises ValueError: files are missing, damaged or another model's
    """
    _read_state(path)
    parts = torch.load(path / MODEL_FILE, map_location="cpu", weights_only=True)
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


def _write(folder: Path, model: CFGRL, about: dict[str, Any]) -> None:
    parts = {
        "policy": model.policy.state_to_save(),
        "optimizer": model.policy.optimizer.state_dict(),
        "generators": _generators(),
    }
    _save(parts, folder / MODEL_FILE)
    recent = model.replay.last(model.replay_iterations)
    if recent:
        _save([_tensors(batch) for batch in recent], folder / REPLAY_FILE)
    state = {
        "format": FORMAT,
        "files": {file.name: sha256(file) for file in sorted(folder.iterdir())},
        **model.training_state(),
        "about": about,
    }
    content = {"sha256": _digest_of(state), "state": state}
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _save(tensors: Any, file: Path) -> None:
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # torch's word for a disk that is full
        raise OSError(f"{file.name}: {error}") from error


def _read_state(path: Path) -> dict[str, Any]:
    """What state.json says, once every file is found to be as it was written."""
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
    return state


def _digest_of(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# Tensors ------------------------------------------------------------------------------------------


def _tensors(batch: WindowBatch) -> dict[str, Any]:
    observations = batch.observations
    return {
        "observations": {key: torch.from_numpy(value) for key, value in observations.items()}
        if isinstance(observations, dict)
        else torch.from_numpy(observations),
        "model_actions": batch.model_actions,
        "action_is_pad": batch.action_is_pad,
        "labels": batch.labels,
    }


def _windows(tensors: dict[str, Any], number: int) -> WindowBatch:
    observations = tensors.pop("observations")
    # No prefix is kept of them. Negative, so that no key of a running cache is among them.
    keys = -1 - torch.arange(len(tensors["labels"])) - (number << 32)
    return WindowBatch(
        {key: value.numpy() for key, value in observations.items()}
        if isinstance(observations, dict)
        else observations.numpy(),
        prefix_keys=keys,
        **tensors,
    )


def _generators() -> dict[str, Any]:
    """The global generators. CFGRL's own need no state: they follow from seed and iteration."""
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
