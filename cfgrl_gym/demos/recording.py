"""Records scripted demonstrations on real LIBERO, in several processes at a time."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from cfgrl_gym.demos.expert import (
    OPEN,
    PickPlaceExpert,
    movable_objects,
    object_in_place,
)
from cfgrl_gym.demos.files import Demonstration, write_demonstrations
from cfgrl_gym.envs.arguments import check_known
from cfgrl_gym.envs.fast_simulator import build_simulator
from cfgrl_gym.envs.simulator import CAMERAS, IMAGE_KEYS, LIBERO_SEED, SETTLE_STEPS, Simulator
from cfgrl_gym.envs.suites import episode_limit, select_tasks
from cfgrl_gym.wrappers.transforms import quat2axisangle

MAX_TRIES_PER_DEMO = 10


@dataclass(frozen=True)
class RecordingConfig:
    """Holds the settings of a recording.

    :param suite: suite of the task
    :param task_id: the task
    :param demos: number of successful demonstrations
    :param objects: what the expert picks, to put it where the task's object should go: LIBERO's
        name of an object of the scene, several as [milk_1,butter_1], or all of them (all). They
        share the demonstrations evenly, from the same placements. The instruction remains the
        task's, and a demonstration ends when its own object is in place. null: the task's object
    :param image_size: side of the two camera images in pixels
    :param image_stride: render the images only at every n-th step, which is faster; rows between
        repeat the last image, and `obs/images_rendered` says which rows were rendered. 1 renders
        all, as in LIBERO's files
    :param cameras: those that are rendered: agentview, robot0_eye_in_hand (on the wrist), or both.
        One alone is faster; the other's images are black, and no policy is fitted to them. null:
        both
    :param perturbed: share of the demonstrations that start from a disturbed pose: the expert
        first moves for a while, is pushed and turned at random, and only then recorded
    :param seed: seed of LIBERO's placement sampler and of the disturbances
    :param workers: processes that record at the same time (about 2 GB of memory each)
    """

    suite: str = "libero_object"
    task_id: int = 0
    demos: int = 50
    objects: str | list[str] | None = None
    image_size: int = 128
    image_stride: int = 1
    cameras: list[str] | None = None
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
def _simulator(suite: str, task_id: int, image_size: int, cameras: tuple[str, ...]) -> Simulator:
    return build_simulator(select_tasks(suite, task_id)[0], image_size, cameras)


def _chosen_objects(config: RecordingConfig) -> list[str | None]:
    """Return the objects to pick, in order; None stands for the task's.

    :raises ExpertUnavailableError: the task is not a pick-and-place, or lacks one of the objects
    """
    if config.objects is None:
        return [None]
    simulator = build_simulator(select_tasks(config.suite, config.task_id)[0], config.image_size)
    try:
        simulator.reset(LIBERO_SEED, None)
        if config.objects == "all":
            return [*movable_objects(simulator)]
        names = [config.objects] if isinstance(config.objects, str) else config.objects
        for name in names:
            PickPlaceExpert(simulator, chosen=name)
        return [*names]
    finally:
        simulator.close()


def _record_one(config: RecordingConfig, chosen: str | None, seed: int) -> Demonstration | None:
    """Record one episode with the placement of `seed`; None if the expert fails."""
    size, cameras = config.image_size, tuple(config.cameras or CAMERAS)
    simulator = _simulator(config.suite, config.task_id, size, cameras)
    images = dict.fromkeys(IMAGE_KEYS, np.zeros((size, size, 3), np.uint8))
    rng = np.random.default_rng([config.seed, seed])
    simulator.reset(seed, None)
    simulator.settle(SETTLE_STEPS)
    expert = PickPlaceExpert(simulator, chosen=chosen)
    if rng.random() < config.perturbed:
        _disturb(simulator, expert, rng)
    # Start again from exactly here: so the file replays from states[0] in LIBERO's environment.
    simulator.reset(LIBERO_SEED, simulator.state())
    expert = PickPlaceExpert(simulator, expert.orientation, chosen)

    rows: dict[str, list[np.ndarray]] = {}
    rendered: list[bool] = []
    for step in range(episode_limit(config.suite)):
        rendered.append(step % config.image_stride == 0)
        if rendered[-1]:
            images |= simulator.images()
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
        simulator.advance(action)
        if simulator.fault() is not None:
            return None  # the physics blew up: not an example to learn from
        if object_in_place(simulator, expert.object):
            arrays = {key: np.stack(values) for key, values in rows.items()}
            return Demonstration(
                **arrays, images_rendered=np.array(rendered), prompt=simulator.task.prompt
            )
    return None


def record(config: RecordingConfig) -> Iterator[Demonstration]:
    """Yield `config.demos` successful demonstrations as they are made, the same for equal seeds.

    :raises ExpertUnavailableError: the task is not a pick-and-place, or lacks one of the objects
    :raises RuntimeError: the expert fails too often on this task, or with one of the objects
    """
    if config.demos < 1 or config.image_stride < 1 or not 0 <= config.perturbed <= 1:
        raise ValueError(
            f"demos and image_stride must be at least 1 and perturbed in [0, 1]; got {config}"
        )
    for camera in config.cameras or CAMERAS:
        check_known("each of cameras", camera, CAMERAS)
    chosen = _chosen_objects(config)[: config.demos]
    for number, name in enumerate(chosen):
        # 50 demonstrations with 3 objects are 17, 17 and 16.
        yield from _record_share(config, name, len(range(number, config.demos, len(chosen))))


def _record_share(
    config: RecordingConfig, chosen: str | None, share: int
) -> Iterator[Demonstration]:
    """Yield `share` successful demonstrations, all with one object (None: the task's)."""
    first_seed = 1_000_000 * config.seed
    seeds = range(first_seed, first_seed + share * MAX_TRIES_PER_DEMO)
    found = 0
    with ExitStack() as stack:
        attempts: Callable[..., Iterable[Demonstration | None]] = map
        if config.workers > 1:
            # 'spawn': a render context must not be inherited
            context = multiprocessing.get_context("spawn")
            attempts = stack.enter_context(context.Pool(config.workers)).imap
        for demonstration in attempts(partial(_record_one, config, chosen), seeds):
            if demonstration is not None:
                yield demonstration
                found += 1
                if found == share:
                    return
    picked = "" if chosen is None else f" with {chosen}"
    raise RuntimeError(
        f"the expert solved only {found} of {len(seeds)} placements of {config.suite} task "
        f"{config.task_id}{picked}; ask for fewer demos or another "
        f"{'task' if chosen is None else 'object'}"
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
