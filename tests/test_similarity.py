"""linear_cka, LinearCKA, mask_overlap, structural_similarity: against definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from gsm_optax import magnitude_mask
from gsm_optax.similarity import (
    LinearCKA,
    linear_cka,
    mask_overlap,
    structural_similarity,
)

pytestmark = pytest.mark.optimize(False)

few = settings(deadline=None, max_examples=25)


def definition(x, y):
    """CKA as written, in float64."""
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def debiased_definition(x, y):
    """HSIC of Song et al. (2012), equation 4, in place of each norm; in float64."""
    n = len(x)
    one = np.ones(n)
    grams = [np.asarray(a, np.float64) @ np.asarray(a, np.float64).T for a in (x, y)]
    k, l = (gram - np.diag(np.diag(gram)) for gram in grams)  # noqa: E741

    def hsic(k, l):  # noqa: E741
        both = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        whole = np.trace(k @ l) + both - 2 / (n - 2) * (one @ k @ l @ one)
        return whole / (n * (n - 3))

    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def draw(seed, rows=40, p=6, q=9):
    """Two layers that have something in common, off their origin."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, p)) + 3
    y = x @ rng.normal(size=(p, q)) + rng.normal(size=(rows, q)) * 2
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def streamed(x, y, batch):
    cka = LinearCKA.start(x.shape[1], y.shape[1])
    x, y = np.asarray(x), np.asarray(y)
    for i in range(0, len(x), batch):
        cka = update(cka, x[i : i + batch], y[i : i + batch])
    return value(cka)


update, value = jax.jit(LinearCKA.update), jax.jit(LinearCKA.value)


seeds = st.integers(0, 1000)


# One compilation for each shape, not for each operation of it.
biased = jax.jit(linear_cka)
debiased = jax.jit(partial(linear_cka, debiased=True))
overlap, similarity = jax.jit(mask_overlap), jax.jit(structural_similarity)


@few
@given(seed=seeds, rows=st.sampled_from([2, 5, 40]))
def test_values_are_the_definition(seed, rows):
    x, y = draw(seed, rows)
    np.testing.assert_allclose(biased(x, y), definition(x, y), rtol=1e-4)
    np.testing.assert_allclose(biased(y, x), definition(x, y), rtol=1e-4)


@few
@given(seed=seeds, batch=st.sampled_from([1, 7, 40]))
def test_streaming_gives_the_value_of_all_rows(seed, batch):
    x, y = draw(seed)
    np.testing.assert_allclose(streamed(x, y, batch), definition(x, y), rtol=1e-4)


