"""Rules of primitives with programs inside, which are walked through."""

from typing import Any

import numpy as np

from gsm_optax.units._axes import Value, same_number

CALLS = {
    *("pjit", "jit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "composite"),
}


def call(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """What the program inside returns."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next(eqn.params[name] for name in names if name in eqn.params)
    return walk.enter(eqn, inner, args)


def cond(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """What all branches say of their results."""
    _, *args = args
    results = [
        walk.enter(eqn, branch, args, i)
        for i, branch in enumerate(eqn.params["branches"])
    ]
    return [_join_values(walk, outs) for outs in zip(*results, strict=True)]


def _join_values(walk: Any, values: Any) -> Value:
    columns = zip(*(value.axes for value in values), strict=True)
    number = same_number([value.number for value in values])
    return Value(tuple(map(walk.join, columns)), float(number))


def scan(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """Carries tied to themselves, stacked leaves by their own axes."""
    inside = eqn.params["jaxpr"].jaxpr
    # What is stacked has one axis more outside; the parameters that tell how many of
    # each there are have changed with JAX's versions.
    num_carry = sum(map(_is_same_rank, eqn.outvars, inside.outvars))
    num_stacked = len(args) - sum(map(_is_same_rank, eqn.invars, inside.invars))
    num_consts = len(args) - num_stacked - num_carry
    consts, carry = args[:num_consts], args[num_consts : num_consts + num_carry]
    stacked = args[num_consts + num_carry :]
    walk.pin(eqn, *(value.axes[0] for value in stacked))
    rows = [value._replace(axes=value.axes[1:]) for value in stacked]
    while True:
        outs = walk.enter(eqn, eqn.params["jaxpr"], [*consts, *carry, *rows])
        after = [
            _join_values(walk, pair)._replace(is_weight=all(v.is_weight for v in pair))
            for pair in zip(carry, outs[:num_carry], strict=True)
        ]
        # What holds of the first step only is not known of the next.
        if all(map(_same_knowledge, carry, after)):
            break
        carry = after
    length = eqn.params["length"]
    steps = [value.axes for value in outs[num_carry:]]
    ys = [Value((walk.new_pinned(eqn, length), *axes)) for axes in steps]
    return after + ys


def _is_same_rank(outside: Any, inside: Any) -> bool:
    return outside.aval.ndim == inside.aval.ndim


def _same_knowledge(one: Value, other: Value) -> bool:
    pairs = zip(one.axes, other.axes, strict=True)
    return (
        one.is_weight == other.is_weight
        and np.array_equal(one.number, other.number, equal_nan=True)
        and all(
            np.array_equal(a["value"], b["value"], equal_nan=True) for a, b in pairs
        )
    )
