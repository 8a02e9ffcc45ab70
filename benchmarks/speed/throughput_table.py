"""The table of `env_throughput.py`: medians of what was measured, ratios, goals."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from timing_common import MEMORY_ENVS, SIDES


class Values(dict[str, list[dict[str, Any]]]):
    """What the processes printed, for each kind of measurement a list of its repetitions."""

    def series(self, key: str, *names: str) -> list[float]:
        """All repetitions of one value."""
        found: list[Any] = list(self[key])
        for name in names:
            found = [value[name] for value in found]
        return found


def ladder() -> list[tuple[str, tuple[object, ...]]]:
    """Key and arguments of the measurements with one environment and with several."""
    rungs: list[tuple[str, tuple[object, ...]]] = [
        (f"chunks {n} threads", ("chunks", "here", "--n-envs", n)) for n in (1, 2, 4, 8)
    ]
    processes = ("chunks", "here", "--n-envs", 2, "--workers", "processes")
    rungs.insert(2, ("chunks 2 processes", processes))
    rungs += [(f"free steps {n} threads", ("free_steps", "here", "--n-envs", n)) for n in (1, 2)]
    return rungs


@dataclass
class Row:
    """A line of the table: medians, and how many times better the second is."""

    what: str
    unit: str
    other: float | None
    here: float | None
    ratio: float | None
    goal: str = ""
    met: bool | None = None

    @classmethod
    def quicker(
        cls,
        what: str,
        unit: str,
        other: list[float] | None,
        here: list[float],
        at_least: float | None = None,
    ) -> "Row":
        """Of quantities of which less is better."""
        mine, theirs = median(here), median(other) if other else None
        ratio = theirs / mine if theirs is not None else None
        if at_least is None or ratio is None:
            return cls(what, unit, theirs, mine, ratio)
        return cls(what, unit, theirs, mine, ratio, f">= {at_least:g}x", ratio >= at_least)


def rows(values: Values) -> list[Row]:
    series = values.series

    def pair(what: str, unit: str, name: str, *path: str, goal: float | None = None) -> Row:
        other, here = (series(f"{name}/{side}", *path) for side in SIDES)
        return Row.quicker(what, unit, other, here, goal)

    table = [pair("50-step chunk, both images at its end", "s", "chunk", "chunk_s", goal=20)]
    for kind, name in (("free", "random actions"), ("contact", "random, pushing down")):
        table += [
            pair(f"control step with observation, {name}", "ms", "steps", kind, "step_ms", goal=4),
            Row.quicker(
                "  without observation", "ms", None, series("steps/here", kind, "advance_ms")
            ),
            Row.quicker(
                "  of this, physics alone",
                "ms",
                None,
                series("steps/here", kind, "physics_floor_ms"),
            ),
        ]
        share = median(series("steps/here", kind, "share_outside"))
        table.append(
            Row("  share outside the physics", "", None, share, None, "< 1/3", share < 1 / 3)
        )
    table += [
        pair("reset and 20 settle steps", "s", "reset", "reset_s", goal=10),
        Row.quicker(
            "  LIBERO rendering at the end only",
            "s",
            series("reset/libero", "reset_seeing_the_end_s"),
            series("reset/here", "reset_s"),
        ),
        pair("construction to first observation", "s", "construct", "first_observation_s", goal=3),
        pair("  of another one in the same process", "s", "construct", "second_observation_s"),
        pair("  imports before that", "s", "construct", "imports_s"),
        Row.quicker(
            "  with an empty model cache",
            "s",
            series("construct/libero", "first_observation_s"),
            series("construct cold/here", "first_observation_s"),
        ),
    ]
    for workers, goal in (("threads", 4.0), ("processes", None)):
        what = f"memory of {MEMORY_ENVS} environments, {workers}"
        sizes: list[list[float]] = []
        for key in ("memory/libero", f"memory {workers}/here"):
            held = values[key][0]
            sizes.append([held["pss_mib"] * MEMORY_ENVS / held["environments"]])
            if held["environments"] < MEMORY_ENVS:
                what += f" ({key.partition('/')[2]}: {held['environments']} measured, scaled)"
        table.append(Row.quicker(what, "MiB", sizes[0], sizes[1], goal))
    for what, key, name in (
        ("chunks a second, 2 environments to 1", "chunks {} threads", "chunks_per_s"),
        ("  rendering held to one core each", "chunks {} threads, one core", "chunks_per_s"),
        ("control steps a second, 2 environments to 1", "free steps {} threads", "steps_per_s"),
    ):
        one, two = (median(series(key.format(n), name)) for n in (1, 2))
        table.append(Row(what, "1/s", None, two, two / one, ">= 1.8x", two / one >= 1.8))
    for camera in ("agentview", "robot0_eye_in_hand"):
        table.append(pair(f"image of {camera}", "ms", "chunk", "image_ms", camera))
    return table


def lerobot_rows(values: Values) -> list[Row]:
    series, table = values.series, []
    for key, name in (("lerobot", "hard resets"), ("lerobot soft", "soft resets")):
        for what, other, here in (
            ("50 steps with images", "chunk_s", "chunk/here"),
            ("reset and 20 settle steps", "reset_s", "reset/here"),
            ("construction to first observation", "first_observation_s", "construct/here"),
        ):
            row = Row.quicker(f"{what}, {name}", "s", series(key, other), series(here, other))
            table.append(row)
    return table


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def print_table(title: str, head: list[str], lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    print(f"\n{title}")
    for line in (head, ["-" * width for width in widths], *lines):
        cells = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print(" | ".join(cells).rstrip())


def print_rows(title: str, other: str, table: list[Row]) -> None:
    met = {True: "yes", False: "NO", None: ""}
    lines = [
        [
            f"{row.what} ({row.unit})" if row.unit else row.what,
            number(row.other),
            number(row.here),
            "-" if row.ratio is None else f"{row.ratio:.2f}x",
            row.goal,
            met[row.met],
        ]
        for row in table
    ]
    print_table(title, ["what", other, "here", "ratio", "goal", "met"], lines)


def scaling(values: Values) -> list[dict[str, Any]]:
    """Each rung of the ladder: its rate, that to one environment's, and the processor time."""
    table = []
    for key, arguments in ladder():
        name = "chunks_per_s" if arguments[0] == "chunks" else "steps_per_s"
        first = "chunks 1 threads" if arguments[0] == "chunks" else "free steps 1 threads"
        for suffix in ("", ", one core"):
            if key + suffix not in values:
                continue
            rate = median(values.series(key + suffix, name))
            table.append(
                {
                    "what": key + suffix,
                    "per_s": rate,
                    "to_one": rate / median(values.series(first + suffix, name)),
                    "cpu_per_wall": median(values.series(key + suffix, "cpu_per_wall")),
                }
            )
    return table
