"""Measure the success rate over the benchmark's initial states, with its 95% Wilson interval.

Writes every episode to <out>/eval.json, and a video of the first success and the first failure.
The policy may also be the model.zip of `cfgrl train`, or one of the checkpoints in its run folder.

example:
  cfgrl eval --policy runs/train --task_id 0 --episodes 20 --cfg_scale [1,1.5,2,3]
"""

import json
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import configure

from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.cli.configs import EvalConfig
from cfgrl_gym.cli.environments import environment_arguments, vec_env
from cfgrl_gym.cli.evaluations import as_list, find_starts, measure, record_episode
from cfgrl_gym.cli.policies import load_policy
from cfgrl_gym.cli.run_folder import RESULT_FILE, VIDEO_FILE, choose_folder, create_folder
from cfgrl_gym.whole_files import whole_file


def examples(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the first success and the first failure among a result's episodes, if any."""
    found: dict[str, dict[str, Any]] = {}
    for episode in result["episodes"]:
        found.setdefault("success" if episode["success"] else "failure", episode)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Format success rates as text: a row for each cfg_scale and task, and one for all tasks."""
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
    """Evaluate the policy, write eval.json and return the run folder.

    :raises ValueError: options don't fit together
    :raises FileNotFoundError: there is no such policy
    :raises FileExistsError: the run folder isn't empty
    """
    starts = find_starts(config.suite, config.task_id, config.episodes, config.init_states)
    out = choose_folder("eval", config.out)
    policy = load_policy(config)
    scales = as_list(config.cfg_scale) or [policy.cfg_scale]
    arguments = environment_arguments(config, policy.chunk_size, policy.image_size, policy.cameras)
    results: list[dict[str, Any]] = []
    with vec_env(arguments, config) as env:
        create_folder(out, config)
        about = f"chunks of {policy.chunk_size} actions, {env.num_envs} environment(s)"
        print(f"{about}, {policy.device}; results in {out}")
        logger = configure(str(out), ["csv", "json", "tensorboard"])
        for number, scale in enumerate(scales):
            results.append(measure(policy, env, starts, scale, config.seed))
            # Written after every value, so that a sweep that is stopped keeps its results so far.
            content = {"policy": config.policy, "suite": config.suite, "results": results}
            text = json.dumps(content, indent=2) + "\n"
            with whole_file(out / RESULT_FILE) as new:
                new.write_text(text, encoding="utf-8")
            logger.record("eval/cfg_scale", scale)
            logger.record("eval/success_rate", results[-1]["success_rate"])
            logger.record("eval/guidance_gap", results[-1]["guidance_gap"])
            logger.dump(number)
        logger.close()
    print(table(results))
    if config.video:
        for name, episode in examples(results[0]).items():
            start = Start(task_id=episode["task_id"], init_state_id=episode["init_state_id"])
            video = out / f"{name}.mp4"
            again = record_episode(policy, arguments, start, video, scales[0], config.seed)
            if again != episode["success"]:  # rounding differs with the number of environments
                video.rename(out / VIDEO_FILE)
    return out
