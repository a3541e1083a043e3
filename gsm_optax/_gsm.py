"""Global Sparse Momentum SGD: selection, then optax's decay, momentum and step."""

import operator
import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from gsm_optax._checks import (
    check_decay,
    check_momentum,
    check_room,
    concrete,
    value_at,
)
from gsm_optax._importance import Importance
from gsm_optax._masking import mask_by_importance, wider_dtype
from gsm_optax._paths import leaf_names, listed
from gsm_optax._placement import AxisName
from gsm_optax._prunable import Prunable, is_inexact, prunable_tree

if TYPE_CHECKING:
    from gsm_optax.units import Units


def gsm(
    ratio: Any,
    *,
    momentum: jax.typing.ArrayLike = 0.98,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    nesterov: bool = False,
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
    r"""Global Sparse Momentum: the direction, to be scaled by a learning rate.

    For every prunable leaf :math:`W` with momentum :math:`Z` and gradient :math:`g`,

    .. math::
        Z &\leftarrow \beta Z + \eta W + B \circ g \\
        u &= Z

    (equation 8 of Ding et al., 2019), where :math:`B` marks the
    :math:`Q = N - \mathrm{round}(ratio \cdot N)` entries of greatest
    :math:`|W \circ g|` of the whole model. Passive entries are only decayed and go to
    zero: by a factor of about :math:`1 - \alpha \eta / (1 - \beta)` a step while
    :math:`\alpha \eta \le (1 - \sqrt\beta)^2`, and of :math:`\sqrt\beta` beyond, where
    more decay only makes them swing through zero. `decay_budget` sums that up. When
    little is left, `prune` removes them without loss. Leaves that are not prunable get
    plain momentum SGD without decay.

    It is three transformations in a chain: `mask_by_importance`,
    `optax.add_decayed_weights`, `optax.trace`. Momentum is inside: follow it with a
    step size, `optax.chain(gsm(ratio=0.95), optax.scale_by_learning_rate(lr))`, not
    with another optimizer. Clipping goes before it. Updates and momentum keep their
    dtypes; a gradient of None leaves its momentum as it is.

    Parameters in bfloat16 or float16 do not decay, because updates so small round away:
    keep them in float32 and compute in half precision, or go around the optimizer with
    `stochastic_rounding`.

    Args:
        ratio: fraction of the prunable entries to prune, in [0, 1); 1 - 1/C for a
            compression of C. A float, an optax schedule, or a scalar array.
        momentum: :math:`\beta`, in [0, 1).
        weight_decay: :math:`\eta`, not negative, a float or an optax schedule; added to
            every prunable entry after masking.
        nesterov: whether to use Nesterov momentum.
        importance: `(param, grad) -> score`; by default `taylor_importance`.
        prunable: pytree prefix of bools, or a callable `params -> such a prefix`. By
            default `kernels`, told by name and shape.
        smoothing: in [0, 1); how much of the average importance is kept at every step:
            see `mask_by_importance`. 0 is the paper's: that of the last batch alone.
        passive_decay: :math:`\eta` of the passive entries, if it is to be another than
            that of the active ones; a float or an optax schedule. A strong one leaves
            the survivors their own decay, and makes up for a ratio that rises late.
        units: of `gsm_optax.units.find_units`: whole units are then active or passive,
            and `ratio` is of the entries that are in units: see `mask_by_importance`.
            What decays are the leaves that have units, and kernels.
        min_units: how many units of every family are always active, by default 1.
        min_kept: without `units`, how many entries of every leaf are; by default 0.
        accumulator_dtype: dtype of the momentum, by default that of the parameters, and
            of the average that `smoothing` keeps, by default float32.
        track_churn: whether to count the entries that change side at every step: see
            `mask_by_importance`.
        axis_name: only inside `jax.shard_map` or `jax.pmap`: see `mask_by_importance`.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Its updates point uphill, like those
        of `optax.trace`; `optax.scale_by_learning_rate` turns them round.

    Warns:
        UserWarning: from `init`, if prunable parameters are in half precision, or if
            momentum is and (1 − β) is too small for it.

    Raises:
        ValueError: for arguments outside their range; see `mask_by_importance`.

    Example:
        The one most important entry is trained, the others only decay:

        >>> import jax, jax.numpy as jnp, optax
        >>> from gsm_optax import gsm
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
        >>> tx = optax.chain(
        ...     gsm(ratio=0.75, momentum=0.9, weight_decay=0.1),
        ...     optax.scale_by_learning_rate(0.1),
        ... )
        >>> state = tx.init(params)
        >>> loss = lambda params: (jnp.sum(params["kernel"]) - 4.0) ** 2
        >>> for _ in range(200):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(jnp.abs(params["kernel"]).round(1))
        [[0.  0. ]
         [3.8 0. ]]

    References:
        Ding et al., *Global Sparse Momentum SGD for Pruning Very Deep Neural Networks*,
        NeurIPS 2019, https://arxiv.org/abs/1909.12778
    """
    check_momentum(momentum)
    check_decay("weight_decay", weight_decay)
    if passive_decay is not None:
        check_decay("passive_decay", passive_decay)
        passive_decay = _difference(passive_decay, weight_decay)
    return optax.chain(
        mask_by_importance(
            ratio,
            importance=importance,
            prunable=prunable,
            smoothing=smoothing,
            passive_decay=passive_decay,
            units=units,
            min_units=min_units,
            min_kept=min_kept,
            accumulator_dtype=accumulator_dtype,
            track_churn=track_churn,
            axis_name=axis_name,
        ),
        _keep_dtypes(_decay(weight_decay, prunable, units)),
        _keep_dtypes(_momentum(momentum, nesterov, accumulator_dtype)),
    )


def gsm_sgd(
    learning_rate: optax.ScalarOrSchedule,
    ratio: Any,
    *,
    momentum: jax.typing.ArrayLike = 0.98,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    nesterov: bool = False,
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
    r"""Global Sparse Momentum SGD: an optimizer that prunes while it trains.

    `gsm` followed by :math:`W \leftarrow W - \alpha u`, the analogue of `optax.sgd`.

    Args:
        learning_rate: :math:`\alpha`, a float or an optax schedule.
        ratio: fraction of the prunable entries to prune, in [0, 1); 1 - 1/C for a
            compression of C. A float, an optax schedule, or a scalar array.
        momentum: :math:`\beta`, in [0, 1).
        weight_decay: :math:`\eta`, not negative, a float or an optax schedule.
        nesterov: whether to use Nesterov momentum.
        importance: `(param, grad) -> score`; by default `taylor_importance`.
        prunable: pytree prefix of bools, or a callable `params -> such a prefix`. By
            default `kernels`, told by name and shape.
        smoothing: in [0, 1); how much of the average importance is kept at every step:
            see `mask_by_importance`. 0 is the paper's: that of the last batch alone.
        passive_decay: :math:`\eta` of the passive entries, if it is to be another than
            that of the active ones; a float or an optax schedule. A strong one leaves
            the survivors their own decay, and makes up for a ratio that rises late.
        units: of `gsm_optax.units.find_units`: whole units are then active or passive,
            and `ratio` is of the entries that are in units: see `mask_by_importance`.
            What decays are the leaves that have units, and kernels.
        min_units: how many units of every family are always active, by default 1.
        min_kept: without `units`, how many entries of every leaf are; by default 0.
        accumulator_dtype: dtype of the momentum, by default that of the parameters, and
            of the average that `smoothing` keeps, by default float32.
        track_churn: whether to count the entries that change side at every step: see
            `mask_by_importance`.
        axis_name: only inside `jax.shard_map` or `jax.pmap`: see `mask_by_importance`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to be used as any optax optimizer.

    Raises:
        ValueError: for arguments outside their range; see `mask_by_importance`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from gsm_optax import gsm_sgd, prune
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
        >>> tx = gsm_sgd(0.1, ratio=0.5, momentum=0.9, weight_decay=0.1)
        >>> state = tx.init(params)
        >>> loss = lambda params: (jnp.sum(params["kernel"]) - 4.0) ** 2
        >>> for _ in range(200):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> int(optax.tree.get(state, "num_active"))
        2
        >>> print(f"{loss(params):.4f} before, {loss(prune(params, 0.5)):.4f} pruned")
        0.0095 before, 0.0096 pruned

    References:
        Ding et al., *Global Sparse Momentum SGD for Pruning Very Deep Neural Networks*,
        NeurIPS 2019, https://arxiv.org/abs/1909.12778
    """
    return optax.chain(
        gsm(
            ratio,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            importance=importance,
            prunable=prunable,
            smoothing=smoothing,
            passive_decay=passive_decay,
            units=units,
            min_units=min_units,
            min_kept=min_kept,
            accumulator_dtype=accumulator_dtype,
            track_churn=track_churn,
            axis_name=axis_name,
        ),
        _keep_dtypes(optax.scale_by_learning_rate(learning_rate)),
    )


def _difference(passive: Any, active: Any) -> Any:
    """What is missing to the passive decay where the active one is added to all."""
    if not (callable(passive) or callable(active)):
        return passive - active
    return lambda step: value_at(passive, step) - value_at(active, step)


def _decay(
    weight_decay: Any, prunable: Prunable | None, units: "Units | None"
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` of the prunable leaves that have a gradient.

    Its own mask, where it is a function, is asked about the gradients instead of the
    parameters, of which some may be None.
    """

    def flags_in(params: Any) -> Any:
        flags = prunable_tree(prunable, params)
        if units is None:
            return flags
        return jax.tree.map(operator.or_, units.flags(params), flags)

    def init_fn(params: Any) -> Any:
        flags = flags_in(params)
        _warn_of_half_precision(flags, params)
        return optax.add_decayed_weights(weight_decay, mask=flags).init(params)

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        flags = jax.tree.map(
            lambda grad, flag: None if flag is None else flag and grad is not None,
            updates,
            flags_in(params),
            is_leaf=lambda x: x is None,
        )
        decay, counts = weight_decay, jax.tree.leaves(state)
        check_room("a schedule of weight_decay", callable(decay), bool(counts))
        if callable(decay):
            decay = decay(*counts)
        tx = optax.add_decayed_weights(decay, mask=flags)
        updates, _ = tx.update(updates, tx.init(params), params)
        # Counted here, because optax 0.2.6 does not.
        return updates, jax.tree.map(optax.safe_increment, state)

    return optax.GradientTransformation(init_fn, update_fn)


def _momentum(
    momentum: Any, nesterov: bool, dtype: Any
) -> optax.GradientTransformation:
    """`optax.trace`, which would drop the imaginary parts of complex leaves."""
    tx = optax.trace(momentum, nesterov, dtype)
    is_complex = lambda dtype: jnp.issubdtype(dtype, jnp.complexfloating)

    def init_fn(params: Any) -> Any:
        if dtype is not None and not is_complex(dtype):
            dtypes = map(jnp.result_type, jax.tree.leaves(params))
            for name, own in zip(leaf_names(params), dtypes, strict=True):
                if is_complex(own):
                    raise ValueError(
                        f"{name} is {own}: accumulator_dtype={jnp.dtype(dtype).name} "
                        "would keep its real part alone. Leave it out, or give a "
                        "complex one."
                    )
        if dtype is not None:
            _warn_of_coarse_momentum(momentum, dtype)
        return tx.init(params)

    return optax.GradientTransformation(init_fn, tx.update)


def _warn_of_coarse_momentum(momentum: Any, dtype: Any) -> None:
    """Warn if the decay of a step rounds away in the momentum.

    That is seen where 1 − β is below the spacing of its numbers; float16 also lacks the
    range.
    """
    info, beta = jnp.finfo(dtype), concrete(momentum)
    if info.bits < 32 and beta and (info.minexp > -100 or 1 - beta < info.eps):
        warnings.warn(
            f"momentum={beta:g} is kept in {info.dtype}, which is too coarse: passive "
            "weights do not decay as decay_budget tells. Leave accumulator_dtype out, "
            "or give jnp.float32.",
            stacklevel=2,
        )


def _warn_of_half_precision(flags: Any, params: Any) -> None:
    """Warn if prunable leaves are too coarse to decay."""
    leaves = zip(
        leaf_names(params), jax.tree.leaves(params), jax.tree.leaves(flags), strict=True
    )
    coarse = [
        f"{name} ({jnp.result_type(leaf)})"
        for name, leaf, flag in leaves
        if flag and jnp.finfo(jnp.result_type(leaf)).bits < 32
    ]
    if coarse:
        warnings.warn(
            f"prunable parameters are in half precision: {listed(coarse)}. The decay "
            "of a step rounds away in them, so that nothing becomes zero. Keep "
            "parameters in float32 and compute in half precision (flax: "
            "param_dtype=jnp.float32, dtype=jnp.bfloat16), or use "
            "stochastic_rounding(gsm_sgd(...)).",
            stacklevel=2,
        )


def _keep_dtypes(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, with updates in the dtypes of gradients or parameters, state as of old.

    A float32 scalar, such as a scheduled decay, would make float32 of half precision.
    Of gradient and parameter the wider one counts: decay would vanish in a float16.
    """

    def update_fn(updates, state, params=None):
        new_updates, new_state = tx.update(updates, state, params)
        return _as(new_updates, _wider(updates, params)), _as(new_state, state)

    return optax.GradientTransformation(tx.init, update_fn)


def _wider(updates: Any, params: Any) -> Any:
    """Shapes and dtypes of updates, of which those of the parameters may be wider."""
    if params is None:
        return updates

    def wider(update, param):
        if update is None or not is_inexact(update):
            return update
        return jax.ShapeDtypeStruct(update.shape, wider_dtype(param, update))

    return jax.tree.map(wider, updates, params, is_leaf=lambda x: x is None)


def _as(new: Any, old: Any) -> Any:
    """`new` in the dtypes of `old`; where it is None, `old`."""

    def convert(new, old):
        if new is None:
            return old
        if not is_inexact(old):
            return new
        new = jnp.asarray(new)
        if not jnp.issubdtype(old.dtype, jnp.complexfloating):
            new = new.real  # of a complex accumulator
        return new.astype(old.dtype)

    return jax.tree.map(convert, new, old, is_leaf=lambda x: x is None)
