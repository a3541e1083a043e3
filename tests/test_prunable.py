"""Which leaves take part by default, on the networks that people train."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

from gsm_optax import (
    gradient_importance,
    gsm,
    gsm_sgd,
    kernels,
    mask_by_importance,
    metrics,
    prune,
    sparsity_report,
)

pytestmark = pytest.mark.optimize(False)

KEY = jax.random.key(0)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)


class EqxBlock(eqx.Module):
    norm1: eqx.nn.RMSNorm
    layer: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        self.norm1, self.layer = eqx.nn.RMSNorm(8, use_bias=False), eqx.nn.LayerNorm(8)
        self.up = eqx.nn.Linear(8, 8, key=key)
        self.head = eqx.nn.Linear(8, 1, key=key)


def attention():
    model = linen.MultiHeadDotProductAttention(num_heads=2)
    return model.init(KEY, jnp.ones((1, 4, 8)))["params"]


def nnx_stack():
    make = nnx.vmap(Block, in_axes=0, out_axes=0)
    return nnx.state(
        make(
            nnx.Rngs(0).split(4)
            if hasattr(nnx.Rngs, "split")
            else nnx.Rngs(0).fork(split=4)
        ),
        nnx.Param,
    )


class Body(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return linen.Dense(8)(linen.LayerNorm()(x)), None


def linen_stack():
    scan = linen.scan(
        Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=4
    )
    return scan().init(KEY, jnp.ones((2, 8)), None)["params"]


def eqx_stack():
    stack = eqx.filter_vmap(EqxBlock)(jax.random.split(KEY, 4))
    return eqx.filter(stack, eqx.is_inexact_array)


TREES = {  # the tree, and all that is prunable of it
    "attention heads": (
        attention,
        {f"{x}/kernel" for x in ("query", "key", "value", "out")},
    ),
    "equinox convolution": (
        lambda: eqx.filter(eqx.nn.Conv2d(3, 4, 3, key=KEY), eqx.is_array),
        {"weight"},
    ),
    "equinox blocks, stacked": (eqx_stack, {"up/weight", "head/weight"}),
    "nnx.vmap": (nnx_stack, {"dense/kernel"}),
    "linen.scan": (linen_stack, {"Dense_0/kernel"}),
    "quantised": (
        lambda: {
            "dense": {"kernel": jnp.ones((4, 8), jnp.int8), "scale": jnp.ones((1, 8))},
            "other": {"w": jnp.ones((4, 8), jnp.int8), "w_scales": jnp.ones((4, 8))},
        },
        set(),
    ),
    "haiku": (
        lambda: {
            "linear": {"w": jnp.ones((4, 8, 8)), "b": jnp.ones((4, 8))},
            "layer_norm": {"scale": jnp.ones((4, 8)), "offset": jnp.ones((4, 8))},
        },
        {"linear/w"},
    ),
    "by hand": (
        lambda: {
            "w1": jnp.ones((3, 1)),
            "b1": jnp.ones((3, 2)),
            "lora": {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 8))},
            "token": jnp.ones((1, 1, 8)),
            "embedding": jnp.ones((8, 4)),
        },
        {"w1", "lora/a", "lora/b", "embedding"},
    ),
    "norms by their own name": (
        lambda: {
            **{name: jnp.ones((4, 8)) for name in ("attention_norm", "ln1", "RMS")},
            **{"q_norm": jnp.ones((4, 2, 8)), "normal": jnp.ones((4, 8))},
            "quantised": {"zero_point": jnp.ones((4, 8)), "w": jnp.ones((4, 8), int)},
        },
        {"normal"},
    ),
    "flat names": (
        lambda: {
            "layers.0.mlp.weight": jnp.ones((4, 8)),
            "layers.input_layernorm.weight": jnp.ones((4, 8)),
            "norm.weight": jnp.ones((4, 8)),
            "conv/weight": jnp.ones((4, 8)),
            "norm/w": jnp.ones((4, 8)),
        },
        {"layers.0.mlp.weight", "conv/weight"},
    ),
    "real and imaginary parts": (
        lambda: {
            "kernel": {"real": jnp.ones((8, 1)), "imaginary": jnp.ones((8, 1))},
            "bias": {"real": jnp.ones((4, 8)), "imaginary": jnp.ones((4, 8))},
        },
        {"kernel/real", "kernel/imaginary"},
    ),
    "parts alone": (
        lambda: {"real": jnp.ones((8, 2)), "imaginary": jnp.ones((8, 2))},
        {"real", "imaginary"},
    ),
    "weight normalisation": (
        lambda: {"weight_g": jnp.ones((8, 1)), "weight_v": jnp.ones((8, 1))},
        {"weight_v"},
    ),
    "capitals": (
        lambda: {"W1": jnp.ones((3, 8)), "B1": jnp.ones((3, 8)), "b": jnp.ones((3, 8))},
        {"W1", "b"},
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_kernels_and_embeddings_are_prunable_and_nothing_else(name):
    make, wanted = TREES[name]
    params = make()
    report = sparsity_report(params)
    assert {leaf.path for leaf in report.leaves if leaf.prunable} == wanted
    flags = kernels(params)
    assert jax.tree.structure(flags) == jax.tree.structure(params)
    assert [leaf.prunable for leaf in report.leaves] == jax.tree.leaves(flags)


def test_the_report_shows_what_will_go_before_training():
    rows = str(sparsity_report(TREES["haiku"][0]())).splitlines()
    shown = {row.split()[0]: "yes" in row.split() for row in rows[1:5]}
    assert shown == {
        "layer_norm/offset": False,
        "layer_norm/scale": False,
        "linear/b": False,
        "linear/w": True,
    }


LORA = {"a": jnp.ones((4, 2)), "b": jnp.zeros((2, 4))}


@pytest.mark.parametrize(
    "tx",
    [gsm_sgd(0.1, 0.5), optax.chain(gsm(jnp.float32(0.5)), optax.scale(-1.0))],
    ids=["gsm_sgd", "chain"],
)
def test_a_leaf_that_can_never_become_active_is_warned_of_once(tx):
    with pytest.warns(UserWarning, match=r"all zeros: b.*prunable=.*another") as w:
        state = tx.init(LORA)
    assert len(w) == 1
    _, state = tx.update(jax.tree.map(jnp.ones_like, LORA), state, LORA)
    assert metrics(LORA, state)["gsm/shortfall"] == 0  # a alone has its eight
    dead = {"a": jnp.zeros((4, 2)), "b": jnp.zeros((2, 4))}
    _, state = tx.update(jax.tree.map(jnp.ones_like, dead), state, dead)
    assert metrics(dead, state)["gsm/shortfall"] == 8


@pytest.mark.parametrize(
    "tx",
    [
        mask_by_importance(0.5, importance=gradient_importance),
        mask_by_importance(0.5, prunable={"a": True, "b": False}),
        mask_by_importance(0.0),
        mask_by_importance(optax.linear_schedule(0.0, 0.9, 9)),
    ],
    ids=["importance", "prunable", "all active", "all active at first"],
)
def test_no_warning_where_the_remedy_was_taken(tx):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.init(LORA)


def test_values_that_are_not_known_are_not_judged():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(gsm_sgd(0.1, 0.5).init)(LORA)
        jax.eval_shape(gsm_sgd(0.1, 0.5).init, LORA)


# What the state knows needs not be said twice


HEAD = {"body": jnp.full((4, 4), 0.1), "head": jnp.arange(1.0, 17.0).reshape(4, 4)}


def trained_head(wrap=lambda tx: tx):
    tx = wrap(gsm_sgd(0.1, 0.75, prunable={"body": False, "head": True}))
    return tx.update(HEAD, tx.init(HEAD), HEAD)[1]


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.masked(tx, True)])
def test_the_prunable_leaves_are_those_of_the_optimizer(wrap):
    state = trained_head(wrap)
    pruned = prune(HEAD, 0.75, opt_state=state)
    assert (pruned["body"] == HEAD["body"]).all()
    assert jnp.count_nonzero(pruned["head"]) == 4
    watched = metrics(pruned, state)
    assert watched["gsm/active_fraction"] == watched["gsm/density"] == 0.25
    assert metrics({"head": pruned["head"]}, state) == watched


def test_a_part_of_the_model_is_pruned_by_its_own_state():
    tx = optax.masked(gsm_sgd(0.1, 0.75), {"body": False, "head": True})
    _, state = tx.update(HEAD, tx.init(HEAD), HEAD)
    pruned = prune(HEAD, 0.75, opt_state=state)
    assert (pruned["body"] == HEAD["body"]).all()
    assert metrics(pruned, state)["gsm/density"] == 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics({"body": HEAD["body"]}, trained_head()), "among head, which"),
        (
            lambda: prune(HEAD, 0.5, opt_state=trained_head(), prunable=True),
            "prunable= or opt_state=",
        ),
        (lambda: prune(HEAD, 0.5, opt_state=optax.EmptyState()), "found 0 states"),
    ],
)
def test_what_does_not_agree_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
