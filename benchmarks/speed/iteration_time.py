"""Where the time of a CFGRL iteration goes, on real LIBERO with the tiny PI0.

    python benchmarks/speed/iteration_time.py    # about ten minutes on 2 cores

Every iteration's seconds of simulation, inference and update, for a policy that trains throughout
and for one whose VLM is frozen, so that the prefixes are kept from acting to the update. All groups
are learned from, because a policy with random weights never succeeds; episodes last to the limit.
With --policy the iterations start from a trained policy instead.
"""

from statistics import median
from time import perf_counter
from typing import Any

from pi0_timing import keep
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from timing_common import arguments

from cfgrl_gym import CFGRL, ThreadVecEnv
from cfgrl_gym.cli.policies import find_checkpoint
from cfgrl_gym.cli.reporting.times import PARTS

CHUNK, IMAGE_SIZE = 16, 112  # of a random policy


class Clock(BaseCallback):
    """Notes when the iteration begins, after what `learn` does once at its start."""

    began = 0.0

    def _on_rollout_start(self) -> None:
        self.began = perf_counter()

    def _on_step(self) -> bool:
        return True


class Recorder(KVWriter):
    """Keeps what each iteration logs, and its seconds as a whole."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.iterations: list[dict[str, float]] = []

    def write(self, key_values: dict[str, Any], *_: Any, **__: Any) -> None:
        spent = {part: float(key_values[f"time/seconds_{part}"]) for part in PARTS}
        spent["whole"] = perf_counter() - self.clock.began
        self.iterations.append(
            {**spent, "control_steps_so_far": key_values["rollout/control_steps"]}
        )
        shown = ", ".join(f"{part} {value:.1f} s" for part, value in spent.items())
        print(f"iteration {len(self.iterations)}: {shown}", flush=True)

    def close(self) -> None:
        """Do nothing, since no file is open."""


def measure(env: Any, trainable: str, policy: dict[str, Any], args: Any) -> dict[str, Any]:
    """:param policy: arguments of `Pi0Policy`, beside what trains"""
    algorithm = CFGRL(
        "Pi0Policy",
        env,
        rloo_batch_size=args.rloo_batch_size,
        groups_per_iteration=args.groups,
        enable_dynamic_sampling=False,
        policy_kwargs={**policy, "trainable": trainable},
        seed=args.seed,
        device="cpu",
    )
    clock = Clock()
    recorder = Recorder(clock)
    algorithm.set_logger(Logger(folder=None, output_formats=[recorder]))
    while len(recorder.iterations) < args.iterations:
        algorithm.learn(1, clock, reset_num_timesteps=False)
        assert algorithm.windows is not None
        recorder.iterations[-1]["windows"] = len(algorithm.windows)
    medians = {part: median(run[part] for run in recorder.iterations) for part in (*PARTS, "whole")}
    return {
        "trainable": trainable,
        "epochs": algorithm.n_epochs,
        "iterations": recorder.iterations,
        "median_seconds": medians,
        "shares": {part: medians[part] / medians["whole"] for part in PARTS},
    }


def main() -> None:
    parser = arguments(__doc__, "iteration_time.json")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--n_envs", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--policy", help="folder of a trained one (a random one)")
    parser.add_argument("--chunk_size", type=int, help=f"(the policy's; a random one's: {CHUNK})")
    parser.add_argument("--rloo_batch_size", type=int, default=8, help="K (%(default)s)")
    parser.add_argument("--groups", type=int, default=2, help="an iteration (%(default)s)")
    parser.add_argument("--iterations", type=int, default=3, help="each (%(default)s)")
    args = parser.parse_args()
    policy: dict[str, Any] = {}
    chunk, image_size = CHUNK, IMAGE_SIZE
    if args.policy:
        found = find_checkpoint(args.policy, None)
        policy = {"preset": found.preset, "checkpoint": found.path}
        chunk, image_size = found.horizon, found.image_size
    args.chunk_size = args.chunk_size or chunk
    env = make_vec_env(
        "LiberoChunked-v0",
        n_envs=args.n_envs,
        vec_env_cls=ThreadVecEnv,  # type: ignore[arg-type]
        env_kwargs={"task_id": 0, "chunk_size": args.chunk_size, "image_size": image_size},
    )
    runs = [measure(env, trainable, policy, args) for trainable in ("all", "expert")]
    env.close()
    name = "trained, cpu" if args.policy else "tiny, cpu"
    keep(args, name, {"task": "libero_object 0"}, runs=runs)
    for run in runs:
        shares = ", ".join(f"{part} {share:.0%}" for part, share in run["shares"].items())
        print(f"{run['trainable']}: {shares}")


if __name__ == "__main__":
    main()
