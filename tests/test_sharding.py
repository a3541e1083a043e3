"""Any mesh gives the result of one device, and devices exchange nothing but counts."""

import contextlib
import re
from collections import Counter
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from trees import assert_same, mesh_of, place, place_scalars, with_ties

from gsm_optax import (
    _reductions,
    _selection,
    _words,
    gsm_sgd,
    magnitude_mask,
    mask_by_importance,
    prune,
    sparsity_report,
)

KILOBYTE = 1024

MIXED = {  # every way to lie on a mesh of axes x and y; 7 and 5 divide by nothing
    "fsdp": ((64, 24), P(("x", "y"))),
    "tensor": ((24, 64), P(None, "y")),
    "both": ((32, 48), P("x", "y")),
    "turned": ((3, 16, 8), P(None, "y", "x")),
    "uneven": ((7, 5), P()),
    "bias": ((40,), P("y")),
}
SHAPES = {name: shape for name, (shape, _) in MIXED.items()}


LAYOUTS = {
    "mixed": {name: spec for name, (_, spec) in MIXED.items()},
    "replicated": dict.fromkeys(SHAPES, P()),
}


def few(tree):
    """Three leaves of a tree are enough where little depends on their layout."""
    return {name: tree[name] for name in ("both", "uneven", "bias")}


draw = partial(with_ties, SHAPES)


def make_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


def optimizer(**options):
    """Make an optimizer whose products are exact, its factors being powers of two.

    Otherwise the compiler may contract a product and a sum in one program and not in
    another, and the last bits of the momentum differ though the masks are the same.
    """
    return gsm_sgd(2**-3, ratio=0.9, momentum=0.5, weight_decay=2**-7, **options)


def train(step, params, state, place_grads=lambda grads: grads, steps=4):
    """Run some steps with given gradients; return what there is after each of them."""
    history = []
    for seed in range(1, steps + 1):
        params, state, updates = step(params, state, place_grads(draw(seed)))
        history.append((params, state, updates))
    return history


@pytest.fixture(scope="module")
def on_one_device():
    tx, params = optimizer(), jax.tree.map(jnp.asarray, draw(0))
    return jax.device_get(train(jax.jit(make_step(tx)), params, tx.init(params)))


@pytest.mark.parametrize(
    ("mode", "layout"),
    [
        ("auto", "mixed"),
        ("auto, set_mesh", "mixed"),
        ("explicit", "mixed"),
        ("explicit", "replicated"),
    ],
)
def test_training_equals_one_device_and_keeps_its_sharding(mode, layout, on_one_device):
    tx, layout = optimizer(), LAYOUTS[layout]
    with mesh_of(mode) as mesh:
        params = place(draw(0), mesh, layout)
        state = place_scalars(tx.init(params), mesh)
        traced, step = [], make_step(tx)
        counted = jax.jit(lambda *args: traced.append(1) or step(*args))
        put = lambda grads: place(grads, mesh, layout)
        history = train(counted, params, state, put)
    assert_same(history, on_one_device)
    assert len(traced) == 1  # later steps do not compile again
    for tree in (history[-1][0], optax.tree.get(history[-1][1], "trace")):
        for name, leaf in tree.items():
            wanted = NamedSharding(mesh, layout[name])
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name


def test_sizes_that_no_axis_divides_may_be_split():
    """The compiler pads such shards; padding must not be counted."""
    tx = mask_by_importance(0.8)
    params, grads = (
        {name: jnp.asarray(leaf) for name, leaf in few(draw(seed)).items()}
        for seed in (0, 1)
    )
    expected = jax.jit(tx.update)(grads, tx.init(params), params)
    with mesh_of("auto") as mesh:
        # Uneven shards exist only inside a program, by a constraint.
        split = NamedSharding(mesh, P("x", "y"))
        wide = lambda x: (
            jax.lax.with_sharding_constraint(x, split) if x.ndim == 2 else x
        )

        def update(grads, params):
            grads, params = jax.tree.map(wide, (grads, params))
            return tx.update(grads, tx.init(params), params)

        put = lambda tree: place(tree, mesh, LAYOUTS["replicated"])
        assert_same(jax.jit(update)(put(grads), put(params)), expected)


