"""Filmstrips: evenly spaced frames of a video, as data that a page can hold."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np
from PIL import Image

from cfgrl_gym.cli.reporting.reading import refuse

FRAMES = 8
HEIGHT = 128  # pixels of a frame at the most
QUALITY = 82
FPS = 20  # control steps a second


@dataclass(frozen=True)
class Frame:
    """A frame as a data URI, and its time in the video."""

    uri: str
    seconds: float


@dataclass(frozen=True)
class Strip:
    """Frames from the first to the last; `video` is the whole file where it was asked for."""

    frames: tuple[Frame, ...]
    video: str | None


def read_strip(file: Path, embed_video: bool) -> Strip:
    """Evenly spaced frames of a video.

    :raises ValueError: it can't be read
    """
    try:
        count = sum(1 for _ in _frames(file))
        chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(FRAMES, count))})
        images = [image for i, image in enumerate(_frames(file)) if i in chosen]
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise refuse(file, f"not a video: {' '.join(str(error).split())[:120]}") from error
    if not images:
        raise refuse(file, "a video without frames")
    frames = [Frame(_jpeg(image), i / FPS) for i, image in zip(chosen, images, strict=True)]
    video = _uri("video/mp4", file.read_bytes()) if embed_video else None
    return Strip(tuple(frames), video)


def _frames(file: Path) -> Iterator[Any]:
    return imageio.v3.imiter(file, plugin="FFMPEG")


def _jpeg(frame: np.ndarray) -> str:
    image = Image.fromarray(frame)
    if image.height > HEIGHT:
        width = round(image.width * HEIGHT / image.height)
        image = image.resize((width, HEIGHT), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return _uri("image/jpeg", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
