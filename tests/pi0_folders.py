"""PI0 checkpoints in transformers', LeRobot's and openpi's formats, written key by key.

Key names and config files are those of the hub's lerobot/pi0_base and of openpi's
examples/convert_jax_model_to_pytorch.py; sizes are small.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pi0_support import HORIZON, SIZES, plain_pi0
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cfgrl_gym.algorithms.pi0 import NormStats, Pi0ForCFGRL
from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig
from cfgrl_gym.algorithms.pi0.presets import tiny_config
from cfgrl_gym.wrappers.norm_stats import Moments

STATS = NormStats(Moments((0.1,) * 8, (0.7,) * 8), Moments((-0.2,) * 7, (0.3,) * 7))
VLM = "paligemma_with_expert.paligemma."
EXPERT = "paligemma_with_expert.gemma_expert."
LEROBOT_CONFIG = {
    "type": "pi0",
    "n_obs_steps": 1,
    "input_features": {"observation.state": {"type": "STATE", "shape": [8]}},
    "output_features": {"action": {"type": "ACTION", "shape": [7]}},
    "device": "cuda",
    "use_amp": False,
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "dtype": "float32",
    "chunk_size": HORIZON,
    "n_action_steps": HORIZON,
    "max_state_dim": 32,
    "max_action_dim": 32,
    "num_inference_steps": 10,
    "time_sampling_beta_alpha": 1.5,
    "min_period": 0.004,
    "max_period": 4.0,
    "image_resolution": [224, 224],
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    "tokenizer_max_length": 48,
}
OPENPI_CONFIG = {
    "action_dim": 32,
    "action_horizon": HORIZON,
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "precision": "float32",
}


def small_config() -> Pi0CFGRLConfig:
    """As SigLIP So400m's heads are 72 wide, so is this one's; the image token is outside the
    vocabulary, as PI0's."""
    config: Any = tiny_config(SIZES, HORIZON, "bias")
    config.vlm_config.vision_config.hidden_size = 72
    config.vlm_config.vision_config.num_attention_heads = 1
    config.vlm_config.image_token_id = config.vlm_config.text_config.vocab_size
    return Pi0CFGRLConfig.from_dict(config.to_dict())


def save_word_tokenizer(folder: Path) -> None:
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "pick": 4, "up": 5, "can": 6}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def openpi_tensors(model: Pi0ForCFGRL) -> dict[str, Tensor]:
    """openpi's names, which LeRobot's are with "model." before them."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("condition."):
            continue
        name = name.replace("model.vlm.vision_tower.", f"{VLM}model.vision_tower.vision_model.")
        name = name.replace("model.vlm.language_model.embed_tokens.", f"{VLM}lm_head.")
        name = name.replace("model.vlm.", f"{VLM}model.").replace("model.dit.", f"{EXPERT}model.")
        tensors[name.replace("embed_action_time.", "")] = tensor.clone()
    tensors[f"{EXPERT}lm_head.weight"] = torch.zeros(260, SIZES.hidden_size)
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    save_word_tokenizer(folder)
    return folder


def lerobot(folder: Path, model: Pi0ForCFGRL, **changes: Any) -> Path:
    tensors = {f"model.{name}": tensor for name, tensor in openpi_tensors(model).items()}
    return write(folder, {**LEROBOT_CONFIG, **changes}, tensors)


def openpi(folder: Path, model: Pi0ForCFGRL) -> Path:
    return write(folder, OPENPI_CONFIG, openpi_tensors(model))


def transformers(folder: Path, model: Pi0ForCFGRL) -> Path:
    plain_pi0(model).save_pretrained(folder)
    save_word_tokenizer(folder)
    return folder


FORMATS = {"lerobot": lerobot, "openpi": openpi, "transformers": transformers}
