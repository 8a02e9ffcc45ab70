"""The whole study, one part after the other, and its report.

Learning curves with controls, guidance sweep, ablations; each part does only what isn't done yet,
so a study that was stopped goes on where it was. `--small` is one task, one seed, curves and sweep:
for a first look. Writes the parts' JSON and pictures and <study>/report.html.

    python benchmarks/study.py --help
"""

import ablations
import guidance_sweep
import learning_curve
from study_settings import parse_study

from cfgrl_gym.cli import report
from cfgrl_gym.cli.configs import ReportConfig


def main() -> None:
    study = parse_study(__doc__)
    learning_curve.main()
    guidance_sweep.main()
    if not study.small:
        ablations.main()
    report.run(
        ReportConfig(
            runs=[str(study.folder)],
            out=str(study.folder / "report.html"),
            title="CFGRL on LIBERO with a tiny PI0",
        )
    )


if __name__ == "__main__":
    main()
