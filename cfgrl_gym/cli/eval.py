"""`cfgrl eval`: success rate over the benchmark's initial states."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import configure

from cfgrl_gym.algorithms.evaluation import Evaluation, evaluate, wilson_interval
from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.cli.configs import EvalConfig
from cfgrl_gym.cli.environments import environment_arguments, vec_env
from cfgrl_gym.cli.policies import load_policy
from cfgrl_gym.cli.progress import progress_bar
from cfgrl_gym.cli.run_folder import VIDEO_FILE, choose_folder, create_folder
from cfgrl_gym.cli.video import record_episode
from cfgrl_gym.envs.suites import load_init_states, select_tasks

RESULT_FILE = "eval.json"


def find_starts(config: EvalConfig) -> list[Start]:
    """Every episode to run, task by task.

    :raises ValueError: tasks or initial states that don't exist
    """
    starts = []
    for task in select_tasks(config.suite, config.task_id):
        count = len(load_init_states(config.suite, task.task_id))
        chosen = config.init_states
        if chosen is None:
            chosen = list(range(count if config.episodes is None else config.episodes))
        for state in chosen:
            if not 0 <= state < count:
                raise ValueError(
                    f"{config.suite} task {task.task_id} has the initial states 0 to {count - 1}; "
                    f"{state} was asked for: change --episodes or --init_states"
                )
            starts.append(Start(task_id=task.task_id, init_state_id=state))
    return starts


def _rate(successes: int, episodes: int) -> dict[str, Any]:
    return {
        "success_rate": successes / episodes,
        "interval_95": list(wilson_interval(successes, episodes)),
        "successes": successes,
        "n_episodes": episodes,
    }


def summarize(cfg_scale: float, evaluation: Evaluation) -> dict[str, Any]:
    """One cfg_scale's part of eval.json."""
    by_task: dict[int, list[bool]] = {}
    for episode in evaluation.episodes:
        assert episode.task_id is not None
        by_task.setdefault(episode.task_id, []).append(episode.success)
    return {
        "cfg_scale": cfg_scale,
        **_rate(evaluation.successes, len(evaluation.episodes)),
        "tasks": {str(task): _rate(sum(done), len(done)) for task, done in by_task.items()},
        "episodes": [asdict(episode) for episode in evaluation.episodes],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Success rates as text: a row for each cfg_scale and task, and one for all tasks."""
    lines = [f"{'cfg_scale':>9}  {'task':>4}  {'success':>9}  {'rate':>6}  95% interval"]
    for result in results:
        rows = dict(result["tasks"])
        if len(rows) > 1:
            rows["all"] = result
        for task, row in rows.items():
            low, high = row["interval_95"]
            lines.append(
                f"{result['cfg_scale']:>9g}  {task:>4}  "
                f"{row['successes']:>4}/{row['n_episodes']:<4}  {row['success_rate']:>6.1%}  "
                f"{low:.1%} to {high:.1%}"
            )
    return "\n".join(lines)


def run(config: EvalConfig) -> Path:
    """Evaluate and write eval.json; returns the run folder.

    :raises ValueError: options that don't fit together
    :raises FileNotFoundError: no such policy
    :raises FileExistsError: the run folder has something in it
    """
    starts = find_starts(config)
    out = choose_folder("eval", config.out)
    policy = load_policy(config)
    given = policy.cfg_scale if config.cfg_scale is None else config.cfg_scale
    scales = [float(w) for w in (given if isinstance(given, list) else [given])]
    arguments = environment_arguments(
        config, chunk_size=policy.chunk_size, image_size=policy.image_size
    )
    results: list[dict[str, Any]] = []
    with vec_env(arguments, config.n_envs) as env:
        create_folder(out, config)
        about = f"chunks of {policy.chunk_size} actions, {env.num_envs} environment(s)"
        print(f"{about}, {policy.device}; results in {out}")
        logger = configure(str(out), ["csv", "json", "tensorboard"])
        for number, scale in enumerate(scales):
            with progress_bar(f"cfg_scale {scale:g}", len(starts), "episode") as bar:

                def on_episode(done: int, successes: int, bar: Any = bar) -> None:
                    bar.set_postfix(success=f"{successes}/{done}", refresh=False)
                    bar.update(done - bar.n)

                evaluation = evaluate(
                    policy, env, starts, cfg_scale=scale, seed=config.seed, on_episode=on_episode
                )
            results.append(summarize(scale, evaluation))
            # Written after every value, so that a sweep that is stopped keeps what it has.
            content = {"policy": config.policy, "suite": config.suite, "results": results}
            text = json.dumps(content, indent=2) + "\n"
            (out / RESULT_FILE).write_text(text, encoding="utf-8")
            logger.record("eval/cfg_scale", scale)
            logger.record("eval/success_rate", evaluation.success_rate)
            logger.dump(number)
        logger.close()
    print(table(results))
    if config.video:
        record_episode(policy, arguments, starts[0], out / VIDEO_FILE, scales[0], config.seed)
    return out
