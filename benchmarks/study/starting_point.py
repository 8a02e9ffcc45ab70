"""The shipped policy `libero_tiny`: how it was made, and how often it succeeds.

Records scripted demonstrations, fits a tiny PI0 to them for a while, short of what it could learn,
puts a fresh condition in place of the one that was fitted, writes checksums, and evaluates it on
all 50 benchmark states of each task. The policy looks through the wrist camera alone, whose image
is the cheaper one to draw without a GPU. Writes <out>/sft/policy and
<results>/starting_point.json; with --policy, that policy is only evaluated.

    python benchmarks/study/starting_point.py --help
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jobs import evaluation, run_jobs
from results import describe, result_json, results_of, write_result
from safetensors.torch import load_file, save_file
from settings import new_parser

from cfgrl_gym.cli import demos, sft
from cfgrl_gym.cli.configs import DemosConfig, SftConfig
from cfgrl_gym.whole_files import sha256

IMAGE_SIZE = 112
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Recipe:
    """How a start of the study is made.

    :param tasks: the tasks of each suite, each with the objects that its demonstrations pick; None:
        the task's own
    :param demos: demonstrations of each task
    :param image_stride: control steps between two images
    :param cameras: that are recorded; None: both
    :param perturbed: share of the demonstrations that begin elsewhere than LIBERO puts the hand
    :param steps: of the fit
    """

    tasks: dict[str, dict[int, list[str] | None]]
    demos: int
    image_stride: int
    cameras: list[str] | None
    perturbed: float
    steps: int


TINY = Recipe(
    tasks={"libero_object": dict.fromkeys((0, 5, 6, 8)), "libero_goal": {6: None}},
    demos=40,
    image_stride=4,
    cameras=None,
    perturbed=0.8,
    steps=1600,
)


def make(recipe: Recipe, out: Path) -> Path:
    """Record demonstrations and fit the policy; returns its folder."""
    for suite, tasks in recipe.tasks.items():
        for task, objects in tasks.items():
            demos.run(
                DemosConfig(
                    suite=suite,
                    task_id=task,
                    objects=objects,
                    demos=recipe.demos,
                    image_size=IMAGE_SIZE,
                    image_stride=recipe.image_stride,
                    cameras=recipe.cameras,
                    perturbed=recipe.perturbed,
                    out=str(out / "demos"),
                )
            )
    sft.run(
        SftConfig(
            demos=str(out / "demos"),
            horizon=16,
            cameras=["robot0_eye_in_hand"],
            image_size=IMAGE_SIZE,
            patch_size=28,
            steps=recipe.steps,
            dropout_prob=0.5,
            ema_decay=0.99,
            out=str(out / "sft"),
        )
    )
    policy = out / "sft" / "policy"
    forget_condition(policy)
    write_checksums(policy)
    return policy


def forget_condition(folder: Path) -> None:
    """Put a zero bias in place of the condition, so that v_1 begins as v_∅.

    A condition that demonstrations were fitted with is one that the network has learned to ignore,
    because o = 1 and ∅ were the same data (docs/study.md has what that costs).
    """
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not name.startswith("condition.")}
    kept["condition.embedding"] = torch.zeros_like(weights["condition.embedding"])
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "pi0_policy.json"):
        content = json.loads((folder / name).read_text()) | {"condition_mode": "bias"}
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def write_checksums(folder: Path) -> None:
    """Write checksums that `sha256sum -c SHA256SUMS` can check."""
    lines = [
        f"{sha256(file)}  {file.name}\n"
        for file in sorted(folder.iterdir())
        if file.suffix in (".json", ".safetensors")
    ]
    (folder / CHECKSUMS).write_text("".join(lines))


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/starting_point"), help="default: %(default)s")
    add("--policy", help="evaluate this one, such as libero_tiny, and make none")
    add("--results", type=Path, default=Path("benchmarks/results"))
    add("--jobs", type=int, default=2, help="evaluations at the same time (default: %(default)s)")
    args = parser.parse_args()
    policy = args.policy or str(make(TINY, args.out))
    jobs = {
        (suite, task): evaluation(
            policy, args.out / f"{suite}-{task}", task, [1.0], suite=suite, video=True
        )
        for suite, tasks in TINY.tasks.items()
        for task in tasks
    }
    run_jobs(list(jobs.values()), args.jobs)
    rows = []
    for (suite, task), job in jobs.items():
        results = [result_json(result) for result in results_of([job])]
        rows.append({"suite": suite, "task_id": task, "results": results})
        print(f"{suite} {task}: {describe(results[0])}")
    write_result(args.results / "starting_point.json", policy=Path(policy).name, tasks=rows)


if __name__ == "__main__":
    main()
