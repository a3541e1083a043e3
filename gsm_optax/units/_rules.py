"""One rule a primitive: which axes of its operands and results are the same.

A rule takes the walk, the equation and its operands' `Value`s, and returns those of its
results. What no rule knows pins every axis of its operands and results.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gsm_optax.units._axes import Axis, Value, same_number
from gsm_optax.units._contract import add_bias, contract
from gsm_optax.units._numbers import elementwise_number, is_elementwise

RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Any], Any]:
    """Register a function as the rule of these primitives."""

    def register(function: Any) -> Any:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply_rule(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """The results of an equation."""
    name = eqn.primitive.name
    function = RULES.get(name, elementwise if is_elementwise(name) else unknown)
    if name in _NOT_ONCE:
        walk.consume(args)
        args = [arg._replace(leaf=-1) for arg in args]
    outs = function(walk, eqn, args)
    outs = [outs] if isinstance(outs, Value) else outs
    if name not in _MOVES:
        outs = [out._replace(leaf=-1) for out in outs]
    if name not in _CALLS and all(out.leaf < 0 for out in outs):
        walk.consume(args)
    if name not in _SUMS:
        outs = [out._replace(folds=None) for out in outs]
    is_weight = all(arg.is_weight for arg in args)
    return [out._replace(is_weight=is_weight) for out in outs]


_CALLS = {
    *("pjit", "jit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "composite"),
}
_NOT_ONCE = {"scan", "cond"}  # their programs run any number of times
_SUMS = {"dot_general", "conv_general_dilated"}
_AS_IT_IS = {"convert_element_type", "copy", "copy_p", "stop_gradient"}
# A leaf stays one, entry by entry, through these.
_MOVES = _CALLS | _AS_IT_IS | {"transpose", "squeeze", "broadcast_in_dim", "reshape"}


def unknown(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    """Pin all axes."""
    outs = [Value(walk.new_axes(var.aval.shape)) for var in eqn.outvars]
    for value in (*args, *outs):
        walk.pin(eqn, *value.axes)
    return outs


def _known_values(axis: Axis, keep: bool) -> Axis:
    """The axis, with only the zeros of its values unless all are to be kept."""
    if keep:
        return axis
    axis = axis.copy()
    axis["value"] = np.where(axis["value"] == 0, 0.0, np.nan)
    return axis


def _zero(number: float) -> float:
    return 0.0 if number == 0 else np.nan


def _product(one: float, other: float) -> float:
    """What a sum of products with these is, if that is zero."""
    return 0.0 if 0 in (one, other) else np.nan


# Elementwise


def elementwise(walk: Any, eqn: Any, args: list[Value]) -> Value | list[Value]:
    """Axis i with axis i, but for those of size 1; scalars have none."""
    shape = eqn.outvars[0].aval.shape
    arrays = [arg for arg in args if arg.axes]
    if any(len(arg.axes) != len(shape) for arg in arrays):
        return unknown(walk, eqn, args)
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
    if eqn.primitive.name in _AS_IT_IS:
        return Value(tuple(axes), number, leaf=args[0].leaf)
    if eqn.primitive.name == "add":
        add_bias(walk, eqn, args)
    return Value(tuple(axes), number)


@rule("optimization_barrier")
def _barrier(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    return args


# Axes that move


@rule("transpose")
def _transpose(walk: Any, eqn: Any, args: list[Value]) -> Value:
    axes = args[0].axes
    return args[0]._replace(axes=tuple(axes[i] for i in eqn.params["permutation"]))


@rule("squeeze")
def _squeeze(walk: Any, eqn: Any, args: list[Value]) -> Value:
    axes, gone = args[0].axes, eqn.params["dimensions"]
    kept = tuple(axis for i, axis in enumerate(axes) if i not in gone)
    return args[0]._replace(axes=kept)


@rule("broadcast_in_dim")
def _broadcast(walk: Any, eqn: Any, args: list[Value]) -> Value:
    value, shape = args[0], eqn.params["shape"]
    axes = [walk.new(size, value.number) for size in shape]
    for source, i in zip(value.axes, eqn.params["broadcast_dimensions"], strict=True):
        if len(source) == shape[i]:
            axes[i] = source
    return Value(tuple(axes), value.number, leaf=value.leaf)


@rule("rev")
def _rev(walk: Any, eqn: Any, args: list[Value]) -> Value:
    gone = eqn.params["dimensions"]
    axes = [axis[::-1] if i in gone else axis for i, axis in enumerate(args[0].axes)]
    return args[0]._replace(axes=tuple(axes))


@rule("concatenate")
def _concatenate(walk: Any, eqn: Any, args: list[Value]) -> Value:
    along, axes = eqn.params["dimension"], []
    for i, column in enumerate(zip(*(arg.axes for arg in args), strict=True)):
        if i == along:
            axes.append(np.concatenate(column))
            continue
        axes.append(walk.join(column))
    return Value(tuple(axes), float(same_number([arg.number for arg in args])))


@rule("slice")
def _slice(walk: Any, eqn: Any, args: list[Value]) -> Value:
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


@rule("split")
def _split(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    (value,), along = args, eqn.params["axis"]
    ends = np.cumsum(eqn.params["sizes"])[:-1]
    parts = np.split(value.axes[along], ends)
    return [
        value._replace(axes=(*value.axes[:along], part, *value.axes[along + 1 :]))
        for part in parts
    ]


@rule("pad")
def _pad(walk: Any, eqn: Any, args: list[Value]) -> Value:
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
        moved = _same_as(axis, filling.number) if _is_padded(eqn) else axis
        axes.append(np.concatenate([around[0], moved, around[1]]))
    number = same_number([value.number, filling.number])
    return Value(tuple(axes), float(number))


def _is_padded(eqn: Any) -> bool:
    return any(any(config) for config in eqn.params["padding_config"])


def _same_as(axis: Axis, number: float) -> Axis:
    """The axis, whose values hold only where they are this number."""
    axis = axis.copy()
    axis["value"] = same_number([axis["value"], number])
    return axis


# Reshapes


@rule("reshape")
def _reshape(walk: Any, eqn: Any, args: list[Value]) -> Value | list[Value]:
    value, shape = args[0], eqn.outvars[0].aval.shape
    if eqn.params.get("dimensions") is not None or 0 in shape:
        return unknown(walk, eqn, args)
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
    axis = _known_values(axes[live], keep=True)
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


# Contractions


@rule("dot_general")
def _dot_general(walk: Any, eqn: Any, args: list[Value]) -> Value:
    (left, right), dims = args, eqn.params["dimension_numbers"]
    ((left_sum, right_sum), (left_batch, right_batch)) = dims
    if not (left.is_weight or right.is_weight):
        for value, batch in ((left, left_batch), (right, right_batch)):
            own = [axis for i, axis in enumerate(value.axes) if i not in batch]
            walk.products += [(eqn.primitive.name, axis["id"]) for axis in own]
    pairs = [
        (left.axes[i], right.axes[j]) for i, j in zip(left_sum, right_sum, strict=True)
    ]
    axes = []
    for i, j in zip(left_batch, right_batch, strict=True):
        axis = left.axes[i].copy()
        walk.tie(axis, right.axes[j])
        either = (axis["value"] == 0) | (right.axes[j]["value"] == 0)
        axis["value"] = np.where(either, 0.0, np.nan)
        axes.append(axis)
    free = [
        [axis for i, axis in enumerate(value.axes) if i not in gone]
        for value, gone in (
            (left, {*left_sum, *left_batch}),
            (right, {*right_sum, *right_batch}),
        )
    ]
    axes += [_known_values(axis, keep=False) for own in free for axis in own]
    folds = contract(walk, eqn, args, pairs, free, is_uniform=not left_batch)
    number = _product(left.number, right.number)
    return Value(tuple(axes), number, folds=folds)


@rule("conv_general_dilated")
def _conv(walk: Any, eqn: Any, args: list[Value]) -> Value | list[Value]:
    (left, kernel), dims = args, eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        return unknown(walk, eqn, args)
    batch, features, *space = (left.axes[i] for i in dims.lhs_spec)
    makes, reads, *window = (kernel.axes[i] for i in dims.rhs_spec)
    walk.pin(eqn, *space, *window)
    shape = eqn.outvars[0].aval.shape
    axes = [walk.new_pinned(eqn, size) for size in shape]
    axes[dims.out_spec[0]] = _known_values(batch, keep=False)
    axes[dims.out_spec[1]] = _grouped_zeros(groups, features, makes)
    folds = None
    if groups == 1:
        # Under a padding of zeros a constant is a map, not a number.
        is_uniform = not np.any(eqn.params["padding"])
        is_uniform &= set(eqn.params["lhs_dilation"]) <= {1}
        folds = contract(
            walk, eqn, args, [(features, reads)], [[], [makes]], is_uniform
        )
    else:
        _tie_groups(walk, eqn, groups, features, makes)
        walk.pin(eqn, reads)
    return Value(tuple(axes), _product(left.number, kernel.number), folds=folds)


def _tie_groups(walk: Any, eqn: Any, groups: int, features: Axis, makes: Axis) -> None:
    """A group's features with those it makes: only the whole group can go."""
    ins, outs = features.reshape(groups, -1), makes.reshape(groups, -1)
    for group in (ins, outs):
        walk.tie(np.repeat(outs[:, 0], group.shape[1]), group.reshape(-1))


