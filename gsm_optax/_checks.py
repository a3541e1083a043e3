"""Checks of arguments, made once, when a transformation is built."""

import math
from fractions import Fraction
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_static(value: Any) -> bool:
    """Whether `value` is a plain Python or NumPy number, known before tracing."""
    return isinstance(value, Real) and not isinstance(value, jax.Array)


def concrete(value: Any) -> float | None:
    """The number that a scalar is; None where it is traced, or on other hosts only."""
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    return float(value)


def check_ratio(ratio: Any, name: str = "ratio") -> None:
    """Raise `ValueError` unless `ratio` can be the pruned fraction.

    Numbers and arrays whose value is known are checked, and of a schedule the first
    value, and the last if it has one; what is traced or comes between is not.
    """
    at_first = f"{name}(0)" if callable(ratio) else name
    _check_ratio_value(first_value(ratio), at_first)
    if (last := last_value(ratio)) is not None:
        _check_ratio_value(last, f"{name}(end)")


def first_value(value: Any) -> Any:
    """The value of a schedule at step 0; a number or an array as it is."""
    if not callable(value):
        return value
    with jax.ensure_compile_time_eval():  # known, also where jit traces this
        return value(jnp.int32(0))


def last_value(value: Any) -> Any:
    """The value that a schedule ends at; None if it has no end, or is no schedule."""
    if not callable(value):
        return None
    with jax.ensure_compile_time_eval():
        late, last = (value(jnp.int32(step)) for step in (2**30, 2**31 - 1))
    end = concrete(last)
    # One that goes on for ever may be infinite there.
    is_end = end is not None and end == concrete(late) and math.isfinite(end)
    return last if is_end else None


def value_at(value: Any, step: Any) -> Any:
    """The value of a schedule at a step; a number or an array as it is."""
    return jnp.asarray(value(step)) if callable(value) else value


def _check_ratio_value(ratio: Any, name: str) -> None:
    """Raise `ValueError` unless a number or a scalar array can be the fraction."""
    if not is_static(ratio):
        if not hasattr(ratio, "shape") or ratio.shape != ():
            raise ValueError(
                f"{name}={ratio!r} must be a number in [0, 1), an optax schedule, or a "
                "scalar array."
            )
        _check_fine(name, ratio)
    if not _is_fraction(ratio):
        value = float(ratio)
        raise ValueError(f"{name}={value:g} is outside [0, 1). {_ratio_remedy(value)}")


def _known_values(ratio: Any) -> list[float]:
    """What is known of a ratio: its value, or of a schedule the first and the last."""
    values = [first_value(ratio), last_value(ratio)]
    known = [None if value is None else concrete(value) for value in values]
    return [value for value in known if value is not None]


def check_kept(ratio: Any, total: int) -> None:
    """Raise `ValueError` if a known ratio keeps none of so many entries.

    Of a schedule the first and the last value are looked at.
    """
    few = [x for x in _known_values(ratio) if total <= round(Fraction(x) * total)]
    if not few:
        return
    ratio = few[0]
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


def _check_fine(name: str, value: Any) -> None:
    """Raise `ValueError` if a scalar is an array in half precision."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and dtype.itemsize < 4 and jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"{name} is a {dtype} array, which is too coarse. Give it in "
            "float32; optax.inject_hyperparams takes the dtype of the parameters, "
            "unless told hyperparam_dtype=jnp.float32."
        )


def check_momentum(momentum: Any) -> None:
    """Raise `ValueError` unless `momentum` is a scalar in [0, 1) (as far as known)."""
    if callable(momentum):
        raise ValueError(
            f"momentum={momentum!r} must be a number: for a schedule of it, use "
            "optax.inject_hyperparams(gsm_sgd)(..., momentum=schedule)."
        )
    if not _is_real_scalar(momentum):
        raise ValueError(
            f"momentum={momentum!r} must be a number in [0, 1) or a scalar array; for "
            "none, momentum=0."
        )
    _check_fine("momentum", momentum)
    if not _is_fraction(momentum):
        raise ValueError(
            f"momentum={momentum} is outside [0, 1). It is the coefficient β of the "
            "momentum buffer: the paper uses 0.98 and 0.99."
        )


def check_smoothing(smoothing: Any) -> None:
    """Raise `ValueError` unless `smoothing` is a scalar in [0, 1) (as far as known)."""
    if not _is_real_scalar(smoothing):
        raise ValueError(
            f"smoothing={smoothing!r} must be a number in [0, 1) or a scalar array; "
            "for none, smoothing=0."
        )
    _check_fine("smoothing", smoothing)
    if not _is_fraction(smoothing):
        raise ValueError(
            f"smoothing={smoothing} is outside [0, 1): it is the fraction of the "
            "average importance that is kept at a step; try 0.9 to 0.99."
        )


def check_accumulator(dtype: Any) -> None:
    """Raise `ValueError` unless averages can be kept in a dtype; None is the usual."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"accumulator_dtype={jnp.dtype(dtype).name} is no floating-point dtype: "
            "momentum and averages have fractions. Leave it out, or give jnp.float32."
        )


