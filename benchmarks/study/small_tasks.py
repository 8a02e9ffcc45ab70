"""Tasks of the comparison outside LIBERO, and the policy that every method starts from.

- bandit: one action, rewarded with a known probability (`bandit.py`). The start has no velocity, so
  that its actions are its noise.
- pendulum: Gymnasium's Pendulum-v1 with its dense reward; success is to be upright during the last
  second.
- reach: FetchReach-v4 of Gymnasium-Robotics with its sparse reward of -1 in each step away from the
  goal; success is to be there at the end.

The last two act in chunks. Their start is a flow-matching clone of a scripted controller with so
much noise that it often fails; how much was chosen by the success of the clone alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from bandit import BanditEnv
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, TransformObservation
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from cfgrl_gym.algorithms import MlpPolicy
from cfgrl_gym.algorithms.flow import NULL
from cfgrl_gym.wrappers import ActionChunk

CHUNK = 5
NET_ARCH = (256, 256)
DEMONSTRATIONS = 100
CLONE_STEPS, CLONE_BATCH, CLONE_RATE = 2000, 256, 1e-3
UPRIGHT, LAST_STEPS = 0.9, 20  # cosine of the angle; a step is 0.05 s

# (observation, random numbers) -> action
Controller = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Task:
    """Says how to make a task's environment, and what is cloned to start from.

    :param make: number of the environment -> the environment, in single control steps
    :param controller: the noisy controller; None: the start has no velocity, and no chunks
    :param groups: of K episodes, in each iteration
    :param n_envs: environments side by side
    :param evaluations: held-out starts
    """

    make: Callable[[int], gym.Env]
    controller: Controller | None
    groups: int
    n_envs: int
    evaluations: int


class UprightAtTheEnd(gym.Wrapper):
    """Reports at the end of Pendulum-v1 whether it was upright in all of the last steps."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.cosines: list[float] = []
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.cosines.append(float(obs[0]))
        if terminated or truncated:
            info = info | {"is_success": min(self.cosines[-LAST_STEPS:]) > UPRIGHT}
        return obs, reward, terminated, truncated, info


def swing_up(obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pump energy until nearly upright, then balance; obs is (cos, sin, angular velocity)."""
    cosine, sine, speed = obs
    energy = speed**2 / 6 + 5 * cosine  # of Pendulum-v1: g = 10, m = l = 1; 5 when balanced
    if cosine > 0.85:
        torque = -12 * np.arctan2(sine, cosine) - 3 * speed
    else:
        torque = 2 * np.sign(speed) * np.clip(5 - energy, -1, 1)
    return np.clip(torque + 3.0 * rng.normal(size=1), -2, 2)


def reach(obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move the gripper towards the goal; obs begins with achieved and desired position."""
    towards = 5 * (obs[3:6] - obs[:3])  # an action of 1 moves about 3 cm
    return np.clip(np.append(towards, 0) + 1.0 * rng.normal(size=4), -1, 1)


def make_pendulum(number: int) -> gym.Env:
    return UprightAtTheEnd(gym.make("Pendulum-v1"))


def make_reach(number: int) -> gym.Env:
    try:
        import gymnasium_robotics
        from gymnasium_robotics.utils import mujoco_utils
    except ImportError:
        raise ImportError(
            "the task 'reach' needs Gymnasium-Robotics: pip install 'cfgrl-gym[benchmarks]'"
        ) from None
    gym.register_envs(gymnasium_robotics)

    def set_qpos(model: Any, data: Any, name: str, value: Any) -> None:
        data.joint(name).qpos[:] = value

    # Those of Gymnasium-Robotics 1.4.2 look for a NumPy integer among MuJoCo's enums, and newer
    # versions of MuJoCo don't find it there.
    mujoco_utils.set_joint_qpos = set_qpos
    mujoco_utils.get_joint_qpos = lambda model, data, name: data.joint(name).qpos.copy()
    mujoco_utils.get_joint_qvel = lambda model, data, name: data.joint(name).qvel.copy()
    return FlattenObservation(gym.make("FetchReach-v4"))


TASKS = {
    # Its episodes have a single window.
    "bandit": Task(BanditEnv, None, groups=64, n_envs=64, evaluations=1000),
    "pendulum": Task(make_pendulum, swing_up, groups=8, n_envs=8, evaluations=100),
    "reach": Task(make_reach, reach, groups=8, n_envs=8, evaluations=50),
}


@cache
def demonstrations(name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Run the controller: observations (T, obs_dim) and actions (T, action_dim) of each episode."""
    task = TASKS[name]
    assert task.controller is not None
    env, rng = task.make(0), np.random.default_rng(0)
    observations, actions = [], []
    for seed in range(DEMONSTRATIONS):
        obs, _ = env.reset(seed=seed)
        rows, taken, done = [], [], False
        while not done:
            action = task.controller(obs, rng).astype(np.float32)
            rows.append(obs)
            taken.append(action)
            obs, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
        observations.append(np.array(rows, np.float32))
        actions.append(np.array(taken))
    return observations, actions


@cache
def statistics(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the demonstrations' observations, (obs_dim,)."""
    seen = np.concatenate(demonstrations(name)[0])
    return seen.mean(0), seen.std(0) + 1e-3


def make_envs(name: str, first_number: int = 0) -> VecEnv:
    """Make a task's environments, in chunks and with observations normalised by demonstrations.

    :param first_number: number of the first environment, by which bandits differ
    """
    task = TASKS[name]

    def make(number: int) -> gym.Env:
        env = task.make(number)
        if task.controller is None:
            return env
        mean, std = statistics(name)
        space = spaces.Box(-np.inf, np.inf, mean.shape, np.float32)
        normalised = TransformObservation(
            env, lambda obs: ((obs - mean) / std).astype(np.float32), space
        )
        return ActionChunk(normalised, CHUNK)

    return DummyVecEnv([lambda i=i: make(first_number + i) for i in range(task.n_envs)])


def starting_policy(name: str, seed: int) -> dict[str, torch.Tensor]:
    """Return the weights that every method starts from: a clone of the controller, as ∅ alone."""
    env = make_envs(name)
    torch.manual_seed(seed)
    policy = MlpPolicy(
        env.observation_space, env.action_space, lambda _: CLONE_RATE, net_arch=NET_ARCH
    )
    if TASKS[name].controller is None:
        nn.init.zeros_(policy.output.weight)
        nn.init.zeros_(policy.output.bias)
        return policy.state_dict()
    observations, actions = demonstrations(name)
    mean, std = statistics(name)
    obs = torch.from_numpy(
        (np.concatenate([episode[: 1 - CHUNK] for episode in observations]) - mean) / std
    )
    windows = torch.from_numpy(
        np.concatenate(
            [
                np.lib.stride_tricks.sliding_window_view(episode, CHUNK, 0).swapaxes(1, 2)
                for episode in actions
            ]
        )
    )  # (n, CHUNK, action_dim)
    generator = torch.Generator().manual_seed(seed)
    policy.set_training_mode(True)
    for _ in range(CLONE_STEPS):
        rows = torch.randint(len(obs), (CLONE_BATCH,), generator=generator)
        t, noise = policy.draw_flow(CLONE_BATCH, generator)
        loss = policy.flow_matching_loss(
            obs[rows],
            policy.encode_actions({}, windows[rows]),
            torch.zeros(CLONE_BATCH, CHUNK, dtype=torch.bool),
            torch.full((CLONE_BATCH,), NULL),
            t,
            noise,
        ).mean()
        policy.optimizer.zero_grad()
        loss.backward()
        policy.optimizer.step()
    policy.set_training_mode(False)
    return policy.state_dict()
