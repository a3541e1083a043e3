"""Before a run is paid for: will pruning be lossless?"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsm_optax._checks import check_momentum, check_weight_decay, is_static

SUFFICIENT = 12.0  # budgets from here on cost no accuracy at pruning
RISKY = 8.0  # below this the final pruning was seen to cost accuracy


class DecayBudget(NamedTuple):
    """How far a run shrinks a weight that stays passive; see `decay_budget`."""

    total: float  # Σ α_k η / (1 − β)
    remaining: float  # fraction of a passive weight that is left, exp(−total)
    advice: str  # what it means and what to change

    def __str__(self) -> str:
        """Return the figures and the advice, to be printed."""
        return (
            f"decay budget {self.total:.3g}: a passive weight shrinks to "
            f"{self.remaining:.2g} of itself. {self.advice}"
        )


def decay_budget(
    learning_rate: optax.ScalarOrSchedule,
    steps: int,
    *,
    momentum: float = 0.98,
    weight_decay: float = 1e-4,
) -> DecayBudget:
    r"""Tell whether a planned `gsm` run will shrink passive weights to nothing.

    A weight that is never active shrinks by about :math:`\alpha\eta/(1-\beta)` a step,
    so that

    .. math::
        \text{total} = \sum_k \frac{\alpha_k \eta}{1 - \beta}, \qquad
        \text{remaining} = e^{-\text{total}}

    With a total below about 8 the final pruning was seen to cost accuracy; 12 or more
    cost none; the LeNet recipe of Ding et al., 2019, has 18.7.

    Args:
        learning_rate: :math:`\alpha`, a float or an optax schedule.
        steps: number of optimizer steps (not epochs).
        momentum: :math:`\beta`, in [0, 1), as given to `gsm`.
        weight_decay: :math:`\eta`, as given to `gsm`.

    Returns:
        A `DecayBudget` (total, remaining, advice); print it to read it.

    Warns:
        UserWarning: if the total is below 8, when pruning is not likely to be lossless.

    Raises:
        ValueError: for arguments outside their range.

    Example:
        >>> import optax
        >>> from gsm_optax import decay_budget
        >>> steps = 280 * 234  # 280 epochs of MNIST in batches of 256
        >>> schedule = optax.piecewise_constant_schedule(
        ...     1e-2, {160 * 234: 0.1, 200 * 234: 0.1, 240 * 234: 0.1}
        ... )
        >>> budget = decay_budget(schedule, steps, momentum=0.99, weight_decay=5e-4)
        >>> print(budget)
        decay budget 19.2: a passive weight shrinks to 4.4e-09 of itself. Pruning ...
    """
    total = float(_decay_by_step(learning_rate, steps, momentum, weight_decay).sum())
    budget = DecayBudget(total, math.exp(-total), _advice(total, steps, weight_decay))
    if total < RISKY:
        warnings.warn(str(budget), stacklevel=2)
    return budget


def decay_budget_left(
    learning_rate: optax.ScalarOrSchedule,
    steps: int,
    *,
    momentum: float = 0.98,
    weight_decay: float = 1e-4,
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    r"""Make a function that tells how much of the decay budget is still to come.

    After :math:`k` steps it is :math:`\sum_{j \ge k} \alpha_j \eta / (1 - \beta)`: a
    weight that turns passive now will shrink to :math:`e^{-left}` of itself. For
    `metrics` and `Recorder`.

    Args:
        learning_rate: :math:`\alpha`, a float or an optax schedule.
        steps: number of optimizer steps (not epochs).
        momentum: :math:`\beta`, in [0, 1), as given to `gsm`.
        weight_decay: :math:`\eta`, as given to `gsm`.

    Returns:
        A function of the number of steps taken, as optax's schedules are: int or traced
        int32 in, float32 scalar out. It holds one float32 a step.

    Raises:
        ValueError: for arguments outside their range.

    Example:
        >>> from gsm_optax import decay_budget_left
        >>> left = decay_budget_left(0.01, 4000, momentum=0.98, weight_decay=0.006)
        >>> print(left(0), left(3000), left(4000))
        12.0 3.0 0.0
    """
    decays = _decay_by_step(learning_rate, steps, momentum, weight_decay)
    left = np.append(np.cumsum(decays[::-1])[::-1], 0).astype(np.float32)
    return lambda step: jnp.asarray(left)[jnp.clip(step, 0, int(steps))]


def _decay_by_step(
    learning_rate: Any, steps: Any, momentum: Any, weight_decay: Any
) -> np.ndarray:
    """Check the arguments; return α_k η / (1 − β) of every step k, float64."""
    check_momentum(momentum)
    check_weight_decay(weight_decay)
    if not (is_static(steps) and steps > 0 and steps == int(steps)):
        raise ValueError(
            f"steps={steps} must be a positive whole number of optimizer steps: epochs "
            "times batches per epoch."
        )
    if callable(learning_rate):
        rates = np.asarray(jax.vmap(learning_rate)(jnp.arange(int(steps))), np.float64)
    else:
        rates = np.full(int(steps), float(learning_rate))
    if not (rates >= 0).all():
        raise ValueError(
            f"learning_rate must not be negative or NaN, but reaches {rates.min()}."
        )
    return rates * weight_decay / (1 - momentum)


def _advice(total: float, steps: int, weight_decay: float) -> str:
    if total >= SUFFICIENT:
        return "Pruning should be lossless."
    doubt = "will" if total < RISKY else "may"
    if total == 0:
        return (
            f"Pruning {doubt} cost accuracy: nothing decays with a learning rate or "
            "weight decay of zero."
        )
    factor = SUFFICIENT / total
    return (
        f"Pruning {doubt} cost accuracy. For a budget of {SUFFICIENT:g} use "
        f"weight_decay={weight_decay * factor:.2g}, or {math.ceil(steps * factor)} "
        "steps at this mean learning rate, or a higher learning rate or momentum."
    )
