"""Groups that continue K times from the middle of an episode, where it is decided."""

import numpy as np

from cfgrl_gym.algorithms.collector import Episode
from cfgrl_gym.algorithms.groups import Group, GroupPlan, Start
from cfgrl_gym.algorithms.labels import is_uniform

# Moments are taken after one of the first chunks of an episode: later, most have been decided.
FIRST_CHUNKS = 3


def midway_plan(
    rng: np.random.Generator, plan: GroupPlan, kept: list[list[Episode]], count: int
) -> GroupPlan:
    """Plan groups that start from moments of these episodes.

    Moments are drawn, each once, from the groups whose returns differ, since from there the policy
    may still succeed or fail. Only those that turn out to be undecided, their K returns not all
    equal, are kept.

    :param plan: the one that the episodes are of
    :param kept: the K episodes of each group, with snapshots
    :param count: of groups; fewer if there are not as many moments
    """
    mixed = [
        episode
        for group in kept
        if not is_uniform(np.array([e.discounted_return(plan.gamma) for e in group]))
        for episode in group
    ]
    moments = [
        Start(episode.start.task_id, episode.start.init_state_id, snapshot=chunk.snapshot)
        for episode in mixed
        for chunk in episode.chunks[:FIRST_CHUNKS]
        if chunk.snapshot is not None
    ]
    first = len(plan.groups)  # indices go on, because an episode's noise depends on its group's
    drawn = rng.permutation(len(moments))[:count]
    groups = tuple(Group(first + i, moments[moment]) for i, moment in enumerate(drawn))
    return GroupPlan(groups, plan.group_size, None, True, plan.gamma)
