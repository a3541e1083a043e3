"""The numbers one watches, as a flat dict of scalars."""

from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsm_optax._importance import magnitude
from gsm_optax._masking import find_state
from gsm_optax._paths import unboxed
from gsm_optax._placement import Leaves, check_whole
from gsm_optax._prunable import from_marks
from gsm_optax._reductions import count
from gsm_optax._words import to_float, to_words

NEAR_ZERO = 1e-4
"""Entries of smaller magnitude count as near zero."""

# Order keys: 1 is that of the smallest number above zero.
_KEYS = np.array([1, np.float32(NEAR_ZERO).view(np.int32)], np.int32)


def metrics(
    params: Any, opt_state: Any, *, decay_left: Any = None
) -> dict[str, jax.Array]:
    r"""Read from parameters and optimizer state how far pruning has come.

    ========================= ========================================================
    key                       what
    ========================= ========================================================
    `gsm/threshold`           least importance that was active at the last step
    `gsm/num_active`          entries that got their gradient at the last step
    `gsm/shortfall`           entries that these are short of Q, for want of any score
                              above zero: not 0, the choice is starved (with `units=`
                              up to those of a unit, which would have been too many)
    `gsm/active_fraction`     the active entries as a fraction of the prunable ones
    `gsm/density`             fraction of the prunable entries that is not exactly zero
    `gsm/near_zero`           fraction of them below 1e-4 in magnitude, zeros included
    `gsm/churn`               entries that changed side; only with `track_churn`
    `gsm/decay_budget_left`   decay still to come; only with `decay_left`
    ========================= ========================================================

    The prunable entries are those that the optimizer chooses among; with `units=` all
    entries of the leaves that hold units. `gsm/near_zero` is to reach the ratio before
    `gsm/decay_budget_left` reaches 0. Entries that are frozen (`freeze_blocks`) are
    neither active nor do they decay.

    Args:
        params: pytree of arrays, sharded or not; under flax nnx,
            `nnx.state(model, nnx.Param)`.
        opt_state: state of an optimizer with one `mask_by_importance` in it; under flax
            nnx, `optimizer.opt_state`.
        decay_left: the decay budget that is left, a scalar: see `decay_budget_left`.

    Returns:
        A flat dict of scalars, float32 and int32. A pure function: call it inside jit
        or out of it, at every step or now and then. It reads the parameters once.
        Inside `shard_map` or `pmap` every device must hold all of them.

    Raises:
        ValueError: if `opt_state` has no state of `mask_by_importance`, or several, or
            those of several networks; if it belongs to other parameters; or if these
            are split over the devices of a `shard_map` that this is inside of.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import gsm_sgd, metrics
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [0.0, 1e-5]])}
        >>> tx = gsm_sgd(0.1, ratio=0.75)
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> for name, value in metrics(params, state).items():
        ...     print(f"{name:20} {value:g}")
        gsm/threshold        4
        gsm/num_active       1
        gsm/shortfall        0
        gsm/active_fraction  0.25
        gsm/density          0.75
        gsm/near_zero        0.5

        The same dict for Weights & Biases, `wandb.log(jax.device_get(metrics(params,
        state)), step=step)`, and for any TensorBoard writer::

            for name, value in metrics(params, state).items():
                writer.add_scalar(name, float(value), step)
    """
    state = find_state(opt_state)
    flags = from_marks(state.prunable, params)
    chosen = compress(jax.tree.leaves(params), jax.tree.leaves(flags))
    leaves = [(x,) for x in chosen]
    check_whole(leaves, in_doubt=True)
    num_active, num_kept = unboxed(state.num_active), unboxed(state.num_kept)
    active, density, near_zero = _fractions(leaves, num_active)
    values = {
        "gsm/threshold": unboxed(state.threshold),
        "gsm/num_active": num_active,
        "gsm/shortfall": jnp.maximum(num_kept - num_active, 0),
        "gsm/active_fraction": active,
        "gsm/density": density,
        "gsm/near_zero": near_zero,
    }
    if state.churn is not None:
        values["gsm/churn"] = unboxed(state.churn)
    if decay_left is not None:
        values["gsm/decay_budget_left"] = jnp.asarray(decay_left, jnp.float32)
    return values


@jax.jit
def _fractions(leaves: Leaves, num_active: jax.Array) -> list[jax.Array]:
    """Of all entries, those that are active, not zero, and near zero."""
    total = sum(x.size for (x,) in leaves)
    high, low = count(magnitude, leaves, jnp.asarray(_KEYS))
    all_high, all_low = to_words(total)
    nonzero, near_zero = (high[0], low[0]), (all_high - high[1], all_low - low[1])
    counts = [num_active.astype(jnp.float32), to_float(nonzero), to_float(near_zero)]
    # A constant divisor would become a factor, and 100 % become 99.99999.
    divisor = lax.optimization_barrier(jnp.float32(total))
    return [x / divisor for x in counts]
