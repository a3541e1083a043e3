"""stochastic_rounding: exact neighbours, unbiased, and decay that happens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import normal

from gsm_optax import (
    decay_budget,
    gsm_sgd,
    magnitude_mask,
    prune,
    stochastic_rounding,
)
from gsm_optax.freezing import freeze_blocks, single_shot


def wide(x):
    return np.asarray(x, np.float32)


def one_step(params, update, seed=0):
    tx = stochastic_rounding(optax.identity(), seed)
    updates, _ = tx.update(update, tx.init(params), params)
    assert updates.dtype == params.dtype
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.4, 1.0, 3.0])
def test_steps_end_at_a_neighbour_and_are_right_in_the_mean(dtype, size):
    """Within a unit in the last place of the sum; two of an update that is greater."""
    rng, entries, draws = np.random.default_rng(0), 500, 400
    params = jnp.asarray(np.tile(rng.normal(size=entries) + 2, (draws, 1)), dtype)
    scaled = rng.normal(size=entries).astype(np.float32) * size
    update = jnp.asarray(wide(params) * scaled)
    got, want = wide(one_step(params, update)), wide(params) + wide(update)
    unit = float(jnp.finfo(dtype).eps)
    room = unit * np.maximum(np.abs(want), np.abs(wide(update)))
    assert (np.abs(got - want) <= room * (2 if size > 1 else 1)).all()
    bias = (got - want).mean(0) / room[0]
    assert np.abs(bias.mean()) < 5e-3
    assert np.sqrt((bias**2).mean()) < 0.05 if size < 1 else 0.3
    if size < 0.1:
        below = wide(jnp.nextafter(jnp.asarray(got, dtype), jnp.asarray(-9.0, dtype)))
        above = wide(jnp.nextafter(jnp.asarray(got, dtype), jnp.asarray(9.0, dtype)))
        assert ((below < want) & (want < above)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_needs_no_rounding_is_not_rounded(dtype):
    params = jnp.asarray([0.0, 1.0, 3.0, -2.0, 1.0, 1.0, jnp.inf, 0.0], dtype)
    update = jnp.asarray([0, 0, 1, 0.5, jnp.nan, jnp.inf, 0, 2**-9], jnp.float32)
    want = [0, 1, 4, -1.5, np.nan, np.inf, np.inf, 2**-9]
    np.testing.assert_array_equal(wide(one_step(params, update)), want)


@pytest.mark.promotes
@pytest.mark.parametrize("accumulator", [None, jnp.bfloat16])
def test_passive_weights_in_bfloat16_reach_zero_in_the_mean(accumulator):
    """No step of it is as much as 1/512, so that without it nothing moves."""
    lr, momentum, decay, steps = 0.01, 0.9, 0.015, 8000
    budget = decay_budget(lr, steps, momentum=momentum, weight_decay=decay)
    assert budget.total > 12
    plain = gsm_sgd(
        lr, 0.5, momentum=momentum, weight_decay=decay, accumulator_dtype=accumulator
    )

    def left(tx, dtype):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jnp.zeros_like(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.ones((16, 16), dtype)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return wide(params).mean()

    with pytest.warns(UserWarning, match="use stochastic_rounding"):
        assert left(plain, jnp.bfloat16) > 0.9
    got, exact = left(stochastic_rounding(plain), jnp.bfloat16), budget.remaining
    # Momentum that is itself bfloat16 lags behind a weight that shrinks: see gsm_sgd.
    assert got == pytest.approx(exact, rel=0.1 if accumulator is None else 0.8)
    assert got < np.exp(-11.7)


def test_float32_and_other_leaves_are_left_as_they_are():
    params = {"w": jnp.ones((3, 3)), "n": jnp.arange(3), "h": jnp.ones(3, jnp.bfloat16)}
    grads = {"w": jnp.full((3, 3), 1e-6), "n": None, "h": None}
    tx = stochastic_rounding(optax.scale(1.0))
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], grads["w"])
    assert (updates["h"], updates["n"]) == (None, None)
    selected = stochastic_rounding(gsm_sgd(0.1, 0.5)).init(params)
    assert optax.tree.get(selected, "trace")["h"].dtype == jnp.float32


def test_bits_are_the_same_on_any_mesh():
    params, update = normal((16, 8), 1, jnp.bfloat16), 1e-3 * normal((16, 8), 2)
    want = wide(jax.jit(one_step)(params, update))
    kinds = jax.sharding.AxisType
    for kind in (kinds.Auto, kinds.Explicit):
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
        for spec in (jax.P("x", "y"), jax.P(None, "x")):
            with jax.set_mesh(mesh):
                at = jax.sharding.NamedSharding(mesh, spec)
                got = jax.jit(one_step)(*jax.device_put((params, update), at))
            assert got.sharding.is_equivalent_to(at, 2) or kind == kinds.Auto
            np.testing.assert_array_equal(wide(got), want)
        local = jax.shard_map(
            one_step, mesh=mesh, in_specs=(jax.P("x"),) * 2, out_specs=jax.P("x")
        )
        if kind == kinds.Auto:
            part = wide(jax.jit(local)(params, update))
            assert (part != wide(params)).any()


def test_seeds_steps_and_leaves_draw_their_own_bits():
    tx = stochastic_rounding(optax.identity())
    params = [jnp.ones((8, 8), jnp.bfloat16)] * 2
    update = [jnp.full((8, 8), 2e-3)] * 2
    first, state = tx.update(update, tx.init(params), params)
    second, _ = tx.update(update, state, params)
    other = one_step(params[0], update[0], seed=1) - params[0]
    results = [wide(x).tobytes() for x in (*first, *second, other)]
    assert len(set(results)) == 5
    with pytest.raises(ValueError, match="seed=-1 must be a whole number"):
        stochastic_rounding(optax.identity(), -1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(update, state)


def test_what_prunes_and_freezes_works_around_it():
    params = normal({"a": (8, 8), "b": (8, 8)}, 2, jnp.bfloat16)
    tx = freeze_blocks(
        stochastic_rounding(gsm_sgd(0.1, 0.5)), single_shot(0, 1, blocks=1), ["a", "b"]
    )
    state, start = tx.init(params), params
    step = jax.jit(tx.update)
    for _ in range(5):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(wide(params["a"]), wide(start["a"]))
    assert (wide(params["b"]) != wide(start["b"])).any()
    # Zeros stay: the parameters are all there is.
    params, mask = prune(params, 0.5), magnitude_mask(params, 0.5)
    tx = stochastic_rounding(gsm_sgd(0.1, 0.5))
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(5):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
    for name, keep in mask.items():
        assert (wide(params[name])[~np.asarray(keep)] == 0).all()
