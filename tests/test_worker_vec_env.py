"""WorkerVecEnv and RayVecEnv: faults injected for real into their processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from cfgrl_gym import RayVecEnv, WorkerVecEnv
from cfgrl_gym.algorithms.vec_envs.remote_vec_env import LOST
from cfgrl_gym.algorithms.vec_envs.requests import WorkerError

KILLED = "SIGKILL|its process was killed"


class Fragile(gym.Env[np.ndarray, np.ndarray]):
    """Counts its steps; an action of 1 does to the process what `fault` says."""

    observation_space = spaces.Box(-100, 100, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, fault: str = "none", name: int = 0) -> None:
        self.fault, self.name, self.count = fault, name, 0
        self.bonus = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._observation(), {"options": options}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if action[0] == 1:
            if self.fault == "raise":
                raise ArithmeticError("the arm fell off")
            if self.fault == "abort":
                os.abort()
            if self.fault == "exit":
                os._exit(7)
            if self.fault == "hang":
                time.sleep(1000)
        self.count += 1
        return self._observation(), self.bonus, False, self.count >= 5, {}

    def process(self) -> int:
        return os.getpid()

    def refuse(self, what: str) -> None:
        raise KeyError(f"no {what}")

    def _observation(self) -> np.ndarray:
        return np.array([self.name, self.count], np.float32)


Kind = type[WorkerVecEnv] | type[RayVecEnv]


def fragile(kind: Kind, fault: str, **arguments: Any) -> Any:
    """Three environments, the second and only one of a worker with a fault."""
    faults = ("none", fault, "none")
    makers = [lambda f=f, n=n: Fragile(f, n) for n, f in enumerate(faults)]
    return kind(makers, workers=2, **arguments)  # type: ignore[arg-type]


def actions(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def played(env: VecEnv) -> list[Any]:
    """All that 200 random steps give, ends of episodes included."""
    env.seed(3)
    seen: list[Any] = [env.reset(), list(env.reset_infos)]
    rng = np.random.default_rng(0)
    for _ in range(200):
        obs, rewards, dones, infos = env.step(rng.integers(0, 2, env.num_envs))
        seen += [obs, rewards, dones, list(infos)]
    env.close()
    return seen


def test_without_a_fault_it_gives_what_dummy_vec_env_gives(remote: Kind) -> None:
    makers = [lambda: gym.make("CartPole-v1", max_episode_steps=30)] * 3
    workers, dummy = played(remote(makers, workers=2)), played(DummyVecEnv(makers))
    assert sum(done.sum() for done in dummy[4::4]) > 15
    for one, other in zip(workers, dummy, strict=True):
        np.testing.assert_equal(one, other)


def test_a_dictionary_of_observations_and_ppo(remote: Kind) -> None:
    makers = [lambda: gym.make("CartPole-v1")] * 2
    env = remote(makers)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu", seed=0)
    os.kill(env.workers[0].pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match=KILLED):
        model.learn(64)
    assert model.num_timesteps == 64
    assert all(np.isfinite(info["r"]) for info in model.ep_info_buffer or ())
    env.close()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise", "the arm fell off"),
        ("abort", "SIGABRT.*Fatal Python error|was lost: its process .* crashed"),
        ("exit", "exit code 7|was lost"),
        ("hang", "no answer in 3 seconds"),
    ],
)
def test_a_worker_that_fails_is_replaced_and_its_episode_is_lost(
    remote: Kind, fault: str, said: str
) -> None:
    env = fragile(remote, fault, timeout=3)
    env.reset()
    env.step(actions(0, 0, 0))
    with pytest.warns(UserWarning, match=f"(?s){said}"):
        obs, rewards, dones, infos = env.step(actions(0, 1, 0))
    assert dones.tolist() == [False, True, False]
    assert obs.tolist() == [[0, 2], [1, 0], [2, 2]]  # the others went on, the second begins anew
    assert rewards[1] == 0
    assert [LOST in info for info in infos] == [False, True, False]
    assert infos[1]["terminal_observation"].tolist() == [1, 1]  # the last that it gave
    assert infos[1]["TimeLimit.truncated"]
    obs, _, dones, infos = env.step(actions(0, 0, 0))
    assert obs.tolist() == [[0, 3], [1, 1], [2, 3]]
    assert not dones.any()
    assert LOST not in infos[1]
    env.close()


def test_all_environments_of_a_worker_are_lost_with_it(remote: Kind) -> None:
    env = fragile(remote, "none")
    env.set_attr("bonus", 2.5, indices=[0, 2])
    env.reset()
    first, second, third = env.env_method("process")
    assert first == third != second
    env.step(actions(0, 0, 0))
    os.kill(first, signal.SIGKILL)
    with pytest.warns(UserWarning, match=KILLED):
        # Whoever asks first finds it out; an attribute that was set is set again.
        assert env.get_attr("bonus") == [2.5, 0.0, 2.5]
    obs, rewards, dones, _ = env.step(actions(0, 0, 0))
    assert dones.tolist() == [True, False, True]
    assert obs.tolist() == [[0, 0], [1, 2], [2, 0]]
    assert rewards.tolist() == [0, 0, 0]
    assert env.step(actions(0, 0, 0))[1].tolist() == [2.5, 0, 2.5]
    env.close()


def test_an_environment_that_is_reset_by_name_goes_on(remote: Kind) -> None:
    env = fragile(remote, "none")
    env.reset()
    os.kill(env.env_method("process")[1], signal.SIGKILL)
    with pytest.warns(UserWarning, match=KILLED):
        ((obs, info),) = env.env_method("reset", indices=[1], options={"a": 1})
    assert obs.tolist() == [1, 0]
    assert info == {"options": {"a": 1}}
    _, _, dones, infos = env.step(actions(0, 0, 0))
    assert not dones.any()
    assert not any(LOST in info for info in infos)
    env.close()


@pytest.mark.filterwarnings("ignore:worker")
@pytest.mark.filterwarnings("ignore:in worker")
def test_a_worker_that_keeps_failing_ends_the_run_with_its_own_traceback(remote: Kind) -> None:
    env = fragile(remote, "raise")
    env.reset()
    for _ in range(2):
        env.step(actions(0, 1, 0))
    env.step(actions(0, 0, 0))  # a step that works: counted anew
    for _ in range(2):
        env.step(actions(0, 1, 0))
    with pytest.raises(WorkerError, match=r"(?s)3 times in a row.*in step.*the arm fell off"):
        env.step(actions(0, 1, 0))
    env.close()


def test_what_a_caller_does_wrong_is_told_the_caller_and_costs_nothing(remote: Kind) -> None:
    env = fragile(remote, "none")
    env.reset()
    before = env.env_method("process")
    env.step(actions(0, 0, 0))
    with pytest.raises(KeyError, match="no tea"):
        env.env_method("refuse", "tea", indices=[1])
    assert not env.has_attr("nothing_of_the_kind")
    assert env.env_method("process") == before
    assert env.step(actions(0, 0, 0))[0][:, 1].tolist() == [2, 2, 2]
    env.close()
    env.close()  # twice does no harm
    with pytest.raises(ValueError, match="workers must be"):
        remote([Fragile], workers=2)

    def broken() -> gym.Env[Any, Any]:
        raise LookupError("no such robot")

    with pytest.raises(LookupError, match="no such robot"):
        remote([broken])


def dies_when_made(marks: Path, times: int) -> gym.Env[Any, Any]:
    """An environment whose process is killed while it makes it, so many times."""
    mark = marks / str(len(list(marks.iterdir())))
    if mark.name != str(times):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Fragile()


def test_a_worker_that_dies_while_it_makes_its_environments_is_replaced(
    remote: Kind, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=KILLED):
        env = remote([Fragile, partial(dies_when_made, tmp_path, 2)], workers=2)
    assert len(list(tmp_path.iterdir())) == 2
    assert env.reset().tolist() == [[0, 0], [0, 0]]
    _, _, dones, infos = env.step(actions(0, 0))
    assert not dones.any()
    assert not any(LOST in info for info in infos)
    env.close()


@pytest.mark.filterwarnings("ignore:worker")
def test_one_that_always_does_is_an_error(remote: Kind, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="3 times in a row.*" + KILLED):
        remote([partial(dies_when_made, tmp_path, 100)])
    assert len(list(tmp_path.iterdir())) == 3


def test_workers_end_with_their_parent_even_while_they_hang(remote: Kind) -> None:
    script = (
        "from test_worker_vec_env import *\n"
        "if __name__ == '__main__':\n"
        f"    env = fragile({remote.__name__}, 'hang')\n"
        "    env.reset()\n"
        "    print(*env.env_method('process'), flush=True)\n"
        "    env.step(actions(0, 1, 0))\n"
    )
    folder = os.path.dirname(__file__)
    code = f"import sys; sys.path.insert(0, {folder!r})\n" + script
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = {int(pid) for pid in parent.stdout.readline().split()}
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.filterwarnings("ignore:worker")
def test_a_worker_may_be_killed_at_any_moment(remote: Kind) -> None:
    env = fragile(remote, "none", max_failures=100)
    env.reset()
    over = threading.Event()
    rng = np.random.default_rng(0)

    def killer() -> None:
        for _ in range(20):
            time.sleep(rng.uniform(0, 0.3))
            with suppress(ProcessLookupError):  # just being replaced
                os.kill(env.workers[int(rng.integers(2))].pid, signal.SIGKILL)
        over.set()

    thread = threading.Thread(target=killer)
    thread.start()
    expected = np.zeros(3)
    lost = 0
    while not over.is_set():
        obs, _, dones, infos = env.step(actions(0, 0, 0))
        expected = np.where(dones, 0, expected + 1)
        assert obs[:, 1].tolist() == expected.tolist()
        assert obs[:, 0].tolist() == [0, 1, 2]
        lost += sum(LOST in info for info in infos)
    thread.join()
    assert lost > 0
    env.close()
