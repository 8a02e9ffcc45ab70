"""Figures of the trainings' logs: where the time goes, and losses by iteration."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

from markupsafe import Markup
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cfgrl_gym.cli.reporting.checks import PARTS, TimeSpent
from cfgrl_gym.cli.reporting.figures import (
    drawing,
    grid,
    inline_svg,
    legend_on_top,
    time_unit,
    whole_numbers,
)
from cfgrl_gym.cli.reporting.methods import Method
from cfgrl_gym.cli.reporting.plots import Palette

# of the parts, and of the text on them
_COLOURS = (("#0072b2", "#ffffff"), ("#56b4e9", "#111111"), ("#e69f00", "#111111"))
LOGGED = (
    ("train/loss", "loss"),
    ("train/grad_norm", "gradient norm"),
    ("train/guidance_gap", "guidance gap ‖v₁ − v∅‖"),
    ("rollout/positive_share", "share of windows labelled positive"),
    ("train/dropout_rate", "share of conditions dropped"),
    ("rollout/groups_discarded", "groups discarded so far"),
)

SUMMED = ("rollout/groups_discarded",)


def time_plot(spent: Sequence[TimeSpent], name: str) -> Markup:
    """A bar for each method, in parts."""
    unit, length = time_unit(max(one.total for one in spent))
    with drawing(name):
        figure, (axes,) = grid(1, 1, 0.6 + 0.42 * len(spent))
        for place, one in enumerate(spent):
            left = 0.0
            for part, seconds, (colour, text) in zip(PARTS, one.seconds, _COLOURS, strict=True):
                axes.barh(-place, seconds / length, 0.62, left / length, color=colour, label=part)
                if seconds > 0.07 * max(s.total for s in spent):
                    share = f"{seconds / one.total:.0%}"
                    middle = (left + seconds / 2) / length
                    axes.text(middle, -place, share, ha="center", va="center", color=text)
                left += seconds
        axes.set_yticks([-place for place in range(len(spent))])
        runs = [f"{s.method.label} ({s.runs} run{'s' * (s.runs > 1)})" for s in spent]
        axes.set_yticklabels(runs)
        axes.tick_params(axis="y", length=0)
        axes.yaxis.grid(False)
        axes.set_xlabel(f"{unit} of a training, mean over its runs")
        handles = [Patch(color=colour) for colour, _ in _COLOURS]
        legend_on_top(figure, handles, PARTS)
        return inline_svg(figure, name, "Time of a training in simulation, inference and update")


def log_plot(methods: Sequence[Method], palette: Palette, name: str) -> Markup | None:
    """What the logs hold, iteration by iteration, a thin line for each training."""
    shown = [
        (column, label)
        for column, label in LOGGED
        if any(t.column(column) for method in methods for t in method.trainings)
    ]
    if not shown:
        return None
    with drawing(name):
        figure, every = grid(len(shown), 3, 2.0)
        for axes, (column, label) in zip(every, shown, strict=True):
            for method in methods:
                for training in method.trainings:
                    xs, ys = _over_iterations(training.rows, column)
                    if column in SUMMED:
                        ys = list(accumulate(ys))
                    mark = palette.marker(method) if len(xs) == 1 else None
                    axes.plot(xs, ys, color=palette.colour(method), lw=1.1, alpha=0.8, marker=mark)
            axes.set_title(label)
            axes.set_ylim(bottom=0)
            whole_numbers(axes)
        for axes in every[-3:]:
            axes.set_xlabel("iteration")
        handles = [Line2D([], [], color=palette.colour(method)) for method in methods]
        legend_on_top(figure, handles, [method.label for method in methods])
        return inline_svg(figure, name, "Loss, gradient norm, guidance gap and labels by iteration")


def _over_iterations(
    rows: Iterable[dict[str, float]], column: str
) -> tuple[list[float], list[float]]:
    pairs = [
        (row.get("time/iterations", number), row[column])
        for number, row in enumerate(rows, start=1)
        if column in row
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]
