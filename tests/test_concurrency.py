"""Several processes at once, from nothing: caches, compiled code, LIBERO's configuration."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import hashlib, sys
import gymnasium as gym, numpy as np
env = gym.make("cfgrl_gym:LiberoChunked-v0", task_id=8, image_size=32, chunk_size=4)
digest = hashlib.sha256()
observation, _ = env.reset(options={"task_id": 8, "init_state_id": 3})
for actions in np.random.default_rng(0).uniform(-1, 1, (3, 4, 7)).astype(np.float32):
    for key in sorted(observation):
        digest.update(observation[key].tobytes())
    observation, *_ = env.step(actions)
env.close()
print(digest.hexdigest())
"""


def test_runs_that_begin_at_once_with_empty_caches_do_not_disturb_one_another(
    tmp_path: Path,
) -> None:
    cache = {"CFGRL_GYM_CACHE": str(tmp_path / "models"), "NUMBA_CACHE_DIR": str(tmp_path / "code")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | cache | {"TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    results = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], results
    digests = {out.strip().splitlines()[-1] for out, _ in results}
    assert len(digests) == 1
    # What they leave behind is the cache alone: nothing half written, no configuration files.
    assert {path.name for path in tmp_path.iterdir()} <= {"models", "code"}
    kept = [path.name for path in (tmp_path / "models").rglob("*") if path.is_file()]
    assert kept
    assert not [name for name in kept if "tmp" in name or name.startswith(".")]
