"""Trace the network with fewer units: it must do the same with them.

What a program says of the sizes it was traced with, a scale of 1/sqrt(features) or a
loop over them, shows in a second program only, of other sizes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gsm_optax.units._program import leaf_nodes, walk_program
from gsm_optax.units._units import Family
from gsm_optax.units._walk import Step, Walk

SAME, DIFFERS, RAISES = "same", "differs", "raises"

ONE = "one leaf reads or makes it"  # so its size is written down elsewhere

MOST_FAILURES = 12  # a network of linen's modules raises for every family


def check_by_tracing(
    walk: Walk,
    families: Sequence[Family],
    fn: Callable[..., Any],
    like: Any,
    inputs: tuple[Any, ...],
) -> tuple[Family, ...]:
    """Families without those of whose size the network knows.

    Some functions cannot be traced with fewer units, because they check their sizes as
    linen's modules do. Of those, the axes of a product of two activations are left out,
    as the dimensions of attention are: their size is most often in a scale, too.
    """
    failures = 0

    def attempt(group: list[int]) -> str:
        nonlocal failures
        if failures >= MOST_FAILURES:
            return RAISES
        chosen = [families[i] for i in group]
        outcome = _attempt(walk, chosen, fn, like, inputs)
        failures += outcome == RAISES
        return outcome

    primitives = [_multiplied(walk, family, like) for family in families]
    multiplied = [i for i, primitive in enumerate(primitives) if primitive]
    others = [i for i, primitive in enumerate(primitives) if not primitive]
    found = dict.fromkeys(range(len(families)), RAISES)
    for group in (multiplied, others):
        if group:
            _sort_out(group, attempt(group), attempt, found)
    traced = [i for i in found if found[i] == SAME]
    if traced and attempt(traced) != SAME:
        found.update(dict.fromkeys(traced, RAISES))
    for i, family in enumerate(families):
        if found[i] == RAISES and (primitives[i] or len(family.slices) == 1):
            found[i] = DIFFERS
            reason = f"{primitives[i]} of two activations" if primitives[i] else ONE
            walk.ties.pin(_ids(family, like), reason)
        elif found[i] == DIFFERS:
            walk.ties.pin(_ids(family, like), "its size, which fn uses")
    return tuple(
        family._replace(is_traced=found[i] == SAME)
        for i, family in enumerate(families)
        if found[i] != DIFFERS
    )


def _sort_out(
    group: list[int],
    outcome: str,
    attempt: Callable[[list[int]], str],
    found: dict[int, str],
) -> None:
    """Halve a group until it is known which of its families stand out."""
    if outcome == SAME or len(group) == 1:
        found.update(dict.fromkeys(group, outcome))
        return
    middle = len(group) // 2
    halves = group[:middle], group[middle:]
    outcomes = [attempt(half) for half in halves]
    if outcomes == [SAME, SAME]:  # only together they stand out
        found.update(dict.fromkeys(group, outcome))
        return
    for half, part in zip(halves, outcomes, strict=True):
        _sort_out(half, part, attempt, found)


def _attempt(
    walk: Walk,
    families: list[Family],
    fn: Callable[..., Any],
    like: Any,
    inputs: tuple[Any, ...],
) -> str:
    """What comes of a trace with different numbers of units less in each family."""
    leaves, treedef = jax.tree.flatten(like)
    kept = [[np.ones(size, bool) for size in leaf.shape] for leaf in leaves]
    gone = np.zeros(walk.ties.size, bool)
    for number, family in enumerate(families):
        fewer = min(1 + number % 3, family.size - 1)
        for part in family.slices:
            kept[part.leaf][part.axis][part.indices[:fewer]] = False
    flat = np.concatenate([np.zeros(0, bool), *(k for ks in kept for k in ks)])
    gone[walk.ties.classes(np.flatnonzero(~flat))] = True
    is_kept = ~gone[walk.ties.classes(np.arange(walk.ties.size))]
    small = [
        jax.ShapeDtypeStruct([k.sum() for k in keep], leaf.dtype)
        for leaf, keep in zip(leaves, kept, strict=True)
    ]
    try:
        program = jax.make_jaxpr(fn)(jax.tree.unflatten(treedef, small), *inputs)
    except Exception:
        return RAISES
    zeros = [[np.zeros(size) for size in leaf.shape] for leaf in small]
    steps = walk_program(program, zeros, walk.choices).steps
    same = len(steps) == len(walk.steps) and all(
        _is_same(one, other, is_kept)
        for one, other in zip(walk.steps, steps, strict=True)
    )
    return SAME if same else DIFFERS


def _is_same(large: Step, small: Step, is_kept: np.ndarray) -> bool:
    """Whether a step of the smaller network is that of the larger without some."""
    if (large.const is None) != (small.const is None):
        return False
    if [is_kept[ids].sum() for ids in large.outs] != list(map(len, small.outs)):
        return False
    if large.const is not None:
        kept = large.const[np.ix_(*(is_kept[ids] for ids in large.outs))]
        return kept.dtype == small.const.dtype and (
            kept.tobytes() == np.ascontiguousarray(small.const).tobytes()
        )
    starts = [is_kept[ids[:start]].sum() for ids, start in large.starts]
    return large.what == small.what and starts == [start for _, start in small.starts]


def _ids(family: Family, like: Any) -> np.ndarray:
    """The nodes of a family's first slices, whose classes are all its units."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(like)]
    part = family.slices[0]
    nodes = leaf_nodes(shapes)
    first = np.flatnonzero((nodes.leaf == part.leaf) & (nodes.axis == part.axis))[0]
    return first + part.indices[:, 0]


def _multiplied(walk: Walk, family: Family, like: Any) -> str | None:
    """The primitive that multiplies two activations with an axis of the family."""
    own = walk.ties.classes(_ids(family, like))
    for primitive, ids in walk.products:
        if np.isin(walk.ties.classes(ids), own).any():
            return primitive
    return None
