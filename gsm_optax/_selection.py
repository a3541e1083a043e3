"""The exact Q-th greatest score over a pytree, by counting.

Nothing is sorted and no leaf is concatenated or gathered: a search over order keys, in
which every pass reads the leaves once and counts the entries at or above several
thresholds.

This file knows only jax.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsm_optax._bracket import Bracket, next_probes, offset_by, search
from gsm_optax._placement import AxisName, Leaves, is_local
from gsm_optax._reductions import INF_KEY, NAN_KEY, ScoreFn, count, smallest_reaching
from gsm_optax._rows import select_by_rows
from gsm_optax._words import LARGEST, WORD, Words, as_int32, excess, to_count

# A warm start spreads eight thresholds about the last one. A factor of two in the score
# is 2²³ in its key, and in training the threshold drifts by 10 to 60 % a step.
FAN = np.array([-16, -6, -3, -1, 1, 3, 6, 16], np.int32) * 2**20
SPREAD = np.array([-4, -1.6, -0.6, -0.15, 0.15, 0.6, 1.6, 4], np.float32)

# Up to so many entries counting alone is as fast on the CPU, and compiles in half the
# time: 0.6 s instead of 1.2 s for three leaves.
SMALL = 2**12


class Selection(NamedTuple):
    """The outcome of a search: an entry is active iff its order key reaches `key`."""

    key: jax.Array  # int32, shape (), in [0, NAN_KEY]
    num_active: jax.Array  # shape (): int32, or float32 from 2³¹ entries on
    threshold: jax.Array  # float32, shape (): the least active score; inf if Q = 0


@partial(jax.jit, static_argnames=("score", "most", "axis_name"))
def select(
    score: ScoreFn,
    leaves: Leaves,
    kept: Words,
    total: Words,
    start: jax.Array,
    *,
    most: int,
    axis_name: AxisName = None,
) -> Selection:
    """Find the threshold that keeps the Q greatest scores over all leaves.

    Args:
        score: maps one element of `leaves`, unpacked, to float32 scores.
        leaves: the arguments of `score`, one tuple a leaf: arrays of equal shapes, and
            scalars behind them.
        kept: Q in [0, N], in words.
        total: the entries of all leaves over all devices, in words.
        start: float32 scalar, a guess of the threshold: it saves passes, no more.
        most: no fewer than `total`, known before tracing.
        axis_name: inside `shard_map` or `pmap`, the axes that leaves are split over.

    Returns:
        A `Selection`. Entries that tie with the Q-th greatest score are all active; an
        entry with a score of zero is active only if Q = N; NaN always is. The threshold
        is the Q-th greatest score; 0 if Q = N; inf if Q = 0; and the smallest subnormal
        number if fewer than Q scores are positive.
    """
    kept, total = as_int32(kept), as_int32(total)
    leaves = [args for args in leaves if args[0].size]
    if not leaves:
        return Selection(jnp.int32(0), jnp.int32(0), jnp.float32(0))

    def by_counts(leaves, kept, start):  # on any platform and mesh
        def excess_at(probes):
            return excess(count(score, leaves, probes, axis_name), kept)

        found = search_all_keys(excess_at, kept, total, start)
        return found, smallest_reaching(score, leaves, found.low, axis_name)

    def by_rows(leaves, kept, start):
        del start
        return select_by_rows(score, leaves, (kept[0] << WORD) + kept[1])

    if is_local(leaves, axis_name) and SMALL < most <= LARGEST:
        found, key = lax.platform_dependent(
            leaves, kept, start, cpu=by_rows, default=by_counts
        )
    else:
        found, key = by_counts(leaves, kept, start)
    return _settle(found, key, kept, total, most)


def search_all_keys(
    excess_at: Callable[[jax.Array], jax.Array],
    kept: Words,
    total: Words,
    start: jax.Array,
) -> Bracket:
    """Search from a guess of the threshold, or from the whole range of keys.

    Args:
        excess_at: how many more than Q entries reach each of K ascending keys.
        kept: Q, in words.
        total: N, in words.
        start: float32 scalar, the guess; zero if there is none.
    """
    # Every entry reaches key 0, and none the key above that of NaN.
    over, under = excess(total, kept), excess((0, 0), kept)
    whole = Bracket(jnp.int32(0), jnp.int32(NAN_KEY + 1), over, under)
    guess = lax.bitcast_convert_type(start, jnp.int32)
    cold, warm = next_probes(whole, whole, SPREAD), offset_by(guess, FAN, whole)
    first = jnp.where((guess > 0) & (guess < INF_KEY), warm, cold)
    return search(excess_at, whole, first, SPREAD)


def _settle(
    found: Bracket, key: jax.Array, kept: Words, total: Words, most: int
) -> Selection:
    """Settle the cases in which there is no Q-th greatest positive score."""
    # Not told by the search, which also sees the zeros of leaves that take no part.
    everything = (kept[0] == total[0]) & (kept[1] == total[1])
    too_few = (found.low == 0) & ~everything  # the bracket is then [0, 1)
    nothing = (kept[0] == 0) & (kept[1] == 0)
    key = jnp.where(too_few, 1, key)
    key = jnp.where(everything, 0, jnp.where(nothing, NAN_KEY, key))
    over = jnp.where(everything, 0, jnp.where(too_few, found.under, found.over))
    # Not the NaN of that key, which would look like a fault in every log.
    least = jnp.where(nothing & ~everything, INF_KEY, key)
    threshold = lax.bitcast_convert_type(least, jnp.float32)
    return Selection(key, to_count((kept[0], kept[1] + over), most), threshold)
