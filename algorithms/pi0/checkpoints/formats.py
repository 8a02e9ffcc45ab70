"""Recognises what a PI0 checkpoint's folder holds: transformers', LeRobot's or openpi's files.

Only config files and the headers of weight files are read here, and for a local checkpoint nothing
is looked up outside its folder.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfgrl_gym.algorithms.pi0.checkpoints.config import (
    Shapes,
    config_from_file,
    config_from_shapes,
    read_shapes,
)
from cfgrl_gym.algorithms.pi0.checkpoints.files import fetch, refuse
from cfgrl_gym.algorithms.pi0.checkpoints.stats import (
    PREPROCESSOR,
    STATS_FILE,
    lerobot_stats,
    openpi_stats,
    processor_steps,
)
from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig
from cfgrl_gym.algorithms.pi0.tokenizer import has_tokenizer
from cfgrl_gym.json_files import named_file, read_json_object
from cfgrl_gym.wrappers.norm_stats import NormStats
from cfgrl_gym.wrappers.transforms import POSE_DIM

# Files fetched from a hub repository: no optimizer states, no second copies of the weights.
HUB_FILES = (
    *("*.json", "model*.safetensors", "policy_*.safetensors", "reference.safetensors"),
    *("tokenizer.model", "assets/*"),
)
OPENPI_HORIZON = 50  # openpi, models/pi0_config.py: action_horizon

# "type" (LeRobot) or "model_type" (transformers) in config.json
OTHER_MODELS = {
    "pi05": "pi0.5",
    "pi0_5": "pi0.5",
    "pi0_fast": "pi0-FAST",
    "pi0fast": "pi0-FAST",
    "openvla": "OpenVLA",
    "smolvla": "SmolVLA",
    "groot": "GR00T",
    "act": "ACT",
    "diffusion": "Diffusion Policy",
    "paligemma": "PaliGemma (without PI0's action expert)",
}
# Tensors that only pi0.5 has, and tensors that every PI0 has but pi0-FAST lacks, in all formats.
_PI05 = re.compile(r"(^|\.)time_mlp_in\.|(input|post_attention)_layernorm\.dense\.")
_EXPERT = re.compile(r"gemma_expert|(^|\.)dit\.|(^|\.)action_in_proj\.")

# LeRobot's config.json: fields that mean the same in transformers'
_LEROBOT_FIELDS = (
    "chunk_size",
    "num_inference_steps",
    "time_sampling_beta_alpha",
    "time_sampling_beta_beta",
    "time_sampling_scale",
    "time_sampling_offset",
    "min_period",
    "max_period",
)


@dataclass(frozen=True)
class Source:
    """Describes a checkpoint that was recognised as PI0's.

    :param name: folder or hub name, as it was given
    :param folder: where its files are
    :param format: "transformers", "lerobot" or "openpi"
    :param files: its weight files (safetensors)
    :param shapes: shape of every tensor in them, by name
    :param config: the model's configuration
    :param delta_actions: whether its actions are relative to the state, as far as the format says
    :param tokenizer: folder or hub name of the tokenizer in the checkpoint or named there, or None
    """

    name: str
    folder: Path
    format: str
    files: tuple[Path, ...]
    shapes: Shapes
    config: Pi0CFGRLConfig
    delta_actions: bool | None
    tokenizer: str | None

    def norm_stats(self) -> NormStats | None:
        """Read the statistics of the checkpoint, or return None if it has none.

        They are those of norm_stats.json in the folder, else those of the checkpoint's format.

        :raises ValueError: they have the wrong length, or are damaged
        """
        own = self.folder / STATS_FILE
        if own.is_file():
            return NormStats.load(own)
        if self.format == "lerobot":
            return lerobot_stats(self.folder, self.files)
        return openpi_stats(self.folder) if self.format == "openpi" else None


def locate(checkpoint: str | Path) -> Path:
    """Return a checkpoint's local folder: the folder itself, or a hub repository's snapshot.

    :raises FileNotFoundError: it is neither a folder, nor on the hub or in its cache
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"checkpoint '{checkpoint}' is a file; give the folder that it lies in")
    if not is_hub_name(checkpoint):
        raise FileNotFoundError(
            f"checkpoint folder '{checkpoint}' does not exist; give a PI0 checkpoint folder, or a "
            "hub name such as lerobot/pi0_base"
        )
    remedy = "Download it where there is a network and give its folder"
    return fetch("checkpoint", str(checkpoint), HUB_FILES, remedy)


