"""Indices of axes that belong together, and what is known of them.

An axis is a NumPy array with one record an index: `id`, a node of a union-find, and
`value`, the number that the whole slice at this index is equal to, NaN where that is
not known. Cutting, joining and repeating axes is indexing of such arrays.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

Axis = np.ndarray
RECORD = np.dtype([("id", np.int64), ("value", np.float64)])

# Reasons that say less than the name of a primitive, least telling first.
REASONS = ("", "size 1", "input", "output", "not used", "not floating-point")


class Value(NamedTuple):
    """An array of the program, by its axes."""

    axes: tuple[Axis, ...]
    number: float = np.nan  # what all its entries are equal to
    is_weight: bool = False  # made of parameters and constants only
    leaf: int = -1  # the leaf whose entries these are, perhaps moved
    folds: Any = None  # of a sum that a bias is still to be added to


class Ties:
    """Union-find over indices; a class of it that is pinned has a reason."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, np.int64)
        self._reason = np.zeros(0, np.int64)  # of roots: what pins the class, or 0
        self._size = 0
        self.reasons = list(REASONS)

    def new(self, size: int, value: Any = np.nan) -> Axis:
        """An axis whose indices are tied to nothing."""
        if self._size + size > len(self._parent):
            more = max(2 * len(self._parent), self._size + size, 4096)
            parent, reason = np.arange(more), np.zeros(more, np.int64)
            parent[: self._size] = self._parent[: self._size]
            reason[: self._size] = self._reason[: self._size]
            self._parent, self._reason = parent, reason
        axis: Any = np.empty(size, RECORD)
        axis["id"] = np.arange(self._size, self._size + size)
        axis["value"] = value
        self._size += size
        return axis

    def classes(self, ids: np.ndarray) -> np.ndarray:
        """The root of each node."""
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                self._parent[ids] = roots
                return roots
            roots = above

    def tie(self, one: np.ndarray, other: np.ndarray) -> None:
        """Put the nodes `one[i]` and `other[i]` into the same class."""
        if one is other or np.array_equal(one, other):
            return
        while True:
            a, b = self.classes(one), self.classes(other)
            low, high = np.minimum(a, b), np.maximum(a, b)
            apart = low != high
            if not apart.any():
                return
            low, high = low[apart], high[apart]
            np.minimum.at(self._parent, high, low)
            np.maximum.at(self._reason, self.classes(high), self._reason[high])

    def pin(self, ids: np.ndarray, reason: str) -> None:
        """No index of these may ever go."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        roots = self.classes(ids)
        np.maximum.at(self._reason, roots, self.reasons.index(reason))

    def pinned(self, ids: np.ndarray) -> np.ndarray:
        """For each node the index of the reason that pins it, or 0."""
        return self._reason[self.classes(ids)]

    @property
    def size(self) -> int:
        """Number of nodes."""
        return self._size


def slab_values(array: Any) -> list[np.ndarray]:
    """For each axis and index the number that fills the slice there, or NaN."""
    array = np.asarray(array)
    if not array.size:
        return [np.full(size, np.nan) for size in array.shape]
    if not np.iscomplexobj(array) and array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    return [_slabs(array, axis) for axis in range(array.ndim)]


def _slabs(array: np.ndarray, axis: int) -> np.ndarray:
    first = array[(0,) * axis + (slice(None),) + (0,) * (array.ndim - axis - 1)]
    shape = [-1 if i == axis else 1 for i in range(array.ndim)]
    others = tuple(i for i in range(array.ndim) if i != axis)
    same = (array == first.reshape(shape)).all(others)
    same &= np.imag(first) == 0
    return np.where(same, np.real(first).astype(np.float64), np.nan)


def with_values(axis: Axis, values: Any) -> Axis:
    """The axis, with other values."""
    axis = axis.copy()
    axis["value"] = values
    return axis


def forget(axis: Axis) -> Axis:
    """The axis, of whose values nothing is known."""
    return with_values(axis, np.nan)


def zeros_only(axis: Axis) -> Axis:
    """The axis, with only the zeros of its values."""
    return with_values(axis, np.where(axis["value"] == 0, 0.0, np.nan))


def same_number(numbers: Iterable[Any]) -> Any:
    """The number that all are equal to, element by element, or NaN."""
    first, *others = numbers
    for other in others:
        first = np.where(first == other, first, np.nan)
    return first
