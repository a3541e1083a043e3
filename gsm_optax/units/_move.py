"""Rules of primitives that move, cut, join and reshape axes."""

import math
from typing import Any

import numpy as np

from gsm_optax.units._axes import Axis, Value, same_number, with_values


def transpose(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """The same axes in another order."""
    axes = args[0].axes
    return args[0]._replace(axes=tuple(axes[i] for i in eqn.params["permutation"]))


def squeeze(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """Without axes of size 1."""
    axes, gone = args[0].axes, eqn.params["dimensions"]
    kept = tuple(axis for i, axis in enumerate(axes) if i not in gone)
    return args[0]._replace(axes=kept)


def broadcast(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """New axes are repetitions, tied to nothing."""
    value, shape = args[0], eqn.params["shape"]
    axes = [walk.new(size, value.number) for size in shape]
    for source, i in zip(value.axes, eqn.params["broadcast_dimensions"], strict=True):
        if len(source) == shape[i]:
            axes[i] = source
    return Value(tuple(axes), value.number, leaf=value.leaf)


def reverse(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """The same indices from the end."""
    gone = eqn.params["dimensions"]
    axes = [axis[::-1] if i in gone else axis for i, axis in enumerate(args[0].axes)]
    return args[0]._replace(axes=tuple(axes))


def concatenate(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """Axes one after the other; the others are one."""
    along, axes = eqn.params["dimension"], []
    for i, column in enumerate(zip(*(arg.axes for arg in args), strict=True)):
        if i == along:
            axes.append(np.concatenate(column))
            continue
        axes.append(walk.join(column))
    return Value(tuple(axes), float(same_number([arg.number for arg in args])))


def take_slice(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """The indices that are taken."""
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    axes = []
    for axis, start, limit, stride in zip(
        args[0].axes, starts, limits, strides, strict=True
    ):
        if stride != 1:  # the rest would be other ones when an index goes
            walk.pin(eqn, axis)
        axes.append(axis[start:limit:stride])
    return args[0]._replace(axes=tuple(axes))


def split(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """The indices of each part."""
    (value,), along = args, eqn.params["axis"]
    ends = np.cumsum(eqn.params["sizes"])[:-1]
    parts = np.split(value.axes[along], ends)
    return [
        value._replace(axes=(*value.axes[:along], part, *value.axes[along + 1 :]))
        for part in parts
    ]


def stack(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """One new axis, along which are the operands; the others are one."""
    axes = [walk.join(column) for column in zip(*(x.axes for x in args), strict=True)]
    new = with_values(walk.new_pinned(eqn, len(args)), [x.number for x in args])
    axes.insert(eqn.params["axis"], new)
    return Value(tuple(axes), float(same_number([x.number for x in args])))


def unstack(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """The arrays along one axis."""
    (value,), along = args, eqn.params["axis"]
    walk.pin(eqn, value.axes[along])
    axes = value.axes[:along] + value.axes[along + 1 :]
    return [value._replace(axes=axes) for _ in eqn.outvars]


def tile(walk: Any, eqn: Any, args: list[Value]) -> Value | list[Value]:
    """Each axis several times over."""
    (value,), reps = args, eqn.params["reps"]
    if len(reps) != len(value.axes):
        return walk.pin_all(eqn, args)
    axes = tuple(map(np.tile, value.axes, reps))
    return Value(axes, value.number)


def pad(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """What is put around cannot go."""
    value, filling = args
    axes = []
    for axis, (low, high, inner) in zip(
        value.axes, eqn.params["padding_config"], strict=True
    ):
        if low < 0 or high < 0 or inner:
            walk.pin(eqn, axis)
            size = low + high + len(axis) + max(len(axis) - 1, 0) * inner
            axes.append(walk.new_pinned(eqn, size))
            continue
        around = [walk.new(n, filling.number) for n in (low, high)]
        walk.pin(eqn, *around)
        # A value holds only where what is around it is the same.
        same = same_number([axis["value"], filling.number])
        moved = with_values(axis, same) if _is_padded(eqn) else axis
        axes.append(np.concatenate([around[0], moved, around[1]]))
    number = same_number([value.number, filling.number])
    return Value(tuple(axes), float(number))


def _is_padded(eqn: Any) -> bool:
    return any(any(config) for config in eqn.params["padding_config"])


def reshape(walk: Any, eqn: Any, args: list[Value]) -> Value | list[Value]:
    """Axes that are split or merged: one of them is followed, the others pinned."""
    value, shape = args[0], eqn.outvars[0].aval.shape
    if eqn.params.get("dimensions") is not None or 0 in shape:
        return walk.pin_all(eqn, args)
    axes = [walk.new(size, value.number) for size in shape]
    before = [len(axis) for axis in value.axes]
    for number, (sources, targets) in enumerate(_factors(before, shape)):
        old = [value.axes[i] for i in sources]
        if len(sources) == len(targets) == 1:
            new = old
        elif len(sources) == 1:
            new = _split_axis(walk, eqn, number, old[0], [shape[i] for i in targets])
        elif len(targets) == 1:
            new = [_merge_axes(walk, eqn, number, old)]
        else:
            walk.pin(eqn, *old)
            new = [walk.new_pinned(eqn, shape[i]) for i in targets]
        for i, axis in zip(targets, new, strict=True):
            axes[i] = axis
    is_moved = all(len(old) == len(new) == 1 for old, new in _factors(before, shape))
    leaf = value.leaf if is_moved else -1
    return Value(tuple(axes), value.number, leaf=leaf)


def _factors(before: Any, after: Any) -> list[tuple[list[int], list[int]]]:
    """Groups of axes that become groups of axes; those of size 1 are left out."""
    olds = [i for i, size in enumerate(before) if size != 1]
    news = [i for i, size in enumerate(after) if size != 1]
    groups = []
    while olds:
        old, new = [olds.pop(0)], [news.pop(0)]
        a, b = before[old[0]], after[new[0]]
        while a != b:
            if a < b:
                old.append(olds.pop(0))
                a *= before[old[-1]]
            else:
                new.append(news.pop(0))
                b *= after[new[-1]]
        groups.append((old, new))
    return groups


def _merge_axes(walk: Any, eqn: Any, group: int, axes: list[Axis]) -> Axis:
    """Axes written one after the other: each index of the live one, repeated."""
    sizes = [len(axis) for axis in axes]
    live = walk.choose(eqn, group, axes)
    if live is None:
        return walk.new(math.prod(sizes))
    for i, axis in enumerate(axes):
        if i != live:
            walk.pin(eqn, axis)
    axis = axes[live]
    return np.tile(
        np.repeat(axis, math.prod(sizes[live + 1 :])), math.prod(sizes[:live])
    )


def _split_axis(
    walk: Any, eqn: Any, group: int, axis: Axis, sizes: list[int]
) -> list[Axis]:
    """The other way: equal indices of the live axis are one."""
    new = [walk.new(size) for size in sizes]
    live = walk.choose(eqn, group, new)
    if live is None:
        return new
    for i, other in enumerate(new):
        if i != live:
            walk.pin(eqn, other)
    rows = np.moveaxis(axis.reshape(sizes), live, 0).reshape(sizes[live], -1)
    first = rows[:, 0].copy()
    walk.tie(np.repeat(first, rows.shape[1]), rows.reshape(-1))
    first["value"] = same_number(rows["value"].T)
    walk.tie(new[live], first)
    new[live] = first
    return new
