"""Before a run is paid for: will pruning be lossless?"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsm_optax._checks import check_count, check_decay, check_momentum, is_static

SUFFICIENT = 12.0  # budgets from here on cost hardly any accuracy at pruning
RISKY = 8.0  # below this the final pruning was seen to cost accuracy


IN_STEP = (
    "The learning rate rises and falls in step with the swings of passive weights, "
    "which feeds them. Use longer cycles or none, or less decay."
)


class DecayBudget(NamedTuple):
    """How far a run shrinks a weight that stays passive; see `decay_budget`."""

    total: float  # the sum of the rates r_k of all steps
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
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    passive_decay: optax.ScalarOrSchedule | None = None,
    nesterov: bool = False,
    ramp_steps: int = 0,
) -> DecayBudget:
    r"""Tell whether a planned `gsm` run will shrink passive weights to nothing.

    For a weight that is never active a step of `gsm_sgd` is linear,

    .. math::
        z \leftarrow \beta z + \eta_k w, \qquad w \leftarrow w - \alpha_k z,

    with eigenvalues :math:`h \pm \sqrt{h^2 - \beta}`, :math:`h = (1 + \beta -
    \alpha_k\eta_k) / 2`. It shrinks by the greater of them, that is at the rate

    .. math::
        r_k = \begin{cases}
        -\ln\left(h + \sqrt{h^2 - \beta}\right) & \text{if } h^2 \ge \beta
            \quad (\approx \alpha_k\eta_k / (1 - \beta)\text{: overdamped}) \\
        -\tfrac12 \ln \beta & \text{otherwise (it swings through zero)}
        \end{cases}

    so that more decay than :math:`\alpha\eta = (1 - \sqrt\beta)^2` does not make it
    any faster. Over the run

    .. math::
        \text{total} = \sum_k r_k, \qquad \text{remaining} = e^{-\text{total}}

    With a total below about 8 the final pruning was seen to cost accuracy; 12 or more
    cost hardly any, unless nearly all of it lies before the learning rate falls: what
    turns passive after that has none left (`decay_budget_left` tells how much). The
    LeNet recipe of Ding et al., 2019, has 20.3, and cost two points on MNIST here. A
    simulated weight lags behind by what momentum needs to build up: at most
    ln(1 + total), near that bound, and hardly anything far from it. Only a learning
    rate that rises and falls in step with the swings may feed them: where it goes in
    cycles a weight is simulated, and what is left of it counts if that is more.

    Args:
        learning_rate: :math:`\alpha`, a float or an optax schedule.
        steps: number of optimizer steps (not epochs).
        momentum: :math:`\beta`, in [0, 1), as given to `gsm`.
        weight_decay: :math:`\eta`, a float or an optax schedule, as given to `gsm`.
        passive_decay: as given to `gsm`; if it is not None, it is the one that acts.
        nesterov: as given to `gsm`. Then :math:`h = (1 + \beta)(1 - \alpha\eta) / 2`
            and :math:`\beta(1 - \alpha\eta)` stands for :math:`\beta` under the root
            and the logarithm: the same, unless :math:`\alpha\eta` is large.
        ramp_steps: as given to `ratio_ramp`, if the ratio rises. What turns passive at
            its end has only the steps after it, and the total is over these.

    Returns:
        A `DecayBudget` (total, remaining, advice); print it to read it. The advice
        names settings with a budget of 12: a decay, a number of steps, and where no
        decay can do it a smaller momentum.

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
        decay budget 20.3: a passive weight shrinks to 1.6e-09 of itself. Pruning ...
    """
    decays = (weight_decay, passive_decay)
    plan = _plan(learning_rate, steps, momentum, *decays, nesterov)
    plan = plan.after(check_count("ramp_steps", ramp_steps, 0, "those of ratio_ramp"))
    total = float(plan.rates().sum())
    with np.errstate(over="ignore"):  # weights that grow
        budget = DecayBudget(total, float(np.exp(-total)), _advice(plan, total))
    simulated = _simulated(plan) if _has_cycles(plan) else math.inf
    if simulated < total - math.log1p(max(total, 0)) - 1:
        total = simulated
        budget = DecayBudget(total, math.exp(-total), IN_STEP)
    if total < RISKY:
        warnings.warn(str(budget), stacklevel=2)
    return budget


def decay_budget_left(
    learning_rate: optax.ScalarOrSchedule,
    steps: int,
    *,
    momentum: float = 0.98,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    passive_decay: optax.ScalarOrSchedule | None = None,
    nesterov: bool = False,
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    r"""Make a function that tells how much of the decay budget is still to come.

    After :math:`k` steps it is :math:`\sum_{j \ge k} r_j`, with the rates of
    `decay_budget`: a weight that turns passive now will shrink to :math:`e^{-left}` of
    itself. For `metrics` and `Recorder`. Where a cyclical learning rate feeds the
    swings of a weight, it promises too much: ask `decay_budget`, which simulates them.

    Args:
        learning_rate: :math:`\alpha`, a float or an optax schedule.
        steps: number of optimizer steps (not epochs).
        momentum: :math:`\beta`, in [0, 1), as given to `gsm`.
        weight_decay: :math:`\eta`, a float or an optax schedule, as given to `gsm`.
        passive_decay: as given to `gsm`; if it is not None, it is the one that acts.
        nesterov: as given to `gsm`.

    Returns:
        A function of the number of steps taken, as optax's schedules are: int or traced
        int32 in, float32 scalar out. It holds one float32 a step.

    Raises:
        ValueError: for arguments outside their range.

    Example:
        >>> from gsm_optax import decay_budget_left
        >>> left = decay_budget_left(0.01, 4000, momentum=0.98, weight_decay=0.006)
        >>> for step in (0, 3000, 4000):
        ...     print(f"{left(step):.1f}")
        14.7
        3.7
        0.0
    """
    decays = (weight_decay, passive_decay)
    rates = _plan(learning_rate, steps, momentum, *decays, nesterov).rates()
    left = np.append(np.cumsum(rates[::-1])[::-1], 0).astype(np.float32)
    return lambda step: jnp.asarray(left)[jnp.clip(step, 0, int(steps))]


class _Plan(NamedTuple):
    """The settings of a run, checked, with one entry a step."""

    learning_rates: np.ndarray
    decays: np.ndarray
    momentum: float
    nesterov: bool
    decay: float | None  # None where it is a schedule
    name: str  # of the decay: weight_decay or passive_decay
    ramp_steps: int = 0  # that went before

    @property
    def steps(self) -> int:
        """All steps of the run."""
        return self.ramp_steps + len(self.decays)

    def after(self, ramp_steps: int) -> "_Plan":
        """The rest of the run, after a ramp."""
        if ramp_steps >= self.steps:
            raise ValueError(
                f"ramp_steps={ramp_steps} leave nothing of steps={self.steps}: what "
                "turns passive last would not decay at all. Try 0.6 of the steps."
            )
        return self._replace(
            learning_rates=self.learning_rates[ramp_steps:],
            decays=self.decays[ramp_steps:],
            ramp_steps=ramp_steps,
        )

    def rates(self) -> np.ndarray:
        """How fast a passive weight shrinks at every step: see `decay_budget`."""
        pushes = self.learning_rates * self.decays
        return _rates(pushes, self.momentum, self.nesterov)

    def with_decay(self, factor: float) -> "_Plan":
        """The same plan with `factor` times the decay, rounded up to two digits."""
        if self.decay is None:
            decays = self.decays * _round_up(factor, 2)
            return self._replace(decays=decays)
        decay = _round_up(self.decay * factor, 2)
        decays = np.full_like(self.decays, decay)
        return self._replace(decays=decays, decay=decay)


def _rates(pushes: np.ndarray, momentum: float, nesterov: bool) -> np.ndarray:
    """−ln of the spectral radius of a step in which αη is `pushes`."""
    damped = 1 - pushes if nesterov else np.ones_like(pushes)
    half = ((1 + momentum) * damped if nesterov else 1 + momentum - pushes) / 2
    product = momentum * damped  # of the two eigenvalues
    disc = half**2 - product
    root = np.sqrt(np.maximum(disc, 0))
    with np.errstate(divide="ignore", invalid="ignore"):  # a rate may be infinite
        swinging = -0.5 * np.log(np.maximum(product, 0))
        # (1 − λ₁)(1 − λ₂) = αη. So written a small rate does not cancel.
        overdamped = -np.log1p(-pushes / (1 - (half - root)))
        overshooting = -np.log(root - half)  # the greater eigenvalue is negative
    real = np.where(half >= 0, overdamped, overshooting)
    return np.where(disc < 0, swinging, real)


def _has_cycles(plan: _Plan) -> bool:
    """Whether αη rises and falls more than twice."""
    slopes = np.sign(np.diff(plan.learning_rates * plan.decays))
    slopes = slopes[slopes != 0]
    return int(np.count_nonzero(slopes[1:] != slopes[:-1])) > 4


def _simulated(plan: _Plan) -> float:
    """−ln of what is left of a passive weight, the greatest in the last twentieth."""
    weight, momentum, greatest = 1.0, 0.0, 1e-300
    last = len(plan.decays) - max(len(plan.decays) // 20, 1)
    steps = zip(plan.learning_rates.tolist(), plan.decays.tolist(), strict=True)
    for i, (rate, decay) in enumerate(steps):
        momentum = plan.momentum * momentum + decay * weight
        ahead = plan.momentum * momentum + decay * weight
        weight -= rate * (ahead if plan.nesterov else momentum)
        if not abs(weight) < 1e300:
            return -math.log(1e300)
        if i >= last:
            greatest = max(greatest, abs(weight))
    return -math.log(greatest)


def _plan(
    learning_rate: Any,
    steps: Any,
    momentum: Any,
    weight_decay: Any,
    passive_decay: Any,
    nesterov: bool,
) -> _Plan:
    """Check the arguments, and ask the schedules for every step."""
    check_momentum(momentum)
    check_decay("weight_decay", weight_decay)
    acting, decay = "weight_decay", weight_decay
    if passive_decay is not None:
        check_decay("passive_decay", passive_decay)
        acting, decay = "passive_decay", passive_decay
    steps = check_count("steps", steps, 1, "epochs times batches per epoch")
    return _Plan(
        _by_step("learning_rate", learning_rate, steps),
        _by_step(acting, decay, steps),
        float(momentum),
        nesterov,
        None if callable(decay) else float(decay),
        acting,
    )


def _by_step(name: str, value: Any, steps: int) -> np.ndarray:
    """The values of a float or schedule at all steps, float64, none negative."""
    if callable(value):
        try:
            values = np.asarray(jax.jit(jax.vmap(value))(jnp.arange(steps)), np.float64)
        except jax.errors.ConcretizationTypeError as error:
            raise ValueError(
                f"{name}={value!r} branches on the step in Python, which no optimizer "
                "can trace: use jnp.where, or optax.join_schedules."
            ) from error
    elif is_static(value) or isinstance(value, jax.Array | np.ndarray):
        values = np.asarray(value, np.float64)
    else:
        raise ValueError(f"{name}={value!r} must be a number or an optax schedule.")
    if values.shape != ((steps,) if callable(value) else ()):
        raise ValueError(
            f"{name} must be one number a step, but there are {values.size}: a scalar, "
            "or a schedule that returns a scalar."
        )
    if not (values >= 0).all():
        raise ValueError(
            f"{name} must not be negative or NaN, but reaches {values.min()}."
        )
    return np.broadcast_to(values, (steps,))


# Advice. Every setting that it names has been computed with the same rates, as rounded.


def _advice(plan: _Plan, total: float) -> str:
    if total >= SUFFICIENT:
        return "Pruning should be lossless."
    doubt = f"Pruning {'will' if total < RISKY else 'may'} cost accuracy"
    pushes = plan.learning_rates * plan.decays
    if not pushes.any():
        return (
            f"{doubt}: nothing decays with a learning rate or {_words(plan)} of zero."
        )
    if total <= 0:
        return (
            f"{doubt}: steps of αη = {pushes.max():.2g} overshoot, and weights grow "
            f"rather than shrink. Use a smaller learning rate or {_words(plan)}."
        )
    doubt = f"{doubt}. For a budget of {SUFFICIENT:g} use"
    more_decay = _sufficient(plan, 10)
    if more_decay:
        return f"{doubt} {_decay(plan, more_decay)}, or {_more_steps(plan, total)}."
    remedies = f"{_smaller_momentum(plan)}, or {_more_steps(plan, total)}"
    return (
        f"{doubt} {remedies}. More {_words(plan)} "
        f"alone will not reach it: with momentum={plan.momentum:g} a weight "
        f"keeps {'about' if plan.nesterov else 'at least'} "
        f"{math.sqrt(plan.momentum):.4g} of itself a step."
    )


def _sufficient(plan: _Plan, times: float) -> _Plan | None:
    """The plan with the least decay that suffices, or None if there is none.

    Considered are decays of up to `times` (1 − √β)² / α, from where on more does not
    help a step. The rates grow with the decay as long as αη is below 1.
    """
    greatest = (plan.learning_rates * plan.decays).max()
    critical = (1 - math.sqrt(plan.momentum)) ** 2
    low, high = 1.0, max(1.0, min(1.0, times * critical) / greatest)
    if not _suffices(plan.with_decay(high)):
        return None
    while high > low * 1.0001:
        middle = math.sqrt(low * high)
        enough = _suffices(plan.with_decay(middle))
        low, high = (low, middle) if enough else (middle, high)
    return plan.with_decay(high)


def _suffices(plan: _Plan) -> bool:
    # A schedule's values are float32 and may come out a little differently.
    return bool(plan.rates().sum() >= SUFFICIENT * (1 + 1e-6))


def _smaller_momentum(plan: _Plan) -> str:
    """The greatest momentum under which some decay suffices, and that decay."""
    for hundredths in [*range(99, 90, -1), *range(90, 0, -5), 0]:
        momentum = hundredths / 100
        if momentum >= plan.momentum:
            continue
        smaller = plan._replace(momentum=momentum)
        if _suffices(smaller):
            return f"momentum={momentum:g}"
        found = _sufficient(smaller, 1)
        if found:
            return f"momentum={momentum:g} with {_decay(plan, found)}"
    return "another learning rate"


def _decay(old: _Plan, new: _Plan) -> str:
    if new.decay is not None:
        return f"{new.name}={new.decay:g}"
    factor = new.decays.max() / old.decays.max()
    return f"{factor:.3g} times the {_words(new)}"


def _words(plan: _Plan) -> str:
    return plan.name.replace("_", " ")


def _more_steps(plan: _Plan, total: float) -> str:
    scheduled = bool(np.ptp(plan.learning_rates) or np.ptp(plan.decays))
    parts = ["the schedule"] * scheduled + ["the ramp"] * (plan.ramp_steps > 0)
    stretched = " and ".join(parts)
    if stretched:
        # A sum over few steps of a falling schedule is greater than its share of many.
        total = max(total - float(plan.rates().max()), total / 2)
    steps = _round_up(SUFFICIENT * (1 + 1e-6) / total * plan.steps, 3)
    ending = f", with {stretched} stretched to match" if stretched else ""
    return f"{steps:.0f} steps{ending}"


def _round_up(value: float, digits: int) -> float:
    """Round up to so many significant digits, so that what is printed suffices."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.ceil(value / unit) * unit:.{digits}g}")
