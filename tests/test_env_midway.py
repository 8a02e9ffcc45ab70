"""Episodes that go on from a moment of another one, against that one, uninterrupted."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import SETTLE, assert_same_arrays, downward_actions
from gymnasium.error import ResetNeeded
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from cfgrl_gym import WorkerVecEnv
from cfgrl_gym.demos.expert import PickPlaceExpert
from cfgrl_gym.envs.exactness import touches
from cfgrl_gym.envs.fast_simulator import FastSimulator
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.plain_simulator import PlainSimulator
from cfgrl_gym.envs.simulator import LIBERO_SEED, Simulator
from cfgrl_gym.envs.snapshots import Snapshot
from cfgrl_gym.envs.suites import load_init_states, select_tasks

DRAWER, KNOB = "wooden_cabinet_1_middle_level", "flat_stove_1_button"


@dataclass(frozen=True)
class Original:
    """An uninterrupted episode; index 0 is after the reset, as everywhere here."""

    actions: list[np.ndarray]
    rows: list[dict[str, np.ndarray]]  # observation, state, reward, success, ended
    snapshots: list[Snapshot | None]
    touches: list[int]  # contacts of the robot with other things
    moving: list[float]  # speed of the drawer's joint, where there is one


def row(env: LiberoEnv, result: tuple[Any, ...]) -> dict[str, np.ndarray]:
    observation, reward, terminated, truncated, info = result
    flags = (reward, terminated, truncated, info["success"])
    return {**observation, "state": env.sim_state(), "flags": np.array(flags, dtype=np.float64)}


def started(result: tuple[Any, dict[str, Any]]) -> tuple[Any, ...]:
    """What a reset gives, as a step's result."""
    return (result[0], 0.0, False, False, result[1])


def play(env: LiberoEnv, next_action: Callable[[int], np.ndarray], **options: Any) -> Original:
    """Play an episode to its end."""
    episode = Original([], [row(env, started(env.reset(options=options)))], [], [], [])

    def note() -> None:
        episode.snapshots.append(None if env._over else env.snapshot())
        episode.touches.append(touches(env.simulator))
        names = {env.simulator.model.joint(i).name for i in range(env.simulator.model.njnt)}
        speed = env.simulator.data.joint(DRAWER).qvel[0] if DRAWER in names else 0.0
        episode.moving.append(abs(float(speed)))

    note()
    while not env._over:
        episode.actions.append(next_action(len(episode.actions)))
        episode.rows.append(row(env, env.step(episode.actions[-1])))
        note()
    return episode


def play_others(env: LiberoEnv) -> None:
    """Leave as many traces as possible."""
    for number in range(2):
        env.reset(options={"init_state_id": 20 + number})
        for action in downward_actions(4, seed=number):
            env.step(action)


def assert_goes_on(env: LiberoEnv, original: Original, moment: int) -> None:
    snapshot = pickle.loads(pickle.dumps(original.snapshots[moment]))
    result = started(env.reset(options={"snapshot": snapshot}))
    for step in range(moment, len(original.rows)):
        if step > moment:
            result = env.step(original.actions[step - 1])
        assert_same_arrays(original.rows[step], row(env, result))
    assert env._over


# A grasp, and a drawer and a stove that move -----------------------------------------------------


@pytest.fixture(scope="module")
def grasp() -> Iterator[tuple[LiberoEnv, Original]]:
    """The expert puts a can into the basket; libero_object task 0."""
    with closing(LiberoEnv("libero_object", 0, image_size=16, settle_steps=2)) as env:
        env.reset(options={"init_state_id": 1})
        expert = PickPlaceExpert(env.simulator)
        yield env, play(env, lambda _: expert.act(), init_state_id=1)


@pytest.fixture(scope="module")
def drawer_env() -> Iterator[LiberoEnv]:
    arguments: dict[str, Any] = {"image_size": 16, "settle_steps": 0, "max_episode_steps": 24}
    with closing(LiberoEnv("libero_goal", 0, **arguments)) as env:
        yield env


