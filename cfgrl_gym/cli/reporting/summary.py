"""The report in a few plain sentences, each with its counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cfgrl_gym.cli.reporting.comparison import Comparison, best
from cfgrl_gym.cli.reporting.rates import UNDECIDED, Pooled, Rate, verdict
from cfgrl_gym.cli.reporting.runs import Setting


def percent(share: float, episodes: int = 0) -> str:
    """Without decimals that the number of episodes doesn't support."""
    return f"{share:.1%}" if episodes > 200 else f"{share:.0%}"


def count(number: int, noun: str) -> str:
    """1 seed, 2 seeds."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"


def rate_text(rate: Rate) -> str:
    """62% (93 of 150, 95% interval 54% to 69%)."""
    return f"{percent(rate.share, rate.episodes)} ({counts_text(rate)})"


def counts_text(rate: Rate) -> str:
    """93 of 150, 95% interval 54% to 69%."""
    low, high = (percent(end, rate.episodes) for end in rate.interval)
    return f"{rate.successes} of {rate.episodes}, 95% interval {low} to {high}"


@dataclass(frozen=True)
class Highlight:
    """The best before and the best after in one setting.

    :param before: of the method that was best afterwards; None where nothing was evaluated before
    :param compared: how many methods and scales the best afterwards was picked from
    :param compared_before: how many scales the best before was picked from
    """

    setting: Setting
    before: Comparison | None
    after: Comparison
    compared: int
    compared_before: int

    @property
    def before_pooled(self) -> Pooled | None:
        return None if self.before is None else self.before.before

    @property
    def after_pooled(self) -> Pooled:
        assert self.after.after is not None
        return self.after.after

    @property
    def verdict(self) -> str | None:
        """Of after against before."""
        if self.before_pooled is None:
            return None
        return verdict(self.before_pooled.rate, self.after_pooled.rate)

    @property
    def sentence(self) -> str:
        """What may be said of the two."""
        if self.verdict is None:
            return "Nothing was evaluated before training, so there is no change to speak of."
        if self.verdict == UNDECIDED:
            return "Not distinguishable at 95%: the two intervals overlap."
        return f"Success is {self.verdict} after training: the two 95% intervals don't overlap."


def highlights(comparisons: Sequence[Comparison]) -> list[Highlight]:
    """One for each setting that was evaluated after a training."""
    found = []
    for setting in dict.fromkeys(row.setting for row in comparisons):
        rows = [row for row in comparisons if row.setting == setting]
        top = best(rows, "after")
        if top is None:
            continue
        mine = [row for row in rows if row.method is top[0].method and row.before is not None]
        start = best(mine, "before")
        compared = sum(row.after is not None for row in rows)
        found.append(Highlight(setting, start[0] if start else None, top[0], compared, len(mine)))
    return found


def against_baseline(row: Comparison, comparisons: Sequence[Comparison]) -> str | None:
    """How the method did afterwards compared with the baseline at the same cfg_scale."""
    if row.method.is_baseline or row.after is None:
        return None
    for other in comparisons:
        same = other.setting == row.setting and other.cfg_scale == row.cfg_scale
        if same and other.method.is_baseline and other.after is not None:
            return verdict(other.after.rate, row.after.rate)
    return None


def best_scales(comparisons: Sequence[Comparison]) -> list[str]:
    """For each method and setting with several scales: the one with the highest success."""
    sentences = []
    groups: dict[tuple[int, Setting], list[Comparison]] = {}
    for row in comparisons:
        if row.after is not None:
            groups.setdefault((id(row.method), row.setting), []).append(row)
    settings = {setting for _, setting in groups}
    for (_, setting), rows in groups.items():
        top = best(rows, "after")
        if len(rows) < 2 or top is None:
            continue
        row, rate = top
        others = [r for r in rows if r is not row and r.after is not None]
        close: list[Any] = [
            f"{r.cfg_scale:g}"
            for r in others
            if r.after is not None and verdict(rate, r.after.rate) == UNDECIDED
        ]
        where = f" on {setting}" if len(settings) > 1 else ""
        said = f"{row.method.label}{where}: highest at w = {row.cfg_scale:g}, {rate_text(rate)}"
        if close:
            said += f"; not distinguishable at 95% from w = {', '.join(close)}"
        if len(close) < len(others):
            apart = [f"{r.cfg_scale:g}" for r in others if f"{r.cfg_scale:g}" not in close]
            said += f"; intervals don't overlap with w = {', '.join(apart)}"
        sentences.append(said + ".")
    return sentences
