r"""What an entry is worth.

An importance function maps a parameter leaf and its gradient to a leaf of scores of
the same shape. Scores are compared over the whole model, so they must be on one
scale; only their order matters. It is called with float32 (or complex64) arrays and
an entry with a score of zero or less is never active.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
from jax import lax

from gsm_optax._checks import is_static
from gsm_optax._placement import Leaves
from gsm_optax._reductions import ScoreFn

Importance = Callable[[jax.Array, jax.Array], jax.Array]
Pair = tuple[jax.Array, jax.Array]  # a parameter and its gradient


def taylor_importance(param: jax.Array, grad: jax.Array) -> jax.Array:
    r"""First-order Taylor importance :math:`|\theta \cdot \partial L/\partial\theta|`.

    To first order, how much the loss changes when the entry is set to zero: equation 4
    of Ding et al., 2019 (https://arxiv.org/abs/1909.12778). The default of `gsm`.

    The product is a float32: below 1e-38 it is zero, so that such an entry is never
    active, and above 3e38 it is inf, which ties with every other. Gradients that are
    that small or large (by a loss scale, say) are to be scaled before they come here.

    Args:
        param: a parameter leaf, any shape.
        grad: its gradient, same shape.

    Returns:
        Scores, same shape, real.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import taylor_importance
        >>> taylor_importance(jnp.array([2.0, -3.0]), jnp.array([0.1, 0.2])).tolist()
        [0.2..., 0.6...]
    """
    return jnp.abs(param * grad)


def tempered_importance(power: float = 0.5) -> Importance:
    r"""Make :math:`|\theta| \cdot |\partial L/\partial\theta|^\gamma`.

    At :math:`\gamma = 1` it is `taylor_importance`, the paper's, at :math:`\gamma = 0`
    `magnitude_importance`, and is returned as such. Taylor sees what a weight does for
    the loss, but through the gradients of single batches, which spread over several
    orders of magnitude where weights spread over one, so that they decide nearly alone.
    A power evens out the two factors. To be used with `smoothing`.

    Args:
        power: :math:`\gamma`, in [0, 1].

    Returns:
        An importance function.

    Raises:
        ValueError: for a power outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import tempered_importance
        >>> score = tempered_importance(0.5)
        >>> score(jnp.array([2.0, -3.0]), jnp.array([0.25, -0.0625])).round(2).tolist()
        [1.0, 0.75]
    """
    if not (is_static(power) and 0 <= power <= 1):
        raise ValueError(
            f"power={power!r} must be a number in [0, 1]: 0 is magnitude, 1 is Taylor."
        )
    ends = {0.0: magnitude_importance, 1.0: taylor_importance}
    return ends.get(float(power)) or _Tempered(float(power))


@dataclasses.dataclass(frozen=True)
class _Tempered:
    """See `tempered_importance`."""

    power: float

    def __call__(self, param: jax.Array, grad: jax.Array) -> jax.Array:
        grad = jnp.abs(grad)
        if self.power == 0.5:
            return jnp.abs(param) * jnp.sqrt(grad)
        # On a CPU four times as fast as a power.
        return jnp.abs(param) * jnp.exp(self.power * jnp.log(grad))


def magnitude_importance(param: jax.Array, grad: jax.Array) -> jax.Array:
    r"""Magnitude :math:`|\theta|`, whatever the gradient (a baseline).

    Args:
        param: a parameter leaf, any shape.
        grad: its gradient, same shape; only NaN counts, and stays one.

    Returns:
        Scores, same shape, real.
    """
    return jnp.where(jnp.isnan(grad), jnp.nan, jnp.abs(param))


def gradient_importance(param: jax.Array, grad: jax.Array) -> jax.Array:
    r"""Gradient magnitude :math:`|\partial L/\partial\theta|`, whatever the parameter.

    A weight of exactly zero can become active under this one: pruned weights may grow
    back, unless `freeze_pruned` follows.

    Args:
        param: a parameter leaf, any shape; not used.
        grad: its gradient, same shape.

    Returns:
        Scores, same shape, real.
    """
    del param
    return jnp.abs(grad)


def score_leaves(
    importance: Importance, pairs: Sequence[Pair]
) -> tuple[ScoreFn, Leaves]:
    """T of every leaf: a function, and the arrays that it is to be called with.

    Taylor, magnitude and gradient look at one entry at a time, so that a search may
    compute them anew in every pass, wherever a part of the leaf is, and store nothing.
    What others look at is not known (a normalised importance looks at the whole leaf):
    they are called once, on leaves as they come, and what they return is stored.
    """
    for own, score in _ENTRYWISE.items():
        if importance is own:
            return score, pairs
    return stored, [(_call(importance, *pair),) for pair in pairs]


def needs_nonzero(importance: Importance) -> bool:
    """Whether an entry of zero is known to score zero, whatever its gradient."""
    known = taylor_importance, magnitude_importance
    return isinstance(importance, _Tempered) or any(importance is x for x in known)


def stored(score: jax.Array) -> jax.Array:
    """Score of a leaf whose scores have been computed already."""
    return score.astype(jnp.float32)


def magnitude(x: jax.Array) -> jax.Array:
    """Score by magnitude alone; float32, 0 below 1e-38."""
    return jnp.abs(in_single_precision(x))


def only_parts(
    score: ScoreFn, leaves: Leaves, parts: Sequence[jax.Array]
) -> tuple[ScoreFn, Leaves]:
    """T that is zero in leaves that take no part, as bool scalars tell.

    The flag travels as one scalar a leaf, last.
    """
    flagged = zip(leaves, parts, strict=True)
    return _among(score), [(*args, part) for args, part in flagged]


@cache  # one function each, because jit knows functions by their identity
def _among(score: ScoreFn) -> ScoreFn:
    return lambda *args: jnp.where(args[-1], score(*args[:-1]), 0)


def _taylor(param: jax.Array, grad: jax.Array) -> jax.Array:
    return taylor_importance(in_single_precision(param), in_single_precision(grad))


def _magnitude(param: jax.Array, grad: jax.Array) -> jax.Array:
    return magnitude_importance(in_single_precision(param), grad)


def _gradient(param: jax.Array, grad: jax.Array) -> jax.Array:
    return gradient_importance(param, in_single_precision(grad))


_ENTRYWISE: dict[Importance, ScoreFn] = {
    taylor_importance: _taylor,
    magnitude_importance: _magnitude,
    gradient_importance: _gradient,
}


def _call(importance: Importance, param: jax.Array, grad: jax.Array) -> jax.Array:
    """Scores in float32, with their sign bit clear and their shape checked."""
    score = importance(in_single_precision(param), in_single_precision(grad))
    if jnp.shape(score) != param.shape:
        raise ValueError(
            f"importance returned shape {jnp.shape(score)} for a parameter of "
            f"shape {param.shape}: it must give one score per entry."
        )
    score = jnp.asarray(score).astype(jnp.float32)
    # Stored once, so that all who compare it read the same bits.
    return lax.optimization_barrier(jnp.where(score <= 0, 0, jnp.abs(score)))


def in_single_precision(x: jax.Array) -> jax.Array:
    """Convert to float32 or complex64."""
    return x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)
