"""What an iteration and a training of the full PI0 on libero_goal would cost, on three machines.

Simulation and bytes are measured here (env_throughput.json, worker_scaling.json), the operations of
the model are counted (update_cost.json); nothing has run on a GPU, so its speed is an assumption,
named below. The simulation's part is checked against worker_scaling.json, which it wasn't made
from. A change of any number changes the tables: python benchmarks/speed/cost_model.py --help
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timing_common import write_json

STEPS_TIMED = 50  # control steps of a chunk in these files
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Machine:
    """Where a training runs.

    :param gpus: each with a rank
    :param cores: that simulate
    :param elsewhere: the cores are in other machines, so that observations go over the network
    """

    name: str
    gpus: int
    cores: int
    elsewhere: bool = False


MACHINES = (
    Machine("1 GPU, 16 cores", 1, 16),
    Machine("8 GPUs, 128 cores", 8, 128),
    Machine("8 GPUs, 1000 cores elsewhere", 8, 1000, elsewhere=True),
)


@dataclass(frozen=True)
class Training:
    """An iteration's work: 64 groups of 8 episodes, as many as RLinf's PI0 recipe has (512).

    :param steps: control steps of an episode, on average; libero_goal's limit is 300
    :param chunk: control steps of a chunk, all that PI0 predicts
    :param epochs: and `replay`, iterations whose windows are learned from again: CFGRL's defaults
    :param batch: windows of an optimizer step
    """

    episodes: int = 512
    steps: int = 150
    limit: int = 300
    chunk: int = 50
    epochs: int = 12
    replay: int = 2
    batch: int = 64
    iterations: int = 20


@dataclass(frozen=True)
class Assumed:
    """What could not be measured here.

    :param peak: an H100's dense bfloat16 operations a second (NVIDIA's data sheet)
    :param acting: share of it while acting. openpi's published 73 ms a chunk with three cameras on
        a 4090 (165 Tera) are 0.3
    :param updating: share of it in an update, whose matrices are the expert's, which is smaller
    :param link: bytes a second between machines (100 Gbit/s); within one, NVLink's 450e9
    """

    peak: float = 989e12
    acting: float = 0.3
    updating: float = 0.15
    link: float = 12.5e9
    nvlink: float = 450e9


@dataclass(frozen=True)
class Measured:
    """What was measured or counted here, of LIBERO at 224 px with both cameras."""

    seconds_of_a_step: float  # a control step without observation, on one core
    core_seconds_of_an_observation: float
    seconds_of_an_observation: float  # alone on 2 cores, on which Mesa renders
    seconds_of_a_reset: float
    prefix_flop: float
    expert_flop: float  # forward and backward pass of a window
    observation_bytes: int
    trained_bytes: float = 311e6 * 4  # float32 gradients of the action expert (PI0's paper: 300 M)
    denoising_steps: int = 10

    def core_seconds(self, steps: int) -> float:
        """Return the core seconds of a chunk of so many control steps and its observation."""
        return steps * self.seconds_of_a_step + self.core_seconds_of_an_observation

    def seconds(self, steps: int) -> float:
        """Return how long such a chunk takes."""
        return steps * self.seconds_of_a_step + self.seconds_of_an_observation

    @classmethod
    def here(cls) -> "Measured":
        """Read the result files."""
        throughput = json.loads((RESULTS / "env_throughput.json").read_text())
        (one,) = (row for row in throughput["scaling"] if row["what"] == "chunks 1 threads")
        step, *_ = (r for r in throughput["table"] if r["what"].strip() == "without observation")
        (reset,) = (row for row in throughput["table"] if row["what"].startswith("reset and"))
        of_the_steps = STEPS_TIMED * step["here"] / 1000  # of the chunk that was timed
        scaling = json.loads((RESULTS / "worker_scaling.json").read_text())
        flops = json.loads((RESULTS / "update_cost.json").read_text())["full, cpu"]
        counted = flops["flops_of_a_window_at_full_size"]
        return cls(
            step["here"] / 1000,
            one["cpu_per_wall"] / one["per_s"] - of_the_steps,
            1 / one["per_s"] - of_the_steps,
            reset["here"],
            counted["prefix_forward"],
            counted["expert_forward_and_backward"],
            scaling["runs"][0]["bytes"]["observation_bytes"],
        )


def iteration(
    machine: Machine, training: Training, measured: Measured, assumed: Assumed
) -> dict[str, Any]:
    """Compute seconds and bytes of an iteration."""
    chunks = training.episodes * math.ceil(training.steps / training.chunk)
    reset = measured.seconds_of_a_reset
    work = chunks * measured.core_seconds(training.chunk) + training.episodes * reset
    longest = training.limit / training.chunk * measured.seconds(training.chunk) + reset
    simulation = max(work / machine.cores, longest)
    denoising = measured.denoising_steps * measured.expert_flop / 3  # a forward pass is a third
    act = chunks * (measured.prefix_flop + denoising) / (assumed.peak * assumed.acting)
    windows = chunks * (1 + training.replay)
    prefixes = chunks * measured.prefix_flop / (assumed.peak * assumed.acting)
    learn = training.epochs * windows * measured.expert_flop / (assumed.peak * assumed.updating)
    learn += training.replay * prefixes
    steps = training.epochs * windows / training.batch
    # A ring's all-reduce sends 2 (N - 1) / N of the gradients from each rank.
    gradients = steps * 2 * (machine.gpus - 1) / machine.gpus * measured.trained_bytes
    observations = (chunks + training.episodes) * measured.observation_bytes
    seconds = {
        "simulation": simulation,
        "acting": act / machine.gpus,
        "update": learn / machine.gpus,
        "gradients": gradients / assumed.nvlink,
        "observations": observations / assumed.link if machine.elsewhere else 0.0,
    }
    whole = sum(seconds.values())
    # With overlap, the update computes the new windows' prefixes too, and the GPU has both.
    on_gpu = seconds["acting"] + seconds["update"] + prefixes / machine.gpus + seconds["gradients"]
    collection = seconds["simulation"] + seconds["acting"] + seconds["observations"]
    return {
        "machine": machine.name,
        "seconds": seconds | {"whole": whole, "whole with overlap": max(on_gpu, collection)},
        "bottleneck": max(seconds, key=seconds.__getitem__),
        "gpu_hours": whole * machine.gpus / 3600,
        "core_hours": work / 3600,
        "bytes": {
            "observations": observations if machine.elsewhere else 0,
            "gradients of each rank": gradients,
        },
        "seconds of gradients between machines": gradients / assumed.link,
        "training": {
            "hours": whole * training.iterations / 3600,
            "gpu_hours": whole * machine.gpus * training.iterations / 3600,
        },
    }


def check(measured: Measured) -> list[dict[str, float]]:
    """Compare the chunks a second of 2 cores with what several workers reached."""
    scaling = json.loads((RESULTS / "worker_scaling.json").read_text())
    possible = scaling["machine"]["cores"] / measured.core_seconds(STEPS_TIMED)
    found = []
    for run in scaling["runs"]:
        predicted = min(run["workers"] / measured.seconds(STEPS_TIMED), possible)
        rate = run["chunks_per_s"]["processes"]
        found.append({"workers": run["workers"], "predicted": predicted, "measured": rate})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "cost_model.json")
    for field, value in (asdict(Training()) | asdict(Assumed())).items():
        parser.add_argument(f"--{field}", type=type(value), default=value, help="%(default)s")
    args = vars(parser.parse_args())
    training = Training(**{name: args[name] for name in asdict(Training())})
    assumed = Assumed(**{name: args[name] for name in asdict(Assumed())})
    measured = Measured.here()
    rows = [iteration(machine, training, measured, assumed) for machine in MACHINES]
    for row in rows:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["seconds"].items())
        print(f"{row['machine']}: seconds: {parts}; bottleneck: {row['bottleneck']}")
        print(f"  GPU hours {row['gpu_hours']:.2f}, of a training {row['training']}")
        between = row["seconds of gradients between machines"]
        print(f"  bytes {row['bytes']}, gradients between machines {between:.0f} s")
    chunks = 1e9 / training.chunk
    of_a_chunk = measured.prefix_flop + measured.denoising_steps * measured.expert_flop / 3
    billion = {
        "core_hours": chunks * measured.core_seconds(training.chunk) / 3600,
        "gpu_hours": chunks * of_a_chunk / (assumed.peak * assumed.acting) / 3600,
    }
    checked = check(measured)
    print(f"a billion control steps: {billion}")
    for line in checked:
        print(line)
    content = {
        "command": " ".join(["python", *sys.argv]),
        "training": asdict(training),
        "assumed": asdict(assumed),
        "measured": asdict(measured),
        "iterations": rows,
        "billion_control_steps": billion,
        "check_chunks_per_s": checked,
    }
    write_json(args["out"], content)


if __name__ == "__main__":
    main()
