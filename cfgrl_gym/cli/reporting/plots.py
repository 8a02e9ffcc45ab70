"""Draws the figures of a report: success, learning curves, sweeps, time, and the logs."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cfgrl_gym.cli.reporting.comparison import Comparison, Sweep
from cfgrl_gym.cli.reporting.curves import Line, Panel, Point
from cfgrl_gym.cli.reporting.figures import (
    DASHES,
    INK,
    MARKERS,
    PALETTE,
    PAPER,
    STYLE,
    grid,
    legend_on_top,
    percent_axis,
    time_unit,
)
from cfgrl_gym.cli.reporting.methods import Method
from cfgrl_gym.cli.reporting.rates import Rate
from cfgrl_gym.cli.reporting.times import PARTS, TimeSpent

SUCCESS = "success"
# of the parts, and of the text on them
_PART_COLOURS = (("#0072b2", "#ffffff"), ("#56b4e9", "#111111"), ("#e69f00", "#111111"))
LOGGED = (
    ("train/loss", "loss"),
    ("train/grad_norm", "gradient norm"),
    ("train/guidance_gap", "guidance gap ‖v₁ − v∅‖"),
    ("rollout/positive_share", "share of windows labelled positive"),
    ("train/dropout_rate", "share of conditions dropped"),
    ("rollout/groups_discarded", "groups discarded so far"),
)
SUMMED = ("rollout/groups_discarded",)
WIDEST_SWEEP = 5.0  # the highest cfg_scale on a linear axis


class Palette:
    """Assigns each method a colour and a marker, the same in all figures."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self._numbers = {method: number for number, method in enumerate(methods)}

    def colour(self, method: Method | None) -> str:
        """Return the method's colour, or ink for a line that belongs to no method."""
        return INK if method is None else PALETTE[self._numbers[method] % len(PALETTE)]

    def marker(self, method: Method) -> str:
        return MARKERS[self._numbers[method] % len(MARKERS)]


def bars(rates: Sequence[Rate]) -> list[list[float]]:
    """Return error bars that reach down and up to the ends of the intervals."""
    below = [max(0.0, rate.share - rate.interval[0]) for rate in rates]
    return [below, [max(0.0, rate.interval[1] - rate.share) for rate in rates]]


@mpl.rc_context(STYLE)
def comparison_plot(rows: Sequence[Comparison], palette: Palette) -> Figure:
    """Draw before and after with their intervals, a line for each method and cfg_scale."""
    places: list[float] = []
    for number, row in enumerate(rows):
        apart = number and row.method is not rows[number - 1].method
        places.append((places[-1] if places else 1) - (1.6 if apart else 1))
    figure, (axes,) = grid(1, 1, 0.7 - 0.3 * places[-1])
    for place, row in zip(places, rows, strict=True):
        colour = palette.colour(row.method)
        for result, shift, fill in ((row.before, 0.16, PAPER), (row.after, -0.16, colour)):
            if result is not None:
                axes.errorbar(
                    [result.rate.share],
                    [place + shift],
                    xerr=bars([result.rate]),
                    fmt=palette.marker(row.method),
                    color=colour,
                    mfc=fill,
                    capsize=2.5,
                    elinewidth=1.4,
                )
    axes.set_yticks(places, [f"{row.method.label}, w = {row.cfg_scale:g}" for row in rows])
    axes.set_ylim(places[-1] - 0.6, 0.6)
    axes.yaxis.grid(False)
    axes.tick_params(axis="y", length=0)
    percent_axis(axes, "x")
    axes.set_xlabel(f"{SUCCESS}, with 95% interval")
    labels = {"before training": PAPER, "after training": INK}
    handles = [Line2D([], [], ls="", marker="o", color=INK, mfc=fill) for fill in labels.values()]
    legend_on_top(figure, handles, list(labels))
    figure.set_label(f"Success before and after training on {rows[0].setting}, with 95% intervals")
    return figure


