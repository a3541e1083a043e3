"""Freezing schedules, what they save, and stop_frozen_gradients."""

import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from trees import normal

from gsm_optax.freezing import (
    delayed_periodic,
    freezing_saving,
    periodic,
    single_shot,
    single_shot_resume,
    single_shot_start,
    stop_frozen_gradients,
)

pytestmark = pytest.mark.optimize(False)


def given_by(table):
    """A schedule that looks the step up in a table."""
    return lambda step: jnp.asarray(table, jnp.int32)[step]


# Schedules


small = st.integers(1, 7)
few = settings(deadline=None, max_examples=25)


@few
@given(start=st.integers(0, 20), interval=small, blocks=small)
def test_single_shot_freezes_block_i_at_its_time_and_for_good(start, interval, blocks):
    frozen = np.asarray(single_shot(start, interval, blocks)(jnp.arange(80)))
    for i in range(blocks + 2):
        frozen_at = start + i * interval if i < blocks else math.inf
        np.testing.assert_array_equal(frozen > i, np.arange(80) >= frozen_at)


@few
@given(start=st.integers(5, 20), interval=small, blocks=small, resume=st.integers(0, 5))
def test_resuming_saves_the_same_and_ends_thawed(start, interval, blocks, resume):
    steps = 80
    once = single_shot(start, interval, blocks)(jnp.arange(steps))
    schedule = single_shot_resume(start, interval, blocks, steps=steps, resume=resume)
    again = schedule(jnp.arange(steps))
    assert not again[steps - resume :].any()
    for i in range(blocks):
        assert jnp.sum(again > i) == jnp.sum(once > i)


@few
@given(
    exponents=st.lists(st.integers(0, 4), max_size=5),
    interval=small,
    delay=st.integers(0, 9),
)
def test_periods_are_kept_and_what_is_frozen_is_a_prefix(exponents, interval, delay):
    periods = [*(2**e for e in sorted(exponents, reverse=True)), 1]
    frozen = np.asarray(periodic(periods, interval)(jnp.arange(100)))
    stretch = np.arange(100) // interval
    for i, period in enumerate(periods):
        np.testing.assert_array_equal(frozen <= i, stretch % period == 0)
    later = np.asarray(delayed_periodic(delay, periods, interval)(jnp.arange(100)))
    assert not later[:delay].any()
    np.testing.assert_array_equal(later[delay:], frozen[: 100 - delay])


@pytest.mark.parametrize(
    "schedule",
    [
        single_shot(4, 2, 3),
        single_shot_resume(4, 2, 3, steps=12, resume=3),
        periodic((4, 2, 1), 2),
        delayed_periodic(3, (4, 2, 1), 1),
    ],
)
def test_schedules_are_int32_scalars_in_and_out_of_jit(schedule):
    for step in range(12):
        plain = schedule(step)
        traced = jax.jit(schedule)(jnp.int32(step))
        assert plain.dtype == traced.dtype == jnp.int32
        assert plain.shape == traced.shape == ()
        assert plain == traced == schedule(jnp.arange(12))[step]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: single_shot(-1, 2, 3), "start=-1 must be a whole number of 0"),
        (lambda: single_shot(1, 0, 3), "interval=0 must be a whole number of 1"),
        (lambda: single_shot(1, 2.5, 3), r"interval=2\.5 must be"),
        (lambda: single_shot(1, 2, 0), "blocks=0 must be"),
        (lambda: single_shot(math.inf, 2, 1), "start=inf must be"),
        (lambda: single_shot_resume(4, 2, 3, steps=12, resume=5), "start=4 must be at"),
        (lambda: single_shot_resume(12, 2, 3, steps=12, resume=5), "below steps=12"),
        (lambda: periodic((4, 3, 1), 1), r"periods=\(4, 3, 1\) must be powers of two"),
        (lambda: periodic((2, 4, 1), 1), "fall towards the output"),
        (lambda: periodic((4, 2), 1), "end with 1"),
        (lambda: periodic((), 1), "end with 1"),
        (lambda: periodic((2, 1), 0), "interval=0 must be"),
        (lambda: delayed_periodic(-2, (2, 1), 1), "delay=-2 must be"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_stay_right_where_optax_stops_counting():
    last = np.int32(2**31 - 1)
    assert int(single_shot(0, 1, 3)(last)) == 3
    assert int(single_shot_resume(5, 1, 3, steps=10, resume=2)(last)) == 0


def test_whole_floats_are_whole_numbers_and_what_is_too_large_is_refused():
    schedule = single_shot(4.0, 2.0, 3.0)
    assert schedule(5).dtype == jnp.int32
    costs = {"forward": [1, 1], "backward": [2, 1]}
    assert single_shot_start(0.1, 100.0, 1.0, 1.0, **costs) == single_shot_start(
        0.1, 100, 1, 1, **costs
    )
    with pytest.raises(ValueError, match=r"start=3000000000 must be .* below 2\*\*31"):
        single_shot(3 * 10**9, 1, 1)


# What they save


COSTS = {"forward": [1.0, 2.0, 3.0], "backward": [2.0, 4.0, 5.0]}


@pytest.mark.parametrize(
    "schedule", [single_shot(30, 7, 2), periodic((4, 2, 1), 3), given_by([3] * 100)]
)
def test_saving_is_the_backward_cost_of_what_is_frozen(schedule):
    spent = 0.0
    for step in range(100):
        frozen = int(schedule(step))
        spent += sum(COSTS["forward"]) + sum(COSTS["backward"][frozen:])
    saving = freezing_saving(schedule, 100, **COSTS)
    assert saving == pytest.approx(1 - spent / (100 * 17))


@few
@given(saving=st.floats(0.01, 0.3), interval=st.integers(1, 30))
def test_start_is_the_latest_that_saves_so_much(saving, interval):
    start = single_shot_start(saving, 400, interval, 2, **COSTS)
    saved = lambda start: freezing_saving(single_shot(start, interval, 2), 400, **COSTS)
    assert saved(start) >= saving - 1e-12
    assert saved(start + 1) < saving


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: single_shot_start(0.4, 100, 1, 2, **COSTS), r"saving=0.4 .*\(0, 0.35"),
        (lambda: single_shot_start(0.0, 100, 1, 2, **COSTS), "saving=0.0 must be"),
        (lambda: single_shot_start(0.1, 100, 1, 4, **COSTS), "blocks=4 are to be"),
        (lambda: single_shot_start(0.1, 100, 0, 2, **COSTS), "interval=0 must be"),
        (lambda: freezing_saving(given_by([4]), 1, **COSTS), "freezes 4 to 4 blocks"),
        (
            lambda: freezing_saving(given_by([0]), 1, forward=[1], backward=[1, 2]),
            "one cost a block",
        ),
        (
            lambda: freezing_saving(given_by([0]), 1, forward=[1], backward=[-1]),
            "not negative",
        ),
        (lambda: freezing_saving(given_by([0]), 0, **COSTS), "steps=0 must be"),
    ],
)
def test_bad_costs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_schedules_of_scalars_are_enough():
    def schedule(step):
        return jax.lax.cond(step < 2, lambda: 0, lambda: 1)

    costs = {"forward": [1, 1], "backward": [2, 1]}
    assert freezing_saving(schedule, 4, **costs) == pytest.approx(0.5 * 2 / 5)


