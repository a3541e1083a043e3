"""After training: exact global magnitude pruning, and keeping the zeros."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsm_optax._checks import check_ratio
from gsm_optax._importance import magnitude
from gsm_optax._prunable import (
    Prunable,
    check_any_prunable,
    kernels,
    prunable_tree,
)
from gsm_optax._reductions import order_key
from gsm_optax._selection import select
from gsm_optax._words import Words, num_kept, to_words


def magnitude_mask(params: Any, ratio: Any, *, prunable: Prunable = kernels) -> Any:
    r"""Mask of the :math:`Q` entries of greatest magnitude over the whole model.

    :math:`Q = N - \mathrm{round}(ratio \cdot N)` of the :math:`N` prunable entries.
    Entries that tie with the Q-th are all kept; entries of exactly zero are not kept
    (unless :math:`Q = N`); NaN counts as greatest, so that it is never hidden.

    Args:
        params: pytree of arrays, any shapes and dtypes.
        ratio: fraction of the prunable entries to prune, in [0, 1): a float or a scalar
            array.
        prunable: pytree prefix of bools, or a callable `params -> such a prefix`. By
            default the inexact leaves of rank 2 or more.

    Returns:
        A pytree like `params` with a bool array of the same shape at every leaf,
        `True` where the entry is kept. Leaves that are not prunable are all `True`.

    Raises:
        ValueError: for a ratio outside [0, 1), if no leaf is prunable, or if `prunable`
            does not match `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import magnitude_mask
        >>> kernel = jnp.array([[1.0, -2.0], [3.0, 0.5]])
        >>> params = {"bias": jnp.ones(2), "kernel": kernel}
        >>> mask = magnitude_mask(params, ratio=0.5)
        >>> print(mask["bias"], mask["kernel"])
        [ True  True] [[False  True]
                       [ True False]]
    """
    check_ratio(ratio)
    if callable(ratio):
        raise ValueError("ratio must be a number here, not a schedule.")
    flags = prunable_tree(prunable, params)
    check_any_prunable(flags, params)
    leaves, treedef = jax.tree.flatten(params)
    leaves = list(map(jnp.asarray, leaves))
    flags = treedef.flatten_up_to(flags)
    chosen = [x for x, flag in zip(leaves, flags, strict=True) if flag]
    total = sum(x.size for x in chosen)
    kept = iter(greatest(chosen, num_kept(ratio, to_words(total))))
    mask = [
        next(kept) if flag else jnp.ones_like(x, bool)
        for x, flag in zip(leaves, flags, strict=True)
    ]
    return jax.tree.unflatten(treedef, mask)


def greatest(leaves: Sequence[jax.Array], kept: Words) -> list[jax.Array]:
    """Masks of the Q entries of greatest magnitude, Q in words."""
    total = sum(x.size for x in leaves)
    found = select(
        magnitude,
        [(x,) for x in leaves],
        kept,
        to_words(total),
        jnp.float32(0),
        most=total,
    )
    return [order_key(magnitude(x)) >= found.key for x in leaves]


def apply_mask(params: Any, mask: Any) -> Any:
    """Set the entries where `mask` is `False` to exactly zero.

    A winning ticket is `apply_mask(initial_params, mask)`.

    Args:
        params: pytree of arrays.
        mask: the same tree with a bool array of the same shape at every leaf.

    Returns:
        A pytree like `params`, same shapes and dtypes.

    Raises:
        ValueError: if `mask` has another structure, shape or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import apply_mask
        >>> apply_mask([jnp.array([1.0, 2.0])], [jnp.array([True, False])])[0].tolist()
        [1.0, 0.0]
    """
    _check_mask(mask, params)
    return _apply(mask, params)


def prune(params: Any, ratio: Any, *, prunable: Prunable = kernels) -> Any:
    r"""Keep the entries of greatest magnitude over the whole model, zero the rest.

    `apply_mask(params, magnitude_mask(params, ratio))`. After training with `gsm` at
    the same ratio, and with a sufficient `decay_budget`, this costs no accuracy: what
    is removed is already almost zero.

    Args:
        params: pytree of arrays, any shapes and dtypes.
        ratio: fraction of the prunable entries to prune, in [0, 1).
        prunable: pytree prefix of bools, or a callable `params -> such a prefix`. By
            default the inexact leaves of rank 2 or more.

    Returns:
        A pytree like `params`, pruned entries exactly zero, everything else untouched.

    Raises:
        ValueError: for a ratio outside [0, 1), if no leaf is prunable, or if `prunable`
            does not match `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import prune
        >>> prune({"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}, ratio=0.75)
        {'kernel': Array([[0., 0.],
               [3., 0.]], dtype=float32)}
    """
    return _apply(magnitude_mask(params, ratio, prunable=prunable), params)


class FreezePrunedState(NamedTuple):
    """State of `freeze_pruned`."""

    mask: Any  # bool arrays, like the parameters


def freeze_pruned(mask: Any) -> optax.GradientTransformationExtraArgs:
    """Hold pruned entries where they are: no update where `mask` is `False`.

    Last in a chain, after momentum and decay: `optax.chain(optax.adam(1e-3),
    freeze_pruned(mask))` fine-tunes a pruned network or trains a winning ticket with
    its zeros staying exactly zero.

    The mask travels in the state, so that it is sharded, saved and restored with it.

    Args:
        mask: pytree like the parameters with a bool array of the same shape at every
            leaf, as `magnitude_mask` gives it.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: from `init`, if `mask` does not have the structure and shapes of the
            parameters.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from gsm_optax import freeze_pruned
        >>> params, grads = jnp.array([0.0, 2.0]), jnp.array([5.0, 5.0])
        >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), freeze_pruned(params != 0))
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> updates.tolist()
        [0.0, -0.5]
    """

    def init_fn(params: Any) -> optax.OptState:
        if not jax.tree.leaves(params):  # a placeholder of optax.tree.map_params,
            return FreezePrunedState(params)  # which tells it where the mask is
        _check_mask(mask, params)
        # A copy, so that donating the state does not delete the caller's mask.
        return FreezePrunedState(jax.tree.map(jnp.copy, mask))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return _apply(state.mask, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _apply(mask: Any, tree: Any) -> Any:
    # where, not a product: an infinite or NaN entry that is pruned becomes zero too.
    return jax.tree.map(lambda m, x: jnp.where(m, x, jnp.zeros_like(x)), mask, tree)


def _check_mask(mask: Any, params: Any) -> None:
    if jax.tree.structure(mask) != jax.tree.structure(params):
        raise ValueError(
            "mask has another tree structure than the parameters:\n"
            f"  mask       {jax.tree.structure(mask)}\n"
            f"  parameters {jax.tree.structure(params)}\n"
            "Make it with magnitude_mask(params, ratio)."
        )
    for (path, m), x in zip(
        jax.tree_util.tree_leaves_with_path(mask), jax.tree.leaves(params), strict=True
    ):
        if jnp.result_type(m) != jnp.bool_ or jnp.shape(m) != jnp.shape(x):
            raise ValueError(
                f"mask{jax.tree_util.keystr(path)} is {jnp.result_type(m)}"
                f"{list(jnp.shape(m))}, but must be bool{list(jnp.shape(x))}, "
                "the shape of the parameter."
            )
