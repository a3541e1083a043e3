"""Families of units over a zoo of networks: each unit goes without a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax
from zoo import F32, randomized, removed, sample

from gsm_optax import apply_mask
from gsm_optax.units import find_units, shrink

pytestmark = pytest.mark.optimize(False)


def check(fn, params, inputs, units, small_fn=None, least=1e-3):
    """Zero random units of all families, remove them: the same output."""
    rng = np.random.default_rng(2)
    run, run_small = jax.jit(fn), jax.jit(small_fn or fn)
    few = [max(round(0.4 * family.size), 1) for family in units.families]
    gone = [np.arange(f.size) < n for f, n in zip(units.families, few, strict=True)]
    for _ in range(3):
        gone = [rng.permutation(marks) for marks in gone]
        mask = units.expand([~marks for marks in gone])
        masked = jax.tree.map(lambda x, m: np.where(m, x, 0 * x), params, mask)
        wanted = run(masked, *inputs)
        small = run_small(removed(units, params, gone), *inputs)
        for one, other in zip(
            jax.tree.leaves(wanted), jax.tree.leaves(small), strict=True
        ):
            assert one.shape == other.shape
            scale = np.abs(one).max()
            assert scale >= least
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * max(scale, 1e-2))


ZOO = [  # network, sizes of its families
    (zoo.mlp, [6, 5]),
    (zoo.mlp_equinox, [7, 7]),
    (zoo.lenet, [4, 6, 12, 8]),
    (zoo.resnet, [4, 5, 6, 8]),
    (zoo.densenet, [4, 3, 5]),
    (zoo.depthwise_separable, [4, 6]),
    (zoo.grouped_convolution, [3]),
    (zoo.group_norm, [4]),
    (zoo.attention_linen, [4]),
    (zoo.unet, [4, 5, 6, 5, 4, 3]),
    (zoo.transformer, [4, 10, 4, 10]),  # heads, neurons
    (zoo.grouped_query_attention_and_glu, [3, 7]),
    (zoo.tied_embeddings, [6, 8]),
    (zoo.scanned_linen, [5, 7]),
    (zoo.scanned_nnx, [6]),
    (zoo.lstm_equinox, [5]),
    (zoo.lstm_linen, [5]),
    (zoo.checkpointed, [4, 6, 6]),
    (zoo.branches, [4, 5, 6]),
]


@pytest.mark.promotes
@pytest.mark.parametrize(
    ("build", "sizes"), ZOO, ids=lambda x: getattr(x, "__name__", "")
)
def test_units_of_the_zoo_go_without_a_trace(build, sizes):
    fn, params, inputs, *small_fn = build()
    units = find_units(fn, params, *inputs)
    assert sorted(family.size for family in units.families) == sorted(sizes), str(units)
    assert all(family.is_traced for family in units.families) == (not small_fn)
    check(fn, params, inputs, units, *small_fn)


def dense(params, x, activation=jax.nn.sigmoid):
    """Two layers with something in between; a sigmoid of zero is not zero."""
    return activation(x @ params["w"] + params["b"])


SHAPES = {"w": (3, 6), "b": (1, 6), "v": (6, 4)}


def grouped_norm(h):
    pairs = h.reshape(4, -1, 2)
    return (pairs - pairs.mean(-1, keepdims=True)).reshape(4, -1)


# Where jax has no primitive for it, repetitions are followed instead of the features.
HAS_TILE = "tile" in str(jax.make_jaxpr(lambda x: jnp.tile(x, (1, 2)))(np.ones((1, 2))))

# What goes between a layer of 6 neurons and the next; the number of families that come
# of it, which is 0 where a naive rule would find one that is none.
BETWEEN = {
    "nothing": (lambda h, p: h, [6]),
    "sum over features": (lambda h, p: h - h.sum(-1, keepdims=True), []),
    "softmax over features": (lambda h, p: jax.nn.softmax(h), []),
    "sort": (lambda h, p: jnp.sort(h), []),
    "cumsum": (lambda h, p: jnp.cumsum(h, -1), []),
    "reverse": (lambda h, p: h[:, ::-1], [6]),
    "pairs": (lambda h, p: h + h[:, ::-1], [3]),
    "roll": (lambda h, p: h + jnp.roll(h, 1, -1), []),
    "stride": (lambda h, p: jnp.repeat(h[:, ::2], 2, -1), []),
    "slice": (lambda h, p: h[:, 1:] @ p["v"][1:], [5]),
    "iota": (lambda h, p: h * jnp.arange(6.0)[None], []),
    "constant": (lambda h, p: h + np.arange(6, dtype=np.float32)[None], []),
    "uniform constant": (lambda h, p: h + np.ones((1, 1), np.float32), [6]),
    "gather": (lambda h, p: h[:, np.array([0, 2, 1, 3, 5, 4])], []),
    "gram": (lambda h, p: (h @ h.T) @ h, []),
    "gram of a scale": (lambda h, p: (h * p["scalar"]) @ (h * p["scalar"]).T @ h, []),
    "gram of a slice": (lambda h, p: (h * p["b"][:, :1]) @ h.T @ h, []),
    "diagonal": (lambda h, p: h * jnp.diag(p["v"] @ p["v"].T)[None], []),
    "mixing reshape": (
        lambda h, p: h.reshape(-1, 3, 2).swapaxes(1, 2).reshape(-1, 6),
        [],
    ),
    "groups": (lambda h, p: grouped_norm(h), [3]),
    "dynamic slice": (
        lambda h, p: jnp.tile(lax.dynamic_slice(h, (0, 1), (4, 3)), 2),
        [],
    ),
    "argmax": (lambda h, p: h + jnp.argmax(h, -1, keepdims=True).astype(F32), []),
    "scaled by its size": (lambda h, p: h / h.shape[-1] ** 0.5, []),
    "scale of one entry": (lambda h, p: h * p["scalar"], [6]),
    "scale of each": (lambda h, p: jnp.where(h > 0, h, p["b"] * h), [6]),
    "unequal offset": (lambda h, p: h.at[:, 1:].add(h[:, :-1]), []),
    "offset": (lambda h, p: jnp.pad(h[:, 1:], ((0, 0), (0, 1))) + h, []),
    "weights in two roles": (lambda h, p: h + (h @ p["square"]), [6]),
    "the same weights mixed": (lambda h, p: h @ p["w2"] @ p["w"], [6]),
    "its own transpose": (lambda h, p: h @ (p["square"] + p["square"].T), [6]),
    "normed weights": (
        lambda h, p: h * lax.rsqrt((p["w"] ** 2).sum(0, keepdims=True)),
        [],
    ),
    "fft": (lambda h, p: jnp.abs(jnp.fft.fft(h)), []),
    "loop": (
        lambda h, p: lax.while_loop(lambda h: h[0, 0] > 9, lambda h: h - 1, h),
        [],
    ),
    "noise": (lambda h, p: h * jax.random.uniform(jax.random.key(0), h.shape), []),
    "outer product": (
        lambda h, p: (h[:, :, None] * h[:, None, :]).reshape(-1, 36)[:, :6],
        [],
    ),
    "stack": (lambda h, p: jnp.stack([h, -3 * h], 1).sum(1), [6]),
    "stack behind": (lambda h, p: jnp.stack([h, p["b"] + 0 * h], -1).mean(-1), [6]),
    "unstack": (lambda h, p: sum(jnp.unstack(jnp.stack([h, 2 * h], 1), axis=1)), [6]),
    "unstack features": (lambda h, p: jnp.stack(jnp.unstack(h, axis=1), 1), []),
    "tile": (
        lambda h, p: jnp.tile(h, (1, 2)).reshape(4, 2, -1).sum(1),
        [6] if HAS_TILE else [],
    ),
    "device put": (lambda h, p: jax.device_put(h), [6]),
    "reduce precision": (lambda h, p: lax.reduce_precision(h, 5, 3), [6]),
    "one minus square": (lambda h, p: jax.jvp(jnp.tanh, (h,), (h,))[1], [6]),
    "head by index": (
        lambda h, p: jnp.concatenate([h[:, :2], h[:, 4:], h[:, 2:4]], -1),
        [2],
    ),
}


@pytest.mark.promotes
@pytest.mark.parametrize("name", BETWEEN)
def test_what_a_naive_rule_would_get_wrong(name):
    between, sizes = BETWEEN[name]
    shapes = SHAPES | {"w2": (6, 3), "square": (6, 6), "scalar": (1, 1)}
    shapes |= {"first": (2, 4), "second": (4, 2)}
    params = randomized({n: np.zeros(s) for n, s in shapes.items()})
    params |= {"w2": randomized(params["w2"], 3)}

    def fn(params, x):
        h = between(dense(params, x), params)
        h = h if name == "slice" else h @ params["v"][: h.shape[-1]]
        x = jax.nn.relu(x[:, :2] @ params["first"])  # always a family
        return h, x @ params["second"]

    inputs = (sample((4, 3)),)
    units = find_units(fn, params, *inputs)
    own = [f.size for f in units.families if "second[0]" not in map(str, f.slices)]
    assert own == sizes, str(units)
    check(fn, params, inputs, units)


def check_random_program(seed):
    fn, params, inputs = zoo.random_program(seed)
    try:
        units = find_units(fn, params, *inputs)
    except ValueError:
        return 0  # no units
    if not all(family.is_traced for family in units.families):
        return 0  # it cannot be run with fewer units
    check(fn, params, inputs, units, least=0)
    return len(units.families)


@pytest.mark.promotes
def test_units_of_random_programs_go_without_a_trace():
    assert sum(map(check_random_program, range(8))) >= 8


@pytest.mark.slow
@pytest.mark.promotes
def test_units_of_many_random_programs_go_without_a_trace():
    found = 0
    for seed in range(100, 160):
        found += check_random_program(seed)
        jax.clear_caches()  # every program has operations of its own: gigabytes of them
    assert found >= 60


# Sums over units, and masks from them


def two_layers(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"]


TWO = randomized({name: np.zeros(shape) for name, shape in SHAPES.items()})


def test_sum_is_that_over_the_entries_of_each_unit():
    units = find_units(two_layers, TWO, sample((2, 3)))
    (total,) = jax.jit(units.sum)(TWO)
    wanted = TWO["w"].sum(0) + TWO["b"][0] + TWO["v"].sum(1)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    assert total.dtype == F32
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), TWO)
    assert units.sum(half)[0].dtype == F32
    (count,) = units.sum(jax.tree.map(lambda x: x == x, TWO))
    assert count.dtype == jnp.int32
    assert count.tolist() == [units.families[0].entries] * 6


@pytest.mark.promotes
@pytest.mark.parametrize(
    "build", [zoo.tied_embeddings, zoo.densenet, zoo.scanned_linen, zoo.lenet]
)
def test_sum_and_expand_agree_where_units_share_entries(build):
    """Each unit alone, by expand, holds the entries that sum counts."""
    fn, params, inputs = build()
    units = find_units(fn, params, *inputs)
    totals = units.sum(params)
    for i, family in enumerate(units.families):
        for unit in (0, family.size - 1):
            values = [np.ones(f.size, bool) for f in units.families]
            values[i][unit] = False
            mask = jax.tree.leaves(units.expand(values))
            leaves = jax.tree.leaves(params)
            own = [x[~np.asarray(m)] for x, m in zip(leaves, mask, strict=True)]
            assert sum(map(np.size, own)) == family.entries
            np.testing.assert_allclose(
                totals[i][unit], sum(map(np.sum, own)), rtol=1e-4
            )


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sum_and_expand_work_on_any_mesh(kind):
    units = find_units(two_layers, TWO, sample((2, 3)))
    kind = jax.sharding.AxisType[kind]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    spec = {"w": (None, "x"), "b": (None, "x"), "v": ("x", None)}
    place = lambda x, axes: jax.device_put(
        x, jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    )
    sharded = {name: place(TWO[name], spec[name]) for name in TWO}
    (total,) = jax.jit(units.sum)(sharded)
    np.testing.assert_allclose(total, units.sum(TWO)[0], rtol=1e-6)
    mask = jax.jit(units.expand)([total > 0])
    assert mask["v"][:, 0].tolist() == (total > 0).tolist()
    masked = apply_mask(sharded, jax.device_get(mask))
    masked = apply_mask(sharded, mask)
    np.testing.assert_array_equal(masked["v"], TWO["v"] * np.asarray(mask["v"]))
    assert masked["v"].sharding.is_equivalent_to(sharded["v"].sharding, 2)
    if kind == jax.sharding.AxisType.Explicit:
        with pytest.raises(ValueError, match=r"b is on .* Explicit .*device_get"):
            shrink(masked, units)
        _, plan = shrink(jax.device_get(masked), units)
        with pytest.raises(ValueError, match=r"b is on .* Explicit .*device_get"):
            plan.apply(masked)


def test_table_says_what_is_in_a_unit_and_what_pins_an_axis():
    text = str(find_units(two_layers, TWO, sample((2, 3))))
    assert text.splitlines()[1].split() == ["0", "6", "8", "b[1]"]
    assert "input         1  w[0]" in text
    assert "output        1  v[1]" in text


def test_table_says_where_fn_keeps_sizes():
    ones = np.ones((1, 6), np.float32)
    units = find_units(lambda p, x: two_layers(p | {"b": ones}, x), TWO, sample((2, 3)))
    assert not units.families[0].is_traced
    assert "\n\nfn keeps sizes of family 0: it has to be built anew" in str(units)


def test_program_is_followed_from_shapes_alone():
    struct = jax.ShapeDtypeStruct((2, 3), F32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TWO)
    assert find_units(two_layers, shapes, struct).families[0].size == 6


READ_IN_PART = {  # what these inputs do not reach may still be read by others
    "positions": lambda p, x: (
        jax.nn.relu((x @ p["w"] + p["rows"][: len(x)]) @ p["u"]) @ p["v"]
    ),
    "cast positions": lambda p, x: (
        jax.nn.relu((x @ p["w"] + (2 * p["rows"])[: len(x)]) @ p["u"]) @ p["v"]
    ),
    "columns": lambda p, x: jnp.tanh(x @ p["w"] @ p["u"])[:, :3] @ p["v"][:3],
}


@pytest.mark.parametrize("name", READ_IN_PART)
def test_what_is_not_read_is_no_unit(name):
    shapes = {"w": (3, 4), "rows": (9, 4), "u": (4, 6), "v": (6, 2)}
    params = randomized({path: np.zeros(shape) for path, shape in shapes.items()})
    units = find_units(READ_IN_PART[name], params, sample((5, 3)))
    # Of the columns fn writes down how many it takes.
    assert [f.size for f in units.families] == [4] + [6] * (name != "columns")
    assert all(len(family.slices) > 1 for family in units.families)
    reasons = {f"{p.path}[{p.axis}]": p.reason for p in units.pinned}
    assert name == "columns" or reasons["rows[0]"] in ("not used", "input")


def test_weights_of_a_state_that_is_zero_are_no_units():
    """What a recurrent network's first step reads is nothing."""

    def fn(params, x):
        state = jnp.zeros((len(x[0]), 6))
        for now in x:
            state = jnp.tanh(now @ params["w"] + state @ params["square"])
        return state @ params["v"]

    shapes = {"w": (3, 6), "square": (6, 6), "v": (6, 2)}
    params = randomized({path: np.zeros(shape) for path, shape in shapes.items()})
    for steps in (1, 3):
        (family,) = find_units(fn, params, sample((steps, 5, 3))).families
        assert "w[1]" in map(str, family.slices)
        assert len(family.slices) == (3 if steps == 1 else 4)


