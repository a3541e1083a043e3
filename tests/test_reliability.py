"""Nothing that parameters and gradients may hold breaks a step or is hidden by it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings, strategies as st
from oracle import active
from trees import drawn

from gsm_optax import gsm_sgd, mask_by_importance, prune, taylor_importance

# One structure, so that few programs are compiled; hypothesis varies what is in it.
SHAPES = {"block": [{"w": (3, 3, 2, 2), "b": (3,)}, ((65, 64),)], "scale": ()}
VALUES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "all zero": lambda rng, shape: np.zeros(shape),
    "all equal": lambda rng, shape: np.full(shape, -0.5),
    "ties": lambda rng, shape: rng.integers(-2, 3, shape),
    "huge range": lambda rng, shape: 10.0 ** rng.uniform(-38, 38, shape),
    "denormal": lambda rng, shape: rng.normal(size=shape) * 1e-40,
    "some NaN": lambda rng, shape: rng.choice([np.nan, 0.0, 1.0, -2.0], shape),
    "all NaN": lambda rng, shape: np.full(shape, np.nan),
    "some inf": lambda rng, shape: rng.choice([np.inf, -np.inf, 0.0, 3.0], shape),
}
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
examples = settings(max_examples=80, deadline=None)
draws = given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    params_are=st.sampled_from(list(VALUES)),
    grads_are=st.sampled_from(list(VALUES)),
    ratio=st.one_of(
        st.floats(0, 1, exclude_max=True, width=32), st.sampled_from([0, 0.5, 0.9])
    ),
)


@jax.jit
def masked(params, grads, ratio):
    tx = mask_by_importance(ratio)
    updates, state = tx.update(grads, tx.init(params), params)
    single = lambda x: x.astype(jnp.float32)
    scores = jax.tree.map(
        lambda p, g: taylor_importance(single(p), single(g)), params, grads
    )
    return updates, state, scores


@jax.jit
def trained(params, grads, ratio):
    tx = gsm_sgd(2.0**-4, ratio, momentum=0.5, weight_decay=2.0**-4)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=2)[0][0]


pruned = jax.jit(prune)


def draw(seed, dtype, kind):
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        make = lambda shape: jnp.asarray(np.asarray(VALUES[kind](rng, shape), dtype))
        return drawn(SHAPES, make)


def kernels_of(tree):
    # NumPy knows the NaN of float32, but not that of bfloat16.
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(tree) if x.ndim > 1]


def float32_budget(ratio, total):
    """Q for a traced ratio, whose product with N is rounded to float32."""
    return total - int(np.round(np.float32(ratio) * np.float32(total)))


@examples
@draws
def test_the_choice_is_that_of_a_sort_and_hides_no_fault(
    seed, dtype, params_are, grads_are, ratio
):
    params = draw(seed, dtype, params_are)
    grads = draw(seed + 1, dtype, grads_are)
    updates, state, scores = masked(params, grads, np.float32(ratio))
    scores, changes, given = map(kernels_of, (scores, updates, grads))
    kept = float32_budget(ratio, sum(s.size for s in scores))
    # From the jitted scores: XLA flushes denormals to zero, NumPy does not.
    masks = active(scores, kept)
    assert int(state.num_active) == sum(int(m.sum()) for m in masks)
    for update, grad, mask in zip(changes, given, masks, strict=True):
        np.testing.assert_array_equal(update, np.where(mask, grad, 0))
        assert (np.isnan(grad) <= np.isnan(update)).all()
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert u.dtype == dtype
        if u.ndim < 2:
            assert np.asarray(u).tobytes() == np.asarray(g).tobytes()


@examples
@draws
def test_pruned_stays_pruned_unless_its_gradient_is_a_fault(
    seed, dtype, params_are, grads_are, ratio
):
    params = draw(seed, dtype, params_are)
    grads = draw(seed + 1, dtype, grads_are)
    start = pruned(params, np.float32(ratio))
    end = trained(start, grads, np.float32(ratio) / 2)
    total = sum(x.size for x in kernels_of(params))
    everything = float32_budget(ratio / 2, total) == total
    for before, grad, after in zip(*map(kernels_of, (start, grads, end)), strict=True):
        zero, fault = before == 0, ~np.isfinite(grad)
        # Where all entries are active a zero is trained like any other.
        assert everything or (after[zero & ~fault] == 0).all()
        assert np.isnan(after[np.isnan(grad)]).all()
        assert not np.isfinite(after[zero & fault]).any()
