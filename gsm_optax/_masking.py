"""The gradient of the most important entries only."""

from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsm_optax._checks import check_ratio
from gsm_optax._counting import carry, num_entries, order_key, to_words
from gsm_optax._importance import (
    Importance,
    Prunable,
    Score,
    ScoreOfPart,
    check_any_prunable,
    is_inexact,
    kernels,
    prunable_tree,
    taylor_importance,
)
from gsm_optax._selection import (
    Selection,
    count_dtype,
    num_kept,
    num_kept_of_part,
    select,
    to_count,
)


class MaskByImportanceState(NamedTuple):
    """State of `mask_by_importance`: what the last choice came to."""

    threshold: jax.Array  # float32, shape (): least score that was active
    num_active: jax.Array  # shape (): entries that got their gradient; int32, or
    # float32 in a tree of 2³¹ prunable entries or more (the choice itself is exact)
    step: jax.Array | None  # int32, shape (): only where ratio is a schedule


def mask_by_importance(
    ratio: Any,
    *,
    importance: Importance | None = None,
    prunable: Prunable | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keep the gradient of the most important entries of the whole model.

    With :math:`N` prunable entries and :math:`Q = N - \mathrm{round}(ratio \cdot N)`,

    .. math::
        T = |\theta \cdot g|, \qquad
        B = [\,T \ge \text{the } Q\text{-th greatest } T\,], \qquad
        g \leftarrow B \circ g

    chosen anew at every step, exactly, over all prunable leaves together (equations 4
    to 7 of Ding et al., 2019). Entries that tie with the threshold are all active; a
    score of zero is active only if :math:`Q = N`, so a pruned weight stays pruned; a
    NaN score is always active, so that it shows. Leaves that are not prunable keep
    their whole gradient. Updates keep their dtype; scores are float32.

    This is the selection alone. Decay and momentum make it prune: see `gsm`. It goes
    before any optimizer: `optax.chain(mask_by_importance(0.9), optax.adamw(1e-3))`.

    Gradients must be averaged over data-parallel devices before they come here, as
    under any jit with sharded batches they are.

    Parts of the model may sit a step out: with the extra argument `trainable`, a tree
    like the gradients with a bool, or a traced bool scalar, at every leaf, :math:`N`
    counts only the entries of the leaves where it is true, the choice is among them,
    and the other prunable leaves are passive as a whole: their updates are zero, NaN
    included. `optax.chain` passes it on: `tx.update(grads, state, params,
    trainable=tree)`.

    Args:
        ratio: fraction of the prunable entries that is passive, in [0, 1): a float, an
            optax schedule of the step, or a scalar array (`optax.inject_hyperparams`).
            Arrays and schedules are float32 and clipped to what is possible. With
            parameters in half precision `inject_hyperparams` needs
            `hyperparam_dtype=jnp.float32`.
        importance: `(param, grad) -> score`, elementwise, float32 in and out; by
            default `taylor_importance`.
        prunable: pytree prefix of bools, or a callable `params -> such a prefix`. By
            default `kernels`: the inexact leaves of rank 2 or more.
        axis_name: inside `jax.shard_map` or `jax.pmap`, the name or names of the mesh
            axes that the parameters are split over. Elsewhere shardings are seen to
            by themselves. With `check_vma=False` every prunable leaf must be split over
            all of these axes, because copies cannot be told from parts.

    Returns:
        An `optax.GradientTransformationExtraArgs`, whose `update` needs `params`. Its
        state holds two scalars, `threshold` and `num_active` (and the step, if `ratio`
        is a schedule); read them with `optax.tree.get(state, "num_active")`.

    Raises:
        ValueError: for a ratio outside [0, 1) or in half precision; from `init` if no
            leaf is prunable or `prunable` does not match; from `update` without
            `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import mask_by_importance
        >>> tx = mask_by_importance(ratio=0.75)
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
        >>> grads = {"kernel": jnp.array([[0.1, 0.4], [-0.2, 0.6]])}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> updates["kernel"].tolist()  # 0.8 is the greatest of |param * grad|
        [[0.0, 0.4...], [0.0, 0.0]]

    References:
        Ding et al., *Global Sparse Momentum SGD for Pruning Very Deep Neural Networks*,
        NeurIPS 2019, https://arxiv.org/abs/1909.12778
    """
    check_ratio(ratio)
    # The defaults are None, since inject_hyperparams takes callables for schedules.
    score = Score(taylor_importance if importance is None else importance)
    prunable = kernels if prunable is None else prunable

    def init_fn(params: Any) -> Any:
        flags = prunable_tree(prunable, params)
        check_any_prunable(flags, params)
        chosen = compress(jax.tree.leaves(params), jax.tree.leaves(flags))
        total = num_entries([(leaf,) for leaf in chosen])
        return MaskByImportanceState(
            threshold=jnp.zeros((), jnp.float32),
            num_active=jnp.zeros((), count_dtype(total)),
            step=jnp.zeros((), jnp.int32) if callable(ratio) else None,
        )

    def update_fn(updates, state, params=None, *, trainable=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "mask_by_importance compares |param * grad| and needs the parameters: "
                "call tx.update(grads, state, params)."
            )
        grads, flags, pairs, treedef = _split(updates, params, prunable)
        ratio_now = jnp.asarray(ratio(state.step)) if callable(ratio) else ratio
        parts = (
            None if trainable is None else compress(_align(trainable, updates), flags)
        )
        selection, active = _choose(
            score, pairs, parts, ratio_now, state.threshold, axis_name
        )
        masked = iter(
            jnp.where(mask, grad, 0)
            for mask, (_, grad) in zip(active, pairs, strict=True)
        )
        updates = [
            next(masked) if flag else grad
            for flag, grad in zip(flags, grads, strict=True)
        ]
        step: Any = optax.safe_increment(state.step) if callable(ratio) else None
        new_state = MaskByImportanceState(
            selection.threshold, selection.num_active, step
        )
        return jax.tree.unflatten(treedef, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _split(updates: Any, params: Any, prunable: Prunable) -> tuple[Any, ...]:
    """Gradient leaves (None too), which take part, their (param, grad), the treedef."""
    grads, treedef = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    flags = treedef.flatten_up_to(prunable_tree(prunable, params))
    flags = [
        flag is True and grad is not None and is_inexact(grad)
        for flag, grad in zip(flags, grads, strict=True)
    ]
    pairs = zip(treedef.flatten_up_to(params), grads, strict=True)
    # A gradient that is still a fused expression could be rounded differently in the
    # search and in the mask; behind the barrier both read the same bits.
    pairs = [jax.lax.optimization_barrier(pair) for pair in compress(pairs, flags)]
    return grads, flags, pairs, treedef


def _choose(score, pairs, parts, ratio, start, axis_name) -> tuple[Selection, Any]:
    """The threshold and, one by one, the masks of active entries."""
    data = jax.lax.stop_gradient(pairs)
    if parts is not None:
        return _choose_among(score, data, list(parts), ratio, start, axis_name)
    kept = num_kept(ratio, num_entries(data, axis_name))
    selection = select(score, data, kept, start, axis_name)
    return selection, (order_key(score(*pair)) >= selection.key for pair in pairs)


def _choose_among(score, data, parts, ratio, start, axis_name):
    """The same among the leaves whose flag in `parts` is true, traced or not.

    The scores of the others are zero, so that they are never the Q-th greatest. How
    many entries take part is known at run time only, and summed in words.
    """
    sizes = [num_entries([args], axis_name) for args in data]
    words = [
        [jnp.where(part, np.int32(word), 0) for word in to_words(size)]
        for part, size in zip(parts, sizes, strict=True)
    ]
    total = carry(*(sum(column) for column in zip((0, 0), *words, strict=True)))
    kept = num_kept_of_part(ratio, total)
    # One bool per entry, because the leaves of a search are of equal shapes.
    triples = [
        (*args, jnp.full_like(args[0], part, bool))
        for args, part in zip(data, parts, strict=True)
    ]
    key, num_active = select(ScoreOfPart(score), triples, kept, start, axis_name)
    # The search sees the zeros of the others, so it cannot know that Q is all there is.
    everything = (kept[0] == total[0]) & (kept[1] == total[1])
    key = jnp.where(everything, 0, key)
    num_active = jnp.where(everything, to_count(total, sum(sizes)), num_active)
    active = (
        part & (order_key(score(*args)) >= key)
        for args, part in zip(data, parts, strict=True)
    )
    return Selection(key, num_active), active


def _align(trainable: Any, updates: Any) -> list[Any]:
    """One flag for every leaf of the updates, None and `optax.MaskedNode` included."""
    is_hole = lambda x: x is None or isinstance(x, optax.MaskedNode)
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_hole)
    try:
        flags = treedef.flatten_up_to(trainable)
    except ValueError as error:
        raise ValueError(
            f"trainable must be a tree like the gradients, with a bool a leaf. {error}"
        ) from error
    # Whole parts that optax.masked has taken out are no leaves to the selection.
    return [
        flag
        for leaf, flag in zip(leaves, flags, strict=True)
        if not isinstance(leaf, optax.MaskedNode)
    ]
