"""Generated rubbish in files: refused plainly, without a traceback and without leaving anything.

870 inputs. What is damaged so that nobody could tell has to do no harm.
"""

import contextlib
import io
import json
import math
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import test_malformed_inputs
import torch
import yaml
from cfgrl_envs import QueueEnv, vec
from hypothesis import given
from hypothesis import strategies as st
from pi0_support import make_observation, make_policy, make_spaces
from test_cli_options import exit_status
from test_demos import write_liberos_own
from test_malformed_inputs import examples

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.flow import NonFiniteError
from cfgrl_gym.algorithms.pi0 import Pi0Policy
from cfgrl_gym.cli.configs import TrainConfig
from cfgrl_gym.cli.policies import find_checkpoint
from cfgrl_gym.demos.files import DemonstrationFileError, read_demonstrations

refusal = partial(test_malformed_inputs.refusal, kinds=(ValueError, FileNotFoundError))


def damaged(content: bytes, draw: Any, beyond: int = 0) -> bytes:
    """Cut short, with a few bits flipped, or with other bytes put in.

    :param beyond: damage only what comes after so many bytes
    """
    kind = draw(st.sampled_from(["cut", "flip", "flip", "insert"]))
    where = draw(st.integers(beyond, len(content) - 1))
    if kind == "cut":
        return content[:where]
    if kind == "insert":
        return content[:where] + draw(st.binary(min_size=1, max_size=9)) + content[where:]
    changed = bytearray(content)
    changed[where] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


# The command line's configuration files ---------------------------------------------------------

HINTS = {f.name: get_type_hints(TrainConfig)[f.name] for f in fields(TrainConfig)}
WORDS = st.text("abcdefgh", min_size=2, max_size=6).map("zz".__add__)  # no number, no option
VALUES = st.one_of(
    WORDS,
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.booleans(),
    st.none(),
    st.lists(st.integers(-2, 2) | WORDS, max_size=3),
    st.dictionaries(WORDS, st.integers(), min_size=1, max_size=2),
)
NAMES = st.sampled_from([*HINTS, *HINTS, "colour", "train", "__class__", "policy.x", "help"])
LEAST = {"learning_rate": 1e-300, "max_grad_norm": 1e-300, "image_size": 8, "seed": 0}
LEAST |= dict.fromkeys(
    ("chunk_size", "max_episode_steps", "n_envs", "num_inference_steps", "total_timesteps"), 1
)
LEAST |= dict.fromkeys(
    ("max_iterations", "window_stride", "save_every", "eval_every", "eval_episodes"), 1
)
LEAST |= dict.fromkeys(
    ("groups_per_iteration", "n_epochs", "batch_size", "gradient_accumulation_steps"), 1
)
LEAST |= dict.fromkeys(("replay_iterations", "device_memory", "prefix_memory", "dropout_prob"), 0)
LEAST |= {"keep_checkpoints": 1, "rloo_batch_size": 2, "early_stop_percentage": 1e-300}
LEAST |= dict.fromkeys(
    ("positive_share", "optimal_share", "null_rate", "gamma", "rollout_noise"), 1e-300
)
LEAST |= {"midway_groups": 0}
MOST = {
    "seed": 2**32 - 1,
    "dropout_prob": 1,
    "early_stop_percentage": 1,
    "positive_share": 1,
    "null_rate": 1 - 1e-9,
    "optimal_share": 1,
    "gamma": 1,
}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML is of an option's type."""
    choices = get_args(hint)
    if hint in (int, float, bool, str):
        kinds = (int, float) if hint is float else hint
        return isinstance(value, kinds) and isinstance(value, bool) == (hint is bool)
    if getattr(hint, "__origin__", None) in (list, Sequence):
        return isinstance(value, list) and all(fits(each, choices[0]) for each in value)
    if all(isinstance(choice, str) for choice in choices):  # Literal
        return value in choices or (value is None and "null" in choices)
    return any(
        (choice is type(None) and value is None) or fits(value, choice) for choice in choices
    )


