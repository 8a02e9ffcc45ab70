"""Success rates: the interval against published values, outcomes against the rules."""

import numpy as np
import pytest
import torch
from cfgrl_envs import QueueEnv, vec

from cfgrl_gym.algorithms import MlpPolicy
from cfgrl_gym.algorithms.evaluation import (
    EpisodeOutcome,
    Evaluation,
    evaluate,
    wilson_interval,
)
from cfgrl_gym.algorithms.flow import POSITIVE
from cfgrl_gym.algorithms.groups import Start


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_equals_published_values(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (5, 10), (10, 10), (37, 50)])
def test_the_bounds_are_the_rates_that_a_score_test_just_accepts(
    successes: int, trials: int
) -> None:
    z = 1.96
    low, high = wilson_interval(successes, trials, z)
    # |p̂ - p| = z √(p (1 - p) / n), squared: a quadratic in p
    rate = successes / trials
    roots = np.roots([1 + z**2 / trials, -2 * rate - z**2 / trials, rate**2])
    assert (low, high) == pytest.approx(sorted(roots.real), abs=1e-9)
    mirrored = wilson_interval(trials - successes, trials, z)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))
    assert 0 <= low <= rate <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes <= trials"):
        wilson_interval(successes, trials)


STARTS = [Start(task_id=task, init_state_id=state) for state in range(5) for task in (0, 2)]


def evaluation(n_envs: int, **kwargs: object) -> Evaluation:
    env = vec(QueueEnv, n_envs, chunk=3, limit=8)
    torch.manual_seed(0)
    policy = MlpPolicy(env.observation_space, env.action_space, lambda _: 1e-3, net_arch=[16])
    return evaluate(policy, env, STARTS, **kwargs)  # type: ignore[arg-type]


def test_outcomes_do_not_depend_on_the_number_of_environments() -> None:
    one = evaluation(1)
    assert [(e.task_id, e.init_state_id) for e in one.episodes] == [
        (start.task_id, start.init_state_id) for start in STARTS
    ]
    assert len({e.control_steps for e in one.episodes}) > 1  # they overtake one another
    assert 0 < one.successes < len(STARTS)
    for n_envs in (2, 3, 13):
        assert evaluation(n_envs) == one
    assert evaluation(2, seed=1) != one


def test_outcomes_agree_with_each_other_and_with_what_is_reported() -> None:
    reported: dict[int, EpisodeOutcome] = {}
    result = evaluation(2, on_outcome=reported.__setitem__)
    assert [reported[index] for index in range(len(STARTS))] == list(result.episodes)
    for episode in result.episodes:
        assert episode.success == (episode.episode_return == 1)
        assert episode.control_steps == 8 or episode.success
    assert result.success_rate == pytest.approx(np.mean([e.success for e in result.episodes]))
    assert result.interval == wilson_interval(result.successes, len(STARTS))


def test_what_is_known_is_not_run_again_and_the_rest_comes_out_alike() -> None:
    whole = evaluation(3)
    known = {index: whole.episodes[index] for index in (0, 3, 4, 9)}
    run: list[int] = []
    result = evaluation(3, known=known, on_outcome=lambda index, _: run.append(index))
    assert result == whole
    assert sorted(run) == [1, 2, 5, 6, 7, 8]
    assert evaluation(3, known=dict(enumerate(whole.episodes))) == whole


def test_the_same_start_twice_is_two_episodes() -> None:
    env = vec(QueueEnv, 2, chunk=3, limit=8)
    policy = MlpPolicy(env.observation_space, env.action_space, lambda _: 1e-3, net_arch=[16])
    one, two, three = evaluate(policy, env, [STARTS[0], STARTS[1], STARTS[0]]).episodes
    assert (one.task_id, one.init_state_id) == (three.task_id, three.init_state_id)
    assert one.guidance_gap != three.guidance_gap
    assert two.task_id == STARTS[1].task_id


def test_the_guidance_gap_is_the_distance_of_the_branches() -> None:
    class Apart(MlpPolicy):
        """v_1 is v_∅ and a hundredth of the task's number more."""

        def velocity(self, inputs, x_t, t, labels, prefix=None):  # type: ignore[no-untyped-def]
            apart = (labels == POSITIVE) * inputs["obs"][:, 0] / 100
            return -x_t + apart[:, None, None]

    env = vec(QueueEnv, 2, chunk=3, limit=8)
    policy = Apart(env.observation_space, env.action_space, lambda _: 1e-3, net_arch=[16])
    result = evaluate(policy, env, STARTS)
    gaps = [episode.guidance_gap for episode in result.episodes]
    assert gaps == pytest.approx([start.task_id / 100 for start in STARTS], abs=1e-6)  # type: ignore[operator]
    assert result.guidance_gap == pytest.approx(0.01, abs=1e-6)


def test_nothing_to_evaluate_is_refused() -> None:
    env = vec(QueueEnv)
    policy = MlpPolicy(env.observation_space, env.action_space, lambda _: 1e-3)
    with pytest.raises(ValueError, match="no starts"):
        evaluate(policy, env, [])
