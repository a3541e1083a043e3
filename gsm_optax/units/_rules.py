"""One rule a primitive: which axes of its operands and results are the same.

A rule takes the walk, the equation and its operands' `Value`s, and returns those of its
results. What no rule knows pins every axis of its operands and results.
"""

from collections.abc import Callable
from typing import Any

from gsm_optax.units import _along, _control, _elementwise, _move, _products
from gsm_optax.units._axes import Value
from gsm_optax.units._control import CALLS
from gsm_optax.units._elementwise import AS_IT_IS
from gsm_optax.units._numbers import is_elementwise

_REDUCTIONS = (
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and"),
    *("reduce_or", "reduce_xor", "argmax", "argmin"),
)
_CUMULATIONS = "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"
_WINDOWS = "reduce_window_sum", "reduce_window_max", "reduce_window_min"

RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("optimization_barrier", "device_put"), _elementwise.barrier),
    "transpose": _move.transpose,
    "squeeze": _move.squeeze,
    "broadcast_in_dim": _move.broadcast,
    "rev": _move.reverse,
    "concatenate": _move.concatenate,
    "slice": _move.take_slice,
    "split": _move.split,
    "stack": _move.stack,
    "unstack": _move.unstack,
    "tile": _move.tile,
    "pad": _move.pad,
    "reshape": _move.reshape,
    "dot_general": _products.dot_general,
    "conv_general_dilated": _products.conv,
    **dict.fromkeys(_REDUCTIONS, _along.reduce),
    **dict.fromkeys(_CUMULATIONS, _along.cumulate),
    **dict.fromkeys(_WINDOWS, _along.reduce_window),
    "sort": _along.sort,
    "top_k": _along.top_k,
    "iota": _along.iota,
    "gather": _along.gather,
    "dynamic_slice": _along.dynamic_slice,
    "dynamic_update_slice": _along.dynamic_update_slice,
    **dict.fromkeys(CALLS, _control.call),
    "cond": _control.cond,
    "scan": _control.scan,
}

_NOT_ONCE = {"scan", "cond"}  # their programs run any number of times
_SUMS = {"dot_general", "conv_general_dilated"}
# A leaf stays one, entry by entry, through these.
_MOVES = CALLS | AS_IT_IS | {"transpose", "squeeze", "broadcast_in_dim", "reshape"}


def apply_rule(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """The results of an equation."""
    name = eqn.primitive.name
    if name in _NOT_ONCE:
        walk.consume(args)
        args = [arg._replace(leaf=-1) for arg in args]
    outs = _results(walk, eqn, args)
    if name not in _MOVES:
        outs = [out._replace(leaf=-1) for out in outs]
    if name not in CALLS and all(out.leaf < 0 for out in outs):
        walk.consume(args)
    if name not in _SUMS:
        outs = [out._replace(folds=None) for out in outs]
    is_weight = all(arg.is_weight for arg in args)
    return [out._replace(is_weight=is_weight) for out in outs]


def _results(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name in RULES:
        outs = RULES[name](walk, eqn, args)
    elif is_elementwise(name):
        outs = _elementwise.elementwise(walk, eqn, args)
    else:
        outs = walk.pin_all(eqn, args)
    return [outs] if isinstance(outs, Value) else outs