@mpl.rc_context(STYLE)
def curve_plot(panels: Sequence[Panel], palette: Palette) -> list[Figure]:
    """Draw success over training episodes and over time, side by side where panels are few."""
    if not panels:
        return []
    points = [p for panel in panels for line in panel.lines for seed in line.by_seed for p in seed]
    unit, length = time_unit(max((point.seconds for point in points), default=0))
    views = ["training episodes", f"training {unit}"]
    few = len(panels) <= 3
    if few:
        jobs = [[(panel, view) for panel in panels for view in views]]
    else:
        jobs = [[(panel, view) for panel in panels] for view in views]
    scales: list[float] = []  # that need dashes: where a panel has several
    for panel in panels:
        found = {line.cfg_scale for line in panel.lines if line.cfg_scale is not None}
        scales = sorted(found.union(scales)) if len(found) > 1 else scales

    def times(points: Iterable[Point], view: str) -> list[float]:
        return [p.episodes if view == views[0] else p.seconds / length for p in points]

    figures = []
    for job in jobs:
        figure, every = grid(len(job), 2 if few else 3, 3.0, sharey=True)
        handles: dict[str, Line2D] = {}
        for axes, (panel, view) in zip(every, job, strict=True):
            for line in panel.lines:
                look: dict[str, Any] = {"color": palette.colour(line.method), "ls": DASHES[0]}
                label, marker = line.method.label, palette.marker(line.method)
                if line.cfg_scale in scales:
                    look["ls"] = DASHES[scales.index(line.cfg_scale) % len(DASHES)]
                    label += f", w = {line.cfg_scale:g}"
                for seed in line.by_seed if len(line.by_seed) > 1 else ():
                    shares = [point.rate.share for point in seed]
                    axes.plot(times(seed, view), shares, lw=0.7, alpha=0.4, **look)
                xs = times(line.pooled, view)
                _draw_intervals(axes, xs, line, look["color"], band=len(panel.lines) <= 2)
                axes.plot(xs, [p.rate.share for p in line.pooled], marker=marker, **look)
                handles.setdefault(label, Line2D([], [], marker=marker, **look))
            axes.set_title(panel.title)
            axes.set_xlabel(view)
            axes.set_ylabel(SUCCESS)
            percent_axis(axes)
        legend_on_top(figure, list(handles.values()), list(handles))
        figure.set_label(f"Success against {' and '.join(dict.fromkeys(v for _, v in job))}")
        figures.append(figure)
    return figures


def _draw_intervals(axes: Axes, xs: list[float], line: Line, colour: str, band: bool) -> None:
    """Draw a band, or bars if bands would cover each other."""
    rates = [point.rate for point in line.pooled]
    if band and len(xs) > 1:
        low, high = zip(*(rate.interval for rate in rates), strict=True)
        axes.fill_between(xs, low, high, color=colour, alpha=0.16, lw=0)
    else:
        shares = [rate.share for rate in rates]
        axes.errorbar(xs, shares, bars(rates), fmt="none", ecolor=colour, elinewidth=1, alpha=0.7)


