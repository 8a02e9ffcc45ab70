"""Guidance against a reference: v = v_ref,∅ + w·(v_1 - v_ref,∅), with weights from before."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cfgrl_envs import QueueEnv, SeedEnv, vec
from pi0_support import HORIZON, PromptEnv, make_observation, make_policy, make_spaces
from safetensors.torch import load_file, save_file
from test_resume import all_state, assert_equal_states, go_on
from torch import Tensor

from cfgrl_gym.algorithms import CFGRL, Pi0Policy
from cfgrl_gym.algorithms.guidance import BRANCHES
from cfgrl_gym.algorithms.policies import FlowPolicy
from cfgrl_gym.cli.configs import EvalConfig
from cfgrl_gym.cli.policies import load_policy

OBS = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)
STEPS = 4
FILE = "reference.safetensors"


def make(cfg_reference: str = "null", ema_decay: float | None = 0.9, **changed: Any) -> CFGRL:
    kwargs: dict[str, Any] = {
        "net_arch": [16],
        "ema_decay": ema_decay,
        "num_inference_steps": STEPS,
    }
    settings: dict[str, Any] = {
        "rloo_batch_size": 3,
        "groups_per_iteration": 2,
        "batch_size": 16,
        "replay_iterations": 0,  # they are not saved
        "learning_rate": 1e-2,
        "cfg_scale": 2.0,
        "seed": 3,
        "device": "cpu",
        "policy_kwargs": kwargs,
    }
    if cfg_reference != "null":
        kwargs["cfg_reference"] = cfg_reference
    return CFGRL("MlpPolicy", vec(SeedEnv, 2), **(settings | changed))


def learn(algorithm: CFGRL, iterations: int) -> FlowPolicy:
    """The policy that the last of these updates began with, as it was then."""
    before = deepcopy(algorithm.policy)
    for _ in range(iterations):
        before = deepcopy(algorithm.policy)
        algorithm.learn(10**6, max_iterations=1, reset_num_timesteps=False, log_interval=None)
    return before


def noise_of(policy: FlowPolicy, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, policy.horizon, policy.action_width, generator=generator)


def act(policy: FlowPolicy, w: float, obs: Any = OBS) -> Tensor:
    rows = len(obs["state"] if isinstance(obs, dict) else obs)
    return policy.act(obs, noise=noise_of(policy, rows), cfg_scale=w).model_actions


def by_hand(reference: FlowPolicy, policy: FlowPolicy, w: float, obs: Any = OBS) -> Tensor:
    """Euler's method on two policies' velocities, each policy with its own weights."""
    rows = len(obs["state"] if isinstance(obs, dict) else obs)
    steps = policy.num_inference_steps

    def integrate(velocity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x = noise_of(policy, rows)
        for step in range(steps):
            x = x - velocity(x, torch.full((rows,), 1 - step / steps)) / steps
        return x

    def null(x: Tensor, t: Tensor) -> Tensor:
        return reference.predict_velocity(obs, x, t, None)

    def positive(x: Tensor, t: Tensor) -> Tensor:
        return policy.predict_velocity(obs, x, t, 1)

    if policy.guidance == "action":
        start = integrate(null)
        return start + w * (integrate(positive) - start)
    return integrate(lambda x, t: null(x, t) + w * (positive(x, t) - null(x, t)))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


# MlpPolicy, trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["velocity", "action"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("cfg_reference", ["start", "previous"])
def test_guidance_is_that_of_two_policies_by_hand(
    cfg_reference: str, ema_decay: float | None, guidance: Any
) -> None:
    algorithm = make(cfg_reference, ema_decay)
    policy = algorithm.policy
    policy.guidance = guidance
    start = deepcopy(policy)
    previous = learn(algorithm, 3)
    reference, other = (start, previous) if cfg_reference == "start" else (previous, start)
    for w in (0.5, 2.0):
        close(act(policy, w), by_hand(reference, policy, w))
        for wrong in (other, policy):
            assert not torch.allclose(act(policy, w), by_hand(wrong, policy, w), atol=1e-3)


def test_the_gap_is_measured_against_the_reference() -> None:
    algorithm = make("start")
    policy, start = algorithm.policy, deepcopy(algorithm.policy)
    learn(algorithm, 2)
    chunks, noise, t = torch.zeros(4, 1, 2), noise_of(policy, 4), torch.full((4,), 0.5)
    x = 0.5 * noise
    difference = policy.predict_velocity(OBS, x, t, 1) - start.predict_velocity(OBS, x, t, None)
    gap = policy.guidance_gap(OBS, chunks, t, noise)
    close(gap, difference.square().mean((1, 2)).sqrt())
    policy.cfg_reference = "null"
    assert not torch.allclose(gap, policy.guidance_gap(OBS, chunks, t, noise), atol=1e-3)


@pytest.mark.parametrize("cfg_reference", ["start", "previous"])
def test_w_0_is_the_reference_and_w_1_the_policy_bit_for_bit(cfg_reference: str) -> None:
    algorithm = make(cfg_reference)
    start = deepcopy(algorithm.policy)
    previous = learn(algorithm, 3)
    for each in (start, previous):
        each.cfg_reference = "null"
    policy, plain = algorithm.policy, deepcopy(algorithm.policy)
    plain.cfg_reference = "null"
    expected = start if cfg_reference == "start" else previous
    assert torch.equal(act(policy, 0.0), act(expected, 0.0))
    assert torch.equal(act(policy, 1.0), act(plain, 1.0))
    assert not torch.equal(act(policy, 0.0), act(plain, 0.0))
    assert not torch.equal(act(start, 0.0), act(previous, 0.0))
    forced = pytest.MonkeyPatch()
    with forced.context() as patched:
        patched.setenv("PI0_IS_POSITIVE", "none")
        assert torch.equal(act(policy, 2.0), act(expected, 0.0))


@pytest.mark.parametrize("cfg_reference", ["start", "previous"])
def test_before_the_first_update_the_policy_is_its_own_reference(cfg_reference: str) -> None:
    policy, plain = make(cfg_reference).policy, make().policy
    with torch.no_grad():
        for one, other in zip(policy.parameters(), plain.parameters(), strict=True):
            one.add_(0.1)  # weights may be set after the constructor
            other.copy_(one)
    for w in (0.0, 1.0, 2.0):
        assert torch.equal(act(policy, w), act(plain, w))


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_is_what_acted_and_not_the_optimizer_s_weights(training: bool) -> None:
    policy = make("previous").policy
    policy.set_training_mode(True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    policy.after_optimizer_step()
    policy.set_training_mode(training)
    acted = act(policy, 1.0)
    policy.before_update()
    assert policy.training == training
    assert torch.equal(act(policy, 1.0), acted)
    plain = deepcopy(policy)
    plain.cfg_reference = "null"
    assert torch.equal(act(policy, 0.0), act(plain, 0.0))
    policy.set_training_mode(True)
    policy.after_optimizer_step()
    assert torch.equal(act(policy, 0.0), act(plain, 0.0))
    assert not torch.equal(act(policy, 1.0), acted)


def test_acting_leaves_the_weights_and_their_memory_as_they_were() -> None:
    algorithm = make("start")
    learn(algorithm, 1)
    policy = algorithm.policy
    policy.set_training_mode(False)
    places = [p.data_ptr() for p in policy.parameters()]
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    act(policy, 2.0)
    with pytest.raises(ZeroDivisionError), policy.reference.in_place():  # type: ignore[union-attr]
        _ = 1 / 0
    assert [p.data_ptr() for p in policy.parameters()] == places
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_default_holds_and_changes_nothing() -> None:
    default, null = make(), make(policy_kwargs={"net_arch": [16], "cfg_reference": "null"})
    assert default.policy.reference is None
    assert default.policy.cfg_reference == null.policy.cfg_reference == "null"
    learn(default, 2)
    assert not [name for name in default.policy.state_dict() if "reference" in name]
    close(act(default.policy, 2.0), by_hand(default.policy, default.policy, 2.0))


def test_the_reference_decides_what_is_collected_and_only_that() -> None:
    def trained(cfg_reference: str, w: float) -> Tensor:
        algorithm = make(cfg_reference, cfg_scale=w)
        learn(algorithm, 3)
        return torch.cat([p.flatten() for p in algorithm.policy.parameters()])

    assert torch.equal(trained("start", 1.0), trained("null", 1.0))
    assert not torch.equal(trained("start", 2.0), trained("null", 2.0))
    assert not torch.equal(trained("start", 2.0), trained("previous", 2.0))


def test_autocast_takes_each_policy_s_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the casts of parameters, whose values change inside its context."""
    algorithm = make("start")
    policy, start = algorithm.policy, deepcopy(algorithm.policy)
    learn(algorithm, 2)
    monkeypatch.setattr(
        type(policy), "autocast", lambda self: torch.autocast("cpu", torch.bfloat16)
    )
    close(act(policy, 2.0), by_hand(start, policy, 2.0), atol=0.02)
    assert not torch.allclose(act(policy, 2.0), by_hand(policy, policy, 2.0), atol=0.1)
    assert torch.equal(act(policy, 0.0), act(start, 0.0))


