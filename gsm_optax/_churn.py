"""How many entries change between active and passive from one step to the next."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gsm_optax._paths import is_hole
from gsm_optax._placement import AxisName, most_entries
from gsm_optax._reductions import NAN_KEY, count
from gsm_optax._words import to_count


def track(
    before: Sequence[Any],
    taking: Sequence[int],
    active: Sequence[jax.Array],
    parts: Sequence[jax.Array] | None,
    axis_name: AxisName,
) -> tuple[list[Any], jax.Array]:
    """B of all leaves after a step, and the churn, Σ |B_k − B_{k−1}|.

    Args:
        before: B at the last step, leaf by leaf; `optax.MaskedNode` if not prunable.
        taking: indices of the leaves that had a gradient,
        active: their B at this step,
        parts: and whether they took part: what sits a step out does not change side.
        axis_name: as `mask_by_importance` was given it.
    """
    after = [x if is_hole(x) else jnp.zeros_like(x) for x in before]
    for i, mask in zip(taking, active, strict=True):
        after[i] = mask
    if parts is not None:
        for i, part in zip(taking, parts, strict=True):
            after[i] = jnp.where(part, after[i], before[i])
    pairs = [pair for pair in zip(before, after, strict=True) if not is_hole(pair[0])]
    # No score reaches the second key. It is there because on the CPU a count of one key
    # alone is far slower: see _reductions.
    keys = jnp.array([1, NAN_KEY], jnp.int32)
    high, low = count(_different, pairs, keys, axis_name)
    return after, to_count((high[0], low[0]), most_entries(pairs, axis_name))


def _different(before: jax.Array, after: jax.Array) -> jax.Array:
    """Score of an entry: positive, and so its key 1 or more, where it changed side."""
    return (before != after).astype(jnp.float32)
