"""Building a PI0 policy's parts: new, or from a checkpoint; and writing a checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from cfgrl_gym.algorithms.pi0.checkpoints.base import Base, BaseReference, missing_base
from cfgrl_gym.algorithms.pi0.checkpoints.formats import Source, is_hub_name, read_source
from cfgrl_gym.algorithms.pi0.checkpoints.shipped import SHIPPED, find_shipped
from cfgrl_gym.algorithms.pi0.checkpoints.stats import STATS_FILE
from cfgrl_gym.algorithms.pi0.checkpoints.weights import DTYPES, is_conditional, load_model
from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig, check_condition_mode
from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.presets import PRESETS, TinySizes, new_model, tiny_config
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


@dataclass(frozen=True)
class Pi0PolicyConfig:
    """What makes a PI0 policy what it is, beside its weights and statistics.

    :param preset: "tiny" or "pi0"
    :param condition_mode: "token", "bias" or "concat"
    :param use_prefix_dropout: ∅ doesn't see the instruction either
    :param delta_actions: the model's actions are relative to the state in the first 6 dimensions
    :param trainable: "expert", "all" or "lora"
    :param vlm_dtype: "float32" or "bfloat16", of the VLM's weights
    :param tokenizer: folder or hub name of preset "pi0"'s tokenizer; None for bytes
    :param cameras: PI0's names of the images it looks at; None in files of before there was this
    """

    preset: str
    condition_mode: str
    use_prefix_dropout: bool
    delta_actions: bool
    trainable: str
    vlm_dtype: str
    tokenizer: str | None
    cameras: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("use_prefix_dropout", "delta_actions"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {getattr(self, name)!r}")
        if not isinstance(self.tokenizer, str | Path | None):
            raise ValueError(f"tokenizer must be a folder or hub name; got {self.tokenizer!r}")
        cameras = () if self.cameras is None else self.cameras
        if isinstance(cameras, str) or not all(isinstance(name, str) for name in cameras):
            raise ValueError(f"cameras must be names of images; got {self.cameras!r}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {PRESETS}; got {self.preset!r}")
        check_condition_mode(self.condition_mode)
        if self.trainable not in TRAINABLE:
            raise ValueError(f"trainable must be one of {TRAINABLE}; got {self.trainable!r}")
        if self.vlm_dtype not in DTYPES:
            raise ValueError(f"vlm_dtype must be one of {(*DTYPES,)}; got {self.vlm_dtype!r}")
        if self.vlm_dtype != "float32" and self.trainable == "all":
            raise ValueError(
                "trainable='all' trains the vision-language model too, which needs "
                "vlm_dtype='float32': steps of training are too small for bfloat16 weights"
            )


@dataclass(frozen=True)
class Built:
    """A policy's parts."""

    model: Pi0ForCFGRL
    tokenizer: PromptTokenizer
    norm_stats: NormStats
    config: Pi0PolicyConfig
    base: Base | None  # the checkpoint, where it is preset "pi0"'s


