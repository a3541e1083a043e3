"""How many entries of each leaf there are of every magnitude."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax._importance import magnitude
from gsm_optax._reductions import NAN_KEY, count
from gsm_optax._words import WORD

EXPONENTS = tuple(float(x) for x in np.arange(-48, 6) / 4)
"""Decimal logarithms of the edges between the classes of magnitude: -12, ..., 1.25."""

_EDGES = np.power(10, EXPONENTS).astype(np.float32)
# Order keys: 1 is that of the smallest number above zero. Eight keys at a time, because
# a reduction with many operands takes seconds to compile.
_KEYS = np.array([1, *_EDGES.view(np.int32), NAN_KEY], np.int32).reshape(-1, 8)


def histograms(leaves: Sequence[Any]) -> list[list[int]]:
    """Count the entries of every class, leaf by leaf, in arrays sharded or not.

    The classes are: exactly 0, below the first edge, between one edge and the next, at
    or above the last, and NaN. Only counts leave the devices; each leaf is read seven
    times.
    """
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    # All are started before the first result is waited for.
    reaching = jax.device_get([_reaching(leaf) for leaf in leaves])
    return [
        _classes(leaf.size, *words)
        for leaf, words in zip(leaves, reaching, strict=True)
    ]


@jax.jit
def _reaching(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many entries reach each of the keys: two words of shape (passes, 8)."""
    eight_keys = lambda keys: count(magnitude, [(leaf,)], keys)
    return jax.lax.map(eight_keys, jnp.asarray(_KEYS))


def _classes(entries: int, high: np.ndarray, low: np.ndarray) -> list[int]:
    """How many of the entries are between one key and the next."""
    reaching = (high.astype(np.int64).ravel() << WORD) + low.ravel()
    return [a - b for a, b in pairwise([entries, *reaching.tolist(), 0])]
