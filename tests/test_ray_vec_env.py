"""RayVecEnv where it differs from WorkerVecEnv: Ray itself, clusters, and what is wrong with them.

What they share is tested over both, in `test_worker_vec_env.py` and `test_faults_in_collection.py`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
from conftest import Finished
from gymnasium import spaces

import cfgrl_gym
from cfgrl_gym import RayVecEnv, __version__
from cfgrl_gym.algorithms.vec_envs import ray_connection, ray_vec_env

pytestmark = pytest.mark.usefixtures("ray_is_installed")
RunPython = Callable[..., Finished]

# A process of its own, so that it also shows what is left of Ray when that has ended.
ALONE = """
import json, signal, psutil
import gymnasium as gym
from cfgrl_gym import RayVecEnv

def listening():
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [c for p in processes for c in p.net_connections() if c.status == "LISTEN"]
    return sorted({(c.laddr.ip, c.laddr.port) for c in found})

handler = lambda *_: None
signal.signal(signal.SIGTERM, handler)
make = lambda: gym.make("CartPole-v1")
one = RayVecEnv([make] * 2)
two = RayVecEnv([make] * 4, workers=3)  # more than there is room for, were there any counting
shapes = [one.reset().shape, two.reset().shape]
ports = listening()
one.close()
two.close()
two.close()
print(json.dumps({
    "shapes": shapes,
    "ports": ports,
    "left": [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)],
    "still_listening": listening(),
    "handler_kept": signal.getsignal(signal.SIGTERM) is handler,
}))
"""
CONNECT = """
import gymnasium as gym
from cfgrl_gym import RayVecEnv
env = RayVecEnv([lambda: gym.make("CartPole-v1")] * 2, workers=1, address={address!r})
print(*env.reset().shape)
env.close()
"""


class Camera(gym.Env[Any, Any]):
    """Gives images that are too large to come outside the object store."""

    observation_space = spaces.Box(0, 255, (400, 400, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {"image": self.observation_space.sample()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, True, False, {"image": np.zeros(10**6)}


@pytest.fixture(scope="module")
def ray_is_installed() -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'cfgrl-gym[ray]'")


@contextmanager
def listener() -> Iterator[int]:
    """A server that says nothing; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with listener() as port:
        return port


def test_alone_it_listens_on_the_loopback_address_only_and_leaves_nothing(
    run_python: RunPython,
) -> None:
    done = run_python(ALONE)
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["shapes"] == [[2, 4], [4, 4]]
    hosts = {host.removeprefix("::ffff:") for host, _ in said["ports"]}
    assert hosts == {"127.0.0.1"}
    assert len(said["ports"]) > 3
    assert said["left"] == []
    assert said["still_listening"] == []
    assert said["handler_kept"]


def test_arrays_are_the_callers_own_and_leave_the_object_store(local_ray: Any) -> None:
    with closing(RayVecEnv([Camera] * 2, workers=1)) as env:  # type: ignore[list-item]
        observations = [env.reset()]
        infos: list[Any] = [*env.reset_infos]
        for _ in range(30):  # 480 MB, in a store of 100
            observation, _, _, stepped = env.step(np.zeros((2, 1), np.float32))
            observations.append(observation)
            infos += stepped
    assert all(observation.flags.writeable for observation in observations)
    assert all(info["image"].flags.writeable for info in infos)


