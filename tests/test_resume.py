"""Checkpoints: a training that was killed goes on as if it had not been."""

import hashlib
import json
import multiprocessing
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cfgrl_envs import QueueEnv, vec
from stable_baselines3.common.callbacks import BaseCallback

from cfgrl_gym import CFGRL
from cfgrl_gym.algorithms.saving.checkpoints import CheckpointStore, load_checkpoint

ITERATIONS = 12


class Saving(BaseCallback):
    """A checkpoint between any two iterations, and one at the end."""

    def __init__(self, store: CheckpointStore) -> None:
        super().__init__()
        self.store = store

    def _on_rollout_start(self) -> None:
        assert isinstance(self.model, CFGRL)
        if self.model.iteration:
            self.store.save(self.model, {"note": self.model.iteration})

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def _on_step(self) -> bool:
        return True


def make(kind: type[CFGRL] = CFGRL, **changed: Any) -> CFGRL:
    arguments: dict[str, Any] = {
        "rloo_batch_size": 4,
        "groups_per_iteration": 3,
        "enable_dynamic_sampling": False,
        "replay_iterations": 2,
        "seed": 3,
        "n_epochs": 2,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "policy_kwargs": {"net_arch": [32], "ema_decay": 0.9},
        "device": "cpu",
    }
    return kind("MlpPolicy", vec(QueueEnv, 2), **(arguments | changed))


def go_on(folder: Path, iterations: int = ITERATIONS, **changed: Any) -> CFGRL:
    """Train to the end, from the last checkpoint where there is one."""
    torch.set_num_threads(1)
    store, model = CheckpointStore(folder), make(**changed)
    done = store.iterations()
    if done:
        assert load_checkpoint(model, store.path(done[-1])) == {"note": done[-1]}
    return model.learn(
        10**6, Saving(store), max_iterations=iterations - model.iteration,
        reset_num_timesteps=False,
    )  # fmt: skip


def all_state(model: CFGRL) -> dict[str, Any]:
    return {
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict()["state"],
        "counters": [
            model.num_timesteps,
            model.statistics.num_episodes,
            model._n_updates,
            model.iteration,
        ],
        "episodes": list(model.ep_info_buffer or ()),
        "successes": {task: list(done) for task, done in model.statistics.recent.items()},
        "replay": [batch.model_actions for batch in model.replay.batches[-2:]],
    }


