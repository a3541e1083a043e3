"""Rules of products that sum over axes: matrix products and convolutions."""

from typing import Any

import numpy as np

from gsm_optax.units._axes import Axis, Value, zeros_only
from gsm_optax.units._contract import contract


def dot_general(walk: Any, eqn: Any, args: list[Value]) -> Value:
    """Axes that are summed over are one, and batch axes."""
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
    axes += [zeros_only(axis) for own in free for axis in own]
    folds = contract(walk, eqn, args, pairs, free, is_uniform=not left_batch)
    number = _product(left.number, right.number)
    return Value(tuple(axes), number, folds=folds)


def conv(walk: Any, eqn: Any, args: list[Value]) -> Value | list[Value]:
    """Features as in a matrix product; space is pinned."""
    (left, kernel), dims = args, eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        return walk.pin_all(eqn, args)
    batch, features, *space = (left.axes[i] for i in dims.lhs_spec)
    makes, reads, *window = (kernel.axes[i] for i in dims.rhs_spec)
    walk.pin(eqn, *space, *window)
    shape = eqn.outvars[0].aval.shape
    axes = [walk.new_pinned(eqn, size) for size in shape]
    axes[dims.out_spec[0]] = zeros_only(batch)
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
    axis = zeros_only(makes)
    if groups > 1:
        silent = (features["value"].reshape(groups, -1) == 0).all(1)
        axis["value"][np.repeat(silent, len(makes) // groups)] = 0.0
    return axis


def _product(one: float, other: float) -> float:
    """What a sum of products with these is, if that is zero."""
    return 0.0 if 0 in (one, other) else np.nan