@pytest.mark.optimize(False)
@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_pruning_equals_one_device_and_keeps_its_sharding(mode):
    alone = jax.tree.map(jnp.asarray, few(draw(0)))
    with mesh_of(mode) as mesh:
        params = place(alone, mesh, LAYOUTS["mixed"])
        mask, pruned = magnitude_mask(params, 0.9), prune(params, 0.9)
    assert_same(mask, magnitude_mask(alone, 0.9))
    assert_same(pruned, prune(alone, 0.9))
    for name, leaf in pruned.items():
        assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)


@pytest.mark.optimize(False)
def test_report_on_an_explicit_mesh_counts_copies_once():
    alone = jax.tree.map(jnp.asarray, few(draw(0)))
    with mesh_of("explicit") as mesh:
        report = sparsity_report(place(alone, mesh, LAYOUTS["mixed"]))
    assert report == sparsity_report(alone)


# What devices exchange, read from the compiled program


class Collective(NamedTuple):
    """One instruction that talks to other devices."""

    op: str
    computation: str  # empty for the entry computation: once a step, not once a pass
    size: int  # bytes of its result on one device


OPS = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|"
    "collective-permute|collective-broadcast|send|recv"
)
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(rf" = (\(.*?\)|\S+) ({OPS})(?:-start)?\(")
ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\w*\[([\d,]*)\]")


def collectives(compiled):
    """Return every collective of a compiled program."""
    found, computation = [], ""
    for line in compiled.as_text().splitlines():
        if header := HEADER.match(line):
            computation = "" if header[1] else header[2]
        elif match := INSTRUCTION.search(line):
            found.append(Collective(match[2], computation, size_of(match[1])))
    return found


def size_of(hlo_type):
    """Bytes of an array or tuple as HLO writes its type."""
    return sum(
        int(bits or 8) // 8 * int(np.prod([int(n) for n in dims.split(",") if n]))
        for bits, dims in ARRAY.findall(hlo_type)
    )


def compiled_step(mesh, layout, shapes, dtype=jnp.float32, tx=None):
    """Compile a step for shapes alone."""
    tx = tx or optimizer()
    struct = lambda shape, spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    params = {name: struct(shape, layout[name]) for name, shape in shapes.items()}
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P())
        ),
        jax.eval_shape(tx.init, params),
    )
    state = optax.tree.set(state, trace=params)
    step = jax.jit(make_step_without_updates(tx), donate_argnums=(0, 1))
    return step.lower(params, state, params).compile()


def make_step_without_updates(tx):
    step = make_step(tx)
    return lambda *args: step(*args)[:2]


def larger(shapes):
    """Four times the entries, as many leaves."""
    return {name: (*shape[:-1], 4 * shape[-1]) for name, shape in shapes.items()}


def twice(tree):
    """Two leaves for each, of the same shape or layout."""
    return {f"{name}.{i}": leaf for name, leaf in tree.items() for i in range(2)}


def assert_all_reduces_of_scalars(found, per_pass):
    """All of it all-reduces, so many in the body of every loop that has any."""
    assert {c.op for c in found} == {"all-reduce"}
    in_loops = Counter(c.computation for c in found if c.computation)
    assert in_loops
    assert max(in_loops.values()) <= per_pass, found