def is_hub_name(name: str | Path) -> bool:
    """Return whether this has the form "owner/name", which a local path may have, too."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def read_source(checkpoint: str | Path) -> Source:
    """Recognise a checkpoint by its configuration and the headers of its weight files.

    :param checkpoint: folder or hub name
    :raises FileNotFoundError: there is no such checkpoint, or it has no weights
    :raises ValueError: it is another model's, has another format, or is damaged
    """
    folder = locate(checkpoint)
    config = folder / "config.json"  # openpi's own PyTorch trainer writes none
    raw = read_json_object(config) if config.is_file() else {}
    clear = (ValueError, OSError, MemoryError)
    with refuse(f"'{config}' is no PI0 configuration", but=clear):
        return _read_source(checkpoint, folder, raw)


def _read_source(checkpoint: str | Path, folder: Path, raw: dict[str, Any]) -> Source:
    kind = raw.get("model_type", raw.get("type"))
    if kind is not None and kind != "pi0":
        other = OTHER_MODELS.get(kind)
        what = f"a {other} checkpoint (type '{kind}')" if other else f"a model of type '{kind}'"
        raise ValueError(f"checkpoint '{checkpoint}' is {what}, not 'pi0'; give a PI0 checkpoint")
    files = weight_files(folder)
    shapes = read_shapes(files)
    _check_is_pi0(str(checkpoint), shapes)
    delta: bool | None = None
    tokenizer = str(folder) if has_tokenizer(folder) else None
    if "model_type" in raw:
        form, config = "transformers", config_from_file(folder, raw, shapes)
    elif kind == "pi0":
        form = "lerobot"
        _check_normalization(folder, raw)
        delta = _lerobot_delta(folder, raw)
        fields = {name: raw[name] for name in _LEROBOT_FIELDS if name in raw}
        config = config_from_shapes(folder, shapes, fields)
        tokenizer = tokenizer or _lerobot_tokenizer(folder)
    else:
        form = "openpi"
        delta = True  # its LIBERO configuration has extra_delta_transform (training/config.py)
        horizon = raw.get("action_horizon", OPENPI_HORIZON)
        config = config_from_shapes(folder, shapes, {"chunk_size": horizon})
    name = str(checkpoint) if not Path(checkpoint).is_dir() else str(folder.resolve())
    return Source(name, folder, form, files, shapes, config, delta, tokenizer)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint, one or several shards.

    :raises FileNotFoundError: there are none, or some shards are missing
    :raises ValueError: the weights have a format that can't be read here
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if index.is_file():
        files = _shards(folder, index)
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            raise FileNotFoundError(
                f"checkpoint '{folder}' lacks {len(missing)} of its {len(files)} weight files: "
                f"{', '.join(missing[:5])}; download it again"
            )
        return files
    if any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"checkpoint '{folder}' holds pytorch_model.bin, which can run code when it is read; "
            "convert it to model.safetensors with safetensors.torch.save_file"
        )
    if (folder / "params").is_dir():
        raise ValueError(
            f"checkpoint '{folder}' is openpi's JAX format (a params folder); convert it with "
            "openpi's examples/convert_jax_model_to_pytorch.py and give the converted folder"
        )
    raise FileNotFoundError(
        f"folder '{folder}' holds no weights (no model.safetensors); give a PI0 checkpoint"
    )


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"'{index}' has no weight_map of files; download it again")
    return tuple(sorted({named_file(folder, name, index.name) for name in weight_map.values()}))


def _check_is_pi0(name: str, shapes: Shapes) -> None:
    """Check by the tensors that this is PI0: openpi's pi0.5 files have the same config.json."""
    if any(_PI05.search(key) for key in shapes):
        raise ValueError(
            f"checkpoint '{name}' is a pi0.5 checkpoint (its time goes into adaptive norms), not "
            "'pi0'; give a PI0 checkpoint"
        )
    if not any(_EXPERT.search(key) for key in shapes):
        raise ValueError(
            f"checkpoint '{name}' has no action expert among its {len(shapes)} tensors: it may be "
            "pi0-FAST or a plain PaliGemma, and is not 'pi0'; give a PI0 checkpoint"
        )


def _check_normalization(folder: Path, raw: dict[str, Any]) -> None:
    modes = raw.get("normalization_mapping") or {}
    for part in ("STATE", "ACTION"):
        mode = modes.get(part, "MEAN_STD")
        if mode != "MEAN_STD":
            raise ValueError(
                f"checkpoint '{folder}' normalises {part} by {mode}; only MEAN_STD, which PI0 was "
                "made with, is supported: fine-tune it with normalization_mapping MEAN_STD"
            )


def _lerobot_delta(folder: Path, raw: dict[str, Any]) -> bool:
    """Return whether LeRobot's configuration asks for the delta actions that are used here.

    LeRobot's use_relative_actions subtracts the state from every action dimension whose name
    contains none of relative_exclude_joints; without names, from every dimension
    (processor/relative_action_processor.py). Here it is subtracted from the first 6, not from the
    gripper.
    """
    if not raw.get("use_relative_actions", False):
        return False
    names = raw.get("action_feature_names")
    excluded = [str(part).lower() for part in raw.get("relative_exclude_joints") or [] if part]
    relative = [not any(part in str(name).lower() for part in excluded) for name in names or []]
    if relative != [True] * POSE_DIM + [False]:
        raise ValueError(
            f"checkpoint '{folder}' has relative actions (use_relative_actions) in dimensions "
            f"other than the first {POSE_DIM} of 7: action_feature_names {names}, "
            f"relative_exclude_joints {raw.get('relative_exclude_joints')}; that is not supported"
        )
    return True


def _lerobot_tokenizer(folder: Path) -> str | None:
    """Return the tokenizer's hub name, but no path: that would be one of the training machine."""
    for step in processor_steps(folder, PREPROCESSOR):
        settings = step.get("config")
        name = settings.get("tokenizer_name") if isinstance(settings, dict) else None
        if name and is_hub_name(name):
            return str(name)
    return None
