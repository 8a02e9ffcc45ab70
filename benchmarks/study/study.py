"""The whole study, one part after the other, and its report.

Learning curves with controls, guidance sweep, ablations; each part does only what isn't done yet,
so a study that was stopped goes on where it was. `--small` is one task, one seed, curves and sweep:
for a first look, in folders of its own. Writes the parts' JSON and pictures, <study>/report.html,
and <results>/study.json with the seconds that each part took in this call.

    python benchmarks/study/study.py --help

The report, 4 MB, is not in git. From the runs it is made again, here as docs/study.html, with

    cfgrl report runs/study --out docs/study.html --title "CFGRL on LIBERO with a tiny PI0"
"""

import time

import ablations
import guidance_sweep
import learning_curve
from results import write_result
from settings import parse_study

from cfgrl_gym.cli import report
from cfgrl_gym.cli.configs import ReportConfig


def main() -> None:
    study = parse_study(__doc__)
    seconds = {}
    for part in (learning_curve, guidance_sweep, *(() if study.small else (ablations,))):
        began = time.monotonic()
        part.main()
        seconds[part.PART] = time.monotonic() - began
    began = time.monotonic()
    report.run(
        ReportConfig(
            runs=[str(study.folder)],
            out=str(study.folder / "report.html"),
            title="CFGRL on LIBERO with a tiny PI0",
        )
    )
    seconds["report"] = time.monotonic() - began
    total = sum(seconds.values())
    write_result(
        study.results / "study.json", small=study.small, seconds=seconds, total_seconds=total
    )


if __name__ == "__main__":
    main()