# Saved and restored ------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_reference", ["start", "previous"])
def test_a_model_s_zip_keeps_the_reference(cfg_reference: str, tmp_path: Path) -> None:
    algorithm = make(cfg_reference)
    learn(algorithm, 2)
    algorithm.save(tmp_path / "cfgrl")
    loaded = CFGRL.load(tmp_path / "cfgrl", env=vec(SeedEnv, 2), device="cpu")
    assert loaded.policy.cfg_reference == cfg_reference
    assert torch.equal(act(loaded.policy, 2.0), act(algorithm.policy, 2.0))
    for each in (algorithm, loaded):
        learn(each, 2)
    assert torch.equal(act(loaded.policy, 2.0), act(algorithm.policy, 2.0))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*reference"):
        make().set_parameters(tmp_path / "cfgrl")


def test_a_policy_whose_reference_was_forgotten_is_saved_without(tmp_path: Path) -> None:
    algorithm = make("start")
    learn(algorithm, 1)
    algorithm.policy.cfg_reference = "null"
    algorithm.save(tmp_path / "cfgrl")
    loaded = CFGRL.load(tmp_path / "cfgrl", device="cpu")
    assert loaded.policy.reference is None
    assert torch.equal(act(loaded.policy, 2.0), act(algorithm.policy, 2.0))


