"""A model's .zip from anybody: nothing in it can run code, and what isn't from CFGRL is refused."""

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import stable_baselines3.common.utils as sb3
import torch
from cfgrl_envs import QueueEnv, vec
from gymnasium import spaces
from pi0_support import SIZES, PromptEnv
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from cfgrl_gym.algorithms import CFGRL, MlpPolicy
from cfgrl_gym.algorithms.pi0 import NormStats, Pi0Policy
from cfgrl_gym.algorithms.saving.json_values import from_json, to_json
from cfgrl_gym.cli import main

# Replayed windows are not saved.
SMALL = {
    "rloo_batch_size": 3,
    "groups_per_iteration": 2,
    "replay_iterations": 0,
    "seed": 3,
    "device": "cpu",
}


def make(**kwargs: Any) -> CFGRL:
    arguments = {**SMALL, "policy_kwargs": {"net_arch": [16]}, **kwargs}
    return CFGRL("MlpPolicy", vec(QueueEnv, 2), **arguments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned: everything that a training leaves in its attributes is there."""
    path = tmp_path_factory.mktemp("saved") / "model.zip"
    make(learning_rate=sb3.LinearSchedule(1e-3, 1e-4, 0.5)).learn(60).save(path)
    return path


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[dict[str, bytes]], None],
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A copy of a .zip with some of its parts changed."""
    with zipfile.ZipFile(source) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return target


def with_json(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a .zip in which model.json is changed."""

    def edit(parts: dict[str, bytes]) -> None:
        document = json.loads(parts["model.json"])
        change(document)
        parts["model.json"] = json.dumps(document).encode()

    return rewrite(source, target, edit)


def with_tensors(source: Path, target: Path, part: str, change: Callable[[Any], Any]) -> Path:
    """A copy of a .zip in which the tensors of a part are changed."""

    def edit(parts: dict[str, bytes]) -> None:
        tensors = safetensors.torch.load(parts[part])
        change(tensors)
        parts[part] = safetensors.torch.save(tensors)

    return rewrite(source, target, edit)


# What CFGRL saves -------------------------------------------------------------------------------


def test_all_that_a_training_goes_on_from_is_saved_without_a_pickle(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpickled(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, unpickled)
    monkeypatch.setattr(torch, "load", unpickled)
    with zipfile.ZipFile(saved) as archive:
        assert [Path(name).suffix for name in archive.namelist()] == [
            *(".json", ".safetensors", ".safetensors", ".txt"),
        ]
    original = make(learning_rate=sb3.LinearSchedule(1e-3, 1e-4, 0.5)).learn(60)
    loaded = CFGRL.load(saved, device="cpu")
    assert loaded.policy_class is MlpPolicy
    assert loaded.training_state() == original.training_state()
    for name in ("observation_space", "action_space", "n_envs", "rloo_batch_size", "seed"):
        assert getattr(loaded, name) == getattr(original, name), name
    assert [loaded.lr_schedule(p) for p in (1.0, 0.6)] == [
        original.lr_schedule(p) for p in (1.0, 0.6)
    ]
    for part in ("policy", "policy.optimizer"):
        one, two = (model.get_parameters()[part] for model in (original, loaded))
        assert one.keys() == two.keys()
    for one, two in zip(original.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert torch.equal(one, two)
        state, again = original.policy.optimizer.state[one], loaded.policy.optimizer.state[two]
        assert all(torch.equal(state[name], again[name]) for name in state)


def test_arguments_of_the_policy_are_kept(tmp_path: Path) -> None:
    model = make(
        tensorboard_log=str(tmp_path / "log"),
        policy_kwargs={"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}},
    )
    model.learn(20).save(tmp_path / "mlp")
    loaded = CFGRL.load(tmp_path / "mlp", env=vec(QueueEnv, 2), device="cpu")
    assert isinstance(loaded.policy.optimizer, torch.optim.SGD)
    assert loaded.policy.optimizer.param_groups[0]["momentum"] == 0.5
    for each in (model, loaded):
        each.learn(20, reset_num_timesteps=False)
    for one, two in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert torch.equal(one, two)
    pi0 = CFGRL(
        "Pi0Policy", DummyVecEnv([PromptEnv]), policy_kwargs={"sizes": SIZES}, seed=0, device="cpu"
    )
    pi0.save(tmp_path / "pi0")
    again = CFGRL.load(tmp_path / "pi0", device="cpu")
    assert isinstance(again.policy, Pi0Policy)
    assert isinstance(pi0.policy, Pi0Policy)
    assert again.policy.norm_stats == NormStats.identity()
    assert again.policy.config == pi0.policy.config
    assert list(again.observation_space) == list(pi0.observation_space)  # in the same order


@pytest.mark.parametrize(
    "value",
    [
        spaces.Box(-np.inf, np.inf, (3,), np.float32),
        spaces.Box(np.array([0, -5], np.int64), np.array([2**40, 7], np.int64), dtype=np.int64),
        spaces.Box(0, 255, (4, 4, 3), np.uint8),
        spaces.Dict([("b", spaces.Discrete(3, start=-1)), ("a", spaces.MultiBinary(4))]),
        spaces.MultiBinary([2, 3]),
        spaces.MultiDiscrete([3, 3]),
        spaces.MultiDiscrete(np.array([[2, 5]])),
    ],
)
def test_spaces_come_back_equal(value: spaces.Space) -> None:
    again: Any = from_json(json.loads(json.dumps(to_json(value))))
    assert again == value
    assert again.dtype == value.dtype
    if isinstance(value, spaces.Dict):
        assert list(again) == list(value)


def test_a_file_object_and_a_name_without_zip_work_as_in_sb3(saved: Path, tmp_path: Path) -> None:
    assert CFGRL.load(str(saved.with_suffix("")), device="cpu").num_timesteps > 0
    with saved.open("rb") as file:
        assert CFGRL.load(file, device="cpu").num_timesteps > 0
        assert not file.closed
    buffer = io.BytesIO()
    make().save(buffer)
    buffer.seek(0)
    assert CFGRL.load(buffer, device="cpu").num_timesteps == 0
    make().save(tmp_path / "new" / "model")  # as in SB3, the folder is made
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.zip"]
    with pytest.raises(FileNotFoundError):
        CFGRL.load(tmp_path / "nothing")


def test_values_can_be_given_left_out_and_added(saved: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"learning_rate": 0.25, "policy_kwargs": {"num_inference_steps": 3}}
    loaded = CFGRL.load(saved, device="cpu", custom_objects=given, n_epochs=7, note="mine")
    assert (loaded.lr_schedule(1.0), loaded.n_epochs) == (0.25, 7)
    assert (loaded.policy.num_inference_steps, loaded.policy.net_arch) == (3, [16])  # type: ignore[attr-defined]
    assert loaded.note == "mine"  # type: ignore[attr-defined]
    loaded.save(tmp_path / "model", exclude=["n_epochs"], include=["note", "num_timesteps"])
    again = CFGRL.load(tmp_path / "model", device="cpu")
    assert (again.n_epochs, again.note) == (12, "mine")  # type: ignore[attr-defined]
    assert again.num_timesteps == loaded.num_timesteps
    with pytest.raises(ValueError, match=r"exp_avg has shape \(2, 16\) for .* shape \(2, 8\)"):
        CFGRL.load(saved, device="cpu", policy_kwargs={"net_arch": [8]})


def test_a_schedule_and_a_policy_of_ones_own_are_given_again(tmp_path: Path) -> None:
    class Mine(MlpPolicy):
        pass

    class Known(CFGRL):
        policy_aliases = {"Own": Mine}  # noqa: RUF012

    def schedule(progress: float) -> float:
        return 1e-3 * progress

    with pytest.warns(UserWarning, match=r"leaves out its learning_rate.*learning_rate=\.\.\."):
        make(learning_rate=schedule).save(tmp_path / "schedule")
    with pytest.raises(ValueError, match=r"learning_rate .*CFGRL\.load\(path, learning_rate=\.\."):
        CFGRL.load(tmp_path / "schedule", device="cpu")
    for given in ({"learning_rate": schedule}, {"custom_objects": {"learning_rate": schedule}}):
        loaded = CFGRL.load(tmp_path / "schedule", device="cpu", **given)  # type: ignore[arg-type]
        assert loaded.lr_schedule(0.5) == 5e-4
    with pytest.warns(UserWarning, match="leaves out its policy_class"):
        CFGRL(Mine, vec(QueueEnv, 2), **SMALL).save(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"policy_class .*CFGRL\.load\(path, policy_class="):
        CFGRL.load(tmp_path / "policy", device="cpu")
    given = {"policy_class": Mine}
    assert type(CFGRL.load(tmp_path / "policy", custom_objects=given).policy) is Mine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Known("Own", vec(QueueEnv, 2), **SMALL).save(tmp_path / "known")  # type: ignore[arg-type]
    assert type(Known.load(tmp_path / "known", device="cpu").policy) is Mine
    with pytest.raises(ValueError, match="policy 'Own' is unknown"):
        CFGRL.load(tmp_path / "known", device="cpu")


def test_an_optimizer_of_ones_own_is_given_again(tmp_path: Path) -> None:
    class Mine(torch.optim.SGD):
        pass

    model = make(policy_kwargs={"optimizer_class": Mine})
    with pytest.warns(UserWarning, match=r"policy_kwargs=\{\"optimizer_class\": \.\.\.\}"):
        model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"its policy_kwargs\.optimizer_class"):
        CFGRL.load(tmp_path / "model", device="cpu")
    loaded = CFGRL.load(tmp_path / "model", device="cpu", policy_kwargs={"optimizer_class": Mine})
    assert type(loaded.policy.optimizer) is Mine


def test_arguments_of_a_subclass_are_kept(tmp_path: Path) -> None:
    class Warmer(CFGRL):
        def __init__(self, *args: Any, temperature: float = 1.0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.temperature = temperature

    model = Warmer("MlpPolicy", vec(QueueEnv), temperature=2.0, **SMALL)  # type: ignore[arg-type]
    model.save(tmp_path / "model")
    loaded = Warmer.load(tmp_path / "model", device="cpu")
    assert (loaded.temperature, loaded.rloo_batch_size) == (2.0, 3)


# What it refuses --------------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def set_in(*way: Any) -> Callable[[dict[str, Any]], None]:
    """Set a value of the JSON, at the place that the last but one name."""

    def change(document: dict[str, Any]) -> None:
        *before, last, value = way
        for key in before:
            document = document[key]
        document[last] = value

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": set_in("format", 999),
    "an unknown policy": set_in("values", "policy_class", "os.system"),
    "a policy that is no name": set_in("values", "policy_class", 3),
    "an unknown class": set_in("values", "observation_space", "$type", "os.system"),
    "a class that is none of a space": set_in("values", "observation_space", "$type", ["Box"]),
    "other arguments of a class": set_in("values", "observation_space", "seed_of", 3),
    "no space": set_in("values", "observation_space", 3),
    "another action space": set_in("values", "action_space", {"$type": "Discrete", "n": 3}),
    "bounds of no number": set_in("values", "action_space", "low", "numbers", float("nan")),
    "bounds of objects": set_in("values", "action_space", "low", "dtype", "O"),
    "bounds that fill the memory": set_in("values", "action_space", "low", "shape", [10**6] * 3),
    "bounds of a negative size": set_in("values", "action_space", "low", "shape", [-1]),
    "a text for a number": set_in("values", "n_epochs", "4"),
    "a number for a text": set_in("values", "tensorboard_log", 3),
    "a truth for a number": set_in("values", "stats_window_size", True),
    "a huge number": set_in("values", "stats_window_size", 10**30),
    "NaN": set_in("values", "max_grad_norm", float("nan")),
    "a number out of range": set_in("values", "dropout_prob", 2.0),
    "a text as learning rate": set_in("values", "learning_rate", "os.system"),
    "an unknown optimizer": set_in("policy_kwargs", "optimizer_class", "name", "os.system"),
    "an optimizer's module": set_in("policy_kwargs", "optimizer_class", "name", "lr_scheduler"),
    "another argument of the policy": set_in("policy_kwargs", "colour", 3),
    "another network": set_in("policy_kwargs", "net_arch", [300]),
    "a text as ema_decay": set_in("policy_kwargs", "ema_decay", "x"),
    "no network": set_in("policy_kwargs", "net_arch", "x"),
    "no arguments of the policy": set_in("policy_kwargs", None),
    "no values": set_in("values", []),
    "a counter that is none": set_in("training", "counters", "iteration", "x"),
    "a negative counter": set_in("training", "counters", "n_updates", -1),
    "another counter": set_in("training", "counters", "colour", 1),
    "successes that are none": set_in("training", "ep_success", ["x"]),
    "episodes that are none": set_in("training", "ep_info", [{"r": "x", "l": 1}]),
    "no number of environments": set_in("n_envs", "x"),
    "something left out": set_in("left_out", {"n_epochs": "a reason"}),
    "no reasons": set_in("left_out", 3),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_json_that_cfgrl_does_not_write_is_refused_with_the_file(
    hostile: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_json(saved, tmp_path / "x.zip", HOSTILE[hostile])
    with pytest.raises(ValueError, match=r"x\.zip' is no model that CFGRL saved"):
        CFGRL.load(path, device="cpu")
    assert main(["eval", "--policy", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "x.zip" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10**5])
def test_a_part_that_is_no_json_is_refused(content: bytes, saved: Path, tmp_path: Path) -> None:
    path = rewrite(saved, tmp_path / "x.zip", lambda parts: parts.update({"model.json": content}))
    with pytest.raises(ValueError, match=r"x\.zip' is no model that CFGRL saved"):
        CFGRL.load(path, device="cpu")


def test_attributes_that_a_model_has_are_not_overwritten(saved: Path, tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["values"] |= {"predict": "x", "__class__": "x", "env": "x", "policy": "x"}

    loaded = CFGRL.load(with_json(saved, tmp_path / "x.zip", change), device="cpu")
    assert (type(loaded), loaded.env) == (CFGRL, None)
    assert loaded.predict(np.zeros(4, np.float32))[0].shape == (3, 1)


def test_other_tensors_are_refused(saved: Path, tmp_path: Path) -> None:
    def shorter(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name, tensor in tensors.items() if tensor.numel() > 1)
        tensors[name] = tensors[name].flatten()[1:].clone()

    def more(tensors: dict[str, torch.Tensor]) -> None:
        tensors["99.exp_avg"] = torch.zeros(3)

    for part in ("policy.safetensors", "optimizer.safetensors"):
        for change in (shorter, more):
            path = with_tensors(saved, tmp_path / "x.zip", part, change)
            with pytest.raises(ValueError, match=r"x\.zip' is no model that CFGRL saved"):
                CFGRL.load(path, device="cpu")
            with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|nexpected|saved"):
                make().set_parameters(path)


def test_a_pickle_in_place_of_a_part_is_refused_and_has_not_run(
    saved: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "it_ran"
    call = Calls(os.mkdir, str(mark))
    torch.save({"x": call}, tmp_path / "x.pth")
    for part in ("model.json", "policy.safetensors", "optimizer.safetensors"):
        for content in (pickle.dumps(call), (tmp_path / "x.pth").read_bytes()):
            path = rewrite(saved, tmp_path / "x.zip", lambda p: p.update({part: content}))  # noqa: B023
            with pytest.raises(ValueError, match=r"x\.zip' is no model that CFGRL saved"):
                CFGRL.load(path, device="cpu")
    assert not mark.exists()


def test_a_zip_of_other_parts_or_sizes_is_refused(saved: Path, tmp_path: Path) -> None:
    for part in ("model.json", "policy.safetensors", "optimizer.safetensors"):
        path = rewrite(saved, tmp_path / "x.zip", lambda parts: parts.pop(part))  # type: ignore[arg-type] # noqa: B023
        with pytest.raises(ValueError, match=rf"x\.zip' is no model.*{part}"):
            CFGRL.load(path, device="cpu")

    def bomb(parts: dict[str, bytes]) -> None:
        parts["model.json"] = b" " * 10**7

    path = rewrite(saved, tmp_path / "x.zip", bomb, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="its parts are compressed"):
        CFGRL.load(path, device="cpu")

    def header(parts: dict[str, bytes]) -> None:
        weights = parts["policy.safetensors"]
        parts["policy.safetensors"] = (2**62).to_bytes(8, "little") + weights[8:]

    with pytest.raises(ValueError, match=r"x\.zip' is no model"):
        CFGRL.load(rewrite(saved, tmp_path / "x.zip", header), device="cpu")
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"x\.zip' is no model"):
        CFGRL.load(tmp_path / "x.zip")


def test_sb3s_own_form_is_refused_by_name(tmp_path: Path) -> None:
    PPO("MlpPolicy", "Pendulum-v1", n_steps=8, device="cpu").save(tmp_path / "ppo")
    for use in (CFGRL.load, make().set_parameters):
        with pytest.raises(ValueError, match=r"ppo'.*SB3's own form.*take the folder 'policy'"):
            use(tmp_path / "ppo")  # type: ignore[operator]


def test_a_policys_own_pickle_needs_trust(tmp_path: Path) -> None:
    policy = make().policy
    policy.save(str(tmp_path / "policy.pt"))
    for kind in (MlpPolicy, Pi0Policy):
        with pytest.raises(ValueError, match=r"can run code.*load\(path, trusted=True\)"):
            kind.load(str(tmp_path / "policy.pt"))
    MlpPolicy.load(str(tmp_path / "policy.pt"), trusted=True)