def build(
    *,
    preset: str,
    checkpoint: str | Path | None,
    norm_stats: NormStats | str | Path | None,
    condition_mode: str | None,
    use_prefix_dropout: bool | None,
    delta_actions: bool | None,
    trainable: str | None,
    horizon: int | None,
    chunk_size: int,
    sizes: TinySizes | None,
    seed: int | None,
    vlm_dtype: str | None,
    tokenizer: str | None,
    model_config: dict[str, Any] | None,
    base: BaseReference | None,
    cameras: Sequence[str] | None,
    available: tuple[str, ...],
) -> Built:
    """The parts of a policy, from the constructor's arguments (see `Pi0Policy`).

    :param available: the cameras that the observation space has

    An argument that is None takes the checkpoint's value, or the preset's. Weights are read last:
    whatever else is wrong is said before.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {PRESETS}; got {preset!r}")
    if checkpoint is not None and sizes is not None:
        raise ValueError("sizes are of a new model; a checkpoint brings its own: pass only one")
    source = None if checkpoint is None else _find_source(find_shipped(checkpoint), preset, base)
    saved = {} if source is None else _saved_policy(source.folder, preset)
    if source is not None:
        config = _checkpoint_config(source, condition_mode, horizon)
    elif model_config is not None:
        config = Pi0CFGRLConfig.from_dict(model_config)
    elif preset == "tiny":
        config = tiny_config(sizes or TinySizes(), horizon or chunk_size, condition_mode or "token")
    else:
        raise ValueError(
            "preset 'pi0' needs a checkpoint: pass checkpoint= a PI0 checkpoint folder or hub "
            "name, such as lerobot/pi0_base (13 GB); for random weights take preset 'tiny'"
        )
    pretrained = preset == "pi0" and source is not None
    delta = None if source is None else source.delta_actions
    trainable = trainable or ("expert" if pretrained else "all")
    frozen_dtype = "bfloat16" if preset == "pi0" and trainable != "all" else "float32"
    policy_config = Pi0PolicyConfig(
        preset=preset,
        condition_mode=config.condition_mode,
        use_prefix_dropout=_first(use_prefix_dropout, saved.get("use_prefix_dropout"), False),
        delta_actions=_first(delta_actions, saved.get("delta_actions"), delta, preset == "pi0"),
        trainable=trainable,
        vlm_dtype=vlm_dtype or frozen_dtype,
        tokenizer=_tokenizer_source(tokenizer, source, saved) if preset == "pi0" else None,
        cameras=_choose_cameras(cameras or saved.get("cameras"), available),
    )
    stats = _find_stats(norm_stats, source, preset)
    prompts: PromptTokenizer = (
        ByteTokenizer()
        if policy_config.tokenizer is None
        else PaliGemmaTokenizer(policy_config.tokenizer, _tokenizer_places(tokenizer, source))
    )
    if source is None:
        model = new_model(config, seed, DTYPES[policy_config.vlm_dtype])
        return Built(model, prompts, stats, policy_config, base=None)
    found = Base(source.name, source.files)
    if base is not None:
        found.verify(base)
    model = load_model(source, config, policy_config.vlm_dtype)
    return Built(model, prompts, stats, policy_config, found if pretrained else None)


def save_checkpoint(
    folder: Path,
    model: Pi0ForCFGRL,
    norm_stats: NormStats,
    config: Pi0PolicyConfig,
    tokenizer: PromptTokenizer,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write model.safetensors, config.json, norm_stats.json, pi0_policy.json and the tokenizer.

    :param state_dict: weights to write in place of the model's own
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=state_dict)
    norm_stats.save(folder / STATS_FILE)
    if isinstance(tokenizer, PaliGemmaTokenizer):
        tokenizer.save_pretrained(folder)
    text = json.dumps(asdict(config), indent=2) + "\n"
    (folder / POLICY_FILE).write_text(text, encoding="utf-8")


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def read_policy_file(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote of a policy's configuration; empty where there is none.

    :raises ValueError: damaged, or from another version
    """
    path = folder / POLICY_FILE
    if not path.is_file():
        return {}
    saved = read_json_object(path, "save the policy again")
    expected = {field.name for field in fields(Pi0PolicyConfig)}
    if set(saved) | {"cameras"} != expected:
        raise ValueError(f"'{path}' should hold {sorted(expected)}; save the policy again")
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


def _choose_cameras(wanted: Sequence[str] | None, available: tuple[str, ...]) -> tuple[str, ...]:
    if wanted is None:
        return available
    missing = [name for name in wanted if name not in available]
    if missing:
        raise ValueError(
            f"the policy looks at {', '.join(wanted)}, but the observations have "
            f"{', '.join(available)}: make the environment with the cameras of {', '.join(missing)}"
        )
    return tuple(name for name in available if name in wanted)


def _find_source(checkpoint: str, preset: str, base: BaseReference | None) -> Source:
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
        raise missing_base(base, checkpoint, error) from error


def _checkpoint_config(
    source: Source, condition_mode: str | None, horizon: int | None
) -> Pi0CFGRLConfig:
    config = source.config
    if condition_mode is not None:
        if is_conditional(source.shapes) and config.condition_mode != condition_mode:
            raise ValueError(
                f"checkpoint '{source.name}' was trained with "
                f"condition_mode='{config.condition_mode}', not '{condition_mode}'; leave "
                "condition_mode out, or start from an unconditional checkpoint"
            )
        config.condition_mode = check_condition_mode(condition_mode)
    if horizon is not None:
        config.chunk_size = horizon  # no weight depends on it
    return config


def _tokenizer_source(given: str | None, source: Source | None, saved: dict[str, Any]) -> str:
    own = None if source is None else source.tokenizer
    hub = saved.get("tokenizer")  # its files lie beside it, so that a folder's path isn't needed
    return given or own or (hub if hub and is_hub_name(hub) else None) or PALIGEMMA_TOKENIZER


def _tokenizer_places(given: str | None, source: Source | None) -> Places:
    """Where a tokenizer is looked for: what only a file names leads to no folder of this machine,
    and for a local checkpoint to no network."""
    if given or source is None or source.tokenizer == str(source.folder):
        return "anywhere"
    return "cache" if Path(source.name).is_dir() else "hub"


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
