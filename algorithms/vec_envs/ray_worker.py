"""One worker as a Ray actor: environments that are stepped one after another, on request.

The driver's half is `RayWorker`, the actor's `EnvironmentActor`; `requests.py` has what it answers.
Ray restarts an actor that dies. The new one has new environments, so it must not answer what was
meant for the old ones: a request says which life of the actor it is for.
"""

import contextlib
import copy
import os
import uuid
from collections.abc import Sequence
from typing import Any

from cfgrl_gym._version import __version__
from cfgrl_gym.algorithms.vec_envs.requests import (
    STARTING_TIMEOUT,
    Requests,
    StartError,
    WorkerError,
    content,
)

CLOSING_TIMEOUT = 5.0  # seconds


class EnvironmentActor:
    """The actor, in one of its lives.

    :param env_fns: functions that make its environments, `pickled`
    :param version: of the driver's package
    """

    def __init__(self, env_fns: bytes, version: str) -> None:
        self._life = uuid.uuid4().hex
        self._version = version
        self._requests = Requests(env_fns)

    def greet(self, ended: str | None) -> str:
        """Return this life, which answers are asked of; the life that `ended` makes way."""
        if self._life == ended:
            os._exit(1)  # and Ray greets the next one
        return self._life

    def answer(self, life: str, name: str, args: Sequence[Any]) -> tuple[Any, ...]:
        """Answer a request.

        :param life: which one the request is for
        :return: what `Requests.answer` returns, or "ended" where the request is for another life;
            then this life and the process's id
        """
        if life != self._life:
            answered: tuple[str, Any] = "ended", None
        elif self._version != __version__:
            error = StartError(
                f"a node of the Ray cluster has cfgrl-gym {__version__}, and this process has "
                f"{self._version}; install the same version on all of them"
            )
            answered = "raised", (error, "")
        else:
            answered = self._requests.answer(name, args)
        return *answered, self._life, os.getpid()


class RayWorker:
    """The driver's side of an actor, which Ray restarts.

    :param actor_class: `EnvironmentActor` with Ray's options
    :param env_fns: functions that make its environments, `pickled`
    :param timeout: seconds in which a step must be answered
    """

    def __init__(self, actor_class: Any, env_fns: bytes, timeout: float) -> None:
        self.timeout = timeout
        self.pid: int | None = None  # of the process that answered last
        self._actor = actor_class.remote(env_fns, __version__)
        self._life: str | None = None  # that answered last; None: it has ended, or is the first
        self._ended: str | None = None
        self._closed = False

    def ask(self, name: str, *args: Any) -> None:
        """Send a request; fetch its answer with `answer` before the next one."""
        self._limit = self.timeout + (0 if name == "step" else STARTING_TIMEOUT)
        life: Any = self._life
        if life is None:  # Ray repeats this until there is a new life, whose answer the request has
            life = self._actor.greet.options(max_task_retries=-1).remote(self._ended)
        self._reply = self._actor.answer.remote(life, name, args)

    def answer(self) -> Any:
        """Wait for the answer to the last request.

        Its arrays are copies: those that Ray gives can't be written to, and keep their place in the
        object store as long as they live.

        :raises StartError: a node has another version of this package, or none
        :raises WorkerError: the actor died, or hung and was killed
        :raises Exception: what the environment raised, with the worker's traceback as its cause
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

        who = f"worker {self.pid}" if self.pid else "a worker that was starting"
        try:
            kind, given, life, pid = ray.get(self._reply, timeout=self._limit)
        except GetTimeoutError:
            ray.cancel(self._reply)  # else the next life might answer it
            self.kill()
            self._end()
            raise WorkerError(f"{who} gave no answer in {self._limit:g} seconds") from None
        except RayTaskError:
            raise  # the answer can't be pickled
        except RayError as error:
            self._end()
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise StartError(_why_not_started(str(error))) from None
            raise WorkerError(f"{who} was lost: {_in_short(error)}") from error
        if kind == "ended":
            self._end()
            raise WorkerError(f"{who} was lost; Ray has restarted it as {pid}")
        self._life, self.pid = life, pid
        return copy.deepcopy(content((kind, given), who))

    def _end(self) -> None:
        if self._life is not None:
            self._ended, self._life = self._life, None

    def kill(self) -> None:
        """Kill the process at once; Ray starts another."""
        import ray

        ray.kill(self._actor, no_restart=False)

    def restart(self) -> None:
        """Let the next request be for a new life of the actor."""
        self._end()

    def close(self) -> None:
        """Close the environments and end the actor for good; safe to call twice."""
        import ray

        if self._closed or not ray.is_initialized():
            return
        self._closed = True
        if self._life is not None:
            self.ask("close")
            with contextlib.suppress(Exception):
                ray.get(self._reply, timeout=CLOSING_TIMEOUT)
        ray.kill(self._actor)


def _in_short(error: Exception) -> str:
    """Shorten Ray's explanation of an actor's end, which goes on with possible causes."""
    from ray.exceptions import ActorUnavailableError

    if isinstance(error, ActorUnavailableError):
        return "its process was killed, crashed or ran out of memory, or its node is gone"
    return " ".join(str(error).split()).split(". ")[0]


def _why_not_started(reason: str) -> str:
    last = reason.strip().splitlines()[-1]
    if "No module named 'cfgrl_gym" in reason:
        return (
            "a node of the Ray cluster has no cfgrl-gym, or one of another version; install "
            f"'cfgrl-gym[ray]=={__version__}' on all of them ({last})"
        )
    return f"Ray can't start a worker: {last}"
