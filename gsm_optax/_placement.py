"""Which device holds what: leaves on any mesh, copies counted once.

A leaf is a tuple of equal-shaped arrays, the arguments of a score, which may end in a
scalar. This file knows only jax.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from gsm_optax._words import Words, times_words, to_words

Leaves = Sequence[tuple[jax.Array, ...]]
AxisName = str | Sequence[str] | None


class Share(NamedTuple):
    """What this device contributes to counts of a leaf over named axes."""

    entries: Words  # of the leaf, over all devices
    counted: jax.Array | bool  # of devices that hold copies, one counts


def is_local(leaves: Leaves, axis_name: AxisName) -> bool:
    """Whether this device holds all there is, as far as tracing knows."""
    kinds = set(_axis_kinds(leaves).values())
    return not _names(axis_name) and kinds <= {AxisType.Manual}


def reduce_everywhere(
    here: Callable[..., Any],
    across: Callable[..., Any],
    leaves: Leaves,
    thresholds: jax.Array,
    axis_name: AxisName,
) -> Any:
    """Reduce all leaves to scalars, wherever they are.

    Args:
        here: `(leaves, thresholds, plain) -> result` of arrays that are whole; with
            `plain`, by reductions that the compiler can split over devices.
        across: `(leaves, thresholds, names) -> result` of the parts that this device
            holds, reduced over the named axes.
        leaves: what to reduce.
        thresholds: handed on.
        axis_name: inside `shard_map` or `pmap`, the axes that leaves are split over.
    """
    if _names(axis_name):
        return across(leaves, thresholds, _names(axis_name))
    kinds = set(_axis_kinds(leaves).values()) - {AxisType.Manual}
    if kinds == {AxisType.Explicit}:
        return _on_shards(across, leaves, thresholds)
    # On a mesh with Auto axes only the compiler knows which device holds what. It can
    # split plain sums: into an all-reduce of scalars for each group of devices that
    # share a leaf. A reduction with several operands it would gather, leaf by leaf.
    return here(leaves, thresholds, plain=bool(kinds))


def _on_shards(reduce_across, leaves, thresholds):
    """Reduce on every device its own shards; only the result crosses devices."""
    mesh = _mesh_of(leaves)
    specs = [
        tuple(_spec(args[0]) if x.ndim else P() for x in args)  # flags are scalars
        for args in leaves
    ]
    placed = [
        tuple(
            jax.sharding.reshard(x, NamedSharding(mesh, spec))
            for x, spec in zip(args, by_arg, strict=True)
        )
        for args, by_arg in zip(leaves, specs, strict=True)
    ]

    def local(thresholds, leaves):
        return reduce_across(leaves, thresholds, mesh.axis_names)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), specs), out_specs=P())(
        thresholds, placed
    )


def everywhere(x: jax.Array) -> jax.Array:
    """The same small array on all devices of an explicit mesh."""
    mesh = jax.typeof(x).sharding.mesh
    if not _is_explicit(mesh):
        return x  # the compiler sees to it
    return jax.sharding.reshard(x, NamedSharding(mesh, P()))


def along(row: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """Lay a row along an axis of a leaf, so that it broadcasts; placed as the leaf."""
    sharding = jax.typeof(like).sharding
    if _is_explicit(sharding.mesh):
        spec = P(sharding.spec[axis] if axis < len(sharding.spec) else None)
        row = jax.sharding.reshard(row, NamedSharding(sharding.mesh, spec))
    return jnp.expand_dims(row, [i for i in range(like.ndim) if i != axis])


def placed_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """An array of the shape of a leaf, on an explicit mesh laid out as that is."""
    sharding, own = (jax.typeof(y).sharding for y in (like, x))
    is_apart = _is_explicit(sharding.mesh) and not own.mesh.empty
    return jax.sharding.reshard(x, sharding) if is_apart else x


def is_explicit(x: Any) -> bool:
    """Whether an array lives on a mesh with explicit axes."""
    return isinstance(x, jax.Array) and _is_explicit(jax.typeof(x).sharding.mesh)


def _is_explicit(mesh: Any) -> bool:
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def _spec(x: jax.Array) -> P:
    return jax.typeof(x).sharding.spec


def check_axis_name(leaves: Leaves, axis_name: AxisName) -> None:
    """Raise `ValueError` where devices would choose apart, as far as it can be told.

    Raises:
        NameError: if there is no such axis.
    """
    names = _names(axis_name)
    for name in names:
        lax.axis_size(name)
    manual = _manual_axes(leaves)
    if not manual:
        return
    if not _knows_copies(manual):
        if axis_name is None:
            raise ValueError(
                f"inside shard_map or pmap over {manual} nothing tells whether devices "
                "hold copies of the parameters or parts. Pass axis_name=() if each "
                "holds them all and gradients are averaged, or axis_name= the axes "
                "that parameters are split over."
            )
        return
    for args in leaves:
        param, *others = (varying(x) for x in args)
        if unnamed := param - set(names):
            raise ValueError(
                f"a parameter of shape {args[0].shape} is split over the axes "
                f"{tuple(sorted(unnamed))} of shard_map, but axis_name={axis_name!r}: "
                "each device would choose by itself. Name the axes that parameters "
                "are split over."
            )
        if apart := frozenset().union(*others) - param:
            raise ValueError(
                f"the gradient of a parameter of shape {args[0].shape} differs over "
                f"the axes {tuple(sorted(apart))} of shard_map, where the parameter "
                "does not: average gradients first, with jax.lax.pmean."
            )


def check_whole(leaves: Leaves, *, in_doubt: bool) -> None:
    """Raise `ValueError` if this device holds a part of the leaves only.

    Args:
        leaves: what should be whole.
        in_doubt: whether it is, where tracing cannot tell copies from parts.
    """
    if not any(isinstance(x, Tracer) for x, *_ in leaves):
        return
    manual = _manual_axes(leaves)
    if not manual:
        return
    is_known = _knows_copies(manual)
    if any(varying(x) for x, *_ in leaves) if is_known else not in_doubt:
        raise ValueError(
            f"inside shard_map or pmap over {manual} every device may see its own part "
            f"of the parameters{'' if is_known else ', which tracing cannot tell'}: "
            "call it outside, on all of them."
        )


def shares(leaves: Leaves, axis_name: AxisName) -> list[Share]:
    """What this device contributes for each of the leaves."""
    names = _names(axis_name)
    sizes = [to_words(args[0].size) for args in leaves]
    if not names:
        return [Share(size, True) for size in sizes]
    index = {name: lax.axis_index(name) for name in names}
    if not _knows_copies(names):
        return _guessed_shares(leaves, sizes, index)
    found = []
    for args, size in zip(leaves, sizes, strict=True):
        split = varying(args[0]) & set(names)
        copied = [index[name] for name in names if name not in split]
        counted = sum(copied) == 0 if copied else True
        devices = math.prod(map(lax.axis_size, split))
        found.append(Share(times_words(size, devices), counted))
    return found


def _guessed_shares(leaves, sizes, index) -> list[Share]:
    """The same where tracing cannot tell copies from parts: by what the leaves hold.

    Along an axis on which all leaves are the same, bit for bit, they are copies. (Were
    they equal parts, they would be of one opinion too: the choice is then the same.)
    Otherwise every leaf is split over it.
    """
    sums = jnp.stack([_checksum(args[0]) for args in leaves])
    counted: Any = True
    devices: Any = 1
    for name, i in index.items():
        same = jnp.all(lax.pmin(sums, name) == lax.pmax(sums, name)).astype(jnp.int32)
        same = lax.pmin(same, tuple(index)) == 1  # one verdict, also along other axes
        counted &= ~same | (i == 0)
        devices *= jnp.where(same, 1, lax.axis_size(name))
    return [Share(times_words(size, devices), counted) for size in sizes]


def _checksum(x: jax.Array) -> jax.Array:
    """Two numbers, int32, that equal arrays share and others hardly ever do."""
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    bits = [lax.bitcast_convert_type(p.astype(jnp.float32), jnp.int32) for p in parts]
    total = sum(bits)
    mixed = total ^ (total >> 11)
    return jnp.stack([jnp.sum(v, dtype=jnp.int32) for v in (total, mixed * mixed)])


def most_entries(leaves: Leaves, axis_name: AxisName = None) -> int:
    """No fewer than the entries of all leaves over all devices, before tracing."""
    devices = math.prod(map(lax.axis_size, _names(axis_name)))
    return sum(args[0].size for args in leaves) * devices


def varying(x: jax.Array) -> frozenset[str]:
    """Over which manual axes devices may hold different values of `x`."""
    aval = jax.typeof(x)
    if hasattr(aval, "vma"):  # until jax 0.9
        return aval.vma
    return aval.manual_axis_type.varying


def _knows_copies(names: Sequence[str]) -> bool:
    """Whether tracing tells copies from parts.

    Under `pmap` and with `check_vma=False` it does not: not even a device's own index
    is known to differ.
    """
    return all(varying(lax.axis_index(name)) for name in names)


def _manual_axes(leaves: Leaves) -> tuple[str, ...]:
    """The axes of `shard_map` or `pmap` that this is inside of."""
    kinds = _axis_kinds(leaves).items()
    return tuple(name for name, kind in kinds if kind == AxisType.Manual)


def _axis_kinds(leaves: Leaves) -> dict[str, AxisType]:
    """Axes of the mesh that the leaves live on: Auto, Explicit or Manual."""
    mesh = _mesh_of(leaves)
    kinds = () if mesh.empty else mesh.axis_types
    if set(kinds) == {AxisType.Auto} and mesh.size == 1:
        return {}
    return dict(zip(mesh.axis_names, kinds, strict=True))


def _mesh_of(leaves: Leaves) -> Any:
    types = (jax.typeof(x) for args in leaves for x in args)
    meshes = {t.sharding.mesh for t in types if not t.sharding.mesh.empty}
    if len({(m.axis_names, m.axis_sizes) for m in meshes}) > 1:
        raise ValueError(
            f"the leaves live on different meshes: {', '.join(map(str, meshes))}. "
            "Put all parameters and gradients on one mesh."
        )
    return next(iter(meshes), jax.sharding.get_abstract_mesh())


def _names(axis_name: AxisName) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
