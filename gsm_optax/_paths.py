"""Leaves and their names."""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

# What flax puts around arrays, by the class that each of them inherits from: nnx.Param
# and its like, and nn.Partitioned. By name, because flax need not be installed.
_BOXES = {"Variable", "VariableState", "AxisMetadata"}


def leaf_names(tree: Any) -> list[str]:
    """Name all leaves of a tree, as in `dense/kernel`, in the order of `tree.leaves`.

    The `value` that flax's boxes add to a path (`nnx.Param`, `nn.Partitioned`) is left
    away; a field that is called so keeps its name. No two names are the same: leaves
    that would share one, as `{"a": {"b": x}, "a/b": y}` has them, get their path as
    JAX writes it, `['a']['b']` and `['a/b']`.
    """
    names = list(map(_name, leaf_paths(tree)))
    times = Counter(names)
    if len(times) == len(names):
        return names
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [
        name if times[name] == 1 else jax.tree_util.keystr(path)
        for name, path in zip(names, paths, strict=True)
    ]


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_paths(tree: Any) -> Iterator[tuple[Any, ...]]:
    """Paths of all leaves, in their order, without what flax's boxes add."""
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box):
        if not _is_box(node):
            yield path
            continue
        is_inside = lambda x, box=node: x is not box
        for key, content in jax.tree_util.tree_leaves_with_path(node, is_inside):
            added = key == (jax.tree_util.GetAttrKey("value"),)
            for rest in leaf_paths(content):
                yield path + rest if added else path + key + rest


def _is_box(node: Any) -> bool:
    return _is_class_of_boxes(type(node))


@cache
def _is_class_of_boxes(kind: type) -> bool:
    return any(
        base.__name__ in _BOXES and base.__module__.partition(".")[0] == "flax"
        for base in kind.__mro__
    )


def unboxed(scalar: Any) -> Any:
    """The array itself: flax nnx keeps those of the optimizer state as variables."""
    (array,) = jax.tree.leaves(scalar)
    return array


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in a row; of many the first few."""
    names = [name or "the array itself" for name in names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def is_hole(node: Any) -> bool:
    """Whether this stands in the place of a leaf or a branch that is left out."""
    return node is None or is_masked(node)


def filled(tree: Any) -> Any:
    """The tree with leaves in the place of its holes."""
    return jax.tree.map(lambda x: 0 if is_hole(x) else x, tree, is_leaf=is_hole)


def is_masked(node: Any) -> bool:
    """Whether `optax.masked` has taken out a leaf or a branch here."""
    return isinstance(node, optax.MaskedNode)


def check_arrays(tree: Any) -> None:
    """Raise `ValueError` if a leaf is no array, as an equinox module's functions are.

    Numbers pass; so do shapes with a dtype, and float0 and PRNG keys.
    """
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        try:
            jnp.result_type(leaf)
        except TypeError:
            raise ValueError(
                f"{leaf_names(tree)[i]} is {leaf!r}, which is no array. Of an equinox "
                "module give eqx.filter(model, eqx.is_inexact_array)."
            ) from None
