"""freeze_blocks: what stays, what trains, and the choice among what trains."""

import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, settings, strategies as st
from jax.sharding import PartitionSpec as P
from oracle import active, budget
from trees import assert_same, first_step, mesh_of, normal, place, place_scalars

from gsm_optax import (
    gsm,
    gsm_sgd,
    magnitude_importance,
    mask_by_importance,
)
from gsm_optax.freezing import freeze_blocks, single_shot, stop_frozen_gradients

pytestmark = pytest.mark.optimize(False)

BLOCKS = ["first", "middle", "last"]
SHAPES = {"first": (12, 9), "middle": (9, 8), "last": (8, 4)}
draw = partial(normal, {n: {"kernel": s, "bias": s[-1:]} for n, s in SHAPES.items()})


def given_by(table):
    """A schedule that looks the step up in a table."""
    return lambda step: jnp.asarray(table, jnp.int32)[step]


# The transformation


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(optax.linear_schedule(0.1, 0.0, 20), weight_decay=0.1),
    "masked": optax.chain(
        optax.masked(
            optax.adam(0.1),
            lambda params: jax.tree.map(lambda x: jnp.ndim(x) == 2, params),
        ),
        optax.trace(0.9),
    ),
    "partition": optax.partition(
        {"a": gsm_sgd(0.1, 0.5), "b": optax.adam(0.1)},
        lambda params: jax.tree.map(lambda x: "a" if jnp.ndim(x) == 2 else "b", params),
    ),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "gsm": gsm_sgd(0.1, 0.5, momentum=0.9, weight_decay=0.1, track_churn=True),
    "gsm, a tree of bools": gsm_sgd(
        0.1,
        ratio=0.5,
        prunable={n: {"kernel": True, "bias": False} for n in SHAPES},
    ),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
}
TABLE = [0, 0, 1, 2, 2, 1, 3, 0, 0]


def run(tx, steps, params=None, state=None):
    """Parameters and state after every step, in one compiled program."""
    params = draw(0) if params is None else params
    state = tx.init(params) if state is None else state
    update, history = jax.jit(tx.update), []
    for step in steps:
        updates, state = update(draw(100 + step), state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state, updates))
    assert update._cache_size() == 1
    return history


