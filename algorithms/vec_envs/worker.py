"""One worker process: environments that are stepped one after another, on request.

The parent's half is `Worker`, the process's `run_worker`; `requests.py` has what it answers.
"""

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from multiprocessing import connection, current_process, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cfgrl_gym.algorithms.vec_envs.requests import (
    STARTING_TIMEOUT,
    Requests,
    StartError,
    WorkerError,
    content,
)

PROCESS_NAME = "WorkerVecEnv's worker"
NOT_BEGUN = "importing the user's script"  # in the crash file, until `run_worker` begins
UNGUARDED = 90  # exit code of a worker that came upon the start of workers in the user's script
GUARD = (
    "a worker process imports the script that starts it, and the script then starts workers "
    'again: put `if __name__ == "__main__":` around what it does, imports, functions and classes '
    "apart"
)


# In the worker ------------------------------------------------------------------------------------


def run_worker(requests: Connection, env_fns: bytes, crash_file: str) -> None:
    """Answer requests until the parent closes the pipe or ends.

    :param env_fns: functions that make the environments, `pickled`
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    faulthandler.enable(Path(crash_file).open("w"))  # noqa: SIM115 (open as long as the process)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    environments = Requests(env_fns)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            name, args = requests.recv()
            try:
                requests.send(environments.answer(name, args))
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                requests.send(("raised", (error, f"{name} gave what can't be pickled")))
            if name == "close":
                return


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


# In the parent ------------------------------------------------------------------------------------


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
            answered = answer.result(self._limit)
        except FutureTimeoutError:
            self.kill()
            raise WorkerError(
                f"worker {self.pid} gave no answer in {self._limit:g} seconds"
            ) from None
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self._process.join(5)  # for its own exit code
            self.kill()
            raise self._how_it_died() from error
        return content(answered, f"worker {self.pid}")

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
