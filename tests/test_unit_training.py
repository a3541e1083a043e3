"""Whole units are active or passive: the choice, training by it, floors, pruning."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from test_units import ZOO
from trees import assert_same, first_step, mesh_of, normal, place_scalars

from gsm_optax import (
    decay_budget,
    gsm_sgd,
    magnitude_mask,
    mask_by_importance,
    metrics,
    prune,
    sparsity_report,
    tempered_importance,
)
from gsm_optax.freezing import freeze_blocks
from gsm_optax.units import find_units, shrink

pytestmark = pytest.mark.optimize(False)

SHAPES = {
    "conv": (3, 3, 1, 4),
    "conv_bias": (1, 1, 1, 4),
    "dense": (64, 8),  # 16 rows a channel
    "dense_bias": (1, 8),
    "square": (8, 8),  # both axes of one family
    "head": (24, 3),  # 8 rows in units, 16 in none
    "head_bias": (1, 3),  # in none
}


def network(params, images):
    """A convolution, flattened; a residual layer; the images beside its output."""
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        images, params["conv"], (1, 1), "SAME", dimension_numbers=layout
    )
    x = jax.nn.relu(x + params["conv_bias"]).reshape(len(images), -1)
    x = jax.nn.relu(x @ params["dense"] + params["dense_bias"])
    x = x + jax.nn.relu(x @ params["square"])
    x = jnp.concatenate([x, images.reshape(len(images), -1)], 1)
    return x @ params["head"] + params["head_bias"]


draw = partial(normal, SHAPES)
UNITS = find_units(network, draw(), jnp.ones((2, 4, 4, 1)))
HELD = oracle.members(UNITS)
IN_UNITS = [np.any(m, 0) for m in zip(*(u for f in HELD for u in f), strict=True)]
TOTAL = 36 + 4 + 64 * 8 + 8 + 64 + 24  # entries in units


def products(params, grads):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True)
    return [oracle.importance(w, g) for w, g in pairs]


def chosen(params, grads, ratio, **floors):
    means = oracle.unit_scores(HELD, products(params, grads))
    kept = oracle.budget(ratio, TOTAL)
    return oracle.active_by_unit(HELD, means, kept, **floors)


def with_masks(tree, masks):
    """The tree, with zeros outside the masks."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, masks, strict=True)
    return jax.tree.unflatten(
        treedef, [np.where(m, x, np.float32(0)) for x, m in pairs]
    )


# The choice


