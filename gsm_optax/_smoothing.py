"""Importance averaged over steps: one batch sees little of what an entry is worth."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsm_optax._importance import Pair
from gsm_optax._prunable import prunable_zeros


def nothing_averaged(flags: Any, params: Any, dtype: Any) -> tuple[Any, jax.Array]:
    """The average before the first step, like the prunable parameters, and its counts.

    Every leaf has a count of its own, because some may sit steps out.
    """
    leaves = jax.tree.leaves(flags, is_leaf=lambda x: x is None)
    counts = jnp.zeros(len(leaves), jnp.int32)
    return prunable_zeros(flags, params, dtype), counts


def smooth(
    smoothing: jax.typing.ArrayLike,
    before: Sequence[Any],
    counts: jax.Array,
    taking: Sequence[int],
    new: Sequence[jax.Array],
    pairs: Sequence[Pair],
    parts: Sequence[jax.Array] | None,
) -> tuple[list[Any], jax.Array]:
    r"""Average the scores of all leaves after a step, and over how many steps.

    With smoothing :math:`s`, at the k-th step of a leaf,

    .. math::
        a_k = (1 - c_k) a_{k-1} + c_k T_k, \qquad c_k = \frac{1 - s}{1 - s^k},

    which is the exponential average with Adam's correction of its bias: from the first
    step on the average of equal scores is that score. A weight of zero that scores zero
    is forgotten: what was pruned has no past to come back from.

    Args:
        smoothing: s, in [0, 1).
        before: the averages so far, leaf by leaf; `optax.MaskedNode` if not prunable,
        counts: and over how many steps: int32, shape (leaves,).
        taking: indices of the leaves that had a gradient,
        new: their T at this step, float32,
        pairs: the parameters and gradients it is of,
        parts: and whether they took part: what sits a step out keeps its average.
    """
    came = [1] * len(taking) if parts is None else parts
    counts = counts.at[np.array(taking, int)].add(jnp.array(came, jnp.int32))
    weights, after = _newest_weight(smoothing, counts), list(before)
    for i, score, (param, _), part in zip(taking, new, pairs, came, strict=True):
        mean = (1 - weights[i]) * before[i].astype(jnp.float32) + weights[i] * score
        mean = jnp.where((param == 0) & (score == 0), 0, mean).astype(before[i].dtype)
        mean = mean if parts is None else jnp.where(part, mean, before[i])
        # Stored once, so that all who compare it read the same bits.
        after[i] = lax.optimization_barrier(mean)
    return after, counts


def _newest_weight(smoothing: jax.typing.ArrayLike, counts: jax.Array) -> jax.Array:
    """The coefficient c of every leaf, float32; 1 at its first step."""
    log = jnp.log(jnp.asarray(smoothing, jnp.float32))
    steps = jnp.maximum(counts, 1).astype(jnp.float32)
    return jnp.asarray(1 - smoothing, jnp.float32) / -jnp.expm1(steps * log)
