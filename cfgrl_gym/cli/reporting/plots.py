"""Figures of evaluations: before and after, and over cfg_scale."""

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.lines import Line2D

from cfgrl_gym.cli.reporting.comparison import Comparison
from cfgrl_gym.cli.reporting.figures import (
    INK,
    MARKERS,
    PALETTE,
    PAPER,
    drawing,
    grid,
    inline_svg,
    legend_on_top,
    percent_axis,
)
from cfgrl_gym.cli.reporting.methods import Method
from cfgrl_gym.cli.reporting.rates import Rate
from cfgrl_gym.cli.reporting.sweeps import Sweep

SUCCESS = "success"


class Palette:
    """The colour and marker of each method, the same in all figures."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self._numbers = {id(method): number for number, method in enumerate(methods)}

    def colour(self, method: Method) -> str:
        return PALETTE[self._numbers[id(method)] % len(PALETTE)]

    def marker(self, method: Method) -> str:
        return MARKERS[self._numbers[id(method)] % len(MARKERS)]


def bars(rates: Sequence[Rate]) -> list[list[float]]:
    """Error bars down to and up to the ends of the intervals."""
    below = [max(0.0, rate.share - rate.interval[0]) for rate in rates]
    return [below, [max(0.0, rate.interval[1] - rate.share) for rate in rates]]


def comparison_plot(
    rows: Sequence[Comparison], palette: Palette, name: str, setting: str
) -> Markup:
    """Before and after with their intervals, a line for each method and cfg_scale."""
    places: list[float] = []
    for number, row in enumerate(rows):
        apart = number and row.method is not rows[number - 1].method
        places.append((places[-1] if places else 1) - (1.6 if apart else 1))
    with drawing(name):
        figure, (axes,) = grid(1, 1, 0.7 - 0.3 * places[-1])
        for place, row in zip(places, rows, strict=True):
            colour = palette.colour(row.method)
            for pooled, shift, fill in ((row.before, 0.16, PAPER), (row.after, -0.16, colour)):
                if pooled is not None:
                    axes.errorbar(
                        [pooled.rate.share],
                        [place + shift],
                        xerr=bars([pooled.rate]),
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
        handles = [
            Line2D([], [], ls="", marker="o", color=INK, mfc=fill, label=label)
            for fill, label in ((PAPER, "before training"), (INK, "after training"))
        ]
        legend_on_top(figure, handles, ["before training", "after training"])
        about = f"Success before and after training on {setting}, with 95% intervals"
        return inline_svg(figure, name, about)


def sweep_plot(sweep: Sweep, colour: str, name: str) -> Markup:
    """Success over cfg_scale above the guidance gap, on one axis."""
    scales = [point.cfg_scale for point in sweep.points]
    rates = [point.pooled.rate for point in sweep.points]
    gaps = [(p.cfg_scale, p.gap) for p in sweep.points if p.gap is not None]
    with drawing(name):
        ratios = [1.7, 1] if gaps else [1]
        figure, every = grid(len(ratios), 1, 1.0, sharex=True, height_ratios=ratios)
        figure.set_size_inches(5.4, 4.3 if gaps else 2.9)
        top, bottom = every[0], every[-1]
        for results in sweep.by_run if len(sweep.by_run) > 1 else ():
            xs = [result.cfg_scale for result in results]
            top.plot(xs, [r.rate.share for r in results], color=colour, lw=0.8, alpha=0.45)
        shares = [rate.share for rate in rates]
        top.errorbar(scales, shares, bars(rates), color=colour, marker="o", capsize=2.5)
        best = sweep.best
        top.plot(
            [best.cfg_scale],
            [best.pooled.rate.share],
            "o",
            ms=13,
            mfc="none",
            mec=INK,
            mew=1.3,
        )
        top.annotate(
            f"highest: w = {best.cfg_scale:g}",
            (best.cfg_scale, best.pooled.rate.interval[1]),
            xytext=(0, 5),
            textcoords="offset points",
            ha=_side(best.cfg_scale, scales),
        )
        percent_axis(top)
        top.set_ylabel(SUCCESS)
        if gaps:
            bottom.plot(*zip(*gaps, strict=True), color=colour, marker="s")
            bottom.margins(y=0.15)
            bottom.set_ylim(bottom=0)
            bottom.set_ylabel("guidance gap")
        bottom.set_xlabel("cfg_scale w")
        bottom.set_xticks(scales, [f"{w:g}" for w in scales])
        return inline_svg(figure, name, f"{sweep.title}: success and guidance gap over cfg_scale")


def _side(value: float, values: Sequence[float]) -> str:
    place = (value - min(values)) / (max(values) - min(values) or 1)
    return "left" if place < 0.25 else "right" if place > 0.75 else "center"