def assert_equal_states(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal_states(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal_states(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_a_training_that_stops_and_goes_on_gives_the_same_bits(tmp_path: Path) -> None:
    reference = go_on(tmp_path / "whole")
    go_on(tmp_path / "parts", 5)
    torch.manual_seed(99)  # another process has another state of the global generators
    again = go_on(tmp_path / "parts")
    assert_equal_states(all_state(reference), all_state(again))
    different = go_on(tmp_path / "other", seed=4)
    with pytest.raises(AssertionError):
        assert_equal_states(all_state(reference), all_state(different))


def test_the_global_generators_go_on_too(tmp_path: Path) -> None:
    go_on(tmp_path, 2)

    def drawn() -> list[Any]:
        return [torch.rand(1).item(), np.random.rand(), random.random()]  # noqa: NPY002

    store = CheckpointStore(tmp_path)
    load_checkpoint(make(), store.path(2))
    first = drawn()
    load_checkpoint(make(), store.path(2))
    assert drawn() == first


def train_in_child(folder: Path, ready: Any) -> None:
    ready.send(True)
    go_on(folder)


def test_the_trainer_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    began = time.monotonic()
    reference = all_state(go_on(tmp_path / "whole"))
    iteration = (time.monotonic() - began) / ITERATIONS  # seconds
    store = CheckpointStore(tmp_path / "killed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "cfgrl_gym.algorithms.vec_envs.worker"])
    rng = np.random.default_rng(0)
    killed, left = 0, set()

    def last() -> int:
        return max(store.iterations(), default=0)

    while killed < 20:
        here, there = context.Pipe()
        process = context.Process(target=train_in_child, args=(store.folder, there))
        process.start()
        assert here.recv()
        # A random moment within one of the next few iterations, its checkpoint's writing included.
        target = last() + int(rng.integers(4))
        while process.is_alive() and last() < target:
            time.sleep(0.001)
        process.join(rng.uniform(0, iteration))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
            left.add(last())
            continue
        assert process.exitcode == 0  # done before it could be killed: right, and begin anew
        assert_equal_states(reference, all_state(go_on(store.folder)))
        shutil.rmtree(store.folder)
    assert len(left) > 3
    assert_equal_states(reference, all_state(go_on(store.folder)))


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    store, model = CheckpointStore(tmp_path, keep=2), make()
    for iteration, rate in ((1, 0.2), (2, 0.9), (3, 0.9), (4, 0.1), (5, 0.3), (6, 0.0)):
        model.iteration = iteration
        store.save(model)
        store.rate(iteration, rate)
    assert store.iterations() == [3, 5, 6]
    assert store.best() == 3
    assert {path.name for path in tmp_path.iterdir()} == {"000003", "000005", "000006"}


# Damage -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    go_on(folder, 4)
    return folder


@pytest.mark.parametrize("name", ["state.json", "model.pt", "replay.pt"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_found_and_the_checkpoint_before_is_good(
    two_checkpoints: Path, tmp_path: Path, name: str, damage: str
) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "c")
    store = CheckpointStore(tmp_path / "c")
    file = store.path(4) / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        if damage == "truncate":
            del content[len(content) // 2 :]
        else:
            place = content.index(b"num_episodes") if name == "state.json" else len(content) // 2
            content[place] ^= 1
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*remove that folder to resume from the"):
        load_checkpoint(make(), store.path(4))
    shutil.rmtree(store.path(4))
    assert load_checkpoint(make(), store.path(3)) == {"note": 3}


def test_a_checkpoint_of_another_model_or_version_is_refused(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    path = CheckpointStore(two_checkpoints).path(4)
    other = make(policy_kwargs={"net_arch": [16], "ema_decay": 0.9})
    with pytest.raises(ValueError, match="is of another model"):
        load_checkpoint(other, path)
    with pytest.raises(ValueError, match="is of another model"):
        load_checkpoint(make(policy_kwargs={"net_arch": [32]}), path)
    shutil.copytree(path, tmp_path / "c")
    content = json.loads((path / "state.json").read_text())
    content["state"]["format"] = 999
    text = json.dumps(content["state"], sort_keys=True)
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "c" / "state.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has format 999"):
        load_checkpoint(make(), tmp_path / "c")


# In a mount namespace of its own, so that nothing stays mounted; $1 holds the checkpoints.
MOUNTED = """
set -e
mount -t tmpfs -o size=%(size)s tmpfs "$1"
cp -r "$2"/. "$1"
%(more)s
exec %(python)s -c "
import sys; sys.path.insert(0, '%(tests)s')
from test_resume import *
store = CheckpointStore(Path(sys.argv[1]))
model = make()
load_checkpoint(model, store.path(4))
model.iteration = 5
try:
    store.save(model)
except OSError as error:
    print(error)
print(store.iterations(), [p.name for p in store.folder.iterdir() if 'new' in p.name])
load_checkpoint(make(), store.path(4))
" "$1"
"""


@pytest.mark.parametrize(
    ("size", "more", "said"),
    [
        ("{}k", "", "No space left|unexpected pos|write"),
        ("64m", 'mount -o remount,ro "$1"', "Read-only file system"),
    ],
)
def test_a_full_disk_or_a_read_only_one_loses_nothing(
    two_checkpoints: Path, tmp_path: Path, size: str, more: str, said: str
) -> None:
    used = sum(file.stat().st_size for file in two_checkpoints.rglob("*") if file.is_file())
    script = MOUNTED % {
        "size": size.format(used // 1024 + 60),  # room for a part of another checkpoint
        "more": more,
        "python": sys.executable,
        "tests": Path(__file__).parent,
    }
    command = ["unshare", "--mount", "--map-root-user", "bash", "-c", script, "_"]
    probe = subprocess.run(
        [*command[:3], "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True
    )
    if probe.returncode != 0:
        pytest.skip("this system lets nobody mount a file system")
    done = subprocess.run(
        [*command, str(tmp_path), str(two_checkpoints)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.strip().splitlines()[-2:]
    assert "cannot be written" in first
    assert "earlier ones are intact" in first
    assert re.search(said, first)
    assert last == "[2, 3, 4] []"
