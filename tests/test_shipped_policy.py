"""The policy that comes with the package: whole, found by name, and able to act and to train."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cfgrl_gym.algorithms.pi0
from cfgrl_gym.algorithms.pi0 import CONDITION_MODES, Pi0Policy
from cfgrl_gym.algorithms.pi0.checkpoints.shipped import SHIPPED, find_shipped
from cfgrl_gym.algorithms.pi0.condition import OptimalityCondition
from cfgrl_gym.cli.environments import libero_spaces
from cfgrl_gym.cli.policies import find_checkpoint
from cfgrl_gym.wrappers.prompt import encode_prompt

FOLDER = Path(cfgrl_gym.algorithms.pi0.__file__).parent / "libero_tiny"
WRIST = ("left_wrist_0_rgb",)
PROMPT = "pick up the butter and place it in the basket"


def observation(batch: int = 2, slots: tuple[str, ...] = WRIST) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = {slot: rng.integers(0, 256, (batch, 112, 112, 3), dtype=np.uint8) for slot in slots}
    state = np.tile(np.array([-0.15, 0, 0.26, 3.1, 0, 0, 0.04, -0.04], np.float32), (batch, 1))
    return {**images, "state": state, "prompt": np.tile(encode_prompt(PROMPT), (batch, 1))}


def shipped(slots: tuple[str, ...] = WRIST, **kwargs: object) -> Pi0Policy:
    spaces_ = libero_spaces(112, 16, slots)
    return Pi0Policy(*spaces_, lambda _: 1e-3, checkpoint="libero_tiny", **kwargs)  # type: ignore[arg-type]


def test_its_files_are_those_of_the_checksums() -> None:
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    wanted = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert set(wanted) == {
        "config.json",
        "model.safetensors",
        "norm_stats.json",
        "pi0_policy.json",
    }
    for name, digest in wanted.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10e6


def test_it_is_found_by_name_unless_a_folder_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert SHIPPED == ("libero_tiny",)
    assert Path(find_shipped("libero_tiny")) == FOLDER
    assert find_shipped("libero_huge") == "libero_huge"
    checkpoint = find_checkpoint("libero_tiny", None)
    assert (checkpoint.preset, checkpoint.horizon, checkpoint.image_size) == ("tiny", 16, 112)
    assert checkpoint.cameras == WRIST
    Path("libero_tiny").mkdir()
    assert find_shipped("libero_tiny") == "libero_tiny"
    with pytest.raises(FileNotFoundError, match="libero_tiny"):
        find_checkpoint("libero_huge", None)


def test_it_acts_as_its_instruction_says() -> None:
    policy = shipped()
    one = observation()
    noise = torch.zeros(2, 16, 7)
    actions = policy.sample_actions(one, noise=noise, cfg_scale=1.0)
    assert actions.shape == (2, 16, 7)
    assert actions.isfinite().all()
    prompt = encode_prompt(PROMPT.replace("butter", "tomato sauce"))
    other = policy.sample_actions({**one, "prompt": np.tile(prompt, (2, 1))}, noise=noise)
    assert (other - actions).abs().max() > 0.02  # 1 mm a control step


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0, 2.0])
def test_an_action_does_not_depend_on_the_instruction_beside_it(cfg_scale: float) -> None:
    """Bit for bit, or an episode would depend on the tasks of the other environments."""
    policy, both = shipped(), observation()
    noise = torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(0))
    alone = policy.sample_actions(both, noise=noise, cfg_scale=cfg_scale)
    longest = (
        "put the white mug on the left plate and put the yellow and white mug on the right plate"
    )
    for beside in ("turn on the stove", longest):
        prompts = np.stack([encode_prompt(PROMPT), encode_prompt(beside)])
        actions = policy.sample_actions({**both, "prompt": prompts}, noise, cfg_scale)
        assert torch.equal(actions[0], alone[0])
        assert not torch.equal(actions[1], alone[1])


def test_its_condition_is_fresh_so_guidance_begins_with_nothing() -> None:
    policy, noise = shipped(), torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(0))
    assert policy.config.condition_mode == "bias"
    at = {w: policy.sample_actions(observation(), noise=noise, cfg_scale=w) for w in (0, 1, 5)}
    assert torch.equal(at[0], at[1])
    torch.testing.assert_close(at[5], at[0])


@pytest.mark.parametrize("mode", [mode for mode in CONDITION_MODES if mode != "text"])
def test_a_fresh_condition_of_any_kind_begins_with_nothing_on_its_network(mode: str) -> None:
    policy, noise = shipped(), torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(0))
    network: Any = policy.model
    network.condition = OptimalityCondition(mode, network.expert_hidden_size)
    null, positive = (
        policy.sample_actions(observation(), noise=noise, cfg_scale=w) for w in (0, 1)
    )
    torch.testing.assert_close(positive, null, atol=1e-5, rtol=0)


def test_images_that_it_was_not_trained_on_change_nothing() -> None:
    both = ("base_0_rgb", *WRIST)
    seen, ignored = observation(), observation(slots=both)
    ignored["left_wrist_0_rgb"] = seen["left_wrist_0_rgb"]
    noise = torch.zeros(2, 16, 7)
    policy = shipped(both)
    assert policy.cameras == WRIST
    torch.testing.assert_close(
        policy.sample_actions(ignored, noise=noise), shipped().sample_actions(seen, noise=noise)
    )
    rebuilt = Pi0Policy(
        *libero_spaces(112, 16, both), lambda _: 1e-3, **policy.constructor_arguments()
    )
    assert rebuilt.cameras == WRIST


def test_an_environment_without_its_camera_is_refused() -> None:
    with pytest.raises(ValueError, match=r"looks at left_wrist_0_rgb, but .* have base_0"):
        shipped(("base_0_rgb",))
