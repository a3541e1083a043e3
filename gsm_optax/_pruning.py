"""After training: exact global magnitude pruning, and keeping the zeros."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsm_optax._checks import check_kept, check_ratio, concrete
from gsm_optax._importance import magnitude
from gsm_optax._masking import find_state
from gsm_optax._prunable import (
    Prunable,
    check_any_prunable,
    from_marks,
    prunable_tree,
)
from gsm_optax._reductions import order_key
from gsm_optax._selection import select
from gsm_optax._words import Words, num_kept, to_words


def magnitude_mask(
    params: Any,
    ratio: Any,
    *,
    prunable: Prunable | None = None,
    opt_state: Any = None,
) -> Any:
    r"""Mask of the :math:`Q` entries of greatest magnitude over the whole model.

    :math:`Q = N - \mathrm{round}(ratio \cdot N)` of the :math:`N` prunable entries.
    Entries that tie with the Q-th are all kept; entries of exactly zero are not kept
    (unless :math:`Q = N`); NaN counts as greatest, so that it is never hidden. Compared
    are float32: a float64 entry below 1e-38 counts as zero.

    Args:
        params: pytree of arrays, any shapes and dtypes.
        ratio: fraction of the prunable entries to prune, in [0, 1): a float or a scalar
            array.
        prunable: pytree prefix of bools, or a callable `params -> such a prefix`. By
            default `kernels`, told by name and shape.
        opt_state: instead of `prunable`, the state of the optimizer that trained them:
            the prunable leaves are then those that it chose among.

    Returns:
        A pytree like `params` with a bool array of the same shape at every leaf,
        `True` where the entry is kept. Leaves that are not prunable are all `True`.

    Raises:
        ValueError: for a ratio outside [0, 1) or one that keeps nothing (a traced one
            cannot be checked), if `params` has no leaf or none that is prunable, or if
            `prunable` does not match it.

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
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:
        raise ValueError(
            f"params={params!r} has no leaves, so there is nothing to prune: was it "
            "filtered by a name or a type that nothing has?"
        )
    flags = _flags(params, prunable, opt_state)
    leaves = list(map(jnp.asarray, leaves))
    flags = treedef.flatten_up_to(flags)
    chosen = [x for x, flag in zip(leaves, flags, strict=True) if flag]
    total = sum(x.size for x in chosen)
    check_kept(concrete(ratio), total)
    kept = iter(greatest(chosen, num_kept(ratio, to_words(total))))
    mask = [
        next(kept) if flag else jnp.ones_like(x, bool)
        for x, flag in zip(leaves, flags, strict=True)
    ]
    return jax.tree.unflatten(treedef, mask)


def _flags(params: Any, prunable: Prunable | None, opt_state: Any) -> Any:
    """Which leaves are prunable: as told, or as the optimizer was."""
    if opt_state is None:
        flags = prunable_tree(prunable, params)
    elif prunable is None:
        flags = from_marks(find_state(opt_state).prunable, params)
    else:
        raise ValueError("give prunable= or opt_state=, not both: the state knows it.")
    check_any_prunable(flags, params)
    return flags


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
        params: pytree of arrays. Where it has a hole, None or `optax.MaskedNode`, for a
            leaf or a whole branch, the hole stays.
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
    return _apply(_fitted(mask, params), params)


