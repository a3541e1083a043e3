"""The mean score of the entries of each unit, the same bits on every mesh.

A sum of floats depends on its order, and that on how many devices hold the leaf. Here
entries are rounded to multiples of 2⁻²⁴ of the greatest of their unit and added up as
integers, in two words; a maximum does not depend on the order either.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsm_optax._placement import Leaves, along, everywhere, is_local
from gsm_optax._reductions import INF_KEY, ScoreFn, order_key
from gsm_optax.units._families import Family, Slices, unit_entries


def mean_scores(
    families: Sequence[Family],
    score: ScoreFn,
    leaves: Leaves,
    parts: Sequence[jax.Array] | None,
) -> list[jax.Array]:
    """The mean score of each unit: for each family float32[size], sign bit clear.

    Args:
        families: whose slices name leaves by their place among `leaves`.
        score: maps one element of `leaves`, unpacked, to float32 scores.
        leaves: the arguments of `score`, one tuple a leaf.
        parts: bool scalars, whether a leaf takes part: of the others nothing counts.
    """
    if parts is not None:
        own, flagged = score, zip(leaves, parts, strict=True)
        score = lambda *args: jnp.where(args[-1], own(*args[:-1]), 0)
        leaves = [(*args, part) for args, part in flagged]
    return [_mean(family, score, leaves, parts) for family in families]


def greatest_scores(family: Family, score: ScoreFn, leaves: Leaves) -> jax.Array:
    """The greatest score in each unit: float32[size], NaN if there is one."""
    found = []
    for part in family.slices:
        args = leaves[part.leaf]
        others = [axis for axis in range(args[0].ndim) if axis != part.axis]
        greatest = everywhere(jnp.max(score(*args), others, initial=0))
        found.append(greatest[part.indices].max(1))
    # A NaN may come with its sign bit set, and would then be the least of all keys.
    return jnp.abs(jnp.max(jnp.stack(found), 0))


def _mean(
    family: Family, score: ScoreFn, leaves: Leaves, parts: Sequence[jax.Array] | None
) -> jax.Array:
    shapes = [args[0].shape for args in leaves]
    greatest = greatest_scores(family, score, leaves)
    # 2^exponent is above the greatest, or a quarter of it where that is above 2^126.
    exponent = jnp.clip(order_key(greatest) >> 23, 1, 252) - 126
    entries = unit_entries(family.slices, shapes)
    bits = max(1, min(12, 29 - entries.bit_length()))  # of a word: sums stay in int32
    sums = [
        _sum_words(family.slices[:i], part, score, leaves[part.leaf], exponent, bits)
        for i, part in enumerate(family.slices)
    ]
    high, low = (sum(words).astype(jnp.float32) for words in zip(*sums, strict=True))
    total = (high * 2**bits + low) * _power_of_two(exponent) / 2.0 ** (2 * bits)
    if parts is None:
        mean = total * np.float32(1 / entries)
    else:
        number = _entries_in_parts(family.slices, shapes, parts)
        mean = jnp.where(number > 0, total / jnp.maximum(number, 1), 0)
    finite = order_key(greatest) < INF_KEY
    # Stored once, so that all who compare it read the same bits.
    return lax.optimization_barrier(jnp.where(finite, mean, greatest))


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent, in float32, for exponents in [-126, 127]."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _sum_words(
    before: Sequence[Slices],
    part: Slices,
    score: ScoreFn,
    args: tuple[jax.Array, ...],
    exponent: jax.Array,
    bits: int,
) -> tuple[jax.Array, jax.Array]:
    """High and low words of the sum over slices, but for what `before` has counted."""
    x = score(*args)
    down = jnp.append(_power_of_two(-exponent), 0)[part.units_along()]
    x = (x * along(down, args[0], part.axis)) * np.float32(2.0 ** (2 * bits))
    own = part.units_along()
    for other in before:
        if other.leaf == part.leaf:
            x = jnp.where(
                along(jnp.asarray(own), args[0], part.axis)
                == along(jnp.asarray(other.units_along()), args[0], other.axis),
                0,
                x,
            )
    x = jnp.round(x).astype(jnp.int32)
    words = x >> bits, x & ((1 << bits) - 1)
    others = tuple(axis for axis in range(x.ndim) if axis != part.axis)
    high, low = map(everywhere, _sum_pair(*words, others, is_local([args], None)))
    return high[part.indices].sum(1), low[part.indices].sum(1)


def _sum_pair(
    one: jax.Array, other: jax.Array, axes: tuple[int, ...], local: bool
) -> Sequence[jax.Array]:
    """Sums of two int32 arrays over axes, in one loop where that is quicker."""

    def plain(one, other):
        return [jnp.sum(one, axes), jnp.sum(other, axes)]

    def together(one, other):  # see _reductions: plain sums of integers are not fused
        add = lambda a, b: (a[0] + b[0], a[1] + b[1])
        return list(lax.reduce((one, other), (np.int32(0),) * 2, add, axes))

    if not local:
        return plain(one, other)
    return lax.platform_dependent(one, other, cpu=together, default=plain)


def _entries_in_parts(
    slices: Sequence[Slices], shapes: Sequence[Any], parts: Sequence[jax.Array]
) -> jax.Array:
    """How many entries of a unit take part: float32, shape ()."""
    number = jnp.float32(0)
    for leaf in {part.leaf for part in slices}:
        own = unit_entries([part for part in slices if part.leaf == leaf], shapes)
        number += jnp.where(parts[leaf], np.float32(own), 0)
    return number
