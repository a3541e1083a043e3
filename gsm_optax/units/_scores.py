"""The score of each unit beside its family, the same bits on every mesh.

It is the mean score of the unit's entries over that of all units of the family. Scores
of one layer may be decades above those of another: compared as they are, layers close
to the input keep all of their units, and others are left with one. (Fang et al.,
*DepGraph*, 2023, compare groups of channels so, by magnitude.)

A sum of floats depends on its order, and that on how many devices hold the leaf. Here
entries are split into multiples of a power of two, coarse ones and fine ones, whose
sums are exact in float32, and so is a maximum (Demmel and Nguyen, *Fast Reproducible
Floating-Point Summation*, 2013).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsm_optax._importance import only_parts
from gsm_optax._placement import Leaves, along, everywhere
from gsm_optax._reductions import INF_KEY, ScoreFn, order_key
from gsm_optax.units._families import Family, Slices, unit_entries

EXACT = 24
"""Sums of whole numbers are exact in float32 up to 2 to the power of this."""


def unit_scores(
    families: Sequence[Family],
    score: ScoreFn,
    leaves: Leaves,
    parts: Sequence[jax.Array] | None,
) -> list[jax.Array]:
    """Scores of units, of which the mean over a family is one: float32[size] for each.

    The sign bit is clear. NaN and infinity stay, and do not count in the mean.

    Args:
        families: whose slices name leaves by their place among `leaves`.
        score: maps one element of `leaves`, unpacked, to float32 scores.
        leaves: the arguments of `score`, one tuple a leaf.
        parts: bool scalars, whether a leaf takes part: of the others nothing counts.
    """
    if parts is not None:
        score, leaves = only_parts(score, leaves, parts)
    means: list[jax.Array] = []
    for family in families:
        means.append(_mean(family, score, leaves, parts, means[-1:]))
    return list(map(_beside_family, means))


def _beside_family(means: jax.Array) -> jax.Array:
    """The means over their own mean, which a sum of integers makes exact."""
    finite = order_key(means) < INF_KEY
    known, size = jnp.where(finite, means, 0), means.size
    bits = 28 - size.bit_length()
    # As below: 2^exponent is above the greatest, or a quarter of it.
    exponent = jnp.clip((order_key(jnp.max(known)) >> 23) - 126, bits - 126, 126)
    scaled = known * _power_of_two(bits - exponent)
    total = jnp.sum(jnp.round(scaled).astype(jnp.int32), dtype=jnp.int32)
    share = scaled / jnp.maximum(total, 1).astype(jnp.float32)
    # Stored once, so that all who compare it read the same bits.
    return lax.optimization_barrier(jnp.where(finite, share * np.float32(size), means))


def greatest_scores(
    family: Family, score: ScoreFn, leaves: Leaves, before: Any = ()
) -> jax.Array:
    """The greatest score in each unit: float32[size], NaN if there is one."""
    found = []
    for part in family.slices:
        args, before = _anew(leaves[part.leaf], before)
        x = score(*args)
        before = everywhere(jnp.max(x, _others(x, part), initial=0))
        found.append(before[part.indices].max(1))
    # A NaN may come with its sign bit set, and would then be the least of all keys.
    return jnp.abs(jnp.max(jnp.stack(found), 0))


def _anew(args: Any, before: Any) -> tuple[Any, Any]:
    """The arguments of a sum that is to be computed behind another one.

    Every one of them computes the scores anew. Otherwise XLA would compute them once
    for all, and store them: 4 bytes an entry, and slower on the CPU.
    """
    return lax.optimization_barrier((args, before))


def _mean(
    family: Family,
    score: ScoreFn,
    leaves: Leaves,
    parts: Sequence[jax.Array] | None,
    before: Any,
) -> jax.Array:
    shapes = [args[0].shape for args in leaves]
    entries = unit_entries(family.slices, shapes)
    bits = max(1, EXACT - 2 - entries.bit_length())  # of each entry, coarse and fine
    greatest = greatest_scores(family, score, leaves, before)
    # 2^exponent is above the greatest, or a quarter of it where that is above 2^126.
    exponent = jnp.clip((order_key(greatest) >> 23) - 126, bits - 126, 126)
    scales = _power_of_two(bits - exponent)
    coarse = fine = jnp.zeros(family.size, jnp.float32)
    for i, part in enumerate(family.slices):
        scaled = partial(
            _scaled, family.slices[:i], part, score, leaves[part.leaf], scales, bits
        )
        x, _ = scaled(before=fine)
        coarse += sum_units(jnp.round(x), part)
        x, more = scaled(before=coarse)
        fine += sum_units(jnp.round((x - jnp.round(x)) * more), part)
    total = coarse + fine / np.float32(2**bits)
    if parts is None:
        mean = total * np.float32(1 / entries)
    else:
        number = _entries_in_parts(family.slices, shapes, parts)
        mean = total / jnp.maximum(number, 1)
    mean = mean / np.float32(2**bits) * _power_of_two(exponent)
    finite = order_key(greatest) < INF_KEY
    return lax.optimization_barrier(jnp.where(finite, mean, greatest))


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent, in float32, for exponents in [-126, 127]."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _scaled(
    counted: Sequence[Slices],
    part: Slices,
    score: ScoreFn,
    args: tuple[jax.Array, ...],
    scales: jax.Array,
    bits: int,
    before: Any,
) -> tuple[jax.Array, jax.Array]:
    """Scores of slices times the scale of their unit, and 2^bits.

    Zero in no unit, and where slices of the same family have `counted` them.
    """
    row = jnp.append(scales, 0)[part.units_along()]
    (args, row, more), _ = _anew((args, row, jnp.float32(2**bits)), before)
    return once(score(*args) * along(row, args[0], part.axis), counted, part), more


def once(x: jax.Array, counted: Sequence[Slices], part: Slices) -> jax.Array:
    """A leaf, zero where slices of the same family have `counted` its entries."""
    for other in counted:
        if other.leaf == part.leaf:
            own, theirs = (
                along(jnp.asarray(slices.units_along()), x, slices.axis)
                for slices in (part, other)
            )
            x = jnp.where(own == theirs, jnp.zeros((), x.dtype), x)
    return x


def sum_units(x: jax.Array, part: Slices) -> jax.Array:
    """Sum over each unit: an array of shape [size]."""
    return everywhere(jnp.sum(x, _others(x, part)))[part.indices].sum(1)


def _others(x: jax.Array, part: Slices) -> tuple[int, ...]:
    """The axes but for that of the slices."""
    return tuple(axis for axis in range(x.ndim) if axis != part.axis)


def _entries_in_parts(
    slices: Sequence[Slices], shapes: Sequence[Any], parts: Sequence[jax.Array]
) -> jax.Array:
    """How many entries of a unit take part: float32, shape ()."""
    number = jnp.float32(0)
    for leaf in {part.leaf for part in slices}:
        own = unit_entries([part for part in slices if part.leaf == leaf], shapes)
        number += jnp.where(parts[leaf], np.float32(own), 0)
    return number
