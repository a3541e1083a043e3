"""mask_by_importance: what takes part, what passes through, what is refused."""

import gc
import weakref
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import first_step, normal

from gsm_optax import (
    gradient_importance,
    gsm,
    gsm_sgd,
    magnitude_importance,
    magnitude_mask,
    mask_by_importance,
    prune,
    ratio_ramp,
    taylor_importance,
    tempered_importance,
)

pytestmark = pytest.mark.optimize(False)

SHAPES = {"dense": {"kernel": (6, 5), "bias": (5,)}, "conv": (3, 3, 2, 4)}
random_tree = partial(normal, SHAPES)


def test_rank_two_and_more_take_part_by_default():
    params, grads = random_tree(0), random_tree(1)
    updates, state = first_step(mask_by_importance(0.9), grads, params)
    np.testing.assert_array_equal(updates["dense"]["bias"], grads["dense"]["bias"])
    assert state.num_active == 10  # of 30 + 72
    active = [updates["dense"]["kernel"], updates["conv"]]
    assert sum(int(jnp.count_nonzero(u)) for u in active) == 10


@pytest.mark.parametrize(
    "prunable",
    [
        {"dense": True, "conv": False},
        lambda params: {"dense": True, "conv": False},
        {"dense": {"kernel": True, "bias": True}, "conv": False},
    ],
)
def test_prunable_is_a_prefix_or_a_callable(prunable):
    params, grads = random_tree(0), random_tree(1)
    tx = mask_by_importance(0.8, prunable=prunable)
    updates, state = first_step(tx, grads, params)
    np.testing.assert_array_equal(updates["conv"], grads["conv"])
    assert state.num_active == 7  # a fifth of 35


def test_importances_differ_as_defined():
    param, grad = jnp.array([[1.0, -3.0, 0.5]]), jnp.array([[2.0, 0.1, -3.0]])
    best = {taylor_importance: 0, magnitude_importance: 1, gradient_importance: 2}
    for importance, index in best.items():
        tx = mask_by_importance(2 / 3, importance=importance, prunable=True)
        updates, _ = first_step(tx, grad, param)
        assert np.flatnonzero(updates).tolist() == [index]


def test_everything_that_is_no_float_passes_through():
    params = {
        "kernel": jnp.ones((2, 2)),
        "count": jnp.arange(6).reshape(2, 3),
        "flag": jnp.ones((2, 2), bool),
        "nothing": None,
        "masked": optax.MaskedNode(),
    }
    loss = lambda p: jnp.sum(p["kernel"] ** 2)
    grads = jax.grad(loss, allow_int=True)(params)
    assert grads["count"].dtype == jax.dtypes.float0
    tx = mask_by_importance(0.0)
    updates, state = tx.update(grads, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert updates["count"] is grads["count"]
    assert updates["flag"] is grads["flag"]
    assert state.num_active == 4


def test_a_missing_gradient_takes_no_part():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((5, 5))}
    grads = {"a": jnp.arange(1.0, 5.0).reshape(2, 2), "b": None}
    updates, state = first_step(mask_by_importance(0.5), grads, params)
    assert updates["b"] is None
    assert updates["a"].tolist() == [[0, 0], [3, 4]]
    assert state.num_active == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_updates_keep_their_dtype(dtype):
    params = jnp.arange(1, 5).reshape(2, 2).astype(dtype)
    updates, state = first_step(mask_by_importance(0.5), params, params)
    assert updates.dtype == dtype
    assert state.threshold.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(updates, complex), [[0, 0], [3, 4]])


def test_scores_are_float32_even_for_half_precision():
    """In float16 both products would underflow to zero and tie."""
    params = jnp.array([[1e-4, 2e-4]], jnp.float16)
    grads = jnp.array([[1e-4, 1e-4]], jnp.float16)
    updates, _ = first_step(mask_by_importance(0.5, prunable=True), grads, params)
    assert (updates != 0).tolist() == [[False, True]]


