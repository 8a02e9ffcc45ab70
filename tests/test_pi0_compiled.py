"""Denoising steps through torch.compile."""

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pi0_support import HORIZON, make_observation, make_policy
from torch import Tensor

from cfgrl_gym.algorithms.flow import NULL, POSITIVE
from cfgrl_gym.algorithms.pi0 import Pi0Policy

TORCH_COMPILE = torch.compile


def sample(policy: Pi0Policy, batch: int = 3) -> Tensor:
    noise = torch.randn(batch, HORIZON, 32, generator=torch.Generator().manual_seed(0))
    return policy.act(make_observation(batch), noise=noise, cfg_scale=1.5).model_actions


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_denoising_gives_the_same_actions() -> None:
    close(sample(make_policy(compile_denoising=True)), sample(make_policy()))


def test_a_denoising_step_is_one_graph() -> None:
    policy = make_policy()
    inputs = policy.encode_observation(make_observation())
    x_t, t = torch.randn(3, HORIZON, 32), torch.rand(3)
    prefix = policy.encode_prefixes(inputs, (NULL,))[NULL]
    arguments = (prefix, inputs["state"], x_t, t, (NULL, POSITIVE))
    whole = TORCH_COMPILE(policy.model.branch_velocities, fullgraph=True, backend="eager")
    with torch.no_grad():
        actual, expected = whole(*arguments), policy.model.branch_velocities(*arguments)
    for one, other in zip(actual, expected, strict=True):
        close(one, other)


def test_more_batch_sizes_than_torch_compiles_for_are_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_code(function: Any, **kwargs: Any) -> Any:
        kwargs.pop("mode")  # the limit is the tracer's; what follows it only takes time
        return TORCH_COMPILE(function, backend="eager", **kwargs)

    monkeypatch.setattr(torch, "compile", without_code)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    plain, compiled = (
        make_policy(compile_denoising=on, num_inference_steps=2) for on in (False, True)
    )
    for batch in range(1, 5):
        close(sample(compiled, batch), sample(plain, batch))


def _like_a_cuda_graph(function: Callable[..., Any], memory: dict[int, Tensor], *args: Any) -> Any:
    outputs = []
    for i, output in enumerate(function(*args)):
        memory.setdefault(i, torch.empty_like(output)).copy_(output)
        outputs.append(memory[i])
    return tuple(outputs)


@pytest.mark.parametrize("use_prefix_dropout", [False, True])
def test_branches_may_write_their_results_to_the_same_memory(
    monkeypatch: pytest.MonkeyPatch, use_prefix_dropout: bool
) -> None:
    """As replays of a CUDA graph do; with prefix dropout a step is two calls."""
    plain = make_policy(use_prefix_dropout=use_prefix_dropout)
    monkeypatch.setattr(torch, "compile", lambda f, **_: partial(_like_a_cuda_graph, f, {}))
    compiled = make_policy(use_prefix_dropout=use_prefix_dropout, compile_denoising=True)
    close(sample(compiled), sample(plain))
