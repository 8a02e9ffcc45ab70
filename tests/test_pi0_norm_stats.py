"""norm_stats.json: openpi's format in and out, and its errors at the door."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfgrl_gym.wrappers.norm_stats import Moments, NormStats


def content(state: int = 8, actions: int = 7, padding: int = 0) -> dict[str, Any]:
    zeros = [0.0] * padding
    return {
        "norm_stats": {
            "state": {"mean": [0.5] * state + zeros, "std": [1.5] * state + zeros},
            "actions": {
                "mean": list(map(float, range(actions))) + zeros,
                "std": [0.5] * actions + zeros,
                "q01": [-1.0] * actions + zeros,
                "q99": [1.0] * actions + zeros,
            },
        }
    }


def write(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "norm_stats.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


@pytest.mark.filterwarnings("error")
def test_loads_openpis_format_and_cuts_its_padding(tmp_path: Path) -> None:
    stats = NormStats.load(write(tmp_path, content(padding=24)))
    assert stats.state == Moments((0.5,) * 8, (1.5,) * 8)
    assert stats.actions.mean == (0, 1, 2, 3, 4, 5, 6)
    assert stats.actions.q99 == (1.0,) * 7
    assert NormStats.load(tmp_path) == stats  # the folder will do


def test_save_and_load_are_inverse(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stats = NormStats.compute(rng.normal(size=(50, 8)), rng.normal(size=(50, 4, 7)))
    stats.save(tmp_path / "stats.json")
    assert NormStats.load(tmp_path / "stats.json") == stats


def test_compute_matches_numpy_and_floors_the_deviation() -> None:
    rng = np.random.default_rng(0)
    states, actions = rng.normal(2, 3, (500, 8)), rng.normal(size=(500, 7))
    states[:, 4] = 0.25
    stats = NormStats.compute(states, actions, std_floor=0.05)
    np.testing.assert_allclose(stats.state.mean, states.mean(0))
    np.testing.assert_allclose(stats.actions.std, actions.std(0))
    assert stats.state.std[4] == 0.05
    assert stats.state.q01 is not None
    assert stats.state.q01[4] == 0.25


def test_missing_file_says_where_to_find_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give the path of openpi's"):
        NormStats.load(tmp_path / "none.json")


def _broken(part: str, key: str, value: Any) -> dict[str, Any]:
    data = content()
    if value is None:
        del data["norm_stats"][part][key]
    else:
        data["norm_stats"][part][key] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"norm_stats": ', "is not JSON"),
        ([1, 2], "holds a list, not an object"),
        ({"state": {}}, "has no 'norm_stats' \\(it has \\['state'\\]\\)"),
        ({"norm_stats": {"state": content()["norm_stats"]["state"]}}, "has no 'actions'"),
        (_broken("state", "std", None), "state has no 'std'"),
        (content(state=7), "state.mean has 7 numbers; expected at least 8"),
        (_broken("actions", "std", [0.1] * 6), "actions.std has 6 numbers; expected at least 7"),
        (_broken("actions", "std", [-0.1] * 7), "std must not be negative"),
        (_broken("state", "mean", [float("nan")] * 8), "mean must be finite"),
        (_broken("state", "std", [float("inf")] * 8), "std must be finite"),
        (_broken("state", "mean", ["a"] * 8), "must be a list of numbers"),
        (_broken("state", "mean", 3.0), "must be a list of numbers"),
        (_broken("state", "std", [0.0] * 8), r"state: std is 0 in all 8 dim.*compute it again"),
        (_broken("actions", "std", [0.0] * 7), r"actions: std is 0 in all 7 dimensions"),
        (_broken("actions", "std", [0.0] * 7 + [1.0]), r"actions: std is 0 in all 7 dimensions"),
        (_broken("actions", "std", [float("nan")] * 7), "actions: std must be finite"),
        (_broken("actions", "q01", [1.5] * 7), r"actions: q01 .* exceeds q99"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, data: Any, message: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(ValueError, match=message) as error:
        NormStats.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("part", "size"), [("state", 8), ("actions", 7)])
def test_dimensions_that_never_changed_are_warned_of(part: str, size: int, tmp_path: Path) -> None:
    path = write(tmp_path, _broken(part, "std", [0.0, 1e-9, *[1.0] * (size - 2)]))
    said = rf"{path}.*: {part}: std is 0 in dimensions \[0, 1\].*std_floor"
    with pytest.warns(UserWarning, match=said):
        stats = NormStats.load(path)
    assert getattr(stats, part).std[:3] == (0, 1e-9, 1)
    arrays = {"state": np.eye(9)[:, :8], "actions": np.eye(9)[:, :7]}
    arrays[part][:, 2] = 0.5
    with pytest.warns(UserWarning, match=r"std is 0 in dimensions \[2\]"):
        NormStats.compute(arrays["state"], arrays["actions"])


def test_statistics_of_another_robot_are_warned_of(tmp_path: Path) -> None:
    path = write(tmp_path, content(state=14, actions=7))
    with pytest.warns(UserWarning, match=rf"{path}.*: state has 14 numbers.*another robot"):
        NormStats.load(path)


def test_bad_arrays_are_refused() -> None:
    good = np.eye(9)[:, :8], np.eye(9)[:, :7]
    for states, actions, message in (
        (good[0][:, :7], good[1], "states has shape"),
        (good[0], np.zeros((0, 7)), "N of at least 1"),
        (good[0], np.full((3, 7), np.nan), "NaN"),
        (good[0], np.ones((3, 7)), "actions: std is 0 in all 7 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            NormStats.compute(states, actions)
    with pytest.raises(ValueError, match="std_floor"):
        NormStats.compute(*good, std_floor=-1)
    with pytest.raises(ValueError, match="state statistics have 7 numbers; expected 8"):
        NormStats(Moments((0.0,) * 7, (1.0,) * 7), Moments((0.0,) * 7, (1.0,) * 7))
