"""A model's .zip from anybody: it runs no code unless it is trusted, and ours need no trust."""

import base64
import functools
import json
import operator
import os
import pickle
import pickletools
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import stable_baselines3.common.utils as sb3
import torch
from cfgrl_envs import QueueEnv, vec
from gymnasium import spaces
from pi0_support import SIZES, PromptEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from cfgrl_gym.algorithms import CFGRL, MlpPolicy
from cfgrl_gym.algorithms.pi0 import NormStats, Pi0Policy
from cfgrl_gym.algorithms.saving.saved_model import saved_policy_kwargs
from cfgrl_gym.algorithms.saving.saved_values import UntrustedFileError
from cfgrl_gym.cli import main

SMALL = {"rloo_batch_size": 3, "groups_per_iteration": 2, "seed": 3, "device": "cpu"}


def make(**kwargs: Any) -> CFGRL:
    arguments = {**SMALL, "policy_kwargs": {"net_arch": [16]}, **kwargs}
    return CFGRL("MlpPolicy", vec(QueueEnv, 2), **arguments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned: everything that a training leaves in its attributes is there."""
    path = tmp_path_factory.mktemp("saved") / "model.zip"
    make().learn(60).save(path)
    return path


def rewrite(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of a .zip with some of its parts changed."""
    with zipfile.ZipFile(source) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return target


def with_value(source: Path, target: Path, key: str, content: bytes) -> Path:
    """A copy of a .zip in which the pickled value of `key` is `content`."""

    def change(parts: dict[str, bytes]) -> None:
        data = json.loads(parts["data"])
        data[key] = {":type:": "?", ":serialized:": base64.b64encode(content).decode()}
        parts["data"] = json.dumps(data).encode()

    return rewrite(source, target, change)


# What CFGRL saves -------------------------------------------------------------------------------


def test_what_a_training_saves_needs_no_trust_and_equals_sb3s_own_reading(saved: Path) -> None:
    ours, theirs = CFGRL.load(saved, device="cpu"), CFGRL.load(saved, device="cpu", trusted=True)
    assert ours.policy_class is MlpPolicy
    assert vars(ours).keys() == vars(theirs).keys()
    for name in ("observation_space", "action_space", "ep_info_buffer", "_task_successes"):
        assert getattr(ours, name) == getattr(theirs, name), name
    np.testing.assert_array_equal(ours._last_episode_starts, theirs._last_episode_starts)
    np.testing.assert_array_equal(ours.action_space.sample(), theirs.action_space.sample())
    for one, two in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert torch.equal(one, two)


def test_ordinary_arguments_need_no_trust(tmp_path: Path) -> None:
    schedule = sb3.LinearSchedule(1e-3, 1e-4, 0.5)
    model = make(
        learning_rate=schedule,
        tensorboard_log=str(tmp_path / "log"),
        policy_kwargs={"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}},
    )
    model.save(tmp_path / "mlp")
    loaded = CFGRL.load(tmp_path / "mlp", device="cpu")
    assert isinstance(loaded.policy.optimizer, torch.optim.SGD)
    assert [loaded.lr_schedule(p) for p in (1.0, 0.6)] == [schedule(p) for p in (1.0, 0.6)]
    pi0 = CFGRL(
        "Pi0Policy", DummyVecEnv([PromptEnv]), policy_kwargs={"sizes": SIZES}, seed=0, device="cpu"
    )
    pi0.save(tmp_path / "pi0")
    assert CFGRL.load(tmp_path / "pi0", device="cpu").policy.norm_stats == NormStats.identity()


def test_a_file_of_sb3_before_2_7_needs_no_trust(saved: Path, tmp_path: Path) -> None:
    def constant(value: float) -> Callable[[float], float]:
        return lambda _: value  # as its get_schedule_fn: saved as code, even for a constant

    old = with_value(saved, tmp_path / "old.zip", "lr_schedule", cloudpickle.dumps(constant(0.1)))
    assert CFGRL.load(old, device="cpu").lr_schedule(1.0) == 3e-4  # made of learning_rate


def test_a_file_object_and_a_name_without_zip_work_as_in_sb3(saved: Path) -> None:
    assert CFGRL.load(str(saved.with_suffix("")), device="cpu").num_timesteps > 0
    with saved.open("rb") as file:
        assert CFGRL.load(file, device="cpu").num_timesteps > 0
        assert saved_policy_kwargs(file)["net_arch"] == [16]
        assert not file.closed


# What it doesn't --------------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def assembled(*parts: Any) -> bytes:
    """A pickle of opcodes by name, each with its argument's bytes."""
    codes = {op.name: op.code.encode("latin1") for op in pickletools.opcodes}
    return b"".join(codes[p] if isinstance(p, str) else p for p in parts)


def text(value: str) -> tuple[str, bytes]:
    return "SHORT_BINUNICODE", bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> tuple[Any, ...]:
    return *text(module), *text(name), "STACK_GLOBAL"


START = ("PROTO", b"\5")
# (None, {"sample": 1}), the state of an object with slots: setattr, on a class just as well
ONTO_CLASS = ("NONE", "EMPTY_DICT", *text("sample"), "BININT1", b"\1", "SETITEM", "TUPLE2", "BUILD")


def pointers() -> bytes:
    """NumPy's dtype of objects, told that it holds none: bytes would become pointers."""
    dtype = pickle.dumps(np.dtype("O"), 5)
    return dtype.replace(b"K?", b"K\0")  # the flags


ATTACKS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}")),
    "posix via protocol 0": lambda mark: pickle.dumps(Calls(os.mkdir, str(mark)), protocol=0),
    "exec": lambda mark: pickle.dumps(Calls(exec, f"open({str(mark)!r}, 'w')")),
    "getattr": lambda mark: pickle.dumps(Calls(getattr, deque, "__init__")),
    "attrgetter": lambda mark: pickle.dumps(operator.attrgetter("__init__.__globals__")),
    "partial": lambda mark: pickle.dumps(functools.partial(os.mkdir, str(mark))),
    "a function's code": lambda mark: cloudpickle.dumps(lambda _: mark.touch()),
    "a class's code": lambda mark: cloudpickle.dumps(type("Mine", (MlpPolicy,), {})),
    "copyreg": lambda mark: assembled(*START, *named("copyreg", "_reconstructor"), "STOP"),
    "a dotted name": lambda mark: assembled(
        *START, *named("collections", "deque.__init__"), "STOP"
    ),
    "a dotted name of a module": lambda mark: assembled(
        *START, *named("torch", "serialization.os.system"), "STOP"
    ),
    "an extension's number": lambda mark: assembled(*START, "EXT1", b"\1", "STOP"),
    "a persistent id": lambda mark: assembled(*START, *text("x"), "BINPERSID", "STOP"),
    "attributes of a class": lambda mark: assembled(
        *START, *named("gymnasium.spaces.box", "Box"), *ONTO_CLASS, "STOP"
    ),
    "a call of what is only named": lambda mark: assembled(
        *START, *named("torch.optim.adam", "Adam"), "EMPTY_TUPLE", "REDUCE", "STOP"
    ),
    "a helper that calls": lambda mark: assembled(
        *START,
        *named("numpy.random._pickle", "__generator_ctor"),
        *text("x"),
        *named("torch.optim.adam", "Adam"),
        "TUPLE2",
        "REDUCE",
        "STOP",
    ),
    "torch in pickle": lambda mark: pickle.dumps(torch.zeros(2).untyped_storage()),
    "pointers": lambda mark: pointers(),
    "an array of objects": lambda mark: pickle.dumps(np.array([Calls(os.mkdir, str(mark))], "O")),
    "numpy's loader": lambda mark: pickle.dumps(Calls(np.load, str(mark), None, True)),
}
DAMAGED = ("an extension's number", "a persistent id")  # opcodes that the reader hasn't got


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_could_run_code_is_refused_with_its_key_and_has_not_run(
    attack: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "it_ran"
    content = ATTACKS[attack](mark)
    kind = ValueError if attack in DAMAGED else UntrustedFileError
    sample = spaces.Box.sample
    for key in ("policy_kwargs", "ep_info_buffer"):
        path = with_value(saved, tmp_path / f"{key}.zip", key, content)
        with pytest.raises(kind, match=f"'{key}'") as error:
            CFGRL.load(path, device="cpu")
        assert kind is ValueError or "CFGRL.load(path, trusted=True)" in str(error.value)
        with pytest.raises(kind, match=f"'{key}'"):
            CFGRL.load(path, device="cpu", checkpoint="elsewhere")
        assert main(["eval", "--policy", str(path), "--out", str(tmp_path / "run")]) == 2
        assert f"'{key}'" in capsys.readouterr().err
    with pytest.raises(kind):
        saved_policy_kwargs(tmp_path / "policy_kwargs.zip")
    assert not mark.exists()
    assert not (tmp_path / "run").exists()
    assert spaces.Box.sample is sample
    # and a value of one's own is taken in place of it, which nobody then looks at
    assert CFGRL.load(path, device="cpu", custom_objects={"ep_info_buffer": None})
    assert not mark.exists()


def test_a_trusted_file_runs_what_it_brings(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    path = with_value(saved, tmp_path / "x.zip", "extra", ATTACKS["os.system"](mark))
    with pytest.raises(UntrustedFileError, match=r"'extra' needs posix\.system"):
        CFGRL.load(path, device="cpu")
    assert not mark.exists()
    CFGRL.load(path, device="cpu", trusted=True)
    assert mark.exists()


def test_the_command_line_trusts_only_when_asked_to(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "it_ran"
    path = with_value(saved, tmp_path / "x.zip", "extra", ATTACKS["os.system"](mark))
    assert main(["eval", "--policy", str(path)]) == 2
    assert not mark.exists()
    assert main(["eval", "--policy", str(path), "--trusted", "true"]) == 2
    assert "is a MlpPolicy, not a Pi0Policy" in capsys.readouterr().err
    assert mark.exists()


def test_a_saved_environments_name_imports_no_module(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cfgrl_test_mine.py").write_text("open('it_ran', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def change(parts: dict[str, bytes]) -> None:
        data = json.loads(parts["data"]) | {"env": "cfgrl_test_mine:Pendulum-v1"}
        parts["data"] = json.dumps(data).encode()

    path = rewrite(saved, tmp_path / "x.zip", change)
    with pytest.raises(UntrustedFileError, match="a value of 'env'"):
        CFGRL.load(path, device="cpu")
    assert not Path("it_ran").exists()


def test_numpys_shared_dtypes_stay_as_they_are(saved: Path, tmp_path: Path) -> None:
    state = ("MARK", "BININT1", b"\3", *text(">"), *["NONE"] * 3)
    ends = ("BININT", b"\xff" * 4, "BININT", b"\xff" * 4, "BININT1", b"\0", "TUPLE", "BUILD")
    shared = (*named("numpy", "dtype"), *text("f8"), "NEWFALSE", "NEWFALSE", "TUPLE3", "REDUCE")
    content = assembled(*START, *shared, *state, *ends, "STOP")
    CFGRL.load(with_value(saved, tmp_path / "x.zip", "extra", content), device="cpu")
    assert np.dtype("f8").byteorder == "="


def test_a_schedule_of_ones_own_and_a_policy_of_ones_own_need_trust(tmp_path: Path) -> None:
    class Mine(MlpPolicy):
        pass

    make(learning_rate=lambda p: 1e-3 * p).save(tmp_path / "schedule")
    with pytest.raises(UntrustedFileError, match="'learning_rate' needs cloudpickle"):
        CFGRL.load(tmp_path / "schedule", device="cpu")
    assert CFGRL.load(tmp_path / "schedule", device="cpu", trusted=True).lr_schedule(0.5) == 5e-4
    given = {"learning_rate": 0.25}
    loaded = CFGRL.load(tmp_path / "schedule", device="cpu", custom_objects=given)
    assert loaded.lr_schedule(1.0) == 0.25
    CFGRL(Mine, vec(QueueEnv, 2), **SMALL).save(tmp_path / "policy")
    with pytest.raises(UntrustedFileError, match="'policy_class'"):
        CFGRL.load(tmp_path / "policy", device="cpu")
    given = {"policy_class": Mine}
    assert type(CFGRL.load(tmp_path / "policy", custom_objects=given).policy) is Mine


def test_weights_that_are_more_than_tensors_are_refused_even_if_trusted(
    saved: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "it_ran"

    def change(parts: dict[str, bytes]) -> None:
        torch.save({"x": Calls(os.mkdir, str(mark))}, tmp_path / "policy.pth")
        parts["policy.pth"] = (tmp_path / "policy.pth").read_bytes()

    path = rewrite(saved, tmp_path / "x.zip", change)
    for trusted in (False, True):
        with pytest.raises(UntrustedFileError, match="its weights are damaged, or hold something"):
            CFGRL.load(path, device="cpu", trusted=trusted)
    with pytest.raises(UntrustedFileError, match="its weights"):
        make().set_parameters(path)
    assert not mark.exists()


def test_a_policys_own_pickle_needs_trust(tmp_path: Path) -> None:
    policy = make().policy
    policy.save(str(tmp_path / "policy.pt"))
    for kind in (MlpPolicy, Pi0Policy):
        with pytest.raises(ValueError, match=r"can run code.*load\(path, trusted=True\)"):
            kind.load(str(tmp_path / "policy.pt"))
    MlpPolicy.load(str(tmp_path / "policy.pt"), trusted=True)


def test_a_model_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    from stable_baselines3 import PPO

    PPO("MlpPolicy", "Pendulum-v1", n_steps=8, device="cpu").save(tmp_path / "ppo")
    with pytest.raises(UntrustedFileError, match="'policy_class'"):
        CFGRL.load(tmp_path / "ppo")
    with pytest.raises(ValueError, match="no model that CFGRL saved"):
        CFGRL.load(tmp_path / "ppo", trusted=True)
