"""`OffScreenRenderEnv` in the place of LIBERO's: the same results, and what others do with it."""

import copy
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished

from cfgrl_gym.envs import OffScreenRenderEnv, fast_simulator, rendering
from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.simulator import IMAGE_KEYS
from cfgrl_gym.envs.suites import load_init_states, select_tasks
from cfgrl_gym.envs.upstream import UnknownUpstreamError

LIBEROS = import_libero("envs.env_wrapper").OffScreenRenderEnv
SIZE, STEPS = 48, 12
# Whose fixtures move at a reset, one with a flame; and one without either.
TASKS = [("libero_goal", 7), ("libero_object", 0)]


def arguments(suite: str = "libero_object", task_id: int = 0, **changed: Any) -> dict[str, Any]:
    (task,) = select_tasks(suite, task_id)
    sizes = {"camera_heights": SIZE, "camera_widths": SIZE}
    return {"bddl_file_name": str(task.bddl_file)} | sizes | changed


@pytest.fixture
def env() -> Iterator[Any]:
    env = OffScreenRenderEnv(**arguments())
    yield env
    if hasattr(env, "env"):
        env.close()


def global_generator() -> tuple[bytes, int]:
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    return np.asarray(keys).tobytes(), int(position)


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    """Equal in values, types and order."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_alike(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, f"{where}[{number}]")
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        np.testing.assert_array_equal(one, other, where)
    else:
        assert one == other, where


def protocol(make: Callable[..., Any], suite: str, task_id: int) -> list[Any]:
    """All that a program may see: several episodes of one environment, seeded once, with and
    without an initial state, a state set in the middle of an episode, frames and attributes."""
    states = load_init_states(suite, task_id)
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, 7))
    np.random.seed(5)  # noqa: NPY002
    env = make(**arguments(suite, task_id))
    seen: list[Any] = [global_generator(), env.language_instruction, env.obj_of_interest]
    env.seed(7)
    for episode in range(3):
        seen += [dict(env.reset()), env.get_sim_state(), global_generator()]
        if episode % 2:
            seen += [dict(env.set_init_state(states[episode])), env.get_sim_state()]
        for number, action in enumerate(actions):
            observation, *rest = env.step(list(action) if number % 2 else action)
            if number % 4 == 0:
                seen.append(dict(observation))
            seen += [rest, env.get_sim_state(), env.check_success(), env.env.timestep]
            if number == STEPS // 2:
                seen.append(dict(env.regenerate_obs_from_state(states[2])))
        seen += [env.sim.render(SIZE, SIZE, camera_name="frontview"), env.sim.data.xpos.copy()]
        seen += [dict(env.env._get_observations()), env.env.done, env.robots[0]._hand_pos]
    env.close()
    return seen


@pytest.mark.parametrize(("suite", "task_id"), TASKS)
def test_it_gives_what_libero_gives(suite: str, task_id: int) -> None:
    ours = protocol(OffScreenRenderEnv, suite, task_id)
    assert_alike(ours, protocol(LIBEROS, suite, task_id))


def test_images_are_of_their_moment_whenever_they_are_read(env: Any) -> None:
    env.seed(0)
    early = env.reset()
    at_once = {key: early[key].copy() for key in IMAGE_KEYS}
    moved = [env.step(np.ones(7))[0] for _ in range(6)]
    read = [{key: observation[key].copy() for key in IMAGE_KEYS} for observation in moved[::2]]
    env.seed(0)
    again = env.reset()
    assert_alike({key: again[key] for key in IMAGE_KEYS}, at_once)
    repeated = [env.step(np.ones(7))[0] for _ in range(6)]
    late = repeated[::2]
    env.reset()
    env.close()
    for observation, images in zip(late, read, strict=True):
        pickled = pickle.loads(pickle.dumps(observation))
        assert_alike({key: pickled[key] for key in IMAGE_KEYS}, images)
    assert not np.array_equal(read[0][IMAGE_KEYS[0]], read[-1][IMAGE_KEYS[0]])


def test_copies_and_other_readings_have_the_images(env: Any) -> None:
    observation = env.reset()
    readings = (
        *(copy.copy(observation), copy.deepcopy(observation), dict(observation)),
        *(dict(observation.items()), {**observation}, observation | {}),
        {key: observation.get(key) for key in observation},
        dict(zip(observation.keys(), observation.values(), strict=True)),
    )
    for reading in readings:
        for key in IMAGE_KEYS:
            assert reading[key].shape == (SIZE, SIZE, 3)
            np.testing.assert_array_equal(reading[key], observation[key])


def test_what_is_not_read_is_not_rendered(env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = []
    paint = rendering.render
    monkeypatch.setattr(rendering, "render", lambda *a, **k: rendered.append(a) or paint(*a, **k))
    observation = env.reset()
    observation, *_ = env.step(np.zeros(7))
    assert not rendered
    for _ in range(2):
        assert observation[IMAGE_KEYS[1]].any()
    assert len(rendered) == 1


VECTORS = """
import json
import numpy as np
from cfgrl_gym.envs import OffScreenRenderEnv
from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.upstream import UnknownUpstreamError
from cfgrl_gym.envs.suites import load_init_states

