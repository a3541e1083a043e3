"""Rules of what works along an axis: its indices are mixed, ordered or picked."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from gsm_optax.units._axes import (
    Axis,
    Value,
    forget,
    same_number,
    with_values,
    zeros_only,
)


def reduce(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """Axes that are summed (or the like) over are pinned, the others stay."""
    gone, axes = eqn.params["axes"], args[0].axes
    walk.pin(eqn, *(axes[i] for i in gone))
    name = eqn.primitive.name
    keep = name in ("reduce_max", "reduce_min")
    known = keep or name in ("reduce_sum", "reduce_prod")
    # Nothing to reduce gives the operation's own neutral element.
    known = known and all(len(axes[i]) for i in gone)
    kept = [axis for i, axis in enumerate(axes) if i not in gone]
    if not known:
        return Value(tuple(map(forget, kept)))
    number = args[0].number if keep else _zero(args[0].number)
    return Value(tuple(_known_values(axis, keep) for axis in kept), number)


def cumulate(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """The axis along which it goes is pinned."""
    along = eqn.params["axis"]
    walk.pin(eqn, args[0].axes[along])
    keep = eqn.primitive.name in ("cummax", "cummin")
    known = keep or eqn.primitive.name in ("cumsum", "cumprod")
    return Value(
        tuple(
            _known_values(axis, keep) if known and i != along else forget(axis)
            for i, axis in enumerate(args[0].axes)
        )
    )


def sort(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """All operands are sorted alike; the axis that is sorted is pinned."""
    along = eqn.params["dimension"]
    for arg in args:
        walk.pin(eqn, arg.axes[along])
    axes = [
        walk.join(column) for column in zip(*(arg.axes for arg in args), strict=True)
    ]
    return [
        Value(
            tuple(
                with_values(axis, own["value"] if i != along else np.nan)
                for i, (axis, own) in enumerate(zip(axes, arg.axes, strict=True))
            )
        )
        for arg in args
    ]


def top_k(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """The last axis is pinned, and its new one."""
    *kept, last = args[0].axes
    if eqn.params.get("axis", len(kept)) not in (-1, len(kept)):
        return walk.pin_all(eqn, args)
    walk.pin(eqn, last)
    size = eqn.outvars[0].aval.shape[-1]
    axes = tuple(map(forget, kept))
    return [Value((*axes, walk.new_pinned(eqn, size))) for _ in eqn.outvars]


def reduce_window(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """Axes that a window moves along are pinned."""
    shape, axes = eqn.outvars[0].aval.shape, []
    for i, axis in enumerate(args[0].axes):
        window = eqn.params["window_dimensions"][i]
        untouched = (
            window == 1
            and eqn.params["window_strides"][i] == 1
            and eqn.params["base_dilation"][i] == 1
            and tuple(eqn.params["padding"][i]) == (0, 0)
        )
        if untouched:
            axes.append(zeros_only(axis))
        else:
            walk.pin(eqn, axis)
            axes.append(walk.new_pinned(eqn, shape[i]))
    if not _windows_hold_entries(eqn):
        axes = list(map(forget, axes))
    return Value(tuple(axes))


def _windows_hold_entries(eqn: Any) -> bool:
    """Whether no window lies in the padding alone, whose maximum is -inf."""
    dilations = *eqn.params["base_dilation"], *eqn.params["window_dilation"]
    return set(dilations) <= {1} and all(
        max(padding) < window
        for window, padding in zip(
            eqn.params["window_dimensions"], eqn.params["padding"], strict=True
        )
    )


def iota(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """The axis along which it counts is pinned."""
    axes = walk.new_axes(eqn.outvars[0].aval.shape)
    walk.pin(eqn, axes[eqn.params["dimension"]])
    return Value(axes)


def gather(walk: Any, eqn: Any, args: list[Value]) -> Value | list[Value]:
    """Axes that are read whole stay, those that are picked from are pinned."""
    (operand, indices), dims = args, eqn.params["dimension_numbers"]
    if dims.operand_batching_dims:
        return walk.pin_all(eqn, args)
    sizes, shape = eqn.params["slice_sizes"], eqn.outvars[0].aval.shape
    axes: list[Any] = [None] * len(shape)
    offsets = iter(dims.offset_dims)
    for i, axis in enumerate(operand.axes):
        whole = sizes[i] == len(axis) and i not in dims.start_index_map
        if not whole:
            walk.pin(eqn, axis)
        if i not in dims.collapsed_slice_dims:
            place = next(offsets)
            axes[place] = axis if whole else walk.new_pinned(eqn, shape[place])
            axes[place] = with_values(axes[place], _filled(eqn, axes[place]["value"]))
    *rows, vector = indices.axes
    walk.pin(eqn, vector)
    places = [i for i in range(len(shape)) if i not in dims.offset_dims]
    for place, axis in zip(places, rows, strict=True):
        axes[place] = forget(axis)
    return Value(tuple(axes), float(_filled(eqn, operand.number)))


def _filled(eqn: Any, values: Any) -> Any:
    """What is known where some of the indices may be out of bounds.

    A filling of NaN, which is that of floating-point numbers, shows by itself.
    """
    if eqn.params["mode"] != GatherScatterMode.FILL_OR_DROP:
        return values
    filling = eqn.params["fill_value"]
    if filling is None and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
        return values
    return same_number([values, np.nan if filling is None else filling])


def dynamic_slice(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """Axes that are read whole stay, the others are pinned."""
    axes = []
    for axis, size in zip(args[0].axes, eqn.params["slice_sizes"], strict=True):
        if size == len(axis):
            axes.append(axis)
        else:
            walk.pin(eqn, axis)
            axes.append(walk.new_pinned(eqn, size))
    return args[0]._replace(axes=tuple(axes))


def dynamic_update_slice(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """Axes that are written whole are one, the others are pinned."""
    operand, update = args[:2]
    axes = []
    for axis, part in zip(operand.axes, update.axes, strict=True):
        if len(axis) == len(part):
            axes.append(walk.join([axis, part]))
        else:
            walk.pin(eqn, axis, part)
            axes.append(forget(axis))
    return Value(tuple(axes), float(same_number([operand.number, update.number])))


def _known_values(axis: Axis, keep: bool) -> Axis:
    """The axis, with only the zeros of its values unless all are to be kept."""
    return axis if keep else zeros_only(axis)


def _zero(number: float) -> float:
    return 0.0 if number == 0 else np.nan