def test_sizes_that_fn_uses_are_seen_beside_many_that_it_writes_down():
    """However many of its layers cannot be traced with fewer units."""
    layers = 14

    def fn(params, x):
        for i in range(layers):
            heads = (x @ params[f"up{i}"]).reshape(len(x), 2, 3)  # written down
            x = x + jnp.tanh(heads).reshape(len(x), 6) @ params[f"down{i}"]
        h = jax.nn.relu(x @ params["w"])
        return h / h.shape[1] @ params["v"]

    shapes = {"w": (4, 8), "v": (8, 2)}
    for i in range(layers):
        shapes |= {f"up{i}": (4, 6), f"down{i}": (6, 4)}
    params = randomized({path: np.zeros(shape) for path, shape in shapes.items()})
    units = find_units(fn, params, sample((5, 4)))
    assert {
        str(part) for family in units.families for part in family.slices
    }.isdisjoint({"w[1]", "v[0]"})
    reasons = {f"{p.path}[{p.axis}]": p.reason for p in units.pinned}
    assert reasons["w[1]"] == "its size, which fn uses"
    assert sum(family.size == 2 for family in units.families) == layers


def test_three_heads_are_found_whose_products_would_lose_an_axis_of_one():
    def attention(p, x):
        q, k, v = (
            (x @ p[name]).reshape(*x.shape[:2], -1, 4).swapaxes(1, 2) for name in "qkv"
        )
        a = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2)
        return (a @ v).swapaxes(1, 2).reshape(*x.shape[:2], -1) @ p["o"]

    shapes = dict.fromkeys("qkv", (6, 12)) | {"o": (12, 5)}
    params = randomized({name: np.zeros(shape) for name, shape in shapes.items()})
    units = find_units(attention, params, sample((2, 7, 6)))
    assert [family.size for family in units.families] == [3]


