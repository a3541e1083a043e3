"""Importance averaged over steps: one batch sees little of what an entry is worth."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gsm_optax._prunable import prunable_zeros


def nothing_averaged(
    flags: Any, params: Any, dtype: Any, units: Any = None
) -> tuple[Any, jax.Array]:
    """The average before the first step, like the prunable parameters, and its counts.

    Every leaf has a count of its own, because some may sit steps out. With units it is
    an array a family.
    """
    if units is not None:
        zeros = units.zeros(dtype)
        return zeros, jnp.zeros(len(zeros), jnp.int32)
    leaves = jax.tree.leaves(flags, is_leaf=lambda x: x is None)
    counts = jnp.zeros(len(leaves), jnp.int32)
    return prunable_zeros(flags, params, dtype), counts


def warn_of_coarse(dtype: Any, smoothing: float | None) -> None:
    """Warn if an average stands still where a step changes it by too little."""
    info = jnp.finfo(dtype)
    if smoothing is None or info.bits >= 32:
        return
    least = float(info.eps) / 2 / (1 - smoothing)
    warnings.warn(
        f"the average of smoothing={smoothing:g} is kept in {info.dtype}: it does not "
        f"move while the importance is within {least:.1%} of it, and scores below "
        f"{float(info.smallest_subnormal):.0e} are lost. Leave accumulator_dtype out, "
        "or give jnp.float32.",
        stacklevel=2,
    )


def smooth(
    smoothing: jax.typing.ArrayLike,
    before: Sequence[jax.Array],
    counts: jax.Array,
    new: Sequence[jax.Array],
    dead: Sequence[jax.Array],
    parts: Sequence[jax.Array] | None,
) -> tuple[list[jax.Array], jax.Array]:
    r"""Average scores after a step, and over how many steps.

    With smoothing :math:`s`, at the k-th step of a leaf,

    .. math::
        a_k = (1 - c_k) a_{k-1} + c_k T_k, \qquad c_k = \frac{1 - s}{1 - s^k},

    which is the exponential average with Adam's correction of its bias: from the first
    step on the average of equal scores is that score. A weight of zero that scores zero
    is forgotten: what was pruned has no past to come back from.

    Args:
        smoothing: s, in [0, 1).
        before: the averages so far, leaf by leaf,
        counts: and over how many steps: int32, shape (leaves,).
        new: T at this step, float32.
        dead: bools, where weight and score are zero.
        parts: bool scalars, whether a leaf takes part: what sits a step out keeps its
            average. None if all do.
    """
    came = jnp.stack(list(parts)).astype(jnp.int32) if parts else jnp.int32(1)
    counts = counts + came
    weights, after = _newest_weights(smoothing, counts), []
    for i, (old, score, gone) in enumerate(zip(before, new, dead, strict=True)):
        past = _rounded((1 - weights[i]) * old.astype(jnp.float32))
        mean = past + _rounded(weights[i] * score)
        mean = jnp.where(gone, 0, mean).astype(old.dtype)
        mean = mean if parts is None else jnp.where(parts[i], mean, old)
        # Stored once, so that all who compare it read the same bits.
        after.append(lax.optimization_barrier(mean))
    return after, counts


def _rounded(product: jax.Array) -> jax.Array:
    """The product, less one bit, so that no compiler makes one of it and a sum.

    Whether it would depends on the program, and so on the mesh.
    """
    return lax.reduce_precision(product, exponent_bits=8, mantissa_bits=22)


def _newest_weights(smoothing: jax.typing.ArrayLike, counts: jax.Array) -> jax.Array:
    """The coefficient c of every leaf, float32; 1 at its first step."""
    log = jnp.log(jnp.asarray(smoothing, jnp.float32))
    steps = jnp.maximum(counts, 1).astype(jnp.float32)
    return jnp.asarray(1 - smoothing, jnp.float32) / -jnp.expm1(steps * log)
