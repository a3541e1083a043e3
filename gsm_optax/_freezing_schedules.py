"""Which blocks are frozen when, and what that saves.

The model is cut into consecutive blocks, the first nearest the input. Frozen is always
a prefix of them, so that a scheme is a schedule: from the step to the number of leading
blocks that are frozen. The schemes are those of Yuan et al., *Layer Freezing & Data
Sieving: Missing Pieces of a Generic Framework for Sparse Training*, NeurIPS 2022.

This file knows only jax.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax._checks import check_count

FreezingSchedule = Callable[[Any], jax.Array]  # steps -> int32, leading blocks frozen


def single_shot(start: int, interval: int, blocks: int) -> FreezingSchedule:
    r"""Freeze one block at `start`, one more every `interval` steps, up to `blocks`.

    .. math::
        k(t) = \min\left(\left\lfloor \frac{t - start}{interval} \right\rfloor + 1,\;
        blocks\right) \quad \text{for } t \ge start, \text{ else } 0

    A frozen block stays frozen. Of four schemes at equal cost Yuan et al., 2022, found
    this one to be the most accurate; they freeze about two thirds of the layers.

    Args:
        start: the step from which the first block is frozen.
        interval: steps from one block to the next.
        blocks: how many blocks are frozen in the end.

    Returns:
        A function of the step, an int or an int32 array of any shape, traced or not, to
        the number of leading blocks frozen, int32, same shape.

    Raises:
        ValueError: for arguments that are no whole numbers, or too small.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax.freezing import single_shot
        >>> single_shot(start=4, interval=2, blocks=3)(jnp.arange(12)).tolist()
        [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    """
    start = check_count(
        "start", start, 0, "the step from which the first block is frozen"
    )
    interval = check_count("interval", interval, 1, "steps from one block to the next")
    blocks = check_count("blocks", blocks, 1, "how many blocks are frozen in the end")

    def schedule(step: Any) -> jax.Array:
        since = jnp.asarray(step, jnp.int32) - np.int32(start)
        # Rounded down: less than one interval ahead of the start this is -1 + 1.
        return jnp.clip(since // np.int32(interval), -1, blocks - 1) + 1

    return schedule


def single_shot_resume(
    start: int, interval: int, blocks: int, *, steps: int, resume: int
) -> FreezingSchedule:
    r"""Freeze as `single_shot`, but `resume` steps earlier, and thaw for the last ones.

    .. math::
        k(t) = k_\text{single shot}(t + resume) \quad \text{for } t < steps - resume,
        \text{ else } 0

    Every block is frozen for as many steps as under `single_shot(start, interval,
    blocks)`, so that it saves the same; and in the last `resume` steps, when the
    learning rate is small, the whole network is trained (Yuan et al., 2022).

    Args:
        start: where `single_shot` would start, at least `resume`.
        interval: steps from one block to the next.
        blocks: how many blocks are frozen in the end.
        steps: steps of the whole run.
        resume: steps at its end in which nothing is frozen.

    Returns:
        A function of the step, an int or an int32 array of any shape, traced or not, to
        the number of leading blocks frozen, int32, same shape.

    Raises:
        ValueError: for arguments that are no whole numbers, too small, or in conflict.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax.freezing import single_shot_resume
        >>> schedule = single_shot_resume(4, 2, blocks=3, steps=12, resume=3)
        >>> schedule(jnp.arange(12)).tolist()
        [0, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0, 0]
    """
    steps = check_count("steps", steps, 1, "steps of the whole run")
    resume = check_count(
        "resume", resume, 0, "steps at the end in which nothing is frozen"
    )
    frozen = single_shot(start, interval, blocks)
    if not resume <= start < steps:
        raise ValueError(
            f"start={start} must be at least resume={resume}, by which everything is "
            f"frozen earlier, and below steps={steps}: start later or resume less."
        )

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        early = frozen(step + np.int32(resume))
        return jnp.where(step < np.int32(steps - resume), early, 0)

    return schedule


def periodic(periods: Sequence[int], interval: int) -> FreezingSchedule:
    r"""Train block i in one stretch of `interval` steps out of every `periods[i]`.

    .. math::
        k(t) = \#\{i : \lfloor t / interval \rfloor \bmod p_i \ne 0\}

    The first stretch trains everything. Because every period divides those before it, a
    block is never frozen while one nearer to the input is trained (Yuan et al., 2022).

    Args:
        periods: :math:`p_i` of every block, first the one nearest the input: powers of
            two that fall towards the output, or stay, and end with 1, because the last
            block is never frozen: (4, 2, 2, 1).
        interval: steps of a stretch, an epoch for example.

    Returns:
        A function of the step, an int or an int32 array of any shape, traced or not, to
        the number of leading blocks frozen, int32, same shape.

    Raises:
        ValueError: for other periods, or an interval that is no positive number.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax.freezing import periodic
        >>> periodic(periods=(4, 2, 1), interval=1)(jnp.arange(12)).tolist()
        [0, 2, 1, 2, 0, 2, 1, 2, 0, 2, 1, 2]
    """
    interval = check_count(
        "interval", interval, 1, "steps of a stretch, an epoch for example"
    )
    _check_periods(periods)
    blocks_with = Counter(map(int, periods))

    def schedule(step: Any) -> jax.Array:
        stretch = jnp.asarray(step, jnp.int32) // np.int32(interval)
        rests = [
            np.int32(blocks) * (stretch % np.int32(period) != 0).astype(jnp.int32)
            for period, blocks in blocks_with.items()
        ]
        return sum(rests, jnp.zeros_like(stretch))

    return schedule


def delayed_periodic(
    delay: int, periods: Sequence[int], interval: int
) -> FreezingSchedule:
    """Train everything for `delay` steps, then as `periodic`.

    Args:
        delay: steps before the first period, which again starts with everything.
        periods: one of every block, as in `periodic`.
        interval: steps of a stretch, an epoch for example.

    Returns:
        A function of the step, an int or an int32 array of any shape, traced or not, to
        the number of leading blocks frozen, int32, same shape.

    Raises:
        ValueError: as `periodic`; and for a delay that is no number of steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax.freezing import delayed_periodic
        >>> delayed_periodic(5, periods=(4, 2, 1), interval=1)(jnp.arange(12)).tolist()
        [0, 0, 0, 0, 0, 0, 2, 1, 2, 0, 2, 1]
    """
    delay = check_count("delay", delay, 0, "steps before the first period")
    frozen = periodic(periods, interval)
    # Step 0 of the periods trains everything, and so do all steps before it.
    return lambda step: frozen(
        jnp.maximum(jnp.asarray(step, jnp.int32) - np.int32(delay), 0)
    )


def freezing_saving(
    schedule: FreezingSchedule,
    steps: int,
    *,
    forward: Sequence[float],
    backward: Sequence[float],
) -> float:
    r"""Fraction of a run's training cost that a freezing schedule saves.

    With forward and backward costs :math:`f_i, b_i` of the blocks,

    .. math::
        \frac{\sum_{t < steps} \sum_{i < k(t)} b_i}{steps \cdot \sum_i (f_i + b_i)}

    because the forward pass always runs, and a frozen block needs no backward pass.

    What freezing a block takes out of the backward pass is the gradient of its weights,
    and that of its *output*, which is the gradient of the next block's input; so the
    latter belongs to this block's cost. Where nothing else is known, let each of the
    two cost what the forward pass does: :math:`b_i = f_i + f_{i+1}`, and :math:`f_i`
    for the last block.

    Args:
        schedule: from the step to the number of leading blocks frozen.
        steps: steps of the whole run.
        forward: cost of the forward pass of every block, in any unit: FLOPs, seconds.
        backward: cost of the backward pass that ends with every block frozen in turn,
            in the same unit: of its weights' gradient, and its output's.

    Returns:
        A fraction in [0, 1).

    Raises:
        ValueError: for costs that are negative or do not match; for a schedule that
            freezes more blocks than there are.

    Example:
        >>> from gsm_optax.freezing import freezing_saving, single_shot
        >>> schedule = single_shot(start=60, interval=10, blocks=2)
        >>> freezing_saving(schedule, 100, forward=[1, 1, 1], backward=[2, 2, 1])
        0.17...
    """
    steps = check_count("steps", steps, 1, "steps of the whole run")
    costs, total = _check_costs(forward, backward)
    frozen = np.asarray(jax.vmap(schedule)(jnp.arange(steps, dtype=jnp.int32)), int)
    if frozen.min() < 0 or frozen.max() > len(costs):
        raise ValueError(
            f"the schedule freezes {frozen.min()} to {frozen.max()} blocks, but costs "
            f"are given for {len(costs)}: give every block its cost."
        )
    saved = np.append(0.0, np.cumsum(costs))[frozen]
    return float(saved.mean() / total)


def single_shot_start(
    saving: float,
    steps: int,
    interval: int,
    blocks: int,
    *,
    forward: Sequence[float],
    backward: Sequence[float],
) -> int:
    """Latest start at which `single_shot` still saves so much of the training cost.

    Args:
        saving: the wanted fraction of the training cost, as `freezing_saving` counts
            it. Yuan et al., 2022, found up to 0.15 to cost no accuracy.
        steps: steps of the whole run.
        interval: steps from one block to the next.
        blocks: how many blocks are frozen in the end.
        forward: cost of the forward pass of every block, as in `freezing_saving`.
        backward: cost of the backward pass of every block, as there.

    Returns:
        The `start` of `single_shot`; and of `single_shot_resume`, which saves the same.

    Raises:
        ValueError: if not even a start at step 0 saves so much; for arguments outside
            their range.

    Example:
        >>> from gsm_optax.freezing import single_shot_start
        >>> costs = {"forward": [1, 1, 1], "backward": [2, 2, 1]}
        >>> single_shot_start(0.15, 100, interval=10, blocks=2, **costs)
        65
    """
    single_shot(0, interval, blocks)  # checks both
    interval, blocks = int(interval), int(blocks)
    steps = check_count("steps", steps, 1, "steps of the whole run")
    costs, total = _check_costs(forward, backward)
    if blocks > len(costs):
        raise ValueError(
            f"blocks={blocks} are to be frozen, but costs are given for "
            f"{len(costs)}: give every block its cost, or freeze fewer."
        )
    later = np.arange(blocks, dtype=np.int64) * interval

    def saved(start: int) -> float:
        frozen_for = np.maximum(steps - start - later, 0)
        return float(frozen_for @ costs[:blocks] / (steps * total))

    if not 0 < saving <= saved(0):
        raise ValueError(
            f"saving={saving} must be in (0, {saved(0):.4g}]: freezing {blocks} blocks "
            "from step 0 on saves no more. Freeze more blocks, or at shorter intervals."
        )
    # The later, the less is saved.
    late = bisect.bisect_right(range(steps), -saving, key=lambda start: -saved(start))
    return late - 1


def _check_periods(periods: Any) -> None:
    if (
        not isinstance(periods, Sequence | np.ndarray)
        or not all(isinstance(p, int | np.integer) and p >= 1 for p in periods)
        or not len(periods)
        or periods[-1] != 1
        or any(p & (p - 1) for p in periods)
        or any(before < after for before, after in pairwise(periods))
    ):
        raise ValueError(
            f"periods={periods!r} must be powers of two that fall towards the output, "
            "or stay, and end with 1, as in (4, 2, 2, 1): only so is the frozen part "
            "always at the front."
        )


def _check_costs(forward: Any, backward: Any) -> tuple[np.ndarray, float]:
    """Return backward costs, and the cost of a step in which nothing is frozen."""
    forward, backward = (np.asarray(x, np.float64) for x in (forward, backward))
    costs = np.concatenate([forward.ravel(), backward.ravel()])
    same = forward.shape == backward.shape and forward.ndim == 1
    if not (same and np.isfinite(costs).all() and (costs >= 0).all() and costs.any()):
        raise ValueError(
            f"forward={forward.tolist()} and backward={backward.tolist()} must hold "
            "one cost a block each, finite, not negative, and not all zero."
        )
    return backward, float(costs.sum())
