"""Advantages and labels against closed forms worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfgrl_gym.algorithms import rloo_advantages
from cfgrl_gym.algorithms.labels import (
    Labelling,
    discounted,
    draw_epoch,
    drop_condition,
    group_advantages,
    is_uniform,
    label_advantages,
    window_advantages,
)

SOURCES = ("episode_rloo", "window_rloo", "window_return")
# Two episodes of 4 and 5 control steps, windows every 2.
REWARDS = [np.array([1.0, 2.0, 4.0, 0.5]), np.array([0.0, 1.0, 0.0, 3.0, 5.0])]
STARTS = [np.array([0, 2]), np.array([0, 2, 4])]


def label_group(rewards, starts, successes, horizon, labelling):
    """Label the windows of a group that is alone in its iteration, as a list."""
    advantages = group_advantages(rewards, starts, successes, horizon, labelling)
    return label_advantages(advantages, np.zeros(len(advantages), int), labelling).tolist()


def test_rloo_by_hand():
    advantages = rloo_advantages(np.array([[1.0, 0.0, 0.0, 1.0], [4.0, 1.0, 1.0, 0.0]]))
    expected = [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [10 / 3, -2 / 3, -2 / 3, -2]]
    np.testing.assert_allclose(advantages, expected)


@given(
    st.integers(2, 6).flatmap(
        lambda k: st.lists(
            st.lists(st.floats(-1e3, 1e3), min_size=k, max_size=k), min_size=1, max_size=4
        )
    )
)
def test_rloo_is_the_return_minus_the_mean_of_the_others(returns):
    advantages = rloo_advantages(returns)
    for group, row in zip(returns, advantages, strict=True):
        for i, advantage in enumerate(row):
            others = group[:i] + group[i + 1 :]
            assert advantage == pytest.approx(group[i] - np.mean(others), abs=1e-9)


@given(st.lists(st.booleans(), min_size=2, max_size=8).filter(lambda s: any(s) and not all(s)))
def test_in_a_mixed_group_successes_are_above_zero_and_failures_below(successes):
    advantages = rloo_advantages(np.array([successes], dtype=float))[0]
    np.testing.assert_array_equal(advantages > 0, successes)
    np.testing.assert_array_equal(advantages < 0, np.logical_not(successes))


def test_rloo_keeps_tensors_tensors():
    advantages = rloo_advantages(torch.tensor([[1.0, 0.0]]))
    assert torch.equal(advantages, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("returns", [[[1.0], [2.0]], [1.0, 0.0], 1.0])
def test_rloo_needs_groups_of_two(returns):
    with pytest.raises(ValueError, match="K >= 2"):
        rloo_advantages(np.array(returns))


def test_window_rloo_compares_reward_to_go_at_the_same_step():
    # To go: (7.5, 6.5, 4.5, 0.5) and (9, 9, 8, 8, 5). At step 4 the first episode has ended and
    # counts with its last window's value, that of step 2.
    first, second = window_advantages(REWARDS, STARTS, "window_rloo", horizon=2)
    np.testing.assert_allclose(first, [7.5 - 9, 4.5 - 8])
    np.testing.assert_allclose(second, [9 - 7.5, 8 - 4.5, 5 - 4.5])


def test_window_return_compares_the_reward_inside_windows():
    first, second = window_advantages(REWARDS, STARTS, "window_return", horizon=2)
    mean = (3 + 4.5 + 1 + 3 + 5) / 5
    np.testing.assert_allclose(first, np.array([3, 4.5]) - mean)
    np.testing.assert_allclose(second, np.array([1, 3, 5]) - mean)


def test_episode_rloo_gives_every_window_its_episodes_advantage():
    first, second = window_advantages(REWARDS, STARTS, "episode_rloo", horizon=2)
    np.testing.assert_allclose(first, [-1.5, -1.5])
    np.testing.assert_allclose(second, [1.5, 1.5, 1.5])


@pytest.mark.parametrize(("negatives", "other"), [("null", -1), ("zero", 0)])
def test_windows_below_the_threshold_get_the_other_label(negatives, other):
    def label(threshold):
        labelling = Labelling("window_rloo", threshold, negatives)
        return label_group(REWARDS, STARTS, [True, True], 2, labelling)

    assert label(0.0) == [other, other, 1, 1, 1]
    assert label(1.5) == [other, other, 1, 1, other]  # 1.5 itself reaches the threshold


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("negatives", ["null", "zero"])
def test_in_a_uniform_group_successes_are_optimal_and_failures_are_not(source, negatives):
    starts = [np.array([0, 2]), np.array([0])]
    other = {"null": -1, "zero": 0}[negatives]

    def labels(reward, successes, threshold=0.0):
        rewards = [np.array([0.0, 0.0, 0.0, reward]), np.array([0.0, reward])]
        labelling = Labelling(source, threshold, negatives)
        return label_group(rewards, starts, successes, 2, labelling)

    assert labels(1.0, [True, True]) == [1, 1, 1]
    assert labels(0.0, [False, False]) == [other] * 3
    assert labels(1.0, [False, True]) == [other, other, 1]
    assert labels(1.0, [True, True], threshold=0.4) == [other] * 3  # A = 0 doesn't reach it


@pytest.mark.parametrize("source", SOURCES)
def test_an_advantage_that_is_zero_up_to_rounding_reaches_a_threshold_of_zero(source):
    """0.1 + 0.3 - 2 · 0.2 = 5.6e-17, and so for sums in any other order."""
    starts = [np.array([0])] * 3
    rewards = [np.array([0.1, 0.0]), np.array([0.2, 0.0]), np.array([0.3, 0.0])]
    labelling = Labelling(source, 0.0, "null")
    labels = label_group(rewards, starts, [False] * 3, 2, labelling)
    assert labels == [-1, 1, 1]


@given(st.integers(1, 10**6), st.integers(2, 8), st.floats(1e-6, 1e6))
def test_the_middle_of_a_symmetric_group_is_optimal_at_any_scale(middle, pairs, scale):
    offsets = range(1, pairs + 1)
    returns = [middle, *(middle + d for d in offsets), *(middle - d for d in offsets)]
    rewards = [np.array([value * scale]) for value in returns]
    starts = [np.array([0])] * len(rewards)
    labelling = Labelling("episode_rloo", 0.0, "null")
    labels = label_group(rewards, starts, [False] * len(rewards), 1, labelling)
    assert labels == [1] * (1 + pairs) + [-1] * pairs


def test_success_is_optimal_whatever_the_returns_of_the_group():
    rewards = [np.array([1.0, -5.0]), np.array([9.0]), np.array([2.0, 2.0, 2.0])]
    starts = [np.array([0, 1]), np.array([0]), np.array([0, 2])]
    for threshold in (0.0, 3.0):
        labelling = Labelling("success", threshold, "null", optimal_share=0.2)
        advantages = group_advantages(rewards, starts, [True, False, True], 2, labelling)
        labels = label_advantages(advantages, np.zeros(5, np.int64), labelling)
        assert labels.tolist() == [1, 1, -1, 1, 1]


def test_returns_that_differ_by_rounding_only_are_uniform():
    assert is_uniform(np.array([0.1 + 0.2, 0.3]))
    assert is_uniform(np.zeros(4))
    assert not is_uniform(np.array([1e-12, 0.0]))


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_conditions_become_null_at_the_stated_rate(probability):
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(n) - 1  # ∅, 0 and 1
    dropped = drop_condition(labels, probability, generator)
    assert (dropped[labels == -1] == -1).all()
    interval = 4 * np.sqrt(probability * (1 - probability) / n)
    for label in (0, 1):
        kept = dropped[labels == label]
        assert set(kept.tolist()) <= {-1, label}
        share = (kept == -1).float().mean().item()
        assert share == pytest.approx(probability, abs=interval + 1e-12)


def test_each_use_of_a_sample_drops_afresh():
    generator = torch.Generator().manual_seed(0)
    labels = torch.ones(1000, dtype=torch.int64)
    first, second = (drop_condition(labels, 0.5, generator) for _ in range(2))
    assert 400 < (first != second).sum() < 600


def test_an_epoch_has_every_window_once_unless_a_share_is_asked_for() -> None:
    labels = torch.tensor([1, -1, -1, 0, 1])
    generator = torch.Generator().manual_seed(0)
    drawn, given = draw_epoch(labels, None, None, generator)
    assert drawn.sort().values.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(given, labels[drawn])
    for uniform in (torch.ones(4, dtype=torch.int64), torch.full((4,), -1)):
        drawn, given = draw_epoch(uniform, 0.5, None, generator)
        assert drawn.sort().values.tolist() == [0, 1, 2, 3]
        assert torch.equal(given, uniform)


@pytest.mark.parametrize(("positive_share", "positives"), [(0.5, 10), (0.9, 18), (0.1, 2), (1, 20)])
def test_an_epoch_has_the_share_of_optimal_windows_that_is_asked_for(
    positive_share: float, positives: int
) -> None:
    labels = torch.tensor([1] * 3 + [-1] * 10 + [0] * 7)
    drawn, given = draw_epoch(labels, positive_share, None, torch.Generator().manual_seed(1))
    assert len(drawn) == 20
    assert torch.equal(given, labels[drawn])
    counts = torch.bincount(drawn, minlength=20)
    assert counts[:3].sum() == positives
    for part in (counts[:3], counts[3:]):  # none comes again before all of its kind have come
        assert part.max() - part.min() <= 1
    assert not torch.equal(drawn, drawn.sort().values)


def test_the_marginal_has_its_own_rate_and_conditions_the_rest() -> None:
    labels = torch.tensor([1] * 3 + [-1] * 17)
    drawn, given = draw_epoch(labels, 0.9, 0.35, torch.Generator().manual_seed(1))
    as_null, as_positive = drawn[given == -1], drawn[given == 1]
    assert (len(as_null), len(as_positive)) == (7, 13)
    assert as_positive.unique().tolist() == [0, 1, 2]  # optimal windows alone, again and again
    many, given = draw_epoch(labels.repeat(50), None, 0.5, torch.Generator().manual_seed(1))
    share = (many[given == -1] % 20 < 3).float().mean()
    assert 0.10 < share < 0.20  # of the windows of ∅ as many are optimal as of all: 3 of 20
    assert not torch.equal(many, many.sort().values)


def test_the_marginal_alone_is_drawn_where_nothing_is_optimal() -> None:
    drawn, given = draw_epoch(torch.full((6,), -1), 0.9, 0.5, torch.Generator().manual_seed(0))
    assert drawn.sort().values.tolist() == list(range(6))
    assert given.tolist() == [-1] * 6


def test_negatives_are_conditions_beside_the_marginal() -> None:
    labels = torch.tensor([1] * 5 + [0] * 15)
    drawn, given = draw_epoch(labels, 0.8, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(given[given >= 0], labels[drawn][given >= 0])
    assert [(given == label).sum().item() for label in (-1, 0, 1)] == [10, 2, 8]


def test_a_discount_makes_the_sooner_success_the_better_one() -> None:
    """γ = 0.9: returns 0.9^1 and 0.9^3, so A = ±(0.9 - 0.729); undiscounted both are optimal."""
    rewards = [np.array([0.0, 1.0]), np.array([0.0, 0.0, 0.0, 1.0])]
    starts = [np.array([0]), np.array([0, 2])]
    np.testing.assert_allclose(discounted(np.ones(3), 0.9), [1, 0.9, 0.81])
    for gamma, expected in ((1.0, [1, 1, 1]), (0.9, [1, -1, -1])):
        labelling = Labelling("episode_rloo", 0.0, "null", gamma)
        assert label_group(rewards, starts, [True, True], 2, labelling) == expected
    advantages = group_advantages(rewards, starts, [True, True], 2, labelling)
    np.testing.assert_allclose(advantages, np.array([1, -1, -1]) * (0.9 - 0.729), atol=1e-6)


def test_a_share_of_each_task_is_optimal_if_its_advantages_reach_the_threshold() -> None:
    advantages = np.array([0.1, 0.2, 0.3, 0.4, -1.0, -2.0, 5.0, 6.0, 7.0, 7.0])
    tasks = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    labels = {
        share: label_advantages(
            advantages, tasks, Labelling("episode_rloo", 0.0, "null", optimal_share=share)
        ).tolist()
        for share in (None, 0.5, 0.25)
    }
    assert labels[None] == [1, 1, 1, 1, -1, -1, 1, 1, 1, 1]
    assert labels[0.5] == [-1, -1, 1, 1, -1, -1, -1, -1, 1, 1]
    assert labels[0.25] == [-1, -1, -1, 1, -1, -1, -1, -1, 1, 1]  # two are equal to the last
