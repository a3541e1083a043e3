"""Narrowing a bracket about the Q-th greatest key, a few thresholds at a time.

This file knows only jax, and nothing of where the counts come from.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Bracket(NamedTuple):
    """Two keys about the wanted one; all fields int32, shape ()."""

    low: jax.Array  # at least Q keys reach it,
    high: jax.Array  # but fewer reach this one
    over: jax.Array  # how many more than Q reach low: not negative
    under: jax.Array  # how many more than Q reach high: negative


def narrow(bracket: Bracket, probes: jax.Array, excess: jax.Array) -> Bracket:
    """Return the tightest bracket that the counts at ascending probes prove."""
    # Fewer keys reach a higher probe, so the excess falls. To index the ends instead
    # takes seven kernels on the CPU, and each takes 10 ms to compile.
    below = excess >= 0
    return Bracket(
        low=jnp.max(jnp.where(below, probes, bracket.low)),
        high=jnp.min(jnp.where(below, bracket.high, probes)),
        over=jnp.min(jnp.where(below, excess, bracket.over)),
        under=jnp.max(jnp.where(below, bracket.under, excess)),
    )


def interpolate(
    bracket: Bracket, grid: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Guess where in the bracket the excess is zero.

    Args:
        bracket: two keys about the wanted one.
        grid: keys are likely to be multiples of this; a float32 scalar.

    Returns:
        The guess and its standard deviation as fractions of the width of the bracket,
        and the number of keys in it: all float32 scalars.
    """
    over, under = bracket.over.astype(jnp.float32), bracket.under.astype(jnp.float32)
    keys = over - under
    guess = over / keys
    # Of keys strewn evenly, that many are found beside the guess by chance; those that
    # tie are strewn together.
    places = (bracket.high - bracket.low).astype(jnp.float32) / grid
    apart = jnp.maximum(jnp.minimum(keys, places), 1)
    return guess, jnp.sqrt(guess * (1 - guess) / apart) + 1 / apart, keys


def probes_at(bracket: Bracket, fractions: jax.Array | np.ndarray) -> jax.Array:
    """Keys at the given fractions of the width, kept within the bracket."""
    width = (bracket.high - bracket.low).astype(jnp.float32)
    offsets = jnp.clip(fractions * width, -(2.0**30), 2.0**30).astype(jnp.int32)
    return offset_by(bracket.low, offsets, bracket)


def offset_by(
    key: jax.Array, offsets: jax.Array | np.ndarray, bracket: Bracket
) -> jax.Array:
    """Key plus offsets, kept within the bracket without overflow."""
    return key + jnp.clip(offsets, bracket.low - key, bracket.high - key)


def next_probes(
    old: Bracket,
    new: Bracket,
    spread: jax.Array | np.ndarray,
    grid: jax.Array | float = 1.0,
) -> jax.Array:
    """Probes about the interpolated key, `spread` of its standard deviations away.

    Where the last pass took away less than three quarters, they split the bracket
    evenly instead: that bounds the number of passes under ties and odd scores.
    """
    guess, deviation, _ = interpolate(new, grid)
    evenly = np.arange(1, spread.size + 1, dtype=np.float32) / (spread.size + 1)
    stuck = new.high - new.low > (old.high - old.low) // 4
    return probes_at(new, jnp.where(stuck, evenly, guess + spread * deviation))


def search(
    excess_at: Callable[[jax.Array], jax.Array],
    bracket: Bracket,
    probes: jax.Array,
    spread: np.ndarray,
    few: jax.Array | int = 0,
) -> Bracket:
    """Narrow until Q keys reach `low`, or `low` is the wanted key, or few are left.

    Args:
        excess_at: how many more than Q keys reach each of K ascending probes.
        bracket: the keys to start between.
        probes: the first K probes, int32, shape (K,).
        spread: where later probes go, in standard deviations; ascending, shape (K,).
        few: stop once no more keys than this are in the bracket.

    Returns:
        The last bracket.
    """

    def unfinished(carry):
        bracket, _ = carry
        between = bracket.over - bracket.under
        return (bracket.high - bracket.low > 1) & (bracket.over != 0) & (between > few)

    def one_pass(carry):
        old, probes = carry
        # The thresholds stay in the carry, or XLA computes them anew in every leaf.
        new = narrow(old, probes, excess_at(probes))
        return new, next_probes(old, new, spread)

    return lax.while_loop(unfinished, one_pass, (bracket, probes))[0]