@mpl.rc_context(STYLE)
def sweep_plot(sweep: Sweep, palette: Palette) -> Figure:
    """Draw success over cfg_scale above the guidance gap, on one axis."""
    colour = palette.colour(sweep.method)
    scales = [point.cfg_scale for point in sweep.points]
    rates = [point.rate for point in sweep.points]
    gaps = [(p.cfg_scale, p.guidance_gap) for p in sweep.points if p.guidance_gap is not None]
    ratios = [1.7, 1] if gaps else [1]
    figure, every = grid(len(ratios), 1, 1.0, sharex=True, height_ratios=ratios)
    figure.set_size_inches(5.4, 4.3 if gaps else 2.9)
    top, bottom = every[0], every[-1]
    wide = max(scales) > WIDEST_SWEEP
    if wide:  # small scales need room; of them only whole ones have a tick
        top.set_xscale("symlog", linthresh=1)
    for results in sweep.by_run if len(sweep.by_run) > 1 else ():
        xs = [result.cfg_scale for result in results]
        top.plot(xs, [r.rate.share for r in results], color=colour, lw=0.8, alpha=0.45)
    top.errorbar(
        scales, [r.share for r in rates], bars(rates), color=colour, marker="o", capsize=2.5
    )
    best = sweep.best
    top.plot([best.cfg_scale], [best.rate.share], "o", ms=13, mfc="none", mec=INK, mew=1.3)
    place = (best.cfg_scale - min(scales)) / (max(scales) - min(scales) or 1)
    top.annotate(
        f"highest: w = {best.cfg_scale:g}",
        (best.cfg_scale, best.rate.interval[1]),
        xytext=(0, 5),
        textcoords="offset points",
        ha="left" if place < 0.25 else "right" if place > 0.75 else "center",
    )
    percent_axis(top)
    top.set_ylabel(SUCCESS)
    if gaps:
        bottom.plot(*zip(*gaps, strict=True), color=colour, marker="s")
        bottom.set_ylim(0, 1.2 * max(gap for _, gap in gaps) or 1)
        bottom.set_ylabel("guidance gap")
    bottom.set_xlabel("cfg_scale w")
    ticks = [w for w in scales if w.is_integer()] if wide else scales
    bottom.set_xticks(ticks, [f"{w:g}" for w in ticks])
    bottom.minorticks_off()
    figure.set_label(f"{sweep.title}: success and guidance gap over cfg_scale")
    return figure


@mpl.rc_context(STYLE)
def time_plot(spent: Sequence[TimeSpent]) -> Figure:
    """Draw each method's time as a bar in parts."""
    longest = max(one.total for one in spent)
    unit, length = time_unit(longest)
    figure, (axes,) = grid(1, 1, 0.6 + 0.42 * len(spent))
    for place, one in enumerate(spent):
        left = 0.0
        for part, seconds, (colour, text) in zip(PARTS, one.seconds, _PART_COLOURS, strict=True):
            axes.barh(-place, seconds / length, 0.62, left / length, color=colour, label=part)
            if seconds > 0.07 * longest:
                share = f"{seconds / one.total:.0%}"
                middle = (left + seconds / 2) / length
                axes.text(middle, -place, share, ha="center", va="center", color=text)
            left += seconds
    labels = [f"{s.method.label} ({s.runs} run{'s' * (s.runs > 1)})" for s in spent]
    axes.set_yticks([-place for place in range(len(spent))], labels)
    axes.tick_params(axis="y", length=0)
    axes.yaxis.grid(False)
    axes.set_xlabel(f"{unit} of a training, mean over its runs")
    legend_on_top(figure, [Patch(color=colour) for colour, _ in _PART_COLOURS], PARTS)
    figure.set_label("Time of a training in simulation, inference and update")
    return figure


@mpl.rc_context(STYLE)
def log_plot(methods: Sequence[Method], palette: Palette) -> Figure | None:
    """Draw what the logs hold, iteration by iteration, a thin line for each training."""
    trainings = [(method, training) for method in methods for training in method.trainings]
    shown = [
        (column, label)
        for column, label in LOGGED
        if any(training.column(column) for _, training in trainings)
    ]
    if not shown:
        return None
    figure, every = grid(len(shown), 3, 2.0)
    for axes, (column, label) in zip(every, shown, strict=True):
        for method, training in trainings:
            ys = training.column(column)
            xs = [
                row.get("time/iterations", number)
                for number, row in enumerate(training.rows, start=1)
                if column in row
            ]
            if column in SUMMED:
                ys = list(accumulate(ys))
            mark = palette.marker(method) if len(xs) == 1 else None
            axes.plot(xs, ys, color=palette.colour(method), lw=1.1, alpha=0.8, marker=mark)
        axes.set_title(label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for axes in every[-3:]:
        axes.set_xlabel("iteration")
    handles = [Line2D([], [], color=palette.colour(method)) for method in methods]
    legend_on_top(figure, handles, [method.label for method in methods])
    figure.set_label("Loss, gradient norm, guidance gap and labels by iteration")
    return figure
