"""Defines the style of all figures, and writes them as SVG in a page or as pictures.

Inside a page they have the page's own colours, light or dark.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's colours; black is the page's ink. Yellow, hard to see on white, comes last.
INK, PAPER = "#010203", "#fcfdfe"  # replaced by the page's
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#f0e442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
WIDTH = 10.0  # inches, at 72 points
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may have dollar signs
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
    "axes.titlecolor": INK,
    "grid.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as a picture with a white background."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, dpi=110, facecolor="white")


def inline_svg(figure: Figure, name: str) -> Markup:
    """Render the figure as an <svg> element; screen readers read its label.

    :param name: unique in the page; keeps the figure's ids the same every time
    """
    buffer = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    opening, rest = text.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', opening)
    assert box is not None
    # Ids are unique in a figure, but a page has several.
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r"url\(#", f"url(#{name}-", rest)
    rest = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', rest)
    rest = rest.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    rest = re.sub(r"('[^';\"]*'|[\w -]+)(, *('[^']*'|[\w-]+))*, *sans-serif", "sans-serif", rest)
    label = Markup.escape(figure.get_label())
    return Markup(f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">') + Markup(rest)


def grid(count: int, columns: int, height: float, **arguments: Any) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` panels, `height` inches each."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **arguments).ravel()
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, list(axes[:count])


def percent_axis(axes: Axes, which: str = "y") -> None:
    """Scale an axis from 0 to 100%."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    (axes.set_ylim if which == "y" else axes.set_xlim)(-0.02, 1.02)
    axis.set_ticks([0, 0.25, 0.5, 0.75, 1.0])


def legend_on_top(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put a legend above all panels, in as many columns as fit."""
    if not handles:
        return
    widest = max(map(len, labels)) + 7
    columns = max(1, min(len(labels), int(125 // widest)))
    rows = -(-len(labels) // columns)
    # The panels keep the height that they were made for, except for one row.
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        borderaxespad=0,
        handlelength=2.6,
        columnspacing=1.6,
    )


def time_unit(longest: float) -> tuple[str, float]:
    """Choose a unit that suits this many seconds, and return its name and its length in seconds."""
    if longest >= 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest >= 300 else ("seconds", 1.0)
