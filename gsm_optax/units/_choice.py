"""Whole units: their T, and which of them are active, so that they hold Q entries."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax._importance import Importance, Pair, magnitude, score_leaves
from gsm_optax._placement import along
from gsm_optax._reductions import INF_KEY, NAN_KEY, order_key
from gsm_optax._selection import Selection, search_all_keys
from gsm_optax._smoothing import smooth
from gsm_optax._words import (
    WORD,
    Words,
    add_words,
    as_int32,
    carry,
    excess,
    times_words,
    to_count,
)
from gsm_optax.units._families import Family
from gsm_optax.units._scores import greatest_scores, unit_scores


class WholeUnits:
    """The units of some leaves, to be chosen among: each is active as a whole.

    Attributes:
        total: N, the entries that are in units, in words.
        most: no fewer than `total`, known before tracing.
        slots: which of the families have slices here, and the treedef of a tuple with a
            leaf for each family.
        reserved: entries that are active whatever Q is.
        floor: what reserves them.
    """

    floor = "min_units of every family"

    def __init__(
        self,
        families: Sequence[Family],
        pairs: Sequence[Pair],
        *,
        parts: Sequence[jax.Array] | None = None,
        min_units: int = 1,
    ):
        """Take parameters and their gradients, leaf by leaf.

        Args:
            families: whose slices name leaves by their place among `pairs`.
            pairs: (parameter, gradient) of every leaf.
            parts: bool scalars, whether a leaf takes part at this step; None if all do.
            min_units: units of every family that are active before others are.
        """
        held = [i for i, family in enumerate(families) if family.slices]
        self.slots = held, jax.tree.structure((0,) * len(families))
        self._families = [families[i] for i in held]
        self._pairs, self._parts, self._min_units = pairs, parts, min_units
        families = self._families
        shapes = [param.shape for param, _ in pairs]
        self._axes = [_axes(families, i, shape) for i, shape in enumerate(shapes)]
        sizes = [family.size for family in families]
        self.total = self._entries(sizes, parts)
        high, low = self._entries(sizes, None)
        self.most = (high << WORD) + low
        high, low = self._entries([min(min_units, size) for size in sizes], None)
        self.reserved = (high << WORD) + low

    def scores(self, importance: Importance) -> list[jax.Array]:
        """T of each unit: for each family float32[size], whose mean is one."""
        pairs = jax.lax.stop_gradient(self._pairs)
        return unit_scores(
            self._families, *score_leaves(importance, pairs), self._parts
        )

    def averaged(
        self,
        scores: Sequence[jax.Array],
        smoothing: Any,
        before: Sequence[Any],
        counts: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
        """The average of T, twice, and over how many steps: see `smooth`."""
        params = [(x,) for x, _ in self._pairs]
        dead = [
            (greatest_scores(family, magnitude, params) == 0) & (score == 0)
            for family, score in zip(self._families, scores, strict=True)
        ]
        after, counts = smooth(
            smoothing, before, counts, scores, dead, self._parts_of_families()
        )
        return after, after, counts

    def choose(
        self, scores: Sequence[jax.Array], kept: Words, start: jax.Array
    ) -> tuple[Selection, list[jax.Array]]:
        """B of every leaf, and what the choice came to.

        The units of greatest score are active, as many as hold no more than Q entries.
        (If they held Q or more, another order would leave out one of them, and so
        would pruning by magnitude afterwards.) Units that tie go together.

        Args:
            scores: what is compared.
            kept: Q, in words.
            start: float32 scalar, a guess of the threshold: it saves passes, no more.
        """
        if not scores:
            return Selection(jnp.int32(0), jnp.int32(0), jnp.float32(0)), self._masks(
                []
            )
        keys = [_raised(order_key(score), self._min_units) for score in scores]
        kept, total = as_int32(kept), as_int32(self.total)
        one_more = carry(kept[0], kept[1] + 1)

        def held_by(active):
            numbers = [jnp.sum(own, -1, jnp.int32) for own in active]
            return self._entries(numbers, self._parts)

        def excess_at(probes):
            return excess(
                held_by(key[None] >= probes[:, None] for key in keys), one_more
            )

        # Units that reach the bracket's lower end hold too many; the next ones do not.
        too_low = search_all_keys(excess_at, one_more, total, start).low
        key = jnp.minimum(_least(keys, too_low) + 1, INF_KEY)
        everything = (kept[0] == total[0]) & (kept[1] == total[1])
        key = jnp.where(everything, 0, key)
        active = [own >= key for own in keys]
        least = jnp.minimum(_least(keys, key), INF_KEY)  # not the NaN of that key
        threshold = jax.lax.bitcast_convert_type(least, jnp.float32)
        found = Selection(key, to_count(held_by(active), self.most), threshold)
        return found, self._masks(active)

    def _entries(self, active: Sequence[Any], parts: Sequence[Any] | None) -> Words:
        """How many entries active units hold, if so many of each family are active.

        Of the entries of a leaf those are active all of whose units are: they make a
        block, whose sides are the active indices of its axes.
        """
        counts = []
        for i, axes in enumerate(self._axes):
            block, outside = (0, 1), (0, 1)  # one, in words
            for others, tied in axes:  # others are in no unit
                sides = [each * active[family] for family, each in tied]
                block = times_words(block, sum(sides, others))
                outside = times_words(outside, others)
            high, low = block[0] - outside[0], block[1] - outside[1]
            if parts is not None:
                high, low = (jnp.where(parts[i], word, 0) for word in (high, low))
            counts.append((high, low))
        return add_words(counts)

    def _masks(self, active: Sequence[jax.Array]) -> list[jax.Array]:
        params = [param for param, _ in self._pairs]
        masks = masks_of(self._families, active, params)
        if self._parts is not None:
            masks = list(map(jnp.logical_and, masks, self._parts))
        return masks

    def _parts_of_families(self) -> list[jax.Array] | None:
        """Whether any leaf of a family takes part."""
        if self._parts is None:
            return None
        return [
            reduce(jnp.logical_or, [self._parts[part.leaf] for part in family.slices])
            for family in self._families
        ]


def masks_of(
    families: Sequence[Family], active: Sequence[jax.Array], leaves: Sequence[Any]
) -> list[jax.Array]:
    """Bools like the leaves: whether all units of an entry are active.

    Args:
        families: whose slices name leaves by their place among `leaves`.
        active: bools, for each family of shape [size].
        leaves: arrays, or shapes.
    """
    masks = [jnp.ones_like(leaf, dtype=bool) for leaf in leaves]
    for family, value in zip(families, active, strict=True):
        value = jnp.append(value, True)  # of no unit
        for part in family.slices:
            row = along(value[part.units_along()], leaves[part.leaf], part.axis)
            masks[part.leaf] &= row
    return masks


def _axes(
    families: Sequence[Family], leaf: int, shape: tuple[int, ...]
) -> list[tuple[int, list[tuple[int, int]]]]:
    """For each axis, indices in no unit, and (family, indices of a unit) along it."""
    found = []
    for axis, size in enumerate(shape):
        tied = [
            (i, part.indices.shape[1])
            for i, family in enumerate(families)
            for part in family.slices
            if (part.leaf, part.axis) == (leaf, axis)
        ]
        in_units = sum(families[i].size * each for i, each in tied)
        found.append((size - in_units, tied))
    return found


def _least(keys: Sequence[jax.Array], key: jax.Array) -> jax.Array:
    """The least of all keys that reach a key, or that of NaN."""
    least = [jnp.where(own >= key, own, NAN_KEY).min() for own in keys]
    return jnp.minimum(reduce(jnp.minimum, least), NAN_KEY)


def _raised(keys: jax.Array, number: int) -> jax.Array:
    """Order keys of which the greatest few, if they are positive, are above all."""
    if not number:
        return keys
    least = jax.lax.top_k(keys, min(number, keys.size))[0][-1]
    reserved = (keys >= jnp.maximum(least, 1)) & (keys < INF_KEY)
    return jnp.where(reserved, np.int32(INF_KEY), keys)
