"""The main job on real LIBERO: CFGRL makes the shipped policy better, in minutes on a laptop.

`libero_tiny` is evaluated on all 50 benchmark states of one task, trained with CFGRL from the first
25 of them, and evaluated again, with and without guidance. Writes the run with its report.html to
<out>, and <results>/main_job.json (every episode, every iteration, seconds, versions), .png
(success before and after) and main_job_log.png (loss and labels by iteration).

    python benchmarks/study/main_job.py --help
"""

from pathlib import Path

from results import training_json, write_result
from settings import GROUPS, ITERATIONS, MAIN_TASK, new_parser, training_options

from cfgrl_gym.cli import report, train
from cfgrl_gym.cli.configs import ReportConfig, TrainConfig
from cfgrl_gym.cli.reporting.content import collect
from cfgrl_gym.cli.reporting.figures import save_picture
from cfgrl_gym.cli.reporting.plots import Palette, comparison_plot, log_plot
from cfgrl_gym.cli.reporting.runs import find_runs
from cfgrl_gym.cli.run_folder import choose_folder


def results(folder: Path, out: Path) -> None:
    """Print, write and draw the run's results.

    :param out: folder for JSON and pictures
    """
    runs = find_runs([str(folder)])
    found = collect(runs, "main job", embed_videos=False)
    for row in found.comparisons:
        for when, result in (("before", row.before), ("after", row.after)):
            print(f"{when:>6}  w = {row.cfg_scale:g}: {result and result.rate}")
    write_result(out / "main_job.json", run=training_json(runs.trainings[0], []))
    palette = Palette(found.methods)
    save_picture(comparison_plot(found.comparisons, palette), out / "main_job.png")
    log = log_plot(found.methods, palette)
    if log is not None:
        save_picture(log, out / "main_job_log.png")


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--task_id", type=int, default=MAIN_TASK, help="of libero_object (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--iterations", type=int, default=ITERATIONS, help="default: %(default)s")
    add("--groups", type=int, default=GROUPS, help="of 8 episodes, each iteration")
    add("--cfg_scale", type=float, nargs="+", default=[1.0, 2.0], help="evaluated")
    add("--out", help="run folder, must be empty (default: runs/main_job-<date-time>)")
    add("--results", type=Path, default=Path("benchmarks/results"), help="for JSON and pictures")
    args = parser.parse_args()
    options = training_options(
        args.task_id,
        args.seed,
        args.iterations,
        args.groups,
        cfg_scale=1.0,
        eval_every=args.iterations,
        eval_cfg_scale=args.cfg_scale,
        out=str(choose_folder("main_job", args.out)),
    )
    folder = train.run(TrainConfig(**options))
    report.run(ReportConfig(runs=[str(folder)], out=str(folder / "report.html")))
    results(folder, args.results)


if __name__ == "__main__":
    main()
