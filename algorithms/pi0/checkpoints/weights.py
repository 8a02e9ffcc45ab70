"""Loads a model from a checkpoint's weights, and checks that no tensor is missing or unused."""

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cfgrl_gym.algorithms.pi0.checkpoints.files import refuse
from cfgrl_gym.algorithms.pi0.checkpoints.formats import Source
from cfgrl_gym.algorithms.pi0.checkpoints.stats import OLD_BUFFER_PREFIXES
from cfgrl_gym.algorithms.pi0.condition import Pi0CFGRLConfig, is_conditional
from cfgrl_gym.algorithms.pi0.model import Pi0ForCFGRL

SHOWN = 5  # the most tensor names in an error message


def load_model(source: Source, config: Pi0CFGRLConfig, vlm_dtype: str) -> Pi0ForCFGRL:
    """Load the model of a checkpoint.

    :param vlm_dtype: "float32" or "bfloat16", for the VLM. Expert, projections and condition are
        float32, whatever the file holds
    :raises ValueError: tensors are missing, unused or of another shape
    """
    state = _read_state(source)
    # An activation that doesn't exist, heads that don't divide the width, ...
    with refuse(f"checkpoint '{source.name}': its config.json makes no model"):
        loaded: Any = Pi0ForCFGRL.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=getattr(torch, vlm_dtype),
            ignore_mismatched_sizes=True,  # counted below, with the rest
            output_loading_info=True,
            local_files_only=True,
        )
    model: Pi0ForCFGRL = loaded[0]
    report: dict[str, Any] = loaded[1]
    missing = set(report["missing_keys"])
    if is_conditional(state):
        found = {name.removeprefix("model.") for name in state}
        missing |= {f"condition.{name}" for name in model.condition.state_dict()} - found
    shapes = [
        f"{name} {tuple(found)}, not {tuple(wanted)}"
        for name, found, wanted in report["mismatched_keys"]
    ]
    problems = [
        f"{what} {len(names)} {'tensor' if len(names) == 1 else 'tensors'} ({_some(names)})"
        for what, names in (
            ("lacks", sorted(missing)),
            ("has unknown", sorted(report["unexpected_keys"])),
            ("has in another shape", sorted(shapes)),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"checkpoint '{source.name}' {'; it '.join(problems)}. It is not a complete PI0 "
            "checkpoint in transformers', LeRobot's or openpi's format: download or convert it "
            "again"
        )
    model.condition.float()  # where it is new, it was made in the VLM's dtype
    _own_memory(model, state)
    model.drop_unused_embeddings()
    model.config.set_float32()  # from_pretrained wrote the VLM's dtype
    return model


def _read_state(source: Source) -> dict[str, Tensor]:
    """Read the files' tensors, memory-mapped, without the statistics in LeRobot's old files."""
    state = {}
    for file in source.files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping: it has keys() only)
                if not name.removeprefix("model.").startswith(OLD_BUFFER_PREFIXES):
                    state[name] = tensors.get_tensor(name)
    integers = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    if integers:
        raise ValueError(
            f"checkpoint '{source.name}' has tensors that aren't floating point "
            f"({_some(integers)}): it is quantised or damaged; get the one it was made from"
        )
    # transformers loads the VLM's lm_head as its embeddings, overwriting them if a file has both.
    # PI0 doesn't use an lm_head: if there are embeddings, they are what was trained.
    if any(name.endswith("language_model.embed_tokens.weight") for name in state):
        state = {name: t for name, t in state.items() if "paligemma.lm_head" not in name}
    return state


def _own_memory(model: Pi0ForCFGRL, state: dict[str, Tensor]) -> None:
    """Copy parameters that still point into a mapped file, because the file may be overwritten, for
    example by a save into the same folder."""
    mapped = {tensor.data_ptr() for tensor in state.values()}
    for parameter in model.parameters():
        if parameter.data_ptr() in mapped:
            parameter.data = parameter.data.clone()


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
