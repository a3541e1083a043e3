"""Units that add nothing go, and the network does what it did."""

import gc
import weakref
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import nnx
from jax import lax
from trees import first_step
from zoo import randomized, sample

from gsm_optax import apply_mask, gsm_sgd, mask_by_importance, prune
from gsm_optax.units import find_units, shrink

pytestmark = pytest.mark.optimize(False)


def same(fn, params, small_fn, small, inputs):
    """Whether both give the same outputs, to rounding."""
    wanted, actual = jax.jit(fn)(params, *inputs), jax.jit(small_fn)(small, *inputs)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(wanted, actual, rtol=0, atol=2e-5 * max(scale, 1e-2))


def pruned_by_units(units, params, seed=0):
    """The parameters with units at zero, and how many of each family are left."""
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(np.arange(f.size) < f.size // 2) for f in units.families]
    mask = units.expand(kept)
    zeroed = jax.tree.map(lambda x, m: np.where(m, x, 0 * x), params, mask)
    return zeroed, [int(marks.sum()) for marks in kept]


@pytest.mark.promotes
@pytest.mark.parametrize(
    "build",
    [
        *(zoo.mlp_equinox, zoo.lenet, zoo.resnet, zoo.densenet),
        *(zoo.grouped_convolution, zoo.attention_linen, zoo.scanned_nnx),
        *(zoo.grouped_query_attention_and_glu, zoo.lstm_linen, zoo.tied_embeddings),
    ],
    ids=lambda build: build.__name__,
)
def test_units_at_zero_go_and_no_others(build):
    fn, params, inputs, *small_fn = build()
    units = find_units(fn, params, *inputs)
    pruned, left = pruned_by_units(units, params)
    small, plan = shrink(pruned, units)
    assert [len(family.kept) for family in plan.families] == left, str(plan)
    same(fn, pruned, *(small_fn or [fn]), small, inputs)
    plan.check(*(small_fn or [fn]), pruned, small)


@pytest.mark.promotes
@pytest.mark.parametrize("build", [zoo.lenet, zoo.lstm_linen])
def test_network_that_is_not_pruned_stays_as_it_is(build):
    fn, params, inputs, *_ = build()
    small, plan = shrink(params, find_units(fn, params, *inputs))
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(params), strict=True)
    )
    assert not plan.shapes
    assert "no unit is removed: each adds something" in str(plan)


# Networks that were pruned by entries


def layers(*widths, seed=0):
    pairs = list(pairwise(widths))
    shapes = {f"w{i}": pair for i, pair in enumerate(pairs)}
    shapes |= {f"b{i}": (1, b) for i, (_, b) in enumerate(pairs)}
    return randomized({name: np.zeros(shape) for name, shape in shapes.items()}, seed)


