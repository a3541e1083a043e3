"""What to remove: a plan that is applied to trees, and checked."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax._masking import MaskByImportanceState
from gsm_optax._paths import leaf_names, leaf_paths
from gsm_optax._placement import is_explicit
from gsm_optax._prunable import is_by_units
from gsm_optax._tables import align
from gsm_optax.units._compare import programs_in
from gsm_optax.units._families import Family
from gsm_optax.units._places import Path, Spec, stands_for, strings
from gsm_optax.units._units import Units


class FamilyPlan(NamedTuple):
    """What stays of a family."""

    family: Family
    kept: np.ndarray  # which of its units stay
    held: int  # how many of them are dead, and stay for the size
    constant: int  # how many of them add a constant only, which no bias could take on


@dataclass(frozen=True, eq=False)
class Plan:
    """What `shrink` removes; print it.

    Attributes:
        families: tuple of `FamilyPlan`: of each family the indices of the units that
            are `kept`, how many of those are dead and were `held` back so that the size
            is one that was asked for, and how many add a `constant` only.
    """

    families: tuple[FamilyPlan, ...]
    units: Units = field(repr=False)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes that change: for each path the shape before, and after."""
        leaves = jax.tree.leaves(self.units.like)
        changes = {}
        for name, leaf, keep in zip(
            leaf_names(self.units.like), leaves, self._kept, strict=True
        ):
            after = tuple(map(len, keep))
            if after != leaf.shape:
                changes[name] = leaf.shape, after
        return changes

    def apply(self, tree: Any) -> Any:
        """Remove the same units from a tree that holds the parameters' shapes.

        Args:
            tree: like the parameters; or an optimizer's state, a mask, an average,
                whose paths end as those of the parameters, or of one collection of
                them, such as linen's "params". Other leaves stay as they are.

        Returns:
            The same tree with smaller arrays. Nothing is written over.

        Raises:
            ValueError: if a leaf stands for a parameter and has another shape than
                that, or may stand for one or another, so that it is not known what
                belongs to a unit; or if one is on an explicit mesh.
        """
        check_cuttable(tree)
        like = self.units.like
        specs = zip(map(jnp.shape, jax.tree.leaves(like)), self._kept, strict=True)
        wanted = dict(zip(map(strings, leaf_paths(like)), specs, strict=True))
        leaves, treedef = jax.tree.flatten(tree)
        small = [
            leaf if own is None else _take(name, leaf, *own)
            for name, leaf, own in zip(
                leaf_names(tree),
                leaves,
                stands_for(tree, wanted, self._averages(tree)),
                strict=True,
            )
        ]
        return jax.tree.unflatten(treedef, small)

    def _averages(self, tree: Any) -> dict[Path, Spec]:
        """Where GSM by units keeps a number a unit: its shape, and which units stay."""
        is_choice = lambda x: isinstance(x, MaskByImportanceState)
        pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_choice)
        found = {}
        for path, state in filter(lambda pair: is_choice(pair[1]), pairs):
            if state.average is not None and is_by_units(state.prunable):
                for i, plan in enumerate(self.families):
                    key = jax.tree_util.SequenceKey(i)
                    at = *path, jax.tree_util.GetAttrKey("average"), key
                    found[strings(at)] = (plan.family.size,), [plan.kept]
        return found

    def check(self, fn: Callable[..., Any], params: Any, small: Any) -> None:
        """Compare the smaller network with the first one, on the inputs of the units.

        Args:
            fn: `fn(small, *inputs)` is the smaller network.
            params: parameters before they were shrunk.
            small: and after that.

        Raises:
            ValueError: if the outputs differ by more than rounding.
        """
        inputs = _concrete(self.units.inputs)
        wanted = jax.jit(self.units.fn)(params, *inputs)
        actual = jax.jit(fn)(small, *inputs)
        difference = _difference(wanted, actual, self.units.program)
        if difference:
            families = ", ".join(
                str(plan.family) for plan in self._changed if not plan.family.is_traced
            )
            raise ValueError(
                f"the smaller network gives other outputs: {difference} Something "
                "in fn depends on its sizes, as a scale may"
                + (f", in one of the families of {families}." if families else ".")
            )

    @property
    def _kept(self) -> list[list[np.ndarray]]:
        return self.units.kept_indices([~marks for marks in self._stay])

    @property
    def _stay(self) -> list[np.ndarray]:
        """Which units of each family stay: bool[size]."""
        return [np.isin(np.arange(p.family.size), p.kept) for p in self.families]

    @property
    def _changed(self) -> list[FamilyPlan]:
        return [p for p in self.families if len(p.kept) < p.family.size]

    def __str__(self) -> str:
        """Return aligned tables of the families, and of the shapes that change."""
        rows = [["family", "units", "kept", "dead", "held", "constant", "slices"]]
        for i, (family, kept, held, constant) in enumerate(self.families):
            dead = family.size - len(kept) + held
            numbers = family.size, len(kept), dead, held, constant
            first, *rest = family.slices
            more = f" and {len(rest)} more" if rest else ""
            rows.append([str(i), *(f"{n:,}" for n in numbers), f"{first}{more}"])
        text = align(rows, words={6})
        if not self._changed:
            return f"{text}\n\nno unit is removed: {self._why()}"
        shapes = [["path", "shape", "smaller"]]
        for name, pair in self.shapes.items():
            shapes.append([name, *("x".join(map(str, shape)) for shape in pair)])
        before, after = self._entries()
        total = f"{after:,} of {before:,} entries stay ({after / before:.1%})"
        text = f"{text}\n\n{align(shapes, words={0, 1, 2})}\n\n{total}"
        if all(plan.family.is_traced for plan in self._changed):
            return text
        return (
            f"{text}\n\nfn may keep its sizes: build it anew with the smaller ones, "
            "and compare with\nplan.check(new_fn, params, small)."
        )

    def _why(self) -> str:
        if any(plan.held for plan in self.families):
            return "those that are dead are held back, for the sizes."
        return "each adds something. Prune whole units, or more entries."

    def _entries(self) -> tuple[int, int]:
        before = [leaf.shape for leaf in jax.tree.leaves(self.units.like)]
        after = [tuple(map(len, keep)) for keep in self._kept]
        return sum(map(math.prod, before)), sum(map(math.prod, after))


