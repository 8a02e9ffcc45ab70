"""The study behind the README's figures: its controls, its pooling, and that it takes up again."""

import json
from pathlib import Path

import numpy as np
import pytest
import study_runs
from cfgrl_envs import QueueEnv, vec
from controls import AdvantageWeighted, FilteredBC
from study_results import curve, pool, rate, short_result
from study_runs import EvaluationOf, run_jobs

from cfgrl_gym.algorithms import CFGRL
from cfgrl_gym.algorithms.flow import NULL

SMALL = {
    "rloo_batch_size": 4,
    "groups_per_iteration": 6,
    "enable_dynamic_sampling": False,
    "cfg_scale": 0.0,
    "policy_kwargs": {"net_arch": [16]},
    "seed": 3,
    "device": "cpu",
}


class Kept(CFGRL):
    """Keeps the groups that it labels."""

    groups: list = []  # noqa: RUF012

    def label(self, groups):
        self.groups = groups
        return super().label(groups)


class KeptFilteredBC(Kept, FilteredBC):
    pass


def collected(algorithm: type[CFGRL], **kwargs) -> CFGRL:
    return algorithm("MlpPolicy", vec(QueueEnv, 2, chunk=3), **{**SMALL, **kwargs}).learn(1)


def test_filtered_bc_learns_from_successes_alone_and_without_a_condition() -> None:
    model = collected(KeptFilteredBC)
    successes = [e for group in model.groups for e in group if e.succeeded]
    assert 0 < len(successes) < 24
    assert len(model.windows) == sum(len(e.chunks) for e in successes)
    assert (model.windows.labels == NULL).all()
    wanted = np.concatenate([[c.model_actions for c in e.chunks] for e in successes])
    np.testing.assert_array_equal(model.windows.model_actions.numpy(), wanted)


def test_the_controls_collect_what_cfgrl_collects_at_the_same_guidance() -> None:
    kept = collected(Kept)
    returns = [[e.total_reward for e in group] for group in kept.groups]
    filtered = collected(KeptFilteredBC)
    assert [[e.total_reward for e in group] for group in filtered.groups] == returns


def test_advantage_weights_are_how_often_a_window_is_drawn(monkeypatch) -> None:
    kept, epochs = collected(Kept), 400
    monkeypatch.setattr(CFGRL, "train", lambda self: None)
    model = collected(AdvantageWeighted, n_epochs=epochs)
    # Independently: A = K/(K-1)·(R - group mean), weight e^(A/β), share of all draws.
    expected = {}
    for group in kept.groups:
        returns = np.array([e.total_reward for e in group])
        for episode, advantage in zip(group, 4 / 3 * (returns - returns.mean()), strict=True):
            for chunk in episode.chunks:
                expected[chunk.model_actions.tobytes()] = min(np.exp(advantage / 0.3), 20.0)
    total = sum(expected.values())
    drawn = [row.numpy().tobytes() for row in model.windows.model_actions]
    assert len(drawn) == epochs * len(expected)
    assert (model.windows.labels == NULL).all()
    for key, weight in expected.items():
        share = weight / total
        sigma = np.sqrt(share * (1 - share) / len(drawn))
        assert abs(drawn.count(key) / len(drawn) - share) < 5 * sigma


def test_advantage_weighted_passes_once_over_what_was_drawn() -> None:
    model = collected(AdvantageWeighted, n_epochs=3, batch_size=8)
    assert model._n_updates == int(np.ceil(len(model.windows) / 8))
    assert model.n_epochs == 3


def result(successes: list[int], cfg_scale: float = 1.0) -> dict:
    episodes = [{"init_state_id": i, "success": bool(s)} for i, s in enumerate(successes)]
    return {"cfg_scale": cfg_scale, "tasks": {}, "episodes": episodes, "guidance_gap": 0.5} | rate(
        sum(successes), len(successes)
    )


def test_unseen_states_are_those_that_no_training_started_from() -> None:
    short = short_result(result([1, 0, 1, 1]), {"init_states": [0, 1]})
    assert short["successful_states"] == [0, 2, 3]
    assert (short["unseen_states"]["successes"], short["unseen_states"]["n_episodes"]) == (2, 2)
    assert "unseen_states" not in short_result(result([1, 0]), {"init_states": "benchmark"})


def test_seeds_are_pooled_by_their_counts() -> None:
    options = {"task_id": 8, "init_states": [0]}
    runs = [
        {
            "algorithm": "CFGRL",
            "options": options,
            "evaluations": [
                {"iteration": i, "episodes": 10 * i, "seconds": seconds, "results": [r]}
                for i, r in enumerate([short_result(result(s), options) for s in both])
            ],
        }
        for seconds, both in ((2.0, ([0, 0], [1, 1])), (4.0, ([1, 0], [1, 0])))
    ]
    first, last = curve(runs, "CFGRL", 8, 1.0)
    assert (first["successes"], last["successes"], last["n_episodes"]) == (1, 3, 4)
    assert (last["episodes"], last["seconds"], last["seeds"]) == (10, 3.0, 2)
    assert last["unseen_states"]["successes"] == 1
    assert curve(runs, "CFGRL", 0, 1.0) == curve(runs, "CFGRL", 8, 2.0) == []
    assert pool([result([1, 1, 0])])["success_rate"] == pytest.approx(2 / 3)


def test_a_study_that_was_stopped_runs_only_what_is_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, broken = (EvaluationOf(tmp_path / name, {"policy": "none"}) for name in ("a", "b"))
    done.folder.mkdir()
    (done.folder / study_runs.DONE_FILE).touch()
    (done.folder / "eval.json").write_text(json.dumps({}))
    broken.folder.mkdir()
    (broken.folder / "half").touch()
    with pytest.raises(RuntimeError, match=r"1 run\(s\) failed, see their .log files: b"):
        run_jobs([done, broken], processes=1)
    assert (done.folder / "eval.json").is_file()
    assert not (broken.folder / "half").exists()
    assert "policy folder 'none' does not exist" in (tmp_path / "b.log").read_text()
    run_jobs([done], processes=1)
