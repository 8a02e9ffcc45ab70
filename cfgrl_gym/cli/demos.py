"""Record demonstrations of a scripted pick-and-place expert, in LIBERO's HDF5 format.

They are recorded on real LIBERO, one file for each task. The expert knows the tasks of
libero_object and similar ones.

example:
  cfgrl demos --suite libero_object --task_id [0,5] --demos 50 --image_size 112 --workers 4
"""

from pathlib import Path

from cfgrl_gym.cli.configs import DemosConfig
from cfgrl_gym.cli.run_folder import create_folder
from cfgrl_gym.cli.run_logs import progress_bar
from cfgrl_gym.demos.recording import RecordingConfig, demonstration_path, record, save
from cfgrl_gym.envs.suites import select_tasks


def run(config: DemosConfig) -> list[Path]:
    """Record demonstrations and return their files; each is complete or doesn't exist at all.

    :raises FileExistsError: a file exists already
    :raises ValueError: tasks don't exist, or the expert can't do them
    """
    out = Path(config.out)
    tasks = select_tasks(config.suite, config.task_id)
    paths = [demonstration_path(out, task.suite, task.task_id) for task in tasks]
    for path in paths:
        if path.exists():
            raise FileExistsError(
                f"'{path}' exists, and nothing is overwritten; choose another folder with --out, "
                "or delete it"
            )
    for task, path in zip(tasks, paths, strict=True):
        job = RecordingConfig(task_id=task.task_id, **config.arguments_of(RecordingConfig))
        demonstrations = []
        with progress_bar(f"task {task.task_id}", config.demos, "demo") as bar:
            try:
                for demonstration in record(job):
                    demonstrations.append(demonstration)
                    bar.update()
            except RuntimeError as error:  # the expert fails too often; the message says so
                raise ValueError(str(error)) from error
        save(path, demonstrations, job)
        create_folder(path.with_name(f"{path.stem}.run"), config)
        steps = sum(len(demonstration.actions) for demonstration in demonstrations)
        print(f"{path}: {len(demonstrations)} demonstrations, {steps} control steps")
    return paths