def is_configuration(content: bytes) -> bool:
    try:
        options = yaml.safe_load(content.decode())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError):
        return False
    if not isinstance(options, dict) or set(options) - set(HINTS):
        return False
    for name, value in options.items():
        if not fits(value, HINTS[name]):
            return False
        members = value if isinstance(value, list) else [value]
        numbers = [x for x in members if type(x) in (int, float)]
        if not all(math.isfinite(x) for x in numbers if isinstance(x, float)):
            return False
        if numbers and min(numbers) < LEAST.get(name, -math.inf):
            return False
        if numbers and max(numbers) > MOST.get(name, math.inf):
            return False
    groups, tried = options.get("groups_per_iteration", 4), options.get("max_groups_tried")
    share = options.get("early_stop_percentage", 0.8)
    if options.get("enable_dynamic_sampling") is False:
        share = 1
    enough = tried is None or tried >= math.ceil(share * groups)
    return enough and [] not in options.values()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


def check_configuration(content: bytes, folder: Path, acceptable: bool) -> None:
    (folder / "train.yaml").write_bytes(content)
    said, started = io.StringIO(), []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.chdir(folder)
        patch.setattr("cfgrl_gym.cli.train.run", started.append)  # none is run
        status = exit_status(["train", "--config", "train.yaml", "--policy", "libero_tiny"])
    if acceptable:
        assert status == 0, said.getvalue()
        assert len(started) == 1
    else:
        assert status == 2
        assert not started
        assert said.getvalue().startswith("cfgrl: error: ")
        assert said.getvalue().count("\n") == 1
        assert len(said.getvalue()) < 2000
    assert os.listdir(folder) == ["train.yaml"]


@examples(150)
@given(options=st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
def test_configurations_with_wrong_options(options: dict[str, Any], folder: Path) -> None:
    options.pop("policy", None)  # is given on the command line
    content = yaml.safe_dump(options).encode()
    check_configuration(content, folder, is_configuration(content))


@examples(60)
@given(content=st.binary(max_size=99) | st.text(max_size=60).map(str.encode))
def test_configurations_that_are_none(content: bytes, folder: Path) -> None:
    check_configuration(content, folder, is_configuration(content))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 5000,
        b"suite: " + b"[" * 900 + b"]" * 900,
        b"seed: " + b"9" * 5000,
        b"a: &a [x, x]\nb: &b [*a, *a]\nsuite: [*b, *b]\n",
        b'out: "a\0b"\n',
        b"#" * 2**21,
    ],
)
def test_configurations_that_are_traps(content: bytes, folder: Path) -> None:
    check_configuration(content, folder, acceptable=False)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--suite", "zz"],
        ["--task_id", "-1"],
        ["--policy", "zz"],
        ["--device", "zz"],
        ["--image_size", "100000"],
        ["--chunk_size", "17"],
        ["--init_states", "[99]"],
        ["--init_states", "[]"],
        ["--window_stride", "17"],
        ["--rloo_batch_size", "1"],
        ["--early_stop_percentage", "7"],
        ["--ema_decay", "2"],
        ["--norm_stats", "zz"],
        ["--condition_mode", "token"],
        ["--eval_every", "1", "--eval_episodes", "51"],
    ],
)
def test_a_refused_training_leaves_no_folder(
    wrong: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CFGRL, "learn", lambda *_, **__: pytest.fail("it trains"))
    assert exit_status(["train", "--policy", "libero_tiny", *wrong]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("cfgrl: error: ")
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


# A policy's folder ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "whole"
    make_policy().save_pretrained(folder)
    return folder


def use(folder: Path) -> None:
    """All that is done with a policy's folder."""
    find_checkpoint(str(folder), None)
    policy = Pi0Policy(*make_spaces(), lambda _: 1e-3, checkpoint=folder)
    actions = policy.sample_actions(make_observation())
    assert actions.shape == (3, 6, 7)


def with_file(whole: Path, name: str, content: bytes) -> Path:
    folder = whole.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / name).write_bytes(content)
    return folder


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    if not isinstance(value, dict | list):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(way for key, part in items for way in places(part, (*path, key)))]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.sampled_from([10**9, 10**30, -(10**30), 10**400]),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@examples(150)
@given(data=st.data())
def test_metadata_with_other_values(data: st.DataObject, policy_folder: Path) -> None:
    name = data.draw(st.sampled_from(["pi0_policy.json", "norm_stats.json", "config.json"]))
    content = json.loads((policy_folder / name).read_text())
    way = data.draw(st.sampled_from(places(content)[1:]))
    part = content
    for key in way[:-1]:
        part = part[key]
    part[way[-1]] = data.draw(JUNK)
    folder = with_file(policy_folder, name, json.dumps(content).encode())
    # Numbers in their range may still make weights' products overflow: only acting tells.
    said = refusal(lambda: use(folder), kinds=(ValueError, FileNotFoundError, NonFiniteError))
    known = ("the policy looks at", "aren't finite")
    assert said is None or str(folder) in said or any(text in said for text in known), said


