"""`cfgrl train`: killed, stopped and taken up again, as processes of their own."""

import gc
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from cfgrl_processes import cfgrl, wait_until

from cfgrl_gym.algorithms.saving.checkpoints import CheckpointStore
from cfgrl_gym.cli.stopping import Stopped, StopRequests

TRAIN = (
    "train --policy libero_tiny --task_id 8 --n_envs 2 --rloo_batch_size 2 "
    "--groups_per_iteration 2 --max_iterations 3 --max_episode_steps 32 "
    "--enable_dynamic_sampling false --video false "
    "--replay_iterations 1 --trainable expert --ema_decay 0.9 --init_states [0,1] "
    "--num_inference_steps 2 --eval_every 3 --eval_episodes 1 --seed 1"
)


def workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Those that its server has forked."""
    servers = psutil.Process(process.pid).children()
    return [worker for server in servers for worker in server.children()]


def assert_equal_runs(whole: Path, parts: Path, iterations: list[int]) -> None:
    """Policies, and logs whose lines are of these iterations."""
    for file in ("checkpoints/000003/model.pt", "policy/model.safetensors"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    rows = [
        [json.loads(line) for line in (run / "progress.json").read_text().splitlines()]
        for run in (whole, parts)
    ]
    assert [row["time/iterations"] for row in rows[1]] == iterations
    for one, other in zip(*rows, strict=True):
        assert set(one) == set(other)
        for key in one:
            assert key.startswith("time/") or one[key] == other[key], key


def test_train_resumes_after_kill_and_after_signals(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = cfgrl(*TRAIN.split(), "--out", str(whole))
    assert done.wait(300) == 0, done.communicate()

    first = cfgrl(*TRAIN.split(), "--out", str(parts))
    wait_until((parts / "checkpoints" / "000001").exists, first)
    first.send_signal(signal.SIGSTOP)
    second = cfgrl("train", "--resume", str(parts))  # while the first one is there
    assert second.wait(120) == 2
    assert f"process {first.pid} is writing its run" in second.communicate()[1]
    first.kill()
    first.wait()
    assert not (parts / "checkpoints" / "000002").exists()

    third = cfgrl("train", "--resume", str(parts))
    wait_until((parts / "checkpoints" / "000002").exists, third)
    third.send_signal(signal.SIGTERM)
    assert third.wait(120) == 128 + signal.SIGTERM
    said = third.communicate()[1]
    assert f"go on with: cfgrl train --resume {parts}" in said
    assert "Traceback" not in said
    assert (parts / "policy" / "model.safetensors").is_file()

    # As a terminal does it: Ctrl-C reaches the workers too, which are only just being made.
    fourth = cfgrl("train", "--resume", str(parts), start_new_session=True)
    wait_until(
        lambda: f"{fourth.pid}\n" == (parts / ".lock").read_text() and workers_of(fourth), fourth
    )
    os.killpg(fourth.pid, signal.SIGINT)
    assert fourth.wait(120) == 128 + signal.SIGINT
    said = fourth.communicate()[1]
    assert "Traceback" not in said
    assert CheckpointStore(parts / "checkpoints").iterations()[-1] == 2

    last = cfgrl("train", "--resume", str(parts))
    assert last.wait(300) == 0, last.communicate()
    assert_equal_runs(whole, parts, [1, 2, 3])
    assert len((parts / "progress.csv").read_text().splitlines()) == 1 + 3
    assert_events_once(parts)
    evaluations = [
        json.loads((run / "evaluations.json").read_text())["evaluations"] for run in (whole, parts)
    ]
    assert [e["iteration"] for e in evaluations[1]] == [0, 3]
    assert [e["results"] for e in evaluations[0]] == [e["results"] for e in evaluations[1]]


def test_updates_beside_a_collection_resume_too(tmp_path: Path) -> None:
    """With iterations of which the second begins with an update that waits in the checkpoint."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*TRAIN.replace("--eval_every 3 --eval_episodes 1 ", "").split(), "--overlap", "true"]
    done = cfgrl(*options, "--out", str(whole))
    assert done.wait(300) == 0, done.communicate()
    for how, iteration in ((signal.SIGTERM, 1), (signal.SIGKILL, 2)):
        there = parts.exists()
        process = cfgrl(*(["train", "--resume"] if there else [*options, "--out"]), str(parts))
        wait_until((parts / "checkpoints" / f"00000{iteration}").exists, process)
        process.send_signal(how)
        process.wait(120)
        process.communicate()
        assert CheckpointStore(parts / "checkpoints").iterations()[-1] == iteration
    last = cfgrl("train", "--resume", str(parts))
    assert last.wait(300) == 0, last.communicate()
    assert_equal_runs(whole, parts, [1, 2, 3, 3])