def network(activation):
    def fn(params, x):
        for i in range(len(params) // 2):
            x = x @ params[f"w{i}"] + params[f"b{i}"]
            x = activation(x) if f"w{i + 1}" in params else x
        return x

    return fn


def test_neurons_without_anything_to_read_or_to_be_read_by_go():
    """And those that only they were made of, or that only they read, with them."""
    fn, params = network(jax.nn.relu), layers(3, 6, 6, 6, 2)
    params["w1"][2] = 0  # nothing reads neuron 2 of the first layer
    params["w0"][:, 4] = params["b0"][:, 4] = 0  # neuron 4 is never on
    params["w1"][[0, 1, 3, 5], 1] = params["b1"][:, 1] = 0  # reads only the dead ones
    params["w2"][0, [0, 1, 2, 3, 4]] = 0
    params["w3"][5] = 0  # reads neuron 5, which alone reads neuron 0 of the second
    params["w0"][:, 0], params["b0"][:, 0] = 0, -1  # relu is off whatever comes
    units = find_units(fn, params, sample((4, 3)))
    small, plan = shrink(params, units)
    kept = [family.kept.tolist() for family in plan.families]
    assert kept == [[1, 3, 5], [2, 3, 4, 5], [0, 1, 2, 3, 4]]
    assert plan.shapes["w1"] == ((6, 6), (3, 4))
    same(fn, params, fn, small, (sample((4, 3)),))


def test_constants_go_into_the_next_bias():
    """A chain of them: a neuron made of constants is one itself."""
    fn, params = network(jax.nn.sigmoid), layers(3, 5, 4, 4, 2)
    params["w0"][:, [1, 2]] = 0
    params["w1"][[0, 3, 4], 1] = 0
    x = sample((4, 3))
    small, plan = shrink(params, find_units(fn, params, x))
    assert [len(family.kept) for family in plan.families] == [3, 3, 4]
    same(fn, params, fn, small, (x,))
    assert not np.allclose(small["b1"][0], params["b1"][0, [0, 2, 3]])


def test_constants_are_those_of_the_dtype_that_they_are_computed_in():
    def fn(params, x):
        h = jax.nn.sigmoid(x @ params["w0"] + params["b0"])
        h = h.astype(jnp.float8_e4m3fn).astype(h.dtype)
        return h @ params["w1"] + params["b1"]

    params, x = layers(3, 5, 4), sample((4, 3))
    params["w0"][:, 1:4] = 0
    small, plan = shrink(params, find_units(fn, params, x))
    assert [len(family.kept) for family in plan.families] == [2]
    same(fn, params, fn, small, (x,))


@pytest.mark.parametrize(("padding", "left"), [("VALID", 2), ("SAME", 4)])
def test_constants_of_a_convolution_go_unless_it_is_padded(padding, left):
    spec = ("NHWC", "HWIO", "NHWC")

    def fn(params, x):
        for i in range(2):
            x = lax.conv_general_dilated(
                x, params[f"w{i}"], (1, 1), padding, dimension_numbers=spec
            )
            x = jnp.tanh(x + params[f"b{i}"].reshape(1, 1, 1, -1))
        return x.reshape(x.shape[0], -1) @ params["w"] + params["b"][None]

    size = 4 if padding == "VALID" else 8
    shapes = {"w0": (3, 3, 2, 4), "b0": (4,), "w1": (3, 3, 4, 3), "b1": (3,)}
    shapes |= {"w": (size * size * 3, 2), "b": (2,)}
    params = randomized({name: np.zeros(shape) for name, shape in shapes.items()})
    params["w0"][..., [0, 3]] = 0
    params["w1"][..., 2] = 0
    x = sample((2, 8, 8, 2))
    units = find_units(fn, params, x)
    small, plan = shrink(params, units)
    sizes = {family.family.size: family for family in plan.families}
    assert (len(sizes[4].kept), len(sizes[3].kept)) == (left, 2)
    assert sizes[4].constant == (0 if padding == "VALID" else 2)
    same(fn, params, fn, small, (x,))


CONSTANTS_THAT_STAY = {
    "no bias": lambda p, h: h @ p["w1"],
    "bias of two layers": lambda p, h: (h @ p["w1"] + p["b1"]) * p["b1"],
    "sum in two roles": lambda p, h: (lambda z: (z + p["b1"]) * z)(h @ p["w1"]),
    "bias of one entry": lambda p, h: h @ p["w1"] + p["b1"][:, :1],
    "bias that is scaled": lambda p, h: h @ p["w1"] + 2 * p["b1"],
    "weight that is scaled": lambda p, h: h @ (2 * p["w1"]) + p["b1"],
    "weight in eight bits": lambda p, h: (
        h @ p["w1"].astype(jnp.float8_e4m3fn).astype(h.dtype) + p["b1"]
    ),
    "whole weight": lambda p, h: h @ p["w1"].astype(int).astype(h.dtype) + p["b1"],
    "loop": lambda p, h: (
        lax.fori_loop(0, 3, lambda _, z: z, h @ p["w1"] + p["b1"])
        + lax.scan(lambda z, _: (z, h @ p["w1"] + p["b1"]), h, None, length=2)[1].sum(0)
    ),
}


@pytest.mark.parametrize("name", CONSTANTS_THAT_STAY)
def test_constants_stay_where_no_bias_is_free_to_take_them(name):
    rest, params = CONSTANTS_THAT_STAY[name], layers(3, 5, 4)
    fn = lambda params, x: rest(params, jax.nn.sigmoid(x @ params["w0"] + params["b0"]))
    params["w0"][:, 1] = 0
    x = sample((4, 3))
    small, plan = shrink(params, find_units(fn, params, x))
    family = next(p for p in plan.families if p.family.size == 5)
    assert (len(family.kept), family.constant) == (5, 1)
    same(fn, params, fn, small, (x,))


def test_constants_of_heads_go_into_the_bias_after_them():
    """Two axes are summed over: an entry of two units that go counts once."""

    def fn(params, x):
        h = jnp.einsum("bi,ihd->bhd", x, params["w0"]) + params["b0"][None]
        h = jax.nn.sigmoid(h)
        return jnp.einsum("bhd,hdo->bo", h, params["w1"]) + params["b1"][None]

    shapes = {"w0": (3, 4, 5), "b0": (4, 5), "w1": (4, 5, 2), "b1": (2,)}
    params = randomized({name: np.zeros(shape) for name, shape in shapes.items()})
    params["w0"][:, 1] = params["w0"][..., 2] = 0
    params["b0"][1] = params["b0"][:, 2] = 0.7
    x = sample((4, 3))
    small, plan = shrink(params, find_units(fn, params, x))
    assert plan.shapes["w1"] == ((4, 5, 2), (3, 4, 2))
    same(fn, params, fn, small, (x,))


@pytest.mark.parametrize(
    ("column", "filling", "left"), [(0.7, 0, 6), (0, 5, 6), (0, 0, 5)]
)
def test_rows_out_of_bounds_are_not_what_is_in_the_table(column, filling, left):
    """No input of the check is out of bounds, but later ones may be."""

    def fn(params, ids):
        h = jnp.take(params["w0"], ids, axis=0, mode="fill", fill_value=filling)
        return h @ params["w1"] + params["b1"]

    params = layers(5, 6, 2)
    del params["b0"]
    params["w0"][:, 1] = column
    small, plan = shrink(params, find_units(fn, params, jnp.arange(3)))
    assert [len(family.kept) for family in plan.families] == [left]
    same(fn, params, fn, small, (jnp.array([1, 9]),))


def test_normalised_channels_go_with_their_scale_and_bias():
    """Statistics that were passed with the parameters need not be zero."""
    fn, params, inputs = zoo.resnet()
    units = find_units(fn, params, *inputs)
    params = jax.tree.map(np.copy, params)
    norm = params["params"]["BatchNorm_1"]  # of the first block's inner channels
    norm["scale"][[0, 2]] = norm["bias"][[0, 2]] = 0
    small, plan = shrink(params, units)
    changed = [p.kept.tolist() for p in plan.families if len(p.kept) < p.family.size]
    assert changed == [[1, 3, 4]]
    assert small["batch_stats"]["BatchNorm_1"]["var"].shape == (3,)
    same(fn, params, fn, small, inputs)


@pytest.mark.promotes
def test_random_programs_that_are_pruned_by_entries():
    shrunk = 0
    for seed in range(4):
        fn, params, inputs = zoo.random_program(seed)
        rng = np.random.default_rng(seed)
        sparse = lambda x, rng=rng: np.where(rng.random(x.shape) < 0.8, 0 * x, x)
        params = jax.tree.map(sparse, params)
        units = find_units(fn, params, *inputs)
        _, plan = shrink(params, units)  # which checks the outputs
        shrunk += len(plan.shapes)
    assert shrunk >= 8


# Sizes


def test_at_least_one_unit_stays_and_sizes_are_rounded_up():
    fn, params = network(jnp.tanh), layers(3, 12, 20, 2)
    x = sample((4, 3))
    units = find_units(fn, params, x)
    nothing = jax.tree.map(np.zeros_like, params)
    assert [len(p.kept) for p in shrink(nothing, units)[1].families] == [1, 1]
    pruned = jax.tree.map(np.copy, params)
    pruned["w0"][:, :7] = pruned["b0"][:, :7] = 0
    pruned["w2"][3:] = 0
    small, plan = shrink(pruned, units, round_to=8)
    assert [len(p.kept) for p in plan.families] == [8, 8]
    assert [p.held for p in plan.families] == [3, 5]
    same(fn, pruned, fn, small, (x,))
    _, plan = shrink(pruned, units, round_to=100)
    assert [len(p.kept) for p in plan.families] == [12, 20]
    assert "held back" in str(plan)


# Other trees


def test_state_of_one_collection_shrinks_too():
    """Whatever the collection is called, and whatever else there is."""
    net, more = network(jax.nn.relu), {"scale": {"one": np.ones((1, 1), np.float32)}}
    fn = lambda params, x: net(params["net"], x) * params["scale"]["one"]
    params = {"net": layers(3, 6, 5, 2)} | more
    units = find_units(fn, params, sample((4, 3)))
    params, _ = pruned_by_units(units, params)
    small, plan = shrink(params, units)
    tx = optax.adam(1e-3)
    state = plan.apply(tx.init(params["net"]))
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(state) == shapes(tx.init(small["net"]))
    assert shapes(plan.apply(params["net"])) == shapes(small["net"])


@pytest.mark.parametrize("depth", [0, 1])
def test_states_of_two_networks_are_told_apart_by_their_shapes_or_refused(depth):
    """As those of a GAN, of two towers, or of an ensemble have their own optimizers."""
    nets, adam, x = network(jnp.tanh), optax.adam(1e-3), sample((4, 3))
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    inner = (lambda tree: tree["params"]) if depth else (lambda tree: tree)
    outer = (lambda tree: {"params": tree}) if depth else (lambda tree: tree)
    fn = lambda p, x: nets(inner(p)["a"], x) + nets(inner(p)["b"], x)
    for sizes, told in (((3, 6, 5, 2), False), ((3, 7, 4, 2), True)):
        params = outer({"a": layers(3, 6, 5, 2), "b": layers(*sizes)})
        units = find_units(fn, params, x)
        params, _ = pruned_by_units(units, params)
        small, plan = shrink(params, units)
        own, left = inner(params), inner(small)
        assert shapes(plan.apply(adam.init(own))) == shapes(adam.init(left))
        for name in "ab":
            if told:
                state = plan.apply(adam.init(own[name]))
                assert shapes(state) == shapes(adam.init(left[name]))
                continue
            with pytest.raises(ValueError, match="the tree may be that of"):
                plan.apply(adam.init(own[name]))
            with pytest.raises(ValueError, match="which of these it is"):
                units.flags(own[name])


def test_network_that_computes_in_half_precision_is_compared_as_such():
    def fn(params, x):
        cast = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
        return network(jax.nn.sigmoid)(cast(params), cast(x)).astype(x.dtype)

    params, x = layers(8, 40, 40, 3), sample((16, 8))
    params["w0"][:, ::2] = 0
    small, plan = shrink(params, find_units(fn, params, x))
    assert [len(family.kept) for family in plan.families] == [20, 40]
    wanted, actual = fn(params, x), fn(small, x)
    np.testing.assert_allclose(wanted, actual, rtol=0, atol=0.03 * np.abs(wanted).max())


def test_state_of_gsm_by_units_shrinks_too():
    """Its average holds a number a unit, which may look like another parameter."""
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p[1] * p[0]) @ p[2] * p[3]) @ p[4]
    shapes = [(1, 6), (3, 6), (6, 6), (1, 6), (6, 2)]
    params, x = randomized([np.zeros(shape) for shape in shapes]), sample((4, 3))
    units = find_units(fn, params, x)
    tx = gsm_sgd(1e-2, 0.5, units=units, smoothing=0.9)
    gradient = jax.grad(lambda params: (fn(params, x) ** 2).mean())
    _, state = first_step(tx, gradient(params), params)
    small, plan = shrink(prune(params, 0.6, units=units), units)
    shrunk = optax.tree.get(plan.apply(state), "average")
    for own, before, family in zip(
        shrunk, optax.tree.get(state, "average"), plan.families, strict=True
    ):
        np.testing.assert_array_equal(own, before[family.kept])
    found = find_units(fn, small, x)
    new = gsm_sgd(1e-2, 0.5, units=found, smoothing=0.9)
    jax.jit(new.update)(gradient(small), plan.apply(state), small)
    # Without momentum nothing but the average tells that it is small already.
    alone = mask_by_importance(0.5, units=units, smoothing=0.9).init(params)
    with pytest.raises(ValueError, match=r"average/0 has shape \[3\], .* has \[6\]"):
        plan.apply(plan.apply(alone))


