"""Figures of success in the course of training."""

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from cfgrl_gym.cli.reporting.curves import Line, Panel, Point
from cfgrl_gym.cli.reporting.figures import (
    DASHES,
    drawing,
    grid,
    inline_svg,
    legend_on_top,
    percent_axis,
    time_unit,
)
from cfgrl_gym.cli.reporting.plots import SUCCESS, Palette, bars


def curve_plot(panels: Sequence[Panel], palette: Palette, name: str) -> list[Markup]:
    """Success over training episodes and over time: side by side where panels are few."""
    longest = max(
        (point.seconds for p in panels for line in p.lines for c in line.by_seed for point in c),
        default=0,
    )
    unit, length = time_unit(longest)

    def episodes(point: Point) -> float:
        return point.episodes or 0.0

    def seconds(point: Point) -> float:
        return point.seconds / length

    views: list[tuple[Callable[[Point], float], str]] = [
        (episodes, "training episodes"),
        (seconds, f"training {unit}"),
    ]
    if len(panels) <= 3:
        jobs = [[(panel, *view) for panel in panels for view in views]]
    else:
        jobs = [[(panel, *view) for panel in panels] for view in views]
    scales: list[float] = []  # that need dashes: where a panel has several
    for panel in panels:
        found = {line.cfg_scale for line in panel.lines if line.cfg_scale is not None}
        scales = sorted(found.union(scales)) if len(found) > 1 else scales
    drawn = []
    for number, job in enumerate(jobs):
        key = f"{name}{number}"
        with drawing(key):
            figure, every = grid(len(job), 2 if len(panels) <= 3 else 3, 3.0, sharey=True)
            for axes, (panel, x, label) in zip(every, job, strict=True):
                few = len(panel.lines) <= 2
                for line in panel.lines:
                    _draw_line(axes, line, x, palette, scales, band=few)
                axes.set_title(panel.title)
                axes.set_xlabel(label)
                axes.set_ylabel(SUCCESS)
                percent_axis(axes)
            handles, labels = _line_legend(panels, palette, scales)
            legend_on_top(figure, handles, labels)
            about = f"Success against {' and '.join(dict.fromkeys(j[2] for j in job))}"
            drawn.append(inline_svg(figure, key, about))
    return drawn


def _draw_line(
    axes: Axes,
    line: Line,
    x: Callable[[Point], float],
    palette: Palette,
    scales: Sequence[float],
    band: bool,
) -> None:
    """Intervals are a band, or bars where bands would cover each other."""
    colour = palette.colour(line.method)
    dash = _dash(line, scales)
    if len(line.by_seed) > 1:
        for curve in line.by_seed:
            shares = [point.rate.share for point in curve]
            axes.plot([x(p) for p in curve], shares, color=colour, lw=0.7, ls=dash, alpha=0.4)
    xs = [x(point) for point in line.pooled]
    rates = [point.rate for point in line.pooled]
    shares = [rate.share for rate in rates]
    if band and len(xs) > 1:
        low, high = zip(*(rate.interval for rate in rates), strict=True)
        axes.fill_between(xs, low, high, color=colour, alpha=0.16, lw=0)
    else:
        axes.errorbar(xs, shares, bars(rates), fmt="none", ecolor=colour, elinewidth=1, alpha=0.7)
    axes.plot(xs, shares, color=colour, ls=dash, marker=palette.marker(line.method))


def _dash(line: Line, scales: Sequence[float]) -> Any:
    if line.cfg_scale not in scales:
        return DASHES[0]
    return DASHES[scales.index(line.cfg_scale) % len(DASHES)]


def _line_legend(
    panels: Sequence[Panel], palette: Palette, scales: Sequence[float]
) -> tuple[list[Line2D], list[str]]:
    handles: dict[str, Line2D] = {}
    for line in (line for panel in panels for line in panel.lines):
        at = f", w = {line.cfg_scale:g}" if line.cfg_scale in scales else ""
        colour, marker = palette.colour(line.method), palette.marker(line.method)
        handle = Line2D([], [], color=colour, marker=marker, ls=_dash(line, scales))
        handles.setdefault(line.method.label + at, handle)
    return list(handles.values()), list(handles)
