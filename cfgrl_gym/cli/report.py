"""Make one self-contained HTML page of trainings and evaluations.

It shows success before and after with 95% intervals, learning curves, guidance sweeps, ablations,
where the time goes, checks, filmstrips and configurations. It opens from disk, without a network,
and has its figures as JSON, too. Trainings that differ only in their seed are pooled. An evaluation
inside a training's folder counts as after it; one of the policy that a training started from counts
as before it.

example:
  cfgrl report runs/study --out report.html --title 'Dropout on libero_object'
"""

from pathlib import Path

from cfgrl_gym.cli.configs import ReportConfig
from cfgrl_gym.cli.reporting.content import collect
from cfgrl_gym.cli.reporting.page import MARK, render
from cfgrl_gym.cli.reporting.rates import count
from cfgrl_gym.cli.reporting.runs import find_runs
from cfgrl_gym.whole_files import whole_file

_HEAD = 2000  # characters at a page's beginning that contain the mark of a report


def run(config: ReportConfig) -> Path:
    """Read the runs, write the page and return its path.

    :raises FileNotFoundError: a run folder doesn't exist
    :raises FileExistsError: the page would replace something that isn't a report
    :raises ValueError: there are no runs, or a file of one is damaged
    """
    out = Path(config.out)
    _check_replaceable(out)
    runs = find_runs([config.runs] if isinstance(config.runs, str) else config.runs)
    page = render(collect(runs, config.title, config.embed_videos))
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as new:
        new.write_text(page, encoding="utf-8")
    what = f"{count(len(runs.trainings), 'training')}, {count(len(runs.evaluations), 'evaluation')}"
    print(f"report of {what}: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return out


def _check_replaceable(out: Path) -> None:
    if out.is_dir():
        raise FileExistsError(f"'{out}' is a folder; give --out a file, such as {out}/report.html")
    if out.exists():
        with out.open(encoding="utf-8", errors="replace") as file:
            if MARK not in file.read(_HEAD):
                raise FileExistsError(
                    f"'{out}' exists and is no report of cfgrl; only an earlier report is "
                    "replaced: choose another file with --out"
                )