def test_loading_weights_without_a_reference_makes_the_policy_its_own() -> None:
    algorithm = make("start")
    learn(algorithm, 1)
    plain = make().policy
    algorithm.policy.load_state_dict(plain.state_dict())
    assert torch.equal(act(algorithm.policy, 2.0), act(plain, 2.0))


@pytest.mark.parametrize("cfg_reference", ["start", "previous"])
def test_a_resumed_training_gives_the_same_bits(cfg_reference: str, tmp_path: Path) -> None:
    policy_kwargs = {"net_arch": [32], "ema_decay": 0.9, "cfg_reference": cfg_reference}
    changed = {"policy_kwargs": policy_kwargs, "cfg_scale": 2.0}
    whole = go_on(tmp_path / "whole", 4, **changed)
    go_on(tmp_path / "parts", 2, **changed)
    parts = go_on(tmp_path / "parts", 4, **changed)
    assert any(name.startswith("reference.") for name in all_state(whole)["policy"])
    assert_equal_states(all_state(whole), all_state(parts))
    plain = go_on(tmp_path / "plain", 4, **(changed | {"policy_kwargs": {"net_arch": [32]}}))
    assert isinstance(plain.env.envs[0].unwrapped, QueueEnv)  # type: ignore[union-attr]
    assert not torch.equal(plain.policy.output.weight, whole.policy.output.weight)  # type: ignore[union-attr, arg-type]


# Bad values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["first", None, 3, ["start"]])
def test_a_reference_that_is_none_is_refused(bad: Any, tmp_path: Path) -> None:
    message = "cfg_reference must be 'null', 'start' or 'previous'; got"
    kwargs = {"net_arch": [16], "cfg_reference": bad}
    with pytest.raises(ValueError, match=message):
        make(policy_kwargs=kwargs)
    with pytest.raises(ValueError, match=message):
        make_policy(cfg_reference=bad)
    algorithm = make()
    algorithm.save(tmp_path / "cfgrl")
    with pytest.raises(ValueError, match=message):
        CFGRL.load(tmp_path / "cfgrl", device="cpu", policy_kwargs={"cfg_reference": bad})
    with pytest.raises(ValueError, match=message):
        algorithm.policy.cfg_reference = bad


# PI0 ---------------------------------------------------------------------------------------------

# What trains; whether the VLM's frozen weights are bfloat16.
KINDS = [
    *(("expert", "bfloat16"), ("expert", "float32")),
    *(("lora", "bfloat16"), ("lora", "float32")),
    ("all", "float32"),
]


def make_pi0(trainable: str, vlm_dtype: str, **kwargs: Any) -> Pi0Policy:
    if trainable == "lora":
        pytest.importorskip("peft")
    given = {"trainable": trainable, "vlm_dtype": vlm_dtype, "num_inference_steps": STEPS}
    return make_policy(**(given | kwargs))


def train_pi0(policy: Pi0Policy) -> None:
    """An update, whose steps are random."""
    generator = torch.Generator().manual_seed(4)
    policy.before_update()
    policy.set_training_mode(True)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy.after_optimizer_step()
    policy.set_training_mode(False)