def per_parameter(tx, state, name):
    """What the state holds for the parameters of one block."""
    kept = []
    optax.tree_map_params(
        tx,
        lambda x, flag: kept.append(x) if flag else None,
        state,
        {n: {"kernel": n == name, "bias": n == name} for n in SHAPES},
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    return [x for x in kept if not isinstance(x, optax.MaskedNode)]


@pytest.mark.optimize(True)
@pytest.mark.promotes
@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_frozen_blocks_do_not_move_bit_for_bit(tx):
    frozen = freeze_blocks(tx, given_by(TABLE), BLOCKS)
    before, before_state = draw(0), frozen.init(draw(0))
    for num_frozen, step in zip(TABLE, run(frozen, range(len(TABLE))), strict=True):
        params, state, updates = step
        for i, name in enumerate(BLOCKS):
            held = per_parameter(tx, state.inner_state, name)
            was = per_parameter(tx, before_state.inner_state, name)
            assert held
            if i < num_frozen:
                assert_same(params[name], before[name])
                assert_same(held, was)
                assert_same(updates[name], jax.tree.map(jnp.zeros_like, updates[name]))
            else:
                assert jnp.any(params[name]["kernel"] != before[name]["kernel"])
        before, before_state = params, state
    assert state.step == len(TABLE)


@pytest.mark.optimize(True)
@pytest.mark.promotes
@pytest.mark.parametrize("name", ["sgd", "adamw", "gsm", "injected"])
def test_without_a_frozen_block_it_is_the_optimizer_itself(name):
    tx = OPTIMIZERS[name]
    wrapped = run(freeze_blocks(tx, given_by([0] * 5), BLOCKS), range(5))
    for (params, state, updates), plain in zip(wrapped, run(tx, range(5)), strict=True):
        assert_same((params, state.inner_state, updates), plain)


@pytest.mark.promotes
@pytest.mark.parametrize("name", ["sgd", "adamw", "gsm"])
def test_the_rest_trains_as_though_the_frozen_blocks_were_not_there(name):
    """The optimizer alone on the smaller tree; and clipping sees no frozen gradient."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS[name])
    frozen = run(freeze_blocks(tx, given_by([1] * 5), BLOCKS), range(5))
    rest = {n: x for n, x in draw(0).items() if n != "first"}
    state, update = tx.init(rest), jax.jit(tx.update)
    for step, (params, wrapped, _) in enumerate(frozen):
        grads = {n: x for n, x in draw(100 + step).items() if n != "first"}
        updates, state = update(grads, state, rest)
        rest = optax.apply_updates(rest, updates)
        for n in rest:
            for key in rest[n]:
                np.testing.assert_allclose(params[n][key], rest[n][key], rtol=1e-5)
        if name == "gsm":
            for key in ("num_active", "churn"):
                got = optax.tree.get(wrapped, key)
                assert got == optax.tree.get(state, key)


@pytest.mark.promotes
def test_momentum_after_thawing_is_that_of_the_freezing_step_and_counters_go_on():
    frozen = freeze_blocks(optax.adam(0.1), given_by([0, 1, 1, 0]), BLOCKS)
    history = run(frozen, range(4))
    mu = [optax.tree.get(state, "mu")["first"]["kernel"] for _, state, _ in history]
    grad = draw(103)["first"]["kernel"]
    np.testing.assert_allclose(mu[3], 0.9 * mu[0] + 0.1 * grad, rtol=1e-4, atol=1e-6)
    assert optax.tree.get(history[-1][1], "count") == 4


def test_a_nan_in_a_frozen_block_is_neither_seen_nor_counted():
    tx = freeze_blocks(gsm_sgd(0.1, 0.5), given_by([1]), BLOCKS)
    params, grads = draw(0), draw(1)
    update, state = jax.jit(tx.update), tx.init(params)
    wanted = update(grads, state, params)
    grads["first"] = jax.tree.map(lambda x: x * jnp.nan, grads["first"])
    assert_same(update(grads, state, params), wanted)


# The selection among blocks that train


def chosen(tx, grads, params, trainable):
    updates, state = first_step(tx, grads, params, trainable=trainable)
    return updates, int(state.num_active)


def leaves_of(values):
    arrays = [jnp.asarray(v, jnp.float32).reshape(1, -1) for v in values]
    return arrays, [jnp.ones_like(a) for a in arrays]


levels = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0, math.nan])


@pytest.mark.filterwarnings("ignore:prunable parameters are all zeros")
@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.lists(levels, min_size=3, max_size=3), min_size=3, max_size=3),
    parts=st.lists(st.booleans(), min_size=3, max_size=3),
    ratio=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_choice_is_the_definition_over_the_leaves_that_take_part(values, parts, ratio):
    params, ones = leaves_of(values)
    grads, num_active = chosen(
        _masking(ratio), ones, params, [jnp.asarray(part) for part in parts]
    )
    among = [np.abs(p) for p, part in zip(params, parts, strict=True) if part]
    total = sum(x.size for x in among)
    masks = iter(active(among, budget(ratio, total)) if among else [])
    wanted = [next(masks) if part else np.zeros((1, 3), bool) for part in parts]
    np.testing.assert_array_equal(np.stack(grads), np.stack(wanted))
    # Fewer than Q are positive: then the state says so too.
    assert num_active == sum(mask.sum() for mask in wanted)


def _masking(ratio, cache={}):  # noqa: B006  one compilation a ratio
    return cache.setdefault(ratio, mask_by_importance(ratio, prunable=True))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1 - 2**-3, 1e-300, 1 / 3, 0.1 + 2**-50])
def test_budget_is_exact_for_any_static_ratio(ratio):
    """Halves are rounded to even, and nothing is rounded on the way."""
    totals = [4, 6, 10, 613, 70_002]  # of the first leaves
    params = [x[None] for x in jnp.split(jnp.arange(1.0, 70_009), totals)]
    ones = jax.tree.map(jnp.ones_like, params)
    tx = _masking(ratio)
    for i, total in enumerate(totals):
        part = [jnp.asarray(j <= i) for j in range(len(params))]
        grads, num_active = chosen(tx, ones, params, part)
        kept = budget(ratio, total)
        assert num_active == kept
        for p, g in zip(params, grads, strict=True):
            np.testing.assert_array_equal(g, (total - kept < p) & (p <= total))


def test_importance_of_a_frozen_leaf_is_not_asked():
    """An importance that does not need the gradient would choose frozen entries."""
    tx = freeze_blocks(gsm(0.5, importance=magnitude_importance), given_by([1]), BLOCKS)
    params = draw(0)
    params["first"]["kernel"] *= 1000
    _, state = first_step(tx, draw(1), params)
    assert optax.tree.get(state, "num_active") == budget(0.5, 9 * 8 + 8 * 4)


def test_a_traced_ratio_is_of_the_entries_that_train():
    tx = freeze_blocks(gsm(lambda step: 0.75), given_by([0, 1, 2, 3]), BLOCKS)
    sizes = np.array([12 * 9, 9 * 8, 8 * 4, 0])
    counts = [
        int(optax.tree.get(state, "num_active")) for _, state, _ in run(tx, range(4))
    ]
    assert counts == [budget(0.75, int(sizes[k:].sum())) for k in range(4)]


def test_bfloat16_keeps_its_dtype():
    params, grads = draw(0, jnp.bfloat16), draw(1, jnp.bfloat16)
    tx = freeze_blocks(gsm_sgd(0.125, 0.5), given_by([1, 2]), BLOCKS)
    updates, state = first_step(tx, grads, params)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    scores = [
        np.abs(np.float32(params[n]["kernel"]) * np.float32(grads[n]["kernel"]))
        for n in BLOCKS[1:]
    ]
    wanted = sum(m.sum() for m in active(scores, budget(0.5, 9 * 8 + 8 * 4)))
    assert optax.tree.get(state, "num_active") == wanted


ALIKE = dict.fromkeys("abc", (8, 16))


@pytest.mark.optimize(True)
@pytest.mark.parametrize("mode", ["auto, set_mesh", "explicit"])
def test_shards_choose_as_one_device_does(mode):
    tx = freeze_blocks(
        gsm_sgd(2**-3, 0.75, momentum=0.5, weight_decay=2**-7),
        given_by([1]),
        ["a", "b", "c"],
    )
    alone, grads = normal(ALIKE, 0), normal(ALIKE, 1)
    expected = first_step(tx, grads, alone)
    layout = {"a": P("x", "y"), "b": P("y", "x"), "c": P(None, "x")}
    with mesh_of(mode) as mesh:
        params, grads = (place(tree, mesh, layout) for tree in (alone, grads))
        state = place_scalars(tx.init(params), mesh)
        assert_same(jax.jit(tx.update)(grads, state, params), expected)


@pytest.mark.optimize(True)
def test_inside_shard_map_the_named_axes_are_counted_over():
    make = lambda **options: freeze_blocks(
        mask_by_importance(0.75, **options), given_by([1]), ["a", "b", "c"]
    )
    params, grads = normal(ALIKE, 0), normal(ALIKE, 1)
    expected, state = first_step(make(), grads, params)
    layout = {"a": P("x"), "b": P(None, "x"), "c": P()}
    tx = make(axis_name="x")

    def update(grads, params):
        updates, state = tx.update(grads, tx.init(params), params)
        return updates, optax.tree.get(state, "num_active")

    with mesh_of("auto", (4,), ("x",)) as mesh:
        split = jax.shard_map(
            update, mesh=mesh, in_specs=(layout, layout), out_specs=(layout, P())
        )
    updates, num_active = jax.jit(split)(grads, params)
    assert_same(updates, expected)
    assert num_active == optax.tree.get(state, "num_active")


@pytest.mark.promotes
def test_leaves_that_optax_masks_out_are_left_out():
    """`optax.masked` does not mask extra arguments unless it is told to."""
    tx = freeze_blocks(
        optax.masked(
            mask_by_importance(0.5),
            {"first": True, "middle": False, "last": True},
        ),
        given_by([1]),
        BLOCKS,
    )
    grads = draw(1)
    updates, state = first_step(tx, grads, draw(0))
    assert optax.tree.get(state, "num_active") == 8 * 4 // 2
    assert_same(updates["middle"], grads["middle"])


def test_trainable_must_fit():
    params = draw(0)
    tx = mask_by_importance(0.5)
    with pytest.raises(ValueError, match="trainable must be a tree like the gradients"):
        tx.update(params, tx.init(params), params, trainable={"first": True})


# Blocks and frameworks


def by_number(path):
    return BLOCKS.index(path.split("/")[0])


def test_a_callable_and_prefixes_say_the_same():
    for prefixes in (BLOCKS, tuple(BLOCKS), [*BLOCKS[:2], "last/kernel", "last/bias"]):
        a = freeze_blocks(optax.sgd(0.1), given_by([2]), prefixes)
        b = freeze_blocks(optax.sgd(0.1), given_by([2]), by_number)
        assert_same(*(first_step(tx, draw(1), draw(0))[0] for tx in (a, b)))


def test_prefixes_are_whole_names_and_the_longest_counts():
    params = {"dense": jnp.ones(2), "dense2": {"a": jnp.ones(2), "b": jnp.ones(2)}}
    tx = freeze_blocks(optax.sgd(1.0), given_by([1]), ["dense2/a", "dense", "dense2"])
    updates, _ = tx.update(params, tx.init(params), params)
    moved = jax.tree.map(lambda u: bool(u.any()), updates)
    assert moved == {"dense": True, "dense2": {"a": False, "b": True}}


def test_a_field_called_value_is_frozen_by_its_name():
    class Attention(NamedTuple):
        query: jax.Array
        value: jax.Array

    params = {"attn": Attention(jnp.ones(2), jnp.ones(2)), "head": jnp.ones(2)}
    blocks = ["attn/value", "attn/query", "head"]
    tx = freeze_blocks(optax.sgd(1.0), given_by([1]), blocks)
    updates, _ = tx.update(params, tx.init(params), params)
    moved = jax.tree.map(lambda u: bool(u.any()), updates)
    assert moved == {"attn": Attention(query=True, value=False), "head": True}


@pytest.mark.parametrize(
    ("block_of", "message"),
    [
        (["first", "last"], "without a block: middle/bias, middle/kernel"),
        ([*BLOCKS, "head"], "names 'head', which no parameter is in. .*last/kernel"),
        ("first", "block_of='first' must be different path prefixes"),
        (["first", "first", "middle"], "must be different"),
        ([], "must be different path prefixes"),
        (lambda path: None, "without a block: first/bias, .*last/kernel"),
        (lambda path: -1, "without a block"),
        (lambda path: 0.5, "without a block"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(block_of, message):
    with pytest.raises(ValueError, match=message):
        freeze_blocks(optax.sgd(0.1), single_shot(0, 1, 1), block_of).init(draw(0))
    with pytest.raises(ValueError, match=message):
        stop_frozen_gradients(draw(0), 1, block_of)


@pytest.mark.optimize(True)
def test_nested_it_freezes_what_either_freezes():
    early, late = given_by([0, 2, 0, 1, 3, 0]), given_by([0, 1, 1, 2, 0, 0])
    inner = gsm_sgd(0.1, ratio=0.7, momentum=0.9, weight_decay=1e-2)
    both = given_by([0, 2, 1, 2, 3, 0])
    nested = freeze_blocks(freeze_blocks(inner, early, BLOCKS), late, BLOCKS)
    single = freeze_blocks(inner, both, BLOCKS)
    for got, expected in zip(run(nested, range(6)), run(single, range(6)), strict=True):
        assert_same(got[0], expected[0])


@pytest.mark.parametrize("subtree", [True, False])
def test_nested_with_a_part_masked_out_between(subtree):
    part = {"first": True, "middle": True, "last": False}
    if not subtree:
        part = {name: {"kernel": flag, "bias": flag} for name, flag in part.items()}
    inner = optax.masked(freeze_blocks(gsm_sgd(0.1, 0.5), lambda _: 1, BLOCKS), part)
    tx = freeze_blocks(inner, given_by([0, 2]), BLOCKS)
    with pytest.raises(ValueError, match="names 'last', which no parameter is in"):
        tx.init(draw(0))
    inner = freeze_blocks(gsm_sgd(0.1, 0.5), lambda step: 1 + 0 * step, BLOCKS[:2])
    tx = freeze_blocks(optax.masked(inner, part), given_by([0, 2]), BLOCKS)
    (one, *_), (two, _, updates) = run(tx, range(2))
    assert_same(one["first"], draw(0)["first"])  # by the inner one
    assert (one["middle"]["kernel"] != draw(0)["middle"]["kernel"]).any()
    assert_same(two["middle"], one["middle"])  # by the outer one
    assert (updates["last"]["kernel"] != 0).all()  # not masked, not frozen


@pytest.mark.parametrize("inner", [optax.flatten(optax.adam(0.1)), optax.sm3(0.1)])
def test_state_that_is_of_no_single_parameter_is_refused(inner):
    tx = freeze_blocks(inner, given_by([0]), BLOCKS)
    with pytest.raises(ValueError, match="cannot tell which part of the state"):
        tx.init(draw(0))


def test_churn_is_counted_among_what_trains():
    table, ratio = [0, 0, 1, 1, 3, 0], 0.5
    watched = mask_by_importance(ratio, track_churn=True)
    tx = freeze_blocks(watched, given_by(table), BLOCKS)
    state, params, update = tx.init(draw(0)), draw(0), jax.jit(tx.update)
    before = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    for step, num_frozen in enumerate(table):
        grads = draw(100 + step)
        _, state = update(grads, state, params)
        names = BLOCKS[num_frozen:]
        scores = [np.abs(params[n]["kernel"] * grads[n]["kernel"]) for n in names]
        now = dict(before)
        if names:
            flat = np.concatenate([score.ravel() for score in scores])
            kept = flat.size - round(ratio * flat.size)
            least = np.sort(flat)[-kept]
            now |= {n: score >= least for n, score in zip(names, scores, strict=True)}
        changed = sum(int((now[n] != before[n]).sum()) for n in SHAPES)
        assert int(optax.tree.get(state, "churn")) == changed, step
        before = now


def test_leaves_without_a_gradient_may_be_all():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    grads = {"kernel": None, "bias": jnp.ones(2)}
    tx = mask_by_importance(0.5)
    flags = {"kernel": None, "bias": True}
    updates, state = tx.update(grads, tx.init(params), params, trainable=flags)
    assert_same(updates, grads)
    assert int(state.num_active) == 0


@pytest.mark.parametrize("inner", [gsm_sgd(0.1, 0.5), optax.sgd(0.1, momentum=0.9)])
def test_parameters_without_a_gradient_pass(inner):
    params = {"first": jnp.eye(3), "last": jnp.eye(3)}
    tx = freeze_blocks(inner, given_by([1, 0]), ["first", "last"])
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        grads = {"first": jnp.ones((3, 3)), "last": None}
        updates, state = update(grads, state, params)
        assert updates["last"] is None
    assert updates["first"].any()


def test_a_number_is_no_schedule():
    with pytest.raises(ValueError, match="schedule=2 must be a function"):
        freeze_blocks(optax.sgd(0.1), 2, BLOCKS)


def test_nnx_models_are_frozen_by_attribute():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs)
    )
    tx = freeze_blocks(gsm_sgd(0.1, 0.5), given_by([0, 1]), ["layers/0", "layers/2"])
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.sum(model(jnp.ones((5, 3))) ** 2)
        optimizer.update(model, nnx.grad(loss)(model))

    seen = [jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))]
    for _ in range(2):
        step(model, optimizer)
        seen.append(jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model))))
    start, once, twice = (tree["layers"] for tree in seen)
    assert jnp.any(once[0]["kernel"] != start[0]["kernel"])
    assert_same(twice[0], once[0])
    assert jnp.any(twice[2]["kernel"] != once[2]["kernel"])


class Boxed(linen.Module):
    @linen.compact
    def __call__(self, x):
        init = linen.with_partitioning(linen.initializers.ones, ("in", "out"))
        x = linen.Dense(4, name="first", kernel_init=init)(x)
        return linen.Dense(2, name="last", kernel_init=init)(x)


def linen_params():
    return Boxed().init(jax.random.key(0), jnp.ones((1, 3)))["params"]


def equinox_params():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    return eqx.filter(model, eqx.is_inexact_array)


@pytest.mark.parametrize(
    ("params", "blocks"),
    [
        (linen_params, ["first", "last"]),
        (equinox_params, ["layers/0", "layers/1"]),
    ],
)
def test_linen_boxes_and_equinox_modules(params, blocks):
    params = params()
    tx = freeze_blocks(gsm_sgd(0.1, 0.5), given_by([1]), blocks)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, state = first_step(tx, ones, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert optax.tree.get(state, "num_active") >= 4
    stopped = stop_frozen_gradients(params, 1, blocks)
    assert_same(stopped, params)
    loss = lambda p: sum(
        jnp.sum(x) for x in jax.tree.leaves(stop_frozen_gradients(p, 1, blocks))
    )
    grads = [bool(g.any()) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params))]
    moved = [bool(u.any()) for u in jax.tree.leaves(updates)]
    assert grads == moved == [False, False, True, True]