def test_nan_reaches_the_parameters():
    params = jnp.arange(100.0).reshape(10, 10)
    grads = jnp.ones((10, 10)).at[0, 0].set(jnp.nan).at[0, 1].set(jnp.nan)
    updates, _ = first_step(mask_by_importance(0.99), grads, params)  # Q = 1, two NaN
    assert jnp.isnan(updates[0, :2]).all()
    assert (updates[1:] == 0).all()
    # Q = 0, as only a ratio that changes in training may ask for.
    tx = mask_by_importance(lambda step: jnp.where(step % 2, 0.999, 0.5))
    state = tx.init(params)._replace(step=jnp.int32(1))
    updates, state = tx.update(grads, state, params)
    assert jnp.isnan(updates[0, :2]).all()
    assert (state.num_kept, state.threshold) == (0, jnp.inf)  # not NaN, a false alarm


@pytest.mark.parametrize(
    "importance",
    [
        magnitude_importance,
        *map(tempered_importance, (0, 0.3, 0.5)),
        gradient_importance,
    ],
)
def test_nan_gradients_are_active_under_any_importance(importance):
    params = jnp.arange(1.0, 101).reshape(10, 10)
    grads = jnp.ones((10, 10)).at[0, 0].set(jnp.nan)
    tx = mask_by_importance(0.9, importance=importance)
    updates, _ = first_step(tx, grads, params)
    assert jnp.isnan(updates[0, 0])


def test_infinite_times_zero_is_not_hidden():
    params, grads = jnp.array([[0.0, 1.0]]), jnp.array([[jnp.inf, 1.0]])
    updates, _ = first_step(mask_by_importance(0.5, prunable=True), grads, params)
    assert updates.tolist() == [[jnp.inf, 0.0]]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_scores(value):
    """Ties at the threshold are all active, zeros never."""
    grads = jnp.full((3, 4), value)
    updates, state = first_step(mask_by_importance(0.5), grads, jnp.ones((3, 4)))
    np.testing.assert_array_equal(updates, grads)
    assert state.num_active == int(12 * value)


def test_one_entry_and_no_entry():
    one = {"kernel": jnp.ones((1, 1))}
    updates, state = first_step(mask_by_importance(0.4), one, one)
    assert (updates["kernel"].tolist(), int(state.num_active)) == ([[1.0]], 1)
    with pytest.raises(ValueError, match=r"ratio=0\.6 keeps none of the 1 prunable"):
        mask_by_importance(0.6).init(one)
    with pytest.raises(ValueError, match=r"keeps none"):  # of all, on every device
        mask_by_importance(0.6, axis_name=()).init(one)
    none = jnp.ones((0, 3))
    updates, state = first_step(mask_by_importance(0.5, prunable=True), none, none)
    assert (updates.shape, int(state.num_active)) == ((0, 3), 0)
    for nothing in ({}, {"a": None}, {"a": optax.MaskedNode()}):
        for tx in (gsm(0.5), gsm(0.5, smoothing=0.9)):
            updates, _ = first_step(tx, nothing, nothing)
            assert updates == nothing


def test_schedule_of_the_ratio_follows_its_own_steps():
    params = jnp.arange(1.0, 101.0).reshape(10, 10)
    tx = mask_by_importance(optax.linear_schedule(0.0, 0.8, 4))
    state, counts = tx.init(params), []
    for _ in range(6):
        _, state = tx.update(params, state, params)
        counts.append(int(optax.tree.get(state, "num_active")))
    assert counts == [100, 80, 60, 40, 20, 20]


def test_state_is_three_scalars():
    state = mask_by_importance(0.5).init({"kernel": jnp.ones((9, 9))})
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [
        ((), jnp.float32),
        ((), jnp.int32),
        ((), jnp.int32),
    ]


