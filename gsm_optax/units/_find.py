"""Find the units of a network by following axes through its program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax._paths import check_arrays, leaf_names
from gsm_optax.units._families import Family, Pinned, Slices, unit_entries, without
from gsm_optax.units._program import leaf_nodes, trace, walk_program
from gsm_optax.units._retrace import check_by_tracing
from gsm_optax.units._units import Units
from gsm_optax.units._walk import Walk


def find_units(fn: Callable[..., Any], params: Any, *inputs: Any) -> Units:
    r"""Find what can be removed as a whole: channels, neurons, heads.

    A unit is a set of slices of parameters: the column of a kernel that makes a neuron,
    its bias, its normalisation, the rows that read it. With all of them at zero the
    network does what it does without them. Units along one axis of the network are a
    family.

    They are found by following every index of every axis through the program that `fn`
    is traced to: equal indices of two operands are tied. What a primitive mixes with
    other indices is pinned, and so are axes of primitives that are not known, of inputs
    and of outputs. Pinned is always safe: a family is only what is known to be one.
    Then `fn` is traced again with fewer units, which shows what it knows of its sizes:
    where it does something else with them, such as scaling by them, they are pinned.

    * Of the heads of attention and the dimensions within them, heads are the units
      where a kernel's axis holds both. Grouped convolutions lose whole groups.
    * Batch statistics are slices like any other if they are part of `params`: give all
      variables of a linen module, `lambda variables, x: model.apply(variables, x)`. As
      an input they pin the channels.
    * A function without randomness: dropout's noise pins what it multiplies.
    * `jnp.einsum` of three or more operands chooses their order by their sizes, which
      pins those; not so with `optimize=False`, or as products of two.
    * Modules that check their sizes, such as all of linen's, cannot be traced with
      fewer units. Their families are as true, for the module that is built anew with
      other sizes; the dimensions of attention are then left out, since it scales by
      their number.

    Args:
        fn: `fn(params, *inputs)`, any JAX function, with or without `jit`.
        params: pytree of arrays, or of `jax.ShapeDtypeStruct`. Leaves that are not
            floating-point are pinned.
        *inputs: arrays or `jax.ShapeDtypeStruct`, or pytrees of them. The values do not
            matter here; `shrink` compares outputs on them.

    Returns:
        `Units`: print it.

    Raises:
        ValueError: if `fn` cannot be traced, uses no parameters, or has no family; it
            says what pinned its axes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gsm_optax.units import find_units
        >>> def fn(params, x):
        ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
        >>> params = {"in": jnp.ones((4, 3)), "out": jnp.ones((3, 2))}
        >>> print(find_units(fn, params, jnp.ones((1, 4))))
        family  units  entries each  slices
             0      3             6  in[1]
                                     out[0]
        <BLANKLINE>
        pinned by  axes
        input         1  in[0]
        output        1  out[1]

    References:
        Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, for groups of
        a network's modules; here it is the indices of a program's axes.
    """
    check_arrays(params)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params
    )
    program = trace(fn, like, inputs)
    shapes = [leaf.shape for leaf in jax.tree.leaves(like)]
    walk = _settled_walk(program, shapes)
    paths = leaf_names(like)
    families = _families(walk, shapes, paths)
    families = check_by_tracing(walk, families, fn, like, inputs, program)
    pinned = _pinned(walk, families, shapes, paths)
    if all(reason == "not used" for *_, reason in pinned):
        raise ValueError("fn(params, *inputs) uses none of the parameters.")
    if not families:
        raise ValueError(_no_family(pinned))
    return Units(families, pinned, like, fn, inputs, program, walk.choices)


def _settled_walk(program: Any, shapes: list[Any]) -> Walk:
    """A walk in which every reshape is decided, and sums that are not zero pinned.

    Each slice is taken to be zero for itself, which tells what a unit of zeros does.
    """
    zeros = [[np.zeros(size) for size in shape] for shape in shapes]
    choices: dict[Any, int] = {}
    while True:
        walk = walk_program(program, zeros, choices)
        if not walk.open:
            break
        live = {key: walk.live(axes) for key, axes in walk.open.items()}
        clear = {key: axes for key, axes in live.items() if len(axes) < 2}
        # Where two axes could be followed, as of heads and their dimensions, it is
        # the outer one: whole heads go.
        choices = choices | {
            key: axes[0] if axes else 0 for key, axes in (clear or live).items()
        }
    for primitive, ids in walk.sums:
        walk.ties.pin(ids[walk.ties.pinned(ids) == 0], primitive)
    _pin_unread(walk)
    return walk


def _pin_unread(walk: Walk) -> None:
    """Pin what no sum reads, such as positions beyond the end of these inputs."""
    ids = np.arange(walk.leaf_nodes)
    read = np.concatenate([ids[:0], *walk.read])
    unread = ~np.isin(walk.ties.classes(ids), walk.ties.classes(read))
    walk.ties.pin(ids[unread & (walk.ties.pinned(ids) == 0)], "not used")


def _families(walk: Walk, shapes: list[Any], paths: list[str]) -> list[Family]:
    """Classes that are not pinned, those that occur in the same places together."""
    nodes = leaf_nodes(shapes)
    ids = np.arange(len(nodes.leaf))
    live = ids[walk.ties.pinned(ids) == 0]
    roots = walk.ties.classes(live)
    signs = _signs(walk)[roots]
    families = []
    firsts = np.sort(np.unique(signs, return_index=True)[1])
    for sign in signs[firsts]:
        own = signs == sign
        slices = _slices(live[own], roots[own], nodes, shapes, paths)
        size = len(slices[0].indices)
        if len(slices) == 1:
            walk.ties.pin(live[own], "one leaf reads or makes it")
        elif size > 1:  # the last unit always stays
            entries = unit_entries(slices, shapes)
            families.append(Family(size, entries, slices, False))
    return families


def _signs(walk: Walk) -> np.ndarray:
    """For each root a number that tells in which axes, of all arrays, it occurs.

    Two classes in the same axes have the same sum of the axes' random numbers; that
    others have it too happens once in 2⁶⁴ times.
    """
    signs = np.zeros(walk.ties.size, np.uint64)
    numbers = np.random.default_rng(0).integers(
        1 << 63, size=len(walk.seen), dtype=np.uint64
    )
    for number, ids in zip(numbers, walk.seen.values(), strict=True):
        np.add.at(signs, walk.ties.classes(ids), number)
    return signs


def _slices(
    ids: np.ndarray, roots: np.ndarray, nodes: Any, shapes: list[Any], paths: list[str]
) -> tuple[Slices, ...]:
    """What the units of one family, which are given by their roots, hold."""
    units = np.unique(roots)
    slices = []
    for leaf, axis in dict.fromkeys(
        zip(nodes.leaf[ids].tolist(), nodes.axis[ids].tolist(), strict=True)
    ):
        here = (nodes.leaf[ids] == leaf) & (nodes.axis[ids] == axis)
        unit = np.searchsorted(units, roots[here])
        order = np.argsort(unit, kind="stable")
        indices = nodes.index[ids][here][order].reshape(len(units), -1)
        # JAX keeps what it makes of an array: the same with 64 bits enabled or without.
        indices = indices.astype(np.int32)
        slices.append(Slices(paths[leaf], leaf, axis, shapes[leaf][axis], indices))
    return tuple(slices)


def _pinned(
    walk: Walk, families: tuple[Family, ...], shapes: list[Any], paths: list[str]
) -> tuple[Pinned, ...]:
    """Axes that are longer than one and, at least in part, in no family."""
    left = without(families, shapes, [slice(None)] * len(families))
    pinned, first = [], 0
    for path, axes in zip(paths, left, strict=True):
        for axis, is_left in enumerate(axes):
            ids = first + np.flatnonzero(is_left)
            first += len(is_left)
            if len(is_left) > 1 and len(ids):
                reason = walk.ties.reasons[walk.ties.pinned(ids).max()] or "one unit"
                pinned.append(Pinned(path, axis, len(is_left), reason))
    return tuple(pinned)


def _no_family(pinned: tuple[Pinned, ...]) -> str:
    lines = [f"  {path}[{axis}] by {reason}" for path, axis, _, reason in pinned[:8]]
    more = ["  ..."] if len(pinned) > 8 else []
    return "\n".join(
        [
            "this network has no units that could be removed. Its axes are pinned:",
            *lines,
            *more,
            "A hidden layer between two kernels would be a family.",
        ]
    )
