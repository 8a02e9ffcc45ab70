"""Gives every label its prompt: optimality in words, or no instruction for ∅."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfgrl_gym.algorithms.flow import NEGATIVE, NULL, POSITIVE
from cfgrl_gym.algorithms.pi0.inputs import encode_text
from cfgrl_gym.algorithms.pi0.tokenizer import PromptTokenizer

# RECAP (arXiv 2511.14759), section V-B: the improvement indicator as text
WORDS = {POSITIVE: " Advantage: positive", NEGATIVE: " Advantage: negative"}


@dataclass(frozen=True)
class LabelPrompts:
    """Makes the token ids and masks of prompts, which may depend on the labels.

    :param image_token_id: id of the tokens in whose place the images are put
    :param image_tokens: number of tokens of all cameras together
    :param in_words: o = 1 and o = 0 are words after the instruction (`condition_mode="text"`)
    :param hides_null: ∅ has no instruction (`use_prefix_dropout`)
    :raises ValueError: the tokenizer can't tell the words of the two labels apart
    """

    tokenizer: PromptTokenizer
    image_token_id: int
    image_tokens: int
    in_words: bool = False
    hides_null: bool = False

    def __post_init__(self) -> None:
        ids = [self.tokenizer.encode_words(words) for words in WORDS.values()]
        if self.in_words and ids[0] == ids[1]:
            raise ValueError(
                f"condition_mode='text' needs a tokenizer that knows {list(WORDS.values())}, but "
                f"this one gives both the ids {ids[0]}: pass tokenizer= PaliGemma's, or take "
                "condition_mode='bias'"
            )

    def encode(self, prompts: Tensor, words: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and instruction_mask of prompts: see `encode_text`."""
        return encode_text(prompts, self.tokenizer, self.image_token_id, self.image_tokens, words)

    def representative(self, label: int) -> int:
        """Return the label that stands for all labels with this label's prompt."""
        if self.in_words:
            return label
        return POSITIVE if self.hides_null and label != NULL else NULL

    def with_condition(self, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return inputs whose token ids and masks are those of each row's label.

        :param inputs: as `Pi0Policy.encode_observation` returns them
        :param labels: int64 (batch,) in {-1, 0, 1}, -1 for ∅
        """
        if self.in_words:
            words = [WORDS.get(label, "") for label in labels.tolist()]
            inputs = inputs | self.encode(inputs["prompt"], words)
        if self.hides_null:
            mask = inputs["attention_mask"]
            without = mask * (1 - inputs["instruction_mask"])  # as for an empty prompt
            chosen = torch.where((labels == NULL)[:, None], without, mask)
            inputs = inputs | {"attention_mask": chosen}
        return inputs
