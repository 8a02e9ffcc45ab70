"""Adds low-rank adapters (LoRA, Hu et al. 2021) to PI0: `Pi0Policy(trainable="lora")`.

With peft, this adapts what openpi's variants gemma_2b_lora and gemma_300m_lora (models/gemma.py)
adapt: every projection of attention and MLP, at rank 16 in the language model and at rank 32 in the
action expert, with alpha equal to the rank. The rest differs from openpi, to save memory or to keep
the policy exactly as it was:

- openpi's freeze filter (models/pi0_config.py) covers the language model and the expert only, so it
  trains the vision tower in full: 0.4 B parameters with gradients and optimizer moments. Here the
  vision tower and its projector are frozen.
- openpi draws both factors at random. Here B starts at zero, so adapters don't change a policy at
  first.
- Of the VLM's last layer only the key and value projections are adapted: the expert reads nothing
  that comes after them, so no gradient would reach the others.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL

LORA_RANK = 16  # of the language model; openpi, models/gemma.py, gemma_2b_lora
EXPERT_RANKS = 2  # the expert's rank over the language model's; 32 in openpi's gemma_300m_lora
ADAPTER = "default"  # peft's own name, part of the adapters' keys in the state dict
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def check_lora(rank: int) -> None:
    """Check that adapters of this rank can be made.

    :raises ValueError: peft is not installed, or the rank is not positive
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1; got {rank}")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "trainable='lora' needs the peft package: pip install 'cfgrl-gym[lora]'; or use "
            "trainable='expert' (VLM frozen) or 'all'"
        ) from error


def set_trainable(
    model: Pi0ForCFGRL, trainable: str, lora_rank: int = LORA_RANK, seed: int | None = None
) -> None:
    """Freeze what is not to be trained, in a model whose parameters all require gradients.

    :param trainable: "all"; "expert", with the VLM frozen; or "lora", see `add_lora`
    """
    if trainable == "expert":
        model.model.vlm.requires_grad_(False)
    elif trainable == "lora":
        add_lora(model, lora_rank, seed)


def add_lora(model: Pi0ForCFGRL, rank: int = LORA_RANK, seed: int | None = None) -> None:
    """Add adapters to the model in place, and freeze everything else except the condition and the
    expert's input and output projections (`embed_action_time`, `action_out_proj`).

    The velocity stays bit for bit the same. An adapted layer's own weight moves to the key
    `<layer>.base_layer.weight`, beside `<layer>.lora_A.default.weight` (rank, in) and
    `<layer>.lora_B.default.weight` (out, rank). Adapters are float32 whatever the base's dtype, and
    a later `.to(dtype)` would cast them too: cast the base first.

    :param rank: rank of the language model's adapters; the expert's have twice this rank. Alpha is
        the rank, as in openpi (the adapters' product isn't scaled)
    :param seed: seed of the initial weights; the global generator is left unchanged. None draws
        from the global generator
    :raises ValueError: peft is not installed, or the rank is not positive
    """
    check_lora(rank)
    model.requires_grad_(False)
    language_model = model.model.vlm.language_model
    last = len(language_model.layers) - 1
    unread = rf"layers\.{last}\.(self_attn\.[qo]_proj|mlp\..*)"
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        _inject(language_model, rank, unread)
        _inject(model.model.dit, EXPERT_RANKS * rank)
    for trained in (model.condition, model.embed_action_time, model.action_out_proj):
        trained.requires_grad_(True)


def _inject(module: nn.Module, rank: int, exclude: str | None = None) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=PROJECTIONS, exclude_modules=exclude
    )
    inject_adapter_in_model(config, module, ADAPTER)
    for layer in _adapted(module).values():
        for factor in (layer.lora_A, layer.lora_B):  # peft gives them the base's dtype
            factor[ADAPTER].to(torch.float32)


def _adapted(module: nn.Module) -> dict[str, Any]:
    """Return the layers with an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in module.named_modules() if isinstance(part, LoraLayer)}


@torch.no_grad()
def merged_state_dict(model: Pi0ForCFGRL) -> dict[str, Tensor]:
    """Build the state dict of the same model without adapters, under transformers' key names.

    An adapted weight is W + scaling · B·A, computed in float32 and rounded to W's dtype: in
    bfloat16 the result differs from the adapted layer by that rounding.

    :return: tensors on the CPU, so that the copies take no device memory
    """
    state = {
        name.replace(".base_layer.", "."): value.cpu()
        for name, value in model.state_dict().items()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    for name, layer in _adapted(model).items():
        weight = state[f"{name}.weight"]  # (out, in)
        a, b = (factor[ADAPTER].weight.cpu() for factor in (layer.lora_A, layer.lora_B))
        state[f"{name}.weight"] = (weight.float() + layer.scaling[ADAPTER] * (b @ a)).to(
            weight.dtype
        )
    return state