def _grouped_zeros(groups: int, features: Axis, makes: Axis) -> Axis:
    axis = _known_values(makes, keep=False)
    if groups > 1:
        silent = (features["value"].reshape(groups, -1) == 0).all(1)
        axis["value"][np.repeat(silent, len(makes) // groups)] = 0.0
    return axis


# Along an axis


@rule(
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and"),
    *("reduce_or", "reduce_xor", "argmax", "argmin"),
)
def _reduce(walk: Any, eqn: Any, args: list[Value]) -> Value:
    gone, axes = eqn.params["axes"], args[0].axes
    walk.pin(eqn, *(axes[i] for i in gone))
    name = eqn.primitive.name
    keep = name in ("reduce_max", "reduce_min")
    known = keep or name in ("reduce_sum", "reduce_prod")
    # Nothing to reduce gives the operation's own neutral element.
    known = known and all(len(axes[i]) for i in gone)
    kept = [axis for i, axis in enumerate(axes) if i not in gone]
    if not known:
        return Value(tuple(map(_forget, kept)))
    number = args[0].number if keep else _zero(args[0].number)
    return Value(tuple(_known_values(axis, keep) for axis in kept), number)


def _forget(axis: Axis) -> Axis:
    axis = axis.copy()
    axis["value"] = np.nan
    return axis


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulate(walk: Any, eqn: Any, args: list[Value]) -> Value:
    along = eqn.params["axis"]
    walk.pin(eqn, args[0].axes[along])
    keep = eqn.primitive.name in ("cummax", "cummin")
    known = keep or eqn.primitive.name in ("cumsum", "cumprod")
    return Value(
        tuple(
            _known_values(axis, keep) if known and i != along else _forget(axis)
            for i, axis in enumerate(args[0].axes)
        )
    )


@rule("sort")
def _sort(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    along = eqn.params["dimension"]
    for arg in args:
        walk.pin(eqn, arg.axes[along])
    axes = [
        walk.join(column) for column in zip(*(arg.axes for arg in args), strict=True)
    ]
    return [
        Value(
            tuple(
                _with_values(axis, own["value"] if i != along else np.nan)
                for i, (axis, own) in enumerate(zip(axes, arg.axes, strict=True))
            )
        )
        for arg in args
    ]


def _with_values(axis: Axis, values: Any) -> Axis:
    axis = axis.copy()
    axis["value"] = values
    return axis


@rule("top_k")
def _top_k(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    *kept, last = args[0].axes
    if eqn.params.get("axis", len(kept)) not in (-1, len(kept)):
        return unknown(walk, eqn, args)
    walk.pin(eqn, last)
    size = eqn.outvars[0].aval.shape[-1]
    axes = tuple(map(_forget, kept))
    return [Value((*axes, walk.new_pinned(eqn, size))) for _ in eqn.outvars]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window(walk: Any, eqn: Any, args: list[Value]) -> Value:
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
            axes.append(_known_values(axis, keep=False))
        else:
            walk.pin(eqn, axis)
            axes.append(walk.new_pinned(eqn, shape[i]))
    if not _windows_hold_entries(eqn):
        axes = list(map(_forget, axes))
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


@rule("iota")
def _iota(walk: Any, eqn: Any, args: list[Value]) -> Value:
    axes = walk.new_axes(eqn.outvars[0].aval.shape)
    walk.pin(eqn, axes[eqn.params["dimension"]])
    return Value(axes)


# Rows and places


@rule("gather")
def _gather(walk: Any, eqn: Any, args: list[Value]) -> Value | list[Value]:
    (operand, indices), dims = args, eqn.params["dimension_numbers"]
    if dims.operand_batching_dims:
        return unknown(walk, eqn, args)
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
    *rows, vector = indices.axes
    walk.pin(eqn, vector)
    places = [i for i in range(len(shape)) if i not in dims.offset_dims]
    for place, axis in zip(places, rows, strict=True):
        axes[place] = _forget(axis)
    return Value(tuple(axes), operand.number)


@rule("dynamic_slice")
def _dynamic_slice(walk: Any, eqn: Any, args: list[Value]) -> Value:
    axes = []
    for axis, size in zip(args[0].axes, eqn.params["slice_sizes"], strict=True):
        if size == len(axis):
            axes.append(axis)
        else:
            walk.pin(eqn, axis)
            axes.append(walk.new_pinned(eqn, size))
    return args[0]._replace(axes=tuple(axes))


@rule("dynamic_update_slice")
def _dynamic_update_slice(walk: Any, eqn: Any, args: list[Value]) -> Value:
    operand, update = args[:2]
    axes = []
    for axis, part in zip(operand.axes, update.axes, strict=True):
        if len(axis) == len(part):
            axes.append(walk.join([axis, part]))
        else:
            walk.pin(eqn, axis, part)
            axes.append(_forget(axis))
    return Value(tuple(axes), float(same_number([operand.number, update.number])))


# Programs inside


@rule(*_CALLS)
def _call(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next(eqn.params[name] for name in names if name in eqn.params)
    return walk.enter(eqn, inner, args)


@rule("cond")
def _cond(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
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


@rule("scan")
def _scan(walk: Any, eqn: Any, args: list[Value]) -> list[Value]:
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
