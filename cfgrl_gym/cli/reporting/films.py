"""The videos of runs, with what is known of the recorded episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cfgrl_gym.cli.reporting.comparison import Links
from cfgrl_gym.cli.reporting.methods import Method
from cfgrl_gym.cli.reporting.runs import EvaluationRun, Run, Runs
from cfgrl_gym.cli.reporting.strips import Strip, read_strip

# What `cfgrl eval` records: the first such episode at the first cfg_scale.
_OUTCOMES = {"success": True, "failure": False}


@dataclass(frozen=True)
class Clip:
    """One video. `caption`: outcome, task, cfg_scale."""

    caption: str
    strip: Strip


@dataclass(frozen=True)
class Film:
    """The videos of one run.

    :param role: before training, after training, or empty
    :param further: another seed of the same method is shown before it
    """

    run: Run
    role: str
    clips: tuple[Clip, ...]
    further: bool


def films(
    runs: Runs, methods: Sequence[Method], links: Links, embed_videos: bool
) -> tuple[Film, ...]:
    """Before training, then method by method, then the rest.

    :raises ValueError: a video is damaged
    """
    roles: dict[Run, tuple[str, str]] = {}  # run → role, and what it is one of several of
    for evaluation in runs.evaluations:
        if links.role(evaluation) == "before":
            roles[evaluation] = "before training", evaluation.name
    for method in methods:
        for training in method.trainings:
            after: list[Run] = [run for run in links.after[training.name] if run.videos]
            for run in after or [training]:
                roles.setdefault(run, ("after training", method.label))
    for evaluation in runs.evaluations:
        roles.setdefault(evaluation, ("", evaluation.name))
    shown: set[str] = set()
    found = []
    for run, (role, group) in roles.items():
        if run.videos:
            files = sorted(run.videos, key=lambda file: [*_OUTCOMES, file.stem].index(file.stem))
            clips = tuple(Clip(_caption(run, f), read_strip(f, embed_videos)) for f in files)
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
        return f"{name}, {run.setting(first.tasks)}, w = {first.cfg_scale:g}"
    where = f"{run.suite} task {episode.task_id}, initial state {episode.init_state_id}"
    return f"{name}: {where}, w = {first.cfg_scale:g}"
