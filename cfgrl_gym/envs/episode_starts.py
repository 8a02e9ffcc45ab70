"""Which episode a reset of `LiberoEnv` starts: its options', a queued one, or a drawn one."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from cfgrl_gym.envs.arguments import is_int
from cfgrl_gym.envs.snapshots import Snapshot, check_fits, check_sound
from cfgrl_gym.envs.suites import Task, load_init_states

SAMPLER_SEEDS = 2**31  # range of the placement seeds that init_states="random" draws from
_OPTIONS = ("task_id", "init_state_id", "snapshot")


@dataclass(frozen=True)
class Start:
    """Names where an episode begins; what is None is drawn."""

    task_id: int | None = None
    init_state_id: int | None = None
    snapshot: Snapshot | None = None


class EpisodeStarts(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """Chooses the episodes of an environment: its queue, its draws, and what they may name."""

    suite: str
    settle_steps: int
    max_episode_steps: int
    init_states: str | tuple[int, ...]
    _tasks: dict[int, Task]

    def __init__(self) -> None:
        self._queue: deque[Start] = deque()

    @property
    def task_ids(self) -> tuple[int, ...]:
        """The tasks that episodes are drawn from."""
        return tuple(self._tasks)

    def num_init_states(self, task_id: int) -> int | None:
        """Count a task's benchmark states; None with init_states="random", where any seed does."""
        if self.init_states == "random":
            return None
        return len(load_init_states(self.suite, task_id))

    def init_state_ids(self, task_id: int) -> Sequence[int] | None:
        """Return the states that a task's episodes are drawn from; None with init_states="random".

        :raises ValueError: `init_states` names a state that the task hasn't
        """
        count = self.num_init_states(task_id)
        if count is None or isinstance(self.init_states, str):
            return None if count is None else range(count)
        beyond = [i for i in self.init_states if not 0 <= i < count]
        if beyond or not self.init_states:
            raise ValueError(
                f"init_states must name some of the {count} benchmark states (0 to {count - 1}) of "
                f"{self.suite} task {task_id}; got {beyond or 'none'}"
            )
        return self.init_states

    def queue_episode(
        self,
        task_id: int | None = None,
        init_state_id: int | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        """Add an episode to the queue that resets without options take from, first in first out.

        :param snapshot: begin there instead of at an initial state
        :raises ValueError: an id that this environment doesn't have; a snapshot that it can't go on
            from, or together with an id
        """
        start = Start(task_id, init_state_id, snapshot)
        self._check_start(start)
        self._queue.append(start)

    def clear_queue(self) -> None:
        """Forget the queued episodes."""
        self._queue.clear()

    def _check_start(self, start: Start) -> None:
        if start.snapshot is not None:
            self._check_snapshot(start)
            return
        task_id, init_state_id = start.task_id, start.init_state_id
        for name, value in (("task_id", task_id), ("init_state_id", init_state_id)):
            if value is not None and not is_int(value):
                raise ValueError(f"{name} must be an int or None; got {value!r:.100}")
        if task_id is not None and task_id not in self._tasks:
            raise ValueError(
                f"task_id {task_id} is not one of this environment's tasks {self.task_ids}; "
                "name it in task_id=... when making the environment"
            )
        if init_state_id is None:
            return
        limits = [
            self.num_init_states(t) for t in ([task_id] if task_id is not None else self._tasks)
        ]
        limit = SAMPLER_SEEDS if None in limits else min(n for n in limits if n is not None)
        if not 0 <= init_state_id < limit:
            raise ValueError(f"init_state_id must be in 0 to {limit - 1}; got {init_state_id}")

    def _check_snapshot(self, start: Start) -> None:
        snapshot = check_sound(start.snapshot)
        if start.task_id is not None or start.init_state_id is not None:
            raise ValueError(
                "a snapshot determines the task and the initial state; give it without 'task_id' "
                "and 'init_state_id'"
            )
        check_fits(snapshot, self.suite, self.settle_steps, self._kind_of_init_states)
        self._check_start(Start(snapshot.task_id, snapshot.init_state_id))
        if snapshot.steps >= self.max_episode_steps:
            raise ValueError(
                f"the snapshot's episode has run {snapshot.steps} control steps, and this "
                f"environment's end after {self.max_episode_steps}: nothing is left of it; make "
                "the environment with a larger max_episode_steps"
            )

    @property
    def _kind_of_init_states(self) -> str:
        return "random" if self.init_states == "random" else "benchmark"

    def _next_start(self, options: Any) -> Start:
        """Return the start of these reset options, else the next queued one, else an open one.

        :raises ValueError: options that name none, and leave the queue as it was; or a queued start
            that the environment no longer has, because of other `settle_steps`, say: it is dropped
        """
        if not isinstance(options, Mapping | None):
            raise ValueError(
                "reset options must be a dictionary with 'task_id' and 'init_state_id', or with "
                f"'snapshot', or None; got {options!r:.100}"
            )
        unknown = [key for key in options or {} if key not in _OPTIONS]
        if unknown:
            raise ValueError(
                f"reset option(s) {unknown!r:.100} unknown; use 'task_id' and 'init_state_id', or "
                "'snapshot'"
            )
        queued = self._queue.popleft() if self._queue and not options else Start()
        start = Start(**options) if options else queued
        self._check_start(start)
        return start

    def _draw(self, start: Start) -> tuple[int, int]:
        """Return the task and the initial state of a start, and draw them where it names none."""
        chosen = start.snapshot or start
        # Drawn even where they are given, so that what is chosen doesn't shift later draws.
        drawn_task = self.task_ids[int(self.np_random.integers(len(self._tasks)))]
        task_id = int(drawn_task if chosen.task_id is None else chosen.task_id)
        ids = self.init_state_ids(task_id) or range(SAMPLER_SEEDS)
        drawn_state = ids[int(self.np_random.integers(len(ids)))]
        return task_id, int(drawn_state if chosen.init_state_id is None else chosen.init_state_id)
