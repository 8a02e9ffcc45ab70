"""Supervised warm start: windows and statistics of demonstrations, and a loss that falls."""

import dataclasses

import numpy as np
import pytest
import torch
from pi0_support import HORIZON, IMAGE_SIZE, make_policy

from cfgrl_gym.algorithms.flow import POSITIVE
from cfgrl_gym.algorithms.warm_start import (
    WarmStartConfig,
    demonstration_stats,
    demonstration_windows,
    warm_start,
)
from cfgrl_gym.demos.files import Demonstration
from cfgrl_gym.wrappers import decode_prompt
from cfgrl_gym.wrappers.norm_stats import Moments, NormStats

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def demonstration(length: int, seed: int, prompt: str = "pick up the can") -> Demonstration:
    """An arm that moves to a point: the action is what is left to go, the gripper closes last."""
    rng = np.random.default_rng(seed)
    goal = rng.uniform(-0.5, 0.5, 6)
    path = np.linspace(rng.uniform(-0.5, 0.5, 6), goal, length)
    grip = np.where(np.arange(length) < 2 * length // 3, -1.0, 1.0)
    images = rng.integers(0, 256, (2, length, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Demonstration(
        actions=np.column_stack([goal - path, grip]),
        states=np.zeros((length, 5)),
        agentview_rgb=images[0],
        eye_in_hand_rgb=images[1],
        ee_pos=path[:, :3],
        ee_ori=path[:, 3:],
        gripper_states=np.column_stack([0.02 * grip, -0.02 * grip]),
        joint_states=np.zeros((length, 7)),
        images_rendered=np.ones(length, dtype=bool),
        prompt=prompt,
    )


@pytest.fixture
def demos() -> list[Demonstration]:
    return [demonstration(20, 0), demonstration(13, 1, "open the drawer")]


@pytest.mark.parametrize("delta", [False, True])
def test_statistics_are_those_of_all_windows(demos: list[Demonstration], delta: bool) -> None:
    horizon = 5
    stats = demonstration_stats(demos, horizon=horizon, delta=delta, std_floor=0.0)
    states = np.vstack(
        [np.hstack([demo.ee_pos, demo.ee_ori, demo.gripper_states]) for demo in demos]
    )
    rows = []
    for demo in demos:
        state = np.hstack([demo.ee_pos, demo.ee_ori])
        for start in range(len(demo.actions)):
            for action in demo.actions[start : start + horizon]:
                offset = np.append(state[start], 0.0) if delta else np.zeros(7)
                rows.append(action - offset)
    actions = np.array(rows)
    for moments, values in ((stats.state, states), (stats.actions, actions)):
        np.testing.assert_allclose(moments.mean, values.mean(0), atol=1e-6)
        np.testing.assert_allclose(moments.std, values.std(0), atol=1e-6)
        np.testing.assert_allclose(moments.q01, np.quantile(values, 0.01, axis=0), atol=1e-6)
        np.testing.assert_allclose(moments.q99, np.quantile(values, 0.99, axis=0), atol=1e-6)


def test_a_dimension_that_hardly_moves_gets_the_floor(demos: list[Demonstration]) -> None:
    still = [dataclasses.replace(demo, ee_ori=0 * demo.ee_ori + 1) for demo in demos]
    std = np.array(demonstration_stats(still, horizon=1, delta=False, std_floor=0.05).state.std)
    np.testing.assert_array_equal(std[3:6], 0.05)
    assert (std[:3] > 0.05).all()


@pytest.mark.parametrize("stride", [1, 4])
def test_windows_hold_what_was_done_next_and_pad_after_the_end(
    demos: list[Demonstration], stride: int
) -> None:
    mean, std = np.linspace(-0.3, 0.3, 7), np.linspace(0.5, 2, 7)
    stats = NormStats(Moments((0.0,) * 8, (1.0,) * 8), Moments(tuple(mean), tuple(std)))
    policy = make_policy(norm_stats=stats)
    windows = demonstration_windows(policy, demos, stride)

    starts = [(demo, t) for demo in demos for t in range(0, len(demo.actions), stride)]
    assert len(windows) == len(starts)
    for row, (demo, t) in enumerate(starts):
        done = demo.actions[t : t + HORIZON]
        pad = windows.action_is_pad[row].numpy()
        assert pad.tolist() == [False] * len(done) + [True] * (HORIZON - len(done))
        given = windows.model_actions[row, : len(done)].numpy()
        np.testing.assert_allclose(given[:, :7], (done - mean) / (std + 1e-6), atol=1e-5)
        assert (given[:, 7:] == 0).all()
        obs = {key: value[row] for key, value in windows.observations.items()}
        np.testing.assert_array_equal(obs["base_0_rgb"], np.rot90(demo.agentview_rgb[t], 2))
        wrist = np.rot90(demo.eye_in_hand_rgb[t], 2)
        np.testing.assert_array_equal(obs["left_wrist_0_rgb"], wrist)
        state = np.concatenate([demo.ee_pos[t], demo.ee_ori[t], demo.gripper_states[t]])
        np.testing.assert_allclose(obs["state"], state, rtol=1e-6)
        assert decode_prompt(obs["prompt"]) == demo.prompt
    assert (windows.labels == POSITIVE).all()


def test_with_the_extra_delta_actions_are_relative_to_the_windows_first_state(
    demos: list[Demonstration],
) -> None:
    windows = demonstration_windows(make_policy(delta_actions=True), demos[:1], 1)
    demo, t = demos[0], 5
    wanted = demo.actions[t : t + HORIZON].copy()
    wanted[:, :3] -= demo.ee_pos[t]
    wanted[:, 3:6] -= demo.ee_ori[t]
    np.testing.assert_allclose(windows.model_actions[t, :, :7], wanted, atol=1e-5)


def test_windows_start_only_where_images_were_drawn(demos: list[Demonstration]) -> None:
    drawn = np.arange(20) % 3 == 0
    sparse = dataclasses.replace(demos[0], images_rendered=drawn)
    policy = make_policy()
    windows = demonstration_windows(policy, [sparse], 1)
    np.testing.assert_allclose(windows.observations["state"], sparse.state[drawn])
    windows = demonstration_windows(policy, [sparse], 2)
    np.testing.assert_allclose(windows.observations["state"], sparse.state[::6])


def test_images_of_another_size_are_resized_to_the_models(demos: list[Demonstration]) -> None:
    large = np.kron(demos[0].agentview_rgb, np.ones((1, 2, 2, 1), np.uint8))
    windows = demonstration_windows(
        make_policy(), [dataclasses.replace(demos[0], agentview_rgb=large)], 10
    )
    images = windows.observations["base_0_rgb"]
    assert images.shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3)
    # enlarged twofold and shrunk again: close to what it was
    wanted = np.rot90(demos[0].agentview_rgb[10], 2).astype(float)
    assert np.corrcoef(images[1].ravel(), wanted.ravel())[0, 1] > 0.9


def test_the_loss_falls_and_equal_seeds_give_equal_losses(demos: list[Demonstration]) -> None:
    stats = demonstration_stats(demos, horizon=8, delta=False, std_floor=0.05)
    config = WarmStartConfig(steps=60, batch_size=16, learning_rate=3e-3, seed=1)
    reported: list[tuple[int, float]] = []
    policy = make_policy(norm_stats=stats, randomise=False)
    losses = warm_start(policy, demos, config, lambda *report: reported.append(report))
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])
    assert reported == list(enumerate(losses, start=1))
    assert not policy.training

    short = dataclasses.replace(config, steps=3)
    runs = [
        warm_start(make_policy(norm_stats=stats, randomise=False), demos, short) for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_condition_dropout_decides_which_branch_is_trained(demos: list[Demonstration]) -> None:
    for probability, trained in ((1.0, False), (0.0, True)):
        policy = make_policy()
        before = [p.clone() for p in policy.model.condition.parameters()]
        config = WarmStartConfig(steps=2, batch_size=4, dropout_prob=probability)
        warm_start(policy, demos, config)
        after = list(policy.model.condition.parameters())
        moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert moved == trained


def test_no_demonstrations_are_refused() -> None:
    with pytest.raises(ValueError, match="no demonstrations"):
        warm_start(make_policy(), [], WarmStartConfig(steps=1))


def test_a_camera_that_was_not_recorded_is_refused(demos: list[Demonstration]) -> None:
    black = np.zeros_like(demos[1].agentview_rgb)
    demos[1] = dataclasses.replace(demos[1], agentview_rgb=black)
    with pytest.raises(ValueError, match=r"agentview_rgb .*black.*--cameras"):
        warm_start(make_policy(), demos, WarmStartConfig(steps=1))
