"""Connects to Ray: to a cluster, or to one of this machine alone that is started here."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

INSTALL = "Ray isn't installed; install it with: pip install 'cfgrl-gym[ray]'"
CONNECTING_TIMEOUT = 60.0  # seconds
# Ray's switch for a node that keeps to itself, on Linux too: its address is 127.0.0.1, and none of
# its processes listens on another one.
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Connects in a process of its own, because Ray itself would try for a quarter of an hour.
REHEARSAL = """
import os, sys, ray
try:
    ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
except BaseException as error:
    print(" ".join(str(error).split()))
    os._exit(1)
"""


def import_ray() -> Any:
    """Import Ray.

    :raises ImportError: it isn't installed
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ImportError(INSTALL) from None
    return ray


class RayConnection:
    """Uses this process's Ray until `close`, and connects or starts it where there is none yet.

    :param address: of a cluster, as `ray.init` takes it. None: the Ray that this process is
        connected to, else the cluster that the environment variable RAY_ADDRESS names, else one of
        this machine alone that is started here: it listens on the loopback address only
    :param workers: how many actors a Ray that is started here is to have room for
    :raises ImportError: Ray isn't installed
    :raises ConnectionError: there is no such cluster, or it has another version of Ray
    :raises ValueError: this isn't an address, or the process is connected to another one
    """

    # Those that use a connection made here, which ends with the last of them.
    _users: ClassVar[set["RayConnection"]] = set()
    _made_to: ClassVar[str | None] = None  # address

    def __init__(self, address: str | None, workers: int) -> None:
        ray = import_ray()
        given, address = address, address or os.environ.get("RAY_ADDRESS") or "local"
        if "://" in address:
            raise ValueError(
                f"the address of a Ray cluster must be host:port or auto; got {address!r}. Ray "
                "Client isn't supported: run on a node of the cluster, e.g. with `ray job submit`"
            )
        shared = RayConnection
        if not ray.is_initialized():
            with _sigterm_kept():
                if address == "local":
                    _start(ray, workers)
                else:
                    check_cluster(address)
                    ray.init(address, logging_level="ERROR")
            shared._users, shared._made_to = set(), address
        elif given not in (None, "local", "auto", shared._made_to):
            connected = ray.get_runtime_context().gcs_address
            if address != connected:
                raise ValueError(
                    f"this process is connected to Ray at {connected} already, so it can't use the "
                    f"cluster at {address}; call ray.shutdown() first, or give the former address"
                )
        if shared._made_to is not None:
            shared._users.add(self)
        self.alone = shared._made_to == "local"  # started here

    def close(self) -> None:
        """End the connection if it was made here and this is its last user; safe to call twice."""
        shared = RayConnection
        if self in shared._users:
            shared._users.remove(self)
            if not shared._users:
                shared._made_to = None
                import_ray().shutdown()


def _start(ray: Any, workers: int) -> None:
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # as the variable says, which is read at import
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        if ray.util.get_node_ip_address() not in ("127.0.0.1", "::1"):
            raise RuntimeError(
                f"Ray {ray.__version__} would listen beyond the loopback address; start Ray "
                "yourself (ray.init() or `ray start`) and give its address, or use Ray 2.60"
            )
        # Actors as important as this process, not less, and with its modules: as WorkerVecEnv's.
        as_here = {"RAY_worker_niceness": "0", "PYTHONPATH": paths}
        with _variables({LOOPBACK_VARIABLE: "0", **as_here}):
            ray.init("local", num_cpus=workers, include_dashboard=False, logging_level="ERROR")
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def check_cluster(address: str) -> None:
    """Check that there is a cluster which this process can connect to.

    :raises ConnectionError: there is none, or it has another version of Ray
    :raises ValueError: this isn't an address
    """
    host, _, port = address.rpartition(":")
    if address != "auto":
        if not (host and port.isdigit()):
            raise ValueError(f"the address of a Ray cluster must be host:port; got {address!r}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(
                f"there is no Ray cluster at {address} ({error}); `ray start` prints the address"
            ) from None
    rehearsal = [sys.executable, "-c", REHEARSAL, address]
    try:
        done = subprocess.run(
            rehearsal, capture_output=True, text=True, timeout=CONNECTING_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConnectionError(
            f"no Ray cluster answered at {address} in {CONNECTING_TIMEOUT:g} seconds; give the "
            "address that `ray start` prints, not that of its dashboard, and run on a node of it"
        ) from None
    if done.returncode:
        reason = "".join((done.stdout.strip() or done.stderr.strip()).splitlines()[-1:])
        if "Version mismatch" in reason:
            reason += "; install the same versions here and there"
        raise ConnectionError(f"can't use the Ray cluster at {address}: {reason}")


@contextlib.contextmanager
def _variables(new: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started in the block."""
    before = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep a handler of SIGTERM, which `ray.init` replaces by one that exits."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
