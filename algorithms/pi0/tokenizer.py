"""Converts prompts to token ids: `<bos>` + instruction + newline, right-padded.

Words about the instruction, such as a condition, stand before the newline, which ends every prompt
of PI0 (openpi, `models/tokenizer.py`).

Two tokenizers share one interface: bytes for the tiny preset, PaliGemma's for the full one.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from cfgrl_gym.algorithms.pi0.checkpoints.files import fetch, refuse

PAD_ID, BOS_ID, FIRST_BYTE_ID = 0, 2, 3  # PaliGemma's pad, eos (1, unused) and bos
BYTE_IMAGE_TOKEN_ID = FIRST_BYTE_ID + 256
BYTE_VOCAB_SIZE = BYTE_IMAGE_TOKEN_ID + 1  # 260

PALIGEMMA_PROMPT_TOKENS = 48  # openpi, models/pi0.py: max_token_len
PALIGEMMA_TOKENIZER = "google/paligemma-3b-pt-224"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
Places = Literal["anywhere", "hub", "cache"]
_HELP = (
    "PI0 needs PaliGemma's tokenizer: accept the licence at "
    f"https://huggingface.co/{PALIGEMMA_TOKENIZER}, download tokenizer.json, "
    "tokenizer_config.json and special_tokens_map.json (or tokenizer.model) from "
    "there, and put them into the checkpoint's folder, or into any folder and pass "
    "tokenizer=FOLDER"
)


class ByteTokenizer:
    """Makes one token of each UTF-8 byte: 260 ids and nothing to download."""

    max_tokens = 256  # of a prompt, `<bos>` and newline included
    # Prompts are padded to a multiple of this: to the same length all of LIBERO's, the longest of
    # which has 90 tokens. Actions are rounded differently with another length, so that an episode
    # would depend on the tasks beside it if the longest prompt of a batch decided.
    pad_to = 96

    def encode(self, text: str) -> list[int]:
        """Return `<bos>` + text + newline as token ids, not padded."""
        return [BOS_ID, *self.encode_words(f"{text}\n")]

    def encode_words(self, text: str) -> list[int]:
        """Return the token ids of a text inside a prompt."""
        return [FIRST_BYTE_ID + byte for byte in text.encode()]


class PaliGemmaTokenizer:
    """Tokenizes with PaliGemma's vocabulary, as openpi does (`models/tokenizer.py`).

    :param source: a folder that holds the tokenizer, or its name on the hub
    :param places: "anywhere"; "hub" and its cache, but no folder; or "cache", without a network
    :raises FileNotFoundError: it isn't there, and there is no network or no permission to fetch it
    :raises ValueError: its files can't be read, or are another model's
    """

    max_tokens = PALIGEMMA_PROMPT_TOKENS
    pad_to = PALIGEMMA_PROMPT_TOKENS

    def __init__(self, source: str, places: Places = "anywhere") -> None:
        from transformers import AutoTokenizer

        folder = _tokenizer_folder(source, places)
        with refuse(f"no tokenizer could be read from '{folder}'", _HELP):
            # Without the last argument, a folder that names code of its own asks a question on
            # stdin.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        if self._tokenizer.bos_token_id is None:
            raise ValueError(
                f"the tokenizer in '{folder}' has no <bos>, as PaliGemma's has. {_HELP}"
            )

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self._tokenizer.save_pretrained(folder)

    def encode(self, text: str) -> list[int]:
        """Return `<bos>` + text + newline as token ids, not padded."""
        cleaned = text.strip().replace("_", " ").replace("\n", " ")
        ids = self._tokenizer.encode(cleaned, add_special_tokens=False)
        newline = self._tokenizer.encode("\n", add_special_tokens=False)
        return [self._tokenizer.bos_token_id, *ids, *newline]

    def encode_words(self, text: str) -> list[int]:
        """Return the token ids of a text inside a prompt."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


PromptTokenizer = ByteTokenizer | PaliGemmaTokenizer


def has_tokenizer(folder: Path) -> bool:
    """Return whether this folder has a tokenizer's files."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _tokenizer_folder(source: str, places: Places) -> Path:
    """Return the folder of the tokenizer's files, fetched from the hub unless they are cached."""
    folder = Path(source).expanduser()
    if places == "anywhere":
        if has_tokenizer(folder):
            return folder
        if folder.is_dir():
            raise FileNotFoundError(f"folder '{source}' holds no tokenizer. {_HELP}")
    try:
        # The cache comes first, so that files there don't have to wait for a network that is down.
        cached = Path(snapshot_download(source, local_files_only=True))
        if has_tokenizer(cached):
            return cached
    except (OSError, ValueError):  # not in the cache, or no hub name
        pass
    if places == "cache":
        raise FileNotFoundError(
            f"tokenizer '{source}' is not in the hub's cache, and for a local checkpoint nothing "
            f"is fetched unless you name it: tokenizer='{source}'. {_HELP}"
        )
    fetched = fetch("tokenizer", source, TOKENIZER_FILES, _HELP)
    if not has_tokenizer(fetched):
        raise FileNotFoundError(f"hub repository '{source}' holds no tokenizer. {_HELP}")
    return fetched


def tokenize(
    prompts: list[str],
    tokenizer: PromptTokenizer,
    device: torch.device,
    words: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn prompts into right-padded token ids. An instruction that is too long is cut.

    :param words: text to put between each instruction and its newline, which is never cut
    :return: ids int64 (batch, tokens); mask int64, 1 for real tokens; instruction int64, 1 for the
        tokens between `<bos>` and the newline (what prefix dropout hides)
    """
    rows = []
    for prompt, added in zip(prompts, words or [""] * len(prompts), strict=True):
        *instruction, newline = tokenizer.encode(prompt)
        end = [*(tokenizer.encode_words(added) if added else []), newline]
        length, room = len(instruction) + len(end), tokenizer.max_tokens - len(end)
        if len(instruction) > room:
            warnings.warn(
                f"prompt of {length} tokens cut to {tokenizer.max_tokens}: {prompt!r}",
                stacklevel=2,
            )
        rows.append([*instruction[:room], *end])
    padded = math.ceil(max(map(len, rows)) / tokenizer.pad_to) * tokenizer.pad_to
    length = min(padded, tokenizer.max_tokens)
    ids = torch.full((len(rows), length), PAD_ID, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    between = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        between[i, 1 : len(row) - 1] = 1
    return ids.to(device), mask.to(device), between.to(device)
