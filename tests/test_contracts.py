"""Contracts: every public transformation (rows) through what users wrap around it.

Each test is a column. It compares with the plain loop of `rows x steps`, bit for bit
where XLA compiles the same arithmetic, else to the last digits.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import active, budget
from trees import assert_close, assert_same, first_step, normal

from gsm_optax import (
    freeze_pruned,
    gsm,
    gsm_sgd,
    magnitude_mask,
    mask_by_importance,
    tempered_importance,
)
from gsm_optax.units import find_units

RATIO, STEPS = 0.75, 4
HALF = {"momentum": 0.5, "weight_decay": 2.0**-3}


SHAPES = {"a": {"kernel": (4, 6), "bias": (6,)}, "b": (2, 2, 4)}
tree = partial(normal, SHAPES)
LIKE = [(4, 6), (6,), (2, 2, 4)]
PRUNABLE = 4 * 6 + 2 * 2 * 4
MASK = magnitude_mask(tree(0), RATIO)
UNITS = find_units(
    lambda params, x: (
        jnp.tanh(jnp.tensordot(x, params["b"], 2)) @ params["a"]["kernel"]
    ),
    tree(0),
    jnp.ones((1, 2, 2)),
)
ROWS = {
    "mask_by_importance": mask_by_importance(RATIO),
    "gsm_sgd, schedules": gsm_sgd(  # which is gsm and the learning rate
        optax.linear_schedule(2.0**-3, 0.0, 8),
        optax.linear_schedule(0.25, RATIO, 4),
        nesterov=True,
        **HALF,
    ),
    "freeze_pruned": freeze_pruned(MASK),
    "units": gsm_sgd(
        2.0**-4, RATIO, units=UNITS, smoothing=0.5, track_churn=True, **HALF
    ),
    "everything on": gsm_sgd(
        2.0**-4,
        RATIO,
        track_churn=True,
        smoothing=0.5,
        passive_decay=0.25,
        importance=tempered_importance(0.5),
        **HALF,
    ),
}
SELECTING = [name for name in ROWS if name != "freeze_pruned"]


def marked(names):
    """The last row is compiled as users compile, but where a test says otherwise."""
    whether = lambda name: pytest.mark.optimize(name == "everything on")
    return [pytest.param(name, marks=whether(name)) for name in names]


@pytest.fixture(params=marked(ROWS))
def tx(request):
    return ROWS[request.param]


@pytest.fixture(params=marked(SELECTING))
def selecting(request):
    return ROWS[request.param]


def grads_of(step, dtype=jnp.float32):
    return tree(step + 100, dtype)


STACKED = jax.tree.map(lambda *x: jnp.stack(x), *map(grads_of, range(STEPS)))


def body(tx, carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), updates


step_of = jax.jit(body, static_argnums=0)  # compiled once a row


def loop(tx, params=None, steps=STEPS, grads=grads_of):
    """The plain loop: parameters, state and updates of the last step."""
    params = tree(0) if params is None else params
    carry, updates = (params, tx.init(params)), None
    for i in range(steps):
        carry, updates = step_of(tx, carry, grads(i))
    return *carry, updates


def num_active(state):
    return int(optax.tree.get(state, "num_active"))


# jax around it


def test_scan_with_a_cond_that_skips_every_other_step(tx):
    def step(carry, i_grads):
        i, grads = i_grads
        run = lambda carry: body(tx, carry, grads)[0]
        return jax.lax.cond(i % 2 == 0, run, lambda carry: carry, carry), None

    start = tree(0), tx.init(tree(0))
    scan = jax.jit(partial(jax.lax.scan, step))
    end, _ = scan(start, (jnp.arange(STEPS), STACKED))
    assert_same(end, loop(tx, steps=STEPS // 2, grads=lambda i: grads_of(2 * i))[:2])


@pytest.mark.optimize(False)
def test_eval_shape_of_init_tells_every_state(tx):
    abstract = jax.eval_shape(tx.init, tree(0))
    _, state, _ = loop(tx)
    as_shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert as_shapes(abstract) == as_shapes(state) == as_shapes(tx.init(tree(0)))


def test_donation_and_one_compilation_for_all_steps(tx):
    step = jax.jit(partial(body, tx), donate_argnums=0)
    params = jax.tree.map(jnp.copy, tree(0))
    carry, first = (params, tx.init(params)), jax.tree.leaves(params)
    for i in range(STEPS):
        carry, _ = step(carry, grads_of(i))
    assert all(x.is_deleted() for x in first)
    assert step._cache_size() == 1
    assert_same(carry, loop(tx)[:2])


def test_vmap_over_an_ensemble_is_each_model_alone(tx):
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    params = stack(tree(0), tree(1), tree(2))
    carry = params, jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(partial(body, tx)))
    for i in range(STEPS):
        carry, _ = step(carry, stack(*map(grads_of, (i, i + 1, i + 2))))
    for k in range(3):
        alone = loop(tx, tree(k), grads=lambda i, k=k: grads_of(i + k))[:2]
        assert_same(jax.tree.map(lambda x, k=k: x[k], carry), alone)


@pytest.mark.optimize(False)
def test_gradients_through_update_are_those_of_the_finite_difference(tx):
    """Along the gradient the update is linear as long as the choice stays."""
    params, state = tree(0), tx.init(tree(0))
    scale = lambda s: jax.tree.map(lambda g: s * g, grads_of(0))
    of = jax.jit(lambda s: optax.tree.sum(tx.update(scale(s), state, params)[0]))
    slope = jax.jit(jax.grad(of))(jnp.float32(1))
    assert slope != 0
    step = of(jnp.float32(1.5)) - of(jnp.float32(0.5))
    np.testing.assert_allclose(slope, step, rtol=1e-5)


@pytest.mark.optimize(False)
def test_updates_and_states_keep_their_dtypes(tx):
    dtype = jnp.bfloat16  # float32 is in every other test
    start = tree(0, dtype)
    params, state, updates = loop(tx, start, grads=partial(grads_of, dtype=dtype))
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert dtypes(params) == dtypes(updates) == dtypes(start)
    assert dtypes(state) == dtypes(tx.init(start))


# optax around it


def test_chain_of_one_and_tree_get():
    alone = ROWS["mask_by_importance"]  # the others are chains
    params, state, _ = loop(optax.chain(optax.identity(), alone, optax.scale(1.0)))
    wanted, plain, _ = loop(alone)
    assert_same(params, wanted)
    assert num_active(state) == num_active(plain) >= budget(RATIO, PRUNABLE)


def test_extra_args_pass(tx):
    plain = first_step(tx, grads_of(0), tree(0))
    wrapped = optax.with_extra_args_support(tx)
    assert_same(first_step(tx, grads_of(0), tree(0), value=1.0, unknown=2), plain)
    assert_same(first_step(wrapped, grads_of(0), tree(0), unknown=2), plain)


@pytest.mark.optimize(False)
def test_map_params_touches_what_is_like_the_parameters(tx):
    """Zeroing it leaves the rest alone: scalars, counts, averages of units."""
    _, state, _ = loop(tx)
    assert_same(optax.tree.map_params(tx, lambda x: x, state), state)
    zeroed = optax.tree.map_params(tx, jnp.zeros_like, state)
    for a, b in zip(jax.tree.leaves(zeroed), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        other = a.shape not in LIKE or a.dtype == jnp.int32
        np.testing.assert_array_equal(a, b if other else jnp.zeros_like(a))


def test_masked_has_the_budget_of_its_part(selecting):
    part = {"a": True, "b": False}
    params, state, updates = loop(optax.masked(selecting, part))
    only = {"a": tree(0)["a"]}
    wanted, plain, _ = loop(selecting, only, grads=lambda i: {"a": grads_of(i)["a"]})
    assert_same(params["a"], wanted["a"])
    assert_same(updates["b"], grads_of(STEPS - 1)["b"])
    assert num_active(state) == num_active(plain)


def test_partition_is_two_budgets():
    """Each label has its own choice, equal to that of its part alone."""
    rows = {"a": gsm_sgd(2.0**-4, 0.5, **HALF), "b": gsm_sgd(2.0**-4, 0.75, **HALF)}
    params, state, _ = loop(optax.partition(rows, {"a": "a", "b": "b"}))
    for name, size, ratio in (("a", 24, 0.5), ("b", 16, 0.75)):
        part = lambda i, name=name: {name: grads_of(i)[name]}
        alone, _, _ = loop(rows[name], {name: tree(0)[name]}, grads=part)
        assert_same(params[name], alone[name])
        assert num_active(state.inner_states[name]) == budget(ratio, size)


@pytest.mark.optimize(False)
@pytest.mark.promotes
def test_multi_steps_is_the_mean_gradient(tx):
    every = optax.MultiSteps(tx, 2)
    params, state, _ = loop(every, grads=lambda i: grads_of(i // 2))
    wanted, plain, _ = loop(tx, steps=STEPS // 2)
    assert_close((params, state.inner_opt_state), (wanted, plain))


@pytest.mark.optimize(False)
def test_apply_if_finite_skips_the_faulty_step(tx):
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
    bad = jax.tree.map(lambda x: x * jnp.nan, grads_of(0))
    faulty = lambda i: bad if i == 1 else grads_of(i - (i > 1))
    params, state, _ = loop(guarded, steps=STEPS + 1, grads=faulty)
    wanted, plain, _ = loop(tx)
    assert_close((params, state.inner_state), (wanted, plain))


def test_flatten_needs_prunable_and_chooses_the_same():
    """`optax.flatten` leaves one vector; `prunable=True` takes all of it."""
    everything = partial(gsm_sgd, 2.0**-4, RATIO, prunable=True, **HALF)
    flat, _, _ = loop(optax.flatten(everything()))
    assert_same(flat, loop(everything())[0])
    with pytest.raises(ValueError, match="prunable="):
        optax.flatten(gsm(RATIO)).init(tree(0))


@pytest.mark.optimize(False)
def test_clipping_goes_before():
    clipped = optax.chain(optax.clip_by_global_norm(0.5), gsm_sgd(2.0**-4, RATIO))
    clip = jax.jit(optax.clip_by_global_norm(0.5).update)
    by_hand = lambda i: clip(grads_of(i), optax.EmptyState())[0]
    assert_close(loop(clipped)[0], loop(gsm_sgd(2.0**-4, RATIO), grads=by_hand)[0])


@pytest.mark.optimize(False)
@pytest.mark.promotes
def test_adam_sees_the_gradients_of_the_oracle():
    params, grads = tree(0), grads_of(0)
    tx = optax.chain(mask_by_importance(RATIO), optax.adam(1e-2))
    updates, _ = first_step(tx, grads, params)
    kernels = lambda tree: [tree["a"]["kernel"], tree["b"]]
    products = [
        np.abs(p * g) for p, g in zip(kernels(params), kernels(grads), strict=True)
    ]
    for u, mask in zip(
        kernels(updates), active(products, budget(RATIO, PRUNABLE)), strict=True
    ):
        np.testing.assert_array_equal(u != 0, mask)
    assert (updates["a"]["bias"] != 0).all()


@pytest.mark.optimize(False)
@pytest.mark.promotes
@pytest.mark.parametrize("wrapper", ["schedule_free", "mechanize"])
def test_learning_rate_tuners_leave_the_choice_alone(wrapper):
    """Around `gsm_sgd` without momentum, which schedule_free brings itself."""
    inner = gsm_sgd(2.0**-4, RATIO, momentum=0.0, weight_decay=2.0**-3)
    tx = {
        "schedule_free": lambda: optax.contrib.schedule_free(inner, 2.0**-4),
        "mechanize": lambda: optax.contrib.mechanize(inner),
    }[wrapper]()
    params, state, _ = loop(tx)
    assert num_active(state) == budget(RATIO, PRUNABLE)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))
    if wrapper == "schedule_free":
        params = optax.contrib.schedule_free_eval_params(state, params)
    assert jax.tree.structure(params) == jax.tree.structure(tree(0))


@pytest.mark.optimize(False)
def test_types_of_states_are_stable_on_an_explicit_mesh(selecting):
    """Shapes, dtypes and shardings of init are the same after a step, and under jit."""
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("x",), explicit, devices=jax.devices()[:2])
    specs = {"a": {"kernel": jax.P(None, "x"), "bias": jax.P()}, "b": jax.P("x")}
    with jax.set_mesh(mesh):
        params = jax.device_put(tree(0, jnp.bfloat16), specs)
        types = partial(jax.tree.map, jax.typeof)
        start = selecting.init(params)
        updates, state = jax.jit(selecting.update)(params, start, params)
        assert types(jax.jit(selecting.init)(params)) == types(start) == types(state)
        assert types(updates) == types(params)


@pytest.mark.optimize(False)
def test_with_64_bits_enabled():
    with jax.enable_x64(True):
        params = jnp.arange(1.0, 7.0).reshape(2, 3)
        assert params.dtype == jnp.float64
        updates, state = first_step(gsm_sgd(0.1, 0.5), params, params)
        assert updates.dtype == jnp.float64
        assert num_active(state) == 3


# Hyperparameters from outside

INJECTED = {
    "gsm_sgd": (gsm_sgd, {"learning_rate": 2.0**-4, "ratio": RATIO, **HALF}),
    "gsm": (gsm, {"ratio": RATIO, **HALF}),
    "mask_by_importance": (mask_by_importance, {"ratio": RATIO}),
}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("gsm_sgd", "float"),
        ("gsm_sgd", "schedule"),
        ("gsm", "schedule"),
        ("mask_by_importance", "float"),
    ],
)
def test_injected_is_the_plain_one(name, form):
    """Without `static_args`: no default is taken for a schedule."""
    factory, kwargs = INJECTED[name]
    given = kwargs
    if form == "schedule":
        given = {k: optax.constant_schedule(v) for k, v in kwargs.items()}
    params, state, _ = loop(optax.inject_hyperparams(factory)(**given))
    wanted, plain, _ = loop(factory(**kwargs))
    assert_same(params, wanted)
    assert num_active(state) == num_active(plain)
    assert set(kwargs) <= set(state.hyperparams)


@pytest.mark.optimize(False)
def test_injected_schedules_are_followed_without_compiling_again():
    ratios = [0.0, 0.25, 0.5, 0.75]
    tx = optax.inject_hyperparams(gsm_sgd)(
        learning_rate=2.0**-4,
        ratio=lambda step: jnp.asarray(ratios)[step],
        momentum=optax.linear_schedule(0.5, 0.75, 4),
        weight_decay=optax.linear_schedule(0.0, 0.25, 4),
    )
    step, carry = jax.jit(partial(body, tx)), (tree(0), tx.init(tree(0)))
    for i, ratio in enumerate(ratios):
        carry, _ = step(carry, grads_of(i))
        assert num_active(carry[1]) == budget(ratio, PRUNABLE)
        hyperparams = carry[1].hyperparams
        assert hyperparams["momentum"] == 0.5 + i / 16
        assert hyperparams["weight_decay"] == i / 16
    assert step._cache_size() == 1


@pytest.mark.parametrize("ratio", [0.95, optax.constant_schedule(0.95)])
def test_half_precision_does_not_round_the_ratio_silently(ratio):
    params = {"kernel": jnp.ones((40, 50), jnp.bfloat16)}
    with pytest.raises(ValueError, match="told hyperparam_dtype="):
        optax.inject_hyperparams(gsm_sgd)(0.1, ratio).init(params)
    inject = partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    state = inject(mask_by_importance)(ratio).init(params)
    assert state.hyperparams["ratio"] == np.float32(0.95)


def test_learning_rate_is_annotated_as_optax_does():
    signature = inspect.signature(gsm_sgd).parameters
    assert signature["learning_rate"].annotation == optax.ScalarOrSchedule
    assert list(signature)[:2] == ["learning_rate", "ratio"]
