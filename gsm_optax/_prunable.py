"""Which leaves take part."""

import itertools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from gsm_optax._paths import (
    check_arrays,
    filled,
    is_masked,
    leaf_names,
    leaf_paths,
    listed,
)

# A pytree prefix of bools, or a callable `params -> such a prefix`.
Prunable = bool | Callable[[Any], Any] | Any

_KERNELS = {"kernel", "embedding"}
_WEIGHTS = {"weight", "w"}
_NEVER = {"bias", "scale", "offset", "beta", "gamma", "mean", "var", "zero"}
_PARTS = {"real", "imaginary"}  # of optax.contrib.split_real_and_imaginary
_NORMS = {"ln", "bn", "gn", "rms"}

RULE = (
    "By default these are floating-point leaves of rank 2 or more that are named "
    "kernel, embedding, weight or w, and leaves of other names with two axes longer "
    "than one; never biases, scales, offsets, or the parameters of a normalisation"
)


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` holds floats or complex numbers (float0 and PRNG keys do not)."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def kernels(params: Any) -> Any:
    """Tree of bools, `True` at dense and convolution kernels and embeddings.

    The default of every `prunable` argument. By name and shape, these are

    * leaves of rank 2 or more that are named `kernel`, `embedding`, `weight` or `w`,
      `input_kernel` and `w1` included;
    * leaves of any other name with two axes or more that are longer than one.

    Never taken are

    * integers, bools and PRNG keys;
    * leaves named `bias`, `scale`, `offset`, `beta`, `gamma`, `mean`, `var` or `zero`
      (`in_bias`, `scales` and `zero_point` too), and `b` beside a `w`, whatever their
      rank, so that biases of attention heads and what `nn.scan` or `nnx.vmap` have
      stacked stay;
    * anything but kernels and embeddings under a name that says norm, or of such a name
      (`norm1`, `LayerNorm_0`, `ln_f`, `bn`, `q_norm`), and a `weight` of the shape of
      its `bias`, as equinox's normalisations have, and a `weight_g` beside `weight_v`.

    Of a name with dots or slashes, `layers.0.norm.weight`, the parts count.

    `print(sparsity_report(params))` shows what that comes to.

    Args:
        params: any pytree of arrays.

    Returns:
        The same tree with a bool at every leaf.

    Raises:
        ValueError: if a leaf is no array.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import kernels
        >>> kernels({"kernel": jnp.ones((3, 2)), "bias": jnp.ones((3, 2))})
        {'bias': False, 'kernel': True}
    """
    check_arrays(params)
    leaves, treedef = jax.tree.flatten(params)
    key_name = lambda key: jax.tree_util.keystr((key,), simple=True)
    paths = [
        tuple(re.split("[./]", "/".join(map(key_name, path)).lower()))
        for path in leaf_paths(params)
    ]
    paths = [path[:-1] if path[-1] in _PARTS and path[1:] else path for path in paths]
    shapes = dict(zip(paths, map(jnp.shape, leaves), strict=True))
    flags = [
        is_inexact(leaf) and _is_kernel(path, jnp.shape(leaf), shapes)
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, flags)


def _is_kernel(
    path: tuple[str, ...], shape: Any, shapes: dict[tuple[str, ...], Any]
) -> bool:
    """The rule of `kernels`; `shapes` holds those of all leaves, by their paths."""
    *parents, name = path
    words = _words(name)
    beside = lambda other: shapes.get((*parents, other))
    if words & _NEVER or (name[:1] == "b" and beside(f"w{name[1:]}") is not None):
        return False
    if words & _KERNELS:
        return len(shape) >= 2
    if any(word.endswith("norm") or word in _NORMS for p in path for word in _words(p)):
        return False
    if words & _WEIGHTS:
        # Of weight normalisation, in PyTorch: the lengths of the rows.
        is_length = name == "weight_g" and beside("weight_v") is not None
        return len(shape) >= 2 and shape != beside("bias") and not is_length
    return sum(size > 1 for size in shape) >= 2


def _words(name: str) -> set[str]:
    """The words of a name: `LayerNorm_0` has layernorm, `in_scales` in and scale."""
    words = re.findall("[a-z]+", name)
    return {*words, *(word.removesuffix("s") for word in words)}


def running_statistics(params: Any) -> Any:
    """Tree of bools, `True` at a vector `mean` beside a `var`: of normalisations."""
    leaves, treedef = jax.tree.flatten(params)
    names, pair = leaf_names(params), ("mean", "var")
    known = set(names)

    def is_one(name: str, leaf: Any) -> bool:
        own = re.split("[./]", name)[-1]
        beside = {name.removesuffix(own) + other for other in pair}
        is_vector = sum(size > 1 for size in jnp.shape(leaf)) <= 1
        return own in pair and is_vector and beside <= known

    return jax.tree.unflatten(treedef, map(is_one, names, leaves))


def prunable_tree(prunable: Prunable | None, params: Any) -> Any:
    """Resolve `prunable` to one bool per leaf of `params`; only inexact leaves count.

    Args:
        prunable: as users give it; `kernels` if None.
        params: pytree of arrays, which may hold None.

    Raises:
        ValueError: if the tree does not match `params` or holds something else than
            bools, or if a leaf of `params` is no array.
    """
    if not jax.tree.leaves(params):  # optax.tree.map_params passes a leafless tree
        return params
    if prunable is None:
        return kernels(params)
    check_arrays(params)
    # A callable pytree (an equinox module of bools) is a tree, as in optax.masked.
    treedef = jax.tree.structure(prunable)
    is_function = callable(prunable) and jax.tree_util.treedef_is_leaf(treedef)
    prefix = prunable(params) if is_function else prunable
    for path, value in jax.tree_util.tree_leaves_with_path(prefix):
        if not isinstance(value, bool | np.bool_):
            raise ValueError(
                f"prunable{jax.tree_util.keystr(path)}={value!r} must be True or False."
            )
    try:
        full = jax.tree.broadcast(prefix, params)
    except ValueError as error:
        # One of them may be in flax's boxes; nnx takes parameters out for an update.
        if leaf_names(prefix) != leaf_names(params):
            raise ValueError(
                f"prunable does not match the parameters: it must be a pytree prefix "
                f"of bools, or a callable returning one. {error}"
            ) from error
        full = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(prefix))
    return jax.tree.map(lambda flag, x: bool(flag) and is_inexact(x), full, params)


def check_any_prunable(flags: Any, params: Any) -> None:
    """Raise `ValueError` if `params` has leaves, but none of them is prunable.

    A tree without any leaf passes: `optax.tree.map_params` and `optax.masked` build
    such placeholders.
    """
    leaves = jax.tree.leaves(params)
    if leaves and not any(jax.tree.leaves(flags)):
        kinds = [
            f"{name}: {jnp.result_type(x)}{list(jnp.shape(x))}"
            for name, x in zip(leaf_names(params), leaves, strict=True)
        ]
        raise ValueError(
            f"no leaf is prunable among {listed(kinds)}. {RULE}; name others with "
            "prunable=."
        )


def warn_of_zeros(flags: Any, params: Any) -> None:
    """Warn of prunable leaves that are all zeros, as far as values are known.

    |θ·∇| is then zero whatever the gradient, so that no entry ever becomes active.
    """
    leaves = jax.tree.leaves(flags), leaf_names(params), jax.tree.leaves(params)
    dead = [
        name for flag, name, x in zip(*leaves, strict=True) if flag and _is_all_zeros(x)
    ]
    if dead:
        warnings.warn(
            f"prunable parameters are all zeros: {listed(dead)}. With |param * grad| "
            "as the importance no entry of them can ever become active, so they stay "
            "zero. Train them densely first; or leave them out with prunable=; or "
            "choose by another importance, such as gradient_importance.",
            stacklevel=2,
        )


def _is_all_zeros(x: Any) -> bool:
    if not isinstance(x, jax.Array | np.ndarray) or isinstance(x, Tracer):
        return False
    with jax.ensure_compile_time_eval():  # known, also where jit traces this
        return x.size > 0 and not bool(jnp.any(x != 0))


def prunable_zeros(flags: Any, params: Any, dtype: Any) -> Any:
    """Zeros like the prunable leaves, `optax.MaskedNode` in place of the others."""
    return jax.tree.map(
        lambda flag, x: jnp.zeros_like(x, dtype) if flag else optax.MaskedNode(),
        flags,
        params,
    )


def entries_of(flags: Any, params: Any) -> int:
    """N, the entries of the prunable leaves as they are given."""
    leaves = zip(jax.tree.leaves(flags), jax.tree.leaves(params), strict=True)
    return sum(int(np.size(x)) for flag, x in leaves if flag)


class ByUnits(NamedTuple):
    """Mark of a leaf that is chosen by whole units, and not entry by entry."""


def to_marks(flags: Any, params: Any, *, by_units: bool) -> Any:
    """Leaves and what is left out by their names, for a state: see `from_marks`.

    By name, because `optax.masked` may take out a branch as a whole, or hand on the
    parameters in other containers. The marks have no leaves: they are a part of the
    structure of the state, known under jit, and nothing to save.
    """
    if not jax.tree.leaves(params, is_leaf=is_masked):
        return jnp.zeros((), bool)  # a placeholder of optax.tree.map_params
    mark = ByUnits() if by_units else optax.EmptyState()
    marks = dict.fromkeys(leaf_names(filled(params)), optax.MaskedNode())
    return marks | dict.fromkeys(_flagged(flags, params), mark)


def _flagged(flags: Any, params: Any) -> set[str]:
    """Names of the prunable leaves."""
    return set(itertools.compress(leaf_names(params), jax.tree.leaves(flags)))


def _by_name(marks: Any) -> Mapping[str, Any]:
    """Marks by their names; none where `to_marks` saw a tree without leaves."""
    return marks if isinstance(marks, Mapping) else {}


def is_by_units(marks: Any) -> bool:
    """Whether the choice was by whole units."""
    return any(isinstance(mark, ByUnits) for mark in _by_name(marks).values())


def entry_marks(marks: Any) -> Any:
    """Marks, as they are; `ValueError` if the choice was by whole units."""
    if is_by_units(marks):
        raise ValueError(
            "this state is of an optimizer that chose whole units: prune by them too, "
            "with units= in place of opt_state=."
        )
    return marks


def from_marks(marks: Any, params: Any) -> Any:
    """Flags like `params` from what `to_marks` returned for the same names.

    Raises:
        ValueError: if a prunable leaf is not there, or a leaf was not there.
    """
    names, marks, chosen = leaf_names(params), _by_name(marks), _chosen(marks)
    if missing := sorted(chosen - set(names)):
        raise ValueError(
            f"the optimizer chooses among {listed(missing)}, which is not among these "
            f"parameters: {listed(names)}. Give those that it trains."
        )
    if others := [name for name in names if not _is_in(name, marks)]:
        raise ValueError(
            f"{listed(others)} is not among the parameters that the optimizer trains, "
            f"{listed(marks)}: give those."
        )
    flags = [name in chosen for name in names]
    return jax.tree.unflatten(jax.tree.structure(params), flags)


def _chosen(marks: Any) -> set[str]:
    """Names of the leaves that were prunable."""
    return {name for name, mark in _by_name(marks).items() if not is_masked(mark)}


def _is_in(name: str, marks: Mapping[str, Any]) -> bool:
    """Whether there is a mark of this leaf, or of a branch that it is in."""
    above = itertools.accumulate(name.split("/"), "{}/{}".format)
    return name in marks or any(branch in marks for branch in above)


def check_marks(marks: Any, flags: Any, params: Any, *, by_units: bool) -> None:
    """Raise `ValueError` if the prunable leaves are others than at `init`.

    The rule of `kernels` goes by shape too, and inside `shard_map` a device may hold
    one row of a leaf.
    """
    before, here = _chosen(marks), _flagged(flags, params)
    if before and is_by_units(marks) != by_units:
        one, other = ("entries", "whole units")[:: 1 if by_units else -1]
        raise ValueError(
            f"this state is of an optimizer that chose {one}, and this one chooses "
            f"{other}. Begin with a new state, tx.init(params), or keep the settings."
        )
    if before != here:
        now, then = (listed(sorted(x)) if x else "none" for x in (here, before))
        raise ValueError(
            f"the prunable leaves are now {now}, and were {then} at init: the "
            "parameters have other shapes or names here. "
            + (
                "Begin with a new state, tx.init(params)."
                if by_units
                else "(Inside shard_map a device may hold one row.) Name them: "
                "prunable= a tree of bools."
            )
        )
