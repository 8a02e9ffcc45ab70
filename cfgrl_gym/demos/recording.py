"""Records scripted demonstrations on real LIBERO, in several processes at a time."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from cfgrl_gym.demos.expert import OPEN, PickPlaceExpert
from cfgrl_gym.demos.files import Demonstration, write_demonstrations
from cfgrl_gym.envs.fast_simulator import build_simulator
from cfgrl_gym.envs.simulator import IMAGE_KEYS, LIBERO_SEED, SETTLE_STEPS, Simulator
from cfgrl_gym.envs.suites import episode_limit, select_tasks
from cfgrl_gym.wrappers.transforms import quat2axisangle

MAX_TRIES_PER_DEMO = 10


@dataclass(frozen=True)
class RecordingConfig:
    """Holds the settings of a recording.

    :param suite: suite of the task
    :param task_id: the task
    :param demos: number of successful demonstrations
    :param image_size: side of the two camera images in pixels
    :param image_stride: render the images only at every n-th step, which is faster; rows between
        repeat the last image, and `obs/images_rendered` says which rows were rendered. 1 renders
        all, as in LIBERO's files
    :param perturbed: share of the demonstrations that start from a disturbed pose: the expert
        first moves for a while, is pushed and turned at random, and only then recorded
    :param seed: seed of LIBERO's placement sampler and of the disturbances
    :param workers: processes that record at the same time (about 2 GB of memory each)
    """

    suite: str = "libero_object"
    task_id: int = 0
    demos: int = 50
    image_size: int = 128
    image_stride: int = 1
    perturbed: float = 0.8
    seed: int = 0
    workers: int = 2


def _disturb(simulator: Simulator, expert: PickPlaceExpert, rng: np.random.Generator) -> None:
    """Let the hand reach for a while, then push and turn it, by up to about 8 cm and 0.4 rad."""
    for _ in range(int(rng.integers(0, 40))):
        action = expert.act()
        if not expert.reaching:
            break
        simulator.advance(action)
    push = np.concatenate([rng.uniform(-0.6, 0.6, 3), rng.uniform(-0.25, 0.25, 3), [OPEN]])
    push[2] = abs(push[2])  # never down into the table
    for _ in range(int(rng.integers(3, 9))):
        simulator.advance(push)
    simulator.settle(3)


@lru_cache(maxsize=1)  # one in each process
def _simulator(config: RecordingConfig) -> Simulator:
    return build_simulator(select_tasks(config.suite, config.task_id)[0], config.image_size)


def _record_one(config: RecordingConfig, seed: int) -> Demonstration | None:
    """Record one episode with the placement of `seed`; None if the expert fails."""
    simulator = _simulator(config)
    rng = np.random.default_rng([config.seed, seed])
    simulator.reset(seed, None)
    simulator.settle(SETTLE_STEPS)
    expert = PickPlaceExpert(simulator)
    if rng.random() < config.perturbed:
        _disturb(simulator, expert, rng)
    # Start again from exactly here: so the file replays from states[0] in LIBERO's environment.
    simulator.reset(LIBERO_SEED, simulator.state())
    expert = PickPlaceExpert(simulator, expert.orientation)

    rows: dict[str, list[np.ndarray]] = {}
    rendered: list[bool] = []
    for step in range(episode_limit(config.suite)):
        rendered.append(step % config.image_stride == 0)
        if rendered[-1]:
            images = simulator.images()
        raw = simulator.observe()
        action = expert.act()
        row = {
            "actions": action,
            "states": simulator.state(),
            "agentview_rgb": images[IMAGE_KEYS[0]],
            "eye_in_hand_rgb": images[IMAGE_KEYS[1]],
            "ee_pos": raw["robot0_eef_pos"],
            "ee_ori": quat2axisangle(raw["robot0_eef_quat"]),
            "gripper_states": raw["robot0_gripper_qpos"],
            "joint_states": raw["robot0_joint_pos"],
        }
        for key, value in row.items():
            rows.setdefault(key, []).append(value)
        success = simulator.advance(action)
        if simulator.fault() is not None:
            return None  # the physics blew up: not an example to learn from
        if success:
            arrays = {key: np.stack(values) for key, values in rows.items()}
            return Demonstration(
                **arrays, images_rendered=np.array(rendered), prompt=simulator.task.prompt
            )
    return None


def record(config: RecordingConfig) -> Iterator[Demonstration]:
    """Yield `config.demos` successful demonstrations as they are made, the same for equal seeds.

    :raises ExpertUnavailableError: the task is not a pick-and-place
    :raises RuntimeError: the expert fails too often on this task
    """
    if config.demos < 1 or config.image_stride < 1 or not 0 <= config.perturbed <= 1:
        raise ValueError(
            f"demos and image_stride must be at least 1 and perturbed in [0, 1]; got {config}"
        )
    first_seed = 1_000_000 * config.seed
    seeds = range(first_seed, first_seed + config.demos * MAX_TRIES_PER_DEMO)
    found = 0
    with ExitStack() as stack:
        attempts: Callable[..., Iterable[Demonstration | None]] = map
        if config.workers > 1:
            # 'spawn': a render context must not be inherited
            context = multiprocessing.get_context("spawn")
            attempts = stack.enter_context(context.Pool(config.workers)).imap
        for demonstration in attempts(partial(_record_one, config), seeds):
            if demonstration is not None:
                yield demonstration
                found += 1
                if found == config.demos:
                    return
    raise RuntimeError(
        f"the expert solved only {found} of {config.demos * MAX_TRIES_PER_DEMO} placements of "
        f"{config.suite} task {config.task_id}; ask for fewer demos or another task"
    )


def demonstration_path(folder: Path, suite: str, task_id: int) -> Path:
    """Return the path of a task's file in LIBERO's layout: `<suite>/<task>_demo.hdf5`."""
    return folder / suite / f"{select_tasks(suite, task_id)[0].name}_demo.hdf5"


def save(path: Path, demonstrations: list[Demonstration], config: RecordingConfig) -> None:
    """Write recorded demonstrations of one task in LIBERO's format."""
    from cfgrl_gym.envs.installation import import_libero

    task = select_tasks(config.suite, config.task_id)[0]
    problem = import_libero("envs.bddl_utils").get_problem_info(str(task.bddl_file))["problem_name"]
    write_demonstrations(path, demonstrations, problem=problem, bddl_file=task.bddl_file)