@pytest.mark.parametrize("two_prefixes", [False, True])
@pytest.mark.parametrize(("trainable", "vlm_dtype"), KINDS)
def test_pi0_is_guided_against_the_reference_with_its_own_prefix(
    trainable: str, vlm_dtype: str, two_prefixes: bool
) -> None:
    policy = make_pi0(
        trainable, vlm_dtype, cfg_reference="start", ema_decay=0.5, use_prefix_dropout=two_prefixes
    )
    start, obs = deepcopy(policy), make_observation()
    train_pi0(policy)
    for guidance in ("velocity", "action"):
        policy.guidance = guidance  # type: ignore[assignment]
        close(act(policy, 2.0, obs), by_hand(start, policy, 2.0, obs), atol=1e-4)
        wrong = by_hand(policy, policy, 2.0, obs)
        assert not torch.allclose(act(policy, 2.0, obs), wrong, atol=1e-2)
    assert torch.equal(act(policy, 0.0, obs), act(start, 0.0, obs))
    inputs = policy.encode_observation(obs)
    own, first = (each.encode_prefixes(inputs, (1,))[1].keys_values for each in (policy, start))
    assert torch.equal(own, first) == (trainable == "expert")
    noise, t = noise_of(policy, 3), torch.full((3,), 0.5)
    gaps = [
        policy.guidance_gap(obs, torch.zeros_like(noise), t, noise, prefixes)
        for prefixes in (None, policy.encode_prefixes(inputs, BRANCHES))
    ]
    by_definition = (
        policy.predict_velocity(obs, 0.5 * noise, t, 1)
        - start.predict_velocity(obs, 0.5 * noise, t, None)
    )[..., :7]
    for gap in gaps:
        close(gap, by_definition.square().mean((1, 2)).sqrt(), atol=1e-4)


@pytest.mark.parametrize("cfg_reference", ["start", "previous"])
@pytest.mark.parametrize(("trainable", "vlm_dtype"), KINDS)
def test_a_pi0_folder_acts_as_the_trained_policy_does(
    trainable: str, vlm_dtype: str, cfg_reference: str, tmp_path: Path
) -> None:
    policy = make_pi0(trainable, vlm_dtype, cfg_reference=cfg_reference, ema_decay=0.5)
    first, obs = deepcopy(policy), make_observation()
    train_pi0(policy)
    policy.save_pretrained(tmp_path)

    def load(**kwargs: Any) -> Pi0Policy:
        given = {"checkpoint": tmp_path, "vlm_dtype": vlm_dtype, "num_inference_steps": STEPS}
        return Pi0Policy(*make_spaces(), lambda _: 1e-3, **(given | kwargs))

    again = load(cfg_reference=cfg_reference)
    # Merged adapters are rounded, in bfloat16 more.
    atol = 0.0 if trainable != "lora" else {"bfloat16": 0.05, "float32": 1e-4}[vlm_dtype]
    torch.testing.assert_close(act(again, 2.0, obs), act(policy, 2.0, obs), atol=atol, rtol=0)
    assert not torch.allclose(act(again, 2.0, obs), by_hand(again, again, 2.0, obs), atol=0.2)
    assert again.reference is not None
    assert again.reference.holds_frozen == (trainable != "expert")

    with pytest.warns(UserWarning, match=r"reference\.safetensors; with cfg_reference='null'"):
        plain = load()
    close(act(plain, 2.0, obs), by_hand(again, again, 2.0, obs), atol=1e-4)
    (tmp_path / FILE).rename(tmp_path / "elsewhere")
    assert torch.equal(act(load(cfg_reference="start"), 2.0, obs), act(plain, 2.0, obs))

    first.save_pretrained(tmp_path / "first")  # never trained: its own reference
    assert not (tmp_path / "first" / FILE).exists()
    (tmp_path / "elsewhere").rename(tmp_path / FILE)
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("trainable", ["expert", "lora"])
def test_a_folder_s_reference_is_exported_and_saved_again(trainable: str, tmp_path: Path) -> None:
    policy, obs = make_pi0("all", "float32", cfg_reference="start"), make_observation()
    train_pi0(policy)
    policy.save_pretrained(tmp_path / "all")
    kwargs = {"trainable": trainable, "num_inference_steps": STEPS, "cfg_reference": "start"}
    if trainable == "lora":
        pytest.importorskip("peft")
    env = vec(PromptEnv, 2)
    algorithm = CFGRL(
        *("Pi0Policy", env),
        rloo_batch_size=2,
        groups_per_iteration=1,
        enable_dynamic_sampling=False,
        n_epochs=1,
        seed=0,
        policy_kwargs=kwargs | {"checkpoint": str(tmp_path / "all")},
        device="cpu",
    ).learn(1)
    close(act(algorithm.policy, 0.0, obs), act(policy, 0.0, obs))
    algorithm.save(tmp_path / "model")
    loaded = CFGRL.load(tmp_path / "model", device="cpu").policy
    assert torch.equal(act(loaded, 2.0, obs), act(algorithm.policy, 2.0, obs))
    algorithm.policy.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    again = Pi0Policy(
        *make_spaces(),
        lambda _: 1e-3,
        checkpoint=tmp_path / "again",
        num_inference_steps=STEPS,
        cfg_reference="start",
    )
    close(act(again, 2.0, obs), act(algorithm.policy, 2.0, obs))


