"""Instructions as fixed-size byte arrays, because SB3's buffers take no text space."""

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
    """Decode the text that `encode_prompt` was given.

    :param encoded: uint8 (n,)
    :raises ValueError: not one row of bytes, or not UTF-8
    """
    array = np.asarray(encoded, dtype=np.uint8)
    if array.ndim != 1:
        raise ValueError(f"an encoded prompt has shape (n,); got {array.shape}; decode row by row")
    return array.tobytes().rstrip(b"\0").decode("utf-8")
