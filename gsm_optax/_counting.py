"""How many scores reach a threshold, over any pytree on any mesh.

A score is compared by its order key: the bit pattern of a non-negative float32, read
as an integer, has the order of its value. Counts are reductions of every leaf to one
scalar per threshold, which is all that devices exchange; they are exact beyond 2³¹
entries, because they are summed in two words.

This file knows only jax.
"""

import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

NAN_KEY = 0x7F800001
"""One above the key of inf: every NaN reaches it, and nothing else."""

WORD = 12
"""Bits of the low word of a count.

Low words of 2¹⁹ partial counts still add up within int32, and so do the high words of
2⁴³ entries.
"""

_DIGIT = (1 << WORD) - 1

LARGEST = 2**31 - 1
"""Entries that one int32 can count."""

Leaves = Sequence[tuple[jax.Array, ...]]  # the arguments of a score, leaf by leaf
Score = Callable[..., jax.Array]
Words = tuple[Any, Any]  # (high, low) of a count; ints, or int32 scalars


def order_key(score: jax.Array) -> jax.Array:
    """Map float32 scores, sign bit clear, to int32 keys of the same order.

    The key of zero is 0; those of NaNs are NAN_KEY or more.
    """
    return lax.bitcast_convert_type(score, jnp.int32)


def to_words(count: Any) -> tuple[Any, Any]:
    """Split a count into (high, low) words; the low one has `WORD` bits."""
    return count >> WORD, count & (1 << WORD) - 1


def carry(high: Any, low: Any) -> tuple[Any, Any]:
    """Move what exceeds the low word into the high one."""
    return high + (low >> WORD), to_words(low)[1]


