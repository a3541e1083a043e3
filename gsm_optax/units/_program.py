"""Trace a network, and walk through it from its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax.units._axes import Value
from gsm_optax.units._families import Family
from gsm_optax.units._walk import Walk


def trace(fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Any:
    """The program of fn(params, *inputs).

    Raises:
        ValueError: if it cannot be traced.
    """
    try:
        return jax.make_jaxpr(fn)(params, *inputs)
    except Exception as error:
        raise ValueError(
            f"fn(params, *inputs) cannot be traced: {error}\nGive a function that "
            "takes the parameters first and then the inputs, as in find_units(lambda "
            "params, x: model.apply(params, x), params, x). What is no array, such as "
            "train=False, belongs into the lambda."
        ) from error


class Nodes(NamedTuple):
    """All indices of all axes of all leaves: a walk numbers them first, in order."""

    leaf: np.ndarray
    axis: np.ndarray
    index: np.ndarray


def leaf_nodes(shapes: list[Any]) -> Nodes:
    """Where in the leaves the first nodes of a walk are."""
    places = [
        (np.full(size, leaf), np.full(size, axis), np.arange(size))
        for leaf, shape in enumerate(shapes)
        for axis, size in enumerate(shape)
    ]
    none = (np.zeros(0, int),) * 3
    return Nodes(*map(np.concatenate, zip(none, *places, strict=True)))


def walk_program(
    program: Any,
    values: list[list[Any]],
    choices: dict[Any, int],
    numbers: list[float] | None = None,
) -> Walk:
    """Walk through a traced program.

    Args:
        program: closed jaxpr, whose first inputs are the leaves of the parameters.
        values: for each leaf and each of its axes, what the slices there are equal to.
        choices: of `Walk`.
        numbers: for each leaf what all its entries are equal to; NaN if they are not.
    """
    walk = Walk(choices)
    jaxpr = program.jaxpr
    avals = [var.aval for var in jaxpr.invars]
    leaves = []
    numbers = numbers or [np.nan] * len(values)
    for i, (known, number) in enumerate(zip(values, numbers, strict=True)):
        axes = tuple(map(walk.new, avals[i].shape, known))
        leaves.append(Value(axes, number, is_weight=True, leaf=i))
    walk.leaf_nodes = walk.ties.size
    used = {var for eqn in jaxpr.eqns for var in eqn.invars if not hasattr(var, "val")}
    used.update(var for var in jaxpr.outvars if not hasattr(var, "val"))
    for var, value in zip(jaxpr.invars, leaves, strict=False):
        _pin(walk, value, "not used" if var not in used else "")
        is_float = jnp.issubdtype(var.aval.dtype, jnp.inexact)
        _pin(walk, value, "" if is_float else "not floating-point")
    inputs = [Value(walk.new_axes(aval.shape)) for aval in avals[len(values) :]]
    for value in inputs:
        _pin(walk, value, "input")
    for value in (*leaves, *inputs):
        walk.see(value)
    outs = walk.run(program, [*leaves, *inputs])
    for value in outs:
        _pin(walk, value, "output")
    walk.finish(outs)
    return walk


def _pin(walk: Walk, value: Value, reason: str) -> None:
    for axis in value.axes if reason else ():
        walk.ties.pin(axis["id"], reason)


def unit_nodes(family: Family, nodes: Nodes) -> np.ndarray:
    """A node of each unit of a family."""
    part = family.slices[0]
    first = np.flatnonzero((nodes.leaf == part.leaf) & (nodes.axis == part.axis))[0]
    return first + part.indices[:, 0]