@pytest.mark.optimize(True)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_choice_is_that_of_the_definition(ratio):
    tx = jax.jit(mask_by_importance(ratio, units=UNITS).update)
    state = mask_by_importance(ratio, units=UNITS).init(draw())
    for seed in range(3):
        params, grads = draw(seed), draw(seed + 10)
        updates, state = tx(grads, state, params)
        masks = chosen(params, grads, ratio)
        assert_same(updates, with_masks(grads, masks))
        number = sum((m & u).sum() for m, u in zip(masks, IN_UNITS, strict=True))
        assert state.num_active == number
        assert state.num_kept == oracle.budget(ratio, TOTAL) >= number


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e18])
def test_means_are_those_of_float64_at_any_scale(scale):
    """Scores of a unit may lie decades apart, and units too."""
    spread = jax.tree.map(lambda x: jnp.sign(x) * jnp.exp(4 * x) * scale, draw(3))
    tx = mask_by_importance(0.5, units=UNITS, smoothing=0.5)
    _, state = first_step(tx, draw(4), spread)
    means = oracle.unit_scores(HELD, products(spread, draw(4)))
    for got, want in zip(state.average, means, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_nan_shows_and_dead_units_are_passive():
    params, grads = draw(0), draw(1)
    grads["conv"] = grads["conv"].at[0, 0, 0, 2].set(jnp.nan)
    grads["dense"] = grads["dense"].at[:, 5].set(0)
    grads["dense_bias"] = grads["dense_bias"].at[:, 5].set(0)
    for name, rows in {"square": np.s_[5], "head": np.s_[5]}.items():
        grads[name] = grads[name].at[rows].set(0)
    grads["square"] = grads["square"].at[:, 5].set(0)
    for ratio in (0.01, 0.9):
        updates, state = first_step(
            mask_by_importance(ratio, units=UNITS), grads, params
        )
        assert jnp.isnan(updates["conv"][0, 0, 0, 2])
        assert (updates["conv"][..., 2] != 0).all()
        assert not updates["dense"][:, 5].any()
        assert jnp.isfinite(state.threshold)


def test_a_family_of_greater_scores_does_not_keep_all_of_its_units():
    params, grads = draw(0), draw(1)
    grads = {name: g * (1e4 if name == "conv" else 1) for name, g in grads.items()}
    updates, _ = first_step(mask_by_importance(0.5, units=UNITS), grads, params)
    assert 0 < jnp.count_nonzero(updates["conv_bias"]) < 4
    params["conv"] *= 1e4
    kept = magnitude_mask(params, 0.5, units=UNITS)["conv_bias"]
    assert 0 < jnp.count_nonzero(kept) < 4


def test_units_that_tie_go_together():
    """All units of a family do here, and as a whole these do not fit."""
    params = jax.tree.map(jnp.ones_like, draw())
    for floor in (0, 1):
        tx = mask_by_importance(0.95, units=UNITS, min_units=floor)
        updates, state = first_step(tx, params, params)
        kinds = {name: len(np.unique(updates[name])) for name in SHAPES}
        assert kinds.pop("head") == 1 + (not floor)  # 16 rows of it are in no unit
        assert set(kinds.values()) == {1}
        assert state.num_active == (TOTAL if floor else 0)


# Training


@pytest.mark.parametrize("passive", [None, 0.25])
def test_training_is_the_equation_with_one_mask_a_unit(passive):
    """Biases of units decay, what is in no unit gets its gradient."""
    kwargs = {"momentum": 0.5, "weight_decay": 2.0**-4, "passive_decay": passive}
    tx = gsm_sgd(2.0**-3, 0.5, units=UNITS, **kwargs)
    update = jax.jit(tx.update)
    params, state = draw(0), tx.init(draw(0))
    weights = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
    momenta = [0 * w for w in weights]
    decays = [name != "head_bias" for name in sorted(SHAPES)]
    for seed in range(1, 6):
        grads = draw(seed)
        masks = chosen(params, grads, 0.5)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for i, (g, b) in enumerate(zip(jax.tree.leaves(grads), masks, strict=True)):
            eta = np.where(b, 2.0**-4, 2.0**-4 if passive is None else passive)
            push = eta * weights[i] * decays[i] + np.where(b, g, 0)
            momenta[i] = 0.5 * momenta[i] + push
            weights[i] = weights[i] - 2.0**-3 * momenta[i]
        for got, want in zip(jax.tree.leaves(params), weights, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_averages_are_those_of_the_units():
    tx = mask_by_importance(0.5, units=UNITS, smoothing=0.75)
    update, state = jax.jit(tx.update), tx.init(draw(0))
    past = []
    for seed in range(4):
        params, grads = draw(seed), draw(seed + 10)
        updates, state = update(grads, state, params)
        past.append(oracle.unit_scores(HELD, products(params, grads)))
        want = [
            oracle.averages(scores, np.ones_like(scores), 0.75)[-1]
            for scores in zip(*past, strict=True)
        ]
        for got, mean in zip(state.average, want, strict=True):
            np.testing.assert_allclose(got, mean, rtol=1e-5)
        masks = oracle.active_by_unit(HELD, want, oracle.budget(0.5, TOTAL))
        assert_same(updates, with_masks(grads, masks))


def train(ratio, steps=300, **kwargs):
    """Fit random labels; return parameters, the loss, and its function."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(32, 4, 4, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 3, 32))

    def loss(params):
        logits = network(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    settings = {"momentum": 0.9, "weight_decay": 1e-3, "passive_decay": 0.1}
    tx = gsm_sgd(0.05, ratio, units=UNITS, **settings, **kwargs)
    assert decay_budget(0.05, steps, **settings).total > 10

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda x: x / 4, draw(0))
    state = tx.init(params)
    for _ in range(steps):  # in a scan convolutions are slow on a CPU
        params, state = step(params, state)
    return params, state, loss, images


def test_after_training_units_go_without_loss_and_the_network_is_smaller():
    params, state, loss, images = train(
        0.6, smoothing=0.9, importance=tempered_importance(0.5)
    )
    pruned = prune(params, 0.6, units=UNITS)
    assert loss(pruned) == pytest.approx(float(loss(params)), abs=1e-5)
    assert loss(params) < 0.5 < 0.9 < loss(prune(draw(0), 0.6, units=UNITS))
    small, _ = shrink(pruned, UNITS)
    np.testing.assert_allclose(
        network(small, images), network(pruned, images), atol=1e-5
    )
    numbers = metrics(params, state)
    assert numbers["gsm/num_active"] <= oracle.budget(0.6, TOTAL)
    entries = sum(x.size for x in jax.tree.leaves(small))
    assert entries <= 0.55 * sum(x.size for x in jax.tree.leaves(params))


def test_frozen_leaves_have_no_say_and_do_not_move():
    """N counts the entries of the others; the mean of a unit is over those."""
    frozen = {"conv", "conv_bias", "square"}
    trainable = {name: name not in frozen for name in SHAPES}
    params, grads = draw(0), draw(1)
    own = [name not in frozen for name in sorted(SHAPES)]
    part = lambda masks: [m & x for m, x in zip(masks, own, strict=True)]
    held = [list(map(part, family)) for family in HELD]
    means = oracle.unit_scores(held, products(params, grads))
    kept = oracle.budget(0.5, TOTAL - 36 - 4 - 64)
    masks = oracle.active_by_unit(held, means, kept)
    masks = part(masks)
    tx = mask_by_importance(0.5, units=UNITS)
    updates, state = first_step(tx, grads, params, trainable=trainable)
    assert_same(updates, with_masks(grads, masks))
    assert state.num_kept == kept
    tx = freeze_blocks(
        gsm_sgd(0.1, 0.5, units=UNITS),
        lambda step: step + 1,
        lambda path: 0 if path.startswith("conv") else 1,
    )
    updates, _ = first_step(tx, grads, params)
    assert not updates["conv"].any()
    assert not updates["conv_bias"].any()
    assert updates["dense"].any()


# Devices


LAYOUT = {
    "conv": P(None, None, None, "y"),
    "dense": P("x", "y"),
    "square": P("y", "x"),
    "head": P("x"),
}


def put_on(mesh, tree):
    return {
        name: jax.device_put(x, NamedSharding(mesh, LAYOUT.get(name, P())))
        for name, x in tree.items()
    }


@pytest.mark.optimize(True)
@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_any_mesh_chooses_as_one_device(mode):
    tx = gsm_sgd(
        2.0**-3,
        0.5,
        momentum=0.5,
        weight_decay=2.0**-7,
        units=UNITS,
        smoothing=0.5,
        track_churn=True,
    )

    def run(params, state, put=lambda tree: tree):
        step, history = jax.jit(tx.update), []
        for seed in range(1, 4):
            updates, state = step(put(draw(seed)), state, params)
            params = jax.tree.map(jnp.add, params, updates)
            history.append((params, state, updates))
        return history

    wanted = run(draw(0), tx.init(draw(0)))
    with mesh_of(mode) as mesh:
        put = partial(put_on, mesh)
        params = put(draw(0))
        state = place_scalars(tx.init(params), mesh)
        for got, want in zip(run(params, state, put), wanted, strict=True):
            assert_same(got, want)
            assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_pruning_equals_one_device_and_keeps_its_sharding(mode):
    with mesh_of(mode) as mesh:
        params = put_on(mesh, draw(0))
        mask = magnitude_mask(params, 0.5, units=UNITS)
    assert_same(mask, magnitude_mask(draw(0), 0.5, units=UNITS))
    for name, leaf in mask.items():
        assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim), name


@pytest.mark.optimize(True)
def test_copies_in_shard_map_choose_as_one_device():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = mask_by_importance(0.5, units=UNITS, axis_name=())
    update = jax.shard_map(
        lambda grads, params: tx.update(grads, tx.init(params), params)[0],
        mesh=mesh,
        in_specs=(P(), P()),
        out_specs=P(),
    )
    plain, _ = first_step(tx, draw(1), draw(0))
    assert_same(jax.jit(update)(draw(1), draw(0)), plain)


# Floors


@pytest.mark.parametrize("number", [0, 2])
def test_so_many_units_of_every_family_stay(number):
    params, grads = draw(0), draw(1)
    grads["conv"] = grads["conv"] * 1e-6
    grads["conv_bias"] = grads["conv_bias"] * 1e-6
    grads["dense"] = grads["dense"] * 1e-6
    tx = mask_by_importance(0.8, units=UNITS, min_units=number)
    updates, _ = first_step(tx, grads, params)
    masks = chosen(params, grads, 0.8, min_units=number)
    assert_same(updates, with_masks(grads, masks))
    assert (updates["conv_bias"] != 0).sum() >= number  # and these are least important
    mask = magnitude_mask(params, 0.5, units=UNITS, min_units=number)
    assert mask["conv_bias"].sum() >= number


@pytest.mark.parametrize("number", [1, 5])
def test_so_many_entries_of_every_leaf_stay(number):
    shapes = {"a": (6, 5), "b": (4, 4), "c": (2, 2)}
    params, grads = normal(shapes, 0), normal(shapes, 1)
    grads["b"], grads["c"] = grads["b"] * 1e-6, grads["c"].at[0, 0].set(0) * 1e-6
    tx = mask_by_importance(0.7, min_kept=number)
    updates, state = first_step(tx, grads, params)
    scores = products(params, grads)
    first = [np.sort(t.ravel())[::-1][:number][-1] for t in scores]
    raised = [
        np.where((t >= least) & (t > 0), np.inf, t)
        for t, least in zip(scores, first, strict=True)
    ]
    masks = oracle.active(raised, oracle.budget(0.7, 50))
    assert_same(updates, with_masks(grads, masks))
    assert state.num_active == sum(m.sum() for m in masks)
    assert [int((u != 0).sum()) for u in (updates["b"], updates["c"])] == [
        number,
        min(number, 3),  # a score of zero is never active
    ]
    kept = magnitude_mask(
        jax.tree.map(jnp.multiply, params, grads), 0.7, min_kept=number
    )
    assert_same(kept, jax.tree.unflatten(jax.tree.structure(params), masks))


# Pruning


@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_units_are_pruned_by_their_mean_magnitude(ratio):
    params = draw(5)
    magnitudes = [np.abs(x) for x in jax.tree.leaves(params)]
    means = oracle.unit_scores(HELD, magnitudes)
    masks = oracle.active_by_unit(HELD, means, oracle.budget(ratio, TOTAL))
    mask = magnitude_mask(params, ratio, units=UNITS)
    assert_same(mask, jax.tree.unflatten(jax.tree.structure(params), masks))
    assert_same(prune(params, ratio, units=UNITS), with_masks(params, masks))


def test_running_statistics_are_no_magnitude():
    """Of what is dead they lag behind, and would keep it."""
    rng, dead = np.random.default_rng(0), np.arange(8) < 4
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"in": draw(4, 8), "scale": draw(1, 8), "out": draw(8, 3)}
    stats = {"mean": np.zeros((1, 8), np.float32), "var": np.ones((1, 8), np.float32)}

    def fn(variables, x):
        params, stats = variables["params"], variables["stats"]
        x = (x @ params["in"] - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-3)
        return jax.nn.relu(x * params["scale"]) @ params["out"]

    variables = {"params": params, "stats": stats}
    units = find_units(fn, variables, draw(5, 4))
    for name, axis in (("in", 1), ("scale", 1), ("out", 0)):
        params[name][(slice(None),) * axis + (dead,)] = 0
    stats["var"][:, dead] = 20
    assert_same(prune(variables, 0.5, units=units), variables)
    assert_same(prune(params, 0.5, units=units), params)


def test_heads_called_mean_and_var_are_pruned_like_others():
    fn = lambda p, x: [jax.nn.sigmoid(x @ p["in"]) @ p[k] for k in ("mean", "var")]
    params = normal({"in": (4, 8), "mean": (8, 2), "var": (8, 2)}, 0)
    units = find_units(fn, params, jnp.ones((5, 4)))
    pruned = prune(params, 0.5, units=units)
    assert jnp.count_nonzero(pruned["mean"].any(1)) == 4
    assert_same(pruned["mean"] == 0, pruned["var"] == 0)


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("build", [x for x, _ in ZOO], ids=lambda x: x.__name__)
def test_networks_of_every_kind(build):
    """Chosen and pruned by the definition, and then smaller: shrink compares."""
    fn, params, inputs, *_ = build()
    units = find_units(fn, params, *inputs)
    held = oracle.members(units)
    rows = sparsity_report(params).leaves
    is_statistic = [row.path.endswith(("/mean", "/var")) for row in rows]
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)
    for power, scores in (
        (0.0, [np.abs(x) for x in jax.tree.leaves(params)]),
        (1.0, products(params, grads)),
        (None, [np.abs(x) for x in jax.tree.leaves(params)]),
    ):
        if power is None:  # prune, which leaves statistics out
            held = [
                [
                    [m & (not i) for m, i in zip(unit, is_statistic, strict=True)]
                    for unit in family
                ]
                for family in held
            ]
        total = sum(
            np.any(m, 0).sum() for m in zip(*(u for f in held for u in f), strict=True)
        )
        means = oracle.unit_scores(held, scores)
        masks = oracle.active_by_unit(held, means, oracle.budget(0.5, total))
        if power is None:
            break
        importance = tempered_importance(power)
        tx = mask_by_importance(0.5, units=units, importance=importance)
        updates, _ = first_step(tx, grads, params)
        wanted = with_masks(grads, masks)
        for a, b in zip(*map(jax.tree.leaves, (updates, wanted)), strict=True):
            np.testing.assert_array_equal(a, b)
    pruned = prune(params, 0.5, units=units)
    for a, b in zip(
        *map(jax.tree.leaves, (pruned, with_masks(params, masks))), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    small, _ = shrink(pruned, units)
    entries = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert entries(small) < entries(params)


# Trees and errors


def test_a_part_of_the_variables_is_enough():
    """As one collection of a linen module, or nnx's parameters without statistics."""
    everything = {"params": draw(0), "stats": {"mean": jnp.zeros((1, 8))}}

    def fn(variables, images):
        own = variables["params"]
        mean = variables["stats"]["mean"]
        return network(own | {"dense_bias": own["dense_bias"] - mean}, images)

    units = find_units(fn, everything, jnp.ones((2, 4, 4, 1)))
    part = mask_by_importance(0.5, units=units)
    updates, _ = first_step(part, draw(1), draw(0))
    plain, _ = first_step(mask_by_importance(0.5, units=UNITS), draw(1), draw(0))
    assert_same(updates, plain)
    assert_same(
        magnitude_mask(draw(0), 0.5, units=units),
        magnitude_mask(draw(0), 0.5, units=UNITS),
    )


def test_a_part_whose_names_are_found_twice_is_refused_or_told_by_its_holes():
    """As `Dense_0` is in flax, at the top and in every submodule."""
    inner, outer = (
        {f"Dense_{i}": {"kernel": k} for i, k in enumerate(kernels)} for kernels in TWO
    )
    params, x = {"Encoder_0": inner, **outer}, jnp.ones((2, 4))

    def fn(params, x, names=("Dense_0", "Dense_1")):
        for name in names:
            x = jnp.tanh(x @ params["Encoder_0"][name]["kernel"])
        for name in ("Dense_0", "Dense_1"):
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    units = find_units(fn, params, x)
    for part in (inner, outer):
        with pytest.raises(ValueError, match="which of these"):
            mask_by_importance(0.5, units=units).init(part)
        with pytest.raises(ValueError, match="which of these"):
            magnitude_mask(part, 0.5, units=units)
    renamed = {"a": inner["Dense_0"], "b": inner["Dense_1"]}
    others = find_units(partial(fn, names="ab"), {"Encoder_0": renamed, **outer}, x)
    told = magnitude_mask({"Encoder_0": None, **outer}, 0.5, units=units)
    wanted = magnitude_mask(outer, 0.5, units=others)
    assert_same({name: told[name] for name in outer}, wanted)
    # A state of one of them, and one whose holes tell.
    masks = [np.arange(family.size) < 2 for family in units.families]
    zeroed = jax.tree.map(lambda x, m: jnp.where(m, x, 0), params, units.expand(masks))
    small, plan = shrink(zeroed, units)
    adam, shapes = optax.adam(1e-3), partial(jax.tree.map, jnp.shape)
    with pytest.raises(ValueError, match="may be that of the parameters or"):
        plan.apply(adam.init(inner))
    top = optax.masked(adam, {"Encoder_0": False, "Dense_0": True, "Dense_1": True})
    assert shapes(plan.apply(top.init(params))) == shapes(top.init(small))
    with pytest.raises(ValueError, match="both have the names"):
        plan.apply(adam.init({"one": params, "other": params}))


TWO = [[normal((4, 4)), normal((4, 4), 1)], [normal((4, 4), 2), normal((4, 4), 3)]]


def test_a_state_of_another_choice_is_refused():
    params, grads = draw(0), draw(1)
    for smoothing in (0.0, 0.9):
        make = partial(mask_by_importance, 0.5, smoothing=smoothing)
        by_units, by_entries = make(units=UNITS), make(prunable=UNITS.flags)
        for tx, state in (
            (by_units, by_entries.init(params)),
            (by_entries, by_units.init(params)),
        ):
            with pytest.raises(ValueError, match=r"chose .*Begin with a new state"):
                tx.update(grads, state, params)
    tx = mask_by_importance(0.5, units=UNITS, smoothing=0.9)
    state = tx.init(params)
    fewer = state._replace(average=state.average[1:], averaged=state.averaged[1:])
    with pytest.raises(ValueError, match=r"averages of families of .* units"):
        tx.update(grads, fewer, params)


def test_leaves_without_a_gradient_have_no_say():
    """A frozen backbone: None in the place of its gradients."""
    grads = draw(1) | {"conv": None, "conv_bias": None}
    updates, state = first_step(mask_by_importance(0.5, units=UNITS), grads, draw(0))
    assert updates["conv"] is None
    assert state.num_kept == oracle.budget(0.5, TOTAL - 40)
    nothing = dict.fromkeys(SHAPES) | {"head_bias": draw(1)["head_bias"]}
    updates, state = first_step(mask_by_importance(0.5, units=UNITS), nothing, draw(0))
    assert_same(updates, nothing)
    assert state.num_active == state.num_kept == 0


def test_only_kernels_of_zeros_are_warned_of():
    """Biases of zeros are usual, and their units alive."""
    zeros = lambda name: {name: jnp.zeros(SHAPES[name])}
    tx = mask_by_importance(0.5, units=UNITS)
    tx.init(draw(0) | zeros("dense_bias") | zeros("conv_bias"))
    with pytest.warns(UserWarning, match="square"):
        tx.init(draw(0) | zeros("square"))


def test_with_64_bits_enabled():
    with jax.enable_x64(True):
        params, grads = (
            jax.tree.map(lambda x: x.astype(jnp.float64), draw(i)) for i in range(2)
        )
        updates, state = first_step(gsm_sgd(0.1, 0.5, units=UNITS), grads, params)
        assert updates["conv"].dtype == jnp.float64
        assert state[0][0].num_active <= oracle.budget(0.5, TOTAL)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gsm_sgd(0.1, 0.5, units=UNITS, prunable=True), "leave prunable= out"),
        (lambda: gsm_sgd(0.1, 0.5, units=UNITS, axis_name="x"), "or \\(\\)"),
        (lambda: gsm_sgd(0.1, 0.5, min_units=2), "goes with units="),
        (lambda: gsm_sgd(0.1, 0.5, units=UNITS, min_kept=2), "is of entries"),
        (lambda: gsm_sgd(0.1, 0.5, min_kept=1.5), "whole number"),
        (lambda: magnitude_mask(draw(), 0.99, units=UNITS), "min_units of every"),
        (lambda: magnitude_mask(draw(), 0.5, min_kept=500), "min_kept of every"),
        (lambda: magnitude_mask(draw(), 0.5, units=UNITS, prunable=True), "not two"),
        (
            lambda: gsm_sgd(0.1, 0.5, units=UNITS).init({"x": jnp.ones((2, 2))}),
            "x are not among the parameters",
        ),
        (
            lambda: gsm_sgd(0.1, 0.5, units=UNITS).init(
                draw() | {"square": jnp.ones((2, 2))}
            ),
            r"square has shape \[2, 2\], but \[8, 8\]",
        ),
        (
            lambda: prune(
                draw(), 0.5, opt_state=gsm_sgd(0.1, 0.5, units=UNITS).init(draw())
            ),
            "with units= in place of opt_state=",
        ),
        (
            lambda: gsm_sgd(
                0.1, optax.linear_schedule(0.0, 0.99, 10), units=UNITS
            ).init(draw()),
            "min_units of every",
        ),
    ],
)
def test_errors_say_what_to_give(call, words):
    with pytest.raises(ValueError, match=words):
        call()
