"""Updates beside the collection of the next episodes (`overlap=True`)."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cfgrl_envs import Rows
from pi0_support import make_observation, make_policy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from test_prefix_cache import learn
from test_resume import Saving, all_state, assert_equal_states, go_on, make

from cfgrl_gym import CFGRL
from cfgrl_gym.algorithms.flow import NonFiniteError
from cfgrl_gym.algorithms.saving.checkpoints import CheckpointStore, load_checkpoint


def weights_of(policy: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def weights(model: CFGRL) -> dict[str, torch.Tensor]:
    return weights_of(model.policy)


def without_average(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "average" not in name}


class SlowUpdate(CFGRL):
    """Its updates wait until the test lets them go on."""

    go_on = threading.Event()
    threads: ClassVar[list[threading.Thread]] = []

    def train(self) -> None:
        self.threads.append(threading.current_thread())
        assert self.go_on.wait(60)
        super().train()


class At(BaseCallback):
    """Does something at the first step of an iteration, or at every one."""

    def __init__(self, iteration: int, do: Callable[[Any], Any], once: bool = True) -> None:
        super().__init__()
        self.iteration, self.do, self.once, self.done = iteration, do, once, False

    def _on_step(self) -> bool:
        if self.model.iteration != self.iteration or self.done:  # type: ignore[attr-defined]
            return True
        self.done = self.once
        return self.do(self.model) is not False


def test_episodes_lack_one_update_and_updates_are_those_of_their_windows() -> None:
    start = weights(make(overlap=True))
    acting: list[dict[str, torch.Tensor]] = []
    model = make(overlap=True, replay_iterations=0)
    look = [At(i, lambda model: acting.append(weights(model))) for i in range(3)]
    model.learn(10**6, look, max_iterations=3)
    # The first two collections act with the same policy, the third with what the first taught.
    assert_equal_states(without_average(acting[0]), without_average(start))
    assert_equal_states(acting[1], acting[0])
    ordinary = make(replay_iterations=0).learn(10**6, max_iterations=1)
    ordinary.policy.set_training_mode(False)
    assert_equal_states(acting[2], weights(ordinary))
    # So does the update of the third, which has nothing beside it.
    updates = make(replay_iterations=0).learn(10**6, max_iterations=3)._n_updates
    assert model._n_updates == updates
    with pytest.raises(AssertionError):
        assert_equal_states(weights(model), acting[2])


def test_the_update_runs_beside_the_collection() -> None:
    steps = 0

    def let_go_on_later(model: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            SlowUpdate.go_on.set()

    model = make(SlowUpdate, overlap=True)
    model.learn(10**6, At(1, let_go_on_later, once=False), max_iterations=2)
    assert steps > 5
    assert len(SlowUpdate.threads) == 2
    assert threading.main_thread() not in SlowUpdate.threads


def test_the_log_says_how_far_behind_the_policy_was() -> None:
    model, rows = make(overlap=True), Rows()
    model.set_logger(Logger(None, [rows]))
    model.learn(10**6, max_iterations=3)
    assert [row.get("rollout/updates_behind") for row in rows.rows] == [0, 1, 1, None]
    counts = [row.get("train/n_updates", 0) for row in rows.rows]
    assert counts[0] == 0
    assert counts == sorted(set(counts))
    assert counts[-1] == model._n_updates
    for row in rows.rows[1:]:
        assert {"train/loss", "train/guidance_gap", "time/seconds_waiting"} < set(row)
    ordinary, other = make(), Rows()
    ordinary.set_logger(Logger(None, [other]))
    ordinary.learn(10**6, max_iterations=1)
    assert "rollout/updates_behind" not in other.rows[0]


def test_a_training_that_stops_and_goes_on_gives_the_same_bits(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(model: Any) -> None:
        raise Stop

    options = {"overlap": True}
    reference = go_on(tmp_path / "whole", 6, **options)
    store = CheckpointStore(tmp_path / "parts")
    for iteration in (1, 3, 4):
        model = make(**options)
        done = store.iterations()
        if done:
            load_checkpoint(model, store.path(done[-1]))
        with pytest.raises(Stop):
            model.learn(
                10**6, [Saving(store), At(iteration, stop)], max_iterations=6,
                reset_num_timesteps=False,
            )  # fmt: skip
        assert store.iterations()[-1] == iteration
        assert model.untrained
        # As `cfgrl train` does on Ctrl-C: the state is the one from before the collection.
        saved = CheckpointStore(tmp_path / f"stopped{iteration}")
        model.num_timesteps = 0
        saved.save(model)
        states = [make(**options) for _ in range(2)]
        load_checkpoint(states[0], store.path(iteration))
        load_checkpoint(states[1], saved.path(iteration))
        states[0].num_timesteps = 0
        assert_equal_states(all_state(states[0]), all_state(states[1]))
    again = go_on(tmp_path / "parts", 6, **options)
    assert_equal_states(all_state(reference), all_state(again))
    ordinary = go_on(tmp_path / "ordinary", 6)
    with pytest.raises(AssertionError):
        assert_equal_states(all_state(reference), all_state(ordinary))


def test_callbacks_meet_the_policy_that_acts() -> None:
    """SB3's evaluations switch the policy to acting; an update must not notice."""
    model, undisturbed = make(overlap=True), make(overlap=True)

    def disturb(model: Any) -> None:
        for _ in range(20):
            model.policy.set_training_mode(True)
            model.predict(model.observation_space.sample()[None])

    class Disturb(BaseCallback):
        def _on_step(self) -> bool:
            disturb(self.model)
            self.model.policy.set_training_mode(False)
            return True

    model.learn(10**6, Disturb(), max_iterations=3)
    undisturbed.learn(10**6, max_iterations=3)
    assert_equal_states(all_state(model), all_state(undisturbed))


