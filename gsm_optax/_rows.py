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
from gsm_optax._placement import Leaves
from gsm_optax._reductions import NAN_KEY, ScoreFn, order_key, sum_together

SAMPLE = 2**18  # entries of the sample: 2¹⁶ to 2¹⁹ cost and gain about the same
BLOCK = 16  # neighbours that are sampled together: a cache line of float32
ROW = 48  # entries that a row has at least: rows of 512 collide, and cost a read
ONE = np.int32(1)
FEW = 300  # once no more are left, collect the whole bracket: ends ties early

# A read either counts or collects: 8 ms each for 25 M entries. One that did both, at
# five probes, took 12, and 18 with a sixth, because nine results no longer fit the
# registers.
#
# Where the first read counts, in standard errors of the sample:
FIRST = np.array([-5, -1, 1, 5], np.float32)
# where later ones count, in standard deviations of the guess:
SPREAD = np.array([-12, -4, 4, 12], np.float32)
# from where to where to collect, in the same;
WINDOW = np.array([-6, 6], np.float32)
# where keys lie on a grid, so many tie that a wider window would overflow rows;
TIED = np.array([-2, 2], np.float32)
# and all of a bracket, as fractions of its width.
WHOLE = np.array([0, 1], np.float32)
# Where to count in data that is cheap to read, in standard deviations:
CLOSE = np.array([-4, -1, 0, 1, 4], np.float32)


class Rows(NamedTuple):
    """What every row holds of the collected keys; all fields int32, shape (rows,)."""

    number: jax.Array  # of such keys,
    total: jax.Array  # their sum, wrapped round
    most: jax.Array  # the greatest
    least: jax.Array  # and the least of them


