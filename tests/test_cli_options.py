"""The command line's options: help, configuration files, and refusals that write nothing."""

import inspect
import os
import re
import signal
import subprocess
import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import pytest
import yaml
from test_demos import write_liberos_own

from cfgrl_gym.cli import main
from cfgrl_gym.cli.configs import DemosConfig, EvalConfig, ReportConfig, SftConfig, TrainConfig
from cfgrl_gym.cli.run_folder import choose_folder, create_folder

CONFIGS = {
    "demos": DemosConfig,
    "sft": SftConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "report": ReportConfig,
}


def exit_status(arguments: list[str]) -> int | str | None:
    """Of a command line that ends in the parser or with an error."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def printed_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert exit_status([*arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("command", CONFIGS)
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(CONFIGS[command]):
        # after the option's name come its values, then at least a word of explanation
        option = re.search(rf" --{field.name}(?:, --{field.name}\+)? ", text)  # Python 3.13
        assert option, field.name
        explanation = text[option.end() :].partition(" (type:")[0].partition(" (required")[0]
        assert len(explanation.split()) >= 3, field.name
    assert f"example: cfgrl {command} " in text


def test_help_of_the_program_and_of_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"    {command} " in text for command in (*CONFIGS, "doctor"))
    assert exit_status(["doctor", "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from cfgrl_gym.cli.parser import build_parser\n"
        "build_parser().format_help()\n"
        "print([m for m in ('torch', 'transformers', 'robosuite', 'mujoco', 'stable_baselines3',"
        " 'matplotlib', 'jinja2') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "cfgrl_gym", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("cfgrl ")


def test_command_line_goes_before_file_goes_before_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("policy: here\nn_envs: 3\nlearning_rate: 1e-5\ntask_id: [1, 2]\n")
    for arguments in (
        ["train", "--config", str(file), "--n_envs", "7"],
        ["train", "--n-envs=7", f"--config={file}"],
    ):
        config = printed_config(arguments, capsys)
        assert config["n_envs"] == 7
        assert config["learning_rate"] == 1e-5
        assert config["task_id"] == [1, 2]
        assert config["rloo_batch_size"] == 8


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rloo_batch_sise: 4\n", "rloo_batch_sise"),
        ("n_envs: many\n", "n_envs"),
        ("n_envs: 1.5\n", "n_envs"),
        ("n_envs: 0\n", "n_envs must be at least 1; got 0"),
        ("vec_env: threads\n", "vec_env"),
        ("ray_address: head:6379\n", "ray_address is for vec_env ray; got 'head:6379'"),
        ("suite: null\n", "suite must not be null"),
        ("label_source: episode\n", "episode_rloo"),
        ("task_id: some\n", "task_id"),
        ("{{\n", "config"),
    ],
)
def test_a_wrong_file_is_refused_and_nothing_written(
    text: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(text)
    assert exit_status(["train", "--policy", "somewhere", "--config", "wrong.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cfgrl: error: ")
    assert complaint in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "--policy", "x", "--n_env", "2"],
        ["eval", "--policy", "x", "--episodes", "2", "--init_states", "[1]"],
        ["demos", "--config", "missing.yaml"],
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("cfgrl: error: ")
    assert error.count("\n") == 1


def test_defaults_are_those_of_the_library() -> None:
    from cfgrl_gym.algorithms import CFGRL
    from cfgrl_gym.algorithms.pi0 import TinySizes
    from cfgrl_gym.algorithms.warm_start import WarmStartConfig
    from cfgrl_gym.demos.recording import RecordingConfig

    demos, sft = DemosConfig(), SftConfig(demos="x")
    assert RecordingConfig(**demos.arguments_of(RecordingConfig)) == RecordingConfig()
    assert WarmStartConfig(**sft.arguments_of(WarmStartConfig)) == WarmStartConfig()
    assert TinySizes(**sft.arguments_of(TinySizes)) == TinySizes()
    ours = {field.name: field.default for field in fields(TrainConfig)}
    parameters = inspect.signature(CFGRL).parameters
    shared = set(ours) & set(parameters) - {"policy", "seed"}
    assert len(shared) >= 17
    for name in shared:
        assert ours[name] is not MISSING
        assert ours[name] == parameters[name].default, name


# Of version 0.1: `train` writes such a file, and runs of then are resumed and reported.
EARLIER = """
policy: libero_tiny
preset: null
norm_stats: null
delta_actions: null
num_inference_steps: 10
guidance: velocity
device: auto
suite: libero_object
task_id: 0
chunk_size: null
image_size: null
max_episode_steps: null
n_envs: 1
init_states: benchmark
condition_mode: null
use_prefix_dropout: null
trainable: null
gradient_checkpointing: false
ema_decay: null
total_timesteps: 10000
max_iterations: null
learning_rate: 0.0003
rloo_batch_size: 8
groups_per_iteration: 4
enable_dynamic_sampling: true
early_stop_percentage: 0.8
max_groups_tried: null
dropout_prob: 0.1
label_source: episode_rloo
label_threshold: 0.0
negatives: 'null'
positive_share: null
cfg_scale: null
n_epochs: 4
batch_size: 64
gradient_accumulation_steps: 1
max_grad_norm: 1.0
window_stride: null
replay_iterations: 0
device_memory: null
prefix_memory: null
eval_every: null
eval_episodes: null
eval_cfg_scale: null
save_every: 1
keep_checkpoints: 3
video: true
seed: 0
out: null
resume: null
"""


def test_a_file_of_an_earlier_version_means_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(EARLIER)
    earlier = yaml.safe_load(EARLIER)
    now = printed_config(["train", "--config", str(file)], capsys)
    assert {name: now[name] for name in earlier} == earlier
    default = asdict(TrainConfig(policy="libero_tiny"))
    changed = {name for name, value in default.items() if now[name] != value}
    assert changed == {
        *("learning_rate", "groups_per_iteration", "positive_share", "n_epochs"),
        *("replay_iterations", "ema_decay"),
    }


def test_help_comes_from_the_classes_that_use_the_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cfgrl_gym.algorithms import CFGRL

    exit_status(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    _, _, doc = (CFGRL.__doc__ or "").partition(":param max_groups_tried:")
    explanation = " ".join(doc.partition(":param")[0].split()).replace("None", "null")
    kind = "int | null" if sys.version_info >= (3, 11) else "Optional[int]"
    assert f"{explanation} (type: {kind}, default: null)" in text
    assert "--observation_space" not in text
    assert "--policy_kwargs" not in text


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--rloo_batch_size=1", "rloo_batch_size must be at least 2"),
        ("--dropout_prob=2", "dropout_prob must be in [0, 1]; got 2"),
        ("--max_groups_tried=1", "max_groups_tried=1 can't give the 7 valid groups"),
        ("--learning_rate=0", "learning_rate must be more than 0; got 0"),
        ("--seed=-1", "seed must be at least 0; got -1"),
        ("--seed=4294967296", "seed must be at most 4294967295"),
        ("--eval_cfg_scale=[]", "eval_cfg_scale must not be an empty list"),
        ("--trainable=some", "expert"),
    ],
)
def test_values_are_checked_before_anything_is_built(
    option: str,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("cfgrl_gym.cli.train.run", lambda config: pytest.fail("it runs"))
    assert exit_status(["train", "--policy", "libero_tiny", option]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cfgrl: error: ")
    assert complaint in error
    assert error.count("\n") == 1


def test_a_folder_with_something_in_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    arguments = ["eval", "--policy", "x", "--episodes", "1", "--out", str(tmp_path)]
    assert exit_status(arguments) == 2
    assert "--out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(FileExistsError, match="--out"):
        choose_folder("eval", str(tmp_path / "precious.txt"))


def test_a_run_folder_says_how_to_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(policy="p", task_id=[0, 3], negatives="null", learning_rate=2e-5)
    folder = choose_folder("train", None)
    create_folder(folder, config)
    assert choose_folder("train", None) != folder
    again = printed_config(["train", "--config", str(folder / "config.yaml")], capsys)
    assert TrainConfig(**again) == config
    versions = yaml.safe_load((folder / "versions.json").read_text())
    assert {"packages", "python", "cpu_count", "command_line"} <= set(versions)
    assert "torch" in versions["packages"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sft", "--demos", "nowhere"], "no demonstration files at 'nowhere'"),
        (["train", "--policy", "nowhere"], "policy folder 'nowhere' does not exist"),
        (["eval", "--policy", "nowhere.zip"], "'nowhere.zip' does not exist"),
        (["eval", "--policy", "x", "--suite", "libero_objekt"], "libero_object"),
        (["eval", "--policy", "x", "--init_states", "[50]"], "0 to 49"),
    ],
)
def test_expected_errors_are_one_line(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("cfgrl: error: ")
    assert complaint in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("CFGRL_TRACEBACK", "1")
    with pytest.raises((ValueError, FileNotFoundError)):
        main(arguments)


def test_interrupts_and_lost_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(as_json: bool, exactness: bool) -> int:
        raise KeyboardInterrupt

    def interrupted_with_workers(as_json: bool, exactness: bool) -> int:
        try:
            raise KeyboardInterrupt
        finally:
            raise EOFError

    def lost(as_json: bool, exactness: bool) -> int:
        raise EOFError

    for run, status in ((interrupted, 130), (interrupted_with_workers, 130), (lost, 2)):
        monkeypatch.setattr("cfgrl_gym.cli.doctor.run", run)
        assert main(["doctor"]) == status
        assert capsys.readouterr().err.count("\n") == 1


def test_a_warm_start_that_is_stopped_saves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_liberos_own(tmp_path / "pick_up_demo.hdf5")

    def stopped(policy, demonstrations, config, on_step) -> None:  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), signal.SIGTERM)
        on_step(1, 0.5)
        pytest.fail("it goes on")

    monkeypatch.setattr("cfgrl_gym.cli.sft.warm_start", stopped)
    out = tmp_path / "run"
    sizes = "--image_size=56 --patch_size=28 --hidden_size=32 --num_layers=1 --vision_layers=1"
    arguments = ["sft", "--demos", str(tmp_path), "--out", str(out), *sizes.split()]
    assert main(arguments) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert (out / "policy" / "model.safetensors").is_file()
