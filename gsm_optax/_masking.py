"""The gradient of the most important entries only."""

import operator
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsm_optax._checks import (
    check_accumulator,
    check_decay,
    check_floors,
    check_kept,
    check_ratio,
    check_reserved,
    check_room,
    check_smoothing,
    concrete,
    first_value,
    value_at,
)
from gsm_optax._churn import track
from gsm_optax._entries import Entries
from gsm_optax._importance import (
    Importance,
    Pair,
    needs_nonzero,
    taylor_importance,
)
from gsm_optax._paths import unboxed
from gsm_optax._placement import AxisName, check_axis_name
from gsm_optax._prunable import (
    Prunable,
    check_any_prunable,
    check_marks,
    entries_of,
    is_inexact,
    kernels,
    prunable_tree,
    prunable_zeros,
    to_marks,
    warn_of_zeros,
)
from gsm_optax._smoothing import nothing_averaged, warn_of_coarse
from gsm_optax._trainable import flags_of
from gsm_optax._words import count_dtype, num_kept, to_count

if TYPE_CHECKING:
    from gsm_optax.units import Units


class MaskByImportanceState(NamedTuple):
    """State of `mask_by_importance`: what the last choice came to.

    Counts are int32, or float32 in a tree of 2³¹ prunable entries or more (the choice
    itself is exact).
    """

    threshold: jax.Array  # float32, shape (): least score that was active; inf if Q = 0
    num_active: jax.Array  # shape (): entries that got their gradient
    num_kept: jax.Array  # shape (): Q, how many should have
    step: jax.Array | None  # int32, shape (): only where something is a schedule
    prunable: Any  # which leaves take part; has no leaves itself
    active: Any | None  # B, bools like the prunable parameters: only to track churn,
    churn: jax.Array | None  # shape (): entries that changed side; only then
    average: Any | None  # of T, like the prunable parameters, or for each family of
    # units an array: only with smoothing,
    averaged: jax.Array | None  # int32, one a leaf or family: over how many steps


