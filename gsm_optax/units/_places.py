"""Which leaf of another tree stands for which parameter of a network.

An optimizer's state ends in the paths of the parameters; and what is trained may be a
part of them, such as one collection of a linen module, whose paths begin further in.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, GetAttrKey

from gsm_optax._paths import filled, leaf_names, leaf_paths, listed

Path = tuple[str, ...]
Spec = tuple[tuple[int, ...], list[np.ndarray]]  # a shape, and what stays of each axis


def strings(path: tuple[Any, ...]) -> Path:
    """A path whose keys are text."""
    return tuple(map(str, path))


def start_of(part: Any, own: Mapping[str, tuple[int, ...]]) -> str:
    """What the names of a part of the parameters lack at their start.

    Args:
        part: a tree like some of the parameters, with holes or without.
        own: the shapes of all parameters, by their names.

    Raises:
        ValueError: if there is no such part, or if it may be one or another.
    """
    names, shapes = leaf_names(part), list(map(jnp.shape, jax.tree.leaves(part)))
    if set(names) == set(own):
        return ""
    fits = lambda start: all(start + name in own for name in names)
    ends = [x.removesuffix(names[0]) for x in own if x.endswith(names[0])]
    fitting = [x for x in ends if x[-1:] in ("", "/") and fits(x)]
    # Shapes tell one from another, and so do holes.
    if len(fitting) > 1:
        alike = lambda start: [own[start + name] for name in names] == shapes
        fitting = list(filter(alike, fitting)) or fitting
    if len(fitting) > 1:
        everything = leaf_names(filled(part))
        has = lambda name: any(f"{x}/".startswith(f"{name}/") for x in own)
        holds = lambda start: all(has(start + name) for name in everything)
        fitting = list(filter(holds, fitting)) or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        places = " and in ".join(start.rstrip("/") or "the top" for start in fitting)
        raise ValueError(
            f"{listed(names, 4)} are names in {places} of the parameters that the "
            "units were found in: which of these it is cannot be told. Find the units "
            "of this part alone, or give all parameters, with None for the others."
        )
    missing = [name for name in names if name not in own]
    raise ValueError(
        f"{listed(missing, 4)} are not among the parameters that the units were "
        f"found in, {listed(own, 4)}. Find the units of this network with "
        "find_units(fn, params, *inputs)."
    )


def stands_for(
    tree: Any, wanted: Mapping[Path, Spec], known: Mapping[Path, Spec]
) -> list[Spec | None]:
    """What each leaf of a tree stands for, if anything.

    Args:
        tree: like the parameters or a part of them; or what ends in their paths.
        wanted: all parameters by their paths.
        known: what stands at these places of the tree.

    Raises:
        ValueError: if a leaf may stand for one parameter or another, or for one or
            none.
    """
    keys, leaves = list(leaf_paths(tree)), jax.tree.leaves(tree)
    paths = list(map(strings, keys))
    found = [
        next((own for at, own in known.items() if path[: len(at)] == at), None)
        for path in paths
    ]
    shapes = [
        (path, getattr(leaf, "shape", None))
        for path, leaf, own in zip(paths, leaves, found, strict=True)
        if own is None
    ]
    part = inside(shapes, wanted)
    params = [
        ending(path, part) if own is None else None
        for path, own in zip(paths, found, strict=True)
    ]
    check_places(tree, zip(keys, params, strict=True), part)
    for i, (leaf, param) in enumerate(zip(leaves, params, strict=True)):
        # All paths end with that of a single array, which is empty.
        if param or (param == () and jnp.shape(leaf) == part[()][0]):
            found[i] = part[param]
    is_none = all(param is None for param in params)
    for i, (path, leaf, own) in enumerate(zip(paths, leaves, found, strict=True)):
        shape = jnp.shape(leaf)
        if own is None and (param := _looks_like(path, shape, wanted, is_none)):
            raise ValueError(
                f"{leaf_names(tree)[i]} of shape {list(shape)} may stand for "
                f"{''.join(param)} of {list(wanted[param][0])}: apply the plan to "
                "every tree alone, as in plan.apply(checkpoint['opt_state']). If it is "
                "of an optimizer that keeps arrays of other shapes, begin with a new "
                "state, tx.init(small)."
            )
    return found


def _looks_like(
    path: Path, shape: tuple[int, ...], wanted: Mapping[Path, Spec], by_name: bool
) -> Path | None:
    """A parameter that would shrink, and that a leaf looks like which stands for none.

    As those of an optimizer's state do that lies beside the parameters, whose paths
    begin with the name of a collection.

    Args:
        path: of the leaf,
        shape: and its shape.
        wanted: all parameters by their paths.
        by_name: whether its name alone makes it look so, and not its shape too.
    """
    if math.prod(shape) <= 1:
        return None
    shrinks = lambda whole, keep: whole != tuple(map(len, keep))
    # Names of three parts and more: else layers of another network look the same.
    alike = (own for own in wanted if own[2:] and path[1 - len(own) :] == own[1:])
    return next(
        (
            own
            for own in alike
            if shrinks(*wanted[own]) and (by_name or shape == wanted[own][0])
        ),
        None,
    )


def ending(path: Path, wanted: Collection[Path]) -> Path | None:
    """The parameter whose path this path ends with, the longest one."""
    endings = (path[i:] for i in range(len(path) + 1))
    return next((x for x in endings if x in wanted), None)


def inside(leaves: Sequence[tuple[Path, Any]], wanted: Mapping[Path, Any]) -> Any:
    """The parameters by their paths in the part that a tree is of: the one that fits.

    The optimizer of a linen module has but one of its collections, and that of one of
    two networks has its own.

    Args:
        leaves: paths of the tree, and their shapes.
        wanted: for the path of every parameter its shape, and which indices it keeps.

    Raises:
        ValueError: if several parts fit.
    """
    parts: dict[Path, dict[Path, Any]] = {}
    for path, own in wanted.items():
        for i in range(len(path)):
            parts.setdefault(path[:i], {})[path[i:]] = own
    best: list[Path] = []
    most = 0, False
    for depth in sorted(set(map(len, parts))):  # the larger parts first
        for start in (x for x in parts if len(x) == depth):
            fit = _fit(leaves, parts[start])
            if fit >= most and fit[0]:
                best = [*best, start] if fit == most else [start]
                most = fit
        if best:
            break
    if len(best) > 1:
        names = " or ".join("".join(start) for start in best)
        raise ValueError(
            f"the tree may be that of {names}, which have the same names and shapes. "
            "Find the units of what is trained alone, or begin with a new state, "
            "tx.init(small)."
        )
    return parts[best[0]] if best else wanted


def _fit(
    leaves: Sequence[tuple[Path, Any]], part: Mapping[Path, Any]
) -> tuple[int, bool]:
    """How many leaves stand for a parameter, and whether all of the part is there.

    None do if one has another shape, but for placeholders and what is small already.
    """
    held = []
    for path, shape in leaves:
        own = ending(path, part)
        if own is None or shape is None or math.prod(shape) <= 1:
            continue
        whole, keep = part[own]
        if shape not in (whole, tuple(map(len, keep))):
            return 0, False
        held.append(own)
    return len(held), set(held) == set(part)


def check_places(
    tree: Any,
    places: Iterable[tuple[tuple[Any, ...], Path | None]],
    wanted: Collection[Path],
) -> None:
    """Raise `ValueError` if leaves of a state may stand for one parameter or another.

    Args:
        tree: what ends in the paths of the parameters.
        places: the path of every leaf, and the parameter that it stands for, if any.
        wanted: the paths of the parameters.
    """
    fields: dict[tuple[Any, ...], set[Path]] = {}
    for keys, own in places:
        if own:
            fields.setdefault(keys[: len(keys) - len(own)], set()).add(own)
    everything = list(map(strings, leaf_paths(filled(tree))))
    for field, held in fields.items():
        if held != set(wanted):
            at = strings(field)
            there = [path[len(at) :] for path in everything if path[: len(at)] == at]
            _check_part(_name(field), next(iter(held)), there, wanted)
    # A field of the state that holds several trees with the parameters' names.
    networks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for field, held in fields.items():
        if field and isinstance(field[-1], DictKey) and _has_field(field):
            other = networks.setdefault(field[:-1], field)
            if other != field and fields[other] & held:
                raise ValueError(
                    f"{_name(other)} and {_name(field)} both have the names of the "
                    "parameters that the units were found in. If these are averages of "
                    "one network, apply the plan to each; if they are two networks, "
                    "find units in both: find_units(lambda p, x: fn(p['one'], x), ...)."
                )


def _check_part(
    name: str, one: Path, paths: Sequence[Path], wanted: Collection[Path]
) -> None:
    """Raise `ValueError` if all these paths, holes included, are in a part of `wanted`.

    Args:
        name: of what they are in.
        one: a parameter that is among them.
        paths: of all that is there.
        wanted: the paths of all parameters.
    """
    is_in = lambda path: any(own[: len(path)] == path for own in wanted)
    for start in {x[: -len(one)] for x in wanted if x[-len(one) :] == one} - {()}:
        if all(is_in(start + path) for path in paths):
            raise ValueError(
                f"{name} may be that of the parameters or of those in "
                f"{''.join(start)}, which have the same names. Find the units of "
                "what is trained alone, or begin with a new state, tx.init(small)."
            )


def _has_field(path: tuple[Any, ...]) -> bool:
    return any(isinstance(key, GetAttrKey) for key in path)


def _name(path: tuple[Any, ...]) -> str:
    return f"state{jax.tree_util.keystr(path)}"
