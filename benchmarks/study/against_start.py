"""Trained policies guided against the policy that they started from, without training them again.

v = v_start,∅ + w·(v_1 - v_start,∅), which is what `cfg_reference="start"` does; a policy that
collected at w = 1 is the same with and without it, so that finished runs will do. A control has no
condition: its v_1 is its v_∅, and the same guidance extrapolates beyond it. Each is evaluated on
all 50 benchmark states. Writes <results>/against_start.json, a row for each run, beside those that
are there.

    python benchmarks/study/against_start.py runs/comparison/tuning/CFGRL-...
"""

from pathlib import Path

from jobs import evaluation, run_jobs
from results import describe, read_rows, result_json, results_of, write_result
from settings import EVALUATION_SEED, MAIN_TASK, START, new_parser

from cfgrl_gym.cli.configs import EvalConfig
from cfgrl_gym.cli.policies import load_policy

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)


def give_reference(trained: Path, start: str, out: Path) -> Path:
    """Write a policy that has the weights of `trained` and `start` as its reference."""
    policy = load_policy(EvalConfig(policy=str(trained), cfg_reference="start", device="cpu"))
    before = load_policy(EvalConfig(policy=start, device="cpu"))
    assert policy.reference is not None
    policy.reference.put(dict(before.named_parameters()))
    policy.save_pretrained(out)
    return out


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="run folders of the trained policies")
    add("--start", default=START, help="the policy that they began with (default: %(default)s)")
    add("--task_id", type=int, default=MAIN_TASK, help="of libero_object (default: %(default)s)")
    add("--cfg_scale", type=float, nargs="+", default=list(SCALES), help="evaluated")
    add("--jobs", type=int, default=2, help="evaluations at the same time (default: %(default)s)")
    add("--study", type=Path, default=Path("runs/against_start"), help="folder for the evaluations")
    add("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    file = args.results / "against_start.json"
    jobs = {}
    for run in args.runs:
        folder = args.study / run.name
        if not (folder / "policy").exists():
            give_reference(run / "policy", args.start, folder / "policy")
        jobs[run.name] = evaluation(
            folder / "policy",
            folder / "eval",
            args.task_id,
            args.cfg_scale,
            cfg_reference="start",
            seed=EVALUATION_SEED,
        )
    run_jobs(list(jobs.values()), args.jobs)
    rows = [row for row in read_rows(file, "policies") if row["run"] not in jobs]
    for name, job in jobs.items():
        results = [result_json(result) for result in results_of([job])]
        rows.append({"run": name, "task_id": args.task_id, "start": args.start, "results": results})
    write_result(file, policies=rows)
    for row in rows:
        at = "; ".join(f"w = {r['cfg_scale']:g}: {describe(r)}" for r in row["results"])
        print(f"{row['run']}: {at}")


if __name__ == "__main__":
    main()
