"""Remove the units of a pruned network that add nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gsm_optax._checks import check_count
from gsm_optax.units._axes import slab_values
from gsm_optax.units._fold import fold_constants
from gsm_optax.units._plan import FamilyPlan, Plan, check_cuttable, check_plan
from gsm_optax.units._program import leaf_nodes, unit_nodes, walk_program
from gsm_optax.units._units import Units

Marks = list[np.ndarray]  # bool[units] of each family


def shrink(params: Any, units: Units, *, round_to: int = 1) -> tuple[Any, Plan]:
    r"""Remove the units that add nothing, from a network pruned in any way.

    A unit goes if every sum over it is without it what it was: where it is read, its
    rows are zero, or the unit itself is known to be, because what makes it is zero and
    what follows keeps zero at zero. That is followed through the program with the
    parameters as they are, exactly. So units go that were pruned whole, and neurons
    that pruning by entries has left without anything to read or to be read by; when
    some go, others may follow.

    A unit that is a constant :math:`c_i` whatever the input, such as act(bias), goes
    too where the bias after it can add :math:`\sum_i c_i W_i` in its place: in dense
    layers and convolutions without padding, to a bias that is used nowhere else. Where
    not, the plan counts it as `constant`.

    The network is then compared with the first one on the inputs of `find_units`
    (random ones where those were shapes): with zeros in place of the units, and at its
    new size. Where `fn` keeps its sizes, as linen's modules do, build the module with
    those that `plan.shapes` tells, and compare with `plan.check`. What goes is decided
    on the host, which has to be able to read all parameters.

    Args:
        params: as given to `find_units`, with values.
        units: the network's units.
        round_to: sizes become multiples of it, or stay as they are, by holding back
            dead units. 8, or 128 on a TPU, can be faster than a few units less.

    Returns:
        Smaller parameters, and the `Plan`: print it, or apply it to the optimizer's
        state. Of each family at least one unit stays. Nothing is written over; where
        nothing is removed, the parameters are those that were given.

    Raises:
        ValueError: if `units` are those of another tree, the parameters are shapes,
            traced or on an explicit mesh, or the outputs differ by more than rounding.

    Warns:
        UserWarning: if only those of `fn` with sizes of its own do, at the new size.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gsm_optax.units import find_units, shrink
        >>> def fn(params, x):
        ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
        >>> kernel = jnp.array([[1.0, 0.0, 2.0], [3.0, 0.0, 4.0]])
        >>> params = {"in": kernel, "out": jnp.ones((3, 2))}
        >>> units = find_units(fn, params, jnp.ones((1, 2)))
        >>> small, plan = shrink(params, units)
        >>> print(plan)
        family  units  kept  dead  held  constant  slices
             0      3     2     1     0         0  in[1] and 1 more
        <BLANKLINE>
        path  shape  smaller
        in    2x3    2x2
        out   3x2    2x2
        <BLANKLINE>
        8 of 12 entries stay (66.7%)
    """
    round_to = check_count("round_to", round_to, 1, "sizes become multiples of it")
    if not isinstance(units, Units):
        raise ValueError(
            f"units is a {type(units).__name__}: give shrink(params, units), where "
            "units = find_units(fn, params, *inputs)."
        )
    leaves = units.leaves_of(params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct | Tracer) for leaf in leaves):
        raise ValueError(
            "shrink decides by the values of the parameters: give arrays, no shapes, "
            "and call it outside of jit."
        )
    check_cuttable(params)
    held_by = {part.leaf for family in units.families for part in family.slices}
    arrays = [_on_host(leaf, i in held_by) for i, leaf in enumerate(leaves)]
    held = [np.zeros(family.size, bool) for family in units.families]
    while True:
        folded, gone, constant = _dead_units(arrays, units, held)
        more = [_to_hold(marks, round_to) for marks in gone]
        if not any(map(np.any, more)):
            break
        held = [a | b for a, b in zip(held, more, strict=True)]
    plans = tuple(
        FamilyPlan(family, np.flatnonzero(~marks), int(kept.sum()), int(emits.sum()))
        for family, marks, kept, emits in zip(
            units.families, gone, held, constant, strict=True
        )
    )
    new = [
        leaf if one is other else jnp.asarray(other, leaf.dtype)
        for leaf, one, other in zip(leaves, arrays, folded, strict=True)
    ]
    treedef = jax.tree.structure(params)
    plan = Plan(plans, units)
    return check_plan(plan, params, jax.tree.unflatten(treedef, new)), plan


def _dead_units(
    arrays: list[np.ndarray], units: Units, held: Marks
) -> tuple[list[np.ndarray], Marks, Marks]:
    """Units that add nothing to any sum, and those that only ever add a constant.

    When some go, others may have lost all that they were made of, or all that read
    them: so again, until no more go.

    Returns:
        The leaves, whose biases add the constants of units that go; which units go;
        and which stay though they add constants only.
    """
    arrays = list(arrays)
    nodes = leaf_nodes([array.shape for array in arrays])
    owned = [unit_nodes(family, nodes) for family in units.families]
    gone = [np.zeros_like(marks) for marks in held]
    while True:
        values, numbers = _known(arrays, units, gone)
        walk = walk_program(units.program, values, units.choices, numbers)
        roots = walk.ties.classes(np.arange(walk.ties.size))
        alive = _units_of([ids for _, ids in walk.sums], owned, roots)
        more = [~(a | h | g) for a, h, g in zip(alive, held, gone, strict=True)]
        if not any(map(np.any, more)):
            varying = _units_of(walk.varying, owned, roots)
            constant = [a & ~v for a, v in zip(alive, varying, strict=True)]
            return arrays, gone, constant
        going, absent = (_nodes_of(marks, owned, roots) for marks in (more, gone))
        for fold in walk.folds:
            fold_constants(arrays, nodes, fold, going, absent)
        gone = [a | b for a, b in zip(gone, more, strict=True)]


def _units_of(
    ids: list[np.ndarray], owned: list[np.ndarray], roots: np.ndarray
) -> Marks:
    """Which units of each family these nodes belong to."""
    there = roots[np.concatenate(ids)] if ids else roots[:0]
    return [np.isin(roots[own], there) for own in owned]


def _nodes_of(marks: Marks, owned: list[np.ndarray], roots: np.ndarray) -> np.ndarray:
    """Which nodes belong to marked units."""
    own = np.concatenate([ids[m] for ids, m in zip(owned, marks, strict=True)])
    return np.isin(roots, roots[own])


def _on_host(leaf: Any, has_units: bool) -> np.ndarray:
    """The array, or one of which nothing is known for PRNG keys and counters."""
    is_weight = has_units or jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return np.asarray(leaf) if is_weight else np.full(jnp.shape(leaf), np.nan)


def _known(
    arrays: list[np.ndarray], units: Units, gone: Marks
) -> tuple[list[list[np.ndarray]], list[float]]:
    """What is known of the leaves' slices, where those of gone units are not there."""
    kept = units.kept_indices(gone)
    values, numbers = [], []
    for array, keep in zip(arrays, kept, strict=True):
        rest = array[np.ix_(*keep)] if keep else array
        slabs = []
        parts = zip(array.shape, keep, slab_values(rest), strict=True)
        for size, indices, known in parts:
            slab = np.zeros(size)
            slab[indices] = known
            slabs.append(slab)
        values.append(slabs)
        is_number = rest.size and (rest == rest.flat[0]).all() and np.isrealobj(rest)
        numbers.append(float(rest.flat[0]) if is_number else np.nan)
    return values, numbers


def _to_hold(dead: np.ndarray, round_to: int) -> np.ndarray:
    """Dead units that stay, so that one does, and a multiple of `round_to` do."""
    left = len(dead) - dead.sum()
    wanted = min(-(-max(left, 1) // round_to) * round_to, len(dead))
    hold = np.zeros_like(dead)
    hold[np.flatnonzero(dead)[: wanted - left]] = True
    return hold