@few
@given(seed=seeds, rows=st.sampled_from([4, 40]))
def test_debiased_values_are_the_definition(seed, rows):
    x, y = draw(seed, rows)
    wanted = debiased_definition(x, y)
    np.testing.assert_allclose(debiased(x, y), wanted, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(debiased(y, x), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("features", [8, 1000])
def test_only_the_debiased_value_of_independent_layers_is_near_zero(features):
    def both(key):
        x, y = (jax.random.normal(k, (32, features)) for k in jax.random.split(key))
        return linear_cka(x, y), debiased(x, y)

    keys = jax.random.split(jax.random.key(0), 50)
    biased, unbiased = jax.jit(jax.vmap(both))(keys)
    assert jnp.mean(biased) > (0.19 if features == 8 else 0.96)
    assert abs(jnp.mean(unbiased)) < 0.02
    assert jnp.min(unbiased) < 0


def test_a_debiased_value_that_rounding_hides_is_nan():
    """The definition has 0/0 here, and float32 something divided by as little."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.normal(size=(50, 3)), jnp.float32)
    one_apart = jnp.full((50, 3), 0.1).at[7].set(1.0)
    for x in (one_apart, jnp.full((50, 3), 0.1), one_apart.repeat(30, 1)):
        assert jnp.isnan(debiased(x, y))
        assert jnp.isnan(debiased(y, x))
    assert jnp.isnan(debiased(jnp.eye(6) * 3 + 0.7, y[:6]))


def test_three_examples_are_too_few_to_debias():
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"x\[3, 2\].* 3 rows, .* needs 4 or more"):
        linear_cka(x, x, debiased=True)


def orthogonal(seed, n):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


@few
@given(seed=seeds, scale=st.floats(1e-15, 1e15), shift=st.floats(-100, 100))
@pytest.mark.parametrize("cka", [biased, lambda x, y: streamed(x, y, 13), debiased])
def test_rotations_scales_and_shifts_change_nothing(cka, seed, scale, shift):
    x, y = draw(seed)
    turned = np.asarray(x, np.float64) @ orthogonal(seed, 6) * scale
    turned = jnp.asarray(turned * 1.0, jnp.float32)
    np.testing.assert_allclose(cka(turned, y), cka(x, y), rtol=1e-3)
    np.testing.assert_allclose(cka(x + shift, y), cka(x, y), rtol=1e-3)
    np.testing.assert_allclose(cka(x, turned), 1, rtol=1e-4)


@pytest.mark.parametrize("rows", [60, 5])
@pytest.mark.parametrize("debiased", [False, True])
def test_layers_may_be_as_small_or_large_as_numbers_are(rows, debiased):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    y = x[:, :4] + 0.5 * rng.normal(size=(rows, 4)).astype(np.float32)
    wanted = linear_cka(x, y, debiased=debiased)
    for scale in np.float32([1e-30, 1e-20, 1e-19, 1e19, 1e30]):
        value = linear_cka(scale * x, y / scale, debiased=debiased)
        np.testing.assert_allclose(value, wanted, rtol=1e-4)


def test_a_mean_far_from_zero_does_not_cancel():
    """Sums of raw squares in float32 would lose every digit here."""
    x, y = draw(0, rows=400)
    far = jnp.round(x * 64) / 64 + 4096
    wanted = definition(far, y)
    np.testing.assert_allclose(streamed(far, y, 20), wanted, rtol=1e-3)
    np.testing.assert_allclose(biased(far, y), wanted, rtol=1e-3)


def test_independent_layers_are_not_alike_and_a_scan_needs_no_more_memory():
    def batch(cka, key):
        x, y = (jax.random.normal(k, (500, 4)) for k in jax.random.split(key))
        return cka.update(x, y), None

    keys = jax.random.split(jax.random.key(0), 20)
    cka, _ = jax.jit(lambda keys: jax.lax.scan(batch, LinearCKA.start(4, 4), keys))(
        keys
    )
    assert cka.count == 10_000
    assert sum(x.size for x in cka) == 1 + 4 + 4 + 3 * 16
    assert 0 <= cka.value() < 0.01


def test_bfloat16_is_computed_with_in_float32():
    x, y = (a.astype(jnp.bfloat16) for a in draw(0))
    value = biased(x, y)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, definition(x, y), rtol=1e-4)


@pytest.mark.parametrize("rows", [3, 50])  # both ways of computing it
def test_constant_features_have_no_cka(rows):
    x, y = draw(0, rows)
    constant = jnp.full_like(x, 0.1)
    assert jnp.isnan(biased(constant, y))
    assert jnp.isnan(biased(y, constant))
    assert jnp.isnan(streamed(constant, y, 7))
    one = x.at[:, 1:].set(0.1)  # some constant features do no harm
    np.testing.assert_allclose(biased(one, y), definition(one, y), rtol=1e-4)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((4, 2), (5, 2), r"x\[4, 2\] and y\[5, 2\] must be matrices with a row"),
        ((4, 2, 2), (4, 2), r"x\.reshape"),
        ((4,), (4, 2), "must be matrices"),
        ((0, 2), (0, 2), r"x\[0, 2\] or y\[0, 2\] is empty"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, y, message):
    x, y = jnp.ones(x), jnp.ones(y)
    with pytest.raises(ValueError, match=message):
        linear_cka(x, y)
    with pytest.raises(ValueError, match=message):
        LinearCKA.start(2, 2).update(x, y)


def test_other_features_than_at_the_start_are_refused():
    with pytest.raises(ValueError, match=r"x has 3 and y 2 features, .* for 2 and 2"):
        LinearCKA.start(2, 2).update(jnp.ones((4, 3)), jnp.ones((4, 2)))


# Masks


@few
@given(seed=seeds)
def test_overlap_counts_positions_over_all_leaves(seed):
    rng = np.random.default_rng(seed)
    a, b = ([rng.random(n) < 0.4 for n in (5, 30)] for _ in range(2))
    common = sum((x & y).sum() for x, y in zip(a, b, strict=True))
    both = sum(x.sum() for x in a + b)
    got = overlap(*(list(map(jnp.asarray, m)) for m in (a, b)))
    np.testing.assert_allclose(got, 2 * common / both, rtol=1e-6)


def test_overlap_of_masks_of_a_model():
    params = {"kernel": jnp.arange(1.0, 9).reshape(2, 4)}
    mask = magnitude_mask(params, 0.5)
    assert mask_overlap(mask, mask) == 1
    assert mask_overlap(mask, jax.tree.map(jnp.logical_not, mask)) == 0
    assert jnp.isnan(mask_overlap(jnp.zeros(3, bool), jnp.zeros(3, bool)))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (jnp.ones(3, bool), jnp.ones(4, bool), r"bool\[3\] and bool\[4\]"),
        (jnp.ones(3), jnp.ones(3, bool), "must be bool arrays"),
        ([jnp.ones(3, bool)], jnp.ones(3, bool), "different structures"),
    ],
)
def test_masks_that_do_not_fit_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        mask_overlap(a, b)


def larger_half(weights):
    nonzero = np.sort(np.abs(weights[weights != 0]))[::-1]
    if not nonzero.size:
        return np.zeros(weights.shape, bool)
    return np.abs(weights) >= nonzero[(nonzero.size + 1) // 2 - 1]


@few
@given(seed=seeds, density=st.sampled_from([0.1, 0.5, 1.0]))
def test_structural_similarity_is_that_of_the_larger_halves(seed, density):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 6, 10)).astype(np.float32)
    a, b = (np.where(rng.random(w.shape) < density, w, 0) for w in (a, a + b))
    x, y = larger_half(a), larger_half(b)
    wanted = 2 * (x & y).sum() / (x.sum() + y.sum())
    got = similarity(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_structural_similarity_of_simple_layers():
    w = jnp.array([[3.0, -2.0], [1.0, 0.0]])
    assert similarity(w, -5 * w) == 1
    assert similarity(w, w[::-1]) == 0  # the larger row is another one
    assert jnp.isnan(similarity(0 * w, 0 * w))
    with pytest.raises(ValueError, match="same shapes"):
        structural_similarity(w, w[0])


def test_what_is_no_real_number_is_not_passed_over():
    x = jnp.ones((20, 3), jnp.complex64)
    with pytest.raises(ValueError, match=r"x is complex64.*parts side by side"):
        linear_cka(x, x)
    weights = jnp.arange(1.0, 11)
    assert jnp.isnan(structural_similarity(weights.at[0].set(jnp.nan), weights))
