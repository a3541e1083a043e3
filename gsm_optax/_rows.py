"""The Q-th greatest key in about two reads of the leaves, on one CPU device.

Counting alone needs four to seven reads. Here a sample of fixed size tells where to put
the first four probes. Every read counts at them, and collects all keys between the
middle two, as the greatest, the least and the sum of the bracketed keys of every row.
The first read narrows the bracket to some ten thousand entries, too many for that, and
interpolation guesses the wanted key to within a few hundred. So few are they that
hardly any row holds more than three: after the second read the rest of the search reads
only what was collected. A row with more, or a wrong guess, costs another read.

One function of a leaf counts and collects, because XLA compiles every function for
every leaf; it costs no more to run, because four counts of a row fit into one integer.

What is collected is stored, 16 bytes a row of 128 entries.
This file knows only jax.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsm_optax._bracket import (
    Bracket,
    interpolate,
    narrow,
    next_probes,
    offset_by,
    probes_at,
    search,
)
from gsm_optax._placement import Leaves
from gsm_optax._reductions import NAN_KEY, ScoreFn, order_key, sum_together

SAMPLE = 2**18  # entries of the sample: 2¹⁶ to 2¹⁹ cost and gain about the same
BLOCK = 16  # neighbours that are sampled together: a cache line of float32
ROW = 128  # entries of a row, whose counts fit in eight bits; not 64: a third slower
SMALL = 2**15  # leaves of fewer entries are joined,
MEDIUM = 2**18  # and of fewer than this, where there are more than MANY leaves:
MANY = 128  # to join takes half as long to compile, and a step half as long again
GROUP = 16  # leaves that are joined: XLA copies eight or fewer by the entry, slowly
CHAINS = 4  # groups that are joined at a time
ONE = np.int32(1)
FEW = 300  # once no more are left, collect the whole bracket: ends ties early

# Every read counts at four probes and collects between the middle ones.
# Where they are at first, in standard errors of the sample:
FIRST = np.array([-5, -1, 1, 5], np.float32)
# and later, in standard deviations of the guess;
SPREAD = np.array([-18, -6, 6, 18], np.float32)
# where keys lie on a grid, so many tie that a wider window would overflow rows;
TIED = np.array([-12, -4, 4, 12], np.float32)
# and of a bracket in which few are left, at the low end or the high one.
ENDS = np.array([False, False, True, True])
# Where to count in data that is cheap to read, in standard deviations:
CLOSE = np.array([-4, -1, 0, 1, 4], np.float32)
# and at first, as fractions of the width.
EVENLY = np.arange(1, 6, dtype=np.float32) / 6


class Rows(NamedTuple):
    """What every row holds of the keys; all fields int32, shape (rows,)."""

    counts: jax.Array  # how many reach each of four probes, eight bits a count
    total: jax.Array  # sum of those between the second and the third, wrapped round,
    most: jax.Array  # the greatest
    least: jax.Array  # and the least of them


class Part(NamedTuple):
    """A stretch of one leaf, row-major."""

    leaf: int
    start: int
    stop: int


def select_by_rows(
    score: ScoreFn, leaves: Leaves, kept: jax.Array
) -> tuple[Bracket, jax.Array]:
    """Return the last bracket and the Q-th greatest key, for 1 to 2³¹ − 1 entries."""
    total = sum(args[0].size for args in leaves)
    whole = Bracket(jnp.int32(0), jnp.int32(NAN_KEY + 1), total - kept, -kept)
    first, grid = _sampled(score, leaves, whole)
    groups = _groups([args[0].size for args in leaves])
    number = sum(-(-_entries(group) // ROW) for group in groups)
    nothing = Rows(*(jnp.zeros(number, jnp.int32) for _ in Rows._fields))

    def unfinished(carry):
        bracket, *_, collected = carry
        return (bracket.high - bracket.low > 1) & ~collected

    def one_read(carry):
        old, probes, *_ = carry
        # Behind the barrier the scores are part of the loop; before it XLA would
        # compute them once, ahead of the loop, and store them: n · 4 bytes.
        probes, data = lax.optimization_barrier((probes, leaves))
        rows = _collect_all(score, data, groups, probes)
        reach = _unpack(rows.counts)
        number = reach[1] - reach[2]
        # Up to three different keys a row, or any number of equal ones.
        too_many = (number > 3) & (rows.most != rows.least)
        # In one loop: a plain sum of integers is several, see `sum_together`.
        *reached, incomplete = sum_together([*reach, too_many.astype(jnp.int32)], (0,))
        new = narrow(old, probes, jnp.stack(reached) - kept)
        inside = (new.low == probes[1]) & (new.high == probes[2])
        return new, _probes(old, new, grid), rows, inside & (incomplete == 0)

    start = whole, first, nothing, False
    bracket, _, rows, collected = lax.while_loop(unfinished, one_read, start)
    return _finish(bracket, rows, collected)


def _unpack(counts: jax.Array) -> list[jax.Array]:
    return [lax.shift_right_logical(counts, np.int32(8 * i)) & 0xFF for i in range(4)]


def _probes(old: Bracket, new: Bracket, grid: jax.Array) -> jax.Array:
    """About the guess; or the ends, to collect all between, where few are left."""
    about = next_probes(old, new, jnp.where(grid > 1, TIED, SPREAD), grid)
    # Unless that was just tried: there are more in some row, which only ties explain.
    few = (new.over - new.under <= FEW) & (
        new.high - new.low <= (old.high - old.low) // 4
    )
    return jnp.where(few, jnp.where(ENDS, new.high, new.low), about)


def _groups(sizes: list[int]) -> list[list[Part]]:
    """Which stretches of which leaves make rows together.

    A large leaf is read where it is. Small ones, and what is left of the large ones
    beside whole rows, are joined first: a loop for every leaf is what takes long to
    compile.
    """
    large = SMALL if len(sizes) <= MANY else MEDIUM
    alone, rest = [], []
    for leaf, size in enumerate(sizes):
        whole = size // ROW * ROW if size >= large else 0
        if whole:
            alone.append([Part(leaf, 0, whole)])
        if whole < size:
            rest.append(Part(leaf, whole, size))
    last = len(rest) - len(rest) % GROUP
    joined = [rest[i : i + GROUP] for i in range(0, last, GROUP)]
    return alone + joined + [[part] for part in rest[last:]]


def _entries(group: list[Part]) -> int:
    return sum(part.stop - part.start for part in group)


def _collect_all(score, leaves, groups, probes):
    """`Rows` of all groups, stored one after the other."""
    found: list[Any] = []
    zeros: list[Any] = [np.int32(0)] * CHAINS
    for group in groups:
        if len(group) == 1:
            (part,) = group
            args = leaves[part.leaf]
            found.append(_collect_part(score, args, part[1:], probes))
            continue
        # Or-ed with a zero that depends on the result of an earlier group, so that they
        # share the place where they are joined. (XLA drops a barrier before it lays
        # out memory, and then keeps them all: n · 4 bytes.)
        keys = [
            _keys(score, leaves[part.leaf], part[1:]) | zeros[-CHAINS] for part in group
        ]
        keys = lax.optimization_barrier(jnp.concatenate(keys))
        found.append(_collect_keys(keys, probes))
        zeros.append(jnp.minimum(found[-1][0][0], 0))
    stored = [jnp.concatenate(parts) for parts in zip(*found, strict=True)]
    return Rows(*lax.optimization_barrier(stored))


@partial(jax.jit, static_argnames=("score", "stretch"))  # traced once for equal shapes
def _keys(score, args, stretch):
    return order_key(score(*args)).reshape(-1)[slice(*stretch)]


@partial(jax.jit, static_argnames=("score", "stretch"))
def _collect_part(score, args, stretch, probes):
    return _collect_keys(_keys(score, args, stretch), probes)


@jax.jit
def _collect_keys(keys, probes):
    """`Rows` of flat keys, ROW of them a row."""
    key = jnp.pad(keys, (0, -keys.size % ROW), constant_values=-1).reshape(-1, ROW)
    below, above = key < probes[2], key >= probes[1]
    reached = jnp.where(below, 0x101, jnp.where(key < probes[3], 0x10101, 0x1010101))
    operands = (
        jnp.where(above, reached, (key >= probes[0]).astype(jnp.int32)),
        jnp.where(below & above, key, 0),
        jnp.where(below, key, 0),
        jnp.where(above, key, NAN_KEY),
    )

    def combine(a, b):
        *a, most_a, least_a = a
        *b, most_b, least_b = b
        sums = (x + y for x, y in zip(a, b, strict=True))
        return *sums, jnp.maximum(most_a, most_b), jnp.minimum(least_a, least_b)

    zero = np.int32(0)
    return lax.reduce(operands, (zero, zero, zero, np.int32(NAN_KEY)), combine, (1,))


def _finish(bracket: Bracket, rows: Rows, collected: jax.Array | bool):
    """The wanted key among the collected ones, or else the lower end of the bracket."""
    counts, total, most, least = rows
    _, from_second, from_third, _ = _unpack(counts)
    number = from_second - from_third
    third = jnp.where(most == least, most, total - most - least)
    first, second = jnp.minimum(number, 1), jnp.clip(number - 1, 0, 1)
    keys = jnp.stack([most, least, third])
    often = jnp.stack([first, second, jnp.maximum(number - 2, 0)])

    def excess_at(probes):
        return bracket.under + _count(keys, probes, often)

    # Without a collection, the bracket has been narrowed to one key: it is the one.
    last = bracket._replace(high=jnp.where(collected, bracket.high, bracket.low + 1))
    found = search(excess_at, last, probes_at(last, EVENLY), CLOSE)
    reaching = jnp.where((keys >= found.low) & (often > 0), keys, NAN_KEY)
    wanted, _ = _least(reaching, reaching)
    return found, jnp.where(collected, wanted, bracket.low)


def _count(keys: jax.Array, probes: jax.Array, often: Any = ONE) -> jax.Array:
    hits = [jnp.where(keys >= probe, often, np.int32(0)) for probe in probes]
    return sum_together(hits, tuple(range(keys.ndim)))


def _least(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least of each of two arrays of keys.

    Together, and both kept, because alone either takes several loops, see
    `sum_together`: compiled in 30 ms instead of 80.
    """

    def combine(x, y):
        return jnp.minimum(x[0], y[0]), jnp.minimum(x[1], y[1])

    most = np.int32(2**31 - 1), np.int32(2**31 - 1)
    found = lax.reduce((a, b), most, combine, tuple(range(a.ndim)))
    return lax.optimization_barrier(found)


