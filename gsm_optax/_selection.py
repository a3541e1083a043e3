"""The exact Q-th greatest score over a pytree, by counting.

Nothing is sorted, concatenated or gathered. The bit pattern of a non-negative float32,
read as an integer, has the order of its value; so the threshold is found by a search
over integers, in which every pass reads the leaves once and counts the entries at or
above several candidate thresholds. Every count is a reduction to a scalar, and that is
all that devices have to exchange.

This file knows only jax.
"""

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NAN_KEY = 0x7F800001  # one above the pattern of +inf
"""The order key of every NaN: NaN ranks above everything."""

PROBES = 15  # thresholds counted per pass


class Selection(NamedTuple):
    """The outcome of a search.

    An entry is active iff its `order_key` is at least `key`.
    """

    key: jax.Array  # int32, shape (), in [0, NAN_KEY]
    num_active: jax.Array  # int32, shape ()

    @property
    def threshold(self) -> jax.Array:
        """The least score that is active: the float32 whose bits are the key."""
        return lax.bitcast_convert_type(self.key, jnp.float32)


def order_key(score: jax.Array) -> jax.Array:
    """Map float32 scores to int32 keys of the same order, in [0, NAN_KEY].

    Zero and everything below has key 0; all NaNs share the greatest key.
    """
    bits = lax.bitcast_convert_type(score, jnp.int32) & 0x7FFFFFFF
    return jnp.where(score <= 0, 0, jnp.minimum(bits, NAN_KEY))


def num_kept(ratio: Any, total: int) -> Any:
    """Q = N − round(ratio·N): exact for a static ratio, in float32 for an array."""
    if not isinstance(ratio, jax.Array):
        return total - round(Fraction(float(ratio)) * total)
    passive = jnp.round(ratio.astype(jnp.float32) * jnp.float32(total))
    return total - jnp.clip(passive, 0, total).astype(jnp.int32)


@partial(jax.jit, static_argnames="score")
def select(
    score: Callable[..., jax.Array],
    leaves: Sequence[tuple[jax.Array, ...]],
    kept: jax.Array,
) -> Selection:
    """Find the threshold that keeps the `kept` greatest scores over all leaves.

    Args:
        score: maps one element of `leaves`, unpacked, to float32 scores.
        leaves: the arguments of `score`, one tuple per leaf.
        kept: Q, an integer scalar in [0, N].

    Returns:
        A `Selection`: every entry that ties with the Q-th greatest score is active, an
        entry with a score of zero is active only if Q = N, NaN always is.
    """
    total = sum(args[0].size for args in leaves)
    kept = jnp.asarray(kept, jnp.int32)

    def cond(bracket):
        low, high, num_low = bracket
        return (high - low > 1) & (num_low != kept)

    def body(bracket):
        low, high, num_low = bracket
        step = jnp.maximum((high - low) // (PROBES + 1), 1)
        probes = [jnp.minimum(low + step * i, high - 1) for i in range(1, PROBES + 1)]
        counts = _count(score, leaves, probes)
        for probe, count in zip(probes, counts, strict=True):
            enough = count >= kept
            low = jnp.where(enough, probe, low)
            num_low = jnp.where(enough, count, num_low)
        for probe, count in zip(reversed(probes), reversed(counts), strict=True):
            high = jnp.where(count < kept, probe, high)
        return low, high, num_low

    num_positive = _count(score, leaves, [jnp.int32(1)])[0]
    start = jnp.int32(1), jnp.int32(NAN_KEY + 1), num_positive
    low, _, num_low = lax.while_loop(cond, body, start)
    key = jnp.where(kept == total, 0, low)
    num_active = jnp.where(kept == total, total, num_low)
    return Selection(key, num_active)


def _count(score, leaves, probes) -> list[jax.Array]:
    """For each probe, how many entries of all leaves have a key that reaches it."""
    counts = [jnp.int32(0)] * len(probes)
    for args in leaves:
        keys = order_key(score(*args))
        counts = [c + jnp.sum(keys >= p) for c, p in zip(counts, probes, strict=True)]
    return counts


def count_reaching(
    score: Callable[..., jax.Array],
    leaves: Sequence[tuple[jax.Array, ...]],
    thresholds: Sequence[float],
) -> list[int]:
    """How many scores over all leaves reach each threshold (NaN reaches all)."""
    # By their bits, because XLA may flush a subnormal threshold to zero.
    keys = [_key_of(t) for t in thresholds]
    return [int(count) for count in _jitted_count(score, leaves, keys)]


def _key_of(threshold: float) -> int:
    if math.isnan(threshold):
        return NAN_KEY
    return struct.unpack("<i", struct.pack("<f", threshold))[0]


_jitted_count = jax.jit(_count, static_argnames="score")
