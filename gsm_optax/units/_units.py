"""The units of a network: sums over them, masks from them, a choice among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax._paths import leaf_names, listed
from gsm_optax._tables import align
from gsm_optax.units._choice import WholeUnits, masks_of
from gsm_optax.units._families import Family, Pinned, own_sizes, without
from gsm_optax.units._places import start_of
from gsm_optax.units._scores import once, sum_units


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
        active = [jnp.asarray(value, bool) for value in values]
        return jax.tree.unflatten(treedef, masks_of(self.families, active, leaves))

    def kept_indices(self, gone: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """For each axis of each leaf the indices that stay when units go.

        Args:
            gone: one array of bools a family, of shape [size].
        """
        shapes = [leaf.shape for leaf in jax.tree.leaves(self.like)]
        stay = without(self.families, shapes, gone)
        return [list(map(np.flatnonzero, axes)) for axes in stay]

    def flags(self, params: Any) -> Any:
        """Tree like `params` of bools: whether a leaf has slices of units.

        Args:
            params: the parameters that the units were found in, or some of them:
                without batch statistics, say, or one collection of a linen module.

        Raises:
            ValueError: if they are others, or have other shapes.
        """
        leaves, treedef = jax.tree.flatten(params)
        if not leaves:  # a placeholder of optax.tree.map_params
            return params
        places = self._places(params)
        held = {places.get(s.leaf) for family in self.families for s in family.slices}
        return jax.tree.unflatten(treedef, [i in held for i in range(len(leaves))])

    def among(
        self,
        params: Any,
        places: Sequence[int],
        pairs: Sequence[Any],
        parts: Sequence[jax.Array] | None,
        min_units: int,
    ) -> WholeUnits:
        """The units of some leaves, to be chosen among.

        Args:
            params: as for `flags`.
            places: the indices of the leaves that take part.
            pairs: (parameter, gradient) of each of these.
            parts: bool scalars, whether it takes part at this step; None if all do.
            min_units: units of every family that are active before others are.
        """
        own = self._places(params) if places else {}
        pair_of = {place: i for i, place in enumerate(places)}
        families = [
            family._replace(
                slices=tuple(
                    part._replace(leaf=pair_of[own[part.leaf]])
                    for part in family.slices
                    if own.get(part.leaf) in pair_of
                )
            )
            for family in self.families
        ]
        return WholeUnits(families, pairs, parts=parts, min_units=min_units)

    def zeros(self, dtype: Any) -> tuple[jax.Array, ...]:
        """A zero for each unit of each family."""
        return tuple(jnp.zeros(family.size, dtype) for family in self.families)

    def _places(self, params: Any) -> dict[int, int]:
        """Which leaf of the network is which of these, whose names may be shorter."""
        shapes = [leaf.shape for leaf in jax.tree.leaves(self.like)]
        own = {name: i for i, name in enumerate(leaf_names(self.like))}
        start = start_of(params, dict(zip(own, shapes, strict=True)))
        names = leaf_names(params)
        for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
            _check_shape(name, jnp.shape(leaf), shapes[own[start + name]])
        return {own[start + name]: j for j, name in enumerate(names)}

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
            _check_shape(name, jnp.shape(leaf), own.shape)
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
            pins.append([reason, str(len(axes)), listed(axes, 4)])
        return f"{text}\n\n{align(pins, words={0, 2})}" if self.pinned else text


def _check_shape(name: str, shape: tuple[int, ...], own: tuple[int, ...]) -> None:
    if shape != own:
        raise ValueError(
            f"{name} has shape {list(shape)}, but {list(own)} where the units were "
            "found. Find them again, of this network."
        )


def _sum_family(family: Family, leaves: list[Any]) -> jax.Array:
    parts = []
    for i, part in enumerate(family.slices):
        leaf = jnp.asarray(leaves[part.leaf])
        leaf = once(leaf.astype(_sum_dtype(leaf.dtype)), family.slices[:i], part)
        parts.append(sum_units(leaf, part))
    dtype = reduce(np.promote_types, [part.dtype for part in parts])
    return reduce(jnp.add, [part.astype(dtype) for part in parts])


def _sum_dtype(dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.int32
    return dtype if dtype.itemsize >= 4 else jnp.float32