def test_collectives_are_read_from_a_program_that_has_them():
    with mesh_of("auto") as mesh:
        x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=row_split(mesh))
        everywhere = NamedSharding(mesh, P())
        gather = jax.jit(lambda x: x, out_shardings=everywhere)
        total = jax.jit(lambda x: jnp.sum(x, 0), out_shardings=everywhere)
        passes = jax.jit(
            lambda x: jax.lax.fori_loop(0, 9, lambda _, s: jnp.sin(s + x.sum()), 1.0)
        )
        assert collectives(gather.lower(x).compile()) == [
            ("all-gather", "", 64 * 64 * 4)
        ]
        assert collectives(total.lower(x).compile()) == [("all-reduce", "", 64 * 4)]
        (inside,) = collectives(passes.lower(x).compile())
        assert (inside.op, inside.size) == ("all-reduce", 4)


def row_split(mesh):
    return NamedSharding(mesh, P("x"))


@pytest.fixture(scope="module", params=["auto", "explicit"])
def mixed(request):
    """Return a kind of mesh and the collectives of a step in the mixed layout on it."""
    with mesh_of(request.param) as mesh:
        found = collectives(compiled_step(mesh, LAYOUTS["mixed"], SHAPES))
    return request.param, found


@pytest.mark.optimize(False)
def test_devices_exchange_scalars_only(mixed):
    """On an Auto mesh one all-reduce for each way in which leaves are split."""
    mode, found = mixed
    assert_all_reduces_of_scalars(found, per_pass=1 if mode == "explicit" else 5)
    assert max(c.size for c in found) <= KILOBYTE


@pytest.mark.optimize(False)
def test_devices_exchange_as_many_bytes_for_larger_leaves(mixed):
    mode, found = mixed
    with mesh_of(mode) as mesh:
        step = compiled_step(mesh, LAYOUTS["mixed"], larger(SHAPES))
    assert sorted(c[::2] for c in collectives(step)) == sorted(c[::2] for c in found)


@pytest.mark.optimize(False)
def test_devices_exchange_as_often_for_more_leaves(mixed):
    mode, found = mixed
    with mesh_of(mode) as mesh:
        step = compiled_step(mesh, twice(LAYOUTS["mixed"]), twice(SHAPES))
    assert Counter(c.op for c in collectives(step)) == Counter(c.op for c in found)


@pytest.mark.optimize(False)
def test_auto_mesh_one_all_reduce_a_pass_if_all_is_split_alike():
    shapes = {name: (8 * shape[0], *shape[1:]) for name, shape in few(SHAPES).items()}
    layout = {name: P("data") if len(s) > 1 else P() for name, s in shapes.items()}
    with mesh_of("auto", (8,), ("data",)) as mesh:
        found = collectives(compiled_step(mesh, layout, shapes))
    assert_all_reduces_of_scalars(found, per_pass=1)
    assert sum(c.size for c in found) <= 4 * KILOBYTE


TRANSFORMER = {  # layers stacked; FSDP over x, tensor parallelism over y
    "embedding": ((1024, 128), P("y", "x")),
    "qkv": ((4, 128, 384), P(None, "x", "y")),
    "out": ((4, 128, 128), P(None, "y", "x")),
    "up": ((4, 128, 512), P(None, "x", "y")),
    "down": ((4, 512, 128), P(None, "y", "x")),
    "norm": ((4, 128), P()),
}


@pytest.mark.optimize(False)
def test_transformer_step_compiles_from_shapes_alone():
    """Some kilobytes for the search, beside about a megabyte of parameters a device."""
    shapes = {name: shape for name, (shape, _) in TRANSFORMER.items()}
    layout = {name: spec for name, (_, spec) in TRANSFORMER.items()}
    with mesh_of("explicit") as mesh:
        step = compiled_step(mesh, layout, shapes, jnp.bfloat16)
        sgd = optax.sgd(2**-3, momentum=0.5)
        plain = compiled_step(mesh, layout, shapes, jnp.bfloat16, sgd)
    assert_all_reduces_of_scalars(collectives(step), per_pass=1)
    assert max(c.size for c in collectives(step)) <= KILOBYTE
    # The compiler of jax 0.8.0 copies donated bfloat16 arrays: optax's momentum, and
    # with two readers the parameters as well. Later ones copy nothing.
    copies = 2 * plain.memory_analysis().temp_size_in_bytes
    assert step.memory_analysis().temp_size_in_bytes < copies + 32 * KILOBYTE


