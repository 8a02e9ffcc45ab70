"""One worker process: environments that are stepped one after another, on request.

The parent's half is `Worker`, the process's `run_worker`. A request is the name of a method of
`_Environments` with its arguments; the answer is a value, or what the environment raised.
"""

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from multiprocessing import connection, current_process, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper
from stable_baselines3.common.vec_env.patch_gym import _patch_env

from cfgrl_gym.algorithms.vec_envs.next_starts import PlannedReset

STARTING_TIMEOUT = 300.0  # seconds, in addition, for what imports, compiles and builds
PROCESS_NAME = "WorkerVecEnv's worker"
NOT_BEGUN = "importing the user's script"  # in the crash file, until `run_worker` begins
UNGUARDED = 90  # exit code of a worker that came upon the start of workers in the user's script
GUARD = (
    "a worker process imports the script that starts it, and the script then starts workers "
    'again: put `if __name__ == "__main__":` around what it does, imports, functions and classes '
    "apart"
)


class WorkerError(ConnectionError):
    """Raised when a worker process died, did not answer in time, or its environment raised."""


class StartError(WorkerError):
    """Raised when a worker process can't start, which trying again wouldn't change."""


def step_and_reset(env: gym.Env, action: Any) -> tuple[Any, Any, bool, dict[str, Any], Any]:
    """Step an environment as SB3's do, and reset it where the episode ends.

    :return: observation (after a reset its first), reward, done, info, and the reset's information
        or None
    """
    observation, reward, terminated, truncated, info = env.step(action)
    done, reset_info = terminated or truncated, None
    info = dict(info) | {"TimeLimit.truncated": truncated and not terminated}
    if done:
        info["terminal_observation"] = observation
        observation, reset_info = env.reset()
    return observation, reward, done, info, reset_info


# In the worker ------------------------------------------------------------------------------------


