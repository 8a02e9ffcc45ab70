"""Implements PI0's optimality condition: its configuration, parameters and modes.

∅ (label -1) injects nothing. Rows labelled ∅ get exact zeros in place of an embedding, chosen
with `torch.where`, so that their output doesn't depend on a condition parameter, and no gradient
of theirs reaches one. In "text" mode nothing is injected for any label: the condition is in the
prompt (`label_prompts.py`).
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PI0Config
from transformers import initialization as init

from cfgrl_gym.algorithms.flow import NULL, POSITIVE

ConditionMode = Literal["token", "bias", "concat", "text"]
CONDITION_MODES = get_args(ConditionMode)
# The mode for a checkpoint that has no condition. A new "token" changes only the rounding, which is
# visible in bfloat16; a new "bias" changes not a single bit.
CHECKPOINT_MODE: ConditionMode = "bias"
NUM_LABELS = 2  # o = 0 and o = 1; ∅ has no embedding
INIT_STD = 0.02  # transformers' default initializer_range
# The version of what the parameters mean. In version 1 (no version in config.json) the token
# shifted the action tokens by one position, and attended to them.
CONDITION_VERSION = 2


def as_labels(is_positive: int | bool | Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Convert `is_positive` to int64 labels (batch,) in {-1, 0, 1}.

    :param is_positive: None (∅), 0, 1, or an integer or bool tensor (batch,) with -1 for ∅
    """
    given = torch.as_tensor(NULL if is_positive is None else is_positive)
    if given.ndim > 0 and given.shape != (batch,):
        raise ValueError(
            f"is_positive has shape {tuple(given.shape)}; expected ({batch},), one label for each "
            "row of the batch"
        )
    if given.is_floating_point():
        raise ValueError(f"is_positive must hold integers; its dtype is {given.dtype}")
    labels = given.to(device, torch.int64).expand(batch)
    if bool(((labels < NULL) | (labels > POSITIVE)).any()):
        raise ValueError(f"is_positive must be None, -1 (both ∅), 0 or 1; got {labels.tolist()}")
    return labels


def is_conditional(names: Iterable[str]) -> bool:
    """Return whether tensors of these names include an optimality condition."""
    return any(name.removeprefix("model.").startswith("condition.") for name in names)


class Pi0CFGRLConfig(PI0Config):
    """Extends transformers' PI0 configuration by the mode of the optimality condition.

    The model type stays "pi0": plain transformers loads what this saves (and ignores the
    condition), and transformers' conversion of LeRobot's key names applies here too.

    :param condition_mode: "token" (one extra suffix token), "bias" (added to every action
        token), "concat" (concatenated into the action-time projection) or "text" (words in the
        prompt, without parameters)
    :param condition_version: version of what the condition's parameters mean
    """

    condition_mode: str = "token"
    condition_version: int = CONDITION_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.condition_mode not in CONDITION_MODES:
            raise ValueError(
                f"condition_mode must be one of {CONDITION_MODES}; got {self.condition_mode!r}"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "Pi0CFGRLConfig":
        """Build the configuration from what `to_dict` returned, as transformers does.

        :raises ValueError: its condition is a token of an earlier version
        """
        mode, version = config_dict.get("condition_mode"), config_dict.get("condition_version", 1)
        if mode == "token" and version != CONDITION_VERSION:
            raise ValueError(
                f"its condition_mode 'token' is of version {version!r}, whose token moved the "
                f"actions by one position; this package reads version {CONDITION_VERSION}. Train "
                "again from the checkpoint that it was made from, or go on without its condition: "
                "PI0ForConditionalGeneration.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), "
                "then copy FOLDER's other .json files"
            )
        config: Pi0CFGRLConfig = super().from_dict(config_dict, **kwargs)
        return config

    def set_float32(self) -> None:
        """Set float32 as the dtype of every part.

        Trained weights are float32; `from_pretrained` and loaded configurations may say otherwise.
        """
        vlm: Any = self.vlm_config
        parts: tuple[Any, ...] = (self, self.dit_config)
        for part in (*parts, vlm, vlm.text_config, vlm.vision_config):
            part.dtype = torch.float32


class OptimalityCondition(nn.Module):
    """Holds the condition's parameters: an embedding of o ∈ {0, 1}, and in "concat" mode the input
    columns that it adds to the action-time projection; in "text" mode none.

    Every mode with parameters starts as a no-op: "token" and "bias" with a zero embedding, "concat"
    with zero columns. All of these receive a gradient from the first step on.
    """

    def __init__(self, mode: str, hidden_size: int) -> None:
        super().__init__()
        self.mode = mode
        if mode == "text":
            return
        self.embedding = nn.Parameter(torch.empty(NUM_LABELS, hidden_size))
        if mode == "concat":
            self.columns = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters; transformers calls this where a checkpoint lacks them."""
        if self.mode == "concat":  # if both factors were zero, neither would get a gradient
            init.normal_(self.embedding, mean=0.0, std=INIT_STD)
            init.zeros_(self.columns)
        elif self.mode != "text":
            init.zeros_(self.embedding)

    def forward(self, labels: Tensor) -> Tensor:
        """Return the vector to inject for each row, (batch, hidden); exact zeros for ∅. Not to be
        called in "text" mode.

        "concat" returns columns · embedding: W·[a, t, c] = W_at·[a, t] + columns·c, so this is
        added to the projection's output instead of widening transformers' weight.
        """
        injected = self.embedding[labels.clamp(min=0)]  # (batch, hidden)
        if self.mode == "concat":
            injected = injected @ self.columns.T
        return torch.where((labels == NULL)[:, None], torch.zeros_like(injected), injected)