# Inside shard_map, where a device sees its own shards


def specs_of(tree):
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def shard_mapped(tx, mesh, params, state, **options):
    """Make a jitted step inside shard_map, sharded as its arguments are."""
    params, state = specs_of(params), specs_of(state)
    return jax.jit(
        jax.shard_map(
            make_step(tx),
            mesh=mesh,
            in_specs=(params, state, params),
            out_specs=(params, state, params),
            **options,
        )
    )


def test_shard_map_with_axis_names_equals_one_device(on_one_device):
    layout = LAYOUTS["mixed"]
    with mesh_of("auto") as mesh:
        tx, put = optimizer(axis_name=("x", "y")), lambda t: place(t, mesh, layout)
        params = put(draw(0))
        state = place_scalars(tx.init(params), mesh)
        step = shard_mapped(tx, mesh, params, state, check_vma=True)
        assert_same(train(step, params, state, put), on_one_device)


def test_shard_map_over_one_named_axis_unchecked_equals_one_device():
    """Unchecked, every prunable leaf must be split over the axis, as all are here."""
    shapes = {"a": (16, 5), "b": (8, 3, 7), "bias": (9,)}
    layout = {"a": P("data"), "b": P("data"), "bias": P()}
    alone, params = optimizer(), jax.tree.map(jnp.asarray, with_ties(shapes, 0))
    grads = with_ties(shapes, 1)
    expected = jax.jit(make_step(alone))(params, alone.init(params), grads)
    with mesh_of("auto", (8,), ("data",)) as mesh:
        tx, put = optimizer(axis_name="data"), lambda t: place(t, mesh, layout)
        params = put(params)
        state = place_scalars(tx.init(params), mesh)
        step = shard_mapped(tx, mesh, params, state, check_vma=False)
        assert_same(step(params, state, put(grads)), expected)


@pytest.mark.optimize(False)
def test_shard_map_exchanges_one_small_all_reduce_a_pass():
    with mesh_of("auto") as mesh:
        tx = optimizer(axis_name=("x", "y"))
        params = place(draw(0), mesh, LAYOUTS["mixed"])
        state = place_scalars(tx.init(params), mesh)
        step = shard_mapped(tx, mesh, params, state)
        found = collectives(step.lower(params, state, params).compile())
    assert_all_reduces_of_scalars(found, per_pass=1)
    assert max(c.size for c in found) <= KILOBYTE


COPIES = {"kernel": (4, 8), "bias": (8,)}
NONE = pytest.raises(ValueError, match=r"Pass axis_name=\(\) if each holds them all")


@pytest.mark.parametrize(
    ("around", "axis_name"),
    [
        ("pmap", None),
        ("pmap", ()),
        ("checked", None),
        ("checked", "data"),
        ("unchecked", None),
        ("unchecked", ()),
        ("unchecked", "data"),
    ],
)
def test_data_parallelism_with_copies_of_the_parameters(around, axis_name):
    """The most common loop: gradients are averaged, every device holds all."""
    alone, tx = optimizer(), optimizer(axis_name=axis_name)
    params = {k: jnp.round(64 * p) / 64 for k, p in with_ties(COPIES, 0).items()}
    batch = jnp.arange(-4.0, 4.0).reshape(8, 1)  # all products and means are exact
    loss = lambda params, x: sum(jnp.sum(x) * jnp.sum(p**2) for p in params.values())
    state = tx.init(params)

    def local(params, state, x):
        grads = jax.grad(loss)(params, x)
        if around != "checked":  # where jax.grad has summed over devices itself
            grads = jax.lax.pmean(grads, "data")
        return make_step(tx)(params, state, grads)[:2]

    total = jax.grad(loss)(params, batch)
    average = jax.tree.map(lambda g: g / 8, total)
    grads = total if around == "checked" else average
    expected = jax.jit(make_step(alone))(params, state, grads)[:2]
    with mesh_of("auto", (8,), ("data",)) as mesh:
        options = {"mesh": mesh, "in_specs": (P(), P(), P("data")), "out_specs": P()}
        step = {
            "pmap": lambda: jax.pmap(
                local, axis_name="data", in_axes=(None, None, 0), out_axes=None
            ),
            "checked": lambda: jax.jit(jax.shard_map(local, **options)),
            "unchecked": lambda: jax.jit(
                jax.shard_map(local, **options, check_vma=False)
            ),
        }[around]()
        with (
            NONE
            if axis_name is None and around != "checked"
            else (contextlib.nullcontext())
        ):
            assert_same(jax.device_get(step(params, state, batch)), expected)


