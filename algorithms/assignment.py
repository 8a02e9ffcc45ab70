"""Which of a plan's episodes an environment runs next, so that tasks are seldom built anew."""

from collections.abc import Iterable

from stable_baselines3.common.vec_env import VecEnv

from cfgrl_gym.algorithms.groups import GroupPlan, Start


class Assignment:
    """Keeps tasks with environments that have built them.

    To build a LIBERO task takes several times as long as an episode in it, and an environment keeps
    a few. One that becomes free goes on with the task it had last, else with another that it has
    built, else with the one that the fewest environments have; none ever waits for another.
    Environments that don't say what they have built take the episodes in the plan's order. So an
    assignment follows from the plan and from how long episodes take; what an episode is doesn't
    depend on it.

    :param env: whose environments may have `built_tasks`, the last used one last
    """

    def __init__(self, env: VecEnv, plan: GroupPlan) -> None:
        self._env = env
        tasks = {group.start.task_id for group in plan.groups}
        knows = len(tasks) > 1 and env.has_attr("built_tasks")
        self._built: list[list[int | None]] | None = None
        if knows:
            self._built = [list(built) for built in env.get_attr("built_tasks")]

    def begun(self, index: int) -> None:
        """Note that an environment has begun an episode."""
        if self._built is not None:
            self._built[index] = list(self._env.get_attr("built_tasks", [index])[0])

    def choose(self, index: int, starts: Iterable[Start]) -> int:
        """Return the place of the start that suits an environment best; 0 if there is none.

        The task of that start counts as built there from now on. Where nothing is known of what is
        built, the starts aren't looked at.
        """
        if self._built is None:
            return 0
        first: dict[int | None, int] = {}
        for place, start in enumerate(starts):
            first.setdefault(start.task_id, place)
        if not first:
            return 0
        own = self._built[index]
        task = next((task for task in reversed(own) if task in first), None)
        if task is None:
            task = min(first, key=lambda task: sum(task in built for built in self._built or ()))
            own.append(task)
        return first[task]
