"""Generated rubbish at the environments' doors: refused plainly, and nothing has changed.

850 inputs. Whether one is acceptable is for the oracles here to say: they follow the documentation.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cfgrl_gym  # noqa: F401  registers the ids

TASKS, STATES, CHUNK = (0,), 50, 2
REFUSED = (ValueError, TypeError, gym.error.Error)
SMALL = {"image_size": 16, "settle_steps": 0, "max_episode_steps": 10**9, "cameras": ["agentview"]}


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=20),  # an input that is refused takes milliseconds
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def single() -> Iterator[gym.Env]:
    with closing(gym.make("Libero-v0", task_id=list(TASKS), **SMALL)) as env:
        env.reset(seed=0, options={"task_id": 0, "init_state_id": 0})
        yield env


@pytest.fixture(scope="module")
def chunked() -> Iterator[gym.Env]:
    with closing(gym.make("LiberoChunked-v0", chunk_size=CHUNK, **SMALL)) as env:
        env.reset(seed=0, options={"task_id": 0, "init_state_id": 0})
        yield env


def refusal(call: Callable[[], Any], kinds: tuple[type[Exception], ...] = REFUSED) -> str | None:
    """What the error says that an input is refused with; any other error is the test's failure."""
    try:
        call()
    except kinds as error:
        return str(error)
    return None


def everything_of(env: gym.Env) -> list[Any]:
    """All that an action or a reset may change."""
    inner: Any = env.unwrapped
    episode = (inner._task.task_id, inner._init_state_id, inner._steps, inner._over)
    random = inner.np_random.bit_generator.state
    seen = {key: value.copy() for key, value in inner._last_observation.items()}
    return [inner.sim_state().tobytes(), episode, random, list(inner._queue), seen]


def assert_unchanged(env: gym.Env, before: list[Any]) -> None:
    after = everything_of(env)
    assert after[:-1] == before[:-1]
    for key, value in before[-1].items():
        np.testing.assert_array_equal(after[-1][key], value)


# Actions ----------------------------------------------------------------------------------------

numbers = st.floats(width=64) | st.integers(-(2**31), 2**31)
leaves = st.one_of(
    numbers, st.floats(-1, 1), st.text(max_size=3), st.none(), st.booleans(), st.complex_numbers()
)
dtypes = st.sampled_from(["f2", "f4", "f8", "i1", "i8", "u2", "?", "c8", "U2", "S3", "O", "M8[s]"])


def shapes(right: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.just(right) | hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=8)


def nested(right: tuple[int, ...], leaf: st.SearchStrategy) -> st.SearchStrategy:
    """Lists of the right shape."""
    for size in reversed(right):
        leaf = st.lists(leaf, min_size=size, max_size=size)
    return leaf


def arrays(right: tuple[int, ...]) -> st.SearchStrategy:
    def filled(dtype: str) -> st.SearchStrategy:
        if dtype == "O":
            return hnp.arrays(object, shapes(right), elements=leaves, fill=st.nothing())
        return hnp.arrays(dtype, shapes(right))

    return dtypes.flatmap(filled)


def actions(right: tuple[int, ...]) -> st.SearchStrategy:
    return st.one_of(
        arrays(right),
        nested(right, st.floats(-1, 1)),
        nested(right, leaves),
        nested(right, st.text("0123456789.", min_size=1, max_size=3)),
        nested(right, st.just(10**400)),
        st.recursive(leaves, lambda part: st.lists(part, max_size=8), max_leaves=16),
        st.dictionaries(st.text(max_size=2), numbers, max_size=7),
        st.sampled_from([object(), set(), b"1234567", range(7), np.ma.masked_all(7)]),
    )


def members(value: Any, shape: tuple[int, ...]) -> list[Any] | None:
    """All numbers of a nested list or array, None where it hasn't this shape."""
    if not shape:
        return None if isinstance(value, list | tuple | range | np.ndarray) else [value]
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return None
    if not isinstance(value, list | tuple | range | np.ndarray) or len(value) != shape[0]:
        return None
    parts = [members(part, shape[1:]) for part in value]
    return None if any(p is None for p in parts) else [x for p in parts if p for x in p]


def is_action(value: Any, shape: tuple[int, ...]) -> bool:
    """Finite real numbers in the right shape; True beside numbers is 1, as everywhere in Python."""
    if isinstance(value, np.ma.MaskedArray):
        return False
    if isinstance(value, np.ndarray) and value.dtype.kind not in "fiu":
        return False
    found = members(value, shape)
    if not found or all(isinstance(x, bool | np.bool_) for x in found):
        return False
    real = (int, float, np.integer, np.floating)
    return all(isinstance(x, real) and finite(x) for x in found)


