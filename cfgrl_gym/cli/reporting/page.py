"""Renders the report as one self-contained HTML page; page.html.j2 has its text and tables."""

import json
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from cfgrl_gym._version import __version__
from cfgrl_gym.cli.reporting.comparison import against_baseline, best_scales, highlights
from cfgrl_gym.cli.reporting.content import Report, as_json
from cfgrl_gym.cli.reporting.figures import inline_svg
from cfgrl_gym.cli.reporting.methods import value_text, varied_options
from cfgrl_gym.cli.reporting.plots import (
    Palette,
    comparison_plot,
    curve_plot,
    log_plot,
    sweep_plot,
    time_plot,
)
from cfgrl_gym.cli.reporting.rates import count, percent

GENERATOR = "cfgrl report"
MARK = f'<meta name="generator" content="{GENERATOR}">'  # by which a report is known again
_HERE = Path(__file__).parent


def render(report: Report) -> str:
    """Render the report as one HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, count=count, value=value_text)
    comparisons = report.comparisons
    return environment.get_template("page.html.j2").render(
        report=report,
        mark=Markup(MARK),
        version=__version__,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        highlights=highlights(comparisons),
        scales=best_scales(comparisons),
        options=varied_options(report.methods),
        rows={m.label: [r for r in comparisons if r.method is m] for m in report.methods},
        settings={row.setting for row in comparisons},
        against_baseline=lambda row: against_baseline(row, comparisons),
        plots=_plots(report),
        every_run=[*report.runs.trainings, *report.runs.evaluations],
        as_yaml=lambda content: yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
        data=_embedded(as_json(report)),
    )


def _plots(report: Report) -> dict[str, Any]:
    palette = Palette(report.methods)
    settings = dict.fromkeys(row.setting for row in report.comparisons)
    by_setting = [[r for r in report.comparisons if r.setting == setting] for setting in settings]
    log = log_plot(report.methods, palette)
    return {
        "comparisons": [
            (rows[0].setting, inline_svg(comparison_plot(rows, palette), f"c{number}"))
            for number, rows in enumerate(by_setting)
        ],
        "curves": [
            inline_svg(figure, f"l{number}")
            for number, figure in enumerate(curve_plot(report.panels, palette))
        ],
        "sweeps": [
            (sweep, inline_svg(sweep_plot(sweep, palette), f"w{number}"))
            for number, sweep in enumerate(report.sweeps)
        ],
        "time": inline_svg(time_plot(report.times), "t") if report.times else None,
        "log": inline_svg(log, "g") if log else None,
    }


def _embedded(content: Any) -> Markup:
    """Return JSON for a script element, which only `</` and `<!--` could end."""
    text = json.dumps(content, default=str)
    # JSON can't express the infinite loss of a training that diverged: null.
    content = json.loads(text, parse_constant=lambda name: None)
    return Markup(json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"))
