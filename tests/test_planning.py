"""decay_budget against the recurrence that it sums up, and its advice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gsm_optax import decay_budget, gsm_sgd

pytestmark = pytest.mark.promotes


def test_value_of_the_papers_lenet_recipe():
    """280 epochs of 234 batches, lr 1e-2 divided by 10 at 160, 200 and 240."""
    epoch = 234
    schedule = optax.piecewise_constant_schedule(
        1e-2, {160 * epoch: 0.1, 200 * epoch: 0.1, 240 * epoch: 0.1}
    )
    budget = decay_budget(schedule, 280 * epoch, momentum=0.99, weight_decay=5e-4)
    rates = 160 * 1e-2 + 40 * 1e-3 + 40 * 1e-4 + 40 * 1e-5
    assert budget.total == pytest.approx(rates * epoch * 5e-4 / 0.01, rel=1e-3)
    assert budget.remaining == pytest.approx(np.exp(-budget.total))
    assert "lossless" in budget.advice


def test_remaining_is_what_gsm_leaves_of_a_passive_weight():
    lr, momentum, decay, steps = 0.01, 0.9, 0.01, 9000
    tx = gsm_sgd(lr, 0.5, momentum=momentum, weight_decay=decay)
    params = jnp.ones((1, 2))
    state = tx.init(params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.zeros((1, 2)), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, state), length=steps)
    budget = decay_budget(lr, steps, momentum=momentum, weight_decay=decay)
    np.testing.assert_allclose(params, budget.remaining, rtol=0.15)


def test_a_constant_is_a_constant_schedule():
    constant = decay_budget(0.1, 1000, momentum=0.9, weight_decay=0.02)
    schedule = optax.constant_schedule(0.1)
    same = decay_budget(schedule, 1000, momentum=0.9, weight_decay=0.02)
    assert constant.total == pytest.approx(same.total)


def test_a_small_budget_warns_and_its_remedies_work():
    with pytest.warns(UserWarning, match="will cost accuracy") as caught:
        decay_budget(1e-2, 4600, momentum=0.98, weight_decay=5e-4)
    advice = str(caught[0].message)
    decay = float(advice.split("weight_decay=")[1].split(",")[0])
    steps = int(advice.split(" steps")[0].split()[-1])
    for budget in (
        decay_budget(1e-2, 4600, momentum=0.98, weight_decay=decay),
        decay_budget(1e-2, steps, momentum=0.98, weight_decay=5e-4),
    ):
        assert budget.total == pytest.approx(12, rel=0.05)


def test_between_eight_and_twelve_there_is_doubt_but_no_warning():
    budget = decay_budget(0.1, 1000, momentum=0.9, weight_decay=0.01)
    assert budget.total == pytest.approx(10)
    assert "may cost accuracy" in budget.advice


def test_nothing_decays_without_decay():
    with pytest.warns(UserWarning, match="nothing decays"):
        budget = decay_budget(0.1, 1000, weight_decay=0.0)
    assert (budget.total, budget.remaining) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((0.1, 0), {}, "steps=0 must be a positive"),
        ((0.1, 2.5), {}, "steps=2.5 must be"),
        ((-0.1, 10), {}, "must not be negative"),
        ((lambda step: 0.1 - step, 10), {}, "reaches -8.8"),
        ((0.1, 10), {"momentum": 1}, "momentum=1 is outside"),
        ((0.1, 10), {"weight_decay": -1}, "weight_decay=-1 must"),
    ],
)
def test_bad_arguments_are_refused(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        decay_budget(*args, **kwargs)
