"""What the comparison's tables say, against counts worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
from comparison import TUNED_ON, Cell, cells, write
from results import read_rows
from scipy.stats import false_discovery_control
from tables import against, effort_to, holm, method_table, paired, successes


def row(
    method: str, seed: int, by_w: dict[float, list[int]], rates: tuple[float, ...] = (0.5,)
) -> dict[str, Any]:
    """Make a training's row, with the successful ones of 10 states at each w."""
    return {
        **vars(Cell(method, "as it is", "libero_object", 0, seed)),
        "iterations": [
            {
                "success_rate": rate,
                "episodes": 64 * number,
                "control_steps": 1000 * number,
                "optimizer_steps": 10 * number,
            }
            for number, rate in enumerate(rates, start=1)
        ],
        "final": [
            {
                "cfg_scale": w,
                "successes": len(states),
                "n_episodes": 10,
                "successful_states": states,
            }
            for w, states in by_w.items()
        ],
    }


def test_a_level_is_reached_by_two_iterations_in_a_row() -> None:
    training = row("CFGRL", 0, {}, (0.5, 0.9, 0.6, 0.8, 0.84, 0.95, 0.89))
    assert effort_to(training, 0.7, "episodes") == 64 * 1  # (0.5 + 0.9) / 2
    assert effort_to(training, 0.8, "control_steps") == 4000
    assert effort_to(training, 0.9, "episodes") == 64 * 6
    assert effort_to(training, 0.93, "episodes") is None


def test_pairs_are_of_the_same_training_and_state() -> None:
    mine = [row("CFGRL", 0, {1.0: [0, 1, 2, 3]}), row("CFGRL", 1, {1.0: [0, 1]})]
    other = [
        row("AdvantageWeighted", 0, {0.0: [0, 9]}),
        row("AdvantageWeighted", 1, {0.0: [1, 2, 3]}),
        row("AdvantageWeighted", 7, {0.0: list(range(10))}),  # has no partner
    ]
    difference = paired(mine, 1.0, other, 0.0)
    assert (difference.better, difference.worse, difference.trainings) == (3 + 1, 1 + 2, 2)
    assert difference.mean == pytest.approx((0.2 - 0.1) / 2)
    assert difference.interval == (pytest.approx(-0.1), pytest.approx(0.2))  # of two trainings
    assert difference.p_value == pytest.approx(1.0)  # 4 against 3
    with pytest.raises(ValueError, match="in common"):
        paired(mine, 1.0, other[2:], 0.0)
    assert successes(mine[0], 2.0) is None


def test_holm_corrects_each_p_value_for_those_that_are_not_smaller() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    smallest = [0.001, 0.2, 0.3]
    assert holm(smallest)[0] == pytest.approx(0.003)
    # Holm's is never below Benjamini and Hochberg's, which controls less.
    assert all(
        h >= b for h, b in zip(holm(smallest), false_discovery_control(smallest), strict=True)
    )


def test_methods_are_pooled_and_compared_with_the_best_control(tmp_path: Path) -> None:
    rows = [
        row("CFGRL", 0, {0.0: [0], 1.0: [0, 1, 2]}, (0.8, 0.8)),
        row("AdvantageWeighted", 0, {0.0: [0, 1]}, (0.6, 0.7)),
        row("FilteredBC", 0, {0.0: [5]}),
    ]
    table = {line["method"]: line for line in method_table(rows)}
    assert table["CFGRL"]["final"] == {"0": [1, 10], "1": [3, 10]}
    assert table["CFGRL"]["effort"]["episodes_to_80%"] == {"reached": 1, "median": 64.0}
    assert table["AdvantageWeighted"]["effort"]["episodes_to_80%"] == {"reached": 0, "median": None}
    pairs = against(rows, ("AdvantageWeighted", 0.0))
    assert [(p["method"], p["cfg_scale"]) for p in pairs] == [
        ("CFGRL", 0.0),
        ("CFGRL", 1.0),
        ("FilteredBC", 0.0),
    ]
    assert (pairs[1]["better"], pairs[1]["worse"]) == (1, 0)
    assert all(p["p_value_corrected"] >= p["p_value"] for p in pairs)
    file = tmp_path / "comparison.json"
    write(file, rows)
    assert read_rows(file, "trainings") == rows
    assert '"against_best_control"' in file.read_text()
    assert read_rows(tmp_path / "none.json", "trainings") == []


def test_the_tasks_that_are_compared_are_not_the_one_that_is_tuned_on() -> None:
    class Arguments:
        tune, methods, settings, seeds, small = False, None, None, 3, False

    compared = cells(Arguments())  # type: ignore[arg-type]
    assert TUNED_ON not in {(cell.suite, cell.task) for cell in compared}
    assert len({(cell.suite, cell.task) for cell in compared}) >= 4
    budgets = {
        (options["max_iterations"], options["n_epochs"], options["replay_iterations"])
        for cell in compared
        if (job := cell.job(Path("runs"), 16, 8).after) is not None
        for options in [job.options]
    }
    assert len(budgets) == 1  # equal optimizer steps