# Stopping gradients


BLOCKS = ["first", "middle", "last"]
SHAPES = {"first": (12, 9), "middle": (9, 8), "last": (8, 4)}
PARAMS = normal({n: {"kernel": s, "bias": s[-1:]} for n, s in SHAPES.items()})


def loss_of(params, x, num_frozen):
    params = stop_frozen_gradients(params, num_frozen, BLOCKS)
    for name in BLOCKS:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return jnp.sum(x**2)


@pytest.mark.optimize(True)
def test_gradients_of_the_rest_are_the_same_and_frozen_ones_zero():
    x = normal((7, 12), 5)
    step = jax.jit(jax.value_and_grad(loss_of), static_argnums=2)
    loss, whole = step(PARAMS, x, 0)
    for num_frozen in range(4):
        same, grads = step(PARAMS, x, num_frozen)
        assert same == loss
        for i, name in enumerate(BLOCKS):
            want = (
                whole[name] if i >= num_frozen else optax.tree.zeros_like(whole[name])
            )
            for key in want:
                np.testing.assert_allclose(grads[name][key], want[key], rtol=1e-5)


def test_the_backward_pass_of_the_front_is_not_in_the_program():
    """FLOPs fall by what the frozen matrix products cost."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    n, rows = 64, 128
    params = {b: {"kernel": struct(n, n), "bias": struct(n)} for b in BLOCKS}
    flops = []
    for num_frozen in range(4):
        grad = jax.jit(jax.grad(partial(loss_of, num_frozen=num_frozen)))
        cost = grad.lower(params, struct(rows, n)).compile().cost_analysis()
        flops.append(cost.get("flops", 0.0))
    product = 2 * rows * n * n
    # Of the first block only the kernel's gradient is made, of others their input's.
    saved = -np.diff(flops) / product
    np.testing.assert_allclose(saved[:2], [2, 2], rtol=0.1)
    assert saved[2] > 0.9


@pytest.mark.parametrize("num_frozen", [-1, 1.5, jnp.int32(1), None])
def test_the_number_of_frozen_blocks_must_be_static(num_frozen):
    with pytest.raises(ValueError, match=r"must be a Python int.*static_argnames"):
        stop_frozen_gradients(PARAMS, num_frozen, BLOCKS)


def test_a_traced_number_is_refused():
    with pytest.raises(ValueError, match=r"must be a Python int.*static_argnames"):
        jax.jit(lambda k: stop_frozen_gradients(PARAMS, k, BLOCKS))(1)


def test_nnx_modules_train_with_a_frozen_front():
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1))
    )
    blocks = ["layers/0", "layers/1"]
    graph, params = nnx.split(model, nnx.Param)

    def loss(params):
        params = stop_frozen_gradients(params, 1, blocks)
        return nnx.merge(graph, params)(jnp.ones((3, 4))).sum()

    grads = jax.jit(jax.grad(loss))(params)
    assert (grads["layers"][0]["kernel"][...] == 0).all()
    assert (grads["layers"][1]["kernel"][...] != 0).any()


def test_savings_are_those_of_the_compiled_program():
    """Backward costs by the rule of `freezing_saving` against XLA's FLOPs."""
    widths = (64, 96, 32, 48, 10)
    names = [f"layer{i}" for i in range(4)]
    shapes = list(pairwise(widths))
    params = {n: jnp.ones(s) for n, s in zip(names, shapes, strict=True)}
    forward = np.prod(shapes, 1)
    backward = forward + np.append(forward[1:], 0)

    def flops(num_frozen):
        def loss(params, x):
            params = stop_frozen_gradients(params, num_frozen, names)
            for name in names:
                x = jnp.tanh(x @ params[name])
            return x.sum()

        x = jnp.ones((128, widths[0]))
        return (
            jax.jit(jax.grad(loss)).lower(params, x).compile().cost_analysis()["flops"]
        )

    whole = flops(0)
    for num_frozen in range(1, 4):
        saving = freezing_saving(
            lambda step, k=num_frozen: k + 0 * step,
            1,
            forward=forward,
            backward=backward,
        )
        assert 1 - flops(num_frozen) / whole == pytest.approx(saving, abs=0.02)
