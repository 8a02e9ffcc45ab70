"""What `cfgrl report` counts, pools and compares, against calculations by hand."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import edit_config, make_evaluation, make_training, result

from cfgrl_gym.cli.configs import ReportConfig
from cfgrl_gym.cli.report import run


def wilson(successes: int, episodes: int) -> list[float]:
    """The rates whose distance to the observed one is 1.96 of their own standard deviations."""
    share, z2n = successes / episodes, 1.959964**2 / episodes
    low, high = sorted(np.roots([1 + z2n, -(2 * share + z2n), share**2]).real)
    return [low, high]


def report(folder: Path) -> tuple[dict[str, Any], str]:
    """The data inside the report of a folder, and the page."""
    path = run(ReportConfig(runs=str(folder), out=str(folder / "report.html")))
    page = path.read_text(encoding="utf-8")
    found = re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1]), html.unescape(page)


def one_task(cfg_scale: float, successes: int, episodes: int, **more: Any) -> dict[str, Any]:
    return result(cfg_scale, {0: (successes, episodes)}, **more)


def test_success_is_pooled_over_seeds_and_compared_with_the_start(tmp_path: Path) -> None:
    for seed, successes in enumerate((30, 40, 35)):
        training = make_training(tmp_path / f"a{seed}", seed=seed)
        make_evaluation(training / "eval", [one_task(1.0, successes, 50)], policy=f"runs/a{seed}")
    make_evaluation(tmp_path / "start", [one_task(1.0, 10, 50)], policy="./runs/sft/policy/")
    make_evaluation(tmp_path / "stranger", [one_task(1.0, 50, 50)], policy="runs/other")
    data, page = report(tmp_path)
    (row,) = data["comparisons"]
    assert (row["after"]["successes"], row["after"]["n_episodes"]) == (105, 150)
    assert row["after"]["policies"] == 3
    assert row["after"]["interval_95"] == pytest.approx(wilson(105, 150), abs=1e-6)
    assert (row["before"]["successes"], row["before"]["n_episodes"]) == (10, 50)
    assert row["before"]["interval_95"] == pytest.approx(wilson(10, 50), abs=1e-6)
    assert row["before"]["sources"] == ["start"]
    assert wilson(10, 50)[1] < wilson(105, 150)[0]
    assert row["after_against_before"] == "higher"
    assert "the two 95% intervals don't overlap" in " ".join(page.split())


@pytest.mark.parametrize(
    ("after", "said"), [(2, "lower"), (14, "not distinguishable at 95%"), (28, "higher")]
)
def test_only_intervals_apart_are_called_different(after: int, said: str, tmp_path: Path) -> None:
    apart = wilson(after, 30)[0] > wilson(13, 30)[1] or wilson(after, 30)[1] < wilson(13, 30)[0]
    assert apart == (said != "not distinguishable at 95%")
    training = make_training(tmp_path / "a")
    make_evaluation(training / "eval", [one_task(1.0, after, 30)], policy="runs/a")
    make_evaluation(tmp_path / "start", [one_task(1.0, 13, 30)])
    data, page = report(tmp_path)
    assert data["comparisons"][0]["after_against_before"] == said
    assert (f'<div class="word {said}"' in page) == apart


def test_other_suites_tasks_and_scales_are_not_compared(tmp_path: Path) -> None:
    training = make_training(tmp_path / "a")
    make_evaluation(training / "eval", [one_task(1.5, 9, 10)], policy="runs/a")
    make_evaluation(tmp_path / "suite", [one_task(1.5, 1, 10)], suite="libero_goal")
    make_evaluation(tmp_path / "task", [result(1.5, {1: (1, 10)})])
    make_evaluation(tmp_path / "scale", [one_task(1.0, 1, 10)])
    data, page = report(tmp_path)
    settings = [(row["suite"], row["tasks"], row["cfg_scale"]) for row in data["comparisons"]]
    assert settings == [("libero_object", [0], 1.0), ("libero_object", [0], 1.5)]
    assert {row["after_against_before"] for row in data["comparisons"]} == {None}
    assert "Not measured" not in page  # there is a before, at another cfg_scale


def test_seeds_and_folders_make_no_method_and_options_do(tmp_path: Path) -> None:
    for seed in range(2):
        make_training(tmp_path / f"a{seed}", seed=seed, video=bool(seed), save_every=seed or None)
    make_training(tmp_path / "b", seed=0, dropout_prob=0.0)
    make_training(tmp_path / "c", seed=0, algorithm="FilteredBC", learning_rate=1e-5)
    make_training(tmp_path / "old", seed=2, algorithm=None)
    edit_config(tmp_path / "old", label_threshold=..., use_prefix_dropout=...)
    data, page = report(tmp_path)
    methods = {m["method"]: m for m in data["methods"]}
    assert set(methods) == {"CFGRL", "CFGRL, dropout_prob 0", "FilteredBC, learning_rate 1e-05"}
    assert methods["CFGRL"]["baseline"]
    assert methods["CFGRL"]["seeds"] == [0, 1, 2]
    assert methods["CFGRL"]["trainings"] == ["a0", "a1", "old"]
    assert [m["baseline"] for m in data["methods"]] == [True, False, False]
    assert "dropout_prob 0.1 → 0<" in page
    assert "algorithm CFGRL → FilteredBC; learning_rate null → 1e-05<" in page


def test_a_run_from_before_an_option_did_what_it_did_then(tmp_path: Path) -> None:
    make_training(tmp_path / "a")
    edit_config(tmp_path / "a", replay_iterations=..., positive_share=..., ema_decay=...)
    make_training(tmp_path / "b", replay_iterations=0, positive_share=None, ema_decay=None)
    make_training(tmp_path / "c")
    data, _ = report(tmp_path)
    assert sorted(m["trainings"] for m in data["methods"]) == [["a", "b"], ["c"]]


@pytest.mark.parametrize(("seeds", "expected"), [(1, ["b"]), (2, ["a0", "a1"])])
def test_the_baseline_is_the_most_common_method_or_else_most_like_the_others(
    seeds: int, expected: list[str], tmp_path: Path
) -> None:
    for seed in range(seeds):
        make_training(tmp_path / f"a{seed}", dropout_prob=0.0, seed=seed)
    make_training(tmp_path / "b")
    make_training(tmp_path / "c", n_epochs=8)
    data, _ = report(tmp_path)
    (baseline,) = [m for m in data["methods"] if m["baseline"]]
    assert baseline["trainings"] == expected


def test_methods_are_compared_with_the_baseline_and_come_after_it(tmp_path: Path) -> None:
    studied: list[tuple[str, int, dict[str, Any]]] = [
        ("a0", 20, {"seed": 0}),
        ("a1", 20, {"seed": 1}),
        ("b", 21, {"n_epochs": 8}),
        ("c", 45, {"dropout_prob": 0.0}),
    ]
    for name, successes, options in studied:
        training = make_training(tmp_path / name, **options)
        make_evaluation(training / "eval", [one_task(1.0, successes, 50)], policy=f"runs/{name}")
    assert wilson(45, 50)[0] > wilson(40, 100)[1] > wilson(21, 50)[0]
    data, _ = report(tmp_path)
    found = [(row["method"], row["after_against_baseline"]) for row in data["comparisons"]]
    assert found == [
        ("CFGRL", None),
        ("CFGRL, dropout_prob 0", "higher"),
        ("CFGRL, n_epochs 8", "not distinguishable at 95%"),
    ]


@pytest.mark.parametrize(("noises", "episodes"), [((0, 0, 0), 10), ((0, 1, 2), 30)])
def test_a_start_that_was_measured_again_counts_once(
    noises: tuple[int, ...], episodes: int, tmp_path: Path
) -> None:
    for seed, noise in enumerate(noises):
        start = (0, 0, 0.0, [one_task(1.0, 4, 10, noise=noise)])
        end = (5 + seed, 100, 60.0, [one_task(1.0, 5, 10)])
        make_training(tmp_path / f"a{seed}", evaluations=[start, end], seed=seed)
    data, _ = report(tmp_path)
    (row,) = data["comparisons"]
    assert row["before"]["n_episodes"] == episodes
    assert row["after"]["n_episodes"] == 30  # different policies, whatever their episodes
    (curve,) = data["learning_curves"]
    assert [p["n_episodes"] for p in curve["pooled"]] == [episodes, 30]


def test_evaluations_with_other_noise_are_pooled_and_other_guidance_is_another_setting(
    tmp_path: Path,
) -> None:
    folder = str(make_training(tmp_path / "a"))
    scales = [(1.0, 4, 0.25), (2.0, 6, 0.25), (3.0, 5, 0.5)]
    for seed in (7, 8):
        results = [one_task(w, s + seed - 7, 10, noise=seed, gap=gap) for w, s, gap in scales]
        make_evaluation(tmp_path / f"e{seed}", results, policy=folder, seed=seed)
    # A part of what is there already, as the seed says.
    make_evaluation(tmp_path / "again", [one_task(2.0, 1, 5)], policy=folder, seed=8)
    action = [one_task(2.0, 1, 10)]
    make_evaluation(tmp_path / "action", action, policy=folder, seed=7, guidance="action")
    data, page = report(tmp_path)
    counted = {
        (row["guidance"], row["cfg_scale"]): (row["after"]["successes"], row["after"]["n_episodes"])
        for row in data["comparisons"]
    }
    assert list(counted.items()) == [
        (("velocity", 1.0), (9, 20)),
        (("velocity", 2.0), (13, 20)),
        (("velocity", 3.0), (11, 20)),
        (("action", 2.0), (1, 10)),
    ]
    assert [row["after"]["policies"] for row in data["comparisons"]] == [1, 1, 1, 1]
    (sweep,) = data["guidance_sweeps"]
    assert [point["n_episodes"] for point in sweep["points"]] == [20, 20, 20]
    assert [point["guidance_gap"] for point in sweep["points"]] == [0.25, 0.25, 0.5]
    assert "libero_object task 0, guidance action" in page


def test_of_several_evaluations_of_a_policy_the_largest_counts(tmp_path: Path) -> None:
    last = (3, 100, 60.0, [one_task(1.0, 1, 90)])
    training = make_training(tmp_path / "a", evaluations=[(0, 0, 0.0, [one_task(1.0, 1, 9)]), last])
    make_evaluation(training / "eval", [one_task(1.0, 7, 20)], policy="runs/a")
    make_evaluation(tmp_path / "elsewhere", [one_task(1.0, 20, 50)], policy=f"{training}/policy")
    data, _ = report(tmp_path)
    assert data["comparisons"][0]["after"]["n_episodes"] == 50
    assert data["comparisons"][0]["after"]["sources"] == ["elsewhere"]


def test_curves_pool_shared_iterations_and_the_last(tmp_path: Path) -> None:
    for seed, (last, successes) in enumerate([(12, 6), (14, 9)]):
        points = [(0, 2), (5, 3), (10, 4), (last, successes)]
        evaluations = [
            (i, 30 * i + seed, 10.0 * i, [one_task(1.0, s, 10, noise=seed)]) for i, s in points
        ]
        if seed:
            evaluations.insert(3, (13, 391, 130.0, [one_task(1.0, 10, 10)]))
        make_training(tmp_path / f"a{seed}", evaluations=evaluations, seed=seed)
    data, _ = report(tmp_path)
    (curve,) = data["learning_curves"]
    assert curve["measured"] == "evaluated"
    assert [p["successes"] for p in curve["pooled"]] == [4, 6, 8, 15]
    assert [p["training_seconds"] for p in curve["pooled"]] == [0, 50, 100, 130]
    assert curve["pooled"][-1]["training_episodes"] == (360 + 421) / 2
    assert curve["pooled"][-1]["interval_95"] == pytest.approx(wilson(15, 20), abs=1e-6)
    assert list(map(len, curve["by_training"])) == [4, 5]


def test_every_task_has_its_curve_and_all_together(tmp_path: Path) -> None:
    tasks = {0: (1, 10), 3: (7, 10)}
    make_training(tmp_path / "a", evaluations=[(4, 50, 9.0, [result(1.0, tasks)])], task_id=[0, 3])
    data, page = report(tmp_path)
    counts = {tuple(c["tasks"]): c["pooled"][0]["successes"] for c in data["learning_curves"]}
    assert counts == {(0,): 1, (3,): 7, (0, 3): 8}
    assert "libero_object tasks 0, 3" in page


def test_without_evaluations_training_episodes_are_counted(tmp_path: Path) -> None:
    shares, episodes = [0.5, 0.25, 1.0], [10, 18, 20]
    rows = [
        {
            "rollout/episodes": total,
            "rollout/iteration_success_rate": share,
            "time/time_elapsed": 60 * (i + 1),
        }
        for i, (share, total) in enumerate(zip(shares, episodes, strict=True))
    ]
    make_training(tmp_path / "a", rows, task_id=4)
    make_training(tmp_path / "older", [{"rollout/success_rate": 0.5}], task_id=5)
    data, page = report(tmp_path)
    (curve,) = data["learning_curves"]
    assert curve["tasks"] == [4]
    counts = [(p["successes"], p["n_episodes"]) for p in curve["pooled"]]
    assert counts == [(5, 10), (2, 8), (2, 2)]
    assert "No learning curve: older" in page


def test_the_sweep_marks_the_highest_success(tmp_path: Path) -> None:
    counts = {1.0: 30, 1.5: 40, 2.0: 40, 4.0: 5}
    for seed in range(2):
        training = make_training(tmp_path / f"a{seed}", seed=seed)
        results = [one_task(w, n, 50, gap=w + seed) for w, n in counts.items()]
        make_evaluation(training / "eval", results, policy=f"runs/a{seed}")
    make_evaluation(tmp_path / "two", [one_task(1.0, 1, 9), one_task(2.0, 1, 9)], policy="other")
    data, page = report(tmp_path)
    (sweep,) = data["guidance_sweeps"]
    assert sweep["highest"] == 1.5  # and not 2, which is as high
    assert [p["successes"] for p in sweep["points"]] == [60, 80, 80, 10]
    assert [p["guidance_gap"] for p in sweep["points"]] == [1.5, 2.0, 2.5, 4.5]
    close = [w for w, n in counts.items() if wilson(2 * n, 100)[1] > wilson(80, 100)[0]]
    assert close == [1.5, 2.0]
    text = " ".join(page.split())
    assert "The highest, w = 1.5, is not distinguishable at 95% from w = 2." in text
    assert "intervals don't overlap with w = 1, 4." in text


@pytest.mark.parametrize(
    ("asked", "dropped", "inside"), [(0.1, 110, True), (0.1, 150, False), (0.0, 0, True)]
)
def test_dropped_conditions_are_held_against_dropout_prob(
    asked: float, dropped: int, inside: bool, tmp_path: Path
) -> None:
    low, high = wilson(dropped, 1000)
    assert (low - 1e-9 <= asked <= high + 1e-9) == inside
    rows = [
        {"train/dropout_count": dropped - 7 * bool(dropped), "train/conditioned_count": 400},
        {},  # an iteration whose update was skipped
        {"train/dropout_count": 7 * bool(dropped), "train/conditioned_count": 600},
    ]
    make_training(tmp_path / "a", rows, dropout_prob=asked)
    data, page = report(tmp_path)
    (check,) = data["checks"]
    assert (check["dropped"]["count"], check["dropped"]["of"]) == (dropped, 1000)
    assert check["dropped"]["interval_95"] == pytest.approx([low, high], abs=1e-6)
    assert check["dropped"]["holds_dropout_prob"] == inside
    assert ("<td>inside</td>" in page) == inside


def test_logs_are_summed_up(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "train/loss": loss,
            "rollout/groups_kept": 4,
            "rollout/groups_discarded": discarded,
            "time/seconds_simulation": 10,
            "time/seconds_inference": 3,
            "time/seconds_update": update,
        }
        for loss, discarded, update in [("", 6, ""), (0.5, 1, 7), (0.25, 0, 8), ("nan", 2, 1)]
    ]
    make_training(tmp_path / "a0", rows[:3], seed=0)
    make_training(tmp_path / "a1", rows, seed=1)
    data, page = report(tmp_path)
    first, second = data["checks"]
    assert first["loss"] == [0.5, 0.25]
    assert second["loss"] == [0.5, None]  # JSON has no NaN; the page says it
    assert "0.5 → nan" in page
    assert (second["groups_kept"], second["groups_discarded"]) == (16, 9)
    (spent,) = data["seconds"]
    assert (spent["simulation"], spent["inference"], spent["update"]) == (35, 10.5, 15.5)
    assert spent["runs"] == 2


def test_what_could_mislead_is_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        training = make_training(tmp_path / name, seed=7)
        make_evaluation(training / "eval", [one_task(1.0, 1, 9)], policy=f"runs/{name}")
        edit_config(training / "eval", max_episode_steps=100)
    make_evaluation(tmp_path / "start", [one_task(1.0, 1, 9)])
    make_training(tmp_path / "unfinished", rows=[])
    data, _ = report(tmp_path)
    notes = " ".join(data["notes"])
    assert "several trainings with seed 7" in notes
    assert "start has max_episode_steps null, a/eval has 100" in notes
    assert "unfinished: a training without a finished iteration" in notes
