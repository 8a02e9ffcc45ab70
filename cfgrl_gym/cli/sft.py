"""Fit a policy to demonstrations: flow matching on the project's own or on LIBERO's (warm start).

The policy is saved under <out>/policy, with its normalisation statistics.

example:
  cfgrl sft --demos demos/libero_object --horizon 16 --steps 3000 --out runs/sft
"""

import glob
import sys
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import configure

from cfgrl_gym.algorithms.pi0 import NormStats, Pi0Policy, TinySizes
from cfgrl_gym.algorithms.warm_start import WarmStartConfig, demonstration_stats, warm_start
from cfgrl_gym.cli.configs import SftConfig
from cfgrl_gym.cli.environments import SLOT_OF_CAMERA, libero_spaces
from cfgrl_gym.cli.policies import check_device, find_checkpoint
from cfgrl_gym.cli.run_folder import POLICY_FOLDER, choose_folder, create_folder
from cfgrl_gym.cli.run_logs import progress_bar
from cfgrl_gym.cli.stopping import Stopped, StopRequests
from cfgrl_gym.demos.files import Demonstration, read_demonstrations
from cfgrl_gym.whole_files import whole_folder

DEFAULT_HORIZON = 50


def find_demonstrations(given: str | list[str]) -> list[Path]:
    """Find demonstration files from paths, folders (searched to any depth) and glob patterns.

    :raises FileNotFoundError: one of them leads to no file
    """
    found: dict[Path, None] = {}
    for text in [given] if isinstance(given, str) else given:
        path = Path(text)
        if path.is_dir():
            files = sorted(path.rglob("*.hdf5"))
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(text, recursive=True))
        if not files:
            raise FileNotFoundError(
                f"no demonstration files at '{text}'; `cfgrl demos` makes some, LIBERO's own are "
                "named <task>_demo.hdf5"
            )
        found |= dict.fromkeys(files)
    return list(found)


def build_policy(config: SftConfig, demonstrations: list[Demonstration]) -> Pi0Policy:
    """Build the policy before training, with its normalisation statistics.

    :raises ValueError: options don't fit together
    """
    sizes = TinySizes(**config.arguments_of(TinySizes))
    preset: Any = config.preset or "tiny"
    horizon, checkpoint = config.horizon, None
    if config.policy is not None:
        checkpoint = find_checkpoint(config.policy, config.preset)
        preset = checkpoint.preset
    elif horizon is None:
        horizon = DEFAULT_HORIZON
    new_tiny = config.policy is None and preset == "tiny"
    if not new_tiny and (sizes != TinySizes() or config.cameras is not None):
        raise ValueError(
            "cameras, image_size, patch_size and the other sizes are those of a new tiny model; "
            "leave them out with --policy or --preset pi0"
        )
    image_size = sizes.image_size if checkpoint is None else checkpoint.image_size
    slots = [SLOT_OF_CAMERA[camera] for camera in config.cameras or SLOT_OF_CAMERA]
    has_stats = checkpoint is not None and checkpoint.source.norm_stats() is not None
    compute = config.norm_stats is None and not has_stats
    # How much of the horizon is executed depends on the environments: here, chunks of 1 will do.
    policy = Pi0Policy(
        *libero_spaces(image_size, 1, slots if checkpoint is None else checkpoint.cameras),
        lambda _: config.learning_rate,
        preset=preset,
        checkpoint=None if checkpoint is None else checkpoint.path,
        norm_stats=NormStats.identity() if compute else config.norm_stats,
        horizon=horizon,
        sizes=sizes if new_tiny else None,
        seed=config.seed,
        **config.arguments_of(Pi0Policy),
    ).to(check_device(config.device))
    if compute:
        stats = demonstration_stats(
            demonstrations,
            horizon=policy.horizon,
            delta=policy.config.delta_actions,
            std_floor=config.std_floor,
        )
        policy.set_norm_stats(stats)
    return policy


def run(config: SftConfig) -> Path:
    """Fit the policy, save it and return the run folder.

    :raises ValueError: files can't be read, or options don't fit together
    :raises FileExistsError: the run folder isn't empty
    """
    files = find_demonstrations(config.demos)
    out = choose_folder("sft", config.out)
    demonstrations = [demo for file in files for demo in read_demonstrations(file)]
    policy = build_policy(config, demonstrations)
    create_folder(out, config)
    logger = configure(str(out), ["csv", "json", "tensorboard"])

    def save() -> None:
        with whole_folder(out / POLICY_FOLDER) as new:
            policy.save_pretrained(new)

    print(f"{len(demonstrations)} demonstrations of {len(files)} file(s); results in {out}")
    with progress_bar("sft", config.steps, "step") as bar, StopRequests() as stop:
        stop.defer()

        def on_step(step: int, loss: float) -> None:
            bar.update()
            logger.record_mean("train/loss", loss)
            if step % config.log_every == 0 or step == config.steps:
                logger.record("train/learning_rate", policy.optimizer.param_groups[0]["lr"])
                bar.set_postfix(loss=f"{logger.name_to_value['train/loss']:.4f}", refresh=False)
                logger.dump(step)
            stop.check()

        try:
            optimization = WarmStartConfig(**config.arguments_of(WarmStartConfig))
            warm_start(policy, demonstrations, optimization, on_step)
        except Stopped:
            save()
            print("stopped; what has been learned so far is saved", file=sys.stderr)
            raise
    logger.close()
    save()
    print(f"policy: {out / POLICY_FOLDER}")
    return out
