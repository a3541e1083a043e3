"""Every framework's trees and loops choose, train and prune as a dict does."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from flax import linen, nnx
from flax.training.train_state import TrainState
from trees import first_step, normal

from gsm_optax import (
    Recorder,
    apply_mask,
    freeze_pruned,
    gsm_sgd,
    kernels,
    magnitude_mask,
    metrics,
    prune,
    sparsity_report,
)

pytestmark = pytest.mark.optimize(False)

RATIO, STEPS = 0.75, 5
SIZES = (6, 16, 3)
KERNEL_ENTRIES = 6 * 16 + 16 * 3
KEPT = KERNEL_ENTRIES // 4


SHAPES = {  # what every framework starts from
    "dense": {"kernel": (6, 16), "bias": (16,)},
    "head": {"kernel": (16, 3), "bias": (3,)},
}
values = partial(normal, SHAPES)


def data():
    return normal(((32, 6), (32, 3)), 1)


def optimizer():
    return gsm_sgd(2**-4, RATIO, momentum=0.75, weight_decay=2**-3)


def loss_of(predict):
    x, y = data()
    return jnp.mean((predict(x) - y) ** 2)


def train(params, predict, tx=None):
    """The plain optax loop, on any tree that `predict(params, x)` reads."""
    tx = tx or optimizer()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: loss_of(partial(predict, p)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


def mlp(dense_kernel, dense_bias, head_kernel, head_bias, x):
    hidden = jax.nn.relu(x @ dense_kernel + dense_bias[None])
    return hidden @ head_kernel + head_bias[None]


# Each returns the trained tree, its optimizer state, and how to read it as `values()`.


def as_dict():
    predict = lambda p, x: mlp(
        p["dense"]["kernel"],
        p["dense"]["bias"],
        p["head"]["kernel"],
        p["head"]["bias"],
        x,
    )
    return *train(values(), predict), lambda tree: tree


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "bias"],
    meta_fields=["name"],
)
@dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array
    name: str


def as_dataclasses():
    start = [Layer(**layer, name=name) for name, layer in values().items()]
    predict = lambda p, x: mlp(p[0].kernel, p[0].bias, p[1].kernel, p[1].bias, x)
    read = lambda tree: {
        layer.name: {"kernel": layer.kernel, "bias": layer.bias} for layer in tree
    }
    return *train(start, predict), read


class NnxMLP(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(6, 16, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)
        for name, layer in values().items():
            for key, value in layer.items():
                getattr(getattr(self, name), key)[...] = value

    def __call__(self, x):
        return self.head(nnx.relu(self.dense(x)))


@nnx.jit
def nnx_step(model, optimizer):
    wrt = nnx.DiffState(0, optimizer.wrt)
    optimizer.update(model, nnx.grad(lambda m: loss_of(m), argnums=wrt)(model))


def as_nnx():
    model = NnxMLP()
    watched = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    for _ in range(STEPS):
        nnx_step(model, watched)
    return nnx.state(model, nnx.Param), watched.opt_state, nnx.to_pure_dict


class LinenMLP(linen.Module):
    boxed: bool = False

    @linen.compact
    def __call__(self, x):
        init = linen.initializers.zeros
        if self.boxed:
            init = linen.with_partitioning(init, ("in", "out"))
        dense = partial(linen.Dense, kernel_init=init)
        return dense(3, name="head")(linen.relu(dense(16, name="dense")(x)))


def as_linen(boxed=False):
    model = LinenMLP(boxed)
    empty = model.init(jax.random.key(0), jnp.ones((1, 6)))["params"]
    leaves = jax.tree.leaves(values())
    start = jax.tree.unflatten(jax.tree.structure(empty), leaves)
    state = TrainState.create(apply_fn=model.apply, params=start, tx=optimizer())

    @jax.jit
    def step(state):
        predict = lambda p, x: state.apply_fn({"params": p}, x)
        grads = jax.grad(lambda p: loss_of(partial(predict, p)))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(STEPS):
        state = step(state)
    return state.params, state.opt_state, linen.meta.unbox


class EqxMLP(eqx.Module):
    dense: eqx.nn.Linear
    head: eqx.nn.Linear
    activation: Callable

    def __init__(self):
        self.activation = jax.nn.relu
        for name, layer in values().items():
            linear = eqx.nn.Linear(*layer["kernel"].shape, key=jax.random.key(0))
            arrays = lambda x: (x.weight, x.bias)
            new = (layer["kernel"].T, layer["bias"])
            setattr(self, name, eqx.tree_at(arrays, linear, new))

    def __call__(self, x):
        return self.head(self.activation(self.dense(x)))


def as_equinox():
    params, static = eqx.partition(EqxMLP(), eqx.is_inexact_array)
    predict = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    read = lambda tree: {
        name: {"kernel": getattr(tree, name).weight.T, "bias": getattr(tree, name).bias}
        for name in ("dense", "head")
    }
    return *train(params, predict), read


FRAMEWORKS = {
    "dataclasses": as_dataclasses,
    "nnx": as_nnx,
    "linen": as_linen,
    "linen, partitioned": partial(as_linen, boxed=True),
    "equinox": as_equinox,
}


@pytest.fixture(scope="module")
def plain():
    with jax.numpy_dtype_promotion("strict"):
        return as_dict()


@pytest.fixture(scope="module", params=FRAMEWORKS)
def trained(request):
    with jax.numpy_dtype_promotion("strict"):
        return FRAMEWORKS[request.param]()


assert_close = partial(trees.assert_close, rtol=2e-5, atol=2e-6)


def test_training_is_that_of_a_dict(trained, plain):
    params, state, read = trained
    assert_close(read(params), plain[0])
    num_active = optax.tree.get(state, "num_active")
    assert int(jax.tree.leaves(num_active)[0]) == KEPT


def test_pruning_keeps_the_type_and_the_same_entries(trained, plain):
    params, _, read = trained
    pruned = prune(params, RATIO)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    assert_close(read(pruned), prune(plain[0], RATIO))
    mask = magnitude_mask(params, RATIO)
    assert sum(jnp.sum(m) for m in jax.tree.leaves(mask)) == KEPT + 16 + 3
    same = jax.tree.map(jnp.array_equal, apply_mask(params, mask), pruned)
    assert all(jax.tree.leaves(same))


@pytest.mark.promotes
def test_frozen_zeros_stay_through_adam(trained):
    params, _, _ = trained
    mask = magnitude_mask(params, RATIO)
    params = apply_mask(params, mask)
    tx = optax.chain(optax.adamw(1e-2), freeze_pruned(mask))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = first_step(tx, ones, params)
    for m, x in zip(
        jax.tree.leaves(mask),
        jax.tree.leaves(optax.apply_updates(params, updates)),
        strict=True,
    ):
        assert not jnp.any(x[~m])
        assert jnp.all(x[m] != 0)


def test_report_and_metrics_read_it(trained):
    params, state, _ = trained
    report = sparsity_report(prune(params, RATIO))
    assert report.prunable.entries == KERNEL_ENTRIES
    assert report.prunable.nonzero == KEPT
    assert metrics(params, state)["gsm/num_active"] == KEPT
    recorder = Recorder()
    recorder(STEPS, params, state)
    assert list(recorder.records[0]["layers"]) == [
        leaf.path for leaf in report.leaves if leaf.prunable
    ]


def test_paths_are_named_as_people_name_them(request, trained):
    paths = {
        "dataclasses": ["0/kernel", "0/bias", "1/kernel", "1/bias"],
        "nnx": NAMES,
        "linen": NAMES,
        "linen, partitioned": NAMES,
        "equinox": ["dense/weight", "dense/bias", "head/weight", "head/bias"],
    }[request.node.callspec.params["trained"]]
    params, _, _ = trained
    assert [leaf.path for leaf in sparsity_report(params).leaves] == paths


NAMES = ["dense/bias", "dense/kernel", "head/bias", "head/kernel"]


def test_nnx_takes_a_tree_of_bools_in_its_boxes():
    model = NnxMLP()
    params = nnx.state(model, nnx.Param)
    tree = nnx.map_state(lambda path, x: path == ("head", "kernel"), params)
    for prunable in (tree, nnx.to_pure_dict(tree)):
        tx = gsm_sgd(0.1, RATIO, prunable=prunable)
        watched = nnx.Optimizer(model, tx, wrt=nnx.Param)
        nnx_step(model, watched)
        pruned = prune(nnx.state(model, nnx.Param), RATIO, opt_state=watched.opt_state)
        zeros = jax.tree.map(lambda x: int((x == 0).sum()), nnx.to_pure_dict(pruned))
        assert zeros == {
            "dense": {"bias": 0, "kernel": 0},
            "head": {"bias": 0, "kernel": 36},
        }


def test_nnx_optimizer_with_a_filter_has_a_budget_of_its_own():
    model = NnxMLP()
    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    watched = nnx.Optimizer(model, optimizer(), wrt=head)
    for _ in range(STEPS):
        nnx_step(model, watched)
    num_active = optax.tree.get(watched.opt_state, "num_active")
    assert int(jax.tree.leaves(num_active)[0]) == 16 * 3 // 4
    start, end = values(), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(end["dense"]["kernel"], start["dense"]["kernel"])
    assert jnp.all(end["head"]["kernel"] != start["head"]["kernel"])


def test_partitioned_boxes_survive():
    params, state, _ = as_linen(boxed=True)
    is_box = lambda x: isinstance(x, linen.Partitioned)
    for tree in (params, prune(params, RATIO), optax.tree.get(state, "trace")):
        assert tree["dense"]["kernel"].names == ("in", "out")
        assert sum(map(is_box, jax.tree.leaves(tree, is_leaf=is_box))) == 2


@pytest.mark.parametrize(
    "call",
    [
        kernels,
        sparsity_report,
        lambda model: prune(model, RATIO),
        lambda model: gsm_sgd(0.1, RATIO).init(model),
    ],
)
def test_a_whole_equinox_module_is_refused_with_the_remedy(call):
    with pytest.raises(ValueError, match=r"^activation is .*no array.*eqx\.filter"):
        call(EqxMLP())
