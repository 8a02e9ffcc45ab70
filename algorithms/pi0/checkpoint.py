"""Building a PI0 policy's parts: new, or from a checkpoint; and writing a checkpoint."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig, check_condition_mode
from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.presets import (
    PALIGEMMA_TOKENIZER,
    PRESETS,
    TinySizes,
    new_model,
    tiny_config,
)
from cfgrl_gym.algorithms.pi0.tokenizer import ByteTokenizer, PaliGemmaTokenizer, PromptTokenizer
from cfgrl_gym.wrappers.norm_stats import NormStats

POLICY_FILE = "pi0_policy.json"
STATS_FILE = "norm_stats.json"
TRAINABLE = ("expert", "all", "lora")


@dataclass(frozen=True)
class Pi0PolicyConfig:
    """What makes a PI0 policy what it is, beside its weights and statistics.

    :param preset: "tiny" or "pi0"
    :param condition_mode: "token", "bias" or "concat"
    :param use_prefix_dropout: ∅ doesn't see the instruction either
    :param delta_actions: the model's actions are relative to the state in the first 6 dimensions
    :param trainable: "expert", "all" or "lora"
    :param tokenizer: folder or hub name of preset "pi0"'s tokenizer; None for bytes
    """

    preset: str
    condition_mode: str
    use_prefix_dropout: bool
    delta_actions: bool
    trainable: str
    tokenizer: str | None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {PRESETS}; got {self.preset!r}")
        check_condition_mode(self.condition_mode)
        if self.trainable not in TRAINABLE:
            raise ValueError(f"trainable must be one of {TRAINABLE}; got {self.trainable!r}")


@dataclass(frozen=True)
class Built:
    """A policy's parts."""

    model: Pi0ForCFGRL
    tokenizer: PromptTokenizer
    norm_stats: NormStats
    config: Pi0PolicyConfig


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
    tokenizer: str | None,
    model_config: dict[str, Any] | None,
) -> Built:
    """The parts of a policy, from the constructor's arguments (see `Pi0Policy`).

    An argument that is None takes the checkpoint's value, or the preset's.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {PRESETS}; got {preset!r}")
    folder = Path(checkpoint) if checkpoint is not None and Path(checkpoint).is_dir() else None
    saved = {} if folder is None else _read_policy_file(folder, preset)
    if checkpoint is not None:
        if sizes is not None:
            raise ValueError("sizes are of a new model; a checkpoint brings its own: pass only one")
        model = _load_model(str(checkpoint), preset, saved, condition_mode, horizon)
    else:
        if model_config is not None:
            config = Pi0CFGRLConfig.from_dict(model_config)
        elif preset == "tiny":
            config = tiny_config(
                sizes or TinySizes(), horizon or chunk_size, condition_mode or "token"
            )
        else:
            raise ValueError(
                "preset 'pi0' needs a checkpoint: pass checkpoint= a PI0 checkpoint folder or hub "
                "name, such as lerobot/pi0_base (13 GB); for random weights take preset 'tiny'"
            )
        model = new_model(config, seed)
    if preset == "pi0" and tokenizer is None:
        has_own = folder is not None and (folder / "tokenizer_config.json").is_file()
        tokenizer = saved.get("tokenizer") or (str(folder) if has_own else PALIGEMMA_TOKENIZER)
    pretrained = preset == "pi0" and checkpoint is not None
    policy_config = Pi0PolicyConfig(
        preset=preset,
        condition_mode=model.condition.mode,
        use_prefix_dropout=_first(use_prefix_dropout, saved.get("use_prefix_dropout"), False),
        delta_actions=_first(delta_actions, saved.get("delta_actions"), preset == "pi0"),
        trainable=trainable or ("expert" if pretrained else "all"),
        tokenizer=tokenizer if preset == "pi0" else None,
    )
    prompts: PromptTokenizer = (
        ByteTokenizer() if tokenizer is None else PaliGemmaTokenizer(tokenizer)
    )
    return Built(model, prompts, _find_stats(norm_stats, folder, preset), policy_config)


def save_checkpoint(
    folder: Path,
    model: Pi0ForCFGRL,
    norm_stats: NormStats,
    config: Pi0PolicyConfig,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write model.safetensors, config.json, norm_stats.json and pi0_policy.json.

    :param state_dict: written in place of the model's own
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=state_dict)
    norm_stats.save(folder / STATS_FILE)
    text = json.dumps(asdict(config), indent=2) + "\n"
    (folder / POLICY_FILE).write_text(text, encoding="utf-8")


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _read_policy_file(folder: Path, preset: str) -> dict[str, Any]:
    path = folder / POLICY_FILE
    if not path.is_file():
        if preset == "tiny":
            raise ValueError(
                f"checkpoint '{folder}' has no {POLICY_FILE}, so it is not a tiny policy that "
                "save_pretrained wrote; for any other PI0 checkpoint pass preset='pi0'"
            )
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not JSON ({error}); save the policy again") from error
    expected = {field.name for field in fields(Pi0PolicyConfig)}
    if not isinstance(saved, dict) or set(saved) != expected:
        raise ValueError(f"'{path}' should hold {sorted(expected)}; save the policy again")
    if saved["preset"] != preset:
        raise ValueError(
            f"checkpoint '{folder}' is of preset '{saved['preset']}', not '{preset}'; "
            f"pass preset='{saved['preset']}'"
        )
    return saved


def _load_model(
    checkpoint: str,
    preset: str,
    saved: dict[str, Any],
    condition_mode: str | None,
    horizon: int | None,
) -> Pi0ForCFGRL:
    if preset == "tiny" and not Path(checkpoint).is_dir():
        raise FileNotFoundError(
            f"checkpoint folder '{checkpoint}' does not exist; give a folder that "
            "Pi0Policy.save_pretrained wrote"
        )
    raw, _ = Pi0CFGRLConfig.get_config_dict(checkpoint)
    kind = raw.get("model_type", raw.get("type"))  # LeRobot's config.json says "type"
    if kind != "pi0":
        raise ValueError(f"checkpoint '{checkpoint}' is a model of type '{kind}', not 'pi0'")
    config = Pi0CFGRLConfig.from_pretrained(checkpoint)
    trained = saved.get("condition_mode")
    if condition_mode is not None:
        if trained not in (None, condition_mode):
            raise ValueError(
                f"checkpoint '{checkpoint}' was trained with condition_mode='{trained}', not "
                f"'{condition_mode}'; leave condition_mode out, or start from an unconditional "
                "checkpoint"
            )
        config.condition_mode = check_condition_mode(condition_mode)
    if horizon is not None:
        config.chunk_size = horizon  # no weight depends on it
    # float32, whatever the file holds: the policy's inputs are float32
    model = Pi0ForCFGRL.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    model.drop_unused_embeddings()
    return model


def _find_stats(
    norm_stats: NormStats | str | Path | None, folder: Path | None, preset: str
) -> NormStats:
    if isinstance(norm_stats, NormStats):
        return norm_stats
    if norm_stats is not None:
        return NormStats.load(norm_stats)
    if folder is not None and (folder / STATS_FILE).is_file():
        return NormStats.load(folder / STATS_FILE)
    if preset == "tiny":
        return NormStats.identity()
    raise ValueError(
        "preset 'pi0' needs normalisation statistics: pass norm_stats= the path of the "
        "checkpoint's norm_stats.json (openpi keeps it in the checkpoint's assets folder), or "
        "NormStats.compute(states, actions) of your demonstrations"
    )
