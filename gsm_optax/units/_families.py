"""Units along one axis of a network, and which slices of its leaves they are."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gsm_optax._paths import listed


class Slices(NamedTuple):
    """What the units of a family hold of one axis of one leaf."""

    path: str
    leaf: int  # its place among the leaves
    axis: int
    size: int  # of the axis
    indices: np.ndarray  # int32[units, indices of each]

    def __str__(self) -> str:
        """Return the path and the axis, and where along it the units are."""
        flat = np.sort(self.indices.reshape(-1))
        where = ""
        if len(flat) < self.size:
            is_range = np.array_equal(flat, np.arange(flat[0], flat[-1] + 1))
            ends = f"{flat[0]}:{flat[-1] + 1}"
            where = f" {ends}" if is_range else f" {len(flat)} of {self.size}"
        times = self.indices.shape[1]
        return f"{self.path}[{self.axis}]{where}{f' x{times}' if times > 1 else ''}"

    def units_along(self) -> np.ndarray:
        """For each index of the axis the unit that it belongs to, or -1."""
        units = np.full(self.size, -1, np.int32)
        each = np.arange(len(self.indices))[:, None]
        units[self.indices] = np.broadcast_to(each, self.indices.shape)
        return units


class Family(NamedTuple):
    """Units along one axis of the network: any of them can go, but for the last."""

    size: int  # units
    entries: int  # of each unit
    slices: tuple[Slices, ...]
    is_traced: bool  # fn was traced with fewer units, and did the same with them

    def __str__(self) -> str:
        """Return the first slices."""
        return str(self.slices[0])


class Pinned(NamedTuple):
    """An axis of a leaf that cannot lose (all of) its indices, and why."""

    path: str
    axis: int
    size: int
    reason: str


def unit_entries(slices: Sequence[Slices], shapes: Sequence[Any]) -> int:
    """Entries that one unit holds, each counted once."""
    entries = 0
    for leaf in {part.leaf for part in slices}:
        times = {s.axis: s.indices.shape[1] for s in slices if s.leaf == leaf}
        rest = (n - times.get(axis, 0) for axis, n in enumerate(shapes[leaf]))
        entries += math.prod(shapes[leaf]) - math.prod(rest)
    return entries


def without(
    families: Sequence[Family], shapes: Sequence[Any], gone: Sequence[Any]
) -> list[list[np.ndarray]]:
    """For every axis of every leaf, which indices stay when units go: bool[size].

    Args:
        families: whose slices name leaves by their place among `shapes`.
        shapes: of all leaves.
        gone: which units go, for each family: bools, or a slice.
    """
    stay = [[np.ones(size, bool) for size in shape] for shape in shapes]
    for family, units in zip(families, gone, strict=True):
        for part in family.slices:
            stay[part.leaf][part.axis][part.indices[units]] = False
    return stay


def own_sizes(families: Sequence[Family]) -> str:
    """Which families fn could not be traced with fewer units of; nothing if none."""
    numbers = [str(i) for i, family in enumerate(families) if not family.is_traced]
    if not numbers:
        return ""
    which = "family " if len(numbers) == 1 else "families "
    which += listed(numbers, 6)
    return f"\n\nfn keeps sizes of {which}: it has to be built anew for fewer units."
