"""`cfgrl sft`: a policy from demonstrations."""

import glob
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import configure

from cfgrl_gym.algorithms.pi0 import NormStats, Pi0Policy, TinySizes
from cfgrl_gym.algorithms.warm_start import WarmStartConfig, demonstration_stats, warm_start
from cfgrl_gym.cli.configs import SftConfig
from cfgrl_gym.cli.environments import SLOT_OF_CAMERA, libero_spaces
from cfgrl_gym.cli.policies import check_device, find_checkpoint, saving_when_stopped
from cfgrl_gym.cli.progress import progress_bar
from cfgrl_gym.cli.run_folder import POLICY_FOLDER, choose_folder, create_folder
from cfgrl_gym.demos.files import Demonstration, read_demonstrations
from cfgrl_gym.whole_files import whole_folder

DEFAULT_HORIZON = 50


def find_demonstrations(given: str | list[str]) -> list[Path]:
    """Demonstration files from paths, folders (searched to any depth) and glob patterns.

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


def warm_start_config(config: SftConfig) -> WarmStartConfig:
    """The part of the options that is about the optimization."""
    return WarmStartConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        window_stride=config.window_stride,
        dropout_prob=config.dropout_prob,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
    )


def _sizes(config: SftConfig) -> TinySizes:
    return TinySizes(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        vision_layers=config.vision_layers,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
    )


def build_policy(config: SftConfig, demonstrations: list[Demonstration]) -> Pi0Policy:
    """The policy before training, with its normalisation statistics.

    :raises ValueError: options that don't fit together
    """
    sizes = _sizes(config)
    arguments: dict[str, Any] = {"preset": config.preset or "tiny", "sizes": sizes}
    image_size, own_stats = sizes.image_size, False
    slots = [SLOT_OF_CAMERA[camera] for camera in config.cameras or SLOT_OF_CAMERA]
    if config.policy is not None:
        checkpoint = find_checkpoint(config.policy, config.preset)
        arguments = {"preset": checkpoint.preset, "checkpoint": checkpoint.path}
        image_size, slots = checkpoint.image_size, list(checkpoint.cameras)
        own_stats = checkpoint.source.norm_stats() is not None
    given = sizes != TinySizes() or config.cameras is not None
    if (config.policy is not None or config.preset == "pi0") and given:
        raise ValueError(
            "cameras, image_size, patch_size and the other sizes are those of a new tiny model; "
            "leave them out with --policy or --preset pi0"
        )
    if config.preset == "pi0" and config.policy is None:
        arguments.pop("sizes")
    compute = config.norm_stats is None and not own_stats
    horizon = config.horizon
    if horizon is None and config.policy is None:
        horizon = DEFAULT_HORIZON
    # What environments execute of the horizon is not the policy's to say: chunks of 1 will do.
    policy = Pi0Policy(
        *libero_spaces(image_size, 1, slots),
        lambda _: config.learning_rate,
        norm_stats=NormStats.identity() if compute else config.norm_stats,
        condition_mode=config.condition_mode,
        horizon=horizon,
        delta_actions=config.delta_actions,
        use_prefix_dropout=config.use_prefix_dropout,
        trainable=config.trainable,
        gradient_checkpointing=config.gradient_checkpointing,
        ema_decay=config.ema_decay,
        seed=config.seed,
        **arguments,
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
    """Fit and save; returns the run folder.

    :raises ValueError: files that can't be read, or options that don't fit together
    :raises FileExistsError: the run folder has something in it
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
    with progress_bar("sft", config.steps, "step") as bar, saving_when_stopped(save):

        def on_step(step: int, loss: float) -> None:
            bar.update()
            logger.record_mean("train/loss", loss)
            if step % config.log_every == 0 or step == config.steps:
                logger.record("train/learning_rate", policy.optimizer.param_groups[0]["lr"])
                bar.set_postfix(loss=f"{logger.name_to_value['train/loss']:.4f}", refresh=False)
                logger.dump(step)

        warm_start(policy, demonstrations, warm_start_config(config), on_step)
    logger.close()
    save()
    print(f"policy: {out / POLICY_FOLDER}")
    return out
