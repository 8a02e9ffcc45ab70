"""CFGRL as an SB3 algorithm: determinism, saving, callbacks, logging, and what it refuses."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from cfgrl_envs import QueueEnv, SeedEnv, vec
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import KVWriter, Logger, SeqWriter
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)
from torch import Tensor

from cfgrl_gym.algorithms import CFGRL, MlpPolicy
from cfgrl_gym.algorithms.iteration_loop import TimestepsBar

SMALL = {
    "rloo_batch_size": 3,
    "groups_per_iteration": 2,
    "batch_size": 16,
    # Every window once an epoch, and those of its own iteration only.
    "positive_share": None,
    "replay_iterations": 0,
    "n_epochs": 4,
    "policy_kwargs": {"net_arch": [16]},
    "seed": 3,
    "device": "cpu",
}


class Recorder(KVWriter, SeqWriter):
    """Keeps what is logged."""

    def __init__(self):
        self.dumps, self.messages = [], []

    def write(self, key_values, key_excluded, step=0):
        self.dumps.append(dict(key_values))

    def write_sequence(self, sequence):
        self.messages += sequence


def make(env=None, **kwargs):
    return CFGRL("MlpPolicy", vec(SeedEnv, 2) if env is None else env, **{**SMALL, **kwargs})


def record(algorithm):
    recorder = Recorder()
    algorithm.set_logger(Logger(folder=None, output_formats=[recorder]))
    return recorder


def assert_same_weights(one, two, **tolerance):
    for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


# Determinism ------------------------------------------------------------------------------------


def test_equal_seeds_learn_equal_weights():
    assert_same_weights(make().learn(60), make().learn(60))
    with pytest.raises(AssertionError):
        assert_same_weights(make().learn(60), make(seed=4).learn(60))


@pytest.mark.parametrize("env_class", [SeedEnv, QueueEnv])
def test_the_number_of_environments_changes_nothing(env_class):
    one, two = (make(vec(env_class, n)).learn(1) for n in (1, 2))
    assert one.windows.labels.tolist() == two.windows.labels.tolist()
    assert_same_weights(one, two, rtol=0, atol=1e-4)


def test_learning_goes_on_after_loading_as_if_it_had_not_stopped(tmp_path):
    def schedule(progress):
        return 1e-3 * progress

    env = vec(SeedEnv, 2)
    algorithm = make(env, learning_rate=schedule, cfg_scale=1.5).learn(40)
    algorithm.policy.cfg_scale = 2.0
    with pytest.warns(UserWarning, match="leaves out its learning_rate"):
        algorithm.save(tmp_path / "cfgrl")
    loaded = CFGRL.load(
        tmp_path / "cfgrl", env=vec(SeedEnv, 2), device="cpu", learning_rate=schedule
    )
    assert loaded.policy.cfg_scale == 2.0
    obs = np.ones((4, 2), np.float32)
    np.testing.assert_array_equal(
        algorithm.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0]
    )
    for each in (algorithm, loaded):
        each.learn(40, reset_num_timesteps=False)
    assert loaded.num_timesteps == algorithm.num_timesteps
    assert_same_weights(algorithm, loaded)


def test_a_loaded_algorithm_predicts_without_an_environment(tmp_path):
    make(seed=None).save(tmp_path / "cfgrl")
    loaded = CFGRL.load(tmp_path / "cfgrl", device="cpu")
    assert loaded.predict(np.zeros(2, np.float32))[0].shape == (2,)


# The update -------------------------------------------------------------------------------------


class FixedDraws(MlpPolicy):
    """Time and noise follow from the actions, so that they don't depend on a step's number."""

    def flow_matching_loss(self, obs, model_actions, is_pad, labels, *_) -> Tensor:
        t = model_actions.mean((1, 2)).sigmoid()
        noise = (100 * model_actions).sin()
        x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * model_actions
        v = self.velocity(self.encode_observation(obs), x_t, t, labels)
        return (v - (noise - model_actions)).square().mean((1, 2))


def test_accumulated_gradients_equal_those_of_the_big_batch():
    def learn(batch_size, gradient_accumulation_steps):
        algorithm = CFGRL(
            FixedDraws,
            vec(SeedEnv, 2),
            **{
                **SMALL,
                "policy_kwargs": {"net_arch": [16], "optimizer_class": torch.optim.SGD},
                "batch_size": batch_size,
                "gradient_accumulation_steps": gradient_accumulation_steps,
                "dropout_prob": 0.0,
                "learning_rate": 0.1,
                "n_epochs": 2,
            },
        )
        return algorithm.learn(1)

    big = learn(20, 1)
    assert len(big.windows) == 24  # one step of 20 samples and a ragged one of 4 in each epoch
    for batch_size, accumulation in ((10, 2), (4, 5)):
        small = learn(batch_size, accumulation)
        assert small._n_updates == big._n_updates == 4
        assert_same_weights(big, small, rtol=0, atol=1e-6)
    # All 24 in one step, as 10 + 10 + 4: a mean of the parts' means would weigh the last 4 more.
    assert_same_weights(learn(30, 1), learn(10, 3), rtol=0, atol=1e-6)


def test_the_update_sees_each_window_once_an_epoch_and_drops_conditions_at_the_stated_rate():
    seen = []

    class Spy(MlpPolicy):
        def flow_matching_loss(self, obs, model_actions, is_pad, labels, *rest):
            seen.append((model_actions, labels))
            return super().flow_matching_loss(obs, model_actions, is_pad, labels, *rest)

    settings = {**SMALL, "n_epochs": 40, "dropout_prob": 0.2}
    algorithm = CFGRL(Spy, vec(SeedEnv, 2), **settings)
    recorder = record(algorithm)
    algorithm.learn(1)
    windows = algorithm.windows
    positives = int((windows.labels == 1).sum())
    actions = torch.cat([a for a, _ in seen])
    assert len(actions) == 40 * len(windows)
    epoch = actions[: len(windows)]
    torch.testing.assert_close(
        epoch.flatten().sort().values, windows.model_actions.flatten().sort().values
    )
    kept = int((torch.cat([labels for _, labels in seen]) == 1).sum())
    n = 40 * positives
    interval = 4 * np.sqrt(0.2 * 0.8 / n)
    assert 1 - kept / n == pytest.approx(0.2, abs=interval)
    assert recorder.dumps[-1]["train/dropout_rate"] == pytest.approx(1 - kept / n)


def test_success_is_labelled_and_failure_is_not():
    algorithm = make(vec(QueueEnv, 2, goal=1.0), early_stop_percentage=1.0).learn(1)
    windows = algorithm.windows
    assert windows.labels.unique().tolist() == [-1, 1]
    # An episode that succeeded has a last window with reward, and all its windows are optimal.
    assert (windows.action_is_pad.any(1) & (windows.labels == 1)).any()


def test_without_a_valid_group_the_update_is_skipped():
    algorithm = make(vec(QueueEnv, 2, goal=100.0), max_groups_tried=3)
    recorder = record(algorithm)
    algorithm.learn(40)
    assert algorithm.num_timesteps >= 40
    assert algorithm._n_updates == 0
    assert recorder.dumps[0]["rollout/groups_kept"] == 0
    assert recorder.dumps[0]["rollout/groups_discarded"] == 3
    assert any("skipped" in str(message) for message in recorder.messages)


def test_uniform_groups_are_learned_from_without_dynamic_sampling():
    algorithm = make(vec(QueueEnv, 2, goal=100.0), enable_dynamic_sampling=False)
    recorder = record(algorithm)
    algorithm.learn(1)
    assert algorithm._n_updates > 0
    assert recorder.dumps[-1]["rollout/groups_kept"] == 2
    assert recorder.dumps[-1]["rollout/null_share"] == 1.0


def test_collection_stops_at_the_stated_share_of_valid_groups():
    # ceil(0.7 * 10) is 7, although 0.7 * 10 is a little more in floating point.
    algorithm = make(groups_per_iteration=10, early_stop_percentage=0.7)
    recorder = record(algorithm)
    algorithm.learn(1)
    assert recorder.dumps[-1]["rollout/groups_kept"] == 7


def test_replay_learns_from_the_last_iterations_too():
    fresh, counts = [], []

    class Watched(CFGRL):
        def label(self, groups):
            fresh.append(super().label(groups))
            return fresh[-1]

        def train(self):
            recent = fresh[-3:]
            for name in ("model_actions", "labels", "action_is_pad"):
                wanted = torch.cat([getattr(windows, name) for windows in recent])
                assert torch.equal(getattr(self.windows, name), wanted)
            observations = np.concatenate([windows.observations for windows in recent])
            np.testing.assert_array_equal(self.windows.observations, observations)
            counts.append(len(self.windows))
            super().train()

    settings = {**SMALL, "replay_iterations": 2}
    Watched("MlpPolicy", vec(QueueEnv, 2, chunk=3), **settings).learn(10**6, max_iterations=5)
    assert len(counts) == 5
    assert counts[1] == len(fresh[0]) + len(fresh[1])
    assert counts[4] == sum(map(len, fresh[2:]))


def test_without_replay_an_update_learns_from_its_own_iteration():
    one, two = make().learn(1), make(replay_iterations=3).learn(1)
    assert_same_weights(one, two)  # nothing to replay yet
    lengths = []

    class Watched(CFGRL):
        def train(self):
            lengths.append(len(self.windows))

    Watched("MlpPolicy", vec(SeedEnv, 2), **SMALL).learn(10**6, max_iterations=3)
    assert lengths == [24, 24, 24]  # 2 groups of 3 episodes of 4 steps


def test_max_iterations_ends_before_total_timesteps():
    algorithm = make().learn(10**9, max_iterations=2)
    assert algorithm.iteration == 2
    assert algorithm.statistics.num_episodes == 12
    assert make().learn(1, max_iterations=5).iteration == 1


def test_collection_is_guided_as_asked_and_the_policys_own_scale_stays():
    actions = []
    for cfg_scale in (None, 1.0, 50.0):
        algorithm = make(cfg_scale=cfg_scale).learn(1)
        assert algorithm.policy.cfg_scale == 1.0
        actions.append(algorithm.windows.model_actions[0])
    assert torch.equal(actions[0], actions[1])
    assert not torch.allclose(actions[0], actions[2])


def test_shorter_strides_make_more_windows():
    env = vec(QueueEnv, 2, chunk=4, observation_stride=1)
    counts = [len(make(env, window_stride=n).learn(1).windows) for n in (1, 2, 4, 8)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4
    with pytest.raises(ValueError, match="observation_stride=2"):
        make(vec(QueueEnv, 2, chunk=4), window_stride=2).learn(1)


@pytest.mark.parametrize(
    "label_source", ["episode_rloo", "window_rloo", "window_return", "success", "value"]
)
def test_every_label_source_learns(label_source):
    algorithm = make(vec(QueueEnv, 2), label_source=label_source).learn(1)
    assert algorithm.windows.labels.unique().tolist() == [-1, 1]


# SB3 --------------------------------------------------------------------------------------------


class Spy(BaseCallback):
    def __init__(self, stop_after=None):
        super().__init__()
        self.stop_after, self.events = stop_after, []

    def _on_training_start(self):
        self.events.append("training_start")

    def _on_rollout_start(self):
        self.events.append("rollout_start")

    def _on_step(self):
        self.events.append("step")
        assert len(self.locals["dones"]) == len(self.locals["infos"]) == 2
        assert len(self.locals["actions"]) == len(self.locals["new_obs"]) == 2
        return self.n_calls != self.stop_after

    def _on_rollout_end(self):
        self.events.append("rollout_end")

    def _on_training_end(self):
        self.events.append("training_end")


def test_timesteps_never_fall_though_what_was_not_decided_on_is_left_out():
    """With more environments than a group needs, episodes run that no group is decided by."""
    counts: list[int] = []
    env = vec(QueueEnv, 5)
    algorithm = make(env, max_groups_tried=6, groups_per_iteration=2, early_stop_percentage=0.5)
    algorithm.learn(60, callback=lambda own, _: not counts.append(own["self"].num_timesteps))
    assert algorithm.iteration > 1
    assert counts == sorted(counts)
    assert counts[-1] == algorithm.num_timesteps


@pytest.mark.parametrize("asked", [1, 60])
def test_the_progress_bar_ends_where_the_timesteps_do(asked):
    algorithm = make(vec(QueueEnv, 5)).learn(20)
    begun_at, bars = algorithm.num_timesteps, []

    def look(local, _):
        (bar,) = [c.pbar for c in local["callback"].callbacks if isinstance(c, TimestepsBar)]
        bars.append(bar)
        return True

    algorithm.learn(asked, callback=look, reset_num_timesteps=False, progress_bar=True)
    assert bars[-1].n == algorithm.num_timesteps - begun_at
    assert bars[-1].total == max(asked, bars[-1].n)


def test_callbacks_see_every_step_of_the_vector_of_environments():
    spy = Spy()
    algorithm = make().learn(1, callback=spy)
    steps = algorithm.num_timesteps // 2
    middle = ["step"] * steps
    assert spy.events == [
        "training_start", "rollout_start", *middle, "rollout_end", "training_end"
    ]  # fmt: skip


def test_a_callback_stops_training():
    spy = Spy(stop_after=3)
    algorithm = make().learn(1000, callback=spy)
    assert algorithm.num_timesteps == 6
    assert algorithm._n_updates == 0
    assert spy.events == ["training_start", "rollout_start", *["step"] * 3, "training_end"]


def test_sb3_callbacks_and_progress_bar_work(tmp_path):
    evaluate = EvalCallback(SeedEnv(), eval_freq=10, n_eval_episodes=2, verbose=0)
    save = CheckpointCallback(save_freq=10, save_path=str(tmp_path), name_prefix="cfgrl")
    make().learn(60, callback=[evaluate, save], progress_bar=True)
    assert np.isfinite(evaluate.last_mean_reward)
    assert CFGRL.load(sorted(tmp_path.glob("*.zip"))[0], device="cpu").num_timesteps == 20


def test_tensorboard_gets_a_folder_of_events(tmp_path):
    make(tensorboard_log=str(tmp_path)).learn(1)
    assert list((tmp_path / "CFGRL_1").glob("events*"))


def test_every_iteration_logs_its_rollout_with_its_update():
    algorithm = make(vec(QueueEnv, 2, goal=1.0))
    recorder = record(algorithm)
    algorithm.learn(80)
    assert len(recorder.dumps) > 2
    wanted = {
        "rollout": "ep_rew_mean ep_len_mean success_rate positive_share null_share groups_kept "
        "groups_discarded control_steps episodes iteration_success_rate",
        "train": "loss loss_positive loss_null dropout_rate dropout_count conditioned_count "
        "grad_norm guidance_gap learning_rate n_updates",
        "time": "fps control_steps_per_second seconds_simulation seconds_inference seconds_update "
        "iterations total_timesteps",
    }
    last = recorder.dumps[-1]
    for group, names in wanted.items():
        for name in names.split():
            assert f"{group}/{name}" in last
    assert any(f"rollout/success_rate/task_{task}" in last for task in (0, 2))
    updates = [dump["train/n_updates"] for dump in recorder.dumps]
    assert updates == sorted(set(updates))
    assert updates[-1] == algorithm._n_updates
    assert last["time/total_timesteps"] == algorithm.num_timesteps
    assert (
        last["train/dropout_rate"] == last["train/dropout_count"] / last["train/conditioned_count"]
    )
    episodes = [dump["rollout/episodes"] for dump in recorder.dumps]
    assert all(new - old >= 6 for old, new in zip([0, *episodes], episodes, strict=False))
    # At most 3 control steps for each chunk, and at least 1.
    assert algorithm.num_timesteps < last["rollout/control_steps"] <= 3 * algorithm.num_timesteps


def test_the_last_iteration_is_logged_whatever_the_interval():
    algorithm = make()
    recorder = record(algorithm)
    algorithm.learn(80, log_interval=100)
    assert [dump["train/n_updates"] for dump in recorder.dumps] == [algorithm._n_updates]


def test_the_learning_rate_follows_its_schedule_and_stays_positive():
    algorithm = make(learning_rate=lambda progress: progress / 1000)
    recorder = record(algorithm)
    algorithm.learn(80)
    rates = [dump["train/learning_rate"] for dump in recorder.dumps]
    assert len(rates) == 4
    assert rates[0] == 0.001
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    assert algorithm.policy.optimizer.param_groups[0]["lr"] == rates[-1]


def test_another_environment_can_be_set():
    algorithm = make().learn(1)
    env = vec(SeedEnv, 2)
    algorithm.set_env(env)
    algorithm.learn(1, reset_num_timesteps=False)
    assert env.envs[0].get_total_steps() > 0


def test_subprocesses_work():
    env = SubprocVecEnv([QueueEnv] * 2)
    try:
        algorithm = make(env).learn(1)
        assert_same_weights(algorithm, make(vec(QueueEnv, 2)).learn(1))
    finally:
        env.close()


def test_a_registered_environment_can_be_named():
    algorithm = CFGRL(
        "MlpPolicy", "Pendulum-v1", **{**SMALL, "groups_per_iteration": 1, "n_epochs": 1}
    )
    assert algorithm.learn(1)._n_updates > 0


def test_images_reach_the_policy_as_the_environment_gives_them():
    class Images(gym.Env):
        observation_space = spaces.Dict({"image": spaces.Box(0, 255, (8, 9, 3), np.uint8)})
        action_space = spaces.Box(-1, 1, (1,), np.float32)

    env = CFGRL._wrap_env(Images())
    assert env.observation_space == Images.observation_space


def test_importing_the_algorithms_leaves_transformers_alone():
    code = "import sys, cfgrl_gym.algorithms; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rloo_batch_size", 1),
        ("groups_per_iteration", 0),
        ("n_epochs", 0),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("dropout_prob", -0.1),
        ("dropout_prob", 1.1),
        ("early_stop_percentage", 0.0),
        ("early_stop_percentage", 1.5),
        ("max_groups_tried", 1),
        ("label_source", "episode"),
        ("negatives", "none"),
        ("window_stride", 0),
        ("replay_iterations", -1),
        ("max_grad_norm", 0),
        ("max_grad_norm", float("nan")),
        ("stats_window_size", 0),
        ("enable_dynamic_sampling", "no"),
        ("learning_rate", "fast"),
        ("learning_rate", -1e-3),
        ("seed", -1),
        ("seed", 1.5),
        ("verbose", "much"),
        ("policy_kwargs", {"net_arch": []}),
        ("policy_kwargs", {"net_arch": [0]}),
        ("policy_kwargs", {"cfg_scale": float("nan")}),
        ("policy_kwargs", {"ema_decay": "slow"}),
        ("policy_kwargs", {"ema_decays": 0.9}),
    ],
)
def test_parameters_out_of_range_are_refused_by_name_however_they_are_given(name, value, tmp_path):
    wanted = next(iter(value)) if isinstance(value, dict) else name
    with pytest.raises(ValueError, match=wanted):
        make(**{name: value})
    make().save(tmp_path / "cfgrl")
    env = vec(SeedEnv, 2)
    for given in ({name: value}, {"custom_objects": {name: value}}):
        with pytest.raises(ValueError, match=wanted):
            CFGRL.load(tmp_path / "cfgrl", env=env, device="cpu", **given)
    if name in vars(make()) and name not in ("learning_rate", "policy_kwargs", "seed"):
        algorithm = make()
        setattr(algorithm, name, value)
        with pytest.raises(ValueError, match=wanted):
            algorithm.learn(1)


@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_number_of_steps_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="total_timesteps"):
        make().learn(value)
    with pytest.raises(ValueError, match="max_iterations"):
        make().learn(1, max_iterations=-1)


def test_no_log_interval_logs_nothing():
    for interval in (None, 0):
        algorithm = make()
        recorder = record(algorithm)
        algorithm.learn(1, log_interval=interval)
        assert not recorder.dumps


def test_a_missing_environment_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="no environment to learn in"):
        CFGRL("MlpPolicy", None)
    make().save(tmp_path / "cfgrl")
    loaded = CFGRL.load(tmp_path / "cfgrl", device="cpu")
    with pytest.raises(ValueError, match=r"load\(path, env=env\) or set_env\(env\)"):
        loaded.learn(1)
    loaded.set_env(vec(SeedEnv, 2))
    loaded.learn(1)


@pytest.mark.parametrize("name", ["MultiInputPolicy", "CnnPolicy", "Mlp"])
def test_an_unknown_policy_is_refused_with_those_that_there_are(name):
    with pytest.raises(ValueError, match="'MlpPolicy', 'Pi0Policy'"):
        CFGRL(name, vec(SeedEnv, 2))


@pytest.mark.parametrize("wrapper", [VecNormalize, lambda env: VecFrameStack(env, 2)])
def test_wrappers_that_change_what_is_seen_are_refused(wrapper):
    with pytest.raises(ValueError, match=r"VecNormalize|VecFrameStack"):
        make(wrapper(vec(SeedEnv)))


def test_a_monitor_of_the_vector_is_welcome():
    assert make(VecMonitor(vec(SeedEnv, 2))).learn(1)._n_updates > 0


class Spaces(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


VECTOR, ACTION = spaces.Box(-1, 1, (2,), np.float32), spaces.Box(-1, 1, (1,), np.float32)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (VECTOR, spaces.Discrete(2), "continuous"),
        (VECTOR, spaces.Box(-1, 1, (2, 2, 2), np.float32), "continuous"),
        (VECTOR, spaces.Box(-np.inf, 1, (1,), np.float32), "finite"),
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), ACTION, "images"),
        (spaces.Dict({"a": VECTOR}), ACTION, "MlpPolicy takes a Box .*Use 'Pi0Policy'"),
        (VECTOR, spaces.Box(-3, 3, (1,), np.int64), "real numbers"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(observation_space, action_space, message):
    env = DummyVecEnv([lambda: Spaces(observation_space, action_space)])
    with pytest.raises(ValueError, match=message):
        make(env)


def test_environments_must_offer_the_same_tasks():
    env = DummyVecEnv([lambda: QueueEnv(tasks=(0,)), lambda: QueueEnv(tasks=(2,))])
    with pytest.raises(ValueError, match="same tasks"):
        make(env).learn(1)
