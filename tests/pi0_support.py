"""Small PI0 models, inputs and spaces that the test_pi0_* files share."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from transformers import PI0Config, PI0ForConditionalGeneration

from cfgrl_gym.algorithms.pi0 import Pi0ForCFGRL, Pi0Policy, TinySizes
from cfgrl_gym.algorithms.pi0.presets import new_model, tiny_config
from cfgrl_gym.algorithms.pi0.tokenizer import BYTE_IMAGE_TOKEN_ID

torch.set_num_threads(1)

MODES = ("token", "bias", "concat")
HORIZON, IMAGE_SIZE, PATCH = 6, 28, 14
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH) ** 2
# Padded widths as in the full model: the padding's code path is on.
SIZES = TinySizes(
    image_size=IMAGE_SIZE,
    patch_size=PATCH,
    hidden_size=32,
    vision_layers=1,
    num_layers=2,
    num_heads=2,
    max_action_dim=32,
    max_state_dim=32,
)


def randomise_condition(model: Pi0ForCFGRL, scale: float = 1.0, seed: int = 5) -> None:
    """Every condition parameter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.condition.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def make_model(mode: str, randomise: bool = True) -> Pi0ForCFGRL:
    model = new_model(tiny_config(SIZES, HORIZON, mode), seed=0).eval()
    if randomise:
        randomise_condition(model)
    return model


def plain_pi0(model: Pi0ForCFGRL) -> PI0ForConditionalGeneration:
    """transformers' own PI0 with the same weights: the independent reference."""
    config = PI0Config.from_dict(model.config.to_dict())
    plain = PI0ForConditionalGeneration(config).eval()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["model.dit.embed_tokens.weight"]
    assert all(name.startswith("condition.") for name in unexpected)
    return plain


def make_inputs(batch: int = 4, cameras: int = 2, seed: int = 1) -> dict[str, Any]:
    """transformers' inputs, with prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [7 - i % 3 for i in range(batch)]
    text = torch.randint(3, 200, (batch, 8), generator=generator)
    text_mask = (torch.arange(8)[None] < torch.tensor(lengths)[:, None]).long()
    images = torch.full((batch, cameras * TOKENS_PER_IMAGE), BYTE_IMAGE_TOKEN_ID)
    return {
        "state": torch.randn(batch, 32, generator=generator),
        "noise": torch.randn(batch, HORIZON, 32, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "input_ids": torch.cat([images, text * text_mask], 1),
        "attention_mask": torch.cat([torch.ones_like(images), text_mask], 1),
        "pixel_values": torch.rand(batch, cameras, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        * 2
        - 1,
        "pixel_attention_mask": torch.ones(batch, cameras, dtype=torch.bool),
    }


def rows(inputs: dict[str, Any], index: slice | list[int]) -> dict[str, Any]:
    return {key: value[index] for key, value in inputs.items()}


def make_spaces(
    chunk: int | None = HORIZON, cameras: int = 2, size: int = 32
) -> tuple[spaces.Dict, spaces.Box]:
    names = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")[:cameras]
    observation: dict[str, spaces.Space] = {
        name: spaces.Box(0, 255, (size, size, 3), np.uint8) for name in names
    }
    observation["state"] = spaces.Box(-np.inf, np.inf, (8,), np.float32)
    observation["prompt"] = spaces.Box(0, 255, (64,), np.uint8)
    shape = (7,) if chunk is None else (chunk, 7)
    return spaces.Dict(observation), spaces.Box(-1, 1, shape, np.float32)


def make_observation(
    batch: int = 3, cameras: int = 2, size: int = 32, seed: int = 2
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")[:cameras]
    obs = {name: rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8) for name in names}
    obs["state"] = rng.normal(size=(batch, 8)).astype(np.float32)
    prompts = [b"pick up the can", b"open the drawer", b"close it"]
    obs["prompt"] = np.zeros((batch, 64), np.uint8)
    for i in range(batch):
        text = prompts[i % len(prompts)]
        obs["prompt"][i, : len(text)] = np.frombuffer(text, np.uint8)
    return obs


def make_policy(mode: str = "token", randomise: bool = True, **kwargs: Any) -> Pi0Policy:
    kwargs.setdefault("sizes", SIZES)
    observation_space, action_space = make_spaces()
    policy = Pi0Policy(
        observation_space, action_space, lambda _: 1e-3, condition_mode=mode, **kwargs
    )
    if randomise:
        randomise_condition(policy.model)
    policy.set_training_mode(False)
    return policy


class PromptEnv(gym.Env):
    """Two chunks an episode, observed as LiberoChunked-v0 is; it pays where the mean of what was
    executed is positive, so that an untrained policy succeeds about half of the time."""

    def __init__(self, observation_stride: int | None = None) -> None:
        self.observation_space, self.action_space = make_spaces()
        self.observation_stride = observation_stride

    def _observe(self) -> dict[str, np.ndarray]:
        observation = make_observation(batch=1, seed=int(self.np_random.integers(2**31)))
        return {key: value[0] for key, value in observation.items()}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.executed: list[float] = []
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Any:
        self.executed.append(float(action.mean()))
        done = len(self.executed) == 2
        success = done and sum(self.executed) > 0
        rewards = np.zeros(HORIZON)
        rewards[-1] = float(success)
        info: dict[str, Any] = {"rewards": rewards, "n_steps": HORIZON, "is_success": success}
        if self.observation_stride:
            offsets = range(self.observation_stride, HORIZON, self.observation_stride)
            info["observations"] = [(offset, self._observe()) for offset in offsets]
        return self._observe(), float(success), done, False, info
