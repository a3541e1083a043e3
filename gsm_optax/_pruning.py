"""After training: exact global magnitude pruning, and keeping the zeros."""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding

from gsm_optax._checks import (
    check_floors,
    check_kept,
    check_ratio,
    check_reserved,
)
from gsm_optax._entries import Entries
from gsm_optax._importance import magnitude_importance
from gsm_optax._masking import find_state
from gsm_optax._paths import is_hole
from gsm_optax._placement import check_whole, placed_as
from gsm_optax._prunable import (
    Prunable,
    check_any_prunable,
    entry_marks,
    from_marks,
    prunable_tree,
    running_statistics,
)
from gsm_optax._words import Words, num_kept

if TYPE_CHECKING:
    from gsm_optax.units import Units


def magnitude_mask(
    params: Any,
    ratio: Any,
    *,
    prunable: Prunable | None = None,
    opt_state: Any = None,
    units: "Units | None" = None,
    min_units: int | None = None,
    min_kept: int | None = None,
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
        units: of `gsm_optax.units.find_units`, in the place of both: whole units are
            kept or pruned, by their mean magnitude as a multiple of that of their
            family, biases and scales included, running statistics (a `mean` beside a
            `var`) not; N and Q count the entries that are in units.
        min_units: with `units`: how many of every family are kept first; by default 1.
        min_kept: without `units`: how many entries of every prunable leaf; by default
            0.

    Returns:
        A pytree like `params` with a bool array of the same shape at every leaf,
        `True` where the entry is kept. Leaves that are not prunable are all `True`.

    Raises:
        ValueError: for a ratio outside [0, 1) or one that keeps nothing, or less than
            the floors do (a traced one cannot be checked), if `params` has no leaf or
            none that is prunable, or if `prunable` or `units` does not match it; and
            inside `shard_map` or `pmap`, unless all devices are known to hold copies.

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
    min_kept, min_units = check_floors(min_kept, min_units, units)
    flags = _flags(params, prunable, opt_state, units)
    leaves, flags = list(map(jnp.asarray, leaves)), treedef.flatten_up_to(flags)
    params = jax.tree.unflatten(treedef, leaves)
    check_whole([(x,) for x in leaves], in_doubt=False)
    places = tuple(i for i, flag in enumerate(flags) if flag)
    choice = {
        "places": places,
        # Not to be kept alive, with their inputs, by what was compiled for them.
        "units": units and weakref.ref(units),
        "at_least": min_kept if units is None else min_units,
    }
    pool = _pool(params, **choice)
    check_kept(ratio, pool.most)
    check_reserved(ratio, pool.reserved, pool.most, pool.floor)
    mask = [jnp.ones_like(x, bool) for x in leaves]
    on = [_sharding(leaves[i]) for i in places]
    search = jax.jit(_greatest, static_argnames=tuple(choice), out_shardings=on)
    kept = search(params, num_kept(ratio, pool.total), **choice)
    for i, own in zip(places, kept, strict=True):
        mask[i] = own
    return jax.tree.unflatten(treedef, mask)


def _pool(params: Any, places: Sequence[int], units: Any, at_least: int) -> Any:
    """What is chosen among: entries or units of these leaves of the parameters."""
    leaves = jax.tree.leaves(params)
    pairs = [(leaves[i], leaves[i]) for i in places]
    if units is None:
        return Entries(pairs, min_kept=at_least)
    return units().among(params, places, pairs, None, at_least)


def _greatest(params: Any, kept: Words, **choice: Any) -> list[jax.Array]:
    return greatest(_pool(params, **choice), kept)


def _sharding(x: Any) -> Any:
    """How the mask of a leaf is to be laid out over devices; None for any way."""
    if isinstance(x, Tracer) or not isinstance(x.sharding, NamedSharding):
        return None
    return x.sharding.with_memory_kind("device")  # the parameters may be on the host


def _flags(
    params: Any, prunable: Prunable | None, opt_state: Any, units: "Units | None"
) -> Any:
    """Which leaves are prunable: as told, or as the optimizer was."""
    if sum(x is not None for x in (prunable, opt_state, units)) > 1:
        raise ValueError(
            "give prunable= or opt_state= or units=, not two of them: a state knows "
            "which leaves are prunable, and units are in the leaves that hold them."
        )
    if units is not None:
        # Statistics are no magnitude, nor are they among what an optimizer trains.
        flags = jax.tree.map(
            lambda flag, is_running: flag and not is_running,
            units.flags(params),
            running_statistics(params),
        )
    elif opt_state is None:
        flags = prunable_tree(prunable, params)
    else:
        flags = from_marks(entry_marks(find_state(opt_state).prunable), params)
    check_any_prunable(flags, params)
    return flags


def greatest(pool: Any, kept: Words) -> list[jax.Array]:
    """Masks of what has the greatest magnitude and holds Q entries, Q in words."""
    scores = pool.scores(magnitude_importance)
    return pool.choose(scores, kept, jnp.float32(0))[1]


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
    units: "Units | None" = None,
    min_units: int | None = None,
    min_kept: int | None = None,
) -> Any:
    r"""Keep the entries of greatest magnitude over the whole model, zero the rest.

    `apply_mask(params, magnitude_mask(params, ratio))`. After training with `gsm` at
    the same ratio, and with a sufficient `decay_budget`, this costs no accuracy: what
    is removed is already almost zero.

    To train on after it, begin with a fresh state, `opt_state = tx.init(params)`: the
    old one has momentum for the pruned entries, which moves them all at the next step.
    From a fresh one `gsm` leaves them at zero, under importances that are zero where
    the weight is, as the default, and a ratio above zero. A fresh state begins its
    schedules anew: with a `ratio_ramp` everything is active at first, and zeros grow
    back. `freeze_pruned`, last in the chain of any optimizer, holds them in any case.
    To go on with the schedules, and the momentum of the rest, clear that of the pruned
    entries with their `magnitude_mask`::

        is_hole = lambda x: isinstance(x, optax.MaskedNode)
        zeroed = lambda m, kept: jnp.where(kept, m, jnp.zeros_like(m))
        clear = lambda m, kept: m if is_hole(m) else zeroed(m, kept)
        opt_state = optax.tree.map_params(tx, clear, opt_state, mask, is_leaf=is_hole)

    Args:
        params: pytree of arrays, any shapes and dtypes.
        ratio: fraction of the prunable entries to prune, in [0, 1).
        prunable: pytree prefix of bools, or a callable `params -> such a prefix`. By
            default `kernels`, told by name and shape.
        opt_state: instead of `prunable`, the state of the optimizer that trained them:
            the prunable leaves are then those that it chose among.
        units: of `gsm_optax.units.find_units`, in the place of both: whole units are
            kept or pruned, by their mean magnitude as a multiple of that of their
            family, biases and scales included, running statistics (a `mean` beside a
            `var`) not; N and Q count the entries that are in units.
        min_units: with `units`: how many of every family are kept first; by default 1.
        min_kept: without `units`: how many entries of every prunable leaf; by default
            0.

    Returns:
        A pytree like `params`, pruned entries exactly zero, everything else untouched.

    Raises:
        ValueError: for a ratio outside [0, 1) or one that keeps nothing, or less than
            the floors do (a traced one cannot be checked), if `params` has no leaf or
            none that is prunable, or if `prunable` or `units` does not match it; and
            inside `shard_map` or `pmap`, unless all devices are known to hold copies.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import prune
        >>> prune({"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}, ratio=0.75)
        {'kernel': Array([[0., 0.],
               [3., 0.]], dtype=float32)}
    """
    mask = magnitude_mask(
        params,
        ratio,
        prunable=prunable,
        opt_state=opt_state,
        units=units,
        min_units=min_units,
        min_kept=min_kept,
    )
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
        if is_hole(x) or jnp.result_type(x) == jax.dtypes.float0:
            return x
        # Not a product: an infinite or NaN entry that is pruned becomes zero too.
        return jnp.where(placed_as(kept, x), x, jnp.zeros_like(x))

    return jax.tree.map(or_zero, tree, mask, is_leaf=is_hole)


def _fitted(mask: Any, params: Any) -> Any:
    """The mask, with holes where `params` has them; `ValueError` if it does not fit."""
    try:
        fitted = jax.tree.map(
            lambda x, m: x if is_hole(x) else m, params, mask, is_leaf=is_hole
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
