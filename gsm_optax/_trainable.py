"""Parts of a model that sit a step out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gsm_optax._paths import is_hole, is_masked


def flags_of(trainable: Any, updates: Any, taking: Sequence[int]) -> list[jax.Array]:
    """One bool scalar for each leaf that `taking` names, traced or not.

    Args:
        trainable: a bool or bool scalar at every leaf of the updates.
        updates: gradients; None and `optax.MaskedNode` included.
        taking: indices among the leaves of the updates, None included and
            `optax.MaskedNode` not.
    """
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_hole)
    try:
        flags = treedef.flatten_up_to(trainable)
    except ValueError as error:
        raise ValueError(
            f"trainable must be a tree like the gradients, with a bool a leaf. {error}"
        ) from error
    # Whole parts that optax.masked has taken out are no leaves to the selection.
    present = [
        flag for leaf, flag in zip(leaves, flags, strict=True) if not is_masked(leaf)
    ]
    return [jnp.asarray(present[i], bool) for i in taking]
