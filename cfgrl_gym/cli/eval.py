"""Measure the success rate over the benchmark's initial states, with its 95% Wilson interval.

Writes every episode to <out>/eval.json, and a video of the first success and the first failure. A
run that was stopped or killed goes on with --resume, and nothing that was done is done again.
The policy may also be the model.zip of `cfgrl train`, or one of the checkpoints in its run folder.

example:
  cfgrl eval --policy runs/train --task_id 0 --episodes 20 --cfg_scale [1,1.5,2,3]
"""

import json
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv

from cfgrl_gym.algorithms.distributed.agreement import digest
from cfgrl_gym.algorithms.groups import Start
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.cli.configs import EvalConfig
from cfgrl_gym.cli.environments import environment_arguments, vec_env
from cfgrl_gym.cli.evaluations import as_list, find_starts, measure, record_episode
from cfgrl_gym.cli.outcome_log import OutcomeLog
from cfgrl_gym.cli.policies import load_policy
from cfgrl_gym.cli.run_folder import (
    OUTCOMES_FILE,
    RESULT_FILE,
    VIDEO_FILE,
    choose_folder,
    create_folder,
    locked,
)
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
    """Evaluate the policy, or go on with an evaluation, write eval.json and return the run folder.

    :raises ValueError: options don't fit together, or the policy isn't that of the run to resume
    :raises FileNotFoundError: there is no such policy
    :raises FileExistsError: the run folder isn't empty, or another process writes there
    """
    starts = find_starts(config.suite, config.task_id, config.episodes, config.init_states)
    resume = config.resume is not None
    out = Path(str(config.resume)) if resume else choose_folder("eval", config.out)
    policy = load_policy(config)
    scales = as_list(config.cfg_scale) or [policy.cfg_scale]
    arguments = environment_arguments(config, policy.chunk_size, policy.image_size, policy.cameras)
    with ExitStack() as stack:
        env = stack.enter_context(vec_env(arguments, config))
        if not resume:
            create_folder(out, config)
        stack.enter_context(locked(out))
        log = OutcomeLog(out / OUTCOMES_FILE, digest(policy))
        about = f"chunks of {policy.chunk_size} actions, {env.num_envs} environment(s)"
        print(f"{about}, {policy.device}; results in {out}")
        try:
            results = _evaluate(config, policy, env, starts, scales, log, out)
        except BaseException:
            print(f"go on with: cfgrl eval --resume {out}", file=sys.stderr)
            raise
    print(table(results))
    if config.video:
        for name, episode in examples(results[0]).items():
            start = Start(task_id=episode["task_id"], init_state_id=episode["init_state_id"])
            video = out / f"{name}.mp4"
            again = record_episode(policy, arguments, start, video, scales[0], config.seed)
            if again != episode["success"]:  # rounding differs with the number of environments
                video.rename(out / VIDEO_FILE)
    return out


def _evaluate(
    config: EvalConfig,
    policy: FlowPolicy,
    env: VecEnv,
    starts: list[Start],
    scales: list[float],
    log: OutcomeLog,
    out: Path,
) -> list[dict[str, Any]]:
    """Evaluate every cfg_scale, and write eval.json and the logs after each."""
    results: list[dict[str, Any]] = []
    logger = configure(str(out), ["csv", "json", "tensorboard"])
    with closing(logger):
        for number, scale in enumerate(scales):
            add, known = log.adding(scale), log.known(scale)
            results.append(
                measure(policy, env, starts, scale, config.seed, on_outcome=add, known=known)
            )
            content = {"policy": config.policy, "suite": config.suite, "results": results}
            text = json.dumps(content, indent=2) + "\n"
            with whole_file(out / RESULT_FILE) as new:
                new.write_text(text, encoding="utf-8")
            logger.record("eval/cfg_scale", scale)
            logger.record("eval/success_rate", results[-1]["success_rate"])
            logger.record("eval/guidance_gap", results[-1]["guidance_gap"])
            logger.dump(number)
    return results