def check_decay(name: str, decay: Any, least: float = 0) -> None:
    """Raise `ValueError` unless `decay` is a scalar of `least` or more, or a schedule.

    Of a schedule the first value is looked at.
    """
    first, called = first_value(decay), f"{name}(0)" if callable(decay) else name
    if not _is_real_scalar(first):
        raise ValueError(
            f"{called}={first!r} must be a number, or a scalar array: give {name} "
            "as a float or as an optax schedule of the step; for none, "
            f"{name}=0."
        )
    value = concrete(first)
    if value is not None and not least <= value < math.inf:
        wanted = "finite" if least < 0 else "finite and not negative"
        raise ValueError(
            f"{called}={first} must be {wanted}: the decay "
            "is what turns passive weights into zeros. Try 1e-4 to 1e-3."
        )


def check_floors(min_kept: Any, min_units: Any, units: Any) -> tuple[int, int]:
    """Return `min_kept` and `min_units`, 0 and 1 where they are None.

    Raises:
        ValueError: if they are no whole numbers, or do not go with `units`.
    """
    if units is not None and not hasattr(units, "among"):
        raise ValueError(
            f"units is a {type(units).__name__}: give what find_units returns."
        )
    if units is None and min_units is not None:
        raise ValueError(
            f"min_units={min_units!r} goes with units=; of entries, min_kept= is kept "
            "in every leaf."
        )
    if units is not None and min_kept is not None:
        raise ValueError(
            f"min_kept={min_kept!r} is of entries; with units=, min_units= is kept of "
            "every family."
        )
    static = "inject_hyperparams takes it as it is with static_args="
    kept = 0 if min_kept is None else min_kept
    kept = check_count("min_kept", kept, 0, f"entries of every leaf ({static})")
    number = 1 if min_units is None else min_units
    return kept, check_count(
        "min_units", number, 0, f"units of every family ({static})"
    )


def check_reserved(ratio: Any, reserved: int, total: int, floor: str) -> None:
    """Raise `ValueError` if a ratio keeps fewer entries than a floor does.

    Of a schedule the first and the last value are looked at.
    """
    for value in _known_values(ratio) if reserved else []:
        if total - round(Fraction(value) * total) >= reserved:
            continue
        raise ValueError(
            f"ratio={value:g} keeps {total - round(Fraction(value) * total)} of "
            f"{total} entries, but {floor} need {reserved}: give a lower floor, or at "
            f"most ratio={math.floor((1 - reserved / total) * 1e6) / 1e6:g}."
        )


def _is_real_scalar(value: Any) -> bool:
    if is_static(value):
        return True
    if not isinstance(value, jax.Array | np.ndarray) or value.shape != ():
        return False
    kinds = jnp.integer, jnp.floating
    return any(jnp.issubdtype(value.dtype, kind) for kind in kinds)


def _is_fraction(value: Any) -> bool:
    """Whether a scalar is in [0, 1), as far as it is known."""
    known = concrete(value)
    return known is None or 0 <= known < 1


def check_count(name: str, value: Any, least: int, meaning: str) -> int:
    """Return `value`; `ValueError` unless it is a whole number of `least` or more."""
    if not (is_static(value) and least <= value < 2**31 and value == int(value)):
        raise ValueError(
            f"{name}={value!r} must be a whole number of {least} or more, below 2**31: "
            f"{meaning}."
        )
    return int(value)


def check_room(name: str, is_needed: bool, has_room: bool) -> None:
    """Raise `ValueError` if a state lacks what the settings keep in it."""
    if is_needed and not has_room:
        raise ValueError(
            f"this state is of an optimizer without {name}, and has no place for it. "
            "Begin with a new one, tx.init(params), or keep the settings."
        )
