"""The optimizer of every phase: dense, GSM, gradual magnitude pruning, frozen zeros."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from examples.paper.recipes import Phase
from gsm_optax import (
    decay_budget_left,
    freeze_pruned,
    gsm_sgd,
    kernels,
    magnitude_mask,
    mask_by_importance,
    ratio_ramp,
    tempered_importance,
)


def schedule(phase: Phase, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of every step."""
    drops = {epoch * steps_per_epoch: 0.1 for epoch in phase.drops}
    body = optax.piecewise_constant_schedule(phase.learning_rate, drops)
    if phase.cosine:
        steps = phase.epochs * steps_per_epoch
        body = optax.cosine_decay_schedule(phase.learning_rate, steps)
    warm = phase.warmup * steps_per_epoch
    # Drops and cosine are counted from the start, warm-up included.
    return (lambda step: body(step) * jnp.minimum(step / warm, 1)) if warm else body


def rising(phase: Phase, steps_per_epoch: int, ratio: float) -> optax.Schedule:
    """A cubic rise from 0 to `ratio` over the ramp of the phase."""
    steps = round(phase.ramp * phase.epochs * steps_per_epoch)
    return ratio_ramp(ratio, max(steps, 1))


def dense(phase: Phase, steps_per_epoch: int) -> optax.GradientTransformation:
    """Momentum SGD with weight decay on the kernels."""
    rate = schedule(phase, steps_per_epoch)
    return optax.chain(
        optax.add_decayed_weights(phase.weight_decay, mask=kernels),
        optax.sgd(rate, phase.momentum, phase.nesterov),
    )


def gsm(phase: Phase, steps_per_epoch: int, ratio: float, units: Any = None):
    """Global Sparse Momentum SGD, the ratio rising first if the phase has a ramp."""
    rate = schedule(phase, steps_per_epoch)
    ratio = rising(phase, steps_per_epoch, ratio) if phase.ramp else ratio
    power = 1.0 if phase.power is None else phase.power
    choice = {
        "importance": tempered_importance(power),
        "smoothing": phase.smoothing or 0.0,
    }
    if phase.adam:
        choice["passive_decay"] = phase.passive_decay
        return optax.chain(mask_by_importance(ratio, **choice), optax.adam(rate))
    return gsm_sgd(rate, ratio, **decay(phase), **choice, units=units)


def decay(phase: Phase) -> dict[str, Any]:
    """The settings of a phase that decide how fast what is passive decays."""
    names = ("momentum", "weight_decay", "passive_decay", "nesterov")
    return {name: getattr(phase, name) for name in names}


def decay_budget(phase: Phase, steps_per_epoch: int) -> float:
    """The decay budget of a phase of GSM."""
    rate, steps = schedule(phase, steps_per_epoch), phase.epochs * steps_per_epoch
    return float(decay_budget_left(rate, steps, **decay(phase))(0))


def frozen(phase: Phase, steps_per_epoch: int, mask: Any):
    """Momentum SGD that leaves the zeros where they are."""
    return optax.chain(dense(phase, steps_per_epoch), freeze_pruned(mask))


def gradual(phase: Phase, steps_per_epoch: int, ratio: float):
    """Gradual global magnitude pruning: ever more of the least weights become zero."""
    ratios = rising(phase, steps_per_epoch, ratio)
    return optax.chain(dense(phase, steps_per_epoch), prune_gradually(ratios))


class PruneGraduallyState(NamedTuple):
    """State of `prune_gradually`."""

    step: jax.Array  # int32, shape ()
    mask: Any  # bools, like the parameters


def prune_gradually(ratio: optax.Schedule, every: int = 100):
    """Prune by magnitude over the whole model every so many steps; last in a chain.

    What was pruned stays zero, as long as the ratio (of zeros) does not fall.
    """

    def init_fn(params):
        ones = jax.tree.map(lambda x: jnp.ones_like(x, bool), params)
        return PruneGraduallyState(jnp.zeros((), jnp.int32), ones)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        mask = lax.cond(
            state.step % every == 0,
            lambda: magnitude_mask(params, jnp.asarray(ratio(state.step))),
            lambda: state.mask,
        )
        # The update of what has just been pruned takes it to zero, and it stays there.
        prune = lambda keep, update, param: jnp.where(keep, update, -param)
        updates = jax.tree.map(prune, mask, updates, params)
        return updates, PruneGraduallyState(state.step + 1, mask)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
