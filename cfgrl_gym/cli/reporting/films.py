"""Makes filmstrips: evenly spaced frames of the runs' videos, with their episodes' outcomes."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3
import numpy as np
from PIL import Image

from cfgrl_gym.cli.reporting.comparison import Links
from cfgrl_gym.cli.reporting.methods import Method
from cfgrl_gym.cli.reporting.runs import EvaluationRun, Run, Runs, refuse

FRAMES = 8
HEIGHT = 128  # pixels of a frame at the most
QUALITY = 82
FPS = 20  # control steps a second
# What `cfgrl eval` records: the first such episode at the first cfg_scale.
_OUTCOMES = {"success": True, "failure": False}


@dataclass(frozen=True)
class Clip:
    """Holds frames of one video from the first to the last.

    :param caption: outcome, task, cfg_scale
    :param frames: each as a data URI, with its time in the video in seconds
    :param video: the whole file as a data URI, if it is embedded
    """

    caption: str
    frames: tuple[tuple[str, float], ...]
    video: str | None


@dataclass(frozen=True)
class Film:
    """Holds the videos of one run.

    :param role: before training, after training, or empty
    :param further: whether another seed of the same method is shown before it
    """

    run: Run
    role: str
    clips: tuple[Clip, ...]
    further: bool


def films(
    runs: Runs, methods: Sequence[Method], links: Links, embed_videos: bool
) -> tuple[Film, ...]:
    """Make the filmstrips: before training, then method by method, then the rest.

    :raises ValueError: a video is damaged
    """
    roles: dict[Run, tuple[str, str]] = {}  # run → role, and what it is one of several of
    for evaluation in runs.evaluations:
        if links.role(evaluation) == "before":
            roles[evaluation] = "before training", evaluation.name
    for method in methods:
        for training in method.trainings:
            after: list[Run] = [run for run in links.after[training] if run.videos]
            for run in after or [training]:
                roles.setdefault(run, ("after training", method.label))
    for evaluation in runs.evaluations:
        roles.setdefault(evaluation, ("", evaluation.name))
    shown: set[str] = set()
    found = []
    for run, (role, group) in roles.items():
        if run.videos:
            files = sorted(run.videos, key=lambda file: [*_OUTCOMES, file.stem].index(file.stem))
            clips = tuple(read_clip(file, _caption(run, file), embed_videos) for file in files)
            found.append(Film(run, role, clips, group in shown))
            shown.add(group)
    return tuple(found)


def _caption(run: Run, video: Path) -> str:
    name = video.stem.replace("_", " ").capitalize()
    if not isinstance(run, EvaluationRun):
        return f"{name}, outcome not recorded"
    first = run.results[0]
    outcome = _OUTCOMES.get(video.stem)
    episode = next((e for e in first.episodes if e.success == outcome), None)
    if outcome is None or episode is None:
        return f"{name}, {first.setting}, w = {first.cfg_scale:g}"
    where = f"{run.suite} task {episode.task_id}, initial state {episode.init_state_id}"
    return f"{name}: {where}, w = {first.cfg_scale:g}"


def read_clip(file: Path, caption: str, embed_video: bool) -> Clip:
    """Take evenly spaced frames of a video.

    :raises ValueError: it can't be read
    """
    try:
        # Twice from the start, since the whole video may not fit in memory.
        count = sum(1 for _ in imageio.v3.imiter(file, plugin="FFMPEG"))
        chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(FRAMES, count))})
        frames = enumerate(imageio.v3.imiter(file, plugin="FFMPEG"))
        images = [image for i, image in frames if i in chosen]
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise refuse(file, f"not a video: {' '.join(str(error).split())[:120]}") from error
    if not images:
        raise refuse(file, "a video without frames")
    strip = tuple((_jpeg(image), i / FPS) for i, image in zip(chosen, images, strict=True))
    return Clip(caption, strip, _uri("video/mp4", file.read_bytes()) if embed_video else None)


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
