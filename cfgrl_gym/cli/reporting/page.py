"""The report as one HTML page that needs no other file."""

import json
import math
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from cfgrl_gym._version import __version__
from cfgrl_gym.cli.reporting.comparison import Comparison
from cfgrl_gym.cli.reporting.content import Report, as_json, training_episodes
from cfgrl_gym.cli.reporting.curve_plots import curve_plot
from cfgrl_gym.cli.reporting.figures import INK
from cfgrl_gym.cli.reporting.log_plots import log_plot, time_plot
from cfgrl_gym.cli.reporting.methods import value_text, varied_options
from cfgrl_gym.cli.reporting.plots import Palette, comparison_plot, sweep_plot
from cfgrl_gym.cli.reporting.runs import Setting
from cfgrl_gym.cli.reporting.summary import (
    against_baseline,
    best_scales,
    count,
    counts_text,
    highlights,
    percent,
    rate_text,
)

GENERATOR = "cfgrl report"
MARK = f'<meta name="generator" content="{GENERATOR}">'  # by which a report is known again
_HERE = Path(__file__).parent


def render(report: Report) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        count=count,
        rate=rate_text,
        counts=counts_text,
        value=value_text,
        episodes=training_episodes,
    )
    palette = Palette(report.methods)
    comparisons = report.comparisons
    return environment.get_template("page.html.j2").render(
        report=report,
        mark=Markup(MARK),
        version=__version__,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        highlights=highlights(comparisons),
        scales=best_scales(comparisons),
        options=[n for n in varied_options(report.methods) if n != "algorithm"],
        rows={m.label: [r for r in comparisons if r.method is m] for m in report.methods},
        settings=list(dict.fromkeys(row.setting for row in comparisons)),
        against_baseline=lambda row: against_baseline(row, comparisons),
        plots=_plots(report, palette),
        every_run=[*report.runs.trainings, *report.runs.evaluations],
        as_yaml=lambda content: yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
        data=_embedded(as_json(report)),
    )


def _plots(report: Report, palette: Palette) -> dict[str, Any]:
    by_setting: dict[Setting, list[Comparison]] = {}
    for row in report.comparisons:
        by_setting.setdefault(row.setting, []).append(row)
    colours = {f"{m.label} (after training)": palette.colour(m) for m in report.methods}
    return {
        "comparisons": [
            (setting, comparison_plot(members, palette, f"c{number}", str(setting)))
            for number, (setting, members) in enumerate(by_setting.items())
        ],
        "curves": curve_plot(report.panels, palette, "l") if report.panels else [],
        "sweeps": [
            (sweep, sweep_plot(sweep, colours.get(sweep.title, INK), f"w{i}"))
            for i, sweep in enumerate(report.sweeps)
        ],
        "time": time_plot(report.times, "t") if report.times else None,
        "log": log_plot(report.methods, palette, "g"),
    }


def _embedded(content: Any) -> Markup:
    """JSON inside a script element, which only `</` and `<!--` could end."""
    text = json.dumps(_finite(content), ensure_ascii=False, default=str, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _finite(content: Any) -> Any:
    """JSON has no word for the loss of a training that diverged: null."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
