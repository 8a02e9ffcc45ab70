"""Builds the parts of a PI0 policy, new or from a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

from cfgrl_gym.algorithms.pi0.checkpoints.base import BaseCheckpoint, shortened
from cfgrl_gym.algorithms.pi0.checkpoints.formats import Source, is_hub_name, read_source
from cfgrl_gym.algorithms.pi0.checkpoints.reference import REFERENCE_FILE
from cfgrl_gym.algorithms.pi0.checkpoints.shipped import SHIPPED, find_shipped
from cfgrl_gym.algorithms.pi0.checkpoints.weights import load_model
from cfgrl_gym.algorithms.pi0.condition import ConditionMode, Pi0CFGRLConfig, is_conditional
from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.presets import PRESETS, Preset, TinySizes, new_model, tiny_config
from cfgrl_gym.algorithms.pi0.tokenizer import (
    PALIGEMMA_TOKENIZER,
    ByteTokenizer,
    PaliGemmaTokenizer,
    Places,
    PromptTokenizer,
)
from cfgrl_gym.json_files import read_json_object
from cfgrl_gym.wrappers.norm_stats import NormStats

POLICY_FILE = "pi0_policy.json"
Trainable = Literal["expert", "all", "lora"]
TRAINABLE = get_args(Trainable)
VlmDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Pi0PolicyConfig:
    """Holds the settings of a PI0 policy that are saved besides its weights and statistics.

    The fields are `Pi0Policy`'s parameters of these names, with every default resolved. `tokenizer`
    is None if the tokens are bytes; `cameras` is None in files of the first version.
    """

    preset: Preset
    condition_mode: ConditionMode
    use_prefix_dropout: bool
    delta_actions: bool
    trainable: Trainable
    vlm_dtype: VlmDtype
    tokenizer: str | None
    cameras: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false; got {value!r}")
            choices = get_args(field.type)
            if get_origin(field.type) is Literal and value not in choices:
                raise ValueError(f"{field.name} must be one of {choices}; got {value!r}")
        if not isinstance(self.tokenizer, str | Path | None):
            raise ValueError(f"tokenizer must be a folder or hub name; got {self.tokenizer!r}")
        cameras = () if self.cameras is None else self.cameras
        if isinstance(cameras, str) or not all(isinstance(name, str) for name in cameras):
            raise ValueError(f"cameras must be names of images; got {self.cameras!r}")
        if self.vlm_dtype != "float32" and self.trainable == "all":
            raise ValueError(
                "trainable='all' trains the vision-language model too, which needs "
                "vlm_dtype='float32': steps of training are too small for bfloat16 weights"
            )


@dataclass(frozen=True)
class Parts:
    """Holds the parts that a policy is made of."""

    model: Pi0ForCFGRL
    tokenizer: PromptTokenizer
    norm_stats: NormStats
    config: Pi0PolicyConfig
    base: BaseCheckpoint | None  # the checkpoint, with preset "pi0"
    reference: Path | None  # the checkpoint's file with the reference's weights, if it has one


def build(
    given: Mapping[str, Any],
    *,
    checkpoint: str | Path | None,
    base: Mapping[str, str] | None,
    norm_stats: NormStats | str | Path | None,
    model_config: dict[str, Any] | None,
    sizes: TinySizes | None,
    horizon: int | None,
    chunk_size: int,
    seed: int | None,
    available: tuple[str, ...],
) -> Parts:
    """Build the parts of a policy from the constructor's arguments (see `Pi0Policy`).

    Weights are read last, so that every other error comes first.

    :param given: fields of `Pi0PolicyConfig`; None stands for the checkpoint's value, or else the
        preset's
    :param chunk_size: chunk size of the action space
    :param available: the cameras that the observation space has
    """
    preset = given["preset"]
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {PRESETS}; got {preset!r}")
    if checkpoint is not None and sizes is not None:
        raise ValueError("sizes are of a new model; a checkpoint brings its own: pass only one")
    source = None if checkpoint is None else _find_source(find_shipped(checkpoint), preset, base)
    saved = {} if source is None else _saved_policy(source.folder, preset)
    if source is not None:
        config = _checkpoint_config(source, given["condition_mode"], horizon)
    elif model_config is not None:
        config = Pi0CFGRLConfig.from_dict(model_config)
    elif preset == "tiny":
        mode = given["condition_mode"] or "token"
        config = tiny_config(sizes or TinySizes(), horizon or chunk_size, mode)
    else:
        raise ValueError(
            "preset 'pi0' needs a checkpoint: pass checkpoint= a PI0 checkpoint folder or hub "
            "name, such as lerobot/pi0_base (13 GB); for random weights take preset 'tiny'"
        )
    pretrained = preset == "pi0" and source is not None
    settings: dict[str, Any] = {
        "use_prefix_dropout": False,
        "delta_actions": preset == "pi0",
        "trainable": "all" if source is None else "expert",
        "cameras": None,
    }
    names = ("use_prefix_dropout", "delta_actions", "cameras")
    for values in (
        {"delta_actions": source and source.delta_actions},
        {name: saved.get(name) for name in names},
        given,
    ):
        settings |= {name: value for name, value in values.items() if value is not None}
    frozen_dtype = "bfloat16" if preset == "pi0" and settings["trainable"] != "all" else "float32"
    settings.setdefault("vlm_dtype", frozen_dtype)
    tokenizer, places = _find_tokenizer(given["tokenizer"], source, saved)
    settings |= {
        "condition_mode": config.condition_mode,
        "tokenizer": tokenizer if preset == "pi0" else None,
        "cameras": _choose_cameras(settings["cameras"] or available, available),
    }
    policy_config = Pi0PolicyConfig(**settings)
    stats = _find_stats(norm_stats, source, preset)
    prompts = PaliGemmaTokenizer(tokenizer, places) if preset == "pi0" else ByteTokenizer()
    if source is None:
        model = new_model(config, seed, getattr(torch, policy_config.vlm_dtype))
        return Parts(model, prompts, stats, policy_config, base=None, reference=None)
    found = BaseCheckpoint(source.name, source.files)
    if base is not None:
        found.verify(base)
    model = load_model(source, config, policy_config.vlm_dtype)
    own = source.folder / REFERENCE_FILE
    reference = own if base is None and own.is_file() else None  # beside a base the .zip has it
    return Parts(model, prompts, stats, policy_config, found if pretrained else None, reference)


def read_policy_file(folder: Path) -> dict[str, Any]:
    """Read the policy's configuration that `save_pretrained` wrote; empty if there is none.

    :raises ValueError: the file is damaged, or from another version
    """
    path = folder / POLICY_FILE
    if not path.is_file():
        return {}
    saved = read_json_object(path, "save the policy again")
    try:
        Pi0PolicyConfig(**saved)
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{path}' is damaged: {error}; save the policy again") from error
    return saved


def _saved_policy(folder: Path, preset: str) -> dict[str, Any]:
    saved = read_policy_file(folder)
    if not saved and preset == "tiny":
        raise ValueError(
            f"checkpoint '{folder}' has no {POLICY_FILE}, so it is not a tiny policy that "
            "save_pretrained wrote; for any other PI0 checkpoint pass preset='pi0'"
        )
    if saved and saved["preset"] != preset:
        raise ValueError(
            f"checkpoint '{folder}' is of preset '{saved['preset']}', not '{preset}'; "
            f"pass preset='{saved['preset']}'"
        )
    return saved


def _choose_cameras(wanted: Sequence[str], available: tuple[str, ...]) -> tuple[str, ...]:
    missing = [name for name in wanted if name not in available]
    if missing:
        raise ValueError(
            f"the policy looks at {', '.join(wanted)}, but the observations have "
            f"{', '.join(available)}: make the environment with the cameras of {', '.join(missing)}"
        )
    return tuple(name for name in available if name in wanted)


def _find_source(checkpoint: str, preset: str, base: Mapping[str, str] | None) -> Source:
    if preset == "tiny" and not Path(checkpoint).is_dir():
        raise FileNotFoundError(
            f"checkpoint folder '{checkpoint}' does not exist; give a folder that "
            f"Pi0Policy.save_pretrained wrote, or a policy of the package: {', '.join(SHIPPED)}"
        )
    try:
        return read_source(checkpoint)
    except FileNotFoundError as error:
        if base is None:
            raise
        raise FileNotFoundError(
            "this was saved without the frozen weights of its base checkpoint, which was expected "
            f"at '{checkpoint}' ({error}). If it is elsewhere now: CFGRL.load(path, "
            f"checkpoint=NEW_FOLDER); its weights have sha256 {shortened(base)}"
        ) from error


def _checkpoint_config(
    source: Source, condition_mode: str | None, horizon: int | None
) -> Pi0CFGRLConfig:
    config = source.config
    if condition_mode is not None:
        trained = is_conditional(source.shapes) or config.condition_mode == "text"
        if trained and config.condition_mode != condition_mode:
            raise ValueError(
                f"checkpoint '{source.name}' was trained with "
                f"condition_mode='{config.condition_mode}', not '{condition_mode}'; leave "
                "condition_mode out, or start from an unconditional checkpoint"
            )
        config.condition_mode = condition_mode
    if horizon is not None:
        config.chunk_size = horizon  # no weight depends on it
    return config


def _find_tokenizer(
    given: str | None, source: Source | None, saved: dict[str, Any]
) -> tuple[str, Places]:
    """Return the tokenizer of preset "pi0", and the places where it may be looked up.

    A name that only a file gives never refers to a folder of this machine, and in a local
    checkpoint never to the network.
    """
    if given or source is None:
        return given or PALIGEMMA_TOKENIZER, "anywhere"
    if source.tokenizer == str(source.folder):
        return source.tokenizer, "anywhere"
    hub = saved.get("tokenizer")  # its files are beside it, so that a folder's path isn't needed
    name = source.tokenizer or (hub if hub and is_hub_name(hub) else PALIGEMMA_TOKENIZER)
    return name, "cache" if Path(source.name).is_dir() else "hub"


def _find_stats(
    norm_stats: NormStats | str | Path | None, source: Source | None, preset: str
) -> NormStats:
    if isinstance(norm_stats, NormStats):
        return norm_stats
    if norm_stats is not None:
        return NormStats.load(norm_stats)
    stats = None if source is None else source.norm_stats()
    if stats is None and preset == "tiny":
        return NormStats.identity()
    if stats is None:
        raise ValueError(
            "preset 'pi0' needs normalisation statistics: pass norm_stats= the path of the "
            "checkpoint's norm_stats.json (openpi keeps it in the checkpoint's assets folder), or "
            "NormStats.compute(states, actions) of your demonstrations"
        )
    return stats
