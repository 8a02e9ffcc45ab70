"""What a change of structure must leave as it is, as digests: record before, compare after.

Records the weights after a short CPU training with `MlpPolicy`, those after two iterations of
`cfgrl train` from `libero_tiny` on libero_object task 8, those after a run that was stopped
after its first iteration and resumed, the episodes of an evaluation, and the modules of the wheel
by import name. Digests hold for one machine and one set of versions, on one thread.

    python benchmarks/behaviour.py --runs runs/before                       # before the change
    python benchmarks/behaviour.py --runs runs/after --before runs/before   # after it

The second command also resumes the stopped run of the first, so that an earlier version's
checkpoint is read by this one; its exit status is 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

RECORD = "behaviour.json"
STOPPED = "stopped"  # the run that ends after one iteration, to be resumed
TRAIN = (
    *("--policy", "libero_tiny", "--task_id", "8", "--n_envs", "2", "--max_iterations", "2"),
    *("--groups_per_iteration", "2", "--rloo_batch_size", "4", "--max_groups_tried", "4"),
    *("--positive_share", "0.9", "--replay_iterations", "1", "--n_epochs", "2"),
    *("--batch_size", "16", "--cfg_scale", "1.0", "--trainable", "expert"),
    *("--ema_decay", "0.98", "--early_stop_percentage", "0.5", "--label_source", "episode_rloo"),
    *("--condition_mode", "bias", "--learning_rate", "3e-4", "--video", "false", "--seed", "3"),
)
EVALUATE = (
    *("--task_id", "8", "--episodes", "4", "--n_envs", "2", "--cfg_scale", "[1.0,2.0]"),
    *("--video", "false", "--seed", "5"),
)


def digest_of(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of named arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def mlp_weights() -> dict[str, str]:
    """Weights after three iterations on Pendulum, one step at a time and in chunks."""
    import gymnasium as gym

    from cfgrl_gym import CFGRL
    from cfgrl_gym.wrappers import ActionChunk

    def limited(chunk: int | None) -> gym.Env[Any, Any]:
        env = gym.make("Pendulum-v1", max_episode_steps=20)
        return env if chunk is None else ActionChunk(env, chunk)

    digests = {}
    for name, chunk in (("steps", None), ("chunks", 4)):
        model = CFGRL(
            "MlpPolicy",
            limited(chunk),
            rloo_batch_size=4,
            groups_per_iteration=3,
            dropout_prob=0.2,
            positive_share=0.6,
            replay_iterations=1,
            n_epochs=3,
            batch_size=16,
            gradient_accumulation_steps=2,
            label_source="window_rloo",
            early_stop_percentage=0.8,
            learning_rate=lambda remaining: 1e-3 * remaining,
            policy_kwargs={"net_arch": [32, 32], "ema_decay": 0.9},
            seed=7,
            device="cpu",
        )
        model.learn(10**6, max_iterations=3)
        named = {n: p.detach().numpy() for n, p in model.policy.named_parameters()}
        digests[name] = digest_of(named)
    return digests


def cfgrl(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "cfgrl_gym", *words], check=True)


def policy_digest(run: Path) -> str:
    """Of all tensors that a run's policy folder holds."""
    from safetensors.numpy import load_file

    return digest_of(load_file(run / "policy" / "model.safetensors"))


def wheel_modules() -> list[str]:
    """Import names of the modules in the wheel, and its data files."""
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, "."]
        subprocess.run(build, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    return sorted(
        name[:-3].replace("/", ".").removesuffix(".__init__") if name.endswith(".py") else name
        for name in names
    )


def record(runs: Path, before: Path | None) -> dict[str, Any]:
    whole, stopped, evaluation = runs / "whole", runs / STOPPED, runs / "evaluation"
    content: dict[str, Any] = {"mlp_weights": mlp_weights()}
    cfgrl("train", *TRAIN, "--out", str(whole))
    content["libero_weights"] = policy_digest(whole)
    once = list(TRAIN)
    once[once.index("--max_iterations") + 1] = "1"
    cfgrl("train", *once, "--out", str(stopped))
    resumed = runs / "resumed"
    shutil.copytree(stopped, resumed)
    cfgrl("train", "--resume", str(resumed), "--max_iterations", "2")
    content["resumed_weights"] = policy_digest(resumed)
    cfgrl("eval", "--policy", str(whole), *EVALUATE, "--out", str(evaluation))
    content["evaluation"] = json.loads((evaluation / "eval.json").read_text())["results"]
    if before is not None:
        earlier = runs / "resumed_earlier"
        shutil.copytree(before / STOPPED, earlier)
        cfgrl("train", "--resume", str(earlier), "--max_iterations", "2")
        content["earlier_resumed_weights"] = policy_digest(earlier)
    content["wheel"] = wheel_modules()
    return content


def compare(now: dict[str, Any], then: dict[str, Any]) -> bool:
    """Print what is equal and what is not; the modules of the wheel may move, and are listed."""
    equal = True
    for key in ("mlp_weights", "libero_weights", "resumed_weights", "evaluation"):
        same = now[key] == then[key]
        equal &= same
        print(f"{key}: {'equal' if same else 'DIFFERENT'}")
    same = now["earlier_resumed_weights"] == then["libero_weights"]
    print(f"resumed from the earlier version's checkpoint: {'equal' if same else 'DIFFERENT'}")
    for word, modules in (
        ("gone", set(then["wheel"]) - set(now["wheel"])),
        ("new", set(now["wheel"]) - set(then["wheel"])),
    ):
        print(f"in the wheel, {word}: {', '.join(sorted(modules)) or 'nothing'}")
    return equal and same


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="new folder for the runs and behaviour.json")
    add("--before", type=Path, help="the folder of an earlier call, to compare with")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    args.runs.mkdir(parents=True)
    now = record(args.runs, args.before)
    (args.runs / RECORD).write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    if args.before is None:
        return 0
    return 0 if compare(now, json.loads((args.before / RECORD).read_text())) else 1


if __name__ == "__main__":
    sys.exit(main())