def test_a_power_of_zero_is_not_finite():
    def fn(params, x, power):
        lengths = (params["w"] ** 2).sum(0, keepdims=True)
        return jax.nn.relu(x @ (params["w"] * lengths**power)) @ params["v"]

    x = sample((2, 3))
    assert find_units(lambda p, x: fn(p, x, 0.5), TWO, x).families[0].size == 6
    with pytest.raises(ValueError, match="no units"):
        find_units(lambda p, x: fn(p, x, -0.5), TWO, x)


# Bad input


def test_errors_say_what_to_give():
    x = sample((2, 3))
    with pytest.raises(ValueError, match="takes the parameters first"):
        find_units(lambda x: x, TWO, x)
    with pytest.raises(ValueError, match="train=False, belongs into the lambda"):
        find_units(lambda params, x, train: x if train else -x, TWO, x, False)
    with pytest.raises(ValueError, match="uses none of the parameters"):
        find_units(lambda params, x: x, TWO, x)
    with pytest.raises(ValueError, match=r"(?s)no units.*w\[0\] by input"):
        find_units(lambda params, x: x @ params["w"], {"w": TWO["w"]}, x)
    with pytest.raises(ValueError, match="is no array"):
        find_units(two_layers, TWO | {"activation": jnp.tanh}, x)
    units = find_units(two_layers, TWO, x)
    with pytest.raises(ValueError, match="another structure"):
        units.sum({"w": TWO["w"]})
    with pytest.raises(ValueError, match=r"v has shape \[5, 4\], but \[6, 4\]"):
        units.sum(TWO | {"v": np.zeros((5, 4))})
    with pytest.raises(ValueError, match="one array of bools a family"):
        units.expand([np.ones(5, bool)])


def test_other_leaves_are_pinned():
    """Counters, empty arrays and leaves that fn does not use are in no unit."""
    more = {"step": np.zeros(6, int), "none": np.zeros((0, 6)), "idle": np.ones((6, 6))}
    params = TWO | {name: np.asarray(x, np.float32) for name, x in more.items()}
    params["step"] = np.arange(6)

    def fn(params, x):
        return two_layers(params, x) + params["none"].sum() + params["step"].sum() * 0.0

    with jax.numpy_dtype_promotion("standard"):
        units = find_units(fn, params, sample((2, 3)))
    assert [str(part) for part in units.families[0].slices] == ["b[1]", "v[0]", "w[1]"]
    reasons = {f"{p.path}[{p.axis}]": p.reason for p in units.pinned}
    assert reasons["idle[0]"] == "not used"
    assert reasons["step[0]"] in ("reduce_sum", "not floating-point")
