"""The Q-th greatest key in about two reads of the leaves, on one CPU device.

Counting alone needs four to seven reads. Here a sample of fixed size tells where to put
the first thresholds. The first read counts there, which narrows the bracket to some ten
thousand entries, and interpolation guesses the wanted key to within a few hundred. So
few are they that hardly any row holds more than three: the second read collects all of
them, as the greatest, the least and the sum of the bracketed keys of every row, and the
rest of the search reads only what was collected. A row with more costs another read, a
wrong guess another pair.

What is collected is stored, 16 bytes a row, where a row is the last axis (see `ROW`).
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
from gsm_optax._counting import NAN_KEY, Leaves, Score, order_key, sum_together

SAMPLE = 2**18  # entries of the sample: 2¹⁶ to 2¹⁹ cost and gain about the same
BLOCK = 16  # neighbours that are sampled together: a cache line of float32
ROW = 256  # entries of a row: in rows of 512 keys collide, and cost a read
MOST_ROWS = 2**19  # from so many on rows grow instead, up to 2¹² entries
LARGE = 2**18  # entries of a leaf that is read by itself
GROUP = 2**20  # entries that are joined together, which bounds what is stored
ONE = np.int32(1)
FEW = 300  # once no more are left, collect the whole bracket: ends ties early

# Between which two probes the first read collects, in standard errors of the sample:
FIRST = np.array([-6, 6], np.float32)
# between which later ones do, in standard deviations of the guess;
WINDOW = np.array([-6, 6], np.float32)
# where keys lie on a grid, so many tie that a wider window would overflow rows;
TIED = np.array([-2, 2], np.float32)
# and all of a bracket, as fractions of its width.
WHOLE = np.array([0, 1], np.float32)
# Where to count in data that is cheap to read, in standard deviations:
CLOSE = np.array([-4, -1, 0, 1, 4], np.float32)
# and at first, as fractions of the width.
EVENLY = np.arange(1, 6, dtype=np.float32) / 6


class Rows(NamedTuple):
    """What every row holds of the keys between two probes; int32, shape (rows,)."""

    counts: jax.Array  # of keys that reach the second probe, 2¹⁶ times, plus those
    # between the two;
    total: jax.Array  # of the latter the sum, wrapped round,
    most: jax.Array  # the greatest
    least: jax.Array  # and the least


class Part(NamedTuple):
    """A stretch of one leaf, row-major."""

    leaf: int
    start: int
    stop: int


def select_by_rows(
    score: Score, leaves: Leaves, kept: jax.Array
) -> tuple[Bracket, jax.Array]:
    """Return the last bracket and the Q-th greatest key, for 1 to 2³¹ − 1 entries."""
    total = sum(args[0].size for args in leaves)
    whole = Bracket(jnp.int32(0), jnp.int32(NAN_KEY + 1), total - kept, -kept)
    first, grid = _sampled(score, leaves, whole)
    width = max(ROW, 1 << (total // MOST_ROWS).bit_length())
    groups = _groups([args[0].size for args in leaves], width)
    number = sum(-(-_entries(group) // width) for group in groups)
    nothing = Rows(*(jnp.zeros(number, jnp.int32) for _ in Rows._fields))

    def unfinished(carry):
        bracket, *_, collected = carry
        return (bracket.high - bracket.low > 1) & ~collected

    def one_read(carry):
        old, probes, *_ = carry
        # Behind the barrier the scores are part of the loop; before it XLA would
        # compute them once, ahead of the loop, and store them: n · 4 bytes.
        probes, data = lax.optimization_barrier((probes, leaves))
        rows = _collect_all(score, data, groups, probes, width)
        above, between = rows.counts >> 16, rows.counts & 0xFFFF
        # Up to three different keys a row, or any number of equal ones.
        too_many = (between > 3) & (rows.most != rows.least)
        # In one loop: a plain sum of integers is several, see `sum_together`.
        from_second, inside, incomplete = sum_together(
            [above, between, too_many.astype(jnp.int32)], (0,)
        )
        reached = jnp.stack([from_second + inside, from_second])
        new = narrow(old, probes, reached - kept)
        whole_window = (new.low == probes[0]) & (new.high == probes[1])
        return new, _window(old, new, grid), rows, whole_window & (incomplete == 0)

    start = whole, first, nothing, False
    bracket, _, rows, collected = lax.while_loop(unfinished, one_read, start)
    return _finish(bracket, rows, collected)


def _window(old: Bracket, new: Bracket, grid: jax.Array) -> jax.Array:
    """From where to where to collect: about the guess, or all where few are left."""
    _, _, keys = interpolate(new, grid)
    spread = jnp.where(grid > 1, TIED, WINDOW)
    about = next_probes(old, new, spread, grid)
    stuck = new.high - new.low > (old.high - old.low) // 4
    return jnp.where((keys <= FEW) & ~stuck, probes_at(new, WHOLE), about)


def _groups(sizes: list[int], width: int) -> list[list[Part]]:
    """Which stretches of which leaves make rows of `width` entries together.

    A large leaf is read where it is. Small ones, and what is left of the large ones
    beside whole rows, are joined first: a loop for every leaf is what takes long to
    compile.
    """
    groups, joined = [], [[]]
    for leaf, size in enumerate(sizes):
        whole = size // width * width if size >= LARGE else 0
        if whole:
            groups.append([Part(leaf, 0, whole)])
        if whole < size:
            joined[-1].append(Part(leaf, whole, size))
        if _entries(joined[-1]) >= GROUP:
            joined.append([])
    return groups + [group for group in joined if group]


def _entries(group: list[Part]) -> int:
    return sum(part.stop - part.start for part in group)


def _collect_all(score, leaves, groups, probes, width):
    """`Rows` of all groups, stored one after the other."""
    found, joined = [], probes
    for group in groups:
        if len(group) == 1:
            (part,) = group
            args = leaves[part.leaf]
            found.append(_collect_part(score, args, part[1:], probes, width))
            continue
        # One group after the other, so that they share the place where they are joined.
        data = [leaves[part.leaf] for part in group]
        data, joined = lax.optimization_barrier((data, joined))
        keys = [
            _keys(score, args, part[1:])
            for args, part in zip(data, group, strict=True)
        ]
        keys = lax.optimization_barrier(jnp.concatenate(keys))
        found.append(_collect_keys(keys, probes, width))
        joined = found[-1]
    stored = [jnp.concatenate(parts) for parts in zip(*found, strict=True)]
    return Rows(*lax.optimization_barrier(stored))


@partial(jax.jit, static_argnames=("score", "stretch"))  # traced once for equal shapes
def _keys(score, args, stretch):
    return order_key(score(*args)).reshape(-1)[slice(*stretch)]


@partial(jax.jit, static_argnames=("score", "stretch", "width"))
def _collect_part(score, args, stretch, probes, width):
    return _collect_keys(_keys(score, args, stretch), probes, width)


@partial(jax.jit, static_argnames="width")
def _collect_keys(keys, probes, width):
    """`Rows` of flat keys, `width` of them a row."""
    rest = -keys.size % width
    key = jnp.pad(keys, (0, rest), constant_values=-1).reshape(-1, width)
    below, above = key < probes[1], key >= probes[0]
    operands = (
        jnp.where(below, above.astype(jnp.int32), 1 << 16),
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
    number = counts & 0xFFFF
    third = jnp.where(most == least, most, total - most - least)
    first, second = jnp.minimum(number, 1), jnp.clip(number - 1, 0, 1)
    keys = jnp.stack([most, least, third])
    often = jnp.stack([first, second, jnp.maximum(number - 2, 0)])

    def excess_at(probes):
        return bracket.under + _count(keys, probes, often)

    # Without a collection, the bracket has been narrowed to one key: it is the one.
    last = bracket._replace(high=jnp.where(collected, bracket.high, bracket.low + 1))
    found = search(excess_at, last, probes_at(last, EVENLY), CLOSE)
    wanted, _ = _least_and_bits(
        jnp.where((keys >= found.low) & (often > 0), keys, NAN_KEY)
    )
    return found, jnp.where(collected, wanted, bracket.low)


def _count(keys: jax.Array, probes: jax.Array, often: Any = ONE) -> jax.Array:
    hits = [jnp.where(keys >= probe, often, np.int32(0)) for probe in probes]
    return sum_together(hits, tuple(range(keys.ndim)))


def _least_and_bits(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least key, and the bits that any key has set.

    Together, and both kept, because alone either takes several loops, see
    `sum_together`: compiled in 30 ms instead of 80.
    """

    def combine(a, b):
        return jnp.minimum(a[0], b[0]), a[1] | b[1]

    initial = np.int32(2**31 - 1), np.int32(0)
    axes = tuple(range(keys.ndim))
    return lax.optimization_barrier(lax.reduce((keys, keys), initial, combine, axes))


def _sampled(
    score: Score, leaves: Leaves, whole: Bracket
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
    _, bits = _least_and_bits(keys)
    return probes, jnp.maximum(bits & -bits, 1).astype(jnp.float32)


def _blocks(scores: jax.Array, every: int) -> jax.Array:
    """BLOCK neighbours out of each BLOCK · every, and at least the first of a leaf."""
    flat = scores.reshape(-1)
    number = flat.size // (BLOCK * every)
    if not number:
        return flat[:BLOCK]
    groups = flat[: number * BLOCK * every].reshape(number, BLOCK * every)
    return groups[:, :BLOCK].reshape(-1)