def test_actors_are_placed_by_resources_and_make_room_again(
    local_ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_vec_env, "PLACING_TIMEOUT", 2.0)
    with closing(RayVecEnv([Camera] * 3)) as env:  # type: ignore[list-item]
        assert len(env.workers) == 2  # the two CPUs
        with pytest.raises(ValueError, match=r"no room for 1 actors with {'CPU': 1} .*'CPU': 2"):
            RayVecEnv([Camera] * 2, workers=1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"with {'CPU': 1, 'camera': 2}.*'camera': 0.*fewer"):
        RayVecEnv([Camera], resources={"CPU": 1, "camera": 2})  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no room for 3 actors"):
        RayVecEnv([Camera] * 3, workers=3)  # type: ignore[list-item]
    with closing(RayVecEnv([Camera] * 4, resources={"CPU": 0.5})) as env:  # type: ignore[list-item]
        assert len(env.workers) == 4
    deadline = time.monotonic() + 20
    while local_ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert local_ray.available_resources()["CPU"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"resources": {}}, "resources must be"),
        ({"resources": {"CPU": 0}}, "resources must be"),
        ({"workers": 3}, "workers must be from 1 to the 2 env_fns"),
        ({"address": "ray://head:10001"}, "must be host:port or auto.*Ray Client"),
        ({"address": "127.0.0.1:1"}, "connected to Ray at .* already"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    local_ray: Any, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        RayVecEnv([Camera] * 2, **arguments)  # type: ignore[list-item]


def test_without_ray_it_says_what_to_install(run_python: RunPython) -> None:
    done = run_python("import sys\nsys.modules['ray'] = None\n" + CONNECT.format(address=None))
    last = done.stderr.splitlines()[-1]
    assert last == "ImportError: Ray isn't installed; install it with: pip install 'cfgrl-gym[ray]'"


def test_an_address_without_a_cluster_is_an_error_soon(run_python: RunPython) -> None:
    done = run_python(CONNECT.format(address=f"127.0.0.1:{free_port()}"))
    assert "ConnectionError: there is no Ray cluster at 127.0.0.1:" in done.stderr
    done = run_python(CONNECT.format(address="head"))
    assert "ValueError: the address of a Ray cluster must be host:port; got 'head'" in done.stderr


def test_a_server_that_is_not_ray_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_connection, "CONNECTING_TIMEOUT", 5.0)
    with (
        listener() as port,
        pytest.raises(ConnectionError, match=r"no Ray cluster answered .* not that of its dashb"),
    ):
        ray_connection.check_cluster(f"127.0.0.1:{port}")


def other_python(folder: Path, *paths: Path) -> Path:
    """A Python with all packages of this one but cfgrl-gym; returns it."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join([*map(str, paths), *here]))
    return folder / "bin" / "python"


@contextmanager
def cluster(python: Path, variables: dict[str, str]) -> Iterator[str]:
    """A Ray cluster of this machine whose node runs with this Python; its address."""
    port = free_port()
    command = [str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    command += ["--object-store-memory=80000000", "--disable-usage-stats"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "--block" in line:  # it says so at the end, when all runs
                break
        yield f"127.0.0.1:{port}"
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        for child in children:
            if child.is_running():
                child.kill()


@pytest.mark.parametrize("there", ["nothing", "another version", "this version"])
def test_every_node_needs_the_package_in_this_version(
    there: str, run_python: RunPython, tmp_path: Path
) -> None:
    package = tmp_path / "elsewhere"
    if there != "nothing":
        shutil.copytree(Path(cfgrl_gym.__file__).parent, package / "cfgrl_gym")
    if there == "another version":
        (package / "cfgrl_gym" / "_version.py").write_text('__version__ = "0.0.7"\n')
    python = other_python(tmp_path / "venv", package)
    here = {ray_connection.LOOPBACK_VARIABLE: "0", "RAY_AUTH_MODE": "disabled"}
    with cluster(python, here) as address:
        root = str(Path(cfgrl_gym.__file__).parent.parent)
        done = run_python(CONNECT.format(address=address), PYTHONPATH=root, **here)
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    if there == "this version":
        assert (done.code, done.stdout) == (0, "2 4\n"), done.stderr
    elif there == "nothing":
        assert "StartError: a node of the Ray cluster has no cfgrl-gym" in last, done.stderr
        assert f"install 'cfgrl-gym[ray]=={__version__}' on all of them" in last
    else:
        assert f"has cfgrl-gym 0.0.7, and this process has {__version__}" in last, done.stderr
