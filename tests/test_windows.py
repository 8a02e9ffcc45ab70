"""What a training window holds, on episodes written by hand."""

import numpy as np
import pytest
import torch

from cfgrl_gym.algorithms.checks import check_stride
from cfgrl_gym.algorithms.collector import Chunk, Episode
from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.algorithms.windows import batch_windows, cut_windows

HORIZON = 4


def make_episode(chunk_size, lengths, observation_stride=None):
    """Control step t executes the action (t,); chunk c's k-th sampled action is (100 c + k,).

    The observation at control step t is (t,).
    """
    chunks, t = [], 0
    for c, n in enumerate(lengths):
        inside = {}
        if observation_stride:
            offsets = range(observation_stride, n, observation_stride)
            inside = {offset: np.array([t + offset]) for offset in offsets}
        chunks.append(
            Chunk(
                observation=np.array([t]),
                model_actions=np.arange(HORIZON, dtype=np.float32)[:, None] + 100 * c,
                actions=np.arange(t, t + n, dtype=np.float32)[:, None],
                rewards=np.zeros(n),
                observations=inside,
                prefix_keys=dict.fromkeys([0, *inside], 7),
            )
        )
        t += n
    return Episode(0, 0, Start(seed=0), chunks)


def encode(observations, actions):
    """Model space of the tests: 1000 + action, and the window's observation in eighths."""
    return 1000 + actions + torch.from_numpy(observations)[:, None].float() / 8


def cut(episode, chunk_size, stride):
    windows = cut_windows(
        episode, horizon=HORIZON, chunk_size=chunk_size, stride=stride, encode=encode
    )
    return {
        w.start: (w.model_actions[:, 0].tolist(), w.action_is_pad.tolist(), w.observation)
        for w in windows
    }


def test_a_full_chunk_keeps_what_was_sampled():
    windows = cut(make_episode(4, [4, 4]), chunk_size=4, stride=4)
    assert list(windows) == [0, 4]
    assert windows[0] == ([0, 1, 2, 3], [False] * 4, np.array([0]))
    assert windows[4] == ([100, 101, 102, 103], [False] * 4, np.array([4]))


def test_a_chunk_that_ended_early_is_padded_with_what_was_sampled():
    windows = cut(make_episode(4, [4, 2]), chunk_size=4, stride=4)
    assert windows[4][:2] == ([100, 101, 102, 103], [False, False, True, True])


def test_a_chunk_shorter_than_the_horizon_goes_on_with_what_was_executed_next():
    windows = cut(make_episode(2, [2, 2, 1]), chunk_size=2, stride=2)
    # Two sampled, then the executed actions 2 and 3 seen from observation 0.
    assert windows[0][:2] == ([0, 1, 1002, 1003], [False] * 4)
    # Two sampled, the executed action 4 seen from observation 2, then the unused sample.
    assert windows[2][:2] == ([100, 101, 1004.25, 103], [False, False, False, True])
    assert windows[4][:2] == ([200, 201, 202, 203], [False, True, True, True])


def test_windows_inside_a_chunk_hold_what_was_executed():
    windows = cut(make_episode(4, [4, 3], observation_stride=2), chunk_size=4, stride=2)
    assert list(windows) == [0, 2, 4, 6]
    assert windows[2] == ([1002.25, 1003.25, 1004.25, 1005.25], [False] * 4, np.array([2]))
    # Only action 6 was executed; it is repeated where nothing was.
    assert windows[6][:2] == ([1006.75] * 4, [False, True, True, True])


def test_a_finer_environment_stride_serves_a_coarser_window_stride():
    windows = cut(make_episode(4, [4, 4], observation_stride=1), chunk_size=4, stride=2)
    assert list(windows) == [0, 2, 4, 6]


def test_a_stride_of_several_chunks_leaves_some_out():
    windows = cut(make_episode(2, [2, 2, 2, 1]), chunk_size=2, stride=4)
    assert list(windows) == [0, 4]


def test_a_missing_observation_names_the_environments_argument():
    with pytest.raises(ValueError, match="observation_stride=2"):
        cut(make_episode(4, [4]), chunk_size=4, stride=2)
    with pytest.raises(ValueError, match=r"gave those at \[3\]"):
        cut(make_episode(4, [4], observation_stride=3), chunk_size=4, stride=2)
    # Nothing is missing where no window starts inside a chunk.
    assert list(cut(make_episode(4, [2]), chunk_size=4, stride=2)) == [0]


def test_strides_that_fit_a_chunk_of_four():
    for stride in (1, 3, 4, 8):
        check_stride(stride, 4)
    for stride in (0, 5, 10):
        with pytest.raises(ValueError, match="multiple"):
            check_stride(stride, 4)


def test_a_batch_keeps_dictionary_observations_together():
    episode = make_episode(4, [4, 2])
    for i, chunk in enumerate(episode.chunks):
        image = np.full((2, 2, 3), i, np.uint8)
        object.__setattr__(chunk, "observation", {"image": image, "state": np.ones(3)})
    windows = cut_windows(episode, horizon=HORIZON, chunk_size=4, stride=4, encode=encode)
    batch = batch_windows(windows, np.array([1, -1]), np.array([5, 5]))
    assert len(batch) == 2
    second = batch[torch.tensor([1])]
    assert second.observations["image"].shape == (1, 2, 2, 3)
    assert (second.observations["image"] == 1).all()
    assert second.labels.tolist() == [-1]
    assert second.groups.tolist() == [5]
    assert second.model_actions.shape == (1, HORIZON, 1)
