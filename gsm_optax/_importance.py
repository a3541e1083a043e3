r"""What an entry is worth, and which entries take part.

An importance function maps a parameter leaf and its gradient to a leaf of scores of
the same shape. Scores are compared over the whole model, so they must be on one
scale; only their order matters. It is called with float32 (or complex64) arrays and
an entry with a score of zero or less is never active.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax._paths import check_arrays

Importance = Callable[[jax.Array, jax.Array], jax.Array]
Prunable = Any  # a pytree prefix of bools, or a callable `params -> such a prefix`


def taylor_importance(param: jax.Array, grad: jax.Array) -> jax.Array:
    r"""First-order Taylor importance :math:`|\theta \cdot \partial L/\partial\theta|`.

    To first order, how much the loss changes when the entry is set to zero: equation 4
    of Ding et al., 2019 (https://arxiv.org/abs/1909.12778). The default of `gsm`.

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


def magnitude_importance(param: jax.Array, grad: jax.Array) -> jax.Array:
    r"""Magnitude :math:`|\theta|`, whatever the gradient (a baseline).

    Args:
        param: a parameter leaf, any shape.
        grad: its gradient, same shape; not used.

    Returns:
        Scores, same shape, real.
    """
    del grad
    return jnp.abs(param)


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


_NOT_NEGATIVE = (taylor_importance, magnitude_importance, gradient_importance)


@dataclass(frozen=True)
class Score:
    """An importance in float32, with its sign bit clear and its shape checked.

    Two of them are equal when their importance is, so that jit compiles once for both.
    """

    importance: Importance

    def __call__(self, param: jax.Array, grad: jax.Array) -> jax.Array:
        """Return float32 scores of the shape of `param`."""
        score = self.importance(_in_single_precision(param), _in_single_precision(grad))
        if jnp.shape(score) != param.shape:
            raise ValueError(
                f"importance returned shape {jnp.shape(score)} for a parameter of "
                f"shape {param.shape}: it must give one score per entry."
            )
        score = jnp.asarray(score).astype(jnp.float32)
        if self.importance in _NOT_NEGATIVE:  # and spare a comparison per entry
            return score
        return jnp.where(score <= 0, 0, jnp.abs(score))


@dataclass(frozen=True)
class ScoreOfPart:
    """A score that is zero wherever an entry does not take part."""

    score: Score

    def __call__(self, param: jax.Array, grad: jax.Array, part: jax.Array) -> jax.Array:
        """Return float32 scores; `part` holds a bool for every entry."""
        return jnp.where(part, self.score(param, grad), 0)


magnitude_score = Score(magnitude_importance)
"""Magnitudes without a gradient: call it with the parameter in both places."""


def _in_single_precision(x: jax.Array) -> jax.Array:
    return x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` holds floats or complex numbers (float0 and PRNG keys do not)."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def kernels(params: Any) -> Any:
    """Tree of bools, `True` at the inexact leaves of rank 2 or more.

    The default of every `prunable` argument: dense and convolution kernels and
    embeddings, not biases or normalisation parameters.

    Args:
        params: any pytree of arrays.

    Returns:
        The same tree with a bool at every leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import kernels
        >>> kernels({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
        {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2 and is_inexact(x), params)


def prunable_tree(prunable: Prunable, params: Any) -> Any:
    """Resolve `prunable` to one bool per leaf of `params`; only inexact leaves count.

    Raises:
        ValueError: if the tree does not match `params` or holds something else than
            bools, or if a leaf of `params` is no array.
    """
    if not jax.tree.leaves(params):  # optax.tree.map_params passes a leafless tree
        return params
    check_arrays(params)
    # A callable pytree (an equinox module of bools) is a tree, as in optax.masked.
    treedef = jax.tree.structure(prunable)
    is_function = callable(prunable) and jax.tree_util.treedef_is_leaf(treedef)
    prefix = prunable(params) if is_function else prunable
    for path, value in jax.tree_util.tree_leaves_with_path(prefix):
        if not isinstance(value, bool | np.bool_):
            raise ValueError(
                f"prunable{jax.tree_util.keystr(path)}={value!r} must be True or False."
            )
    try:
        full = jax.tree.broadcast(prefix, params)
    except ValueError as error:
        raise ValueError(
            f"prunable does not match the parameters: it must be a pytree prefix of "
            f"bools, or a callable returning one. {error}"
        ) from error
    return jax.tree.map(lambda flag, x: bool(flag) and is_inexact(x), full, params)


def check_any_prunable(flags: Any, params: Any) -> None:
    """Raise `ValueError` if `params` has leaves, but none of them is prunable.

    A tree without any leaf passes: `optax.tree.map_params` and `optax.masked` build
    such placeholders.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if leaves and not any(jax.tree.leaves(flags)):
        listed = ", ".join(
            f"{jax.tree_util.keystr(path)}: {jnp.result_type(x)}{list(jnp.shape(x))}"
            for path, x in leaves[:8]
        )
        raise ValueError(
            f"no leaf is prunable among {listed}{', ...' if len(leaves) > 8 else ''}. "
            "By default these are the floating-point leaves of rank 2 or more; name "
            "others with prunable=."
        )
