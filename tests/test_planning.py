"""decay_budget against what gsm_sgd does, and its advice by following it."""

import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gsm_optax import decay_budget, decay_budget_left, gsm_sgd

pytestmark = [pytest.mark.promotes, pytest.mark.optimize(False)]

SETTINGS = [  # learning rate, momentum, weight decay
    (3e-2, 0.98, 1e-2),  # underdamped, as all that follow up to the empty line
    (0.1, 0.98, 0.1),
    (0.1, 0.9, 1.0),
    (1.0, 0.5, 0.9),
    (1e-2, 0.99, 1e-3),

    (1e-2, 0.98, 1e-2),  # nearly critical
    (0.1, 0.9, 0.026),
    (1e-2, 0.98, 6e-3),  # overdamped
    (1e-2, 0.99, 5e-4),
    (0.1, 0.9, 0.02),
    (0.1, 0.0, 0.03),
    (1.0, 0.2, 1.25),  # overshooting: one eigenvalue is negative
]  # fmt: skip
SCHEDULES = {
    "constant": lambda n: lambda step: 1.0 + 0 * step,
    "steps": lambda n: optax.piecewise_constant_schedule(
        1.0, {round(0.6 * n): 0.1, round(0.8 * n): 0.1}
    ),
    "cosine": lambda n: optax.cosine_decay_schedule(1.0, n),
    "warm-up": lambda n: optax.warmup_cosine_decay_schedule(0.0, 1.0, n // 10, n),
}


STEPS = 600


@partial(jax.jit, static_argnames="nesterov")
def simulate(rates, momenta, decays, nesterov):
    """−ln of what gsm_sgd leaves of a weight without gradient, after every step."""

    def run(rates, momentum, decays):
        def step(carry, now):
            params, state = carry
            settings = {"momentum": momentum, "weight_decay": now[1]}
            settings |= {"nesterov": nesterov, "prunable": True}
            tx = gsm_sgd(now[0], 0.5, **settings)
            updates, state = tx.update(jnp.zeros((1, 2)), state, params)
            params = optax.apply_updates(params, updates)
            # Of a weight that swings, half is in the momentum, half of the time.
            swing = optax.tree.get(state, "trace") ** 2 * now[0] / now[1]
            return (params, state), -jnp.log((params**2 + swing)[0, 0]) / 2

        params = jnp.ones((1, 2))
        start = params, gsm_sgd(0.1, 0.5, prunable=True).init(params)
        return jax.lax.scan(step, start, (rates, decays))[1]

    return jax.vmap(run)(rates, momenta, decays)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_total_is_what_gsm_leaves_of_a_passive_weight(nesterov):
    """Behind by the time that momentum needs, which is at most ln(1 + total)."""
    cases = [(*each, "constant") for each in SETTINGS]
    cases += [(*SETTINGS[0], shape) for shape in SCHEDULES]
    now = jnp.arange(STEPS)
    shapes = {name: make(STEPS) for name, make in SCHEDULES.items()}
    rates = jnp.stack([lr * jax.vmap(shapes[shape])(now) for lr, *_, shape in cases])
    _, momenta, decays = jnp.asarray([case[:3] for case in cases]).T
    simulated = simulate(rates, momenta, decays[:, None] + 0 * rates, nesterov)
    for curve, (lr, momentum, decay, shape) in zip(
        np.asarray(simulated), cases, strict=True
    ):
        schedule = lambda step, lr=lr, shape=shape: lr * shapes[shape](step)
        left = decay_budget_left(
            schedule, STEPS, momentum=momentum, weight_decay=decay, nesterov=nesterov
        )
        for step in (60, 200, 600):
            total = float(left(0) - left(step))
            if total < 40:  # ln of 1e-38 is -87
                at = f"{lr, momentum, decay, shape, step}"
                lag, lead = np.log1p(total) + 0.1, 0.2 * total + 0.4
                assert total - lag < curve[step - 1], at
                assert shape != "constant" or curve[step - 1] < total + lead, at


@pytest.mark.parametrize(
    ("arguments", "simulated"),
    [  # what was told was 14.0, 200 and 400
        ((SCHEDULES["steps"](1500), 1500, 0.98, 1e-2, 3e-2), 9.4),
        ((1.0, 400, 0.98, 0.1, 0.1), 3.5),
        ((1.0, 400, 0.98, 1.0, 1e-2), 3.5),
    ],
)
def test_underdamped_runs_are_not_promised_more_than_happens(arguments, simulated):
    shape, steps, momentum, decay, lr = arguments
    rate = (lambda step: lr * shape(step)) if callable(shape) else lr * shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        budget = decay_budget(rate, steps, momentum=momentum, weight_decay=decay)
    assert simulated < budget.total < simulated + 0.8
    assert budget.remaining == pytest.approx(np.exp(-budget.total))


@pytest.mark.parametrize(
    ("period", "momentum", "decay"),
    [(16, 0.95, 1.0), (117, 0.95, 0.3), (80, 0.98, 0.3), (300, 0.95, 0.3)],
)
def test_cycles_that_feed_the_swings_are_not_promised_to_shrink(
    period, momentum, decay
):
    """Parametric resonance: weights grow, or shrink less, where each step shrinks."""
    steps = 1500
    rates = 0.1 * (1 - np.abs(2 * (np.arange(steps) % period) / period - 1))
    weight, trace, left = 1.0, 0.0, []
    for rate in rates:  # the equations of the paper
        trace = momentum * trace + 0.1 * decay * weight
        weight -= rate * trace
        left.append(abs(weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        total = decay_budget(
            lambda step: jnp.asarray(rates)[step],
            steps,
            momentum=momentum,
            weight_decay=0.1 * decay,
        ).total
    happens = -np.log(max(left[-75:]))
    assert total < happens + 3
    assert total > happens - 3


def test_the_passive_decay_is_the_one_that_counts():
    """In the sum, in what gsm_sgd leaves of a weight, and in the advice."""
    options = {"momentum": 0.9, "weight_decay": 1e-5, "passive_decay": 0.005}
    tx, steps = gsm_sgd(0.1, 0.5, prunable=True, **options), 1300

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.zeros((1, 2)), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.ones((1, 2))
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    left = decay_budget_left(0.1, steps, **options)
    alone = decay_budget_left(0.1, steps, momentum=0.9, weight_decay=0.005)
    assert left(0) == alone(0) == pytest.approx(6.84, abs=0.01)
    np.testing.assert_allclose(-jnp.log(params), left(0), atol=0.2)
    with pytest.warns(UserWarning, match=r"use passive_decay=0\.0[\d]+, or \d+ steps"):
        decay_budget(0.1, steps, **options)


@pytest.mark.parametrize(
    ("drop", "stretched"), [(1.0, "the ramp"), (0.1, "the schedule and the ramp")]
)
def test_a_ramp_leaves_the_steps_after_it(drop, stretched):
    """What turns passive at its end; and the remedies, followed, are enough."""

    def run(steps, passive_decay):
        shape = optax.piecewise_constant_schedule(0.1, {round(0.75 * steps): drop})
        plan = {"momentum": 0.9, "passive_decay": passive_decay}
        rate = 0.1 if drop == 1 else shape
        budget = decay_budget(rate, steps, ramp_steps=round(0.6 * steps), **plan)
        return budget, decay_budget_left(rate, steps, **plan)(round(0.6 * steps))

    with pytest.warns(UserWarning, match=f"with {stretched} stretched to match"):
        budget, left = run(2000, 4e-3)
    assert budget.total == pytest.approx(float(left), rel=1e-5)
    steps = int(re.search(r"(\d+) steps", budget.advice)[1])
    decay = float(re.search(r"passive_decay=([\d.e+-]*\d)", budget.advice)[1])
    for remedy in (run(steps, 4e-3), run(2000, decay)):
        assert 12 <= remedy[0].total < 24


def test_value_of_the_papers_lenet_recipe():
    """280 epochs of 234 batches, lr 1e-2 divided by 10 at 160, 200 and 240."""
    epoch = 234
    schedule = optax.piecewise_constant_schedule(
        1e-2, {160 * epoch: 0.1, 200 * epoch: 0.1, 240 * epoch: 0.1}
    )
    budget = decay_budget(schedule, 280 * epoch, momentum=0.99, weight_decay=5e-4)
    rates = 160 * 1e-2 + 40 * 1e-3 + 40 * 1e-4 + 40 * 1e-5
    small = rates * epoch * 5e-4 / 0.01  # while αη is far below (1 - √β)²
    assert small < budget.total < 1.07 * small
    assert "lossless" in budget.advice


def followed(advice, shape, lr, steps, momentum, decay):
    """The budgets that the advice's remedies lead to, each taken at its word."""
    number = r"([\d.e+-]*\d)"
    options = {"momentum": momentum, "weight_decay": decay}
    remedies = []
    for remedy in advice.split("use ")[1].split(". More")[0].split(", or "):
        new = dict(options)
        for name in options:
            if found := re.search(f"{name}={number}", remedy):
                new[name] = float(found[1])
        if found := re.search(f"{number} times the weight decay", remedy):
            times = float(found[1])
            new["weight_decay"] = lambda step, t=times: t * decay(step)
        longer = re.search(r"(\d+) steps", remedy)
        run = int(longer[1]) if longer else steps
        if longer and callable(decay):
            new["weight_decay"] = lambda step, run=run: decay(step * (steps / run))
        rate = lr
        if shape != "constant":
            rate = scaled(lr, SCHEDULES[shape](steps), steps / run)
        assert new != options or run > steps
        if run > 60_000:  # true as well, and slow
            continue
        remedies.append(decay_budget(rate, run, **new))
    return remedies


def scaled(lr, shape, times=1.0):
    return lambda step: lr * shape(step * times)


def test_every_remedy_followed_is_enough_and_not_doubted_again():
    rng = np.random.default_rng(11)
    doubted = kinds = followed_ones = 0
    for shape in ["constant"] * 40 + [*SCHEDULES] * 2:
        lr, decay = 10 ** rng.uniform(-2, -0.5), float(10 ** rng.uniform(-3.5, -1))
        momentum = float(rng.choice([0.0, 0.5, 0.9, 0.95, 0.98, 0.99, 0.999]))
        steps = int(10 ** rng.uniform(1.5, 3.7))
        if rng.random() < 0.3:
            peak, run = decay, steps
            decay = lambda step, peak=peak, run=run: peak * (1 + step / run)
        rate = lr if shape == "constant" else scaled(lr, SCHEDULES[shape](steps))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            budget = decay_budget(rate, steps, momentum=momentum, weight_decay=decay)
        if budget.total < 12:
            doubted += 1
            remedies = followed(budget.advice, shape, lr, steps, momentum, decay)
            followed_ones += len(remedies)
            for remedy in remedies:
                assert 12 <= remedy.total < 24, (budget.advice, remedy)
                assert "lossless" in remedy.advice
            cannot = "decay alone will not reach it" in budget.advice
            kinds += cannot
            if shape == "constant" and cannot:  # no decay of it does
                assert steps * -np.log(max(momentum, 1e-9)) / 2 < 12
    assert followed_ones > 1.5 * doubted > 30
    assert 5 < kinds < doubted


@pytest.mark.parametrize(
    ("total", "message"), [(4, "will cost accuracy"), (10, "may cost accuracy")]
)
def test_only_a_small_budget_warns(total, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        budget = decay_budget(0.1, 100 * total, momentum=0.9, weight_decay=8.99e-3)
    assert budget.total == pytest.approx(total, rel=0.01)
    assert message in budget.advice
    assert len(caught) == (total < 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": 0.0}, "nothing decays"),
        ({"weight_decay": lambda step: 0.0 * step}, "nothing decays"),
        ({"weight_decay": 50.0}, "overshoot, and weights grow"),
    ],
)
def test_where_no_weight_shrinks(settings, message):
    with pytest.warns(UserWarning, match=message):
        budget = decay_budget(0.1, 10_000, **settings)
    assert budget.total <= 0
    assert budget.remaining >= 1


def test_a_constant_is_a_constant_schedule():
    """Of the learning rate and of the decay, of which NumPy's and JAX's are too."""
    want = decay_budget(0.1, 1000, momentum=0.9, weight_decay=0.02).total
    for make in (optax.constant_schedule, jnp.asarray, np.asarray, np.float32):
        got = decay_budget(make(0.1), 1000, momentum=0.9, weight_decay=make(0.02))
        assert got.total == pytest.approx(want)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((0.1, 0), {}, "steps=0 must be a whole number of 1 or more"),
        ((0.1, 2.5), {}, "steps=2.5 must be"),
        ((-0.1, 10), {}, "must not be negative"),
        ((lambda step: 0.1 - step, 10), {}, "reaches -8.8"),
        (
            (lambda step: 0.1 if step < 5 else 0.01, 10),
            {},
            "learning_rate=.* jnp.where",
        ),
        (("x", 10), {}, "learning_rate='x' must be a number"),
        ((lambda step: jnp.ones(2), 10), {}, "learning_rate must be one number a step"),
        ((0.1, 10), {"momentum": 1}, "momentum=1 is outside"),
        ((0.1, 10), {"momentum": None}, "momentum=None must be a number"),
        ((0.1, 10), {"weight_decay": -1}, "weight_decay=-1 must"),
        ((0.1, 10), {"weight_decay": lambda step: 1 - step}, "reaches -8"),
        ((0.1, 10), {"passive_decay": -1}, "passive_decay=-1 must"),
        ((0.1, 10), {"ramp_steps": 10}, "ramp_steps=10 leave nothing of steps=10"),
        ((0.1, 10), {"ramp_steps": -1}, "ramp_steps=-1 must be a whole number"),
        ((0.1, 10), {"passive_decay": lambda step: 1 - step}, "passive_decay must not"),
        ((0.1, 10), {"weight_decay": lambda step: jnp.ones(2)}, r"weight_decay\(0\)="),
    ],
)
def test_bad_arguments_are_refused(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        decay_budget(*args, **kwargs)
