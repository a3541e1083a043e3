"""Whether a program is another one, without some indices of its axes."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Parameters that follow from the shapes of the results, or are compared on their own.
_SHAPES = {
    *("shape", "new_sizes", "sizes", "slice_sizes", "feature_group_count"),
    *("start_indices", "limit_indices", "sharding", "out_sharding"),
}


def is_same_program(
    large: Any,
    small: Any,
    nodes: dict[Any, Any],
    is_kept: np.ndarray,
    place: tuple[Any, ...] = (),
) -> bool:
    """Compare equation by equation: primitives, wiring, literals, parameters, shapes.

    Args:
        large: jaxpr, closed or not, that a walk has been through.
        small: jaxpr that may be the same with fewer indices.
        nodes: `Walk.nodes`: of each axis at each place the nodes of its indices.
        is_kept: bool[nodes]: which are left in `small`.
        place: of `large`, inside the program that was walked through.
    """

    def same_array(one: Any, other: Any, *name: Any) -> bool:
        return _is_same_array(one, other, nodes.get((*place, *name)), is_kept)

    consts = [getattr(program, "consts", ()) for program in (large, small)]
    one, other = (getattr(program, "jaxpr", program) for program in (large, small))
    if len(consts[0]) != len(consts[1]) or len(one.eqns) != len(other.eqns):
        return False
    if not all(
        same_array(a, b, "constant", i)
        for i, (a, b) in enumerate(zip(*consts, strict=True))
    ):
        return False
    wires: list[dict[Any, int]] = [{}, {}]
    for wire, jaxpr in zip(wires, (one, other), strict=True):
        wire.update((v, i) for i, v in enumerate([*jaxpr.constvars, *jaxpr.invars]))

    def same_atoms(ours: Any, theirs: Any, *name: Any) -> bool:
        if len(ours) != len(theirs):
            return False
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            literal = hasattr(a, "val"), hasattr(b, "val")
            if literal == (True, True):
                same = same_array(a.val, b.val, *name, i)
            else:
                same = not any(literal) and wires[0][a] == wires[1][b]
            if not same:
                return False
        return True

    for i, (ours, theirs) in enumerate(zip(one.eqns, other.eqns, strict=True)):
        same = same_atoms(ours.invars, theirs.invars, i, "operand")
        if not same or not _is_same_equation(ours, theirs, nodes, is_kept, (*place, i)):
            return False
        for wire, eqn in zip(wires, (ours, theirs), strict=True):
            wire.update((var, len(wire) + j) for j, var in enumerate(eqn.outvars))
    return same_atoms(one.outvars, other.outvars, "operand")


def _is_same_equation(
    ours: Any, theirs: Any, nodes: Any, is_kept: np.ndarray, place: tuple[Any, ...]
) -> bool:
    if ours.primitive.name != theirs.primitive.name:
        return False
    shapes = [var.aval.shape for var in ours.outvars]
    if place in nodes:
        shapes = [tuple(is_kept[ids].sum() for ids in axes) for axes in nodes[place]]
    if shapes != [var.aval.shape for var in theirs.outvars]:
        return False
    if [v.aval.dtype for v in ours.outvars] != [v.aval.dtype for v in theirs.outvars]:
        return False
    starts = list(ours.params.get("start_indices") or ())
    cut = nodes.get((*place, "cut"))
    if cut is not None:
        starts = [is_kept[ids[:n]].sum() for ids, n in zip(cut, starts, strict=True)]
    if starts != list(theirs.params.get("start_indices") or ()):
        return False
    inside = programs_in(ours.params), programs_in(theirs.params)
    return (
        _plain_params(ours.params) == _plain_params(theirs.params)
        and len(inside[0]) == len(inside[1])
        and all(
            is_same_program(a, b, nodes, is_kept, (*place, i))
            for i, (a, b) in enumerate(zip(*inside, strict=True))
        )
    )


def _is_same_array(one: Any, other: Any, axes: Any, is_kept: np.ndarray) -> bool:
    dtypes = jnp.result_type(one), jnp.result_type(other)
    if dtypes[0] != dtypes[1]:
        return False
    if jnp.issubdtype(dtypes[0], jax.dtypes.extended):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
        axes = None
    one, other = np.asarray(one), np.asarray(other)
    if axes is not None:
        one = one[np.ix_(*(is_kept[ids] for ids in axes[0]))]
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def programs_in(params: dict[str, Any]) -> list[Any]:
    """The programs among the parameters of an equation."""
    values = [
        value
        for entry in params.values()
        for value in (entry if isinstance(entry, tuple | list) else [entry])
    ]
    return [value for value in values if _is_program(value)]


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns")


def _plain_params(params: dict[str, Any]) -> str:
    """Parameters without shapes, programs and functions."""
    plain = {
        name: value
        for name, value in params.items()
        if name not in _SHAPES and not callable(value) and not programs_in({"": value})
    }
    return re.sub(" at 0x[0-9a-f]+", "", repr(plain))
