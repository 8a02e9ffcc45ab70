"""demos, sft, train and eval, one after the other, in miniature on real LIBERO."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import h5py
import imageio.v3
import pytest
import yaml

LIMIT = 16  # control steps of an episode: two chunks
SHORT = ["--max_episode_steps", str(LIMIT), "--num_inference_steps", "2"]
COMMANDS = {
    "demos": "demos --demos 2 --image_size 56 --image_stride 20 --workers 1 --perturbed 0",
    "sft": "sft --demos demos --out sft --steps 3 --log_every 2 --batch_size 4 --horizon 8 "
    "--image_size 56 --patch_size 28 --hidden_size 32 --num_layers 1 --vision_layers 1",
    "train": "train --policy sft --out train --rloo_batch_size 2 --groups_per_iteration 1 "
    "--enable_dynamic_sampling false --total_timesteps 4 --window_stride 4 --max_iterations 1 "
    "--eval_every 1 --eval_episodes 1 --eval_cfg_scale [1,2]",
    "eval": "eval --policy train --out eval --episodes 2 --cfg_scale [1,2]",
    "eval_zip": "eval --policy train/model.zip --out eval_zip --init_states [1,0] --n_envs 2 "
    "--video false",
}
# One process for all, other than the tests': it makes a render context.
SCRIPT = """
import json, shutil, sys
from cfgrl_gym.cli import main
if __name__ == "__main__":
    for name, arguments in json.loads(sys.argv[1]).items():
        if name == "eval_zip":
            shutil.rmtree("sft")  # model.zip must not need where it came from
        print("##", name, flush=True)
        if main(arguments) != 0:
            sys.exit(f"cfgrl {name} failed")
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder that all commands ran in, and what each printed."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "chain.py").write_text(SCRIPT)
    commands = {name: text.split() for name, text in COMMANDS.items()}
    for name in ("train", "eval", "eval_zip"):
        commands[name] += SHORT
    done = subprocess.run(
        [sys.executable, "chain.py", json.dumps(commands)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parts = done.stdout.split("## ")[1:]
    return folder, {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in parts}


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_demos_are_in_liberos_format(chain: tuple[Path, dict[str, str]]) -> None:
    (file,) = (chain[0] / "demos" / "libero_object").glob("*_demo.hdf5")
    with h5py.File(file) as content:
        assert set(content["data"]) == {"demo_0", "demo_1"}
        for demo in content["data"].values():
            assert demo["obs/agentview_rgb"].shape[1:] == (56, 56, 3)
            assert demo["actions"].shape == (len(demo["obs/ee_pos"]), 7)
    assert file.with_name(f"{file.stem}.run").joinpath("config.yaml").is_file()


def test_train_leaves_a_complete_run_folder(chain: tuple[Path, dict[str, str]]) -> None:
    train = chain[0] / "train"
    names = {path.name.split(".")[0] if "tfevents" in path.name else path.name for path in
             train.iterdir()}  # fmt: skip
    assert [path.name for path in (train / "checkpoints").iterdir()] == ["000001"]
    assert names == {
        "config.yaml",
        "versions.json",
        "progress.csv",
        "progress.json",
        "events",
        "policy",
        "model.zip",
        "episode.mp4",
        "evaluations.json",
        "checkpoints",
        ".lock",
    }
    config = yaml.safe_load((train / "config.yaml").read_text())
    assert (config["policy"], config["window_stride"], config["cfg_scale"]) == ("sft", 4, None)
    (row,) = rows(train / "progress.csv")
    assert float(row["rollout/control_steps"]) == 2 * LIMIT
    assert float(row["rollout/groups_kept"]) == 1
    assert float(row["train/loss"]) > 0
    # the frame after the reset, and one for every control step
    video = imageio.v3.imread(train / "episode.mp4")
    assert video.shape == (1 + LIMIT, 256, 256, 3)
    assert video.std() > 10


def test_eval_reports_every_episode(chain: tuple[Path, dict[str, str]]) -> None:
    folder, printed = chain
    report = json.loads((folder / "eval" / "eval.json").read_text())
    assert [result["cfg_scale"] for result in report["results"]] == [1.0, 2.0]
    for result in report["results"]:
        episodes = result["episodes"]
        assert [episode["init_state_id"] for episode in episodes] == [0, 1]
        assert all(episode["control_steps"] == LIMIT for episode in episodes)
        assert result["success_rate"] == 0
        assert result["guidance_gap"] > 0
        # Wilson's upper bound for 0 of n is z² / (n + z²)
        assert result["interval_95"] == pytest.approx([0, 3.8415 / 5.8415], abs=1e-4)
    assert "0/2" in printed["eval"]
    assert "0.0% to 65.8%" in printed["eval"]
    assert len(rows(folder / "eval" / "progress.csv")) == 2
    # A failure and no success to show: the frame after the reset, and one for every control step.
    assert imageio.v3.imread(folder / "eval" / "failure.mp4").shape == (1 + LIMIT, 256, 256, 3)
    assert not (folder / "eval" / "success.mp4").exists()


def test_train_evaluates_before_and_after_on_the_benchmark(
    chain: tuple[Path, dict[str, str]],
) -> None:
    content = json.loads((chain[0] / "train" / "evaluations.json").read_text())
    assert content["suite"] == "libero_object"
    before, after = content["evaluations"]
    assert (before["iteration"], before["episodes"], before["timesteps"]) == (0, 0, 0)
    assert (after["iteration"], after["episodes"]) == (1, 2)
    assert after["control_steps"] == 2 * LIMIT
    assert after["seconds"] > before["seconds"] >= 0
    for evaluation in (before, after):
        assert [result["cfg_scale"] for result in evaluation["results"]] == [1.0, 2.0]
        for result in evaluation["results"]:
            (episode,) = result["episodes"]
            assert (episode["init_state_id"], episode["control_steps"]) == (0, 280)  # LIBERO's
    about = json.loads((chain[0] / "train" / "versions.json").read_text())
    assert about["algorithm"] == "CFGRL"


def test_model_zip_evaluates_without_its_origin(chain: tuple[Path, dict[str, str]]) -> None:
    folder, _ = chain
    (result,) = json.loads((folder / "eval_zip" / "eval.json").read_text())["results"]
    assert [episode["init_state_id"] for episode in result["episodes"]] == [1, 0]
    assert not list((folder / "eval_zip").glob("*.mp4"))
    assert not (folder / "sft").exists()