def test_a_reference_of_another_model_is_refused(tmp_path: Path) -> None:
    policy = make_pi0("expert", "float32", cfg_reference="start")
    train_pi0(policy)
    policy.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    name = next(iter(tensors))
    for damaged in (
        tensors | {"colour": torch.zeros(1)},
        tensors | {name: torch.zeros(3, 3, 3)},
        tensors | {name: tensors[name].long()},
    ):
        save_file(damaged, tmp_path / FILE)
        with pytest.raises(ValueError, match=rf"{FILE}' is damaged or of another model"):
            Pi0Policy(*make_spaces(), lambda _: 1e-3, checkpoint=tmp_path, cfg_reference="start")
    (tmp_path / FILE).write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=rf"{FILE}' is damaged or of another model"):
        Pi0Policy(*make_spaces(), lambda _: 1e-3, checkpoint=tmp_path, cfg_reference="start")


def test_compiled_steps_only_see_the_policy_s_own_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CUDA graph reads the addresses that it was recorded with."""
    plain = make_policy(cfg_reference="start", num_inference_steps=STEPS)
    places = []

    def compiled(function: Any, **_: Any) -> Any:
        def call(*args: Any) -> Any:
            places.append(function.__self__.action_out_proj.weight.data_ptr())
            return function(*args)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    policy = make_policy(cfg_reference="start", num_inference_steps=STEPS, compile_denoising=True)
    obs = make_observation()
    for each in (plain, policy):
        train_pi0(each)
    assert torch.equal(act(policy, 2.0, obs), act(plain, 2.0, obs))
    assert set(places) == {policy.model.action_out_proj.weight.data_ptr()}
    assert len(places) == STEPS


@pytest.mark.parametrize("cfg_reference", ["null", "start"])
def test_memory_estimates_count_the_reference(cfg_reference: str) -> None:
    policy = make_pi0("expert", "bfloat16", cfg_reference=cfg_reference, ema_decay=None)
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    before = policy.plan_update(2, 2**30)
    plain = make_pi0("expert", "bfloat16", ema_decay=None).plan_update(2, 2**30)
    assert before.needed is not None
    assert plain.needed is not None
    more = before.needed - plain.needed
    assert more == plain.room - before.room == (0 if cfg_reference == "null" else trained)
    train_pi0(policy)
    assert policy.plan_update(2, 2**30) == before
    held = sum(b.nbytes for name, b in policy.named_buffers() if name.startswith("reference."))
    assert held == more


def test_eval_guides_as_it_is_told(tmp_path: Path) -> None:
    policy, obs = make_policy(cfg_reference="previous"), make_observation()
    train_pi0(policy)
    policy.save_pretrained(tmp_path / "policy")
    algorithm = CFGRL("Pi0Policy", vec(PromptEnv), device="cpu")
    algorithm.policy = policy
    algorithm.save(tmp_path / "model.zip")
    for name in ("policy", "model.zip"):
        path = str(tmp_path / name)
        loaded = load_policy(EvalConfig(policy=path, cfg_reference="previous", device="cpu"))
        assert torch.equal(act(loaded, 2.0, obs), act(policy, 2.0, obs))
        with pytest.warns(UserWarning, match="with '?.*null"):
            plain = load_policy(EvalConfig(policy=path, device="cpu"))
        close(act(plain, 2.0, obs), by_hand(plain, plain, 2.0, obs), atol=1e-4)
        assert not torch.allclose(act(plain, 2.0, obs), act(policy, 2.0, obs), atol=1e-2)
    assert policy.horizon == HORIZON
