"""Parameters in half precision whose small updates are not lost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsm_optax._checks import check_count


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`."""

    rounding_step: jax.Array  # int32, shape (): what the random bits are drawn from
    inner_state: Any  # of the optimizer inside, as with float32 parameters


def stochastic_rounding(
    inner: optax.GradientTransformation, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Train parameters in half precision, with updates that count in the mean.

    bfloat16 has 8 significant bits: an update below 1/512 of its parameter is rounded
    away, at every step. A passive weight then never decays, whatever `decay_budget`
    says, and other layers stand still at small learning rates. Here the sum of
    parameter and update, :math:`x` in float32, goes to one of its two neighbours
    :math:`a \le x \le b` in half precision with

    .. math::
        P(b) = \frac{x - a}{b - a}, \qquad \text{so that } \mathbb{E} = x.

    `inner` sees parameters and gradients in float32, and its state is what it would be
    with float32 parameters: momentum too, unless it has an `accumulator_dtype`. Other
    leaves are left as they are. The parameters are all there is: no copy of them is
    kept, so that what prunes or restores them in mid-training needs nothing from here.
    An update of zero moves nothing, zeros stay zero, NaN and infinity show. On a CPU
    the random bits cost several times what `gsm_sgd` itself does.

    Where memory allows keep parameters in float32 and compute in half precision (flax:
    `param_dtype=jnp.float32, dtype=jnp.bfloat16`), which needs nothing of this.

    Random bits depend on `seed`, the step and the entry. They are the same on any mesh
    (inside `jax.shard_map` and `jax.pmap`, each part draws as though it were alone).

    It goes around everything that changes updates, `freeze_pruned` included. Updates
    have the dtype of the parameters, and `optax.apply_updates` gives the rounded sum
    exactly, except that an update that is greater than its parameter may be out by two
    units in its own last place. float16 rounds to nearest below 6e-5.

    Args:
        inner: an optax optimizer or chain, such as `gsm_sgd`.
        seed: of the random bits, a whole number.

    Returns:
        An `optax.GradientTransformationExtraArgs`, whose `update` needs `params`.

    Raises:
        ValueError: if `seed` is no whole number; from `update` without `params`.

    Example:
        Half of the decay budget of 12; one step changes a weight by 0.06 %:

        >>> import jax, jax.numpy as jnp, optax
        >>> from gsm_optax import gsm_sgd, stochastic_rounding
        >>> tx = gsm_sgd(1e-2, ratio=0.5, momentum=0.9, weight_decay=6e-3)
        >>> tx = stochastic_rounding(tx, seed=0)
        >>> params = {"kernel": jnp.ones((32, 32), jnp.bfloat16)}
        >>> def step(carry, _):
        ...     params, state = carry
        ...     grads = jax.tree.map(jnp.zeros_like, params)
        ...     updates, state = tx.update(grads, state, params)
        ...     return (optax.apply_updates(params, updates), state), None
        >>> start = params, tx.init(params)
        >>> (params, _), _ = jax.lax.scan(step, start, length=10_000)
        >>> weights = params["kernel"].astype(jnp.float32)
        >>> print(f"{weights.mean():.3f}, wanted {jnp.exp(-6):.3f}")
        0.002, wanted 0.002

    References:
        Zamirai et al., *Revisiting BFloat16 Training*, 2020,
        https://arxiv.org/abs/2010.06192
    """
    seed = check_count("seed", seed, 0, "the start of the random bits")
    tx = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        inner_state = tx.init(jax.tree.map(_widen, params))
        return StochasticRoundingState(jnp.zeros((), jnp.int32), inner_state)

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "stochastic_rounding rounds param + update and needs the parameters: "
                "call tx.update(grads, state, params)."
            )
        updates, inner_state = tx.update(
            jax.tree.map(_widen, updates),
            state.inner_state,
            jax.tree.map(_widen, params),
            **extra_args,
        )
        # Named, because other default generators draw by how an array is split.
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(key, state.rounding_step)
        updates, treedef = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
        updates = [
            _rounded_step(jax.random.fold_in(key, i), param, update)
            if update is not None and _is_half(param)
            else update
            for i, (param, update) in enumerate(
                zip(treedef.flatten_up_to(params), updates, strict=True)
            )
        ]
        step: Any = optax.safe_increment(state.rounding_step)
        new_state = StochasticRoundingState(step, inner_state)
        return jax.tree.unflatten(treedef, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_half(leaf: Any) -> bool:
    return jnp.result_type(leaf) in (jnp.bfloat16, jnp.float16)


def _widen(leaf: Any) -> Any:
    return jnp.asarray(leaf, jnp.float32) if _is_half(leaf) else leaf


def _rounded_step(key: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
    """The step, in the dtype of `param`, to the stochastically rounded sum.

    The sum is rounded where the step to it is a number in half precision: a difference
    of neighbours within a factor of two is (Sterbenz). Where parameter and update
    cancel it is not; there the update is rounded, and the sum is exact.
    """
    start, update = _widen(param), update.astype(jnp.float32)
    total = start + update
    cancel = jnp.abs(update) > jnp.abs(total)
    rounded = _round(key, jnp.where(cancel, update, total), param.dtype)
    step = jnp.where(cancel, rounded, rounded - start)
    # From infinity no step leads anywhere; the difference would be NaN.
    return jnp.where(jnp.isfinite(start), step, update).astype(param.dtype)


def _round(key: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """Round float32 to one of its neighbours in `dtype`; the result is float32.

    Random bits are added to those that will be dropped, and carry with the right
    probability.
    """
    lowest = np.uint32(2 ** (23 - jnp.finfo(dtype).nmant) - 1)
    random = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=_explicit(x))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + (random.astype(jnp.uint32) & lowest)) & ~lowest
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x)


def _explicit(x: jax.Array) -> Any:
    """The sharding in the type of `x`, if its mesh has Explicit axes."""
    sharding = jax.typeof(x).sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None