def round_product(fraction: Fraction, words: Words) -> Words:
    """round(fraction · count), half to even, exactly: in digits of `WORD` bits.

    Args:
        fraction: in [0, 1), its denominator a power of two, as that of any float.
        words: a count, traced or not.
    """
    drop = -(-(fraction.denominator.bit_length() - 1) // WORD)
    if not drop:
        return 0, 0
    factor = int(fraction * 2 ** (WORD * drop))  # of the count, digits still to drop
    digits = [words[1], *(words[0] >> shift & _DIGIT for shift in (0, WORD, 2 * WORD))]
    limbs: list[Any] = [0] * (drop + len(digits) + 1)
    limbs[drop - 1] = 1 << WORD - 1  # one half, so that rounding down rounds
    for i in range(drop):
        for j, digit in enumerate(digits):
            limbs[i + j] += (factor >> WORD * i & _DIGIT) * digit
    for i in range(len(limbs) - 1):
        more, limbs[i] = to_words(limbs[i])
        limbs[i + 1] += more
    # Without a rest it was exactly halfway, and an odd result is one too many.
    rest = reduce(operator.or_, limbs[:drop])
    low = limbs[drop] - jnp.where(rest == 0, limbs[drop] & 1, 0)
    first, second, third = limbs[drop + 1 : drop + 4]
    return first + (second << WORD) + (third << 2 * WORD), low


def excess(words: tuple[Any, Any], kept: tuple[Any, Any]) -> jax.Array:
    """Count minus `kept` as int32, clipped to ±2²⁹: its sign and its zero are exact."""
    high, low = words
    bound = 1 << 29 - WORD
    return (jnp.clip(high - kept[0], -bound, bound - 1) << WORD) + (low - kept[1])


def count(
    score: Score, leaves: Leaves, thresholds: jax.Array, axis_name: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Count the keys that reach each of K thresholds, over all leaves and devices.

    Args:
        score: maps one element of `leaves`, unpacked, to float32 scores.
        leaves: the arguments of `score`, one tuple of equal-shaped arrays a leaf.
        thresholds: int32 keys, shape (K,).
        axis_name: inside `shard_map` or `pmap`, the axis or axes to sum over.

    Returns:
        High and low words, int32, shape (K,) each.

    Raises:
        ValueError: if leaves live on different meshes, or inside `shard_map` without an
            axis name.
        NameError: if there is no such axis.
    """

    def here(leaves, thresholds, plain):
        form = _sums if plain else _fused
        return _total(_by_leaf(score, leaves, thresholds, form))

    across = partial(_count_across, score)
    return _everywhere(here, across, leaves, thresholds, axis_name)


def smallest_reaching(
    score: Score, leaves: Leaves, threshold: jax.Array, axis_name: Any = None
) -> jax.Array:
    """Return the smallest key of all that reaches the threshold, or else NAN_KEY."""
    here, across = partial(_smallest, score), partial(_smallest_across, score)
    return _everywhere(here, across, leaves, threshold, axis_name)


def is_local(leaves: Leaves) -> bool:
    """Whether tracing knows of no mesh: the leaves are on one device."""
    return not _axis_kinds(leaves)


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


def _everywhere(here, across, leaves, thresholds, axis_name):
    """Reduce all leaves: `across` named axes, or `here` where there are none."""
    kinds = _axis_kinds(leaves)
    if axis_name is not None:
        return across(leaves, thresholds, axis_name)
    if AxisType.Manual in kinds.values():
        raise ValueError(
            f"inside shard_map over {tuple(kinds)} each device would choose by itself: "
            "pass axis_name= the axes that parameters are split over."
        )
    if set(kinds.values()) == {AxisType.Explicit}:
        return _on_shards(across, leaves, thresholds)
    # On a mesh with Auto axes only the compiler knows which device holds what. It can
    # split plain sums: into an all-reduce of scalars for each group of devices that
    # share a leaf. A reduction with several operands it would gather, leaf by leaf.
    return here(leaves, thresholds, plain=bool(kinds))


def _on_shards(reduce_across, leaves, thresholds):
    """Reduce on every device its own shards; only the result crosses devices."""
    mesh = _mesh_of(leaves)
    specs = [jax.typeof(args[0]).sharding.spec for args in leaves]
    placed = [
        tuple(jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x in args)
        for args, spec in zip(leaves, specs, strict=True)
    ]
    by_leaf = [(spec,) * len(args) for spec, args in zip(specs, leaves, strict=True)]

    def local(thresholds, leaves):
        return reduce_across(leaves, thresholds, mesh.axis_names)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), by_leaf), out_specs=P())(
        thresholds, placed
    )


def num_entries(leaves: Leaves, axis_name: Any = None) -> int:
    """Return N, the entries of all leaves, over all devices that `axis_name` spans."""
    split = _split_axes(leaves, axis_name)
    return sum(
        args[0].size * math.prod(map(lax.axis_size, axes))
        for args, axes in zip(leaves, split, strict=True)
    )


def _split_axes(leaves: Leaves, axis_name: Any) -> list[frozenset[str]]:
    """Per leaf, over which of the named axes its devices hold parts, not copies."""
    names = _names(axis_name)
    # With check_vma=False not even a device's own index is known to vary; then nothing
    # tells copies from parts, and every leaf has to be split.
    known = all(_varying(lax.axis_index(name)) for name in names)
    return [
        _varying(args[0]) & set(names) if known else frozenset(names) for args in leaves
    ]


def _names(axis_name: Any) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _varying(x: jax.Array) -> frozenset[str]:
    aval = jax.typeof(x)
    return aval.vma if hasattr(aval, "vma") else aval.mat.varying


def _count_across(score, leaves, thresholds, axis_name):
    """Count on this device and add up; of devices that hold copies, one counts."""
    names = _names(axis_name)
    index = {name: lax.axis_index(name) for name in names}

    def once(axes, part):
        copied = [index[name] for name in names if name not in axes]
        return jnp.where(sum(copied) == 0, part, 0) if copied else part

    counts = _by_leaf(score, leaves, thresholds, _fused)
    high, low = _total(list(map(once, _split_axes(leaves, names), counts)))
    return carry(*lax.psum(jnp.stack([high, low]), names))


def _smallest_across(score, leaves, threshold, axis_name):
    return lax.pmin(_smallest(score, leaves, threshold, plain=False), axis_name)


def _smallest(score, leaves, threshold, plain):
    least = [_leaf_smallest(score, args, threshold, plain) for args in leaves]
    return jnp.min(jnp.stack(least))


@partial(jax.jit, static_argnames=("score", "plain"))
def _leaf_smallest(score, args, threshold, plain):
    key = order_key(score(*args))
    reaching = jnp.where(key >= threshold, jnp.minimum(key, NAN_KEY), NAN_KEY)

    def fused(reaching):  # see _variadic: the second operand keeps it one loop
        least, most = np.int32(NAN_KEY), np.int32(0)
        both = lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]))
        axes = tuple(range(reaching.ndim))
        pair = lax.reduce((reaching, reaching), (least, most), both, axes)
        return lax.optimization_barrier(pair)[0]

    if plain:
        return jnp.min(reaching)
    return lax.platform_dependent(reaching, cpu=fused, default=jnp.min)


def _by_leaf(score, leaves, thresholds, form) -> list[jax.Array]:
    return [_leaf_counts(score, args, thresholds, form) for args in leaves]


@partial(jax.jit, static_argnames=("score", "form"))  # traced once for equal shapes
def _leaf_counts(score, args, thresholds, form) -> jax.Array:
    """Counts of shape (rows, K), none of them above LARGEST."""
    # Without the barrier XLA computes the scores once, ahead of the loop that calls
    # this, and stores them: n · 4 bytes, and slower on the CPU.
    thresholds, args = lax.optimization_barrier((thresholds, args))
    key = order_key(score(*args))
    by_row = form(key, thresholds, _countable_axes(key.shape))
    return by_row.reshape(-1, thresholds.size)


def _countable_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As many trailing axes as one int32 can count."""
    size, axes = 1, []
    for axis in reversed(range(len(shape))):
        size *= shape[axis]
        if size > LARGEST:
            break
        axes.append(axis)
    return tuple(axes)


def _total(counts: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    high, low = to_words(jnp.concatenate(counts))  # scalars only: (leaves, K)
    return carry(*(jnp.sum(word, 0, jnp.int32) for word in (high, low)))


def _fused(key, thresholds, axes):
    return lax.platform_dependent(
        key,
        thresholds,
        cpu=lambda key, thresholds: _variadic(key, thresholds, axes),
        default=lambda key, thresholds: _sums(key, thresholds, axes),
    )


def _sums(key, thresholds, axes):
    """One plain sum per threshold, which accelerators fuse and every mesh can split."""
    return jnp.stack([jnp.sum(key >= t, axes, jnp.int32) for t in thresholds], -1)


def _variadic(key, thresholds, axes):
    """All thresholds in one reduction.

    On the CPU a plain integer sum becomes a reduce-window, which is never fused: it
    writes its operand out (n · 4 bytes a threshold, 72 ms against 9 ms for eight
    thresholds on 25 M entries). A reduction with several operands stays one loop, and
    vectorises.
    """
    return sum_together([(key >= t).astype(jnp.int32) for t in thresholds], axes)


def sum_together(operands: Sequence[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    """Sum K int32 arrays over `axes` in one loop; shape (..., K)."""

    def add(a, b):
        return tuple(x + y for x, y in zip(a, b, strict=True))

    zeros = (np.int32(0),) * len(operands)
    return jnp.stack(lax.reduce(tuple(operands), zeros, add, axes), -1)
