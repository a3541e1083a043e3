"""The exact Q-th greatest score over a pytree, by counting.

Nothing is sorted and no leaf is concatenated or gathered: a search over order keys, in
which every pass reads the leaves once and counts the entries at or above several
thresholds.

This file knows only jax.
"""

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsm_optax._bracket import Bracket, next_probes, offset_by, search
from gsm_optax._counting import (
    LARGEST,
    NAN_KEY,
    WORD,
    Leaves,
    Score,
    Words,
    carry,
    count,
    excess,
    is_local,
    num_entries,
    round_product,
    smallest_reaching,
    to_words,
)
from gsm_optax._rows import select_by_rows

# A warm start spreads eight thresholds about the last one. A factor of two in the score
# is 2²³ in its key, and in training the threshold drifts by 10 to 60 % a step.
FAN = np.array([-16, -6, -3, -1, 1, 3, 6, 16], np.int32) * 2**20
SPREAD = np.array([-4, -1.6, -0.6, -0.15, 0.15, 0.6, 1.6, 4], np.float32)


class Selection(NamedTuple):
    """The outcome of a search: an entry is active iff its order key reaches `key`."""

    key: jax.Array  # int32, shape (), in [0, NAN_KEY]
    num_active: jax.Array  # shape (): int32, or float32 from 2³¹ entries on

    @property
    def threshold(self) -> jax.Array:
        """The least active score: the float32 that has the bits of the key."""
        return lax.bitcast_convert_type(self.key, jnp.float32)


def num_kept(ratio: Any, total: int) -> tuple[Any, Any]:
    """Q = N − round(ratio·N) in words: exact, or rounded in float32 for an array."""
    if not isinstance(ratio, jax.Array):
        return to_words(total - round(Fraction(float(ratio)) * total))
    return _less(to_words(total), _in_single_precision(ratio, np.float32(total)))


def num_kept_of_part(ratio: Any, total: Words) -> Words:
    """`num_kept` for a number of entries that is only known at run time, in words."""
    if not isinstance(ratio, jax.Array):
        return _less(total, round_product(Fraction(float(ratio)), total))
    high, low = (word.astype(jnp.float32) for word in total)
    return _less(total, _in_single_precision(ratio, high * 2**WORD + low))


def _in_single_precision(ratio: jax.Array, total: Any) -> Words:
    """round(ratio·N) in float32, in words."""
    passive = jnp.round(ratio.astype(jnp.float32) * total)
    passive = jnp.clip(passive, 0, total)
    high = jnp.floor(passive / 2**WORD)
    low = passive - high * 2**WORD
    return high.astype(jnp.int32), low.astype(jnp.int32)


def _less(total: Words, passive: Words) -> Words:
    high, low = carry(total[0] - passive[0], total[1] - passive[1])
    # float32 may round the passive count above the total.
    return jnp.maximum(high, 0), jnp.where(high < 0, 0, low)


@partial(jax.jit, static_argnames=("score", "axis_name"))
def select(
    score: Score,
    leaves: Leaves,
    kept: tuple[jax.Array, jax.Array],
    start: jax.Array,
    axis_name: Any = None,
) -> Selection:
    """Find the threshold that keeps the Q greatest scores over all leaves.

    Args:
        score: maps one element of `leaves`, unpacked, to float32 scores.
        leaves: the arguments of `score`, one tuple of equal-shaped arrays a leaf.
        kept: Q in [0, N], in words.
        start: float32 scalar, a guess of the threshold: it saves passes, no more.
        axis_name: inside `shard_map` or `pmap`, the axes that leaves are split over.

    Returns:
        A `Selection`. Entries that tie with the Q-th greatest score are all active; an
        entry with a score of zero is active only if Q = N; NaN always is. The threshold
        is the Q-th greatest score; 0 if Q = N; NaN if Q = 0; and the smallest subnormal
        number if fewer than Q scores are positive.
    """
    kept = jnp.asarray(kept[0], jnp.int32), jnp.asarray(kept[1], jnp.int32)
    leaves = [args for args in leaves if args[0].size]
    total = num_entries(leaves, axis_name)
    if not leaves:
        return Selection(jnp.int32(0), jnp.int32(0))

    def by_counts(leaves, kept, start):
        return _select_by_counts(score, leaves, kept, total, start, axis_name)

    def by_rows(leaves, kept, start):
        del start
        return select_by_rows(score, leaves, (kept[0] << WORD) + kept[1])

    if axis_name is None and is_local(leaves) and total <= LARGEST:
        found, key = lax.platform_dependent(
            leaves, kept, start, cpu=by_rows, default=by_counts
        )
    else:
        found, key = by_counts(leaves, kept, start)
    return _selection(found, key, kept, total)


def _select_by_counts(
    score, leaves, kept, total, start, axis_name
) -> tuple[Bracket, Any]:
    """Search by counting alone, as any platform and mesh can; in four passes and up."""

    def excess_at(probes):
        return excess(count(score, leaves, probes, axis_name), kept)

    # Every entry reaches key 0, and none the key above that of NaN.
    over, under = excess(to_words(total), kept), excess((0, 0), kept)
    whole = Bracket(jnp.int32(0), jnp.int32(NAN_KEY + 1), over, under)
    guess = lax.bitcast_convert_type(start, jnp.int32)
    cold, warm = next_probes(whole, whole, SPREAD), offset_by(guess, FAN, whole)
    first = jnp.where((guess > 0) & (guess < NAN_KEY), warm, cold)
    found = search(excess_at, whole, first, SPREAD)
    return found, smallest_reaching(score, leaves, found.low, axis_name)


def _selection(found: Bracket, key: jax.Array, kept, total: int) -> Selection:
    """Settle the cases in which there is no Q-th greatest positive score."""
    everything = (found.low == 0) & (found.over == 0)
    too_few = (found.low == 0) & (found.over != 0)  # the bracket is then [0, 1)
    nothing = (kept[0] == 0) & (kept[1] == 0)
    key = jnp.where(everything, 0, jnp.where(too_few, 1, key))
    key = jnp.where(nothing, NAN_KEY, key)
    over = jnp.where(too_few, found.under, found.over)
    return Selection(key, to_count((kept[0], kept[1] + over), total))


def to_count(words: Words, total: int) -> jax.Array:
    """Join the words of a count of some of `total` entries, in `count_dtype`."""
    if count_dtype(total) == jnp.int32:
        return (words[0] << WORD) + words[1]
    high, low = (word.astype(jnp.float32) for word in words)
    return high * 2**WORD + low


def count_dtype(total: int) -> Any:
    """Return the dtype that a number of active entries is reported in."""
    return jnp.int32 if total <= LARGEST else jnp.float32


def count_reaching(
    score: Score, leaves: Leaves, thresholds: Sequence[float]
) -> list[int]:
    """How many scores over all leaves reach each threshold (NaN reaches all)."""
    # By their bits, because XLA may flush a subnormal threshold to zero.
    keys = jnp.asarray([_key_of(t) for t in thresholds], jnp.int32)
    high, low = _jitted_count(score, leaves, keys)
    return [(int(h) << WORD) + int(w) for h, w in zip(high, low, strict=True)]


def _key_of(threshold: float) -> int:
    if math.isnan(threshold):
        return NAN_KEY
    return struct.unpack("<i", struct.pack("<f", threshold))[0]


_jitted_count = jax.jit(count, static_argnames="score")