arguments = json.loads(ARGUMENTS)
venv = import_libero("envs.venv")
states = load_init_states("libero_object", 0)[:2]
both = []
kinds = (OffScreenRenderEnv, import_libero("envs.env_wrapper").OffScreenRenderEnv)
# The second renders in this process, after which no fork may follow.
for vectors in (venv.SubprocVectorEnv, venv.DummyVectorEnv):
    for kind in kinds:
        vector = vectors([lambda kind=kind: kind(**arguments)] * 2)
        vector.seed(3)
        vector.reset()
        vector.set_init_state(states)
        observations, rewards, dones, _ = vector.step(np.zeros((2, 7)))
        both.append([dict(each) for each in observations])
        assert rewards.tolist() == [0, 0] and not dones.any()
        vector.close()
    ours, theirs = both[-2:]
    for one, other in zip(ours, theirs, strict=True):
        assert list(one) == list(other)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], key)
"""


def test_libero_s_vectors_of_environments_work_with_it(run_python: Callable[..., Finished]) -> None:
    done = run_python(VECTORS.replace("ARGUMENTS", repr(json.dumps(arguments()))))
    assert done.code == 0, done.stderr


def test_what_is_not_known_to_be_exact_is_libero_s_own(recwarn: Any) -> None:
    with pytest.warns(UserWarning, match="LIBERO's own speed: camera_depths is True"):
        env = OffScreenRenderEnv(**arguments(camera_depths=True))
    env.seed(0)
    assert env.reset()["agentview_depth"].shape == (SIZE, SIZE, 1)
    assert type(env.env).__module__.startswith("libero")
    env.close()


def test_an_unknown_upstream_is_libero_s_own_from_the_same_random_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*_: Any) -> None:
        raise UnknownUpstreamError("another robosuite")

    after = []
    for make in (OffScreenRenderEnv, LIBEROS):
        np.random.seed(3)  # noqa: NPY002
        monkeypatch.setattr(fast_simulator, "check_upstream", unknown)
        env = make(**arguments())
        after.append(global_generator())
        env.close()
    assert after[0] == after[1]


def test_frames_that_only_robosuite_renders_are_robosuite_s(env: Any) -> None:
    env.seed(0)
    env.reset()
    image, depth = env.sim.render(SIZE, SIZE, camera_name="agentview", depth=True)
    np.testing.assert_array_equal(image, env.sim.render(SIZE, SIZE, camera_name="agentview"))
    assert depth.shape == (SIZE, SIZE)
    assert env.sim.render(SIZE, SIZE // 2, camera_name="agentview").shape == (SIZE // 2, SIZE, 3)


def test_an_episode_ends_at_the_horizon_as_libero_s() -> None:
    env = OffScreenRenderEnv(**arguments(horizon=2))
    env.reset()
    env.step(np.zeros(7))
    env.step(np.zeros(7))
    with pytest.raises(ValueError, match="executing action in terminated episode"):
        env.step(np.zeros(7))
    env.reset()
    env.step(np.zeros(7))
    env.close()


def test_what_can_not_be_done_is_said(env: Any) -> None:
    env.reset()
    with pytest.raises(ValueError, match=r"an action has shape \(7,\); got \(6,\)"):
        env.step(np.zeros(6))
    with pytest.raises(ValueError, match="read-only"):  # other environments have the model too
        env.sim.model.cam_pos[0] = 1.0
    with pytest.raises(NotImplementedError, match="an observable's corrupter can't be modified"):
        env.env.modify_observable("robot0_joint_pos", "corrupter", lambda value: value + 1)
    with pytest.raises(NotImplementedError, match="no reset_from_xml_string in a fast environment"):
        env.reset_from_xml_string("<mujoco/>")
    with pytest.raises(ValueError, match=r"no camera 'nowhere'; it has .*agentview"):
        OffScreenRenderEnv(**arguments(camera_names=["nowhere"]))
    with pytest.raises(TypeError, match="no_such_argument"):
        OffScreenRenderEnv(**arguments(no_such_argument=1))


SCRIPT = """
import multiprocessing, sys
import numpy as np
from libero.libero.envs import OffScreenRenderEnv

