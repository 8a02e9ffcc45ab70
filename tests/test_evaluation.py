"""Success rates: the interval against published values, outcomes against the rules."""

import numpy as np
import pytest
import torch
from cfgrl_envs import QueueEnv, vec

from cfgrl_gym.algorithms import MlpPolicy
from cfgrl_gym.algorithms.evaluation import Evaluation, evaluate, wilson_interval
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
    calls: list[tuple[int, int]] = []
    result = evaluation(2, on_episode=lambda *counts: calls.append(counts))
    for episode in result.episodes:
        assert episode.success == (episode.episode_return == 1)
        assert episode.control_steps == 8 or episode.success
    assert calls[-1] == (len(STARTS), result.successes)
    assert calls == sorted(calls)
    assert result.success_rate == pytest.approx(np.mean([e.success for e in result.episodes]))
    assert result.interval == wilson_interval(result.successes, len(STARTS))


def test_nothing_to_evaluate_is_refused() -> None:
    env = vec(QueueEnv)
    policy = MlpPolicy(env.observation_space, env.action_space, lambda _: 1e-3)
    with pytest.raises(ValueError, match="no starts"):
        evaluate(policy, env, [])