def test_pruning_by_units_compiles_once_and_does_not_keep_them(caplog):
    fn = lambda params, x: jnp.tanh(x @ params["w0"]) @ params["w1"] + params["b1"]
    params, x = layers(3, 6, 2), sample((4, 3))
    units = find_units(fn, params, x)
    counts = []
    with jax.log_compiles():
        for ratio in (0.3, 0.6):
            pruned = prune(params, ratio, units=units)
            counts.append(caplog.text.count("Compiling"))
    assert counts[0] == counts[1] > 0
    assert not np.all(pruned["w0"], 0).all()
    reference = weakref.ref(units)
    del units
    gc.collect()
    assert reference() is None


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-2)),
    "masked": optax.masked(optax.trace(0.9), {"w1": True, "w0": False, "b1": False}),
    "gsm": gsm_sgd(1e-2, ratio=0.5),
}


@pytest.mark.promotes
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_optimizers_shrink_by_the_same_plan(name):
    """The smaller network goes on as the larger one would have."""
    fn = lambda params, x: jnp.tanh(x @ params["w0"]) @ params["w1"] + params["b1"]
    tx, params, x = OPTIMIZERS[name], layers(3, 6, 2), sample((4, 3))
    params = {name: jnp.asarray(params[name]) for name in ("w0", "w1", "b1")}
    units = find_units(fn, params, x)
    params, _ = pruned_by_units(units, params)
    small, plan = shrink(params, units)
    gradient = jax.grad(lambda params: (fn(params, x) ** 2).mean())
    _, state = tx.update(gradient(params), tx.init(params), params)
    smaller_state = plan.apply(state)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(smaller_state) == shapes(tx.init(small))
    if name != "gsm":  # which chooses among all entries
        updates, _ = tx.update(gradient(params), state, params)
        smaller, _ = tx.update(gradient(small), smaller_state, small)
        for one, other in zip(
            *map(jax.tree.leaves, (plan.apply(updates), smaller)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_states_beside_their_parameters_are_refused():
    """A part of them would stay as large as it was."""
    net, mean = network(jax.nn.relu), {"mean": np.ones((1, 2), np.float32)}
    fn = lambda tree, x: net(tree["params"]["net"], x) + tree["stats"]["mean"]
    params = {"params": {"net": layers(3, 6, 5, 2)}, "stats": mean}
    units = find_units(fn, params, sample((4, 3)))
    params, _ = pruned_by_units(units, params)
    small, plan = shrink(params, units)
    adam = optax.adam(0.1)
    state = {"params": params["params"], "state": adam.init(params["params"])}
    with pytest.raises(
        ValueError, match=r"state/0/mu/net/b0 of .* to every tree alone"
    ):
        plan.apply(state)
    sizes = lambda tree: jax.tree.map(jnp.shape, tree)
    alone = {name: plan.apply(tree) for name, tree in state.items()}
    left = small["params"]
    assert sizes(alone) == sizes({"params": left, "state": adam.init(left)})
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    with pytest.raises(ValueError, match=r"v_row/net/w0 of shape .* tx\.init\(small\)"):
        plan.apply(factored.init(params["params"]))
    # Layers of another network may have the same names and shapes.
    own, left = params["params"], small["params"]
    more = own | {"head": own["net"] | {"w0": np.ones((3, 6), np.float32)}}
    nested = network(jax.nn.relu)
    found = find_units(lambda tree, x: nested(tree["net"], x), own, sample((4, 3)))
    _, plan = shrink(own, found)
    state = plan.apply(adam.init(more))
    assert sizes(state[0].mu["net"]) == sizes(left["net"])
    assert sizes(state[0].mu["head"]) == sizes(more["head"])


def test_state_that_no_unit_can_be_found_in_is_refused():
    fn, params = network(jax.nn.relu), layers(3, 6, 5, 2)
    units = find_units(fn, params, sample((4, 3)))
    params, _ = pruned_by_units(units, params)
    _, plan = shrink(params, units)
    state = {"factor": {"w1": np.zeros(6)}, "step": np.zeros(())}
    with pytest.raises(ValueError, match=r"factor/w1 has shape \[6\].*\[6, 5\]"):
        plan.apply(state)


# Bad input


def test_errors_name_what_stands_in_the_way():
    fn, params = network(jax.nn.relu), layers(3, 6, 5, 2)
    x = sample((4, 3))
    units = find_units(fn, params, x)
    with pytest.raises(ValueError, match="another structure"):
        shrink({"w0": params["w0"]}, units)
    with pytest.raises(ValueError, match="w1 has shape"):
        shrink(params | {"w1": np.zeros((6, 6), np.float32)}, units)
    with pytest.raises(ValueError, match="round_to=0"):
        shrink(params, units, round_to=0)
    with pytest.raises(ValueError, match="units is a dict: give shrink"):
        shrink(units, params)
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="give arrays, no shapes"):
        shrink(shapes, units)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda params: shrink(params, units)[0])(params)
    with pytest.raises(ValueError, match="units is a tuple: give what find_units"):
        gsm_sgd(0.1, 0.5, units=units.families)
    pruned, _ = pruned_by_units(units, params)
    broken = pruned | {"w0": np.where(pruned["w0"] == 0, pruned["w0"], np.nan)}
    small, plan = shrink(broken, units)  # of NaN that stays nothing is said
    broken = params | {"w0": params["w0"].copy(), "w1": params["w1"].copy()}
    broken["w0"][0, 2], broken["w1"][2] = np.nan, 0
    with pytest.raises(ValueError, match="w0 holds NaN or infinity"):
        shrink(broken, units)
    small, plan = shrink(pruned, units)
    with pytest.raises(ValueError, match="gives other outputs"):
        plan.check(lambda params, x: 1.1 * fn(params, x), pruned, small)

    def normalised(params, x):
        scale = jnp.exp(jax.lax.lgamma((params["w1"] ** 2).sum(1, keepdims=True)))
        return jax.nn.relu(x @ params["w0"]) @ (params["w1"] * scale)

    pruned = jax.tree.map(np.copy, layers(3, 6, 2))
    pruned["w0"][:, :2] = pruned["w1"][:2] = 0
    with pytest.raises(ValueError, match="are NaN with the zeros, and 0 without"):
        shrink(pruned, find_units(normalised, pruned, sample((4, 3))))