def select_by_rows(
    score: ScoreFn, leaves: Leaves, kept: jax.Array
) -> tuple[Bracket, jax.Array]:
    """Return the last bracket and the Q-th greatest key, for 1 to 2³¹ − 1 entries."""
    total = sum(args[0].size for args in leaves)
    whole = Bracket(jnp.int32(0), jnp.int32(NAN_KEY + 1), total - kept, -kept)
    first, grid = _sampled(score, leaves, whole)
    number = sum(math.prod(_row_shape(args[0].shape)) for args in leaves)
    nothing = Rows(*(jnp.zeros(number, jnp.int32) for _ in Rows._fields))

    def unfinished(carry):
        bracket, *_, collected = carry
        return (bracket.high - bracket.low > 1) & ~collected

    def count(bracket, probes, data):
        new = narrow(bracket, probes, _count_all(score, data, probes) - kept)
        return new, nothing, False, True

    def collect(bracket, probes, data):
        probes = _window(bracket, grid)
        reached, rows, complete = _collect_all(score, data, probes)
        new = narrow(bracket, probes, reached - kept)
        inside = (new.low == probes[0]) & (new.high == probes[1])
        # Too many for some row, but far fewer than before: fewer still will do.
        again = inside & (new.over - new.under <= (bracket.over - bracket.under) // 2)
        return new, rows, complete & inside, again

    def one_read(carry):
        old, probes, counting, *_ = carry
        # Behind the barrier the scores are part of the loop; before it XLA would
        # compute them once, ahead of the loop, and store them: n · 4 bytes.
        probes, data = lax.optimization_barrier((probes, leaves))
        new, rows, collected, collecting = lax.cond(
            counting, count, collect, old, probes, data
        )
        return new, next_probes(old, new, SPREAD, grid), ~collecting, rows, collected

    start = whole, first, True, nothing, False
    bracket, _, _, rows, collected = lax.while_loop(unfinished, one_read, start)
    return _finish(bracket, rows, collected)


def _window(bracket: Bracket, grid: jax.Array) -> jax.Array:
    """From where to where to collect: about the guess, or all where few are left."""
    guess, deviation, keys = interpolate(bracket, grid)
    about = guess + jnp.where(grid > 1, TIED, WINDOW) * deviation
    return probes_at(bracket, jnp.where(keys <= FEW, WHOLE, about))


def _count_all(score, leaves, probes):
    """How many keys reach each of the probes."""
    by_row = [_count_leaf(score, args, probes) for args in leaves]
    return sum_together(_join(by_row), (0,))


def _collect_all(score, leaves, probes):
    """How many keys reach each of two probes, and what is between, complete or not."""
    above, *rows = _join([_collect_leaf(score, args, probes) for args in leaves])
    rows = Rows(*rows)
    from_second, between = sum_together([above, rows.number], (0,))
    # Up to three different keys a row, or any number of equal ones.
    complete = jnp.all((rows.number <= 3) | (rows.most == rows.least))
    return jnp.stack([from_second + between, from_second]), rows, complete


def _join(by_leaf):
    """Concatenate what there is of every row, leaf by leaf, and store it."""
    joined = [jnp.concatenate(parts) for parts in zip(*by_leaf, strict=True)]
    return lax.optimization_barrier(joined)


@partial(jax.jit, static_argnames="score")  # traced once for equal shapes
def _count_leaf(score, args, probes):
    """Per row: how many keys reach each probe."""
    key = order_key(score(*args))
    counts = sum_together([(key >= p).astype(jnp.int32) for p in probes], _in_row(key))
    return [counts[..., i].reshape(-1) for i in range(probes.size)]


@partial(jax.jit, static_argnames="score")
def _collect_leaf(score, args, probes):
    """Per row: how many reach the second probe; `Rows` of those between the two."""
    key = order_key(score(*args))
    below, above = key < probes[1], key >= probes[0]
    operands = (
        (~below).astype(jnp.int32),
        (below & above).astype(jnp.int32),
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
    initial = zero, zero, zero, zero, np.int32(NAN_KEY)
    found = lax.reduce(operands, initial, combine, _in_row(key))
    return [x.reshape(-1) for x in found]


def _in_row(key: jax.Array) -> tuple[int, ...]:
    """The axes that make a row."""
    return tuple(range(len(_row_shape(key.shape)), key.ndim))


def _row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes; the fewest trailing ones that hold ROW entries make a row."""
    for axis in reversed(range(len(shape))):
        if math.prod(shape[axis:]) >= ROW:
            return shape[:axis]
    return ()


def _finish(bracket: Bracket, rows: Rows, collected: jax.Array | bool):
    """The wanted key among the collected ones, or else the lower end of the bracket."""
    number, total, most, least = rows
    third = jnp.where(most == least, most, total - most - least)
    first, second = jnp.minimum(number, 1), jnp.clip(number - 1, 0, 1)
    keys = jnp.stack([most, least, third])
    often = jnp.stack([first, second, jnp.maximum(number - 2, 0)])

    def excess_at(probes):
        return bracket.under + _count(keys, probes, often)

    # Without a collection, the bracket has been narrowed to one key: it is the one.
    last = bracket._replace(high=jnp.where(collected, bracket.high, bracket.low + 1))
    found = search(excess_at, last, next_probes(last, last, CLOSE), CLOSE)
    wanted = jnp.min(jnp.where((keys >= found.low) & (often > 0), keys, NAN_KEY))
    return found, jnp.where(collected, wanted, bracket.low)


def _count(keys: jax.Array, probes: jax.Array, often: Any = ONE) -> jax.Array:
    hits = [jnp.where(keys >= probe, often, np.int32(0)) for probe in probes]
    return sum_together(hits, tuple(range(keys.ndim)))


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
        next_probes(start, start, CLOSE),
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
    lowest = jnp.min(jnp.where(keys == 0, NAN_KEY, keys & -keys))
    return probes, lowest.astype(jnp.float32)


def _blocks(scores: jax.Array, every: int) -> jax.Array:
    """BLOCK neighbours out of each BLOCK · every, and at least the first of a leaf."""
    flat = scores.reshape(-1)
    number = flat.size // (BLOCK * every)
    if not number:
        return flat[:BLOCK]
    groups = flat[: number * BLOCK * every].reshape(number, BLOCK * every)
    return groups[:, :BLOCK].reshape(-1)
