"""Elementwise primitives, and what they make of numbers that are known."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from gsm_optax.units._axes import same_number

_erf = np.vectorize(math.erf, otypes=[float])


# What each makes of numbers; None where that is followed elsewhere, or not at all.
_NUMBERS: dict[str, Any] = {
    "abs": np.abs,
    "acos": None,
    "acosh": None,
    "add": np.add,
    "add_any": np.add,
    "and": None,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "bessel_i0e": None,
    "bessel_i1e": None,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "clz": None,
    "complex": None,
    "conj": None,
    "convert_element_type": lambda x: x,
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "cos": np.cos,
    "cosh": np.cosh,
    "digamma": None,
    "div": np.divide,
    "eq": np.equal,
    "eq_to": None,
    "erf": _erf,
    "erf_inv": None,
    "erfc": None,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "igamma": None,
    "igammac": None,
    "imag": None,
    "integer_pow": None,
    "is_finite": None,
    "le": np.less_equal,
    "le_to": None,
    "lgamma": None,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "lt_to": None,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "name": lambda x: x,
    "ne": np.not_equal,
    "neg": np.negative,
    "nextafter": None,
    "not": None,
    "one_minus_square": lambda x: 1 - x * x,
    "or": None,
    "polygamma": None,
    "population_count": None,
    "pow": np.power,
    "pvary": lambda x: x,
    "real": lambda x: x,
    "reduce_precision": None,
    "rem": None,
    "round": np.round,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": None,
    "sharding_constraint": lambda x: x,
    "shift_left": None,
    "shift_right_arithmetic": None,
    "shift_right_logical": None,
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": lambda x: x,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
    "xor": None,
}


def is_elementwise(name: str) -> bool:
    """Whether a primitive of this name has equal shapes throughout, and no axis."""
    return name in _NUMBERS


def elementwise_number(eqn: Any, numbers: list[Any]) -> np.ndarray:
    """What the primitive makes of numbers, element by element; NaN if not known.

    A product with zero is zero whatever the other factor is, as long as that is finite.
    Infinity stands for anything that is not finite.
    """
    name = eqn.primitive.name
    numbers = [np.asarray(x, np.float64) for x in numbers]
    unknown = np.any(np.broadcast_arrays(*map(np.isnan, numbers)), axis=0)
    with np.errstate(all="ignore"):
        if name == "select_n":
            return _select(*numbers)
        made = np.where(unknown, np.nan, _evaluate(eqn, name, numbers))
    if name in ("mul", "div"):
        made = np.where((numbers[0] == 0) & np.isnan(numbers[1]), 0.0, made)
    if name == "mul":
        made = np.where((numbers[1] == 0) & np.isnan(numbers[0]), 0.0, made)
    return made


def _evaluate(eqn: Any, name: str, numbers: list[np.ndarray]) -> np.ndarray:
    """What it makes of known numbers; infinite if they have no finite result."""
    if name == "integer_pow":
        made = numbers[0] ** eqn.params["y"]
    elif name == "convert_element_type" and not _is_inexact(eqn):
        made = _to_integer(eqn, numbers[0])
    elif name == "reduce_precision":
        made = lax.reduce_precision(numbers[0].astype(np.float32), **eqn.params)
    elif name == "round" and not eqn.params["rounding_method"]:  # away from zero
        made = np.trunc(numbers[0] + np.copysign(0.5, numbers[0]))
    elif _NUMBERS[name] is None:
        return np.full(np.broadcast_shapes(*map(np.shape, numbers)), np.nan)
    else:
        made = _NUMBERS[name](*numbers)
        if name == "div" and not _is_inexact(eqn):
            made = np.trunc(made)
    dtype = eqn.outvars[0].aval.dtype
    if jnp.issubdtype(dtype, jnp.floating):  # which may be one of eight bits
        made = np.asarray(made, np.float64).astype(dtype).astype(np.float64)
    return np.where(np.isnan(made), np.inf, made)


def _is_inexact(eqn: Any) -> bool:
    return jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)


def _to_integer(eqn: Any, number: np.ndarray) -> np.ndarray:
    dtype = eqn.outvars[0].aval.dtype
    if dtype == jnp.bool_:
        return (number != 0).astype(np.float64)
    bounds = jnp.iinfo(dtype)  # what is out of them depends on the platform
    is_inside = (number >= int(bounds.min)) & (number <= int(bounds.max))
    return np.where(is_inside, np.trunc(number), np.inf)


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    same = same_number(cases)
    for i, case in enumerate(cases):
        same = np.where(which == i, case, same)
    return same
