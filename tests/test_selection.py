"""The exact choice: any scores, any tree, against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from oracle import active, budget

from gsm_optax import mask_by_importance

pytestmark = pytest.mark.optimize(False)

SHAPES = [(7,), (3, 5), (2, 3, 4), (2, 2, 3, 3), (0, 4)]
MORE = (65, 64)  # with this one there are more than SMALL entries: a sample is taken


def score_is_param(param, grad):
    return param


def choose(scores, ratio):
    """Return masks and reported count for scores given as parameters, gradient one."""
    tx = mask_by_importance(ratio, importance=score_is_param, prunable=True)
    params = [jnp.asarray(s) for s in scores]
    updates, state = tx.update(
        [jnp.ones_like(p) for p in params], tx.init(params), params
    )
    return [np.asarray(u, bool) for u in updates], int(state.num_active)


def normal(rng, shape):
    return rng.normal(size=shape)


def few_values(rng, shape):
    return rng.integers(0, 4, shape)


def huge_range(rng, shape):
    return 10.0 ** rng.uniform(-44, 38, shape)


def mostly_zero(rng, shape):
    return rng.normal(size=shape) * (rng.random(shape) < 0.2)


def pathological(rng, shape):
    return rng.choice([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0], shape)


def all_equal(rng, shape):
    return np.full(shape, 0.5)


KINDS = [normal, few_values, huge_range, mostly_zero, pathological, all_equal]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from(KINDS), min_size=5, max_size=6),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    ratio=st.one_of(
        st.floats(0, 0.99),
        st.sampled_from([0.0, 0.5, 0.95]),  # of 82: one at least
    ),
)
def test_choice_equals_a_sort(seed, kinds, dtype, ratio):
    rng = np.random.default_rng(seed)
    scores = [
        np.asarray(kind(rng, shape)).astype(dtype)
        for kind, shape in zip(kinds, [*SHAPES, MORE], strict=False)
    ]
    masks, count = choose(scores, ratio)
    expected = active(scores, budget(ratio, sum(s.size for s in scores)))
    for mask, want in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask, want)
    assert count == sum(map(np.sum, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_many_leaves_and_leaves_of_many_rows(kind):
    """On one CPU device leaves are joined by sixteen, and large ones are read alone."""
    rng = np.random.default_rng(4)
    shapes = [(3, 31)] * 18 + [(7,)] * 17 + [(3, 123, 129)]
    scores = [np.asarray(kind(rng, shape)).astype(np.float32) for shape in shapes]
    for ratio in (0.0, 0.3, 0.95, 1 - 1 / 49_394):
        masks, count = choose(scores, ratio)
        expected = active(scores, budget(ratio, sum(s.size for s in scores)))
        for mask, want in zip(masks, expected, strict=True):
            np.testing.assert_array_equal(mask, want)
        assert count == sum(map(np.sum, expected))


@pytest.mark.parametrize("kept", [1, 2, 17, 499, 999, 1000])
def test_exactly_q_without_ties(kept):
    scores = np.random.default_rng(0).permutation(1000).astype(np.float32) + 1
    (mask,), count = choose([scores.reshape(10, 100)], 1 - kept / 1000)
    assert count == mask.sum() == kept
    assert set(scores[mask.ravel()]) == set(range(1001 - kept, 1001))


def test_adjacent_floats_are_told_apart():
    one = np.float32(1)
    scores = np.array([one, np.nextafter(one, np.float32(2)), np.nextafter(one, 0)])
    (mask,), _ = choose([scores.astype(np.float32)], 2 / 3)
    assert mask.tolist() == [False, True, False]


def test_order_of_leaves_does_not_matter():
    rng = np.random.default_rng(1)
    scores = [rng.integers(0, 9, s).astype(np.float32) for s in SHAPES]
    forward, n = choose(scores, 0.8)
    backward, m = choose(scores[::-1], 0.8)
    assert n == m
    for a, b in zip(forward, backward[::-1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_warm_and_cold_searches_choose_the_same():
    """The state carries the last threshold; it must not change the choice."""
    rng = np.random.default_rng(2)
    tx = mask_by_importance(0.9)
    params = jnp.asarray(rng.normal(size=MORE), jnp.float32)
    state = tx.init(params)
    for scale in [1.0, 1e-6, 1e6, 1.0, 0.0, 1.0]:
        grads = jnp.asarray(rng.normal(size=MORE) * scale, jnp.float32)
        warm, state = tx.update(grads, state, params)
        cold, cold_state = tx.update(grads, tx.init(params), params)
        np.testing.assert_array_equal(warm, cold)
        assert state.num_active == cold_state.num_active


def test_threshold_separates_active_from_passive():
    rng = np.random.default_rng(3)
    params, grads = (
        jnp.asarray(rng.normal(size=(30, 30)), jnp.float32) for _ in range(2)
    )
    tx = mask_by_importance(0.7)
    updates, state = tx.update(grads, tx.init(params), params)
    scores, mask = np.abs(params * grads), np.asarray(updates) != 0
    assert scores[~mask].max() < state.threshold <= scores[mask].min()


@pytest.mark.parametrize("total", [10, 1000, 50_200])
def test_traced_ratio_rounds_as_the_static_one(total):
    params = jnp.arange(1, total + 1, dtype=jnp.float32)
    count = jax.jit(
        lambda ratio: (
            mask_by_importance(ratio, prunable=True)
            .update(jnp.ones_like(params), initial, params)[1]
            .num_active
        )
    )
    initial = mask_by_importance(0.5, prunable=True).init(params)
    for ratio in np.float32([0, 0.25, 0.5, 0.9, 1 - 1 / 60, 0.99]):
        assert count(jnp.asarray(ratio)) == budget(float(ratio), total)


@jax.jit
def with_traced_ratio(params, ratio):
    tx = mask_by_importance(ratio)
    return tx.update(params, tx.init(params), params)[1]


def test_traced_ratio_out_of_range_is_clipped():
    for ratio, expected in ((-0.5, 16), (1.5, 0)):
        state = with_traced_ratio(jnp.ones((4, 4)), jnp.float32(ratio))
        assert state.num_active == state.num_kept == expected


@pytest.mark.parametrize("shape", [(8, 8), MORE])
def test_nothing_is_sorted_gathered_or_recompiled(shape):
    params = {"a": jnp.ones(shape), "b": jnp.ones((4, 4, 4))}
    tx = mask_by_importance(optax.linear_schedule(0.0, 0.9, 10))
    step = jax.jit(tx.update)
    state = tx.init(params)
    text = step.lower(params, state, params).compile().as_text()
    for op in (" sort(", "top_k", "TopK", " gather(", " custom-call("):
        assert op not in text, op
    for _ in range(5):
        _, state = step(params, state, params)
    assert step._cache_size() == 1