def pulled(env: LiberoEnv) -> Callable[[int], np.ndarray]:
    """Random pushes, without rotation in the end, while a force opens the drawer and the stove."""
    actions = downward_actions(24, seed=2)
    actions[12:, 3:6] = 0  # the controller keeps the orientation that it was given before

    def act(step: int) -> np.ndarray:
        if step == 1:  # stays until the next reset
            env.simulator.data.joint(DRAWER).qfrc_applied[:] = -6.0
            env.simulator.data.joint(KNOB).qfrc_applied[:] = 5.0  # on from step 12
        return actions[step]

    return act


@pytest.fixture(scope="module")
def opening(drawer_env: LiberoEnv) -> Original:
    return play(drawer_env, pulled(drawer_env), init_state_id=4)


@pytest.mark.parametrize("where", ["reset", "approach", "grasped", "just before the end"])
def test_an_episode_goes_on_while_an_object_is_grasped(
    grasp: tuple[LiberoEnv, Original], where: str
) -> None:
    env, original = grasp
    assert original.rows[-1]["flags"].tolist() == [1.0, 1.0, 0.0, 1.0]  # a success
    end = len(original.actions)
    grasped = [step for step, count in enumerate(original.touches) if count >= 2]
    moments = {"reset": 0, "approach": 7, "grasped": grasped[len(grasped) // 2]}
    play_others(env)
    assert_goes_on(env, original, moments.get(where, end - 1))


@pytest.mark.parametrize("moment", [0, 1, 2, 10, 15, 23])
def test_an_episode_goes_on_while_a_drawer_and_a_stove_move(
    drawer_env: LiberoEnv, opening: Original, moment: int
) -> None:
    assert len(opening.actions) == 24
    assert min(opening.moving[10:20]) > 0.01  # metres per second
    play_others(drawer_env)
    if moment > 1:
        assert_goes_on(drawer_env, opening, moment)
        assert drawer_env.simulator.data.joint(KNOB).qpos[0] > 0.5  # the stove is on
        return
    act = pulled(drawer_env)  # before the force is applied
    result = started(drawer_env.reset(options={"snapshot": opening.snapshots[moment]}))
    for step in range(moment, len(opening.rows)):
        if step > moment:
            result = drawer_env.step(act(step - 1))
        assert_same_arrays(opening.rows[step], row(drawer_env, result))


def test_a_changed_bit_of_what_is_kept_changes_the_rest(
    drawer_env: LiberoEnv, opening: Original
) -> None:
    snapshot = opening.snapshots[15]
    assert snapshot is not None
    last = snapshot.simulator.last_step
    assert last is not None
    assert last.goal_ori is not None
    changed = {
        "goal": replace(last, goal_ori=last.goal_ori[:, [1, 0, 2]]),
        "gripper": replace(last, gripper=last.gripper + 0.01),
        "clock": replace(last, clock=last.clock + 0.01),
    }
    for name, step in changed.items():
        simulator = replace(snapshot.simulator, last_step=step)
        given = replace(snapshot, simulator=simulator)
        rows = [row(drawer_env, started(drawer_env.reset(options={"snapshot": given})))]
        rows += [row(drawer_env, drawer_env.step(action)) for action in opening.actions[15:17]]
        wanted = opening.rows[15:18]
        same = [
            all(np.array_equal(w[key], g[key]) for key in w)
            for w, g in zip(wanted, rows, strict=True)
        ]
        assert not all(same), name


def test_frames_for_people_go_on_too(drawer_env: LiberoEnv, opening: Original) -> None:
    drawer_env.reset(options={"snapshot": opening.snapshots[14]})
    drawer_env.step(opening.actions[14])
    wanted = drawer_env.simulator.frame()
    drawer_env.reset(options={"snapshot": opening.snapshots[15]})
    np.testing.assert_array_equal(drawer_env.simulator.frame(), wanted)


def test_a_random_placement_goes_on_with_its_fixtures(drawer_env: LiberoEnv) -> None:
    drawer_env.init_states = "random"
    try:
        actions = downward_actions(24, seed=5)
        original = play(drawer_env, lambda step: actions[step], init_state_id=77)
        drawer_env.reset(options={"init_state_id": 78})
        assert_goes_on(drawer_env, original, 9)
        drawer_env.reset(options={"init_state_id": 78})
        assert_goes_on(drawer_env, original, 0)
    finally:
        drawer_env.init_states = "benchmark"


# LIBERO's own simulator --------------------------------------------------------------------------


def moments(simulator: Simulator, actions: np.ndarray, stove: bool) -> list[dict[str, Any]]:
    """What the simulator gives now and after each action, with a snapshot of each moment."""
    given: list[dict[str, Any]] = []
    success = False
    for step in range(len(actions) + 1):
        if step:
            success = simulator.advance(actions[step - 1])
        given.append({"success": success, "state": simulator.state(), **simulator.observe()})
        given[-1] |= simulator.images() | {"snapshot": simulator.snapshot()}
        if stove and step == 1:
            simulator.data.joint(KNOB).qfrc_applied[:] = 20.0
    return given


def test_both_simulators_go_on_from_their_own_snapshots_and_from_each_others() -> None:
    task = select_tasks("libero_goal", 7)[0]  # turn on the stove
    states = load_init_states("libero_goal", 7)
    actions = downward_actions(8, seed=3)
    actions[4:, 3:6] = 0
    with closing(FastSimulator(task, 32)) as fast, closing(PlainSimulator(task, 32)) as plain:
        assert fast.model_checksum() == plain.model_checksum()
        originals = []
        for simulator in (plain, fast):
            simulator.reset(LIBERO_SEED, states[2])
            originals.append(moments(simulator, actions, stove=True))
        successes = [moment["success"] for moment in originals[0]]
        lit = successes.index(True)  # LIBERO draws the flame from the next step on
        assert 1 < lit < len(actions)
        snapshots = [[moment.pop("snapshot") for moment in one] for one in originals]
        for one, other in zip(*originals, strict=True):
            assert_same_arrays(one, other)
        for simulator, moment in ((plain, lit), (plain, lit + 1), (fast, lit), (fast, lit + 1)):
            for given in snapshots:
                simulator.restore(LIBERO_SEED, states[2], given[moment])
                for number, again in enumerate(moments(simulator, actions[moment:], False)):
                    del again["snapshot"], again["success"]  # a reset has none
                    wanted = dict(originals[0][moment + number])
                    del wanted["success"]
                    assert_same_arrays(wanted, again)
        plain.robosuite_env.robots[0].controller.interpolator_pos = "linear"
        with pytest.raises(RuntimeError, match=r"no snapshot can be taken.*interpolators"):
            plain.snapshot()


# Wrappers and vectors ----------------------------------------------------------------------------

CHUNKED: dict[str, Any] = {"image_size": 16, "settle_steps": 2, "chunk_size": 3}


def chunked() -> gym.Env:
    return gym.make("cfgrl_gym:LiberoChunked-v0", max_episode_steps=9, **CHUNKED)


def test_chunks_give_the_snapshot_of_their_last_step_and_make_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    original = Simulator.snapshot
    monkeypatch.setattr(Simulator, "snapshot", lambda self: made.append(1) or original(self))
    chunks = downward_actions(9).reshape(3, 3, 7).astype(np.float32)
    with closing(chunked()) as env:
        _, info = env.reset(options={"init_state_id": 3})
        assert "snapshot" not in info
        assert not made
        env.get_wrapper_attr("give_snapshots")(True)
        _, info = env.reset(options={"init_state_id": 3})
        given, infos = [], [info]
        for chunk in chunks:
            observation, *_, info = env.step(chunk)
            given.append(observation)
            infos.append(info)
        assert [info["snapshot"].steps for info in infos[:3]] == [0, 3, 6]
        assert "snapshot" not in infos[3]  # the episode is over
        assert len(made) == 3
        env.get_wrapper_attr("give_snapshots")(False)
        env.reset(options={"init_state_id": 5})
        start, info = env.reset(options={"snapshot": infos[1]["snapshot"]})
        assert "snapshot" not in info
        assert_same_arrays(start, given[0])
        *_, truncated, info = env.step(chunks[1])
        assert not truncated
        observation, *_, truncated, info = env.step(chunks[2])
        assert truncated  # 3 of 9 control steps were over
        assert_same_arrays(observation, given[2])


def test_vectors_in_this_process_and_in_another_go_on_from_a_queued_snapshot() -> None:
    chunks = downward_actions(6).reshape(2, 1, 3, 7).astype(np.float32)
    env: VecEnv
    with closing(DummyVecEnv([chunked])) as env:
        env.env_method("give_snapshots", True)
        env.env_method("queue_episode", init_state_id=3)
        env.reset()
        _, _, _, (info,) = env.step(chunks[0])
        wanted, *_ = env.step(chunks[1])
        assert env.env_method("snapshot")[0].steps == 6
    assert len(pickle.dumps(info["snapshot"])) < 10_000
    for vector in (DummyVecEnv, partial(WorkerVecEnv, workers=1)):
        with closing(vector([chunked])) as env:
            env.env_method("queue_episode", snapshot=info["snapshot"])
            env.reset()
            given, *_ = env.step(chunks[1])
            assert_same_arrays(wanted, given)  # type: ignore[arg-type]


# Starts and refusals -----------------------------------------------------------------------------


@pytest.fixture
def snapshot(can_env: LiberoEnv) -> Snapshot:
    """Of the third control step of an episode that then goes on."""
    can_env.reset(seed=0, options={"init_state_id": 6})
    for action in downward_actions(3):
        can_env.step(action)
    return can_env.snapshot()


def test_a_queued_snapshot_waits_its_turn_and_shifts_no_draw(
    can_env: LiberoEnv, snapshot: Snapshot
) -> None:
    drawn = [can_env.reset(seed=3 if i == 0 else None)[1]["init_state_id"] for i in range(3)]
    can_env.queue_episode(init_state_id=9)
    can_env.queue_episode(snapshot=snapshot)
    starts = [can_env.reset(seed=3 if i == 0 else None)[1]["init_state_id"] for i in range(3)]
    assert starts == [9, 6, drawn[2]]


def test_the_time_limit_counts_the_steps_before_the_snapshot(
    can_env: LiberoEnv, snapshot: Snapshot
) -> None:
    can_env.max_episode_steps = 5
    can_env.reset(options={"snapshot": snapshot})
    assert [can_env.step(SETTLE)[3] for _ in range(2)] == [False, True]
    with pytest.raises(ResetNeeded, match="nothing to go on from"):
        can_env.snapshot()


def test_there_is_no_snapshot_before_a_reset_and_none_of_broken_physics(
    can_env: LiberoEnv, snapshot: Snapshot
) -> None:
    with pytest.raises(ResetNeeded, match="none has begun"):
        LiberoEnv("libero_object", 0).snapshot()
    with pytest.raises(ValueError, match="enabled must be one of"):
        can_env.give_snapshots("yes")  # type: ignore[arg-type]
    can_env.simulator.data.qvel[0] = np.nan
    with pytest.raises(RuntimeError, match="blown up"):
        can_env.snapshot()


def with_state(snapshot: Snapshot, state: Any) -> Snapshot:
    return replace(snapshot, simulator=replace(snapshot.simulator, state=state))


def with_step(snapshot: Snapshot, **changes: Any) -> Snapshot:
    step = snapshot.simulator.last_step
    assert step is not None
    changed = replace(step, **changes)
    return replace(snapshot, simulator=replace(snapshot.simulator, last_step=changed))


def with_nan(snapshot: Snapshot) -> Snapshot:
    state = snapshot.simulator.state.copy()
    state[20] = np.nan
    return with_state(snapshot, state)


DAMAGES: dict[str, tuple[Callable[[Snapshot], Any], str]] = {
    "something else": (lambda s: {"steps": 3}, "snapshot must be a Snapshot; got"),
    "suite": (lambda s: replace(s, suite="libero_goal"), "episode with suite='libero_goal'"),
    "task": (lambda s: replace(s, task_id=4), "task_id 4 is not one of this environment's tasks"),
    "settle": (lambda s: replace(s, settle_steps=20), "settle_steps=20, this environment has 2"),
    "kind": (lambda s: replace(s, init_states="random"), "init_states='random'"),
    "start": (lambda s: replace(s, init_state_id=50), "init_state_id must be in 0 to 49; got 50"),
    "finished": (lambda s: replace(s, steps=280), "nothing is left of it"),
    "negative": (lambda s: replace(s, steps=-1), "damaged: steps is missing"),
    "nan": (with_nan, r"damaged: simulator\.state is"),
    "shape": (lambda s: with_state(s, s.simulator.state[None]), r"simulator\.state.*are missing"),
    "text": (lambda s: with_state(s, "state"), r"damaged: simulator\.state"),
    "shorter": (
        lambda s: with_step(s, before=s.simulator.state[1:]),
        r"damaged: last_step\.before",
    ),
    "goal": (lambda s: with_step(s, goal_ori=np.zeros(3)), r"damaged: last_step\.goal_ori"),
    "infinite": (lambda s: with_step(s, action=np.full(7, np.inf)), r"last_step\.action"),
    "clock": (lambda s: with_step(s, clock=np.nan), r"last_step\.clock"),
    "no step": (
        lambda s: replace(s, simulator=replace(s.simulator, last_step=None)),
        r"damaged: simulator\.last_step",
    ),
    "empty": (lambda s: Snapshot.__new__(Snapshot), "damaged: suite, init_states, simulator"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cant_be_gone_on_from_is_refused_and_the_episode_runs_on(
    can_env: LiberoEnv, snapshot: Snapshot, damage: str
) -> None:
    change, message = DAMAGES[damage]
    state = can_env.sim_state()
    for begin in (
        lambda given: can_env.reset(seed=1, options={"snapshot": given}),
        lambda given: can_env.queue_episode(snapshot=given),
    ):
        with pytest.raises(ValueError, match=message):
            begin(change(snapshot))
    assert not can_env._queue
    np.testing.assert_array_equal(can_env.sim_state(), state)
    can_env.step(SETTLE)


def test_a_snapshot_comes_alone_and_is_of_the_installed_model(
    can_env: LiberoEnv, snapshot: Snapshot
) -> None:
    state = can_env.sim_state()
    for other in ({"task_id": 0}, {"init_state_id": 6}):
        with pytest.raises(ValueError, match="without 'task_id' and 'init_state_id'"):
            can_env.reset(options={"snapshot": snapshot, **other})
        with pytest.raises(ValueError, match="without 'task_id' and 'init_state_id'"):
            can_env.queue_episode(snapshot=snapshot, **other)
    for wrong in (
        replace(snapshot, model=snapshot.model ^ 1),
        with_step(with_state(snapshot, np.zeros(9)), before=np.zeros(9)),
    ):
        with pytest.raises(ValueError, match="of another model of libero_object task 0"):
            can_env.reset(options={"snapshot": wrong})
    np.testing.assert_array_equal(can_env.sim_state(), state)
    can_env.step(SETTLE)


def test_a_snapshot_is_not_changed_by_what_begins_there(
    can_env: LiberoEnv, snapshot: Snapshot
) -> None:
    before = pickle.dumps(snapshot)
    for _ in range(2):
        can_env.reset(options={"snapshot": snapshot})
        for action in downward_actions(2, seed=4):
            can_env.step(action)
    assert pickle.dumps(snapshot) == before


def test_a_state_that_was_set_by_hand_is_part_of_the_snapshot(can_env: LiberoEnv) -> None:
    can_env.reset(options={"init_state_id": 6})
    can_env.step(SETTLE)
    data = can_env.simulator.data
    data.qvel[:] += 0.01
    data.xfrc_applied[5, 2] = 0.5
    snapshot = can_env.snapshot()
    wanted = [can_env.sim_state()]
    for action in downward_actions(2):
        can_env.step(action)
        wanted.append(can_env.sim_state())
    can_env.reset(options={"snapshot": snapshot})
    assert_same_arrays({"state": wanted[0]}, {"state": can_env.sim_state()})
    for action, state in zip(downward_actions(2), wanted[1:], strict=True):
        can_env.step(action)
        np.testing.assert_array_equal(can_env.sim_state(), state)
