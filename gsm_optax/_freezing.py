"""Freeze the front of a network while the rest trains on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsm_optax._freezing_schedules import FreezingSchedule
from gsm_optax._paths import check_arrays, is_hole, is_masked, leaf_names, listed

Blocks = Sequence[str] | Callable[[str], int]  # path prefixes, or path -> block


class FreezeBlocksState(NamedTuple):
    """State of `freeze_blocks`."""

    step: jax.Array  # int32, shape (): where the schedule is
    inner_state: Any  # of the optimizer inside


def freeze_blocks(
    inner: optax.GradientTransformation, schedule: FreezingSchedule, block_of: Blocks
) -> optax.GradientTransformationExtraArgs:
    """Freeze as many leading blocks as the schedule says, around any optimizer.

    Block i is frozen at step t if `i < schedule(t)`. For as long as that lasts

    * its parameters do not move: its updates are exactly zero, decay included;
    * what the optimizer holds for its parameters (momentum, Adam's moments) does not
      move either, bit for bit, and after thawing goes on from there;
    * scalars of the optimizer (steps of its schedules, hyperparameters) go on;
    * the rest trains as though the frozen blocks were not there: to the optimizer their
      gradients are zero, so that a global norm is over the rest; and it is told with
      the extra argument `trainable` which leaves take part, so that under `gsm` the
      choice runs over the blocks that train, and the ratio is of their entries.

    Frozen gradients may be anything, NaN too. They can be left out of the backward pass
    altogether, which is what saves time: see `stop_frozen_gradients`. This here costs a
    pass over gradients, updates and what the optimizer holds.

    Under `gsm` nothing decays while it is frozen, so the decay budget of a block ends
    with its training: to be pruned without loss it needs `decay_budget(..., steps)`
    of the steps in which it is trained.

    It goes around everything that holds momentum or decays, another `freeze_blocks` as
    well: what either freezes is frozen. The schedule is traced: nothing is compiled
    again when the number of frozen blocks changes.

    Args:
        inner: an optax optimizer or chain whose state can be told apart by parameter:
            not `optax.flatten` or `optax.sm3`.
        schedule: from the step, a traced int32 scalar, to the number of leading blocks
            frozen: `single_shot`, `periodic`, or a function of one's own.
        block_of: which block a parameter is in, by its path as `sparsity_report` names
            it: either path prefixes, one a block, the block nearest the input first
            (`["conv1", "conv2", "head"]`; whole names, the longest that matches
            counts), or a function from the path to the number of the block.

    Returns:
        An `optax.GradientTransformationExtraArgs`, whose state adds the step.

    Raises:
        ValueError: if `schedule` is no function; from `init` if a parameter has no
            block, if a prefix matches none, or if `inner` holds what belongs to no
            single parameter.

    Example:
        The first layer is trained for two steps:

        >>> import jax.numpy as jnp, optax
        >>> from gsm_optax.freezing import freeze_blocks, single_shot
        >>> schedule = single_shot(start=2, interval=1, blocks=1)
        >>> tx = freeze_blocks(optax.sgd(1.0), schedule, ["first", "last"])
        >>> params = {"first": jnp.zeros(2), "last": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> for _ in range(4):
        ...     grads = {"first": -jnp.ones(2), "last": -jnp.ones(2)}
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(params["first"], params["last"])
        [2. 2.] [4. 4.]

    References:
        Yuan et al., *Layer Freezing & Data Sieving: Missing Pieces of a Generic
        Framework for Sparse Training*, NeurIPS 2022, https://arxiv.org/abs/2209.11204
    """
    if not callable(schedule):
        raise ValueError(
            f"schedule={schedule!r} must be a function from the step to the number of "
            "leading blocks frozen, such as single_shot(start, interval, blocks)."
        )
    _check_block_of(block_of)
    tx = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        _check_fit(block_of, params)
        inner_state = tx.init(params)
        _check_state(tx, inner_state, _blocks(block_of, params))
        return FreezeBlocksState(jnp.zeros((), jnp.int32), inner_state)

    def update_fn(updates, state, params=None, *, trainable=None, **extra_args):
        num_frozen = jnp.asarray(schedule(state.step), jnp.int32)
        blocks = _blocks(block_of, updates if params is None else params)
        unfrozen = jax.tree.map(lambda block: block >= num_frozen, blocks)
        if trainable is None:
            trainable = unfrozen
        else:  # frozen by another `freeze_blocks`, around this one
            trainable = jax.tree.map(_both, unfrozen, trainable, is_leaf=is_masked)
        grads = jax.tree.map(_or_zero, trainable, updates)
        updates, inner_state = tx.update(
            grads, state.inner_state, params, trainable=trainable, **extra_args
        )
        inner_state = _hold(tx, trainable, inner_state, state.inner_state)
        step: Any = optax.safe_increment(state.step)
        updates = jax.tree.map(_or_zero, trainable, updates)
        return updates, FreezeBlocksState(step, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def stop_frozen_gradients(params: Any, num_frozen: int, block_of: Blocks) -> Any:
    """Cut the gradient of the frozen blocks, so that no backward pass is made for them.

    Inside the loss, before the parameters are used. The forward pass is the same; but
    because nothing in front of the first trained block needs a gradient, the compiler
    drops the backward pass of the whole front. Gradients of frozen parameters are zero.

    The number of frozen blocks shapes the program, so it must be static: a step is
    compiled once for every number that occurs, not once a step. The schedule is asked
    on the host for the same steps that `freeze_blocks` counts, and for all of them
    before the run: asked step by step it would wait for the device. (Where a wrapper
    around `freeze_blocks` leaves steps out, as `optax.MultiSteps` does, the host has to
    count as it does: see `FreezeBlocksState.step`.)

    Args:
        params: pytree of arrays, as `freeze_blocks` sees it.
        num_frozen: number of leading blocks that are frozen, a Python int.
        block_of: which block a parameter is in, as in `freeze_blocks`.

    Returns:
        A pytree like `params`, with the same values.

    Raises:
        ValueError: if `num_frozen` is traced or negative; if a parameter has no block,
            or if a prefix matches none.

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp, optax
        >>> from gsm_optax.freezing import freeze_blocks, single_shot
        >>> from gsm_optax.freezing import stop_frozen_gradients
        >>> blocks, schedule = ["first", "last"], single_shot(2, interval=1, blocks=1)
        >>> tx = freeze_blocks(optax.sgd(0.1, momentum=0.9), schedule, blocks)
        >>> @partial(jax.jit, static_argnames="num_frozen")
        ... def train_step(params, state, x, num_frozen):
        ...     def loss(params):
        ...         params = stop_frozen_gradients(params, num_frozen, blocks)
        ...         return jnp.sum(jnp.tanh(x @ params["first"]) @ params["last"])
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> params, x = {"first": jnp.eye(3), "last": jnp.ones(3)}, jnp.ones((2, 3))
        >>> state = tx.init(params)
        >>> for num_frozen in schedule(jnp.arange(4)).tolist():
        ...     params, state = train_step(params, state, x, num_frozen)
        >>> train_step._cache_size()  # compiled for 0 and for 1 frozen block
        2
    """
    if not isinstance(num_frozen, int | np.integer) or num_frozen < 0:
        raise ValueError(
            f"num_frozen={num_frozen!r} must be a Python int of 0 or more, because the "
            "program depends on it: jax.jit(step, static_argnames='num_frozen'), "
            "called with one of schedule(jnp.arange(steps)).tolist()."
        )
    _check_block_of(block_of)
    _check_fit(block_of, params)
    return jax.tree.map(
        lambda block, x: jax.lax.stop_gradient(x) if block < num_frozen else x,
        _blocks(block_of, params),
        params,
    )


def _hold(tx: Any, trainable: Any, new: Any, old: Any) -> Any:
    """The new state, but the old one where it belongs to frozen parameters."""

    def flag_of(value, flag):
        return value if is_masked(value) else flag

    # A tree like the state, with the flag of the parameter in place of what is held
    # for it, and True in place of everything else.
    flags = optax.tree_map_params(
        tx,
        flag_of,
        new,
        trainable,
        transform_non_params=lambda _: True,
        is_leaf=is_hole,
    )

    def choose(flag, a, b):
        if a is None:  # optax.trace forgets the momentum of what has no gradient
            return b
        return a if flag is True else jnp.where(flag, a, b)

    return jax.tree.map(choose, flags, new, old)


def _check_state(tx: Any, state: Any, blocks: Any) -> None:
    """Raise `ValueError` unless `_hold` can find its way in the state."""
    flags = jax.tree.map(lambda _: jnp.ones((), bool), blocks)
    try:
        jax.eval_shape(lambda state: _hold(tx, flags, state, state), state)
    except Exception as error:
        raise ValueError(
            "freeze_blocks cannot tell which part of the state of `inner` belongs to "
            "which parameter, as with optax.flatten or optax.sm3: use another "
            f"optimizer, or leave that wrapper out. ({error})"
        ) from error


def _both(unfrozen: Any, trainable: Any) -> Any:
    if is_masked(unfrozen):  # optax.masked, between the two, took it out
        return unfrozen
    return jnp.logical_and(unfrozen, trainable)


def _or_zero(flag: Any, leaf: Any) -> Any:
    # where, not a product: a NaN or infinite gradient of a frozen block is zero too.
    if leaf is None or jnp.result_type(leaf) == jax.dtypes.float0:
        return leaf
    return jnp.where(flag, leaf, jnp.zeros_like(leaf))


def _blocks(block_of: Blocks, tree: Any) -> Any:
    """Tree of ints: the block of every leaf."""
    prefixes = () if callable(block_of) else tuple(block_of)
    find = block_of if callable(block_of) else partial(_by_prefix, prefixes)
    blocks: dict[str, Any] = {path: find(path) for path in leaf_names(tree)}
    homeless = [path for path, block in blocks.items() if not _is_index(block)]
    if homeless:
        raise ValueError(
            f"block_of leaves parameters without a block: {listed(homeless)}. "
            "Every one needs a block, numbered from 0, nearest the input, on."
        )
    return jax.tree.unflatten(jax.tree.structure(tree), map(int, blocks.values()))


def _by_prefix(prefixes: Sequence[str], path: str) -> int | None:
    """The longest prefix that fits, by whole names: dense is none of dense2/kernel."""
    fitting = [p for p in prefixes if f"{path}/".startswith(f"{p}/")]
    return prefixes.index(max(fitting, key=len)) if fitting else None


def _is_index(value: Any) -> bool:
    return isinstance(value, int | np.integer) and value >= 0


def _check_block_of(block_of: Any) -> None:
    if callable(block_of):
        return
    several = isinstance(block_of, Sequence) and not isinstance(block_of, str)
    prefixes = list(block_of) if several else []
    strings = all(isinstance(prefix, str) for prefix in prefixes)
    if not prefixes or not strings or len(set(prefixes)) < len(prefixes):
        raise ValueError(
            f"block_of={block_of!r} must be different path prefixes, one a block, the "
            'block nearest the input first, as in ["conv1", "conv2", "head"]; or a '
            "function from the path to the number of the block."
        )


def _check_fit(block_of: Blocks, params: Any) -> None:
    """Raise `ValueError` unless parameters and blocks fit each other."""
    check_arrays(params)
    used = set(jax.tree.leaves(_blocks(block_of, params)))
    if callable(block_of) or not used:  # optax.tree_map_params: a tree without leaves
        return
    idle = [repr(p) for i, p in enumerate(block_of) if i not in used]
    if idle:
        raise ValueError(
            f"block_of names {', '.join(idle)}, which no parameter is in. There are "
            f"{listed(leaf_names(params))}."
        )
