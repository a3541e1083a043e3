"""Counts beyond 2³¹, in two int32 words, and Q among them.

This file knows only jax.
"""

import operator
from fractions import Fraction
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WORD = 12
"""Bits of the low word of a count.

Low words of 2¹⁹ partial counts still add up within int32, and so do the high words of
2⁴³ entries.
"""

_DIGIT = (1 << WORD) - 1

LARGEST = 2**31 - 1
"""Entries that one int32 can count."""

Words = tuple[Any, Any]  # (high, low) of a count; ints, or int32 scalars


def to_words(count: Any) -> Words:
    """Split a count into (high, low) words; the low one has `WORD` bits."""
    return count >> WORD, count & _DIGIT


def as_int32(words: Words) -> tuple[jax.Array, jax.Array]:
    """The words of a count as int32 scalars."""
    return jnp.asarray(words[0], jnp.int32), jnp.asarray(words[1], jnp.int32)


def carry(high: Any, low: Any) -> Words:
    """Move what exceeds the low word into the high one."""
    return high + (low >> WORD), to_words(low)[1]


def add_words(counts: list[Words]) -> Words:
    """Add up counts."""
    return carry(*(sum(column) for column in zip((0, 0), *counts, strict=True)))


def times_words(count: Words, factor: Any) -> Words:
    """Multiply a count by a number below 2³¹."""
    high, low = count
    by_high, by_low = to_words(factor)
    return carry(high * factor + low * by_high, low * by_low)


def excess(words: Words, kept: Words) -> jax.Array:
    """Count minus `kept` as int32, clipped to ±2²⁹: its sign and its zero are exact."""
    high, low = words
    bound = 1 << 29 - WORD
    return (jnp.clip(high - kept[0], -bound, bound - 1) << WORD) + (low - kept[1])


def count_dtype(total: int) -> Any:
    """Return the dtype that a number of entries out of `total` is reported in."""
    return jnp.int32 if total <= LARGEST else jnp.float32


def to_count(words: Words, total: int) -> jax.Array:
    """Join the words of a count of some of `total` entries, in `count_dtype`."""
    if count_dtype(total) == jnp.int32:
        return jnp.asarray((words[0] << WORD) + words[1], jnp.int32)
    return to_float(words)


def to_float(words: Words) -> jax.Array:
    """Join the words of a count, rounded to float32."""
    high, low = (jnp.asarray(word, jnp.float32) for word in words)
    return high * 2**WORD + low


def num_kept(ratio: Any, total: Words) -> Words:
    """Q = N − round(ratio·N), half to even: exact, or in float32 for an array.

    Args:
        ratio: in [0, 1), a Python or NumPy number, or a scalar array.
        total: N; ints, or int32 scalars where it is only known at run time.
    """
    if isinstance(ratio, jax.Array):
        return _less(total, _round_in_single_precision(ratio, total))
    fraction = Fraction(float(ratio))
    if isinstance(total[0], int):
        entries = (total[0] << WORD) + total[1]
        return to_words(entries - round(fraction * entries))
    return _less(total, round_product(fraction, total))


def round_product(fraction: Fraction, words: Words) -> Words:
    """round(fraction · count), half to even, exactly: in digits of `WORD` bits.

    Args:
        fraction: in [0, 1), its denominator a power of two, as that of any float.
        words: a count, traced or not.
    """
    drop = -(-(fraction.denominator.bit_length() - 1) // WORD)
    if not drop:
        return 0, 0
    factor = int(fraction * 2 ** (WORD * drop))  # of the count, digits still to drop
    digits = [words[1], *(words[0] >> shift & _DIGIT for shift in (0, WORD, 2 * WORD))]
    limbs: list[Any] = [0] * (drop + len(digits) + 1)
    limbs[drop - 1] = 1 << WORD - 1  # one half, so that rounding down rounds
    for i in range(drop):
        for j, digit in enumerate(digits):
            limbs[i + j] += (factor >> WORD * i & _DIGIT) * digit
    for i in range(len(limbs) - 1):
        more, limbs[i] = to_words(limbs[i])
        limbs[i + 1] += more
    # Without a rest it was exactly halfway, and an odd result is one too many.
    rest = reduce(operator.or_, limbs[:drop])
    low = limbs[drop] - jnp.where(rest == 0, limbs[drop] & 1, 0)
    first, second, third = limbs[drop + 1 : drop + 4]
    return first + (second << WORD) + (third << 2 * WORD), low


def _round_in_single_precision(ratio: jax.Array, total: Words) -> Words:
    """round(ratio·N) in float32, in words."""
    if isinstance(total[0], int):  # N rounded once, not word by word
        entries: Any = np.float32((total[0] << WORD) + total[1])
    else:
        entries = to_float(total)
    passive = jnp.clip(jnp.round(ratio.astype(jnp.float32) * entries), 0, entries)
    high = jnp.floor(passive / 2**WORD)
    low = passive - high * 2**WORD
    return high.astype(jnp.int32), low.astype(jnp.int32)


def _less(total: Words, passive: Words) -> Words:
    high, low = carry(total[0] - passive[0], total[1] - passive[1])
    # float32 may round the passive count above the total.
    return jnp.maximum(high, 0), jnp.where(high < 0, 0, low)
