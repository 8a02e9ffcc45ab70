"""The timings of this package's environments; `libero_timing.py` runs them."""

import argparse
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, process_time
from typing import Any

import numpy as np
from timing_common import (
    ACTIONS,
    CHUNK,
    CONTROL_STEPS,
    FREE_STEPS,
    HELD_STEPS,
    IMAGE_SIZE,
    NO_LIMIT,
    PASSES,
    ROUNDS,
    SEED,
    SETTLE_STEPS,
    cpu_seconds,
    hold,
    image_ms,
    import_all,
    random_actions,
    seconds,
)


def single(args: argparse.Namespace, settle_steps: int = 0) -> Any:
    from cfgrl_gym.envs.libero import LiberoEnv

    return LiberoEnv(
        args.suite, args.task_id, IMAGE_SIZE, max_episode_steps=NO_LIMIT, settle_steps=settle_steps
    )


def start(env: Any, args: argparse.Namespace) -> None:
    env.reset(options={"task_id": args.task_id, "init_state_id": 0})


def chunked(args: argparse.Namespace, chunk_size: int = CHUNK) -> Callable[[], Any]:
    import gymnasium as gym

    return functools.partial(
        gym.make,
        "cfgrl_gym:LiberoChunked-v0",
        suite=args.suite,
        task_id=args.task_id,
        image_size=IMAGE_SIZE,
        max_episode_steps=NO_LIMIT,
        settle_steps=0,
        chunk_size=chunk_size,
    )


def construct(args: argparse.Namespace) -> dict[str, Any]:
    imports = seconds(import_all)
    began = perf_counter()
    env = single(args)
    start(env, args)
    first = perf_counter()
    other = single(args)
    start(other, args)
    return {
        "imports_s": imports,
        "first_observation_s": first - began,
        "second_observation_s": perf_counter() - first,
        "simulator": type(env.simulator).__name__,
        "gl_renderer": gl_renderer(),
    }


def gl_renderer() -> str:
    """OpenGL's own name for what renders."""
    from OpenGL import GL

    from cfgrl_gym.envs.render_backend import GlContext

    with GlContext(IMAGE_SIZE):
        return str(GL.glGetString(GL.GL_RENDERER).decode())


def chunk(args: argparse.Namespace) -> dict[str, Any]:
    env = chunked(args)()
    start(env, args)
    actions = random_actions(CHUNK, args.seed).astype(np.float32)
    cpu = process_time()
    chunk = seconds(lambda: env.step(actions))
    cpu = process_time() - cpu
    simulator = env.unwrapped.simulator

    def image(camera: str) -> None:
        simulator._render(simulator.data, (camera,), IMAGE_SIZE)

    return {"chunk_s": chunk, "cpu_per_wall": cpu / chunk, "image_ms": image_ms(image)}


def steps(args: argparse.Namespace) -> dict[str, Any]:
    from cfgrl_gym.envs.suites import load_init_states

    env = single(args)
    start(env, args)
    simulator = env.simulator
    init_state = load_init_states(args.suite, args.task_id)[0]

    def run(actions: np.ndarray, observed: bool) -> float:
        simulator.reset(SEED, init_state)
        began = perf_counter()
        for action in actions:
            simulator.advance(action)
            if observed:
                simulator.observe()
        return 1000 * (perf_counter() - began) / len(actions)

    result: dict[str, Any] = {}
    for kind, make in ACTIONS.items():
        actions = make(CONTROL_STEPS, args.seed)
        simulator.reset(SEED, init_state)
        replay, contacts = recorded_physics(simulator, actions)
        passes: dict[str, list[float]] = {"step_ms": [], "advance_ms": [], "physics_floor_ms": []}
        for _ in range(PASSES):
            passes["step_ms"].append(run(actions, observed=True))
            passes["advance_ms"].append(run(actions, observed=False))
            floor, state = replay()
            passes["physics_floor_ms"].append(1000 * floor / len(actions))
        passes["share_outside"] = [
            1 - floor / advance
            for floor, advance in zip(passes["physics_floor_ms"], passes["advance_ms"], strict=True)
        ]
        result[kind] = {name: float(np.median(each)) for name, each in passes.items()} | {
            "passes": passes,
            "contacts_mean": float(np.mean(contacts)),
            "contacts_most": max(contacts),
            "replay_is_exact": bool(np.array_equal(state, simulator.state())),
        }
    return result


