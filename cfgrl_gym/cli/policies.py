"""Finds and builds the policy that a command starts from."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from stable_baselines3.common.utils import get_device

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.pi0 import Pi0Policy
from cfgrl_gym.algorithms.pi0.checkpoints.build import POLICY_FILE, read_policy_file
from cfgrl_gym.algorithms.pi0.checkpoints.formats import Source, read_source
from cfgrl_gym.algorithms.pi0.checkpoints.shipped import SHIPPED, find_shipped
from cfgrl_gym.algorithms.saving.checkpoints import STATE_FILE, load_policy_state
from cfgrl_gym.cli.configs import EvalConfig, PolicyOptions, TrainConfig
from cfgrl_gym.cli.environments import libero_spaces
from cfgrl_gym.cli.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, POLICY_FOLDER
from cfgrl_gym.wrappers.libero_observation import CAMERA_SLOTS


@dataclass(frozen=True)
class Checkpoint:
    """Holds what must be known of a saved policy before environments are made."""

    path: str  # folder or hub name
    preset: str
    horizon: int
    image_size: int
    cameras: tuple[str, ...]  # PI0's names
    source: Source


def find_checkpoint(policy: str, preset: str | None) -> Checkpoint:
    """Find the checkpoint that the user names.

    :param policy: a policy folder, a run folder that holds one, a name in `SHIPPED`, or a hub name
    :param preset: "tiny" or "pi0"; None: the folder's
    :raises FileNotFoundError: there is no such folder
    """
    folder = Path(find_shipped(policy))
    if (folder / POLICY_FOLDER / POLICY_FILE).is_file():
        folder = folder / POLICY_FOLDER
    saved: dict[str, Any] = {}
    if folder.is_dir():
        if (folder / CHECKPOINTS_FOLDER).is_dir():
            raise FileNotFoundError(
                f"the training in '{folder}' was stopped before it wrote its policy; go on with "
                f"it (cfgrl train --resume {folder}), or evaluate a folder in "
                f"'{folder / CHECKPOINTS_FOLDER}'"
            )
        path = str(folder)
        saved = read_policy_file(folder)
        preset = preset or saved.get("preset", "pi0")
    elif preset != "pi0":
        raise FileNotFoundError(
            f"policy folder '{policy}' does not exist; give what `cfgrl sft` or `cfgrl train` "
            f"wrote, or {', '.join(SHIPPED)}, which comes with the package (for a name on the "
            "Hugging Face hub add --preset pi0)"
        )
    else:
        path = policy
    source = read_source(path)
    vision: Any = source.config.vlm_config.vision_config  # type: ignore[union-attr]
    cameras = tuple(saved.get("cameras") or CAMERA_SLOTS)
    return Checkpoint(
        path, str(preset), source.config.chunk_size, vision.image_size, cameras, source
    )


def check_device(name: str) -> torch.device:
    """Return the device of this name, or the one that "auto" chooses.

    :raises ValueError: there is no such device
    """
    try:
        device = get_device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device '{name}' can't be used ({reason:.200}); try auto or cpu"
        ) from error
    return device


def policy_arguments(config: PolicyOptions, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the keyword arguments of `Pi0Policy` except its spaces.

    :raises ValueError: the device can't be used
    """
    check_device(config.device)
    return {
        "preset": checkpoint.preset,
        "checkpoint": checkpoint.path,
        "norm_stats": config.norm_stats,
        **config.arguments_of(Pi0Policy),
    }


def load_policy(config: EvalConfig) -> Pi0Policy:
    """Load the policy to evaluate: a folder's, or that of a training's model.zip or checkpoint.

    :raises FileNotFoundError: there is no such policy
    :raises ValueError: options contradict what was saved
    """
    path = Path(config.policy)
    is_zip = config.policy.endswith(".zip")
    if not is_zip and not (path / STATE_FILE).is_file():
        return _build(config, find_checkpoint(config.policy, config.preset), config.chunk_size)
    if is_zip and not path.is_file():
        raise FileNotFoundError(f"model '{path}' does not exist")
    if config.norm_stats is not None or config.delta_actions is not None:
        what = "model.zip" if is_zip else "checkpoint"
        raise ValueError(
            f"a {what} has its training's norm_stats and delta_actions; leave them out"
        )
    policy = _of_model(path, config) if is_zip else _of_training(path, config)
    policy.num_inference_steps, policy.guidance = config.num_inference_steps, config.guidance
    trained_with = policy.cfg_reference
    if config.cfg_reference == "null" != trained_with:
        warnings.warn(
            f"'{path}' was trained with cfg_reference='{trained_with}'; with 'null' it acts "
            f"otherwise: add --cfg_reference {trained_with}",
            stacklevel=2,
        )
    policy.cfg_reference = config.cfg_reference
    return policy


def _of_model(path: Path, config: EvalConfig) -> Pi0Policy:
    check_device(config.device)
    policy = CFGRL.load(path, device=config.device).policy
    if not isinstance(policy, Pi0Policy):
        raise ValueError(f"'{path}' is a {type(policy).__name__}, not a Pi0Policy")
    if config.chunk_size not in (None, policy.chunk_size):
        raise ValueError(
            f"'{path}' was trained with chunks of {policy.chunk_size} actions; leave --chunk_size "
            "out, or evaluate the policy folder beside it"
        )
    return policy


def _build(config: PolicyOptions, checkpoint: Checkpoint, chunk_size: int | None) -> Pi0Policy:
    spaces = libero_spaces(
        checkpoint.image_size, chunk_size or checkpoint.horizon, checkpoint.cameras
    )
    policy = Pi0Policy(*spaces, lambda _: 0.0, **policy_arguments(config, checkpoint))
    return policy.to(check_device(config.device))


def _of_training(folder: Path, config: EvalConfig) -> Pi0Policy:
    """Load the policy of a training's checkpoint, building it as the training did."""
    file = folder.parent.parent / CONFIG_FILE
    try:
        training = TrainConfig(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"'{file}' says what the checkpoint is of, and can't be read ({error}); leave "
            "checkpoints in the run folder that they were written to"
        ) from error
    training = replace(training, device=config.device)
    checkpoint = find_checkpoint(training.policy, training.preset)
    policy = _build(training, checkpoint, config.chunk_size or training.chunk_size)
    load_policy_state(policy, folder)
    return policy
