"""Training on several ranks of torch.distributed: the same updates as on one, and no hang."""

import json
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from cfgrl_gym.algorithms.distributed.ranks import Ranks

SCRIPT = Path(__file__).with_name("rank_process.py")
OPTIONS = {
    "seed": 3,
    "groups_per_iteration": 5,
    "rloo_batch_size": 4,
    "n_epochs": 2,
    "policy_kwargs": {"net_arch": [16]},
}
COPIES = {"net_arch": [16], "ema_decay": 0.9, "cfg_reference": "previous", "cfg_scale": 2.0}
PATIENCE = 240  # seconds: a process imports torch for long when others do


def start(folder: Path, size: int, **given: Any) -> list[subprocess.Popen[str]]:
    folder.mkdir()
    content = json.dumps({"options": OPTIONS, "iterations": 3} | given)
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(size), str(folder), content],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def end(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Return what each wrote to stderr; kill all if one doesn't end."""
    try:
        return [process.communicate(timeout=PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(folder: Path, size: int, **given: Any) -> list[dict[str, Any]]:
    processes = start(folder, size, **given)
    errors = end(processes)
    assert [process.returncode for process in processes] == [0] * size, errors
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(size)]


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest between two weights, but for SigLIP's biases of keys: softmax cancels them, so
    that their gradient is rounding, which Adam makes as large as any other."""
    names = [name for name in one["weights"] if not re.search("k_proj[./]bias", name)]
    pairs = [(one["weights"][name], other["weights"][name]) for name in names]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize(
    ("size", "changed"),
    [
        (2, {}),
        (2, {"optimal_share": 0.2, "label_source": "window_rloo"}),
        (4, {"early_stop_percentage": 0.5, "replay_iterations": 0, "optimal_share": 0.3}),
        (2, {"overlap": True}),
        (2, {"fsdp": True}),
        (4, {"fsdp": True, "early_stop_percentage": 0.5, "batch_size": 6, "policy_kwargs": COPIES}),
    ],
)
def test_ranks_make_one_rank_s_updates(tmp_path: Path, size: int, changed: dict[str, Any]) -> None:
    """Ranks have different numbers of windows: three groups suffice, so one of four has none."""
    options = OPTIONS | changed
    (alone,) = run(tmp_path / "alone", 1, options=options)
    ranks = run(tmp_path / "ranks", size, options=options)
    for rank in ranks:
        assert difference(rank, ranks[0]) == 0
        assert difference(rank, alone) < 1e-6
        assert rank["training"] == alone["training"]
    # The update is not lost in the comparison's tolerance.
    assert alone["training"]["counters"]["n_updates"] >= 6
    assert alone["windows"] == [sum(rank["windows"][i] for rank in ranks) for i in range(3)]
    if size == 4:
        assert min(count for rank in ranks for count in rank["windows"]) == 0
    # Beside a collection, there is an update in all lines but the first, and one for the last.
    beside = int("overlap" in changed)
    assert len(alone["logged"]) == 3 + beside
    for i, (one, other) in enumerate(zip(alone["logged"], ranks[0]["logged"], strict=True)):
        names = {name for name in one if not name.startswith("time/")}
        assert {"train/loss", "train/guidance_gap"} < names or i < beside
        assert "rollout/positive_share" in names or i == 3
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
    assert not any(rank["logged"] for rank in ranks[1:])


@pytest.mark.parametrize(
    ("pi0", "changed"),
    [
        # Of the first window of an epoch alone, one rank has nothing to compute a gap of.
        ({"trainable": "expert"}, {"batch_size": 1, "gradient_accumulation_steps": 12}),
        ({"trainable": "expert"}, {"fsdp": True}),
        (
            {"trainable": "all", "gradient_checkpointing": True, "use_prefix_dropout": True},
            {"fsdp": True, "batch_size": 5},
        ),
    ],
)
def test_ranks_train_pi0_as_one_does(
    tmp_path: Path, pi0: dict[str, Any], changed: dict[str, Any]
) -> None:
    given = {"options": OPTIONS | changed, "pi0": pi0, "iterations": 2}
    (alone,) = run(tmp_path / "alone", 1, **given)
    ranks = run(tmp_path / "ranks", 2, **given)
    assert difference(*ranks) == 0
    assert difference(ranks[0], alone) < 1e-6
    one, other = alone["logged"][-1], ranks[0]["logged"][-1]
    for name in ("train/loss", "train/grad_norm", "train/guidance_gap", "rollout/success_rate"):
        assert other[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_goes_on_on_another_number_of_ranks(tmp_path: Path, fsdp: bool) -> None:
    """With FSDP the optimizer's state is on the first rank only, which saves it alone."""
    (alone,) = run(tmp_path / "alone", 1, iterations=4)
    checkpoints = str(tmp_path / "checkpoints")
    given = {"iterations": 2, "options": OPTIONS | {"fsdp": fsdp}}
    (first, second) = run(tmp_path / "first", 2, checkpoints=checkpoints, **given)
    assert len(first["optimizer"]) > 0
    assert len(second["optimizer"]) == (0 if fsdp else len(first["optimizer"]))
    for size in (1, 3) if fsdp else (1, 2, 3):
        resumed = run(tmp_path / f"on{size}", size, resume=checkpoints, **given)
        assert difference(resumed[0], alone) < 1e-6
        assert resumed[0]["training"] == alone["training"]
        for own, other in zip(
            resumed[0]["optimizer"].values(), alone["optimizer"].values(), strict=True
        ):
            assert own.keys() == other.keys()
            for name in own:
                torch.testing.assert_close(own[name], other[name], atol=1e-6, rtol=1e-4)


def test_ranks_with_different_settings_end_with_one_line(tmp_path: Path) -> None:
    errors = end(start(tmp_path / "ranks", 2, of_rank={"1": {"n_epochs": 3}}))
    for error in errors:
        assert "ranks must have the same settings, but n_epochs is 2 and 3" in error


def test_a_process_group_that_is_gone_is_not_taken_for_a_lost_rank() -> None:
    class Group:
        pass

    gone = Ranks(0, 2, weakref.ref(Group()))
    with pytest.raises(ValueError, match="the process group was destroyed"):
        gone.gather(1)


def test_fewer_groups_than_ranks_are_refused(tmp_path: Path) -> None:
    errors = end(
        start(
            tmp_path / "ranks", 3, of_rank={str(r): {"groups_per_iteration": 2} for r in range(3)}
        )
    )
    for error in errors:
        assert "groups_per_iteration=2 gives 3 ranks less than a group each" in error


def test_labels_by_values_of_all_episodes_are_refused(tmp_path: Path) -> None:
    errors = end(start(tmp_path / "ranks", 2, options=OPTIONS | {"label_source": "value"}))
    for error in errors:
        assert "label_source='value' compares the episodes of all groups" in error


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"overlap": True}, "overlap=True keeps a second copy of the whole policy"),
        ({"optimizer": "Adafactor"}, "Adafactor's state can't be shared out"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    given = {"options": OPTIONS | {"fsdp": True} | changed}
    for error in end(start(tmp_path / "ranks", 2, **given)):
        assert f"fsdp=True doesn't work here: {why}" in error


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path, victim: int) -> None:
    processes = start(tmp_path / "ranks", 2, iterations=10**6)
    began = tmp_path / "ranks" / "begun"
    deadline = time.monotonic() + PATIENCE
    while not began.exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[victim].send_signal(signal.SIGKILL)
    errors = end(processes)
    assert processes[1 - victim].returncode == 1
    assert "RankLostError: another rank has ended" in errors[1 - victim]


def test_a_rank_that_is_killed_in_an_update_ends_the_others(tmp_path: Path) -> None:
    options = OPTIONS | {"fsdp": True}
    processes = start(tmp_path / "ranks", 2, options=options, dies_in_update=1)
    errors = end(processes)
    assert processes[0].returncode == 1
    assert "RankLostError: another rank has ended" in errors[0]


@pytest.mark.parametrize("how", ["callback", "error"])
def test_a_rank_that_stops_takes_the_others_along(tmp_path: Path, how: str) -> None:
    options = OPTIONS | {"seed": None}  # the first rank draws one for all
    processes = start(tmp_path / "ranks", 3, options=options, iterations=10**6, stop=how)
    errors = end(processes)
    if how == "callback":
        assert [process.returncode for process in processes] == [0, 0, 0], errors
        states = [torch.load(tmp_path / "ranks" / f"rank{rank}.pt") for rank in range(3)]
        assert len({state["training"]["counters"]["iteration"] for state in states}) == 1
        assert all(difference(state, states[0]) == 0 for state in states)
    else:
        assert [process.returncode for process in processes] == [1, 1, 1]
        assert "a fault of the first rank" in errors[0]
        for error in errors[1:]:
            assert "RankError" in error