def recorded_physics(simulator: Any, actions: np.ndarray) -> tuple[Callable[[], Any], list[int]]:
    """The physics of an episode without anything around it.

    robosuite's own Python controller gives the torques of every substep; MuJoCo's `rollout` steps
    through them, 25 `mj_step` a control step, within one call of C++ on the calling thread.

    :param simulator: reset; the episode is run from there
    :return: a function that gives the seconds of one replay and its last state (time, qpos, qvel),
        and the number of contacts at the end of each control step
    """
    import mujoco
    from mujoco.rollout import Rollout

    env, model, data = simulator.robosuite_env, simulator.model, simulator.data
    kind = mujoco.mjtState.mjSTATE_FULLPHYSICS
    begin = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, begin, kind)
    warmstart = data.qacc_warmstart.copy()
    torques, contacts, step = [], [], env.sim.step

    def recorded_step(*args: Any, **kwargs: Any) -> None:
        torques.append(data.ctrl.copy())
        step(*args, **kwargs)

    env.sim.step = recorded_step
    try:
        for action in actions:
            env.step(action)
            contacts.append(data.ncon)
    finally:
        del env.sim.step
    control, own, rollout = np.array(torques), mujoco.MjData(model), Rollout(nthread=0)

    def replay() -> tuple[float, np.ndarray]:
        began = perf_counter()
        rollout.rollout(model, own, begin, control, initial_warmstart=warmstart)
        spent = perf_counter() - began
        return spent, np.concatenate([[own.time], own.qpos, own.qvel])

    return replay, contacts


def reset(args: argparse.Namespace) -> dict[str, Any]:
    env = single(args, SETTLE_STEPS)
    start(env, args)
    return {"reset_s": seconds(lambda: start(env, args))}


def vec_env(args: argparse.Namespace, chunk_size: int = CHUNK) -> Any:
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    from cfgrl_gym.algorithms.vec_envs.thread_vec_env import ThreadVecEnv

    make = [chunked(args, chunk_size)] * args.n_envs
    if args.workers == "processes":
        env: Any = SubprocVecEnv(make, start_method="forkserver")
    else:
        env = (DummyVecEnv if args.n_envs == 1 else ThreadVecEnv)(make)
    env.env_method("queue_episode", args.task_id, 0)
    env.reset()
    return env


def memory(args: argparse.Namespace) -> dict[str, Any]:
    env = vec_env(args, chunk_size=1)
    for action in random_actions(HELD_STEPS, args.seed).astype(np.float32):
        env.step(np.broadcast_to(action, (args.n_envs, 1, 7)))
    hold()
    return {}


def chunks(args: argparse.Namespace) -> dict[str, Any]:
    """Chunks of several environments at once, images at their ends."""
    env = vec_env(args)
    actions = random_actions((ROUNDS + 1) * CHUNK, args.seed).astype(np.float32)
    rounds = [np.stack([chunk] * args.n_envs) for chunk in np.split(actions, ROUNDS + 1)]
    env.step(rounds[0])
    cpu, began = cpu_seconds(), perf_counter()
    spent = [seconds(functools.partial(env.step, chunk)) for chunk in rounds[1:]]
    wall = perf_counter() - began
    cpu = cpu_seconds() - cpu
    return {
        "chunks_per_s": args.n_envs * ROUNDS / wall,
        "cpu_per_wall": cpu / wall,
        "round_s": spent,
    }


def free_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Control steps without observations, an environment a thread."""
    envs = [single(args) for _ in range(args.n_envs)]
    for env in envs:
        start(env, args)
        env.skip_observations = True
    actions = random_actions(FREE_STEPS, args.seed)

    def run(env: Any) -> None:
        for action in actions:
            env.step(action)

    with ThreadPoolExecutor(args.n_envs) as pool:
        cpu, began = cpu_seconds(), perf_counter()
        list(pool.map(run, envs))
        wall = perf_counter() - began
        cpu = cpu_seconds() - cpu
    return {"steps_per_s": args.n_envs * FREE_STEPS / wall, "cpu_per_wall": cpu / wall}
