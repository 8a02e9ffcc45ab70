"""The study behind the README's figures: its controls, its pooling, and that it takes up again."""

import json
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from against_start import give_reference
from cfgrl_envs import QueueEnv, vec
from controls import AdvantageWeighted, FilteredBC
from guidance_sweep import against_unguided
from gymnasium import spaces
from jobs import DONE_FILE, Job, run_jobs
from learning_curve import summary
from report_runs import make_evaluation, make_training
from report_runs import result as written
from results import result_json, results_of, training_json
from settings import training_options
from stable_baselines3.common.vec_env import DummyVecEnv

from cfgrl_gym.algorithms import CFGRL, Pi0Policy
from cfgrl_gym.algorithms.flow import NULL
from cfgrl_gym.algorithms.groups import groups_needed
from cfgrl_gym.cli.configs import EvalConfig, TrainConfig
from cfgrl_gym.cli.environments import libero_spaces
from cfgrl_gym.cli.policies import load_policy
from cfgrl_gym.cli.reporting.runs import read_training

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
    assert (model.windows.labels == NULL).all()
    wanted = np.concatenate([[c.model_actions for c in e.chunks] for e in successes])
    once = model.windows.model_actions.numpy()[: len(wanted)]
    np.testing.assert_array_equal(once, wanted)
    _, often = np.unique(model.windows.model_actions, axis=0, return_counts=True)
    assert len(often) == len(wanted)
    assert often.max() - often.min() <= 1


def test_all_methods_make_as_many_optimizer_steps() -> None:
    methods = (CFGRL, FilteredBC, AdvantageWeighted)
    assert len({collected(method, n_epochs=3)._n_updates for method in methods}) == 1


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


def result(successes: list[int], cfg_scale: float = 1.0, gap: float = 0.5) -> dict:
    """What eval.json has of task 8, the initial states in their order."""
    content = written(cfg_scale, {8: (sum(successes), len(successes))}, gap)
    for episode, success in zip(content["episodes"], successes, strict=True):
        episode["success"] = bool(success)
    return content


def test_unseen_states_are_those_that_no_training_started_from(tmp_path: Path) -> None:
    make_evaluation(tmp_path / "a", [result([1, 0, 1, 1]), result([1, 0], 2.0)])
    first, second = results_of([Job(tmp_path / "a", {})])
    content = result_json(first, [0, 1])
    assert content["successful_states"] == [0, 2, 3]
    unseen = content["unseen_states"]
    assert (unseen["successes"], unseen["n_episodes"]) == (2, 2)
    assert "unseen_states" not in result_json(first)
    assert "unseen_states" not in result_json(second, [0, 1])


def test_seeds_are_pooled_by_their_counts(tmp_path: Path) -> None:
    outcomes = []
    for seed, (start, end, final) in enumerate(
        [([0, 0], [1, 1], [0, 1]), ([1, 0], [1, 0], [0, 0])]
    ):
        evaluations = [(0, 0, 0.0, [result(start)]), (2, 10, 2.0 + seed, [result(end, gap=0.1)])]
        folder = make_training(
            tmp_path / f"a{seed}", evaluations=evaluations, seed=seed, task_id=8, init_states=[0]
        )
        # Both at the w of the curve with other noise, and at another w.
        later = [result(final, gap=0.4), result(final, 3.0)]
        make_evaluation(folder / "eval", later, policy=str(folder))
        training = read_training(folder, folder.name)
        outcomes.append((training, results_of([Job(folder / "eval", {})])))
    at_curve, at_another = summary(outcomes)
    (task,) = at_curve["tasks"]
    assert (at_curve["algorithm"], at_curve["cfg_scale"], task["task_id"]) == ("CFGRL", 1.0, 8)
    assert (task["before"]["successes"], task["before"]["n_episodes"]) == (1, 4)
    assert (task["after"]["successes"], task["after"]["n_episodes"], task["seeds"]) == (4, 8, 2)
    assert task["after"]["unseen_states"]["successes"] == 2
    assert task["after"]["guidance_gap"] == pytest.approx(0.25)
    assert at_curve["mean_over_tasks"] == 0.5
    assert at_another["cfg_scale"] == 3.0
    assert at_another["tasks"][0]["after"]["success_rate"] == pytest.approx(1 / 4)
    assert at_another["tasks"][0]["before"]["successes"] == 1


def test_a_result_file_has_every_evaluation_of_a_training(tmp_path: Path) -> None:
    rows = [{"time/iterations": 1, "train/loss": 0.5, "rollout/episodes": 10}]
    evaluations = [(0, 0, 0.0, [result([0, 1])]), (1, 10, 2.0, [result([1, 1])])]
    folder = make_training(tmp_path / "a", rows, evaluations, task_id=8, init_states=[0])
    make_evaluation(folder / "eval", [result([0, 1], 2.0)])
    training = read_training(folder, folder.name)
    content = json.loads(
        json.dumps(training_json(training, results_of([Job(folder / "eval", {})])))
    )
    assert (content["name"], content["algorithm"]) == ("a", "CFGRL")
    assert content["options"]["init_states"] == [0]
    assert content["iterations"] == rows
    times = [(e["iteration"], e["episodes"], e["seconds"]) for e in content["evaluations"]]
    assert times == [(0, 0, 0.0), (1, 10, 2.0)]
    states = [e["results"][0]["successful_states"] for e in content["evaluations"]]
    assert states == [[1], [0, 1]]
    assert [r["cfg_scale"] for r in content["final"]] == [2.0]