def _take(name: str, leaf: Any, shape: tuple[int, ...], keep: list[np.ndarray]) -> Any:
    if shape == tuple(map(len, keep)):
        return leaf
    if jnp.shape(leaf) != shape:
        if jnp.size(leaf) <= 1:  # a placeholder
            return leaf
        raise ValueError(
            f"{name} has shape {list(jnp.shape(leaf))}, but the parameter that it "
            f"stands for has {list(shape)}: it cannot be told what belongs to a unit. "
            "Begin with a new state of the optimizer, tx.init(small)."
        )
    for axis, indices in enumerate(keep):
        if len(indices) < shape[axis]:
            leaf = leaf.take(indices, axis)
    return leaf


def check_cuttable(tree: Any) -> None:
    """Raise `ValueError` if a leaf lives on an explicit mesh.

    There no axis is split over devices whose number does not divide its size.
    """
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        if is_explicit(leaf):
            raise ValueError(
                f"{leaf_names(tree)[i]} is on a mesh with Explicit axes, where sizes "
                "have to fit the devices: give jax.device_get(...) of it, and place "
                "anew what comes back."
            )


def check_plan(plan: Plan, params: Any, folded: Any) -> Any:
    """The smaller parameters, once they are known to give the same outputs.

    First at full size, with zeros in place of the units, which any network can be asked
    for; then, if it can be traced with fewer, at its new size.

    Args:
        plan: what to remove.
        params: parameters before.
        folded: parameters whose biases add the constants of the units that go.

    Raises:
        ValueError: if the outputs are other ones.
    """
    small, units = plan.apply(folded), plan.units
    if not plan._changed:
        return small
    fn, inputs = jax.jit(units.fn), _concrete(units.inputs)
    wanted = fn(params, *inputs)
    actual = fn(_zeroed(plan, folded), *inputs)
    difference = _difference(wanted, actual, units.program)
    if difference:
        _check_finite(params)
        families = ", ".join(str(changed.family) for changed in plan._changed)
        raise ValueError(
            f"without units of {families} the network gives other outputs: "
            f"{difference} That must not be; please report it with the network."
        )
    keeps_sizes = not all(changed.family.is_traced for changed in plan._changed)
    try:
        jax.eval_shape(units.fn, small, *inputs)
    except Exception as error:
        if keeps_sizes:  # as linen's modules do
            return small
        raise ValueError(
            f"fn does not take the smaller parameters: {error} To squeeze, say, an "
            "axis of one index is another thing: round_to= keeps more units."
        ) from error
    try:
        plan.check(units.fn, params, small)
    except ValueError as error:
        if not keeps_sizes:
            raise
        warnings.warn(
            f"fn takes the smaller parameters, but {error} It may have sizes of its "
            "own: build it anew, and compare with plan.check(new_fn, params, small).",
            stacklevel=3,
        )
    return small


