"""Checks of arguments, made once, when a transformation is built."""

import math
from fractions import Fraction
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp


def is_static(value: Any) -> bool:
    """Whether `value` is a plain Python or NumPy number, known before tracing."""
    return isinstance(value, Real) and not isinstance(value, jax.Array)


def concrete(value: Any) -> float | None:
    """The number that a scalar is, or None where it is traced."""
    return None if isinstance(value, jax.core.Tracer) else float(value)


def check_ratio(ratio: Any) -> None:
    """Raise `ValueError` unless `ratio` can be the pruned fraction.

    Numbers and arrays whose value is known are checked, and so is the first value of a
    schedule; what is traced or comes later is not.
    """
    _check_ratio_value(first_value(ratio), "ratio(0)" if callable(ratio) else "ratio")


def first_value(value: Any) -> Any:
    """The value of a schedule at step 0; a number or an array as it is."""
    if not callable(value):
        return value
    with jax.ensure_compile_time_eval():  # known, also where jit traces this
        return value(jnp.int32(0))


def _check_ratio_value(ratio: Any, name: str) -> None:
    """Raise `ValueError` unless a number or a scalar array can be the fraction."""
    if not is_static(ratio):
        if not hasattr(ratio, "shape") or ratio.shape != ():
            raise ValueError(
                f"{name}={ratio!r} must be a number in [0, 1), an optax schedule, or a "
                "scalar array."
            )
        if ratio.dtype.itemsize < 4 and jnp.issubdtype(ratio.dtype, jnp.inexact):
            raise ValueError(
                f"{name} is a {ratio.dtype} array, which is too coarse. Give it in "
                "float32; optax.inject_hyperparams takes the dtype of the parameters, "
                "unless told hyperparam_dtype=jnp.float32."
            )
    value = concrete(ratio)
    if value is not None and not 0 <= value < 1:
        raise ValueError(f"{name}={value:g} is outside [0, 1). {_ratio_remedy(value)}")


def check_kept(ratio: float | None, total: int) -> None:
    """Raise `ValueError` if a known ratio keeps none of so many entries."""
    if ratio is None or total > round(Fraction(ratio) * total):
        return
    remedy = (
        f"At most ratio={(total - 1) / total:.9g} (1-1/{total}) keeps one; or do more "
        "leaves belong to prunable=?"
        if total
        else "All prunable leaves are empty: give others with prunable=."
    )
    raise ValueError(
        f"ratio={ratio:g} keeps none of the {total} prunable entries. {remedy}"
    )


def _ratio_remedy(ratio: float) -> str:
    meaning = "It is the fraction of the prunable entries that is pruned"
    if 1 < ratio < math.inf:
        percent = f" (for {ratio:g} percent, ratio={ratio / 100:.6g})"
        return (
            f"{meaning}; for {ratio:g}x compression, did you mean ratio=1-1/{ratio:g}?"
            f"{percent if ratio < 100 else ''}"
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
