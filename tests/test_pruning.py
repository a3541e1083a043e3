"""magnitude_mask, prune, apply_mask, freeze_pruned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import active, budget
from trees import normal

from gsm_optax import (
    apply_mask,
    freeze_pruned,
    gsm_sgd,
    magnitude_mask,
    prune,
)

pytestmark = pytest.mark.optimize(False)

SHAPES = {"conv": (3, 3, 2, 4), "dense": {"bias": (5,), "kernel": (40, 50)}}


def random_tree(seed=0, dtype=jnp.float32):
    return normal(SHAPES, seed, dtype) | {"steps": jnp.arange(4)}


@pytest.mark.parametrize(
    ("ratio", "dtype"),
    [
        *((ratio, jnp.float32) for ratio in (0.0, 0.1, 1 - 1 / 60, 0.9995)),
        (0.5, jnp.bfloat16),
    ],
)
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
    params = jnp.array([[1.0, jnp.nan], [jnp.inf, 3.0]])
    assert magnitude_mask(params, 0.75).tolist() == [[False, True], [False, False]]
    assert magnitude_mask(params, 0.5).tolist() == [[False, True], [True, False]]


def test_ties_are_kept_and_zeros_are_not():
    params = jnp.array([[0.0, 1.0, -1.0], [0.0, 2.0, 1.0]])
    assert magnitude_mask(params, 0.5).astype(int).tolist() == [[0, 1, 1], [0, 1, 1]]
    assert magnitude_mask(params, 0.1).astype(int).tolist() == [[0, 1, 1], [0, 1, 1]]
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


FORTY = {"kernel": jnp.ones((4, 10))}


@pytest.mark.parametrize(
    ("params", "ratio", "message"),
    [
        (random_tree(), 60, r"did you mean ratio=1-1/60\?"),
        (random_tree(), -1, "ratio=-1 is outside"),
        (random_tree(), lambda step: 0.5, "not a schedule"),
        ({"bias": jnp.ones(3)}, 0.5, "no leaf is prunable"),
        ({}, 0.5, r"params=\{\} has no leaves.* filtered"),
        ({"kernel": None}, 0.5, r"has no leaves"),
        (FORTY, 0.99, r"ratio=0.99 keeps none of the 40 .*ratio=0.975 \(1-1/40\)"),
        (FORTY, np.float32(0.99), "keeps none of the 40"),
        (FORTY, np.array(0.99), "keeps none of the 40"),
        (FORTY, jnp.array(0.99), "keeps none of the 40"),
        ({"kernel": jnp.ones((4, 0))}, 0.5, "none of the 0 prunable entries.*empty"),
    ],
)
def test_bad_input_is_refused(params, ratio, message):
    with pytest.raises(ValueError, match=message):
        prune(params, ratio)
    with pytest.raises(ValueError, match=message):  # what is known stays known
        jax.jit(lambda params: magnitude_mask(params, ratio))(params)


def test_the_ratio_that_the_error_offers_keeps_one():
    kernel = jnp.arange(40.0).reshape(5, 8)
    assert jnp.count_nonzero(prune(kernel, 0.975)) == 1


def test_no_prunable_is_the_default():
    params = random_tree()
    jax.tree.map(
        np.testing.assert_array_equal,
        prune(params, 0.5, prunable=None),
        prune(params, 0.5),
    )


def test_keys_and_counters_stay_as_they_are():
    params = {"kernel": jnp.ones((2, 2)), "key": jax.random.key(0), "count": 3}
    pruned = prune(params | {"none": np.zeros(2, jax.dtypes.float0)}, 0.5)
    assert pruned["key"] == params["key"]
    assert pruned["count"] == 3
    assert pruned["none"].dtype == jax.dtypes.float0


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


@pytest.mark.optimize(True)
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
    plain_update, update = jax.jit(tx.update), jax.jit(frozen.update)
    for _ in range(10):
        grads = {"kernel": jnp.asarray(rng.normal(size=(40, 50)), jnp.float32)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, plain_state = plain_update(
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


# Training on after pruning


def is_hole(x):
    return isinstance(x, optax.MaskedNode)


def clear(m, kept):
    return m if is_hole(m) else jnp.where(kept, m, jnp.zeros_like(m))


WAYS = {
    "the old state": (lambda tx, mask, state, params: (tx, state), 1.0),
    "a fresh state": (lambda tx, mask, state, params: (tx, tx.init(params)), 0.2),
    "cleared momentum": (
        lambda tx, mask, state, params: (
            tx,
            optax.tree.map_params(tx, clear, state, mask, is_leaf=is_hole),
        ),
        0.2,
    ),
    "freeze_pruned": (
        lambda tx, mask, state, params: (
            optax.chain(tx, freeze_pruned(mask)),
            (state, freeze_pruned(mask).init(params)),
        ),
        0.2,
    ),
}


@pytest.mark.promotes
@pytest.mark.parametrize("way", WAYS)
def test_what_keeps_the_zeros_of_pruning_in_mid_training(way):
    """As `prune` and the README say: the old momentum revives them, these lines not."""
    prepare, density = WAYS[way]
    params = {"kernel": random_tree()["dense"]["kernel"]}
    tx = gsm_sgd(0.1, ratio=0.8)
    state = tx.init(params)
    grads = {"kernel": random_tree(1)["dense"]["kernel"]}
    _, state = jax.jit(tx.update)(grads, state, params)
    mask = magnitude_mask(params, 0.8)
    params = prune(params, 0.8)
    tx, state = prepare(tx, mask, state, params)
    update = jax.jit(tx.update)
    for seed in (2, 3):
        grads = {"kernel": random_tree(seed)["dense"]["kernel"]}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.count_nonzero(params["kernel"]) == density * 2000


WITH_HOLES = {
    "smoothing": gsm_sgd(0.1, 0.75, smoothing=0.9),
    "churn": gsm_sgd(0.1, 0.75, track_churn=True),
    "masked": optax.masked(gsm_sgd(0.1, 0.75), {"kernel": True, "bias": False}),
    "partition": optax.partition(
        {"gsm": gsm_sgd(0.1, 0.75), "adam": optax.adam(0.1)},
        {"kernel": "gsm", "bias": "adam"},
    ),
}


@pytest.mark.promotes
@pytest.mark.parametrize("name", WITH_HOLES)
def test_momentum_is_cleared_in_states_with_holes(name):
    """By the lines of the docstring of `prune`."""
    tx, params = WITH_HOLES[name], {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}
    params["kernel"] = jnp.arange(1.0, 9).reshape(2, 4)
    _, state = tx.update(params, tx.init(params), params)
    mask = magnitude_mask(params, 0.75)
    state = optax.tree.map_params(tx, clear, state, mask, is_leaf=is_hole)
    is_like = lambda x, like: (x.shape, x.dtype) == (like.shape, like.dtype)
    trace = next(x for x in jax.tree.leaves(state) if is_like(x, params["kernel"]))
    assert (trace[~mask["kernel"]] == 0).all()
    assert (trace[mask["kernel"]] != 0).all()


# Trees with holes


def two_kernels():
    kernel = jnp.arange(1.0, 9).reshape(2, 4)
    return {"first": {"a": kernel, "b": kernel}, "last": {"kernel": kernel}}


LABELS = [  # a whole branch, or a leaf, is another's
    {"first": "train", "last": "hold"},
    {"first": {"a": "train", "b": "hold"}, "last": "train"},
]


@pytest.mark.parametrize("labels", LABELS)
def test_the_whole_mask_is_right_for_a_part_of_the_model(labels):
    params = two_kernels()
    mask = magnitude_mask(params, 0.5)
    inner = optax.chain(optax.sgd(0.1, momentum=0.9), freeze_pruned(mask))
    txs = {"train": inner, "hold": optax.set_to_zero()}
    part = jax.tree.map(lambda label: label == "train", labels)
    full = jax.tree.broadcast(part, params)
    kept_and_trained = jax.tree.map(lambda m, t: m & jnp.array(t), mask, full)
    kept_or_other = jax.tree.map(lambda m, t: m | ~jnp.array(t), mask, full)
    for tx, moved in [
        (optax.partition(txs, labels), kept_and_trained),
        (optax.masked(freeze_pruned(mask), part), kept_or_other),
    ]:
        state = tx.init(params)
        updates, new = jax.jit(tx.update)(params, state, params)
        got = jax.tree.map(lambda u: u != 0, updates)
        jax.tree.map(np.testing.assert_array_equal, got, moved)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        shapes = optax.tree.map_params(tx, jnp.shape, state)  # a mask is like params
        assert (2, 4) in jax.tree.leaves(shapes, is_leaf=lambda x: x == (2, 4))


def test_none_gradients_and_parameters_pass():
    params = two_kernels()
    mask = magnitude_mask(params, 0.5)
    tx = freeze_pruned(mask)
    grads = params | {"first": None}
    for start in (params, grads):
        updates, _ = tx.update(grads, tx.init(start), start)
        assert updates["first"] is None
        np.testing.assert_array_equal(updates["last"]["kernel"][0], 0)
    assert apply_mask(grads, mask)["first"] is None


def test_a_mask_with_holes_of_its_own_is_refused():
    params = two_kernels()
    mask = magnitude_mask(params, 0.5) | {"first": None}
    with pytest.raises(ValueError, match="another tree structure"):
        freeze_pruned(mask).init(params)
