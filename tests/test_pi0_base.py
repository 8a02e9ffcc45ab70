"""SB3's .zip of a policy on a frozen base: small, and never on another base."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pi0_folders import STATS, lerobot, small_config
from pi0_support import PromptEnv, make_observation
from safetensors.torch import load_file, save_file
from stable_baselines3.common.vec_env import DummyVecEnv

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.pi0 import Pi0Policy
from cfgrl_gym.algorithms.pi0.checkpoints.base import BaseCheckpoint, sha256
from cfgrl_gym.algorithms.pi0.presets import new_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = lerobot(tmp_path / "base", new_model(small_config(), seed=0))
    STATS.save(folder)
    return folder


def make(base: Path, **kwargs: Any) -> CFGRL:
    return CFGRL(
        "Pi0Policy",
        DummyVecEnv([PromptEnv] * 2),
        rloo_batch_size=3,
        groups_per_iteration=2,
        enable_dynamic_sampling=False,
        batch_size=8,
        replay_iterations=0,  # they are not saved
        policy_kwargs={"preset": "pi0", "checkpoint": base, **kwargs},
        seed=0,
        device="cpu",
    )


def load(path: Path, **kwargs: Any) -> CFGRL:
    return CFGRL.load(path, env=DummyVecEnv([PromptEnv] * 2), device="cpu", **kwargs)


def actions(algorithm: CFGRL) -> np.ndarray:
    return algorithm.predict(make_observation(), deterministic=True)[0]  # type: ignore[arg-type]


def numbers(path: Path) -> int:
    """How many parameters of the policy a .zip holds."""
    with zipfile.ZipFile(path) as archive:
        policy = safetensors.torch.load(archive.read("policy.safetensors"))
    return sum(t.numel() for t in policy.values() if t.is_floating_point())


@pytest.mark.parametrize("kwargs", [{"ema_decay": None}, {}, {"trainable": "lora"}])
def test_a_zip_holds_what_was_trained_and_goes_on_bit_equal(
    kwargs: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    algorithm = make(base, **kwargs).learn(1)
    path = tmp_path / "trained.zip"
    algorithm.save(path)
    assert isinstance(algorithm.policy, Pi0Policy)
    trained = sum(p.numel() for p in algorithm.policy.parameters() if p.requires_grad)
    copies = 1 if "ema_decay" in kwargs else 2  # with the average
    statistics = 2 * (8 + 7) + 1  # and cfg_scale
    assert numbers(path) == copies * trained + statistics
    loaded = load(path)
    assert np.array_equal(actions(loaded), actions(algorithm))
    for each in (algorithm, loaded):
        each.learn(1, reset_num_timesteps=False)
    for a, b in zip(algorithm.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_zip_says_where_its_base_was_and_what_it_was(base: Path, tmp_path: Path) -> None:
    make(base).save(tmp_path / "trained")
    with zipfile.ZipFile(tmp_path / "trained.zip") as archive:
        arguments = json.loads(archive.read("model.json"))["policy_kwargs"]
    assert arguments["checkpoint"] == str(base.resolve())
    assert arguments["base"] == {"model.safetensors": sha256(base / "model.safetensors")}


def test_a_base_that_moved_is_missed_and_can_be_given(base: Path, tmp_path: Path) -> None:
    algorithm = make(base).learn(1)
    algorithm.save(tmp_path / "trained")
    expected = actions(algorithm)
    moved = shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"expected at .*base.*load\(path, checkpoint=NEW"):
        load(tmp_path / "trained")
    again = load(tmp_path / "trained", checkpoint=moved)
    assert np.array_equal(actions(again), expected)
    again.save(tmp_path / "again")
    assert np.array_equal(actions(load(tmp_path / "again")), expected)


def change(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.state_proj.bias"] = tensors["model.state_proj.bias"] + 1.0
    save_file(tensors, base / "model.safetensors")


def test_a_base_that_changed_is_refused(base: Path, tmp_path: Path) -> None:
    make(base).save(tmp_path / "trained")
    before = sha256(base / "model.safetensors")
    change(base)
    with pytest.raises(ValueError, match=rf"has changed since this was saved.*{before[:12]}"):
        load(tmp_path / "trained")


def test_a_base_that_changes_during_a_run_is_saved_whole(base: Path, tmp_path: Path) -> None:
    algorithm = make(base)
    expected = actions(algorithm)
    change(base)
    with pytest.warns(UserWarning, match="has changed since it was loaded: all of the weights"):
        algorithm.save(tmp_path / "trained")
    (base / "model.safetensors").unlink()  # what is left is the tokenizer
    assert np.array_equal(actions(load(tmp_path / "trained")), expected)


def test_frozen_weights_that_are_not_the_bases_are_saved(base: Path, tmp_path: Path) -> None:
    algorithm = make(base)
    state = algorithm.policy.state_dict()
    name = next(name for name in state if ".vlm." in name)
    algorithm.policy.load_state_dict({**state, name: state[name] + 1})
    expected = actions(algorithm)
    algorithm.save(tmp_path / "trained")
    assert np.array_equal(actions(load(tmp_path / "trained")), expected)
    with pytest.raises(ValueError, match="holds all of its weights; leave checkpoint out"):
        load(tmp_path / "trained", checkpoint=base)


def test_the_policy_alone_is_saved_whole(base: Path, tmp_path: Path) -> None:
    policy = make(base).policy
    expected = policy.predict(make_observation(), deterministic=True)[0]
    policy.save(str(tmp_path / "policy"))
    (base / "model.safetensors").unlink()
    again = Pi0Policy.load(str(tmp_path / "policy"), device="cpu", trusted=True)
    assert np.array_equal(again.predict(make_observation(), deterministic=True)[0], expected)


def test_hashes_are_computed_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = BaseCheckpoint(str(base), (base / "model.safetensors",))
    first = read.hashes()
    monkeypatch.setattr(
        "cfgrl_gym.algorithms.pi0.checkpoints.base.sha256", lambda _: "computed again"
    )
    assert read.hashes() == first