def prune(
    params: Any,
    ratio: Any,
    *,
    prunable: Prunable | None = None,
    opt_state: Any = None,
) -> Any:
    r"""Keep the entries of greatest magnitude over the whole model, zero the rest.

    `apply_mask(params, magnitude_mask(params, ratio))`. After training with `gsm` at
    the same ratio, and with a sufficient `decay_budget`, this costs no accuracy: what
    is removed is already almost zero.

    To train on after it, begin with a fresh state, `opt_state = tx.init(params)`: the
    old one has momentum for the pruned entries, which moves them all at the next step.
    From a fresh one `gsm` leaves them at zero (under importances that are zero where
    the weight is, as the default), and so does any optimizer with `freeze_pruned` last
    in its chain. A fresh state begins its schedules anew. To keep them, and the
    momentum of the rest, clear that of the pruned entries with their `magnitude_mask`::

        clear = lambda m, kept: jnp.where(kept, m, jnp.zeros_like(m))
        opt_state = optax.tree.map_params(tx, clear, opt_state, mask)

    Args:
        params: pytree of arrays, any shapes and dtypes.
        ratio: fraction of the prunable entries to prune, in [0, 1).
        prunable: pytree prefix of bools, or a callable `params -> such a prefix`. By
            default `kernels`, told by name and shape.
        opt_state: instead of `prunable`, the state of the optimizer that trained them:
            the prunable leaves are then those that it chose among.

    Returns:
        A pytree like `params`, pruned entries exactly zero, everything else untouched.

    Raises:
        ValueError: for a ratio outside [0, 1) or one that keeps nothing (a traced one
            cannot be checked), if `params` has no leaf or none that is prunable, or if
            `prunable` does not match it.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import prune
        >>> prune({"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}, ratio=0.75)
        {'kernel': Array([[0., 0.],
               [3., 0.]], dtype=float32)}
    """
    mask = magnitude_mask(params, ratio, prunable=prunable, opt_state=opt_state)
    return _apply(mask, params)


class FreezePrunedState(NamedTuple):
    """State of `freeze_pruned`."""

    mask: Any  # bool arrays, like the parameters


def freeze_pruned(mask: Any) -> optax.GradientTransformationExtraArgs:
    """Hold pruned entries where they are: no update where `mask` is `False`.

    Last in a chain, after momentum and decay: `optax.chain(optax.adam(1e-3),
    freeze_pruned(mask))` fine-tunes a pruned network or trains a winning ticket with
    its zeros staying exactly zero.

    Entries that are not zero at the start stay at what they are: `prune` first. What
    the optimizer in front holds for pruned entries, such as an old momentum, does not
    reach them.

    The mask travels in the state, so that it is sharded, saved and restored with it.
    Inside `optax.partition` or `optax.masked` the part of the whole model's mask that
    belongs to these parameters is taken.

    Args:
        mask: pytree like the parameters with a bool array of the same shape at every
            leaf, as `magnitude_mask` gives it. Where parameters or gradients have a
            hole (None, `optax.MaskedNode`), it may have leaves.

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
        # A copy, so that donating the state does not delete the caller's mask.
        return FreezePrunedState(jax.tree.map(jnp.copy, _fitted(mask, params)))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return _apply(state.mask, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _apply(mask: Any, tree: Any) -> Any:
    def or_zero(x, kept):
        if _is_hole(x) or jnp.result_type(x) == jax.dtypes.float0:
            return x
        # Not a product: an infinite or NaN entry that is pruned becomes zero too.
        return jnp.where(kept, x, jnp.zeros_like(x))

    return jax.tree.map(or_zero, tree, mask, is_leaf=_is_hole)


def _is_hole(value: Any) -> bool:
    return value is None or isinstance(value, optax.MaskedNode)


def _fitted(mask: Any, params: Any) -> Any:
    """The mask, with holes where `params` has them; `ValueError` if it does not fit."""
    try:
        fitted = jax.tree.map(
            lambda x, m: x if _is_hole(x) else m, params, mask, is_leaf=_is_hole
        )
        same = jax.tree.structure(fitted) == jax.tree.structure(params)
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            "mask has another tree structure than the parameters:\n"
            f"  mask       {jax.tree.structure(mask)}\n"
            f"  parameters {jax.tree.structure(params)}\n"
            "Make it with magnitude_mask(params, ratio), of the same tree."
        )
    for (path, m), x in zip(
        jax.tree_util.tree_leaves_with_path(fitted),
        jax.tree.leaves(params),
        strict=True,
    ):
        if jnp.result_type(m) != jnp.bool_ or jnp.shape(m) != jnp.shape(x):
            raise ValueError(
                f"mask{jax.tree_util.keystr(path)} is {jnp.result_type(m)}"
                f"{list(jnp.shape(m))}, but must be bool{list(jnp.shape(x))}, "
                "the shape of the parameter."
            )
    return fitted
