"""Trace the network with fewer units: it must do the same with them.

What a program says of the sizes it was traced with, a scale of 1/sqrt(features) or a
loop over them, shows in a second program only, of other sizes.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gsm_optax.units._compare import is_same_program
from gsm_optax.units._families import Family, without
from gsm_optax.units._program import Nodes, leaf_nodes, unit_nodes
from gsm_optax.units._walk import Walk

SAME, DIFFERS, RAISES = "same", "differs", "raises"


def check_by_tracing(
    walk: Walk,
    families: Sequence[Family],
    fn: Callable[..., Any],
    like: Any,
    inputs: tuple[Any, ...],
    program: Any,
) -> tuple[Family, ...]:
    """Families without those of whose size the network knows.

    Some functions cannot be traced with fewer units, because they check their sizes as
    linen's modules do. Of those, the axes of a product of two activations are left out,
    as the dimensions of attention are: their size is most often in a scale, too.
    """
    nodes = leaf_nodes([leaf.shape for leaf in jax.tree.leaves(like)])

    def attempt(group: list[int]) -> str:
        chosen = [families[i] for i in group]
        return _attempt(walk, chosen, fn, like, inputs, program)

    primitives = [_multiplied(walk, family, nodes) for family in families]
    multiplied = [i for i, primitive in enumerate(primitives) if primitive]
    others = [i for i, primitive in enumerate(primitives) if not primitive]
    found = dict.fromkeys(range(len(families)), RAISES)
    for group in (multiplied, others):
        outcome = attempt(group) if group else SAME
        for kind in [group] if outcome == SAME else _kinds(families, group):
            own = outcome if kind == group else attempt(kind)
            _sort_out(kind, own, attempt, found)
    traced = [i for i in found if found[i] == SAME]
    if traced and (multiplied or len(traced) < len(others)):  # not yet together
        found.update(dict.fromkeys(traced, attempt(traced)))
    for i, family in enumerate(families):
        if found[i] == RAISES and primitives[i]:
            found[i] = DIFFERS
            reason = f"{primitives[i]} of two activations"
            walk.ties.pin(unit_nodes(family, nodes), reason)
        elif found[i] == DIFFERS:
            walk.ties.pin(unit_nodes(family, nodes), "its size, which fn uses")
    return tuple(
        family._replace(is_traced=found[i] == SAME)
        for i, family in enumerate(families)
        if found[i] != DIFFERS
    )


def _kinds(families: Sequence[Family], group: list[int]) -> list[list[int]]:
    """The families of a group, those of equal layers together."""
    kinds: dict[Any, list[int]] = {}
    for i in group:
        names = [(re.sub(r"\d+", "", s.path), s.axis) for s in families[i].slices]
        kind = families[i].size, *sorted(names)
        kinds.setdefault(kind, []).append(i)
    return list(kinds.values())


def _sort_out(
    group: list[int],
    outcome: str,
    attempt: Callable[[list[int]], str],
    found: dict[int, str],
) -> None:
    """Halve a group until it is known which of its families stand out.

    Where the first one raises, the others do, which are those of equal layers: a
    network of linen's modules raises for every family, and a trace takes its time.
    """
    if outcome == SAME or len(group) == 1:
        found.update(dict.fromkeys(group, outcome))
        return
    if outcome == RAISES and attempt(group[:1]) == RAISES:
        found.update(dict.fromkeys(group, RAISES))
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
    program: Any,
) -> str:
    """What comes of tracing fn with some units of these families less.

    Twice, with few and with most of them gone: half of a width is rounded. Two are
    left if there are three, because axes of one index may be traced in another way.
    """
    few, most = [], []
    for i, family in enumerate(families):
        spare = max(family.size - 2, 1)
        few.append(min(1 + i % 2, spare))
        most.append(max(family.size - 2 - i % 2, min(2, spare)))
    for numbers in few, most:
        small, is_kept = _without(walk, families, numbers, like)
        try:
            other = jax.make_jaxpr(fn)(small, *inputs)
        except Exception:
            return RAISES
        if not is_same_program(program, other, walk.nodes, is_kept):
            return DIFFERS
    return SAME


def _without(
    walk: Walk, families: list[Family], numbers: list[int], like: Any
) -> tuple[Any, np.ndarray]:
    """Parameters' shapes without so many units of each, and which nodes are left."""
    leaves, treedef = jax.tree.flatten(like)
    first = [
        slice(min(number, family.size - 1))
        for number, family in zip(numbers, families, strict=True)
    ]
    kept = without(families, [leaf.shape for leaf in leaves], first)
    flat = np.concatenate([np.zeros(0, bool), *(k for ks in kept for k in ks)])
    gone = np.zeros(walk.ties.size, bool)
    gone[walk.ties.classes(np.flatnonzero(~flat))] = True
    small = [
        jax.ShapeDtypeStruct([k.sum() for k in keep], leaf.dtype)
        for leaf, keep in zip(leaves, kept, strict=True)
    ]
    is_kept = ~gone[walk.ties.classes(np.arange(walk.ties.size))]
    return jax.tree.unflatten(treedef, small), is_kept


def _multiplied(walk: Walk, family: Family, nodes: Nodes) -> str | None:
    """The primitive that multiplies two activations with an axis of the family."""
    own = walk.ties.classes(unit_nodes(family, nodes))
    for primitive, ids in walk.products:
        if np.isin(walk.ties.classes(ids), own).any():
            return primitive
    return None