def test_a_scale_is_compared_with_no_guidance_pair_by_pair(tmp_path: Path) -> None:
    make_evaluation(tmp_path / "a", [result([1, 1, 0, 0, 1, 1]), result([0, 0, 1, 0, 1, 0], 0.0)])
    guided, unguided = results_of([Job(tmp_path / "a", {})])
    found = against_unguided(guided, unguided)
    assert (found["only_here"], found["only_at_w_0"]) == (3, 1)
    # Of four coins, three or more heads or tails: (1 + 4 + 4 + 1) of 16.
    assert found["p_value"] == pytest.approx(10 / 16)
    assert against_unguided(guided, guided)["p_value"] == 1.0


def test_a_study_that_was_stopped_runs_only_what_is_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, broken = (Job(tmp_path / name, {"policy": "none"}) for name in ("a", "b"))
    done.folder.mkdir()
    (done.folder / DONE_FILE).write_text(done.identity)
    (done.folder / "eval.json").write_text(json.dumps({}))
    broken.folder.mkdir()
    (broken.folder / "half").touch()
    with pytest.raises(RuntimeError, match=r"1 run\(s\) failed, see their .log files: .*/b$"):
        run_jobs([done, broken], processes=1)
    assert (done.folder / "eval.json").is_file()
    assert not (broken.folder / "half").exists()
    assert "policy folder 'none' does not exist" in (tmp_path / "b.log").read_text()
    run_jobs([done], processes=1)


def test_a_run_made_with_other_options_is_not_taken_for_done(tmp_path: Path) -> None:
    training = Job(tmp_path / "run", {"max_iterations": 2}, CFGRL)
    evaluation = Job(tmp_path / "run" / "eval", {"cfg_scale": [1.0]}, after=training)
    for job in (training, evaluation):
        job.folder.mkdir()
        (job.folder / DONE_FILE).write_text(job.identity)
    assert evaluation.done
    longer = replace(training, options={"max_iterations": 3})
    assert not longer.done
    assert not replace(evaluation, after=longer).done
    assert not replace(training, algorithm=None).done


def test_who_gives_nothing_but_a_checkpoint_gets_the_study_s_recipe() -> None:
    """Beside dynamic sampling, which the study leaves out so that budgets are equal."""
    study = training_options(8, 0, 4, 8, cfg_scale=1.0)
    env = DummyVecEnv([lambda: Spaces(*libero_spaces(112, 16, ["left_wrist_0_rgb"]))])
    algorithm = CFGRL("Pi0Policy", env, policy_kwargs={"checkpoint": "libero_tiny"}, device="cpu")
    for name in ("learning_rate", "n_epochs", "replay_iterations", "positive_share"):
        assert getattr(algorithm, name) == study[name], name
    policy = algorithm.policy
    assert isinstance(policy, Pi0Policy)
    assert policy.optimizer.param_groups[0]["lr"] == study["learning_rate"]
    assert (policy.ema_decay, policy.config.trainable) == (study["ema_decay"], study["trainable"])
    assert policy.config.condition_mode == "bias"
    assert (algorithm.cfg_scale or policy.cfg_scale) == study["cfg_scale"]
    assert algorithm.groups_per_iteration == study["groups_per_iteration"]
    command = TrainConfig(policy="libero_tiny")
    for name in ("n_epochs", "replay_iterations", "positive_share", "ema_decay"):
        assert getattr(command, name) == study[name], name
    needed = groups_needed(algorithm.groups_per_iteration, True, algorithm.early_stop_percentage)
    assert needed < algorithm.groups_per_iteration  # so that early stopping has an effect


def test_a_trained_policy_is_given_the_start_as_its_reference(tmp_path: Path) -> None:
    """At w = 0 it is then the start, at w = 1 itself, and at w = 0.5 about half way."""
    start = load_policy(EvalConfig(policy="libero_tiny", device="cpu"))
    trained = load_policy(EvalConfig(policy="libero_tiny", device="cpu"))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-4)
    trained.save_pretrained(tmp_path / "trained")
    folder = give_reference(tmp_path / "trained", "libero_tiny", tmp_path / "given")
    guided = load_policy(EvalConfig(policy=str(folder), cfg_reference="start", device="cpu"))
    space = start.observation_space
    space.seed(0)
    sample = {key: value[None] for key, value in space.sample().items()}
    noise = torch.randn(1, start.horizon, start.action_width)

    def acts(policy: Pi0Policy, w: float) -> torch.Tensor:
        return policy.act(sample, noise=noise, cfg_scale=w).model_actions

    assert torch.equal(acts(guided, 0.0), acts(start, 0.0))
    assert torch.equal(acts(guided, 1.0), acts(trained, 1.0))
    difference = acts(trained, 1.0) - acts(start, 0.0)
    assert difference.abs().max() > 1e-4
    half = acts(guided, 0.5) - acts(start, 0.0)
    torch.testing.assert_close(half, difference / 2, atol=0.1 * difference.abs().max(), rtol=0.1)


class Spaces(gym.Env):
    """An environment of which only the spaces are asked for."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space