@pytest.mark.parametrize(("since", "iteration"), [("checkpoints/000001", 1), (".lock", 0)])
def test_workers_that_keep_dying_end_train_with_its_state_saved(
    tmp_path: Path, since: str, iteration: int
) -> None:
    # Without evaluations the first reset of all is the training's own, before it has begun.
    options = TRAIN.replace("--eval_every 3 --eval_episodes 1 ", "")
    process = cfgrl(*options.split(), "--out", str(tmp_path / "run"))
    wait_until((tmp_path / "run" / since).exists, process)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        for worker in workers_of(process):
            with suppress(psutil.NoSuchProcess):
                worker.kill()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2, said
    assert "times in a row, the last time so: worker" in said
    assert "SIGKILL" in said
    assert f"go on with: cfgrl train --resume {tmp_path / 'run'}" in said
    assert "Traceback" not in said.partition("cfgrl: error")[0]
    assert CheckpointStore(tmp_path / "run" / "checkpoints").iterations()[-1] >= iteration


def test_a_checkpoint_can_be_evaluated(tmp_path: Path) -> None:
    from cfgrl_gym.cli.configs import EvalConfig
    from cfgrl_gym.cli.policies import load_policy

    run = tmp_path / "run"
    training = cfgrl(*TRAIN.replace("--max_iterations 3", "--max_iterations 1").split(), "--out",
                     str(run))  # fmt: skip
    assert training.wait(240) == 0, training.communicate()
    policies = [
        load_policy(EvalConfig(policy=str(folder)))
        for folder in (run, run / "checkpoints" / "000001")
    ]
    states = [dict(policy.named_parameters()) for policy in policies]
    assert list(states[0]) == list(states[1])
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    shutil.rmtree(run / "policy")  # as after a kill
    with pytest.raises(FileNotFoundError, match=r"go on with it .* or evaluate a folder"):
        load_policy(EvalConfig(policy=str(run)))
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"config.yaml' says what the checkpoint is of"):
        load_policy(EvalConfig(policy=str(run / "checkpoints" / "000001")))


def assert_events_once(run: Path) -> None:
    """No point of TensorBoard's curves is there twice, in whatever file."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    points = [
        (value.tag, event.step)
        for file in run.glob("events*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    assert len(points) > 30
    assert len(points) == len(set(points))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume", "nowhere"], "no run to resume: 'nowhere/config.yaml' does not exist"),
        (["--resume", "run", "--seed", "3"], "beside it only --total_timesteps, "),
        (["--resume=run", "--policy", "x"], "not --policy"),
        (["--resume"], "no run to resume"),
    ],
)
def test_what_cannot_be_resumed_is_said(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from cfgrl_gym.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_is_lost_ends_the_run_all_the_same() -> None:
    """As one that comes in a finalizer, where Python only prints what is raised."""
    lost = 0

    class Finalizer:
        def __del__(self) -> None:
            nonlocal lost
            lost += 1
            signal.raise_signal(signal.SIGINT)

    with StopRequests() as stop:
        Finalizer()
        gc.collect()
        assert lost == 1
        with pytest.raises(Stopped, match="SIGINT"):
            stop.defer()
    with StopRequests(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with StopRequests(), pytest.raises(SystemExit, match="143"):
        signal.raise_signal(signal.SIGTERM)
