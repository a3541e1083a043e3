"""Leaves and their names."""

from typing import Any

import jax
import jax.numpy as jnp


def path_name(path: tuple[Any, ...]) -> str:
    """Name a leaf, as in `dense/kernel`.

    The boxes that flax puts around arrays (`nnx.Param`, `nn.Partitioned`) add a
    `value` to the path, which is left away.
    """
    box = jax.tree_util.GetAttrKey("value")
    if len(path) > 1 and path[-1] == box:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_arrays(tree: Any) -> None:
    """Raise `ValueError` if a leaf is no array, as an equinox module's functions are.

    Numbers pass; so do shapes with a dtype, and float0 and PRNG keys.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        try:
            jnp.result_type(leaf)
        except TypeError:
            raise ValueError(
                f"{path_name(path)} is {leaf!r}, which is no array. Of an equinox "
                "module give eqx.filter(model, eqx.is_inexact_array)."
            ) from None