def test_who_stops_by_a_callback_has_learned_from_all_whole_iterations() -> None:
    stopped = make(overlap=True)
    stopped.learn(10**6, At(2, lambda model: False), max_iterations=9)
    assert not stopped.untrained
    whole = make(overlap=True).learn(10**6, max_iterations=2)
    assert_equal_states(weights(stopped), weights(whole))
    assert stopped.iteration == 2


def test_an_update_that_fails_changes_nothing() -> None:
    model = make(overlap=True, n_epochs=20)
    before = {}

    def spoil(model: Any) -> None:
        before.update(weights(model))
        model.windows.model_actions.fill_(float("nan"))

    class Spoil(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.model.iteration == 1:  # type: ignore[attr-defined]
                spoil(self.model)

        def _on_step(self) -> bool:
            return True

    with pytest.raises(NonFiniteError, match="steps in a row"):
        model.learn(10**6, Spoil(), max_iterations=3)
    assert_equal_states(weights(model), before)
    assert model.untrained
    assert model.iteration == 1
    assert model.statistics.num_episodes == 12


def test_the_guidance_scale_and_what_else_is_set_meanwhile_stays() -> None:
    model = make(overlap=True)
    model.learn(
        10**6, At(1, lambda model: setattr(model.policy, "cfg_scale", 2.5)), max_iterations=2
    )
    assert model.policy.cfg_scale == 2.5


@pytest.mark.parametrize("cfg_reference", ["start", "previous"])
def test_references_are_taken_over(cfg_reference: str) -> None:
    kwargs = {"net_arch": [32], "ema_decay": 0.9, "cfg_reference": cfg_reference}
    one = make(policy_kwargs=kwargs).learn(10**6, max_iterations=1)
    other = make(policy_kwargs=kwargs, overlap=True).learn(10**6, max_iterations=1)
    one.policy.set_training_mode(False)
    assert any("reference" in name for name in weights(other))
    assert_equal_states(weights(one), weights(other))


def test_a_policy_that_cannot_be_copied_is_refused_before_anything_runs() -> None:
    model = make(overlap=True)
    model.policy.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"this MlpPolicy can't be copied .* overlap=False"):
        model.learn(10**6, max_iterations=1)
    assert model.num_timesteps == 0


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap must be one of True, False"):
        make(overlap="yes")


# PI0 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["expert", "all", "lora"])
def test_a_copy_of_pi0_shares_what_does_not_train_and_nothing_else(trainable: str) -> None:
    if trainable == "lora":
        pytest.importorskip("peft")
    policy = make_policy(trainable=trainable, ema_decay=0.9, compile_denoising=True)
    copied = policy.copy_to_train()
    for (name, own), other in zip(policy.named_parameters(), copied.parameters(), strict=True):
        assert (own is other) == (not own.requires_grad), name
    assert policy.tokenizer is not copied.tokenizer  # the fast ones fail in two threads at once
    before = weights_of(policy)
    obs, ones = make_observation(2), torch.ones(2)
    noise = torch.zeros(2, policy.horizon, policy.action_width)
    copied.set_training_mode(True)
    is_pad = torch.zeros(2, policy.horizon, dtype=torch.bool)
    loss = copied.flow_matching_loss(obs, noise + 1, is_pad, ones.long(), ones / 2, noise)
    loss.sum().backward()
    copied.optimizer.step()
    copied.after_optimizer_step()
    gap = copied.guidance_gap(obs, noise + 1, ones / 2, noise)  # with the copy's own weights
    assert_equal_states(weights_of(policy), before)
    assert policy.optimizer.state_dict()["state"] == {}
    policy.take_over(copied)
    assert_equal_states(weights_of(policy), weights_of(copied))
    assert policy.optimizer.state_dict()["state"].keys() > {0}
    same = make_policy(trainable=trainable, ema_decay=0.9)  # not compiled
    same.load_state_dict(policy.state_dict())
    torch.testing.assert_close(same.guidance_gap(obs, noise + 1, ones / 2, noise), gap)


def test_pi0_learns_beside_a_collection_what_it_learns_after_it() -> None:
    """With a frozen VLM, whose prefixes the update computes itself."""
    (beside, _), (after, _) = learn(overlap=True), learn(prefix_memory=0)
    after.policy.set_training_mode(False)
    for a, b in zip(beside.policy.parameters(), after.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert beside._n_updates == after._n_updates > 0
    assert beside._prefixes.room == (0, 0)  # the copy has it, so that acting keeps none
