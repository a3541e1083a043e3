"""Sums over axes: what adds nothing to them, and what adds a constant.

A constant c of a unit adds c·W to the sum, which a bias that comes next can add in its
place: so the unit can go as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gsm_optax.units._axes import Axis, Value


@dataclass
class Fold:
    """A sum that constants are added to, and the bias that could add them.

    Attributes:
        name: of the primitive.
        place: of the equation.
        weight: what the constants are multiplied with, a leaf.
        summed: for each axis that is summed over, that of the weight, and what the
            activation is known to be along it.
        made: axes of the weight that the sum has.
        bias: the leaf that is added to all of the sum, or -1.
        adds: its axes, in the order of `made`.
    """

    name: str
    place: tuple[Any, ...]
    weight: Value
    summed: list[tuple[Axis, np.ndarray]]
    made: list[Axis]
    bias: int = -1
    adds: Sequence[Axis] = ()

    @property
    def constant(self) -> np.ndarray:
        """Nodes that add a constant."""
        return np.concatenate(
            [
                axis["id"][~np.isnan(value) & (value != 0) & (axis["value"] != 0)]
                for axis, value in self.summed
            ]
        )


def contract(
    walk: Any,
    eqn: Any,
    args: list[Value],
    pairs: list[tuple[Axis, Axis]],
    made: list[list[Axis]],
    is_uniform: bool,
) -> Fold | None:
    """Tie axes that are summed over in pairs, and note which indices add something.

    Args:
        walk: the walk.
        eqn: the equation.
        args: its operands.
        pairs: axes of the first and of the second of them.
        made: other axes that they have in the result, of each.
        is_uniform: whether a constant adds the same everywhere.

    Returns:
        What could be folded, if any.
    """
    left, right = args
    is_read = left.is_weight != right.is_weight
    weight = right if right.is_weight else left
    summed = []
    for one, other in pairs:
        walk.tie(one, other)
        walk.read.append(one["id"])
        silent = (one["value"] == 0) | (other["value"] == 0)
        reader, read = (other, one) if right.is_weight else (one, other)
        is_constant = ~silent & ~np.isnan(read["value"]) & is_read
        walk.varying.append(one["id"][~silent & ~is_constant])
        walk.add(eqn, one, ~silent & ~is_constant)
        summed.append((reader, read["value"]))
    if not is_read:
        return None
    own = made[1] if right.is_weight else made[0]
    fold = Fold(eqn.primitive.name, walk.place, weight, summed, own)
    if not len(fold.constant):
        return None
    if not is_uniform or not walk.is_leaf(weight):
        walk.sums.append((fold.name, fold.constant))
        return None
    walk.folds.append(fold)
    return fold


def add_bias(walk: Any, eqn: Any, args: list[Value]) -> None:
    """Note a bias that is added to a sum, all along what the weight makes of it."""
    for (value, bias), var in zip((args, args[::-1]), eqn.invars, strict=True):
        fold = value.folds
        if not fold or not bias.axes or bias.leaf < 0 or walk.uses[var] > 1:
            continue
        if fold.place[:-1] != walk.place[:-1]:  # it may be used elsewhere, too
            continue
        places = [
            [i for i, own in enumerate(value.axes) if np.array_equal(own["id"], ids)]
            for ids in (axis["id"] for axis in fold.made)
        ]
        taken = [i[0] for i in places if len(i) == 1]
        adds = [bias.axes[i] for i in taken]
        rest = [axis for i, axis in enumerate(bias.axes) if i not in taken]
        if (
            len(taken) == len(fold.made)
            and [len(axis) for axis in adds] == [len(axis) for axis in fold.made]
            and walk.is_leaf(Value(tuple(adds), leaf=bias.leaf))
            and not any(len(axis) > 1 and walk.is_of_leaf(axis) for axis in rest)
        ):
            fold.bias, fold.adds = bias.leaf, adds
