"""magnitude_mask, prune, apply_mask, freeze_pruned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import active, budget

from gsm_optax import apply_mask, freeze_pruned, magnitude_mask, prune


def random_tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "conv": draw(3, 3, 2, 4),
        "dense": {"bias": draw(5), "kernel": draw(40, 50)},
        "steps": jnp.arange(4),
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1 - 1 / 60, 0.9999])
def test_the_q_greatest_of_the_whole_model_survive(ratio, dtype):
    params = random_tree(dtype=dtype)
    pruned = prune(params, ratio)
    kernels = lambda tree: [tree["conv"], tree["dense"]["kernel"]]
    magnitudes = [np.abs(np.asarray(x, np.float32)) for x in kernels(params)]
    expected = active(magnitudes, budget(ratio, 2072))
    for x, before, mask in zip(kernels(pruned), kernels(params), expected, strict=True):
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, np.where(mask, before, 0))


def test_exactly_q_survive_and_other_leaves_are_untouched():
    params = random_tree()
    pruned = prune(params, 0.75)
    left = sum(
        int(jnp.count_nonzero(x)) for x in (pruned["conv"], pruned["dense"]["kernel"])
    )
    assert left == 518
    for path in (lambda p: p["dense"]["bias"], lambda p: p["steps"]):
        np.testing.assert_array_equal(path(pruned), path(params))


def test_mask_has_a_bool_for_every_entry():
    params = random_tree()
    mask = magnitude_mask(params, 0.5)
    assert jax.tree.map(jnp.shape, mask) == jax.tree.map(jnp.shape, params)
    assert all(m.dtype == bool for m in jax.tree.leaves(mask))
    assert mask["steps"].all()
    assert mask["dense"]["bias"].all()


def test_pruned_entries_are_exactly_zero_even_where_they_were_not_finite():
    params = [jnp.array([[jnp.nan, -jnp.inf, -2.0, 1.0]])]
    mask = [jnp.array([[False, False, False, True]])]
    assert apply_mask(params, mask)[0].tobytes() == np.float32([0, 0, 0, 1]).tobytes()


def test_nan_is_kept_first():
    params = jnp.array([[1.0, jnp.nan, jnp.inf, 3.0]])
    assert magnitude_mask(params, 0.75).tolist() == [[False, True, False, False]]
    assert magnitude_mask(params, 0.5).tolist() == [[False, True, True, False]]


def test_ties_are_kept_and_zeros_are_not():
    params = jnp.array([[0.0, 1.0, -1.0, 0.0, 2.0, 1.0]])
    assert magnitude_mask(params, 0.5).astype(int).tolist() == [[0, 1, 1, 0, 1, 1]]
    assert magnitude_mask(params, 0.1).astype(int).tolist() == [[0, 1, 1, 0, 1, 1]]
    assert magnitude_mask(params, 0.0).all()


def test_pruning_twice_changes_nothing():
    once = prune(random_tree(), 0.9)
    jax.tree.map(np.testing.assert_array_equal, prune(once, 0.9), once)


def test_prunable_chooses_the_leaves():
    params = random_tree()
    pruned = prune(params, 0.5, prunable={"conv": True, "dense": False, "steps": False})
    assert jnp.count_nonzero(pruned["conv"]) == 36
    np.testing.assert_array_equal(pruned["dense"]["kernel"], params["dense"]["kernel"])


def test_pruning_works_inside_jit_with_a_traced_ratio():
    params = random_tree()
    jitted = jax.jit(prune)(params, jnp.float32(0.5))
    jax.tree.map(np.testing.assert_array_equal, jitted, prune(params, 0.5))


@pytest.mark.parametrize(
    ("params", "ratio", "message"),
    [
        (random_tree(), 60, r"did you mean ratio=1-1/60\?"),
        (random_tree(), -1, "ratio=-1 is outside"),
        (random_tree(), lambda step: 0.5, "not a schedule"),
        ({"bias": jnp.ones(3)}, 0.5, "no leaf is prunable"),
    ],
)
def test_bad_input_is_refused(params, ratio, message):
    with pytest.raises(ValueError, match=message):
        prune(params, ratio)


BAD_MASKS = [
    ({"kernel": jnp.ones((2, 2), bool)}, "another tree structure"),
    (
        {"kernel": jnp.ones((2, 3), bool), "bias": jnp.ones(2, bool)},
        r"kernel.*\[2, 3\]",
    ),
    ({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2, bool)}, "kernel.*must be bool"),
]


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    with pytest.raises(ValueError, match=message):
        apply_mask(params, mask)
    with pytest.raises(ValueError, match=message):
        freeze_pruned(mask).init(params)


@pytest.mark.promotes
@pytest.mark.parametrize(
    "tx",
    [optax.sgd(0.1, momentum=0.9, nesterov=True), optax.adamw(0.1, weight_decay=0.1)],
)
def test_frozen_zeros_stay_zero_and_the_rest_trains_as_before(tx):
    params = prune({"kernel": random_tree()["dense"]["kernel"]}, 0.8)
    mask = magnitude_mask(params, 0.8)
    frozen = optax.chain(tx, freeze_pruned(mask))
    rng = np.random.default_rng(1)
    plain_params, plain_state, state = params, tx.init(params), frozen.init(params)
    for _ in range(10):
        grads = {"kernel": jnp.asarray(rng.normal(size=(40, 50)), jnp.float32)}
        updates, state = frozen.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, plain_state = tx.update(
            grads, plain_state, apply_mask(plain_params, mask)
        )
        plain_params = optax.apply_updates(plain_params, updates)
    keep = mask["kernel"]
    assert (params["kernel"][~keep] == 0).all()
    np.testing.assert_array_equal(params["kernel"][keep], plain_params["kernel"][keep])


def test_donating_the_state_leaves_the_callers_mask_alive():
    params = jnp.ones((2, 2))
    mask = params > 0
    tx = freeze_pruned(mask)
    update = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    assert mask.all()