@pytest.mark.optimize(False)
def test_devices_that_would_choose_apart_are_refused():
    params = {"w": jnp.ones((8, 8))}
    with mesh_of("auto", (8,), ("data",)) as mesh:
        for axis_name, specs, message in [
            (None, (P("data"), P("data")), "split over the axes .'data'"),
            ((), (P("data"), P("data")), "split over the axes .'data'"),
            ((), (P(), P("data")), "average gradients first"),
            ("data", (P("data"), P()), "are now none, and were .* at init"),
        ]:
            if "init" in message:  # without a name, a row is no kernel
                params = params["w"]
            tx = mask_by_importance(0.5, axis_name=axis_name)
            state = tx.init(params)

            def update(params, x, tx=tx, state=state):
                grads = jax.tree.map(lambda p: p * jnp.sum(x), params)
                return tx.update(grads, state, params)[0]

            with pytest.raises(ValueError, match=message):
                jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=P("data"))(
                    params, jnp.ones(8)
                )


@pytest.mark.optimize(False)
@pytest.mark.parametrize("form", ["arrays", "shapes", "init inside", "prune"])
def test_shardings_that_only_jit_knows(form):
    """Uncommitted arrays, laid out by in_shardings: no mesh is seen in tracing."""
    params, grads = (jax.tree.map(jnp.asarray, few(draw(seed))) for seed in (0, 1))
    tx = mask_by_importance(0.8)
    update = lambda grads, params: tx.update(grads, tx.init(params), params)
    expected = jax.jit(update)(grads, params)
    with mesh_of("auto") as mesh:
        layout = {name: NamedSharding(mesh, LAYOUTS["mixed"][name]) for name in params}
        jitted = jax.jit(update, in_shardings=(layout, layout))
        if form == "arrays":
            assert_same(jitted(grads, params), expected)
        elif form == "shapes":
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (grads, params)
            )
            assert_same(jitted.lower(*shapes).compile()(grads, params), expected)
        elif form == "init inside":
            inside = jax.jit(lambda: update(grads, params)[0], out_shardings=layout)
            assert_same(inside(), expected[0])
        else:
            pruned = jax.jit(lambda p: prune(p, 0.8), in_shardings=(layout,))(params)
            assert_same(pruned, prune(params, 0.8))


def normalised(param, grad):
    score = jnp.abs(param * grad)
    return score / jnp.sqrt(jnp.sum(score**2))


@pytest.mark.optimize(False)
@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_an_importance_sees_the_whole_leaf(mode):
    tx = mask_by_importance(0.8, importance=normalised)
    params, grads = (jax.tree.map(jnp.asarray, few(draw(seed))) for seed in (0, 1))
    alone, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    with mesh_of(mode) as mesh:
        params, grads = (place(t, mesh, LAYOUTS["mixed"]) for t in (params, grads))
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    # The norm is summed in another order: one entry on the edge may change places.
    different = sum(
        np.sum((np.asarray(updates[k]) != 0) != (np.asarray(alone[k]) != 0))
        for k in updates
    )
    assert different <= 2