@examples(110)
@given(data=st.data())
def test_damaged_metadata(data: st.DataObject, policy_folder: Path) -> None:
    name = data.draw(st.sampled_from(["pi0_policy.json", "norm_stats.json", "config.json"]))
    whole = (policy_folder / name).read_bytes()
    content = damaged(whole, data.draw) if data.draw(st.booleans()) else data.draw(st.binary())
    said = refusal(lambda: use(with_file(policy_folder, name, content)))
    try:
        json.loads(content.decode())
    except (ValueError, RecursionError):
        assert said is not None


@examples(120)
@given(data=st.data())
def test_damaged_weights(data: st.DataObject, policy_folder: Path) -> None:
    whole = (policy_folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    # What is behind the header are numbers, of which no checksum is kept.
    content = damaged(whole[:header], data.draw)
    if data.draw(st.booleans()):
        content += whole[header:]
    folder = with_file(policy_folder, "model.safetensors", content)
    said = refusal(lambda: use(folder))
    if content[:header] != whole[:header] and len(content) < header:
        assert said is not None


def test_weights_of_another_policy_are_refused(policy_folder: Path, tmp_path: Path) -> None:
    make_policy("concat").save_pretrained(tmp_path)
    other = (tmp_path / "model.safetensors").read_bytes()
    folder = with_file(policy_folder, "model.safetensors", other)
    with pytest.raises(ValueError, match="condition"):
        use(folder)


# A model's .zip, and demonstrations -------------------------------------------------------------


@pytest.fixture(scope="module")
def model_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zip") / "model.zip"
    arguments: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "seed": 0, "device": "cpu"}
    CFGRL("MlpPolicy", vec(QueueEnv), **arguments).save(path)
    return path


@examples(120)
@given(data=st.data())
def test_damaged_models(data: st.DataObject, model_zip: Path) -> None:
    path = model_zip.with_name("damaged.zip")
    path.write_bytes(damaged(model_zip.read_bytes(), data.draw))
    loaded: list[CFGRL] = []
    said = refusal(lambda: loaded.append(CFGRL.load(path, device="cpu")))
    assert said is None or "damaged.zip" in said
    if loaded:  # a date in the archive's directory, say
        whole = CFGRL.load(model_zip, device="cpu")
        for one, two in zip(loaded[0].policy.parameters(), whole.policy.parameters(), strict=True):
            assert torch.equal(one, two)
        with_zip = CFGRL("MlpPolicy", vec(QueueEnv), policy_kwargs={"net_arch": [4]}, device="cpu")
        with_zip.set_parameters(path)


@examples(100)
@given(data=st.data())
def test_models_with_other_values(data: st.DataObject, model_zip: Path) -> None:
    with zipfile.ZipFile(model_zip) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    content = json.loads(parts["model.json"])
    ways = [way for way in places(content)[1:] if "net_arch" not in way]  # which takes any size
    way = data.draw(st.sampled_from(ways))
    part = content
    for key in way[:-1]:
        part = part[key]
    part[way[-1]] = data.draw(JUNK)
    path = model_zip.with_name("changed.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name, whole in (parts | {"model.json": json.dumps(content).encode()}).items():
            archive.writestr(name, whole)
    loaded: list[CFGRL] = []
    said = refusal(lambda: loaded.append(CFGRL.load(path, device="cpu")))
    assert said is None or "changed.zip" in said
    if loaded:
        assert loaded[0].predict(np.zeros(4, np.float32))[0].shape == (3, 1)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demos") / "whole.hdf5"
    write_liberos_own(path)
    return path


@examples(60)
@given(data=st.data())
def test_truncated_demonstrations(data: st.DataObject, demonstrations: Path) -> None:
    whole = demonstrations.read_bytes()
    path = demonstrations.with_name("cut.hdf5")
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(DemonstrationFileError, match=r"cut\.hdf5"):
        read_demonstrations(path)