def make():
    return OffScreenRenderEnv(bddl_file_name=sys.argv[1], camera_heights=32, camera_widths=32)

def simulator(_):
    env = make()
    env.seed(0)
    shown = env.reset()["agentview_image"].mean()
    return type(env.env).__module__, float(shown)

if __name__ == "__main__":
    print(simulator(0), *sys.argv[2:])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(simulator, [0])[0])
"""


def test_programs_are_accelerated_unchanged_with_the_processes_they_start(
    tmp_path: Path, run_python: Callable[..., Finished]
) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    bddl = arguments()["bddl_file_name"]
    words = [sys.executable, "-m", "cfgrl_gym.accelerate", str(script), bddl, "--more"]
    done = run_python(f"import subprocess, sys; sys.exit(subprocess.run({words!r}).returncode)")
    assert done.code == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == f"{second} --more"
    assert "cfgrl_gym.envs.drop_in" in second


def test_acceleration_works_before_and_after_libero_is_imported(
    run_python: Callable[..., Finished],
) -> None:
    bddl = arguments()["bddl_file_name"]
    build = f"OffScreenRenderEnv(bddl_file_name={bddl!r})"
    for lines in (
        "import cfgrl_gym; cfgrl_gym.accelerate_libero(); cfgrl_gym.accelerate_libero()\n"
        "from libero.libero.envs import OffScreenRenderEnv",
        "from libero.libero.envs import OffScreenRenderEnv\n"
        "import cfgrl_gym; cfgrl_gym.accelerate_libero(); cfgrl_gym.accelerate_libero()",
    ):
        done = run_python(f"{lines}\nprint(type({build}.env).__module__)")
        assert done.code == 0, done.stderr
        assert done.stdout.strip().endswith("cfgrl_gym.envs.drop_in")


def test_an_accelerated_process_can_still_compare_with_libero_itself(
    run_python: Callable[..., Finished],
) -> None:
    done = run_python(
        """
import cfgrl_gym
from cfgrl_gym.envs.fast_simulator import FastSimulator
from cfgrl_gym.envs.plain_simulator import PlainSimulator
from cfgrl_gym.envs.suites import select_tasks

cfgrl_gym.accelerate_libero()
for kind in (FastSimulator, PlainSimulator):
    simulator = kind(select_tasks("libero_object", 0)[0], 32)
    print(*(base.__module__ for base in type(simulator.robosuite_env).__mro__[:2]))
    simulator.close()
"""
    )
    assert done.code == 0, done.stderr
    fast, plain = done.stdout.strip().splitlines()
    assert fast.startswith("cfgrl_gym.envs.fast_simulator libero.")
    assert plain.startswith("libero.")


def test_acceleration_names_what_is_missing(run_python: Callable[..., Finished]) -> None:
    done = run_python(
        "import sys; sys.argv[1:] = ['no_such.py']\nfrom cfgrl_gym.accelerate import main; main()"
    )
    assert done.code == 1
    assert "there is no file 'no_such.py'" in done.stderr