OUTSIDE = [-0.1, 1, 1.0, 60, 95, float("nan"), float("inf")]
WAYS = {  # a ratio enters
    "number": lambda ratio: mask_by_importance(ratio),
    "array of NumPy": lambda ratio: gsm_sgd(0.1, np.array(ratio)),
    "array": lambda ratio: gsm_sgd(0.1, jnp.array(ratio)),
    "schedule": lambda ratio: gsm(optax.linear_schedule(ratio, 0.95, 9)),
    "injected": lambda ratio: optax.inject_hyperparams(gsm_sgd)(0.1, ratio).init(ONE),
    "injected schedule": lambda ratio: optax.inject_hyperparams(gsm_sgd)(
        0.1, optax.constant_schedule(ratio)
    ).init(ONE),
    "prune": lambda ratio: prune(ONE, ratio),
    "prune, array": lambda ratio: prune(ONE, jnp.array(ratio)),
    "mask, array of NumPy": lambda ratio: magnitude_mask(ONE, np.array(ratio)),
}
ONE = {"kernel": jnp.ones((2, 2))}


@pytest.mark.promotes
@pytest.mark.parametrize("way", WAYS)
def test_ratio_outside_its_range_is_refused_wherever_it_enters(way):
    for ratio in OUTSIDE:
        with pytest.raises(ValueError, match=rf"ratio(\(0\))?={ratio:g} is outside"):
            WAYS[way](ratio)


def test_no_remedy_is_refused_in_its_turn():
    with pytest.raises(ValueError, match="outside") as error:
        mask_by_importance(100)
    assert "percent" not in str(error.value)


def test_a_compression_as_ratio_gets_a_remedy():
    with pytest.raises(ValueError, match=r"did you mean ratio=1-1/60\?"):
        mask_by_importance(60)


@pytest.mark.parametrize("ratio", ["0.5", None, [0.5], np.ones(3)])
def test_ratio_of_another_type_is_refused(ratio):
    with pytest.raises(ValueError, match="must be a number in"):
        mask_by_importance(ratio)


@pytest.mark.promotes
def test_a_schedule_is_refused_for_where_it_ends():
    falling_in = optax.linear_schedule(0, 95, 10)
    with pytest.raises(ValueError, match=r"ratio\(end\)=95 is outside"):
        mask_by_importance(falling_in)
    with pytest.raises(ValueError, match=r"ratio=0.99 keeps none of the 48"):
        mask_by_importance(ratio_ramp(0.99, 10)).init(jnp.ones((6, 8)))
    mask_by_importance(lambda step: step / 1000)  # has no end
    mask_by_importance(lambda step: (step / 10.0) ** 5)  # nor this, which overflows


@pytest.mark.promotes
def test_a_state_of_other_settings_is_refused():
    params = jnp.arange(1.0, 7).reshape(2, 3)
    state = mask_by_importance(0.5).init(params)
    for name, tx in {
        "smoothing": mask_by_importance(0.5, smoothing=0.9),
        "a schedule": mask_by_importance(ratio_ramp(0.5, 10)),
        "track_churn": mask_by_importance(0.5, track_churn=True),
    }.items():
        with pytest.raises(ValueError, match=f"without {name}"):
            tx.update(params, state, params)
    averaged = mask_by_importance(0.5, smoothing=0.9).init(params)
    mask_by_importance(0.5).update(params, averaged, params)


def test_a_gradient_of_another_shape_is_refused():
    tx, params = mask_by_importance(0.5), jnp.ones((4, 5))
    with pytest.raises(ValueError, match=r"gradient has shape \[5\].*\[4, 5\]"):
        tx.update(jnp.ones(5), tx.init(params), params)


def test_update_without_params_is_refused():
    tx = mask_by_importance(0.5)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))


@pytest.mark.parametrize(
    "params", [{"bias": jnp.ones(3)}, {"n": jnp.ones((2, 2), int)}]
)
def test_a_tree_without_a_prunable_leaf_is_refused(params):
    with pytest.raises(ValueError, match="no leaf is prunable among"):
        mask_by_importance(0.5).init(params)


