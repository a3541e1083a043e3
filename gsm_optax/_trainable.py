"""Parts of a model that sit a step out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsm_optax._importance import among
from gsm_optax._placement import Leaves
from gsm_optax._reductions import ScoreFn
from gsm_optax._words import Words


def flags_of(trainable: Any, updates: Any, taking: Sequence[int]) -> list[jax.Array]:
    """One bool scalar for each leaf that `taking` names, traced or not.

    Args:
        trainable: a bool or bool scalar at every leaf of the updates.
        updates: gradients; None and `optax.MaskedNode` included.
        taking: indices among the leaves of the updates, None included and
            `optax.MaskedNode` not.
    """
    is_hole = lambda x: x is None or isinstance(x, optax.MaskedNode)
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_hole)
    try:
        flags = treedef.flatten_up_to(trainable)
    except ValueError as error:
        raise ValueError(
            f"trainable must be a tree like the gradients, with a bool a leaf. {error}"
        ) from error
    # Whole parts that optax.masked has taken out are no leaves to the selection.
    present = [
        flag
        for leaf, flag in zip(leaves, flags, strict=True)
        if not isinstance(leaf, optax.MaskedNode)
    ]
    return [jnp.asarray(present[i], bool) for i in taking]


def only_part(
    score: ScoreFn, scored: Leaves, entries: Sequence[Words], parts: Sequence[jax.Array]
) -> tuple[ScoreFn, Leaves, list[Words]]:
    """Score and count only the leaves whose flag in `parts` is true.

    The scores of the others are zero, so that they are never the Q-th greatest; the
    flag travels as one scalar a leaf. How many entries take part is known at run time
    only.
    """
    scored = [(*args, part) for args, part in zip(scored, parts, strict=True)]
    counted = [
        (jnp.where(part, np.int32(high), 0), jnp.where(part, np.int32(low), 0))
        for (high, low), part in zip(entries, parts, strict=True)
    ]
    return among(score), scored, counted
