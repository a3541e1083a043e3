"""The Q-th greatest key in about two reads of the leaves, on one CPU device.

Counting alone needs four to seven reads. Here a sample of fixed size tells where to put
the first thresholds; the first read narrows the bracket to some thousands of entries;
interpolation then puts the next one to within a few hundred. Those are so few that
hardly any row holds more than three: the second read collects them all, as the
greatest, the least and the sum of the bracketed keys of every row, and the rest of the
search reads only what was collected. A row with more, or a wrong guess, costs another
read.

The collection is stored: 36 bytes a row, where a row is the last axis (see `ROW`).
This file knows only jax.
"""

import math
from functools import partial

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
ROW = 48  # entries that a row has at least: rows of 512 collide, and cost a read
FEW = 300  # once no more are left, collect the whole bracket: ends ties early

# A read counts at five probes and collects between two of them, FROM and TO. That is
# eight results; a ninth no longer fits the registers: 18 ms instead of 12 for 25 M.
FROM, TO = 1, 3
# The first read's probes, in standard errors of the sample:
FIRST = np.array([-5, -1, 0, 1, 5], np.float32)
# those of later reads, in standard deviations of the guess:
SPREAD = np.array([-12, -6, 0, 6, 12], np.float32)
# the same where keys lie on a grid: so many tie that a wider range would overflow rows;
TIED = np.array([-6, -2, 0, 2, 6], np.float32)
# those that collect all of a bracket, as fractions of its width:
WHOLE = np.array([0, 0, 1 / 2, 1, 1], np.float32)
# and those for data that is cheap to read, in standard deviations.
CLOSE = np.array([-4, -1, 0, 1, 4], np.float32)


def select_by_rows(
    score: Score, leaves: Leaves, kept: jax.Array
) -> tuple[Bracket, jax.Array]:
    """Return the last bracket and the Q-th greatest key, for 1 to 2³¹ − 1 entries."""
    total = sum(args[0].size for args in leaves)
    whole = Bracket(jnp.int32(0), jnp.int32(NAN_KEY + 1), total - kept, -kept)
    rows = sum(math.prod(_row_shape(args[0].shape)) for args in leaves)
    empty = jnp.zeros((3, rows), jnp.int32)

    def unfinished(carry):
        bracket, _, _, collected = carry
        return (bracket.high - bracket.low > 1) & ~collected

    def one_read(carry):
        old, probes, _, _ = carry
        # Behind the barrier the scores are part of the loop; before it XLA would
        # compute them once, ahead of the loop, and store them: n · 4 bytes.
        probes, data = lax.optimization_barrier((probes, leaves))
        excess, between, (keys, often), collected = _read(score, data, probes, kept)
        new = narrow(old, probes, excess)
        new = jax.tree.map(lambda a, b: jnp.where(collected, a, b), between, new)
        return new, _next(old, new, grid), (keys, often), collected

    first, grid = _sampled(score, leaves, whole)
    start = whole, first, (empty, empty), False
    bracket, _, (keys, often), collected = lax.while_loop(unfinished, one_read, start)
    return _finish(bracket, keys, often, collected)


def _read(score, leaves, probes, kept):
    """Read everything once: counts at the probes, and what lies between FROM and TO."""
    scan = [_scan_leaf(score, args, probes) for args in leaves]
    scan = [jnp.concatenate(parts) for parts in zip(*scan, strict=True)]
    *reached, total, most, least = lax.optimization_barrier(scan)
    excess = jnp.sum(jnp.stack(reached, -1), 0) - kept
    number = reached[FROM] - reached[TO]
    between = Bracket(probes[FROM], probes[TO], excess[FROM], excess[TO])
    known = (number <= 3) | (most == least)
    collected = (between.over >= 0) & (between.under < 0) & jnp.all(known)
    # Up to three different keys a row, or any number of equal ones.
    third = jnp.where(most == least, most, total - most - least)
    first, second = jnp.minimum(number, 1), jnp.clip(number - 1, 0, 1)
    keys = jnp.stack([most, least, third])
    often = jnp.stack([first, second, jnp.maximum(number - 2, 0)])
    return excess, between, (keys, often), collected


@partial(jax.jit, static_argnames="score")  # traced once for equal shapes
def _scan_leaf(score, args, probes):
    """Per row: counts at the probes; sum, greatest and least key from FROM to TO."""
    key = order_key(score(*args))
    below, above = key < probes[TO], key >= probes[FROM]
    adding = [(key >= probe).astype(jnp.int32) for probe in probes]
    adding.append(jnp.where(below & above, key, 0))
    operands = *adding, jnp.where(below, key, 0), jnp.where(above, key, NAN_KEY)

    def combine(a, b):
        *a, most_a, least_a = a
        *b, most_b, least_b = b
        sums = (x + y for x, y in zip(a, b, strict=True))
        return *sums, jnp.maximum(most_a, most_b), jnp.minimum(least_a, least_b)

    zero = np.int32(0)
    initial = (zero,) * len(adding) + (zero, np.int32(NAN_KEY))
    axes = tuple(range(len(_row_shape(key.shape)), key.ndim))
    return [x.reshape(-1) for x in lax.reduce(operands, initial, combine, axes)]


def _row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes; the fewest trailing ones that hold ROW entries make a row."""
    for axis in reversed(range(len(shape))):
        if math.prod(shape[axis:]) >= ROW:
            return shape[:axis]
    return ()


def _next(old: Bracket, new: Bracket, grid: jax.Array) -> jax.Array:
    few = interpolate(new)[2] <= FEW
    spread = jnp.where(grid > 1, TIED, SPREAD)
    return jnp.where(few, probes_at(new, WHOLE), next_probes(old, new, spread, grid))


def _finish(bracket, keys, often, collected):
    """The wanted key among the collected ones, or else the lower end of the bracket."""

    def excess_at(probes):
        return bracket.under + _count(keys, probes, often)

    # Without a collection, the bracket has been narrowed to one key: it is the one.
    last = bracket._replace(high=jnp.where(collected, bracket.high, bracket.low + 1))
    found = search(excess_at, last, probes_at(last, WHOLE), CLOSE)
    least = jnp.min(jnp.where((keys >= found.low) & (often > 0), keys, NAN_KEY))
    return found, jnp.where(collected, least, bracket.low)


def _count(keys: jax.Array, probes: jax.Array, often: jax.Array | int = 1) -> jax.Array:
    hits = [jnp.where(keys >= probe, often, 0) for probe in probes]
    return sum_together(hits, tuple(range(keys.ndim)))


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
    bits = lax.reduce_or(keys, (0,))
    return probes, jnp.maximum(bits & -bits, 1).astype(jnp.float32)


def _blocks(scores: jax.Array, every: int) -> jax.Array:
    """BLOCK neighbours out of each BLOCK · every, and at least the first of a leaf."""
    flat = scores.reshape(-1)
    number = flat.size // (BLOCK * every)
    if not number:
        return flat[:BLOCK]
    groups = flat[: number * BLOCK * every].reshape(number, BLOCK * every)
    return groups[:, :BLOCK].reshape(-1)