def mask_by_importance(
    ratio: Any,
    *,
    importance: Importance | None = None,
    prunable: Prunable | None = None,
    smoothing: jax.typing.ArrayLike = 0.0,
    passive_decay: optax.ScalarOrSchedule | None = None,
    units: "Units | None" = None,
    min_units: int | None = None,
    min_kept: int | None = None,
    accumulator_dtype: Any = None,
    track_churn: bool = False,
    axis_name: AxisName = None,
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
    their whole gradient. Updates keep their dtype, or with `passive_decay` have that of
    the parameter where it is wider; scores are float32.

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
        importance: `(param, grad) -> score` of a leaf, float32 in and out; by default
            `taylor_importance`. Those of Taylor, magnitude and gradient store nothing;
            what another returns is stored for the step, 4 bytes an entry, so that it
            may look at the leaf as a whole (inside `shard_map`: at the part that a
            device holds).
        prunable: pytree prefix of bools, or a callable `params -> such a prefix`. By
            default `kernels`, told by name and shape.
        smoothing: s, in [0, 1). If it is not 0 (the paper's), what is compared is not T
            but its exponential average, :math:`(1 - s) \sum_i s^i T_{k-i}` without its
            bias towards the start. It is stored, and the search reads it alone. Entries
            flicker less: 0.9 to 0.99 go with a strong `passive_decay`.
        passive_decay: what passive entries get in place of their gradient, as a
            multiple of the parameter: on top of any decay that follows, or taken from
            it if negative. A float or an optax schedule; None, the paper's, is nothing.
        units: of `gsm_optax.units.find_units`, to choose whole units: T is then the
            mean over the entries of a unit, as a multiple of the mean over its family
            (so Fang et al., DepGraph, 2023, compare magnitudes); N and Q count the
            entries that are in units, and B is the same for all of a unit, biases and
            scales included: the units of greatest T are active, as many as hold no more
            than Q entries. An entry of two units is active if both are. Leaves without
            units keep their whole gradient. `params` may be a part of those that the
            units were found in, such as one collection of a linen module. Takes the
            place of `prunable`.
        min_units: with `units`: how many of every family are active before others are,
            by default 1, so that no layer is emptied.
        min_kept: without `units`: how many entries of every prunable leaf are active
            before others are, by default 0. Takes a search for each leaf.
        accumulator_dtype: dtype of the average that `smoothing` keeps; by default
            float32, and of a complex one the real part.
        track_churn: whether the state also counts the entries that change side, active
            or passive, at every step: for one bool per prunable entry.
        axis_name: only inside `jax.shard_map` or `jax.pmap`: the name or names of the
            axes that the parameters are split over, and `()` if every device holds
            all of them, as in data parallelism with averaged gradients. Elsewhere
            shardings are seen to by themselves. Under `pmap` and with
            `check_vma=False`, where tracing cannot tell copies from parts, parameters
            that are alike on all devices of an axis are taken for copies; otherwise
            every prunable leaf must be split over it.

    Returns:
        An `optax.GradientTransformationExtraArgs`, whose `update` needs `params`. Its
        state holds scalars, such as `num_active`: read them by `metrics`, or with
        `optax.tree.get(state, "num_active")`.

    Raises:
        ValueError: for arguments outside their range, or a ratio in half precision;
            from `init` if no leaf is prunable, if `prunable` or `units` does not match,
            or if the ratio keeps none, or less than the floors do; from `update`
            without `params`, or if devices would choose apart.

    Warns:
        UserWarning: from `init`, if a prunable leaf is all zeros (a LoRA's B, say),
            because then none of it can ever become active; or if the average is kept in
            half precision, where small changes round away.

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
    check_smoothing(smoothing)
    check_accumulator(accumulator_dtype)
    min_kept, min_units = check_floors(min_kept, min_units, units)
    if passive_decay is not None:
        check_decay("passive_decay", passive_decay, least=-sys.float_info.max)
    if units is not None and (prunable is not None or axis_name):
        raise ValueError(
            "with units= the choice is among the leaves that hold units, all of which "
            "every device has to see: leave prunable= out, and axis_name= too, or ()."
        )
    by_units = units is not None
    scheduled = callable(ratio) or callable(passive_decay)
    # The default is None, since inject_hyperparams takes callables for schedules.
    importance = taylor_importance if importance is None else importance
    flags_in = partial(prunable_tree, prunable) if units is None else units.flags

    def pool_of(params, places, pairs, parts=None, axis_name=None):
        """What is chosen among: entries or units of these leaves of the parameters."""
        if units is not None:
            return units.among(params, places, pairs, parts, min_units)
        return Entries(pairs, parts=parts, axis_name=axis_name, min_kept=min_kept)

    def init_fn(params: Any) -> Any:
        flags = flags_in(params)
        check_any_prunable(flags, params)
        first_ratio = concrete(first_value(ratio))
        # At a ratio of zero everything is active, and then no longer zero.
        if needs_nonzero(importance) and first_ratio != 0:
            # Biases of units may be zeros: their kernels keep the unit alive.
            weights = kernels(params) if by_units else flags
            warn_of_zeros(jax.tree.map(operator.and_, flags, weights), params)
        total = entries_of(flags, params)
        if total and not axis_name:  # else these may be parts
            chosen = [i for i, flag in enumerate(jax.tree.leaves(flags)) if flag]
            leaves = list(map(jax.typeof, jax.tree.leaves(params)))
            pool = pool_of(params, chosen, [(leaves[i], leaves[i]) for i in chosen])
            total = pool.most
            check_kept(ratio, total)
            check_reserved(ratio, pool.reserved, total, pool.floor)
        scalar = lambda dtype: jnp.zeros((), dtype)
        average, averaged = None, None
        if concrete(smoothing) != 0:
            dtype = jnp.finfo(accumulator_dtype or jnp.float32).dtype  # if complex
            warn_of_coarse(dtype, concrete(smoothing))
            average, averaged = nothing_averaged(flags, params, dtype, units)
        return MaskByImportanceState(
            threshold=scalar(jnp.float32),
            num_active=scalar(count_dtype(total)),
            num_kept=scalar(count_dtype(total)),
            step=scalar(jnp.int32) if scheduled else None,
            prunable=to_marks(flags, params, by_units=by_units),
            active=prunable_zeros(flags, params, bool) if track_churn else None,
            churn=scalar(count_dtype(total)) if track_churn else None,
            average=average,
            averaged=averaged,
        )

    def update_fn(updates, state, params=None, *, trainable=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "mask_by_importance compares |param * grad| and needs the parameters: "
                "call tx.update(grads, state, params)."
            )
        flags = flags_in(params)
        check_marks(state.prunable, flags, params, by_units=by_units)
        _check_holds(state, smoothing, scheduled, track_churn, units)
        grads, taking, places, pairs, treedef = _split(updates, params, flags)
        check_axis_name(pairs, axis_name)
        parts = None if trainable is None else flags_of(trainable, updates, taking)
        pool = pool_of(params, places, pairs, parts, axis_name)

        scores = pool.scores(importance)  # T
        if state.average is not None:
            slots, tree = (taking, treedef) if units is None else pool.slots
            scores, state = _averaged(pool, scores, smoothing, state, slots, tree)
        kept = num_kept(value_at(ratio, state.step), pool.total)  # Q
        found, active = pool.choose(scores, kept, state.threshold)  # B
        rest = _decayed(value_at(passive_decay, state.step), pairs, parts)
        for i, mask, (_, grad), other in zip(taking, active, pairs, rest, strict=True):
            grads[i] = jnp.where(mask, grad.astype(other.dtype), other)  # B ∘ g

        new_state = state._replace(
            threshold=found.threshold,
            num_active=found.num_active,
            num_kept=to_count(kept, pool.most),
        )
        # What the state holds is kept up, whether these settings ask for it or not.
        if state.step is not None:
            new_state = new_state._replace(step=optax.safe_increment(state.step))
        if state.active is not None:
            before = treedef.flatten_up_to(state.active)
            after, churn = track(before, taking, active, parts, axis_name)
            after = jax.tree.unflatten(treedef, after)
            new_state = new_state._replace(active=after, churn=churn)
        return jax.tree.unflatten(treedef, grads), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_holds(
    state: MaskByImportanceState,
    smoothing: Any,
    scheduled: bool,
    track_churn: bool,
    units: "Units | None",
) -> None:
    """Raise `ValueError` if a state lacks what these settings keep in it."""
    smooths = concrete(smoothing) not in (0, None)
    check_room("smoothing", smooths, state.average is not None)
    schedule = "a schedule of ratio or passive_decay"
    check_room(schedule, scheduled, state.step is not None)
    check_room("track_churn", track_churn, state.active is not None)
    if units is not None and state.average is not None:
        held = [x.size for x in jax.tree.leaves(state.average)]
        sizes = [family.size for family in units.families]
        if held != sizes:
            raise ValueError(
                f"this state has averages of families of {held} units, and the network "
                f"has families of {sizes}: after shrink a family of one unit is none. "
                "Begin with a new state, tx.init(params)."
            )


def _averaged(
    pool: Any,
    scores: Any,
    smoothing: Any,
    state: Any,
    slots: Sequence[int],
    tree: Any,
) -> tuple[Any, Any]:
    """Averages in place of scores, and the state with them."""
    flat, where = tree.flatten_up_to(state.average), np.array(slots, int)
    before, counts = [flat[i] for i in slots], jnp.asarray(state.averaged)
    scores, after, some = pool.averaged(scores, smoothing, before, counts[where])
    for i, mean in zip(slots, after, strict=True):
        flat[i] = mean
    return scores, state._replace(
        average=jax.tree.unflatten(tree, flat),
        averaged=counts.at[where].set(some),
    )


def _decayed(
    decay: Any, pairs: Sequence[Pair], parts: Sequence[jax.Array] | None
) -> list[Any]:
    """What passive entries get in every leaf: zero, or so much of the parameter.

    In its dtype, where that is the wider one: in float16 decay would vanish.
    """
    if decay is None:
        return [jnp.zeros((), g.dtype) for _, g in pairs]
    rest = [
        (jnp.asarray(decay, x.dtype) * x).astype(wider_dtype(x, g)) for x, g in pairs
    ]
    if parts is None:
        return rest
    return [jnp.where(part, x, 0) for part, x in zip(parts, rest, strict=True)]


def wider_dtype(param: Any, grad: Any) -> Any:
    """The dtype of more bits; that of the gradient if they have as many."""
    bits = lambda x: jnp.finfo(jnp.result_type(x)).bits
    return jnp.result_type(param if bits(param) > bits(grad) else grad)


def _split(
    updates: Any, params: Any, flags: Any
) -> tuple[list[Any], list[int], list[int], list[Pair], Any]:
    """Split into leaves what takes part in the choice.

    Returns:
        All leaves of the gradients, None included; which of them take part; which
        leaves of the parameters these are; their (param, grad); the treedef.
    """
    grads, treedef = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    by_leaf = treedef.flatten_up_to(flags)
    taking = [
        i
        for i, (flag, grad) in enumerate(zip(by_leaf, grads, strict=True))
        if flag is True and grad is not None and is_inexact(grad)
    ]
    structure = jax.tree.structure(params)
    numbers = jax.tree.unflatten(structure, range(structure.num_leaves))
    numbers = treedef.flatten_up_to(numbers)
    by_leaf = treedef.flatten_up_to(params)
    # A gradient that is still a fused expression could be rounded differently in the
    # search and in the mask; behind the barrier both read the same bits. (One barrier
    # for both, and until jax 0.10 the parameter differs wherever the gradient does.)
    hold = jax.lax.optimization_barrier
    for i in taking:
        if jnp.shape(grads[i]) != jnp.shape(by_leaf[i]):
            raise ValueError(
                f"a gradient has shape {list(jnp.shape(grads[i]))}, and its parameter "
                f"{list(jnp.shape(by_leaf[i]))}."
            )
    pairs = [
        (hold(jnp.asarray(by_leaf[i])), hold(jnp.asarray(grads[i]))) for i in taking
    ]
    return grads, taking, [numbers[i] for i in taking], pairs, treedef


def find_state(opt_state: Any) -> MaskByImportanceState:
    """Return the one state of `mask_by_importance` that is somewhere in `opt_state`.

    Raises:
        ValueError: if there is none, or more than one, or one of several networks.
    """
    is_one = lambda x: isinstance(x, MaskByImportanceState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_one) if is_one(x)]
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
    (state,) = found
    if shape := jnp.shape(unboxed(state.num_active)):
        raise ValueError(
            f"this state holds the choices of several networks, in axes {list(shape)}. "
            "Of an ensemble ask for each: jax.vmap(metrics)(params, state), or "
            "jax.vmap(lambda p, s: prune(p, ratio, opt_state=s))(params, state). Of "
            "copies on devices take one: jax.tree.map(lambda x: x[0], ...) of both."
        )
    return state