class _Environments:
    """The requests that a worker answers; indices count the environments within the worker."""

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        self.envs = [PlannedReset(_patch_env(make())) for make in env_fns]

    def spaces(self) -> tuple[gym.Space[Any], gym.Space[Any]]:
        return self.envs[0].observation_space, self.envs[0].action_space

    def step(self, actions: Mapping[int, Any]) -> dict[int, tuple[Any, ...]]:
        return {i: step_and_reset(self.envs[i], action) for i, action in actions.items()}

    def reset(self, how: Mapping[int, dict[str, Any]]) -> dict[int, tuple[Any, Any]]:
        """Reset environments with these keyword arguments; returns observations and infos."""
        return {index: self.envs[index].reset(**arguments) for index, arguments in how.items()}

    def call(self, index: int, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self.envs[index].get_wrapper_attr(name)(*args, **kwargs)

    def is_wrapped(self, index: int, wrapper: type[gym.Wrapper]) -> bool:
        return is_wrapped(self.envs[index], wrapper)

    def close(self) -> None:
        for env in self.envs:
            env.close()


def run_worker(requests: Connection, env_fns: bytes, crash_file: str) -> None:
    """Answer requests until the parent closes the pipe or ends.

    :param env_fns: pickled, so that what can't be imported here is an answer like any other error
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    faulthandler.enable(Path(crash_file).open("w"))  # noqa: SIM115 (open as long as the process)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    environments: _Environments | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            name, args = requests.recv()
            if name == "close" and environments is None:
                return
            try:
                if environments is None:
                    environments = _Environments(pickle.loads(env_fns).var)
                answer = ("value", getattr(environments, name)(*args))
            except Exception as error:
                answer = ("raised", (_portable(error), traceback.format_exc()))
            try:
                requests.send(answer)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                requests.send(("raised", (error, f"{name} gave what can't be pickled")))
            if name == "close":
                return


def _portable(error: Exception) -> Exception:
    """The error itself, or a RuntimeError with its message where it can't be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


# In the parent ------------------------------------------------------------------------------------


def pickled(env_fns: Sequence[Callable[[], gym.Env]]) -> bytes:
    """Pickle what makes a worker's environments.

    :raises ValueError: that can't be done
    """
    try:
        return pickle.dumps(CloudpickleWrapper(list(env_fns)))
    except Exception as error:
        raise ValueError(
            f"env_fns can't be sent to a worker process ({type(error).__name__}: {error}); let "
            "each function make for itself what can't be pickled (open files, locks, simulators)"
        ) from error


def refuse_unguarded_script() -> None:
    """Refuse to start workers in a process that is only importing the user's script.

    :raises RuntimeError: it is one of another library's; a worker of ours ends at once, and its
        parent says so
    """
    process = current_process()
    if getattr(process, "_inheriting", False):  # as multiprocessing itself recognises it
        if process.name == PROCESS_NAME:
            os._exit(UNGUARDED)
        raise RuntimeError(GUARD)


@contextlib.contextmanager
def _importable_main() -> Iterator[None]:
    """Hide the file of a main module that has none, such as a script on standard input, from
    multiprocessing, which would have the worker import it."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None or Path(file).is_file():
        yield
        return
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = file


class Worker:
    """The parent's side of a worker process, which `restart` replaces.

    :param context: of `multiprocessing`
    :param env_fns: functions that make its environments, `pickled`
    :param timeout: seconds in which a step must be answered
    """

    def __init__(self, context: Any, env_fns: bytes, timeout: float) -> None:
        self._context = context
        self._env_fns = env_fns
        self.timeout = timeout
        self._limit = timeout  # of the request that is under way
        # A pipe's two ends can block for ever on a process that hangs; a thread may wait for that.
        self._talking = ThreadPoolExecutor(1, thread_name_prefix="worker")
        self._answer: Future[Any] | None = None
        descriptor, self._crash_file = tempfile.mkstemp(prefix="cfgrl-gym-worker-")
        os.close(descriptor)
        self._start()

    @property
    def pid(self) -> int:
        """The id of the current process."""
        assert self._process.pid is not None
        return int(self._process.pid)

    def _start(self) -> None:
        Path(self._crash_file).write_text(NOT_BEGUN)
        self._connection, theirs = self._context.Pipe()
        process = self._context.Process(
            target=run_worker,
            args=(theirs, self._env_fns, self._crash_file),
            name=PROCESS_NAME,
            daemon=True,
        )
        with _importable_main():
            process.start()
        self._process = process
        theirs.close()

    def ask(self, name: str, *args: Any) -> None:
        """Send a request; fetch its answer with `answer` before the next one."""
        pipe = self._connection
        self._limit = self.timeout + (0 if name == "step" else STARTING_TIMEOUT)

        def talk() -> Any:
            pipe.send((name, args))
            return pipe.recv()

        self._answer = self._talking.submit(talk)

    def answer(self) -> Any:
        """Wait for the answer to the last request.

        :raises StartError: the process ended over the import of the user's script
        :raises WorkerError: the process died, or hung and was killed
        :raises Exception: what the environment raised, with the worker's traceback as its cause
        """
        assert self._answer is not None
        answer, self._answer = self._answer, None
        try:
            kind, content = answer.result(self._limit)
        except FutureTimeoutError:
            self.kill()
            raise WorkerError(
                f"worker {self.pid} gave no answer in {self._limit:g} seconds"
            ) from None
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self._process.join(5)  # for its own exit code
            self.kill()
            raise self._how_it_died() from error
        if kind == "raised":
            raised, text = content
            raise raised from WorkerError(f"in worker {self.pid}:\n{text}")
        return content

    def _how_it_died(self) -> WorkerError:
        code = self._process.exitcode
        crash = Path(self._crash_file).read_text(errors="replace").strip()
        if code == UNGUARDED:
            return StartError(GUARD)
        if code is None or code >= 0:
            how = f"ended with exit code {code}"
        else:
            name = signal.Signals(-code).name
            of_memory = ": out of memory?" if name == "SIGKILL" else ""
            how = f"was ended by {name}{of_memory}"
        if crash == NOT_BEGUN and code == 1:
            return StartError(
                f"worker {self.pid} {how} before it could begin: the script that starts it can't "
                "be imported there; its own error stands above"
            )
        details = f"\n{crash}" if crash and crash != NOT_BEGUN else ""
        return WorkerError(f"worker {self.pid} {how}{details}")

    def kill(self) -> None:
        """Kill the process at once."""
        self._process.kill()
        self._process.join()

    def restart(self) -> None:
        """Replace the process by a new one with new environments."""
        self.kill()
        self._connection.close()
        self._start()

    def close(self) -> None:
        """Ask the process to end, and kill it if it doesn't; safe to call twice."""
        if self._process.is_alive():
            self.ask("close")
            with contextlib.suppress(Exception):
                self.answer()
            self._process.join(5)
            self.kill()
        self._talking.shutdown()
        self._connection.close()
        Path(self._crash_file).unlink(missing_ok=True)
