"""Let a bias add what units that go have added as constants."""

from collections.abc import Sequence

import numpy as np

from gsm_optax.units._axes import Axis
from gsm_optax.units._contract import Fold
from gsm_optax.units._program import Nodes


def fold_constants(
    arrays: list[np.ndarray],
    nodes: Nodes,
    fold: Fold,
    going: np.ndarray,
    gone: np.ndarray,
) -> None:
    r"""Add :math:`\sum_i c_i W_i` to the bias, over the units i that are going.

    Args:
        arrays: the leaves; that of the bias is replaced.
        nodes: of the leaves.
        fold: what adds the constants, to what.
        going: bool[nodes]: nodes of units that go now.
        gone: bool[nodes]: nodes of units that went before, and add nothing any more.
    """
    axes = fold.weight.axes
    weight = _moved(_double(arrays[fold.weight.leaf]), nodes, axes)
    weight = weight.reshape([len(axis) for axis in axes])
    constants = np.zeros((1,) * weight.ndim)
    is_there = np.ones((1,) * weight.ndim, bool)
    for axis, value in fold.summed:
        row = _along(fold, axis)
        here = going[axis["id"]].reshape(row)
        # Where two axes are summed over, an entry is of two units, and counts once.
        constants = np.where(here, np.nan_to_num(value).reshape(row), constants)
        is_there = is_there & ~gone[axis["id"]].reshape(row)
    made = [_place(fold, axis) for axis in fold.made]
    rest = tuple(i for i in range(weight.ndim) if i not in made)
    added = (weight * np.where(is_there, constants, 0.0)).sum(rest)
    _add_to_bias(arrays, nodes, fold, added.transpose(np.argsort(np.argsort(made))))


def _place(fold: Fold, axis: Axis) -> int:
    """Which axis of the weight this is."""
    return next(
        i
        for i, own in enumerate(fold.weight.axes)
        if np.array_equal(own["id"], axis["id"])
    )


def _along(fold: Fold, axis: Axis) -> list[int]:
    place = _place(fold, axis)
    return [-1 if i == place else 1 for i in range(len(fold.weight.axes))]


def _add_to_bias(
    arrays: list[np.ndarray], nodes: Nodes, fold: Fold, added: np.ndarray
) -> None:
    """Add an array over the axes that the weight makes."""
    bias = arrays[fold.bias]
    total = _double(bias)
    moved = _moved(total, nodes, fold.adds)  # writes into total
    moved += added.reshape(moved.shape)
    arrays[fold.bias] = total.astype(bias.dtype)


def _double(array: np.ndarray) -> np.ndarray:
    """A copy in double precision."""
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _moved(array: np.ndarray, nodes: Nodes, axes: Sequence[Axis]) -> np.ndarray:
    """The array with its axes in the order of these, those of size 1 first."""
    order = [int(nodes.axis[axis["id"][0]]) for axis in axes if len(axis) > 1]
    rest = [i for i in range(array.ndim) if i not in order]
    return array.transpose([*rest, *order])
