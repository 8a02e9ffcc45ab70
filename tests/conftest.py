"""What the tests of environments and demonstrations share: LIBERO and built environments."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.libero import LiberoEnv

SETTLE = np.array([0, 0, 0, 0, 0, 0, -1.0])
# The recorded episode: benchmark state, settle steps, actions.
INIT_STATE, SETTLE_STEPS, STEPS = 3, 3, 40


class Reference:
    """LIBERO's own evaluation environment, freshly built: the independent reference.

    :param images: False leaves the cameras out of the observations, which makes it quick
    """

    def __init__(self, suite: str, task_id: int, images: bool = True) -> None:
        self.task = import_libero("benchmark").get_benchmark_dict()[suite]()
        bddl = self.task.get_task_bddl_file_path(task_id)
        wrapper = import_libero("envs.env_wrapper")
        self.env = wrapper.OffScreenRenderEnv(bddl_file_name=bddl)
        self.init_states = self.task.get_task_init_states(task_id)
        self.images = images

    def start(self, seed: int = 0, init_state: Any = None) -> dict[str, np.ndarray]:
        """As LIBERO's evaluation: seed, hard reset, then the initial state, if one is given."""
        self.env.seed(seed)
        observation = self.env.reset()
        if not self.images:
            for name, observable in self.env.env._observables.items():
                if name.endswith("_image"):
                    observable.set_enabled(False)
        return observation if init_state is None else self.env.set_init_state(init_state)

    def close(self) -> None:
        self.env.close()


@contextmanager
def libero_reference(suite: str, task_id: int, images: bool = True) -> Iterator[Reference]:
    with closing(Reference(suite, task_id, images)) as reference:
        yield reference


def downward_actions(steps: int, seed: int = 0) -> np.ndarray:
    """float64 (steps, 7): random, but for a push down to where there is something to touch."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, 7))
    actions[:, 2] -= 0.7
    return np.clip(actions, -1, 1)


def assert_same_arrays(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Equal keys, and equal bytes under each."""
    assert set(one) == set(two)
    for key, value in one.items():
        np.testing.assert_array_equal(value, two[key], err_msg=key)


@dataclass(frozen=True)
class Recorded:
    """What LIBERO gave after the settle steps and after every action."""

    observations: list[dict[str, np.ndarray]]
    states: list[np.ndarray]
    successes: list[bool]
    contacts: list[int]


@pytest.fixture(scope="session")
def recorded() -> Recorded:
    """An episode of libero_object task 0 in LIBERO's own environment, 128-px images."""
    record = Recorded([], [], [], [])
    with libero_reference("libero_object", 0) as libero:
        libero.start(init_state=libero.init_states[INIT_STATE])
        for step, action in enumerate([SETTLE] * SETTLE_STEPS + list(downward_actions(STEPS))):
            observation, _, done, _ = libero.env.step(action)
            if step >= SETTLE_STEPS - 1:
                record.observations.append({k: np.array(v) for k, v in observation.items()})
                record.states.append(libero.env.get_sim_state())
                record.successes.append(bool(done))
                record.contacts.append(libero.env.sim.data.ncon)
    return record


@pytest.fixture(scope="session")
def built_can_env() -> Iterator[LiberoEnv]:
    with closing(LiberoEnv("libero_object", 0, image_size=64, settle_steps=2)) as env:
        yield env


@pytest.fixture
def can_env(built_can_env: LiberoEnv) -> Iterator[LiberoEnv]:
    """libero_object task 0 with 64-px images, built once; nothing queued, limit 280."""
    built_can_env.clear_queue()
    yield built_can_env
    built_can_env.max_episode_steps = 280
    built_can_env.init_states = "benchmark"


@dataclass(frozen=True)
class Finished:
    """A Python process that has ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., Finished]:
    """Run a script in a process of its own, with a closed stdin and none of this one's settings."""

    def run(script: str, **variables: str) -> Finished:
        environment = {k: v for k, v in os.environ.items() if k != "LIBERO_CONFIG_PATH"}
        path = tmp_path / "script.py"  # a file, so that 'spawn' can import it again
        path.write_text(script, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(path)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=tmp_path,
            env=environment | variables,
            timeout=180,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run
