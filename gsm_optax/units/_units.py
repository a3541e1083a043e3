"""Families of units: what they are made of, sums over them, masks from them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax._paths import leaf_names
from gsm_optax._tables import align


class Slices(NamedTuple):
    """What the units of a family hold of one axis of one leaf."""

    path: str
    leaf: int  # its place among the leaves
    axis: int
    size: int  # of the axis
    indices: np.ndarray  # int[units, indices of each]

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
        units = np.full(self.size, -1)
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


@dataclass(frozen=True, eq=False)
class Units:
    """Families of units of a network, as `find_units` returns them; print it.

    Attributes:
        families: tuple of `Family`: `size` units of `entries` entries each, and their
            `slices`.
        pinned: tuple of `Pinned`: axes that stay as they are.
    """

    families: tuple[Family, ...]
    pinned: tuple[Pinned, ...]
    like: Any = field(repr=False)  # the parameters' tree, with shapes for leaves
    fn: Callable[..., Any] = field(repr=False)
    inputs: tuple[Any, ...] = field(repr=False)
    program: Any = field(repr=False)  # what fn was traced to
    choices: dict[Any, int] = field(repr=False)  # of the reshapes in it

    def sum(self, tree: Any) -> list[jax.Array]:
        """Sum over the entries of each unit.

        An entry of two units counts for both, and one that a unit holds twice (the
        diagonal of a square kernel whose axes are one) once. Works inside `jit`; needs
        only reductions, on any mesh.

        Args:
            tree: like the parameters, arrays of the same shapes: scores, squares,
                masks.

        Returns:
            One array a family, of shape [size]: float32 (or float64, complex), int32
            of integers and bools.

        Raises:
            ValueError: if `tree` has another structure or other shapes.
        """
        leaves = self.leaves_of(tree)
        return [_sum_family(family, leaves) for family in self.families]

    def expand(self, values: Sequence[Any]) -> Any:
        """Mask of the entries all of whose units are active.

        Args:
            values: one array of bools a family, of shape [size], in their order.

        Returns:
            Tree like the parameters of bool arrays; entries of no unit are `True`.

        Raises:
            ValueError: if the number of arrays or a shape is another one.
        """
        shapes = [jnp.shape(value) for value in values]
        wanted = [(family.size,) for family in self.families]
        if shapes != wanted:
            raise ValueError(
                f"values have shapes {shapes}, but must be one array of bools a family "
                f"with one entry a unit, {wanted}."
            )
        leaves, treedef = jax.tree.flatten(self.like)
        masks = [jnp.ones((1,) * len(leaf.shape), bool) for leaf in leaves]
        for family, value in zip(self.families, values, strict=True):
            active = jnp.append(jnp.asarray(value, bool), True)  # for unit -1
            for slices in family.slices:
                rank = masks[slices.leaf].ndim
                row = active[slices.units_along()]
                masks[slices.leaf] &= _along(row, slices.axis, rank)
        return jax.tree.unflatten(
            treedef,
            [jnp.broadcast_to(m, x.shape) for m, x in zip(masks, leaves, strict=True)],
        )

    def kept_indices(self, gone: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """For each axis of each leaf the indices that stay when units go.

        Args:
            gone: one array of bools a family, of shape [size].
        """
        leaves = jax.tree.leaves(self.like)
        kept = [[np.ones(size, bool) for size in leaf.shape] for leaf in leaves]
        for family, marks in zip(self.families, gone, strict=True):
            for part in family.slices:
                kept[part.leaf][part.axis][part.indices[marks]] = False
        return [[np.flatnonzero(keep) for keep in keeps] for keeps in kept]

    def leaves_of(self, tree: Any) -> list[Any]:
        """Return the leaves of a tree like the parameters.

        Raises:
            ValueError: if it has another structure or other shapes.
        """
        wanted, treedef = jax.tree.flatten(self.like)
        leaves, structure = jax.tree.flatten(tree)
        if structure != treedef:
            raise ValueError(
                "the tree has another structure than the parameters that the units "
                f"were found in:\n  tree  {structure}\n  units {treedef}\nFind the "
                "units of this network with find_units(fn, params, *inputs)."
            )
        for name, leaf, own in zip(leaf_names(self.like), leaves, wanted, strict=True):
            if jnp.shape(leaf) != own.shape:
                raise ValueError(
                    f"{name} has shape {list(jnp.shape(leaf))}, but {list(own.shape)} "
                    "where the units were found. Find them again, of this network."
                )
        return leaves

    def __str__(self) -> str:
        """Return aligned tables of the families and of what is pinned."""
        head = ["family", "units", "entries each", "slices"]
        rows = [head]
        for i, family in enumerate(self.families):
            for j, slices in enumerate(family.slices):
                numbers = [str(i), f"{family.size:,}", f"{family.entries:,}"]
                rows.append([*(["", "", ""] if j else numbers), str(slices)])
        text = align(rows, words={3}) + own_sizes(self.families)
        by_reason: dict[str, list[str]] = {}
        for path, axis, _, reason in self.pinned:
            by_reason.setdefault(reason, []).append(f"{path}[{axis}]")
        pins = [["pinned by", "axes", ""]]
        for reason, axes in by_reason.items():
            shown = ", ".join(axes[:4]) + (", ..." if len(axes) > 4 else "")
            pins.append([reason, str(len(axes)), shown])
        return f"{text}\n\n{align(pins, words={0, 2})}" if self.pinned else text


def _along(row: Any, axis: int, rank: int) -> jax.Array:
    return row.reshape([-1 if i == axis else 1 for i in range(rank)])


def _sum_family(family: Family, leaves: list[Any]) -> jax.Array:
    parts = []
    for i, slices in enumerate(family.slices):
        leaf = jnp.asarray(leaves[slices.leaf])
        leaf = leaf.astype(_sum_dtype(leaf.dtype))
        own = _along(slices.units_along(), slices.axis, leaf.ndim)
        for other in family.slices[:i]:
            if other.leaf == slices.leaf:  # counted there already
                again = own == _along(other.units_along(), other.axis, leaf.ndim)
                leaf = jnp.where(again, jnp.zeros((), leaf.dtype), leaf)
        others = [axis for axis in range(leaf.ndim) if axis != slices.axis]
        parts.append(leaf.sum(others)[slices.indices].sum(1))
    dtype = reduce(np.promote_types, [part.dtype for part in parts])
    return reduce(jnp.add, [part.astype(dtype) for part in parts])


def _sum_dtype(dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.int32
    return dtype if dtype.itemsize >= 4 else jnp.float32


def unit_entries(slices: Sequence[Slices], shapes: Sequence[Any]) -> int:
    """Entries that one unit holds, each counted once."""
    entries = 0
    for leaf in {part.leaf for part in slices}:
        times = {s.axis: s.indices.shape[1] for s in slices if s.leaf == leaf}
        rest = (n - times.get(axis, 0) for axis, n in enumerate(shapes[leaf]))
        entries += math.prod(shapes[leaf]) - math.prod(rest)
    return entries


def own_sizes(families: Sequence[Family]) -> str:
    """Which families fn could not be traced with fewer units of; nothing if none."""
    numbers = [str(i) for i, family in enumerate(families) if not family.is_traced]
    if not numbers:
        return ""
    which = "family " if len(numbers) == 1 else "families "
    which += ", ".join(numbers[:6]) + (", ..." if len(numbers) > 6 else "")
    return f"\n\nfn keeps sizes of {which}: it has to be built anew for fewer units."
