"""Checks of arguments, made once, when a transformation is built."""

import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp


def is_static(value: Any) -> bool:
    """Whether `value` is a plain Python or NumPy number, known before tracing."""
    return isinstance(value, Real) and not isinstance(value, jax.Array)


def check_ratio(ratio: Any) -> None:
    """Raise `ValueError` unless `ratio` can be the pruned fraction."""
    if callable(ratio):
        return
    if is_static(ratio):
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio={ratio} is outside [0, 1). {_ratio_remedy(ratio)}")
    elif not hasattr(ratio, "shape") or ratio.shape != ():
        raise ValueError(
            f"ratio={ratio!r} must be a number in [0, 1), an optax schedule, or a "
            "scalar array."
        )
    elif ratio.dtype.itemsize < 4 and jnp.issubdtype(ratio.dtype, jnp.inexact):
        raise ValueError(
            f"ratio is a {ratio.dtype} array, which is too coarse. Give it in float32; "
            "optax.inject_hyperparams takes the dtype of the parameters, unless told "
            "hyperparam_dtype=jnp.float32."
        )


def _ratio_remedy(ratio: Any) -> str:
    meaning = "It is the fraction of the prunable entries that is pruned"
    if 1 < ratio < math.inf:
        return (
            f"{meaning}; for {ratio:g}x compression, did you mean ratio=1-1/{ratio:g}? "
            f"(for {ratio:g} percent, ratio={ratio / 100:.6g})"
        )
    return f"{meaning}: ratio=0.95 keeps one entry in twenty."


def check_momentum(momentum: Any) -> None:
    """Raise `ValueError` unless `momentum` is in [0, 1) (arrays are trusted)."""
    if is_static(momentum) and not 0 <= momentum < 1:
        raise ValueError(
            f"momentum={momentum} is outside [0, 1). It is the coefficient β of the "
            "momentum buffer: the paper uses 0.98 and 0.99."
        )


def check_weight_decay(weight_decay: Any) -> None:
    """Raise `ValueError` if `weight_decay` is negative (arrays are trusted)."""
    if is_static(weight_decay) and not 0 <= weight_decay < math.inf:
        raise ValueError(
            f"weight_decay={weight_decay} must be finite and not negative: the decay "
            "is what turns passive weights into zeros. Try 1e-4 to 1e-3."
        )


def check_count(name: str, value: Any, least: int, meaning: str) -> int:
    """Return `value`; `ValueError` unless it is a whole number of `least` or more."""
    if not (is_static(value) and least <= value < 2**31 and value == int(value)):
        raise ValueError(
            f"{name}={value!r} must be a whole number of {least} or more, below 2**31: "
            f"{meaning}."
        )
    return int(value)