def _zeroed(plan: Plan, folded: Any) -> Any:
    mask = plan.units.expand(plan._stay)
    zeroed = lambda x, m: jnp.where(m, x, jnp.zeros_like(x)) if _is_float(x) else x
    return jax.tree.map(zeroed, folded, mask)


def _concrete(inputs: Any) -> Any:
    """The inputs, or where only shapes were given random numbers and integers 0."""

    def make(x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), x.shape)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype)
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(make, inputs)


def _check_finite(params: Any) -> None:
    """Raise `ValueError` if a leaf holds what is no number, and name it."""
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        if _is_float(leaf) and not jnp.isfinite(leaf).all():
            raise ValueError(
                f"{name} holds NaN or infinity, which zeros do not make zero: the "
                "network without these units is another one."
            )


def _difference(wanted: Any, actual: Any, program: Any) -> str:
    """How much outputs differ, or nothing if that is the program's rounding."""
    computed = _computed_in(program)
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(actual), strict=True)
    for one, other in pairs:
        if one.shape != other.shape:
            return f"shape {list(other.shape)}, not {list(one.shape)}."
        if not _is_float(one) or not one.size:
            continue
        eps = max(float(jnp.finfo(dtype).eps) for dtype in (*computed, one.dtype))
        one, other = (np.asarray(x, np.complex128) for x in (one, other))
        if (np.isnan(one) != np.isnan(other)).any():
            before, after = (int(np.isnan(x).sum()) for x in (one, other))
            return (
                f"{before:,} of {one.size:,} numbers are NaN with the zeros, and "
                f"{after:,} without: does fn divide by a norm of the weights?"
            )
        scale = np.abs(one[np.isfinite(one)]).max(initial=0)
        # Sums in another order: far less than a unit that counts, far more than eps.
        if not np.allclose(one, other, rtol=0, atol=eps**0.5 * scale, equal_nan=True):
            return f"{np.abs(one - other).max():.3g} of {scale:.3g}."
    return ""


def _computed_in(program: Any) -> set[Any]:
    """Floating-point dtypes of all that the program computes, of 16 bits and more.

    What is rounded to eight is so in the smaller network too, and to the same numbers.
    """
    jaxpr = getattr(program, "jaxpr", program)
    atoms = [*jaxpr.invars, *(var for eqn in jaxpr.eqns for var in eqn.outvars)]
    dtypes = {var.aval.dtype for var in atoms if _is_float(var.aval)}
    inside = [
        _computed_in(part) for eqn in jaxpr.eqns for part in programs_in(eqn.params)
    ]
    wide = {dtype for dtype in dtypes if jnp.finfo(dtype).bits >= 16}
    return wide.union(*inside)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