def test_module_that_keeps_its_sizes_is_checked_when_it_is_built_anew():
    fn, params, inputs, small_fn = zoo.lstm_linen()
    units = find_units(fn, params, *inputs)
    pruned, (left,) = pruned_by_units(units, params)
    small, plan = shrink(pruned, units)
    assert plan.shapes["params/Dense_0/kernel"] == ((5, 2), (left, 2))
    plan.check(small_fn, pruned, small)
    assert f"5x2    {left}x2" in str(plan)
    assert "plan.check(new_fn, params, small)" in str(plan)
    tx = optax.adam(0.1)  # whose parameters are one of the collections
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    state = plan.apply(tx.init(params["params"]))
    assert shapes(state) == shapes(tx.init(small["params"]))


@pytest.mark.promotes
def test_whole_state_of_a_module_is_shrunk():
    """Counters and keys are among its leaves, and stay."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense1, self.dense2 = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x):
            return self.dense2(self.dropout(nnx.relu(self.dense1(x))))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    fn = lambda state, x: nnx.merge(graph, state)(x)
    units = find_units(fn, state, sample((2, 4)))
    state["dense2"]["kernel"][...] = state["dense2"]["kernel"][...].at[1].set(0)
    small, plan = shrink(state, units)
    assert plan.families[0].kept.tolist() == [0, 2, 3]
    assert nnx.merge(graph, small)(sample((2, 4))).shape == (2, 4)


@pytest.mark.promotes
def test_counter_is_no_constant():
    def fn(params, x):
        gate = jnp.minimum(params["step"] / 100, 1.0)
        return (gate * jax.nn.relu(x @ params["w0"])) @ params["w1"]

    params = layers(3, 6, 2) | {"step": jnp.int32(0)}
    small, _ = shrink(params, find_units(fn, params, sample((4, 3))))
    assert small["w0"].shape == (3, 6)


def test_heads_whose_number_is_written_down_can_be_halved():
    """And the network be built anew; where sizes are free, it has to run."""

    def grouped(params, x, groups=4):
        h = (x @ params["w0"]).reshape(len(x), groups, -1)
        h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
        return jax.nn.relu(h.reshape(len(x), -1)) @ params["w1"]

    params, x = layers(3, 24, 2), sample((4, 3))
    units = find_units(grouped, params, x)
    assert not units.families[0].is_traced
    halved = prune(params, 0.5, units=units)
    with pytest.warns(UserWarning, match="build it anew"):
        small, plan = shrink(halved, units)
    assert small["w0"].shape == (3, 12)
    plan.check(lambda params, x: grouped(params, x, groups=2), halved, small)

    squeezed = lambda p, x: jax.nn.relu(x @ p["w0"])[:, None].squeeze() @ p["w1"]
    units = find_units(squeezed, params, x)
    one = apply_mask(params, units.expand([np.arange(24) < 1]))
    with pytest.raises(ValueError, match=r"does not take the smaller.*round_to="):
        shrink(one, units)


def test_nothing_is_written_over():
    fn, params = network(jax.nn.sigmoid), layers(3, 6, 5, 2)
    params["w0"][:, :3] = 0
    before = jax.tree.map(np.copy, params)
    shrink(params, find_units(fn, params, sample((4, 3))))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (params, before))))


def test_shapes_are_enough_to_plan_with():
    """The check then takes random inputs; half precision and sharded leaves pass."""
    fn, params = network(jax.nn.relu), layers(3, 6, 5, 2)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    units = find_units(fn, params, jax.ShapeDtypeStruct((4, 3), jnp.bfloat16))
    pruned, left = pruned_by_units(units, params)
    small, plan = shrink(pruned, units)
    assert [len(family.kept) for family in plan.families] == left
    assert small["w0"].dtype == jnp.bfloat16