def _sampled(
    score: ScoreFn, leaves: Leaves, whole: Bracket
) -> tuple[jax.Array, jax.Array]:
    """Probes about the threshold of a sample, in its standard errors; and the grid.

    Products of bfloat16 numbers have 16 bits: their keys are multiples of 256.
    """
    total = sum(args[0].size for args in leaves)
    every = math.ceil(total / SAMPLE) | 1  # odd, to fall on all columns in turn
    sample = [_blocks(score(*args), every) for args in leaves]
    keys = lax.optimization_barrier(order_key(jnp.concatenate(sample)))
    fraction = -whole.under.astype(jnp.float32) / total
    kept = jnp.clip(jnp.round(fraction * keys.size), 1, keys.size).astype(jnp.int32)
    error = jnp.sqrt(keys.size * fraction * (1 - fraction)) + 1
    start = whole._replace(over=keys.size - kept, under=-kept)
    found = search(
        lambda probes: _count(keys, probes) - kept,
        start,
        probes_at(start, EVENLY),
        CLOSE,
        few=error.astype(jnp.int32),
    )
    guess, _, number = interpolate(found)
    width = (found.high - found.low).astype(jnp.float32)
    offsets = jnp.clip((guess + FIRST * error / number) * width, -(2.0**30), 2.0**30)
    # One key up from a tie, so that the bracket can close about it.
    probes = offset_by(
        found.low, offsets.astype(jnp.int32) + (FIRST > 0).astype(np.int32), whole
    )
    # The lowest bit that is set in any key. (As lax.reduce_or it does not compile where
    # the keys turn out to be split over CPU devices.)
    lowest, _ = _least(jnp.where(keys == 0, NAN_KEY, keys & -keys), keys)
    return probes, lowest.astype(jnp.float32)


def _blocks(scores: jax.Array, every: int) -> jax.Array:
    """BLOCK neighbours out of each BLOCK · every, and at least the first of a leaf."""
    flat = scores.reshape(-1)
    number = flat.size // (BLOCK * every)
    if not number:
        return flat[:BLOCK]
    groups = flat[: number * BLOCK * every].reshape(number, BLOCK * every)
    return groups[:, :BLOCK].reshape(-1)
