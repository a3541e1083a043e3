"""How many entries change between active and passive from one step to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gsm_optax._counting import NAN_KEY, count, num_entries, order_key
from gsm_optax._importance import (
    Importance,
    Prunable,
    Score,
    is_inexact,
    kernels,
    prunable_tree,
    taylor_importance,
)
from gsm_optax._masking import MaskByImportanceState
from gsm_optax._selection import count_dtype, to_count


class TrackChurnState(NamedTuple):
    """State of `track_churn`."""

    inner_state: Any  # of the transformation that is watched
    active: Any  # bool arrays, like the prunable parameters: B at the last step
    churn: jax.Array  # shape (), entries that changed side; dtype of num_active


def track_churn(
    inner: optax.GradientTransformation,
    *,
    importance: Importance = taylor_importance,
    prunable: Prunable = kernels,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Count the entries that change side, active or passive, at every step.

    Wraps `gsm`, `gsm_sgd`, or any transformation with one `mask_by_importance` in it,
    and changes nothing about what it does. The churn of a step,

    .. math::
        \sum |B_k - B_{k-1}|,

    is high while the choice is still open and falls as it settles. It is exact, and
    under shardings only scalars cross devices. The price is one bool per prunable entry
    in the state and one more pass over parameters and gradients: leave it away, and
    nothing is paid.

    It has to be given the very gradients that `mask_by_importance` compares, so what
    changes them goes before it: `optax.chain(optax.clip_by_global_norm(1.0),
    track_churn(gsm_sgd(1e-2, 0.95)))`. For the same reason `optax.apply_if_finite` and
    `optax.MultiSteps` go around it, not inside.

    Args:
        inner: the transformation to watch.
        importance: the importance function that `inner` was given.
        prunable: the prunable leaves that `inner` was given.
        axis_name: the axis name that `inner` was given.

    Returns:
        An `optax.GradientTransformationExtraArgs`. `optax.tree.get(state, "churn")` is
        the number of entries that changed side at the last step. Before the first step
        no entry is active, so its churn is the number of active entries.

    Raises:
        ValueError: from `init`, if `inner` has no `mask_by_importance`, or several.

    Example:
        The most important entry is now one, now the other:

        >>> import jax.numpy as jnp, optax
        >>> from gsm_optax import gsm_sgd, track_churn
        >>> tx = track_churn(gsm_sgd(0.1, ratio=0.5))
        >>> params = jnp.array([[1.0, 1.0]])
        >>> state = tx.init(params)
        >>> for grads in ([[3.0, 2.0]], [[4.0, 1.0]], [[0.0, 1.0]]):
        ...     _, state = tx.update(jnp.array(grads), state, params)
        ...     print(optax.tree.get(state, "churn"))
        1
        0
        2
    """
    inner = optax.with_extra_args_support(inner)
    score = Score(importance)

    def init_fn(params: Any) -> Any:
        inner_state = inner.init(params)
        find_state(inner_state)
        active = jax.tree.map(
            lambda flag, x: jnp.zeros_like(x, bool) if flag else optax.MaskedNode(),
            prunable_tree(prunable, params),
            params,
        )
        total = num_entries([(leaf,) for leaf in jax.tree.leaves(active)])
        churn = jnp.zeros((), count_dtype(total))
        return TrackChurnState(inner_state, active, churn)

    def update_fn(updates, state, params=None, **extra_args):
        trainable = extra_args.get("trainable")
        # Both sides of the comparison have to read the same bits: see _masking.
        grads, params = jax.tree.map(_barrier, (updates, params))
        updates, inner_state = inner.update(
            grads, state.inner_state, params, **extra_args
        )
        # By its bits, because it may be subnormal; and NaN if nothing is to be active.
        key = jnp.minimum(order_key(find_state(inner_state).threshold), NAN_KEY)

        def is_active(flag, param, grad):
            if not flag:
                return optax.MaskedNode()
            if grad is None or not is_inexact(grad):
                return jnp.zeros_like(param, bool)
            return order_key(score(param, grad)) >= key

        flags = prunable_tree(prunable, params)
        active = jax.tree.map(is_active, flags, params, grads)
        if trainable is not None:  # what sits a step out does not change side
            active = jax.tree.map(
                _where_part,
                active,
                state.active,
                trainable,
                is_leaf=lambda x: isinstance(x, optax.MaskedNode),
            )
        churn = _num_different(state.active, active, axis_name)
        return updates, TrackChurnState(inner_state, active, churn)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def find_state(opt_state: Any) -> MaskByImportanceState:
    """Return the one state of `mask_by_importance` that is somewhere in `opt_state`.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = states_of(MaskByImportanceState, opt_state)
    if len(found) != 1:
        raise ValueError(
            f"found {len(found)} states of mask_by_importance, instead of one. "
            + (
                "Each has a choice of its own: watch them one by one."
                if found
                else "Give the state of an optimizer with gsm in it, as init returns "
                "it; a checkpoint may have come back as plain dicts."
            )
        )
    return found[0]


def states_of(kind: type, opt_state: Any) -> list[Any]:
    """All states of that type, wherever wrappers have put them."""
    is_one = lambda x: isinstance(x, kind)
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_one) if is_one(x)]


def _where_part(now: Any, then: Any, part: Any) -> Any:
    return now if isinstance(now, optax.MaskedNode) else jnp.where(part, now, then)


def _barrier(leaf: Any) -> Any:
    return lax.optimization_barrier(leaf) if is_inexact(leaf) else leaf


def _num_different(before: Any, after: Any, axis_name: Any) -> jax.Array:
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    # No score reaches the second key. It is there because on the CPU a count of one key
    # alone is far slower: see _counting.
    words = count(_different, pairs, jnp.array([1, NAN_KEY], jnp.int32), axis_name)
    high, low = (jnp.sum(word, dtype=jnp.int32) for word in words)
    return to_count((high, low), num_entries(pairs, axis_name))


def _different(before: jax.Array, after: jax.Array) -> jax.Array:
    """Score of an entry: positive, and so its key 1 or more, where it changed side."""
    return (before != after).astype(jnp.float32)
