"""Rule of elementwise primitives: axis i of an operand is axis i of the result."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from gsm_optax.units._axes import Value
from gsm_optax.units._contract import add_bias
from gsm_optax.units._numbers import elementwise_number

AS_IT_IS = {"convert_element_type", "copy", "copy_p", "stop_gradient"}


def elementwise(walk: Any, eqn: Any, args: list[Value]) -> Value | list[Value]:
    """Axis i with axis i, but for those of size 1; scalars have none."""
    shape = eqn.outvars[0].aval.shape
    arrays = [arg for arg in args if arg.axes]
    if any(len(arg.axes) != len(shape) for arg in arrays):
        return walk.pin_all(eqn, args)
    number = float(elementwise_number(eqn, [arg.number for arg in args]))
    axes = []
    for i, size in enumerate(shape):
        full = [arg.axes[i] for arg in arrays if len(arg.axes[i]) == size]
        axis = walk.join(full) if full else walk.new(size)
        # What is repeated along the axis counts as a whole: its one index is another's.
        values = [
            arg.axes[i]["value"]
            if arg.axes and len(arg.axes[i]) == size
            else arg.number
            for arg in args
        ]
        axis["value"] = elementwise_number(eqn, values)
        finite = np.all(np.broadcast_arrays(*map(np.isfinite, values)), axis=0)
        walk.add(eqn, axis, finite & np.isinf(axis["value"]))  # and so to all it meets
        axes.append(axis)
    if eqn.primitive.name in AS_IT_IS and _holds_numbers(eqn.outvars[0].aval.dtype):
        return Value(tuple(axes), number, leaf=args[0].leaf)
    if eqn.primitive.name == "add":
        add_bias(walk, eqn, args)
    return Value(tuple(axes), number)


def _holds_numbers(dtype: Any) -> bool:
    """Whether a leaf is much the same in it; in eight bits and integers it is not."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16


def barrier(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """The operands as they are."""
    return args