@pytest.mark.optimize(False)
@pytest.mark.parametrize("around", ["nothing", "jit", "shard_map"])
def test_unknown_axis_name_is_named(around):
    tx = mask_by_importance(0.5, axis_name="nope")
    params = jnp.ones((8, 8))
    update = lambda params: tx.update(params, tx.init(params), params)[0]
    with mesh_of("auto") as mesh:
        if around == "jit":
            update = jax.jit(update)
        elif around == "shard_map":
            update = jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P())
        with pytest.raises(NameError, match="nope"):
            update(params)


@pytest.mark.optimize(False)
@pytest.mark.parametrize("jit", [False, True])
def test_leaves_on_different_meshes_are_refused(jit):
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    with mesh_of("auto") as one, mesh_of("auto", (2, 4), ("p", "q")) as other:
        params["a"] = jax.device_put(params["a"], NamedSharding(one, P("x")))
        params["b"] = jax.device_put(params["b"], NamedSharding(other, P("p")))
    tx = mask_by_importance(0.5)
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError, match="different meshes"):
        update(params, tx.init(params), params)


# The platform switch, where no accelerator is at hand


def lowered(platform):
    tx, params = optimizer(), jax.tree.map(jnp.asarray, draw(0))
    traced = jax.jit(make_step(tx)).trace(params, tx.init(params), params)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def lowered_on_mesh(platform):
    tx = optimizer()
    with mesh_of("explicit") as mesh:
        params = place(draw(0), mesh, LAYOUTS["mixed"])
        state = place_scalars(tx.init(params), mesh)
        traced = jax.jit(make_step(tx)).trace(params, state, params)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def variadic_reductions(text):
    """Count the reductions with more operands than an argmax has."""
    return sum(
        line.count(" init:") > 2
        for line in text.splitlines()
        if "stablehlo.reduce" in line
    )


@pytest.mark.optimize(False)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("lower", [lowered, lowered_on_mesh])
def test_accelerators_get_plain_sums(lower, platform):
    text = lower(platform)
    assert "stablehlo.reduce" in text
    assert variadic_reductions(text) == 0
    for op in ("stablehlo.sort", "top_k", "gather"):
        assert op not in text, op


@pytest.mark.optimize(False)
def test_cpu_gets_one_reduction_for_all_thresholds():
    assert variadic_reductions(lowered_on_mesh("cpu")) >= 1


# Leaves beyond what one int32 counts, made as small as a test


@pytest.fixture
def small_counters(monkeypatch):
    """Pretend that an int32 counts to 100; nothing compiled otherwise may be reused."""
    for module in (_reductions, _selection, _words):
        monkeypatch.setattr(module, "LARGEST", 100)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("small_counters")
def test_one_device_counts_beyond_one_counter(on_one_device):
    tx, params = optimizer(), jax.tree.map(jnp.asarray, draw(0))
    history = train(jax.jit(make_step(tx)), params, tx.init(params))
    assert_same_values(history, on_one_device)


@pytest.mark.usefixtures("small_counters")
def test_explicit_mesh_counts_beyond_one_counter(on_one_device):
    tx = optimizer()
    with mesh_of("explicit") as mesh:
        put = lambda tree: place(tree, mesh, LAYOUTS["mixed"])
        params = put(draw(0))
        state = place_scalars(tx.init(params), mesh)
        history = train(jax.jit(make_step(tx)), params, state, put)
    assert_same_values(history, on_one_device)


def assert_same_values(actual, expected):
    """Equal numbers: where int32 is too small, a count of entries is a float32."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), expected)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_a_mesh_of_one_device_is_one_device(mode, on_one_device):
    tx = optimizer()
    with mesh_of(mode, shape=(1, 1)) as mesh:
        params = place(draw(0), mesh, LAYOUTS["mixed"])
        state = place_scalars(tx.init(params), mesh)
        put = lambda grads: place(grads, mesh, LAYOUTS["mixed"])
        history = train(jax.jit(make_step(tx)), params, state, put)
    assert_same(history, on_one_device)