@pytest.mark.parametrize(
    ("prunable", "message"),
    [
        ({"kernel": True}, "prunable does not match"),
        ({"dense": True, "conv": {"x": True}}, "prunable does not match"),
        ({"dense": True, "conv": 1}, "conv.*must be True or False"),
        (lambda params: "all", "must be True or False"),
    ],
)
def test_a_prunable_tree_that_does_not_fit_is_refused(prunable, message):
    with pytest.raises(ValueError, match=message):
        mask_by_importance(0.5, prunable=prunable).init(random_tree())


def test_a_passive_decay_may_be_negative_but_not_without_end():
    mask_by_importance(0.5, passive_decay=-1e-3)
    for decay in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=r"passive_decay=\S+ must be finite:"):
            mask_by_importance(0.5, passive_decay=decay)


def test_an_importance_of_another_shape_is_refused():
    tx = mask_by_importance(0.5, importance=lambda p, g: jnp.sum(p * g))
    params = jnp.ones((2, 3))
    with pytest.raises(
        ValueError, match=r"shape \(\) for a parameter of shape \(2, 3\)"
    ):
        tx.update(params, tx.init(params), params)


@pytest.mark.optimize(True)
def test_a_fused_gradient_is_seen_alike_by_search_and_mask():
    """Within one jit the gradient is an expression; the count must still be exact."""
    params = normal((200, 300), 4)
    tx = mask_by_importance(0.9)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda w: jnp.sum(jnp.sin(3 * w) * jnp.exp(-w * w / 3)))(
            params
        )
        return tx.update(grads, state, params)

    updates, state = step(params, tx.init(params))
    assert jnp.count_nonzero(updates) == state.num_active == 6000


def test_gradients_flow_through_the_update_as_through_a_fixed_mask():
    params, grads = jnp.arange(1.0, 7).reshape(2, 3), jnp.ones((2, 3))
    tx = mask_by_importance(0.5)
    total = lambda grads: jnp.sum(tx.update(grads, tx.init(params), params)[0])
    assert jax.jit(jax.grad(total))(grads).tolist() == [[0, 0, 0], [1, 1, 1]]


# Importances of one's own


class Power(eqx.Module):
    exponent: jax.Array

    def __call__(self, param, grad):
        return jnp.abs(param) * jnp.abs(grad) ** self.exponent


def test_an_importance_is_traced_anew_and_dies_with_the_transformation():
    """As any function that a user gives to jit: whatever is callable, nothing kept."""
    params, grads = normal((8, 8), 0), normal((8, 8), 1)
    module = Power(jnp.float32(0.5))
    tx = mask_by_importance(0.5, importance=module)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    scores = np.abs(params) * np.sqrt(np.abs(grads))
    np.testing.assert_array_equal(updates != 0, scores > np.median(scores))

    class Changing:
        sign = 1.0

        def __call__(self, param, grad):
            return self.sign * param

    def most_active(importance):
        tx = mask_by_importance(0.9, importance=importance)
        update = jax.jit(lambda *args: tx.update(*args))
        updates, _ = update(grads, tx.init(params), params)
        return jnp.max(jnp.where(updates == 0, -jnp.inf, params))

    importance = Changing()
    assert most_active(importance) == jnp.max(params)
    importance.sign = -1.0
    assert most_active(importance) < 0
    gone = weakref.ref(importance)
    del importance
    gc.collect()
    assert gone() is None


def test_what_is_short_of_q_shows_and_is_not_made_up_for_by_zeros():
    params = {"w": jnp.zeros((4, 4)).at[0].set(1.0)}
    tx = mask_by_importance(0.25)
    _, state = tx.update(params, tx.init(params), params)
    assert (state.num_kept, state.num_active) == (12, 4)
