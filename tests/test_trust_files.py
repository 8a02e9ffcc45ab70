"""Checkpoints, statistics, demonstrations and states from anybody: no code, no other folder, and no
network unless a hub name is given."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from pi0_folders import FORMATS, STATS, lerobot, save_word_tokenizer, small_config
from pi0_support import SIZES, make_policy, make_spaces
from test_demos import write_liberos_own
from test_trust import Calls

import cfgrl_gym.envs.suites as suites
from cfgrl_gym.algorithms.pi0 import Pi0ForCFGRL, Pi0Policy
from cfgrl_gym.algorithms.pi0.checkpoints import shipped
from cfgrl_gym.algorithms.pi0.presets import new_model
from cfgrl_gym.cli import main
from cfgrl_gym.cli.policies import find_checkpoint
from cfgrl_gym.demos.files import DemonstrationFileError, read_demonstrations
from cfgrl_gym.json_files import named_file

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model() -> Pi0ForCFGRL:
    return new_model(small_config(), seed=0)


def policy_of(checkpoint: Path | str, **kwargs: Any) -> Pi0Policy:
    arguments = {"preset": "pi0", "checkpoint": checkpoint, "norm_stats": STATS, **kwargs}
    return Pi0Policy(*make_spaces(), lambda _: 1e-3, **arguments)


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# LIBERO's initial states ------------------------------------------------------------------------


def legacy(path: Path, content: Any) -> Path:
    torch.save(content, path)  # as LIBERO's files were made
    return path


def test_the_originals_pickled_states_are_read_as_they_are(tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=(50, 110))
    path = legacy(tmp_path / "task.pruned_init", states)
    read = suites.read_init_states(path)
    np.testing.assert_array_equal(read, states)
    assert read.dtype == np.float64


@pytest.mark.parametrize("content", ["code", None, [1.0, 2.0], np.zeros(3), {"states": 1}])
def test_states_that_are_more_than_numbers_are_refused(content: Any, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    if isinstance(content, str):
        content = Calls(os.mkdir, str(mark))
    elif content is None:
        content = np.array([[Calls(os.mkdir, str(mark))]], dtype=object)
    path = legacy(tmp_path / "task.pruned_init", content)
    with pytest.raises(ValueError, match=r"initial states .*install LIBERO again"):
        suites.read_init_states(path)
    np.savez(tmp_path / "task.npz", states=np.array([[content]], dtype=object))
    with pytest.raises(ValueError, match="initial states"):
        suites.read_init_states(tmp_path / "task.npz")
    assert not mark.exists()


# Names in files ---------------------------------------------------------------------------------

OUTSIDE = (
    "../x",
    "/etc/passwd",
    "a/../../x",
    "..",
    "~/x",
    "..\\x",
    "C:\\x",
    "",
    ".",
    "a\0b",
    3,
    None,
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_folder_are_refused(
    name: Any, model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    folder = lerobot(tmp_path / "checkpoint", model)
    (tmp_path / "x").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"index\.json' names .*(leads out|no file's name)"):
        named_file(folder, name, "index.json")
    if name:  # a step without a file has none
        steps = {"steps": [{"state_file": name}]}
        (folder / "policy_preprocessor.json").write_text(json.dumps(steps))
        with pytest.raises(ValueError, match=r"preprocessor\.json' names"):
            policy_of(folder, norm_stats=None)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index\.json' names"):
        policy_of(folder)


def test_the_hubs_cache_of_links_works(model: Pi0ForCFGRL, tmp_path: Path) -> None:
    real = lerobot(tmp_path / "real", model)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(real.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "model.safetensors").rename(snapshot / "model-1.safetensors")
    names = dict.fromkeys(["a", "b"], "model-1.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert policy_of(snapshot).config.preset == "pi0"


def test_hdf5_doesnt_show_other_files(tmp_path: Path) -> None:
    write_liberos_own(tmp_path / "other.hdf5")
    path = tmp_path / "demo.hdf5"
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(8 * 4 * 7))

    def linked(file: Any) -> None:
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = h5py.ExternalLink("other.hdf5", "/data/demo_0/actions")

    def raw(file: Any) -> None:
        del file["data/demo_0/actions"]
        file["data/demo_0"].create_dataset(
            "actions", (4, 7), "f8", external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
        )

    def virtual(file: Any) -> None:
        del file["data/demo_0/actions"]
        layout = h5py.VirtualLayout((4, 7), "f8")
        layout[:] = h5py.VirtualSource("other.hdf5", "data/demo_0/actions", shape=(4, 7))
        file["data/demo_0"].create_virtual_dataset("actions", layout)

    def group(file: Any) -> None:
        del file["data/demo_0"]
        file["data/demo_0"] = h5py.ExternalLink("other.hdf5", "/data/demo_0")

    def everything(file: Any) -> None:
        del file["data"]
        file["data"] = h5py.ExternalLink("other.hdf5", "/data")

    for change in (linked, raw, virtual, group, everything):
        path.unlink(missing_ok=True)
        write_liberos_own(path)
        assert read_demonstrations(path)
        with h5py.File(path, "a") as file:
            change(file)
        with pytest.raises(DemonstrationFileError, match="in the file itself"):
            read_demonstrations(path)


# Code that configurations name ------------------------------------------------------------------


def test_config_json_cannot_choose_a_kernel_from_the_hub(
    model: Pi0ForCFGRL, tmp_path: Path
) -> None:
    folder = FORMATS["transformers"](tmp_path, model)

    def choose(content: dict[str, Any]) -> None:
        for part in (content, content["dit_config"], content["vlm_config"]["text_config"]):
            for key in ("attn_implementation", "_attn_implementation"):
                part[key] = "kernels-community/flash-attn2"

    edit(folder / "config.json", choose)
    config: Any = policy_of(folder).model.config
    for part in (config, config.dit_config, config.vlm_config.text_config):
        assert part._attn_implementation in ("eager", "sdpa")


def test_a_tokenizers_own_code_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("a question on stdin")

    monkeypatch.setattr("builtins.input", asked)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    save_word_tokenizer(folder)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\n")
    code = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    edit(
        folder / "tokenizer_config.json", lambda c: c.update(auto_map=code, tokenizer_class="Mine")
    )
    from cfgrl_gym.algorithms.pi0.tokenizer import PaliGemmaTokenizer

    with pytest.raises(ValueError, match="no tokenizer could be read"):
        PaliGemmaTokenizer(str(folder))
    assert not (tmp_path / "it_ran").exists()


def test_yaml_builds_no_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("suite: !!python/object/apply:os.mkdir [it_ran]\n")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--policy", "libero_tiny", "--config", "x.yaml"])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_a_shipped_policy_that_was_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(shipped.find_shipped("libero_tiny"), tmp_path / "libero_tiny")
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "checkpoints" / "shipped.py"))
    assert shipped.find_shipped("libero_tiny") == str(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-100] ^= 1  # nothing but a checksum can see it
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"safetensors' is not the file that cfgrl-gym ships"):
        shipped.find_shipped("libero_tiny")


# The network ------------------------------------------------------------------------------------


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have gone to the network: every try fails, and is noted."""
    tried: list[Any] = []

    def refuse(*target: Any, **_: Any) -> Any:
        tried.append(target)
        raise OSError("no network in this test")

    def refuse_unless_local(method: Any) -> Any:
        def call(self: socket.socket, *target: Any) -> Any:
            if self.family == socket.AF_UNIX:  # to a process of this machine, a worker's
                return method(self, *target)
            return refuse(*target)

        return call

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse_unless_local(getattr(socket.socket, name)))
    for name in ("getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


@pytest.mark.parametrize("form", FORMATS)
def test_a_local_checkpoint_needs_no_network(
    form: str, model: Pi0ForCFGRL, tmp_path: Path, attempts: list[Any]
) -> None:
    folder = FORMATS[form](tmp_path / "checkpoint", model)
    policy = policy_of(folder)
    policy.save_pretrained(tmp_path / "saved")
    assert policy_of(tmp_path / "saved").config.preset == "pi0"
    assert find_checkpoint(str(folder), None).preset == "pi0"
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="nothing is fetched unless you name it"):
        policy_of(folder)
    if form == "lerobot":  # the same where a file names a tokenizer
        steps = [{"config": {"tokenizer_name": "google/nowhere"}}]
        (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
        with pytest.raises(FileNotFoundError, match="'google/nowhere' is not in the hub's cache"):
            policy_of(folder)
    assert attempts == []


def test_the_shipped_policy_and_the_commands_need_no_network(
    tmp_path: Path, attempts: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make_policy(sizes=SIZES)
    arguments = ["--policy", "libero_tiny", "--video", "false", "--max_episode_steps", "2"]
    evaluation = ["eval", *arguments, "--episodes", "1", "--out", str(tmp_path / "eval")]
    assert main(evaluation) == 0
    assert main(["report", str(tmp_path / "eval"), "--out", str(tmp_path / "report.html")]) == 0
    assert main(["eval", "--policy", "no/where", "--episodes", "1"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert attempts == []


def test_a_hub_name_does_go_to_the_network(
    attempts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(FileNotFoundError, match="could not be had from the hub"):
        policy_of("nobody/nothing-cfgrl")
    assert attempts  # so that an empty list above means something
