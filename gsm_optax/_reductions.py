"""How many scores reach a threshold, over any pytree on any mesh.

A score is compared by its order key: the bit pattern of a non-negative float32, read
as an integer, has the order of its value. Counts are reductions of every leaf to one
scalar per threshold, which is all that devices exchange; they are exact beyond 2³¹
entries, because they are summed in two words.

This file knows only jax.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsm_optax._placement import AxisName, Leaves, reduce_everywhere, shares
from gsm_optax._words import LARGEST, Words, carry, to_words

INF_KEY = 0x7F800000
"""The key of inf."""

NAN_KEY = INF_KEY + 1
"""The least key of a NaN: every NaN reaches it, and nothing else."""

ScoreFn = Callable[..., jax.Array]  # the arrays of a leaf -> float32, sign bit clear


def order_key(score: jax.Array) -> jax.Array:
    """Map float32 scores, sign bit clear, to int32 keys of the same order.

    The key of zero is 0; those of NaNs are NAN_KEY or more.
    """
    return lax.bitcast_convert_type(score, jnp.int32)


def count(
    score: ScoreFn, leaves: Leaves, thresholds: jax.Array, axis_name: AxisName = None
) -> Words:
    """Count the keys that reach each of K thresholds, over all leaves and devices.

    Args:
        score: maps one element of `leaves`, unpacked, to float32 scores.
        leaves: the arguments of `score`, one tuple a leaf: arrays of equal shapes, and
            scalars behind them.
        thresholds: int32 keys, shape (K,).
        axis_name: inside `shard_map` or `pmap`, the axis or axes to sum over.

    Returns:
        High and low words, int32, shape (K,) each.

    Raises:
        ValueError: if leaves live on different meshes.
    """

    def here(leaves, thresholds, plain):
        form = _sums if plain else _fused
        return _total(_counts_by_leaf(score, leaves, thresholds, form))

    across = partial(_count_across, score)
    return reduce_everywhere(here, across, leaves, thresholds, axis_name)


def smallest_reaching(
    score: ScoreFn, leaves: Leaves, threshold: jax.Array, axis_name: AxisName = None
) -> jax.Array:
    """Return the smallest key of all that reaches the threshold, or else NAN_KEY."""
    here, across = partial(_smallest, score), partial(_smallest_across, score)
    return reduce_everywhere(here, across, leaves, threshold, axis_name)


def _count_across(score, leaves, thresholds, names):
    """Count on this device and add up; of devices that hold copies, one counts."""
    counts = _counts_by_leaf(score, leaves, thresholds, _fused)
    counts = [
        part if share.counted is True else jnp.where(share.counted, part, 0)
        for part, share in zip(counts, shares(leaves, names), strict=True)
    ]
    return carry(*lax.psum(jnp.stack(_total(counts)), names))


def _smallest_across(score, leaves, threshold, names):
    least = _smallest(score, leaves, threshold, plain=False)
    # Leaves may be split over some of these axes only, and pmin takes only axes over
    # which its operand may differ (jax 0.12 raises): zero times the index does.
    return lax.pmin(least + 0 * sum(map(lax.axis_index, names)), names)


def _smallest(score, leaves, threshold, plain):
    least = [_leaf_smallest(score, args, threshold, plain) for args in leaves]
    return jnp.min(jnp.stack(least))


@partial(jax.jit, static_argnames=("score", "plain"))
def _leaf_smallest(score, args, threshold, plain):
    key = order_key(score(*args))
    reaching = jnp.where(key >= threshold, jnp.minimum(key, NAN_KEY), NAN_KEY)

    def fused(reaching):  # see _variadic: the second operand keeps it one loop
        least, most = np.int32(NAN_KEY), np.int32(0)
        both = lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]))
        axes = tuple(range(reaching.ndim))
        pair = lax.reduce((reaching, reaching), (least, most), both, axes)
        return lax.optimization_barrier(pair)[0]

    if plain:
        return jnp.min(reaching)
    return lax.platform_dependent(reaching, cpu=fused, default=jnp.min)


def _counts_by_leaf(score, leaves, thresholds, form) -> list[jax.Array]:
    return [_leaf_counts(score, args, thresholds, form) for args in leaves]


@partial(jax.jit, static_argnames=("score", "form"))  # traced once for equal shapes
def _leaf_counts(score, args, thresholds, form) -> jax.Array:
    """Counts of shape (rows, K), none of them above LARGEST."""
    # Without the barrier XLA computes the scores once, ahead of the loop that calls
    # this, and stores them: n · 4 bytes, and slower on the CPU.
    thresholds, args = lax.optimization_barrier((thresholds, args))
    key = order_key(score(*args))
    by_row = form(key, thresholds, _countable_axes(key.shape))
    return by_row.reshape(-1, thresholds.size)


def _countable_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As many trailing axes as one int32 can count."""
    size, axes = 1, []
    for axis in reversed(range(len(shape))):
        size *= shape[axis]
        if size > LARGEST:
            break
        axes.append(axis)
    return tuple(axes)


def _total(counts: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    high, low = to_words(jnp.concatenate(counts))  # scalars only: (leaves, K)
    return carry(*(jnp.sum(word, 0, jnp.int32) for word in (high, low)))


def _fused(key, thresholds, axes):
    return lax.platform_dependent(
        key,
        thresholds,
        cpu=lambda key, thresholds: _variadic(key, thresholds, axes),
        default=lambda key, thresholds: _sums(key, thresholds, axes),
    )


def _sums(key, thresholds, axes):
    """One plain sum per threshold, which accelerators fuse and every mesh can split."""
    return jnp.stack([jnp.sum(key >= t, axes, jnp.int32) for t in thresholds], -1)


def _variadic(key, thresholds, axes):
    """All thresholds in one reduction.

    On the CPU a plain integer sum becomes a reduce-window, which is never fused: it
    writes its operand out (n · 4 bytes a threshold, 72 ms against 9 ms for eight
    thresholds on 25 M entries). A reduction with several operands stays one loop, and
    vectorises.
    """
    return sum_together([(key >= t).astype(jnp.int32) for t in thresholds], axes)


def sum_together(operands: Sequence[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    """Sum K int32 arrays over `axes` in one loop; shape (..., K)."""

    def add(a, b):
        return tuple(x + y for x, y in zip(a, b, strict=True))

    zeros = (np.int32(0),) * len(operands)
    return jnp.stack(lax.reduce(tuple(operands), zeros, add, axes), -1)
