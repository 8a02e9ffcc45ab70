"""label_source="value" where values and advantages are known in closed form."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from cfgrl_envs import QueueEnv, vec
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from pi0_support import SIZES, PromptEnv, make_observation, make_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from test_cfgrl_known_answer import base_policy
from test_midway import algorithm as with_midway
from test_prefix_cache import learn as learn_pi0
from test_resume import Saving, all_state, assert_equal_states, go_on, make

from cfgrl_gym.algorithms import CFGRL, MlpPolicy
from cfgrl_gym.algorithms.collector import Chunk, Episode
from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.algorithms.labels import returns_to_go, value_advantages
from cfgrl_gym.algorithms.memory.prefix_cache import PrefixCache
from cfgrl_gym.algorithms.saving.checkpoints import CheckpointStore, load_checkpoint
from cfgrl_gym.algorithms.value import ValueSource

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# Advantages ---------------------------------------------------------------------------------------


def test_an_advantage_is_the_reward_inside_a_chunk_and_the_rise_of_value() -> None:
    """Chunks of 2, an episode of 5 steps, γ = 0.5; the last chunk has one step, and V = 0 then."""
    returns = returns_to_go(np.array([1.0, 2.0, 0.0, 0.0, 8.0]), 0.5)
    np.testing.assert_allclose(returns, [2.5, 3.0, 2.0, 4.0, 8.0, 0.0])
    values = np.array([3.0, 10.0, 6.0])
    advantages = value_advantages(returns, values, np.array([0, 2, 4]), 2, 0.5)
    expected = [1 + 2 / 2 + 10 / 4 - 3, 0 + 6 / 4 - 10, 8 - 6]
    np.testing.assert_allclose(advantages, expected)


@pytest.mark.parametrize("starts", [[0, 1, 2, 3, 4], [0, 2, 3, 4], [0, 4], [0]])
def test_at_any_stride_the_value_after_is_that_of_the_first_window_after_the_chunk(
    starts: list[int],
) -> None:
    rewards, gamma, chunk = np.array([0.5, -1.0, 2.0, 0.25, 4.0, 1.0]), 0.8, 2
    values = np.array([3.0, -2.0, 5.0, 0.5, 1.0])[: len(starts)]
    expected = []
    for value, start in zip(values, starts, strict=True):
        after = [i for i, s in enumerate(starts) if s >= start + chunk]
        end = starts[after[0]] if after else len(rewards)
        inside = sum(gamma**k * rewards[start + k] for k in range(end - start))
        later = gamma ** (end - start) * values[after[0]] if after else 0.0
        expected.append(inside + later - value)
    returns = returns_to_go(rewards, gamma)
    np.testing.assert_allclose(
        value_advantages(returns, values, np.array(starts), chunk, gamma), expected
    )


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9), st.integers(1, 4))
def test_undiscounted_advantages_sum_to_what_an_episode_returned_beyond_its_value(
    rewards: list[float], chunk: int
) -> None:
    starts = np.arange(0, len(rewards), chunk)
    values = np.random.default_rng(0).normal(size=len(starts))
    returns = returns_to_go(np.array(rewards), 1.0)
    total = value_advantages(returns, values, starts, chunk, 1.0).sum()
    assert total == pytest.approx(sum(rewards) - values[0], abs=1e-9)


# A corridor ---------------------------------------------------------------------------------------

START, RIGHT, WRONG, GOAL_AHEAD, LOST = range(5)
FALL = -0.9  # a second action below this falls
KEEP = 0.8159399  # P(action > FALL) of a standard normal one
VALUES = {START: KEEP / 2, RIGHT: KEEP, WRONG: 0.0, GOAL_AHEAD: 1.0, LOST: 0.0}


class Corridor(gym.Env):
    """Right where the first action is positive, lost where the second is below `FALL`; then three
    steps that decide nothing, and a reward of 1 where neither went wrong.

    The observation is the place alone, one-hot.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 1, (5,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.time = START, 0
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        return np.eye(5, dtype=np.float32)[self.place]

    def step(self, action: np.ndarray) -> Any:
        self.time += 1
        if self.time == 1:
            self.place = RIGHT if action[0] > 0 else WRONG
        elif self.time == 2:
            self.place = GOAL_AHEAD if self.place == RIGHT and action[0] > FALL else LOST
        done = self.time == 5
        success = done and self.place == GOAL_AHEAD
        return self._observe(), float(success), done, False, {"is_success": bool(success)}


def corridor(n_envs: int = 20, env: type[gym.Env] = Corridor, **changed: Any) -> CFGRL:
    arguments: dict[str, Any] = {
        "rloo_batch_size": 2,
        "groups_per_iteration": 250,
        "enable_dynamic_sampling": False,
        "label_source": "value",
        "n_epochs": 1,
        "policy_kwargs": {"net_arch": [8]},
        "seed": 0,
        "device": "cpu",
    }
    model = CFGRL("MlpPolicy", vec(env, n_envs), **(arguments | changed))
    base_policy(model)  # standard normal actions, clipped to [-1, 1]
    return model


@pytest.fixture(scope="module")
def walked() -> CFGRL:
    return corridor().learn(1, log_interval=None)


def by_step(model: CFGRL) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Places and labels (groups, 2, 5), and the value data in that shape."""
    windows = model.windows
    assert windows is not None
    assert windows.value_data is not None
    shape = (-1, 2, 5)
    places = windows.observations.argmax(1).reshape(shape)
    data = {name: windows.value_data[name].numpy().reshape(shape) for name in ("returns", "values")}
    return places, windows.labels.numpy().reshape(shape), data


def test_values_are_the_probabilities_of_success(walked: CFGRL) -> None:
    places, _, data = by_step(walked)
    for place, value in VALUES.items():
        assert data["values"][places == place].mean() == pytest.approx(value, abs=0.06)
        assert data["values"][places == place].std() < 0.06
    success = places[..., -1] == GOAL_AHEAD
    np.testing.assert_array_equal(data["returns"], np.repeat(success[..., None], 5, -1))


def test_a_step_is_optimal_if_it_raises_the_probability_whatever_becomes_of_the_episode(
    walked: CFGRL,
) -> None:
    places, labels, _ = by_step(walked)
    right = places[..., 1] == RIGHT
    np.testing.assert_array_equal(labels[..., 0] == 1, right)
    stays = places[..., 2] == GOAL_AHEAD
    np.testing.assert_array_equal(labels[..., 1][right] == 1, stays[right])
    assert (right & ~stays).sum() > 20  # failures with a good first step


def test_where_all_failed_a_clear_step_forward_is_optimal_and_noise_is_not(walked: CFGRL) -> None:
    places, labels, data = by_step(walked)
    failed = (places[..., -1] == LOST).all(1)
    forward = places[..., 1] == RIGHT
    assert forward[failed].sum() > 5
    np.testing.assert_array_equal(labels[failed][..., 0] == 1, forward[failed])
    assert (labels[failed][..., 1:] == -1).all()
    # Nothing is decided on the way from WRONG, but half of the steps seem to go up a little; where
    # another episode of the group succeeded, the threshold of 0 takes these.
    change = np.diff(data["values"], axis=-1)[..., 1:]
    assert (change[failed & ~forward.any(1)] > 0).any()
    mixed = (places[..., -1] == LOST).sum(1) == 1
    assert (labels[mixed][~forward[mixed]] == 1).any()


def test_where_nothing_ever_succeeds_nothing_is_optimal() -> None:
    class Hopeless(Corridor):
        def step(self, action: np.ndarray) -> Any:
            observation, _, done, _, _ = super().step(action)
            return observation, 0.0, done, False, {"is_success": False}

    model = corridor(env=Hopeless, groups_per_iteration=10).learn(1)
    assert model.windows is not None
    assert (model.windows.labels == -1).all()


def test_where_all_succeed_as_expected_all_is_optimal() -> None:
    class Certain(Corridor):
        def step(self, action: np.ndarray) -> Any:
            return super().step(np.ones_like(action))

    model = corridor(env=Certain, groups_per_iteration=10).learn(1)
    assert model.windows is not None
    assert (model.windows.labels == 1).all()


def test_the_highest_share_is_optimal_and_the_others_are_negatives() -> None:
    model = corridor(groups_per_iteration=100, optimal_share=0.06, negatives="zero").learn(1)
    places, labels, _ = by_step(model)
    assert set(labels.flat) == {0, 1}
    # The steps from START to RIGHT raise V most, and are about a tenth of all. Many are equal.
    right = places[..., 1] == RIGHT
    assert 0.06 <= (labels == 1).mean() <= right.mean() / 5
    assert (labels[..., 0] == 0)[~right].all()
    assert (labels[..., 1:] == 0).all()


def test_the_log_tells_the_values_error_from_that_of_the_mean(walked: CFGRL) -> None:
    success = KEEP / 2
    variances = [success * (1 - success), KEEP * (1 - KEEP) / 2, 0, 0, 0]  # of the five steps
    logged = walked.logger.name_to_value
    assert logged["rollout/value_error"] == pytest.approx(np.sqrt(np.mean(variances)), abs=0.02)
    spread = np.sqrt(success * (1 - success))
    assert logged["rollout/return_spread"] == pytest.approx(spread, abs=0.02)


# Held out -----------------------------------------------------------------------------------------


def evaluated(
    successes: list[list[bool]], features: torch.Tensor, earlier: Any = (), tasks: Any = None
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Evaluate groups of episodes of one step that reward success."""

    def chunk(success: bool) -> Chunk:
        zero = np.zeros((1, 1), np.float32)
        return Chunk(zero[0], zero, zero, np.array([float(success)]), {}, {0: 0})

    groups = [
        [
            Episode(g, i, Start((tasks or {}).get(g), 0), [chunk(success)], success)
            for i, success in enumerate(group)
        ]
        for g, group in enumerate(successes)
    ]
    cache = PrefixCache(corridor(1).policy)
    source = ValueSource(cache, 8, 1.0, torch.Generator().manual_seed(0), earlier)
    starts = [np.array([0]) for group in groups for _ in group]
    return source.evaluate(groups, starts, features)


def test_no_value_knows_the_outcome_of_its_own_episode_or_group() -> None:
    rng = np.random.default_rng(0)
    successes = rng.random((40, 1)).repeat(3, 1) < 0.5  # a group's features tell its outcome
    features = torch.eye(40).repeat_interleave(3, 0)
    advantages, data = evaluated(successes.tolist(), features)
    assert np.abs(advantages[np.isfinite(advantages)]).min() > 0.2
    known = {"features": features, "returns": data["returns"], "values": data["values"]}
    _, again = evaluated(successes.tolist(), features, [known])  # what an earlier iteration saw
    error = (again["values"] - data["returns"]).abs().mean()
    assert error < 0.5 * (data["values"] - data["returns"]).abs().mean()


def test_each_half_has_groups_of_every_task() -> None:
    """The features are the task alone, which decides success: both heads know each task."""
    tasks = {g: (0 if g % 2 == 0 else 1) for g in range(8)}  # by parity, halves would be tasks
    successes = [[bool(tasks[g])] * 2 for g in range(8)]
    features = torch.tensor([[float(tasks[g])] for g in range(8) for _ in range(2)])
    _, data = evaluated(successes, features, tasks=tasks)
    order = data["values"][data["returns"] == 1].min() - data["values"][data["returns"] == 0].max()
    assert order > 0.1


def test_a_group_that_is_alone_is_halved_by_its_episodes() -> None:
    features = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    _, data = evaluated([[True, True, False, False]], features)
    assert data["values"][:2].min() > data["values"][2:].max()
    _, data = evaluated([[True]], features[:1])
    assert data["values"].tolist() == [0]


# Determinism --------------------------------------------------------------------------------------


def test_the_number_of_environments_changes_nothing() -> None:
    one, other = (corridor(n, groups_per_iteration=20).learn(1).windows for n in (1, 7))
    assert one is not None
    assert other is not None
    assert torch.equal(one.labels, other.labels)
    assert_equal_states(one.value_data, other.value_data)
    different = corridor(7, groups_per_iteration=20, seed=1).learn(1).windows
    assert different is not None
    assert not torch.equal(one.labels, different.labels)


def test_a_training_that_stops_and_goes_on_gives_the_same_bits(tmp_path: Path) -> None:
    value: dict[str, Any] = {"label_source": "value"}
    reference = go_on(tmp_path / "whole", 4, **value)
    go_on(tmp_path / "parts", 2, **value)
    torch.manual_seed(99)
    again = go_on(tmp_path / "parts", 4, **value)
    assert_equal_states(all_state(reference), all_state(again))
    for one, other in zip(reference.replay.batches, again.replay.batches, strict=True):
        assert one.value_data is not None
        assert_equal_states(one.value_data, other.value_data)
    # V is fitted to the replayed windows too: without these it is another.
    forgetful = make(**value)
    store = CheckpointStore(tmp_path / "whole")
    load_checkpoint(forgetful, store.path(3))
    for batch in forgetful.replay.batches:
        object.__setattr__(batch, "value_data", None)
    forgetful.learn(10**6, Saving(store), max_iterations=1, reset_num_timesteps=False)
    last, own = (model.replay.batches[-1].value_data for model in (reference, forgetful))
    assert last is not None
    assert own is not None
    assert torch.equal(last["returns"], own["returns"])
    assert not torch.equal(last["values"], own["values"])


def test_values_of_groups_from_midway_know_the_iterations_other_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[tuple[int, int]] = []
    evaluate = ValueSource.evaluate

    def spy(self: ValueSource, groups: Any, starts: Any, features: torch.Tensor) -> Any:
        fitted.append((len(features), sum(len(data["values"]) for data in self.earlier)))
        return evaluate(self, groups, starts, features)

    monkeypatch.setattr(ValueSource, "evaluate", spy)
    model = with_midway(label_source="value").learn(1)
    (first, before), (midway, known) = fitted
    assert (before, known) == (0, first)
    assert model.windows is not None
    assert model.windows.value_data is not None
    # Of an episode from midway only the first chunk is learned from, which V's rise needs more for.
    assert first < len(model.windows) < first + midway
    assert len(model.windows.value_data["features"]) == len(model.windows)


# PI0 ----------------------------------------------------------------------------------------------


def no_labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.full((len(inputs["state"]),), -1)


def test_the_prefixes_kept_from_acting_give_pi0_its_values() -> None:
    model, passes = learn_pi0(label_source="value")
    assert set(passes) == {2}  # a row for each environment while acting, and nothing else
    windows = model.windows
    assert windows is not None
    assert windows.value_data is not None
    policy = model.policy
    with torch.no_grad():
        inputs = policy.encode_observation(windows.observations)
        again = policy.value_features(
            inputs, policy.encode_prefix(inputs, no_labels(inputs))
        )  # after the update
    torch.testing.assert_close(windows.value_data["features"], again, atol=1e-4, rtol=1e-4)
    assert again.std(0).max() > 0.01


def test_pi0_features_are_a_samples_own_whatever_the_batch_pads() -> None:
    policy = make_policy(trainable="expert")

    def features(obs: dict[str, np.ndarray]) -> torch.Tensor:
        with torch.no_grad():
            inputs = policy.encode_observation(obs)
            return policy.value_features(inputs, policy.encode_prefix(inputs, no_labels(inputs)))

    obs = make_observation()
    together = features(obs)
    alone = [features({key: value[i : i + 1] for key, value in obs.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    config = policy.model.config.vlm_config.text_config
    assert together.shape == (3, config.num_key_value_heads * config.head_dim + 32)
    for part in ("base_0_rgb", "prompt", "state"):
        changed = features(obs | {part: obs[part][::-1].copy()})
        assert (changed - together)[0].abs().max() > 1e-3


# At the door --------------------------------------------------------------------------------------


def test_a_policy_without_frozen_features_is_refused() -> None:
    class Plain(MlpPolicy):
        has_value_features = False

    env = vec(QueueEnv, 1)
    with pytest.raises(ValueError, match=r"label_source='value' needs features.*this Plain"):
        CFGRL(Plain, env, label_source="value", device="cpu")
    model = CFGRL(Plain, env, device="cpu")
    model.label_source = "value"
    with pytest.raises(ValueError, match="label_source='value' needs features"):
        model.learn(1)
    with pytest.raises(ValueError, match="Pi0Policy with trainable='expert'"):
        CFGRL(
            "Pi0Policy",
            DummyVecEnv([PromptEnv]),
            label_source="value",
            policy_kwargs={"sizes": SIZES, "trainable": "all"},
            device="cpu",
        )