def finite(number: Any) -> bool:
    return abs(number) < 2**64 if isinstance(number, int) else math.isfinite(number)


def check_action(env: gym.Env, action: Any, shape: tuple[int, ...]) -> None:
    before = everything_of(env)
    said = refusal(lambda: env.step(action))
    if is_action(action, shape):
        assert said is None
        assert everything_of(env)[1] != before[1]  # the step was counted
    else:
        assert said is not None
        assert "an action must" in said or "a chunk must" in said
        assert_unchanged(env, before)


@examples(250)
@given(action=actions((7,)))
def test_actions_of_control_steps(single: gym.Env, action: Any) -> None:
    check_action(single, action, (7,))


@examples(200)
@given(action=actions((CHUNK, 7)))
def test_actions_of_chunks(chunked: gym.Env, action: Any) -> None:
    check_action(chunked, action, (CHUNK, 7))


# Resets -----------------------------------------------------------------------------------------

rubbish = st.one_of(
    st.floats(),
    st.booleans(),
    st.text(max_size=5),
    st.integers(10**18, 10**40),
    st.integers(-(10**20), -1),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        [np.float64(1), np.True_, np.array(0), np.array([0, 1]), np.array([[0]]), b"0", object()]
    ),
)
ids = st.sampled_from([None, 49, 50, -1, 99, np.int64(-1), np.uint8(3), np.int8(-1), np.uint8(255)])
keys = st.sampled_from(["task_id", "init_state_id"]) | st.text(max_size=12) | st.integers()


def is_id(value: Any, known: Any) -> bool:
    return value is None or (isinstance(value, int | np.integer) and value in known)


def are_options(options: Any) -> bool:
    if options is None:
        return True
    if not isinstance(options, dict) or set(options) - {"task_id", "init_state_id"}:
        return False
    known = {"task_id": TASKS, "init_state_id": range(STATES)}
    return all(not isinstance(v, bool) and is_id(v, known[k]) for k, v in options.items())


@examples(200)
@given(
    options=st.dictionaries(keys, ids | rubbish, min_size=1, max_size=3) | rubbish,
    seed=st.sampled_from([None, None, 3]) | rubbish,
)
def test_resets(single: gym.Env, options: Any, seed: Any) -> None:
    before = everything_of(single)
    # Gymnasium's own rule of seeds: True is an int to it.
    seedable = seed is None or (isinstance(seed, int) and seed >= 0)
    said = refusal(lambda: single.reset(seed=seed, options=options))
    if are_options(options) and seedable:
        assert said is None
    else:
        assert said
        assert_unchanged(single, before)
        single.step(np.zeros(7))  # the episode goes on
        assert everything_of(single)[1][2] == before[1][2] + 1


# Construction -----------------------------------------------------------------------------------

junk = rubbish | st.none() | st.integers(-2, 9) | st.lists(rubbish, max_size=2)


def is_int(value: Any, least: int, most: float = math.inf) -> bool:
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return number and least <= value <= most


def are_ints(value: Any, count: int) -> bool:
    """A list of some of the first `count` numbers."""
    plain = isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim == 1)
    return plain and len(value) > 0 and all(is_int(x, 0, count - 1) for x in value)


ARGUMENTS: dict[str, Any] = {
    "suite": lambda v: False,
    "task_id": lambda v: is_int(v, 0, 9) or are_ints(v, 10),
    "image_size": lambda v: is_int(v, 8, 4096),
    # -1 is Gymnasium's word for no limit of its own
    "max_episode_steps": lambda v: v is None or is_int(v, 1) or is_int(v, -1, -1),
    "settle_steps": lambda v: is_int(v, 0, 10_000),
    "init_states": lambda v: are_ints(v, STATES),
    "render_mode": lambda v: v is None,
    "cameras": lambda v: False,
    "image_quality": lambda v: False,
    "chunk_size": lambda v: is_int(v, 1, 10_000),
    "observation_stride": lambda v: v is None or is_int(v, 1),
    "colour": lambda v: False,  # no argument
}


@examples(200)
@given(name=st.sampled_from(sorted(ARGUMENTS)), value=junk)
def test_arguments(name: str, value: Any) -> None:
    arguments = {"image_size": 16, "chunk_size": 2, name: value}
    said = refusal(lambda: gym.make("LiberoChunked-v0", **arguments).close())
    assert (said is None) == ARGUMENTS[name](value), said
    assert said is None or len(said) > 20
