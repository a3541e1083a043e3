"""Names of leaves: what flax's boxes add is left away, and nothing else."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from gsm_optax import sparsity_report

pytestmark = pytest.mark.optimize(False)

ONE = jnp.ones((2, 2))


class Attention(eqx.Module):
    query: jax.Array
    key: jax.Array
    value: jax.Array


class Lone(eqx.Module):
    value: jax.Array


class Outer(eqx.Module):
    value: Lone


class Pair(NamedTuple):
    value: jax.Array
    other: jax.Array


class OwnParam(nnx.Param):
    """A user's own kind of variable is a box like flax's."""


class NNXModel(nnx.Module):
    def __init__(self):
        self.key = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.scale = OwnParam(jnp.ones(2))
        self.tree = nnx.Param({"a": ONE, "b": ONE})
        self.value = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        init = linen.initializers.ones
        for name, wrap in [
            ("key", linen.with_partitioning),
            ("other", linen.with_logical_partitioning),
            ("value", lambda init, names: init),
        ]:
            x = linen.Dense(
                2, use_bias=False, kernel_init=wrap(init, (None, "model")), name=name
            )(x)
        return x


NNX_NAMES = ["key/kernel", "scale", "tree/a", "tree/b", "value/kernel"]
TREES = {
    "query, key, value": (
        lambda: {"attn": Attention(ONE, ONE, ONE)},
        ["attn/query", "attn/key", "attn/value"],
    ),
    "the only field": (lambda: [Lone(ONE), ONE], ["0/value", "1"]),
    "a value of a value": (lambda: Outer(Lone(ONE)), ["value/value"]),
    "a named tuple": (lambda: {"p": Pair(ONE, ONE)}, ["p/value", "p/other"]),
    "with holes": (lambda: {"attn": Attention(None, None, ONE)}, ["attn/value"]),
    "a key": (lambda: {"a": {"value": ONE}, "value": ONE}, ["a/value", "value"]),
    "nnx state": (lambda: nnx.state(NNXModel()), NNX_NAMES),
    "nnx module": (lambda: NNXModel(), NNX_NAMES),
    "nnx box in a module": (lambda: {"m": Lone(nnx.Param(ONE))}, ["m/value"]),
    "linen boxes": (
        lambda: LinenModel().init(jax.random.key(0), jnp.ones((1, 2)))["params"],
        ["key/kernel", "other/kernel", "value/kernel"],
    ),
    "the same name twice": (
        lambda: {"a": {"b": ONE, "c": ONE}, "a/b": ONE},
        ["['a']['b']", "a/c", "['a/b']"],
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_leaves_are_named_by_their_path_without_boxes(name):
    make, names = TREES[name]
    assert [leaf.path for leaf in sparsity_report(make()).leaves] == names
