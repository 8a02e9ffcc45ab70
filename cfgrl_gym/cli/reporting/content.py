"""Collects the contents of a report, before they become a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cfgrl_gym.cli.reporting.comparison import (
    Comparison,
    Links,
    Sweep,
    against_baseline,
    compare,
    link,
    protocol_notes,
    sweeps,
)
from cfgrl_gym.cli.reporting.curves import Panel, learning_curves, without_curve
from cfgrl_gym.cli.reporting.films import Film, films
from cfgrl_gym.cli.reporting.methods import Method, group_methods, repeated_seeds
from cfgrl_gym.cli.reporting.runs import Runs
from cfgrl_gym.cli.reporting.times import PARTS, TimeSpent, time_spent


@dataclass(frozen=True)
class Report:
    """Holds what `page.render` shows and `as_json` returns."""

    title: str
    created: datetime
    runs: Runs
    links: Links
    methods: tuple[Method, ...]
    comparisons: tuple[Comparison, ...]
    panels: tuple[Panel, ...]
    sweeps: tuple[Sweep, ...]
    times: tuple[TimeSpent, ...]
    films: tuple[Film, ...]
    notes: tuple[str, ...]


def collect(runs: Runs, title: str, embed_videos: bool) -> Report:
    """Group and compare the runs, and read their videos.

    :raises ValueError: a video is damaged
    """
    links = link(runs)
    methods = group_methods(runs.trainings)
    rows = {method: compare(method, links) for method in methods}

    def rank(method: Method) -> tuple[bool, float]:
        shares = [row.after.rate.share for row in rows[method] if row.after is not None]
        return not method.is_baseline, -max(shares, default=-1.0)

    methods.sort(key=rank)
    comparisons = [row for method in methods for row in rows[method]]
    return Report(
        title=title,
        created=datetime.now().astimezone(),
        runs=runs,
        links=links,
        methods=tuple(methods),
        comparisons=tuple(comparisons),
        panels=tuple(learning_curves(methods)),
        sweeps=tuple(sweeps(comparisons, runs.evaluations, links)),
        times=tuple(time_spent(methods)),
        films=films(runs, methods, links, embed_videos),
        notes=tuple(_notes(runs, methods, links)),
    )


def _notes(runs: Runs, methods: Sequence[Method], links: Links) -> list[str]:
    notes = [f"Left out: {text}." for text in runs.left_out]
    for method in methods:
        for seed in repeated_seeds(method):
            notes.append(
                f"{method.label} has several trainings with seed {seed}. They may repeat each "
                "other; their episodes are counted as if they were independent."
            )
        for text in protocol_notes(method, links):
            notes.append(f"Not measured in the same way before and after training: {text}.")
    missing = without_curve(methods)
    if missing:
        notes.append(
            f"No learning curve: {', '.join(missing)} (no evaluations, and a log of an older "
            "version, which doesn't count episodes)."
        )
    return list(dict.fromkeys(notes))


# For machines -----------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Return the numbers of the report, with counts and sources."""
    return {
        "title": report.title,
        "created": report.created.isoformat(timespec="seconds"),
        "methods": [
            {
                "method": method.label,
                "baseline": method.is_baseline,
                "changes": [
                    {"option": name, "baseline": old, "value": new}
                    for name, old, new in method.changes
                ],
                "options": method.options,
                "trainings": [training.name for training in method.trainings],
                "seeds": [training.seed for training in method.trainings],
                "training_episodes": [t.episodes for t in method.trainings],
            }
            for method in report.methods
        ],
        "comparisons": [
            {
                "method": row.method.label,
                **row.setting.as_json(),
                "cfg_scale": row.cfg_scale,
                "before": row.before and row.before.as_json(),
                "after": row.after and row.after.as_json(),
                "after_against_before": row.verdict,
                "after_against_baseline": against_baseline(row, report.comparisons),
                "by_training": {
                    training.name: {
                        "successes": result.rate.successes,
                        "n_episodes": result.rate.episodes,
                        "guidance_gap": result.guidance_gap,
                    }
                    for training, result in row.by_seed
                },
            }
            for row in report.comparisons
        ],
        "learning_curves": [
            {
                **panel.setting.as_json(),
                "measured": panel.kind,
                "method": line.method.label,
                "cfg_scale": line.cfg_scale,
                "pooled": [point.as_json() for point in line.pooled],
                "by_training": [[point.as_json() for point in seed] for seed in line.by_seed],
            }
            for panel in report.panels
            for line in panel.lines
        ],
        "guidance_sweeps": [
            {
                "title": sweep.title,
                **sweep.best.setting.as_json(),
                "highest": sweep.best.cfg_scale,
                "points": [
                    {"cfg_scale": p.cfg_scale, "guidance_gap": p.guidance_gap, **p.as_json()}
                    for p in sweep.points
                ],
            }
            for sweep in report.sweeps
        ],
        "seconds": [
            {"method": one.method.label, "runs": one.runs}
            | dict(zip(PARTS, one.seconds, strict=True))
            for one in report.times
        ],
        "checks": [
            {
                "training": training.name,
                "iterations": len(training.rows),
                "loss": training.ends("train/loss"),
                "dropout_prob": training.config.get("dropout_prob"),
                "dropped": training.dropped
                and {
                    "count": training.dropped.successes,
                    "of": training.dropped.episodes,
                    "interval_95": list(training.dropped.interval),
                    "holds_dropout_prob": training.dropped_as_asked,
                },
                "groups_kept": training.total("rollout/groups_kept"),
                "groups_discarded": training.total("rollout/groups_discarded"),
                "grad_norm": training.ends("train/grad_norm"),
            }
            for method in report.methods
            for training in method.trainings
            if training.rows
        ],
        "notes": list(report.notes),
    }
