"""`torchrun -m cfgrl_gym train`: several ranks, one run folder; killed, stopped and taken up."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from cfgrl_processes import PATIENCE, wait_until

from cfgrl_gym.algorithms.saving.checkpoints import CheckpointStore

TRAIN = (
    "train --policy libero_tiny --task_id 8 --n_envs 1 --rloo_batch_size 2 "
    "--groups_per_iteration 2 --max_iterations 3 --max_episode_steps 32 "
    "--enable_dynamic_sampling false --video false --device cpu --n_epochs 2 "
    "--replay_iterations 1 --trainable expert --ema_decay 0.9 --init_states [0,1] "
    "--num_inference_steps 2 --eval_every 3 --eval_episodes 2 --seed 1"
)


def torchrun(size: int, *words: str) -> "subprocess.Popen[str]":
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return launch(launcher, *words)


def launch(launcher: list[str], *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "cfgrl_gym", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: "subprocess.Popen[str]") -> str:
    try:
        return process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()


def trained(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "checkpoints")
    assert store.iterations()[-1] == 3
    parts = torch.load(store.path(3) / "model.pt", weights_only=True)
    weights: dict[str, torch.Tensor] = parts["policy"]
    return weights


def ranks_of(launcher: "subprocess.Popen[str]") -> dict[int, psutil.Process]:
    """By rank; a rank is the launcher's child that trains."""
    found = {}
    for child in psutil.Process(launcher.pid).children():
        if "RANK" in child.environ() and "train" in child.cmdline():
            found[int(child.environ()["RANK"])] = child
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = torchrun(2, *TRAIN.split(), "--out", str(folder))
    output = finish(process)
    assert process.returncode == 0, output
    assert output.count(f"results in {folder}") == 1  # the first rank's line
    assert output.count("policy: ") == 1
    return folder


def test_two_ranks_share_episodes_and_evaluations(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "progress.json").read_text().splitlines()]
    assert [line["rollout/episodes"] for line in lines] == [4, 8, 12]
    assert [line["rollout/control_steps"] for line in lines] == [128, 256, 384]
    evaluations = json.loads((whole / "evaluations.json").read_text())["evaluations"]
    assert [e["iteration"] for e in evaluations] == [0, 3]
    for evaluation in evaluations:
        (result,) = evaluation["results"]
        assert [e["init_state_id"] for e in result["episodes"]] == [0, 1]


def test_accelerate_launch_does_what_torchrun_does(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    several = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launcher = ["accelerate.commands.launch", *several.split(), "--dynamo_backend", "no"]
    process = launch(launcher, *TRAIN.split(), "--out", str(tmp_path / "run"))
    output = finish(process)
    assert process.returncode == 0, output
    weights = trained(tmp_path / "run")
    assert all(torch.equal(weights[name], value) for name, value in trained(whole).items())


def test_fsdp_trains_the_same(whole: Path, tmp_path: Path) -> None:
    process = torchrun(2, *TRAIN.split(), "--fsdp", "true", "--out", str(tmp_path / "run"))
    output = finish(process)
    assert process.returncode == 0, output
    weights = trained(tmp_path / "run")
    for name, value in trained(whole).items():
        assert (value.double() - weights[name].double()).abs().max().item() <= 1e-5, name


@pytest.mark.parametrize(("victim", "size"), [(0, 2), (1, 1)])
def test_a_killed_rank_ends_the_run_which_goes_on(
    whole: Path, tmp_path: Path, victim: int, size: int
) -> None:
    run = tmp_path / "run"
    process = torchrun(2, *TRAIN.split(), "--out", str(run))
    wait_until(lambda: CheckpointStore(run / "checkpoints").iterations(), process)
    ranks_of(process)[victim].kill()
    killed = time.monotonic()
    output = finish(process)
    assert process.returncode != 0, output
    assert time.monotonic() - killed < 60
    process = torchrun(size, "train", "--resume", str(run))
    output = finish(process)
    assert process.returncode == 0, output
    uninterrupted = trained(whole)
    for name, value in trained(run).items():
        difference = (value.double() - uninterrupted[name].double()).abs().max().item()
        assert difference <= (0 if size == 2 else 1e-5), name


def test_a_stopped_run_saves_on_all_ranks_and_goes_on(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun(2, *TRAIN.split(), "--out", str(run))
    wait_until(lambda: CheckpointStore(run / "checkpoints").iterations(), process)
    ranks_of(process)[0].send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode != 0
    assert f"saved; go on with: cfgrl train --resume {run}" in output
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    process = torchrun(2, "train", "--resume", str(copy))
    output = finish(process)
    assert process.returncode == 0, output
    assert all(torch.equal(trained(copy)[n], value) for n, value in trained(whole).items())


def test_a_folder_that_is_taken_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = torchrun(2, *TRAIN.split(), "--out", str(tmp_path))
    output = finish(process)
    assert process.returncode != 0
    assert "is not empty, and nothing is overwritten" in output
    assert not (tmp_path / "checkpoints").exists()
