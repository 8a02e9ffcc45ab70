"""Encodes instructions as fixed-size byte arrays, because SB3's buffers don't support text."""

import numpy as np

PROMPT_BYTES = 256  # more than twice the longest LIBERO instruction


def encode_prompt(text: str, size: int = PROMPT_BYTES) -> np.ndarray:
    """Encode `text` as zero-padded UTF-8 bytes: uint8 (size,).

    :raises ValueError: the text is too long or contains the padding character
    """
    data = text.encode("utf-8")
    if len(data) > size:
        raise ValueError(f"the prompt is {len(data)} bytes long, at most {size} fit: {text!r}")
    if 0 in data:
        raise ValueError(f"a prompt can't contain the character U+0000: {text!r}")
    return np.frombuffer(data.ljust(size, b"\0"), dtype=np.uint8).copy()


def decode_prompt(encoded: np.ndarray) -> str:
    """Decode a text that `encode_prompt` encoded.

    :param encoded: uint8 (n,)
    :raises ValueError: it isn't a single row of bytes, or isn't UTF-8
    """
    array = np.asarray(encoded, dtype=np.uint8)
    if array.ndim != 1:
        raise ValueError(f"an encoded prompt has shape (n,); got {array.shape}; decode row by row")
    return array.tobytes().rstrip(b"\0").decode("utf-8")
