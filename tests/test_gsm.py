"""gsm and gsm_sgd against the paper's equations and against optax."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import active, budget, gsm_step

from gsm_optax import gsm, gsm_sgd, kernels, prune, stochastic_rounding

pytestmark = pytest.mark.optimize(False)

SHAPES = [(11, 13), (3, 3, 4, 5), (2, 6, 7)]


def draw(rng, dtype, kind):
    make = {
        "normal": rng.normal,
        "ties": lambda size: rng.integers(-2, 3, size) / 2,
        "zeros": lambda size: rng.normal(size=size) * (rng.random(size) < 0.5),
    }[kind]
    return [jnp.asarray(make(size=shape), dtype) for shape in SHAPES]


@pytest.mark.optimize(True)
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("ratio", "nesterov"), [(0.0, False), (0.0, True), (0.5, True), (0.95, False)]
)
def test_every_step_is_the_papers(ratio, nesterov, dtype, rtol):
    """30 steps, each compared with the equations from where the last one ended."""
    settings = {"lr": 0.1, "beta": 0.9, "eta": 0.01, "nesterov": nesterov}
    tx = gsm_sgd(0.1, ratio, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    step = jax.jit(tx.update)
    for kind in ("normal", "ties", "zeros"):
        rng = np.random.default_rng(5)
        weights = draw(rng, dtype, kind)
        state, kept = tx.init(weights), budget(ratio, sum(w.size for w in weights))
        for _ in range(30):
            grads, momenta = draw(rng, dtype, kind), optax.tree.get(state, "trace")
            expected = gsm_step(weights, momenta, grads, kept=kept, **settings)
            updates, state = step(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
            got = weights, optax.tree.get(state, "trace")
            for value, want in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
                assert value.dtype == dtype
                # Sums of opposite terms cancel: a rounding counts against their size.
                np.testing.assert_allclose(
                    np.asarray(value, np.float64), want, rtol=rtol, atol=4 * rtol
                )


@pytest.mark.optimize(True)
@pytest.mark.parametrize(
    ("dtype", "wrap"),
    [
        (jnp.float32, lambda f: f),
        (jnp.float32, jax.jit),
        (jnp.bfloat16, jax.jit),
    ],
)
def test_ratio_zero_is_optax_sgd_bit_for_bit(dtype, wrap):
    rng = np.random.default_rng(6)
    params = {"kernels": draw(rng, dtype, "zeros"), "bias": jnp.ones(4, dtype)}
    ours = gsm_sgd(0.1, 0.0, momentum=0.9, weight_decay=0.01)
    theirs = optax.chain(
        optax.add_decayed_weights(0.01, mask=kernels), optax.sgd(0.1, momentum=0.9)
    )
    results = []
    for tx in (ours, theirs):
        rng, p, state = np.random.default_rng(7), params, tx.init(params)
        update = wrap(tx.update)
        for _ in range(20):
            grads = {"kernels": draw(rng, dtype, "zeros"), "bias": jnp.ones(4, dtype)}
            updates, state = update(grads, state, p)
            p = optax.apply_updates(p, updates)
        results.append(p)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert a.tobytes() == b.tobytes()


def test_momentum_and_decay_turn_passive_entries_into_zeros():
    """100 entries, 5 of them matter: those are learnt, the rest decays as planned."""
    target = jnp.zeros((10, 10)).at[2, :5].set(jnp.arange(5.0) + 3)
    loss = lambda w: jnp.sum(jnp.where(target != 0, (w - target) ** 2, 0))
    params = jnp.ones((10, 10))
    lr, momentum, decay, steps = 1e-2, 0.9, 0.01, 10_000
    tx = gsm_sgd(lr, 0.95, momentum=momentum, weight_decay=decay)

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    params, target = np.asarray(params), np.asarray(target)
    passive = params[target == 0]
    expected = np.exp(-lr * decay / (1 - momentum) * steps)
    np.testing.assert_allclose(passive, expected, rtol=0.1)
    pruned = prune(params, 0.95)
    assert float(loss(pruned)) == pytest.approx(float(loss(params)), rel=1e-3)


@pytest.mark.optimize(True)
def test_a_pruned_weight_stays_pruned():
    rng = np.random.default_rng(8)
    params = prune(draw(rng, jnp.float32, "normal"), 0.8)
    zeros = [np.asarray(p == 0) for p in params]
    tx = gsm_sgd(0.1, 0.3)  # a budget that would have room for some of the zeros
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(20):
        updates, state = step(draw(rng, jnp.float32, "normal"), state, params)
        params = optax.apply_updates(params, updates)
    for p, zero in zip(params, zeros, strict=True):
        assert (np.asarray(p)[zero] == 0).all()
        assert (np.asarray(p)[~zero] != 0).all()


def test_entries_that_are_not_prunable_get_plain_momentum_sgd():
    params = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    grads = {"kernel": jnp.ones((3, 3)), "bias": jnp.arange(3.0)}
    ours, plain = gsm_sgd(0.1, 0.5, momentum=0.9), optax.sgd(0.1, momentum=0.9)
    state, plain_state = ours.init(params), plain.init(params)
    for _ in range(3):
        updates, state = ours.update(grads, state, params)
        expected, plain_state = plain.update(grads, plain_state, params)
        np.testing.assert_array_equal(updates["bias"], expected["bias"])


def test_gsm_is_the_direction_of_gsm_sgd():
    rng = np.random.default_rng(9)
    params, grads = draw(rng, jnp.float32, "normal"), draw(rng, jnp.float32, "normal")
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    chained = optax.chain(gsm(ratio=0.9), optax.scale_by_learning_rate(schedule))
    ready = gsm_sgd(schedule, 0.9)
    a, _ = chained.update(grads, chained.init(params), params)
    b, _ = ready.update(grads, ready.init(params), params)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_accumulator_dtype_is_that_of_the_momentum():
    params = jnp.ones((2, 2), jnp.bfloat16)
    state = gsm(0.5, accumulator_dtype=jnp.float32).init(params)
    assert optax.tree.get(state, "trace").dtype == jnp.float32


def test_an_injected_ratio_changes_without_compiling_again():
    params = jnp.asarray(np.random.default_rng(10).normal(size=(20, 50)), jnp.float32)
    tx = optax.inject_hyperparams(gsm_sgd, static_args=("prunable", "importance"))(
        learning_rate=0.1, ratio=0.5, prunable=kernels
    )
    state, step = tx.init(params), jax.jit(tx.update)
    for ratio in (0.5, 0.9, 0.0, 0.99):
        state.hyperparams["ratio"] = jnp.float32(ratio)
        _, state = step(params, state, params)
        kept = budget(ratio, 1000)
        assert optax.tree.get(state, "num_active") == kept
        assert sum(active([np.abs(params * params)], kept)[0].ravel()) == kept
    assert step._cache_size() == 1


SCHEDULE = optax.linear_schedule(1e-3, 1e-2, 10)
inject = partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)


@pytest.mark.promotes
@pytest.mark.parametrize(
    "tx",
    [
        gsm_sgd(0.1, 0.5, weight_decay=SCHEDULE),
        gsm_sgd(SCHEDULE, 0.5, momentum=jnp.float32(0.9), nesterov=True),
        gsm_sgd(jnp.float32(0.1), 0.5, accumulator_dtype=jnp.float32),
        inject(gsm_sgd)(0.1, 0.5),
        inject(gsm_sgd)(SCHEDULE, 0.5, momentum=SCHEDULE, weight_decay=SCHEDULE),
    ],
    ids=["decay", "momentum", "accumulator", "injected", "injected schedules"],
)
def test_half_precision_keeps_the_dtypes_of_init(tx):
    params = {"kernel": jnp.ones((3, 4), jnp.bfloat16), "bias": jnp.ones(4)}
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    @jax.jit
    def step(carry, _=None):
        params, state = carry
        updates, state = tx.update(params, state, params)
        assert types(updates) == types(params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    start = carry = params, tx.init(params)
    for _ in range(3):
        carry, _ = step(carry)
    assert types(carry) == types(start)
    assert step._cache_size() == 1
    scan = lambda start: jax.lax.scan(step, start, length=3)[0]
    assert types(jax.eval_shape(scan, start)) == types(start)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    "prunable",
    [
        None,
        {"frozen": True, "part": True, "w": True},
        lambda params: jax.tree.map(lambda x: x.ndim == 2, params),
    ],
    ids=["default", "tree", "function"],
)
def test_gradients_of_none_pass(prunable, nesterov):
    """A leaf, and a whole part, as though they were not there."""
    w = jnp.asarray(np.random.default_rng(12).normal(size=(4, 5)), jnp.float32)
    params = {"frozen": w, "part": {"a": w, "b": w}, "w": w}
    grads = {"frozen": None, "part": None, "w": w}
    tx = gsm_sgd(0.1, 0.0, prunable=prunable, nesterov=nesterov)
    alone = gsm_sgd(0.1, 0.0, nesterov=nesterov)
    state, want_state = tx.init(params), alone.init({"w": w})
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(grads, state, params)
        want, want_state = alone.update({"w": w}, want_state, {"w": w})
    assert (updates["frozen"], updates["part"]) == (None, None)
    np.testing.assert_allclose(updates["w"], want["w"], rtol=1e-6)
    assert step._cache_size() == 1  # the momentum keeps its place


@pytest.mark.filterwarnings("error")
def test_half_precision_that_cannot_decay_is_named_once():
    params = {"a": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}, "bias": jnp.ones(2)}
    with pytest.warns(UserWarning, match=r"a/kernel \(bfloat16\)") as caught:
        state = gsm_sgd(0.1, 0.5).init(params)
    assert len(caught) == 1
    gsm_sgd(0.1, 0.5).update(params, state, params)  # nothing more
    gsm_sgd(0.1, 0.5, prunable={"a": False, "bias": True}).init(params)
    stochastic_rounding(gsm_sgd(0.1, 0.5)).init(params)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"momentum": None}, "momentum=None must be a number"),
        ({"momentum": optax.constant_schedule(0.9)}, "optax.inject_hyperparams"),
        ({"momentum": "x"}, "momentum='x' must be"),
        ({"momentum": jnp.ones(3)}, "must be a number in"),
        ({"momentum": jnp.bfloat16(0.99)}, "momentum is a bfloat16 array.*too coarse"),
        ({"smoothing": jnp.float16(0.9)}, "smoothing is a float16 array.*too coarse"),
        ({"momentum": jnp.float32(1.5)}, "momentum=1.5 is outside"),
        ({"weight_decay": "x"}, "weight_decay='x' must be a number"),
        ({"weight_decay": None}, "weight_decay=None must be a number"),
        ({"weight_decay": jnp.float32(-1)}, "weight_decay=-1.0 must be finite"),
        ({"weight_decay": lambda step: jnp.ones(2)}, r"weight_decay\(0\)=.* must be"),
        ({"weight_decay": lambda step: -1.0}, r"weight_decay\(0\)=-1.0 must be finite"),
        ({"momentum": 1.0}, r"momentum=1.0 is outside \[0, 1\)"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"momentum": float("nan")}, "momentum=nan"),
        (
            {"weight_decay": -1e-4},
            "weight_decay=-0.0001 must be finite and not negative",
        ),
        ({"ratio": 60}, r"did you mean ratio=1-1/60\?"),
    ],
)
def test_bad_arguments_are_refused_when_built(kwargs, message):
    with pytest.raises(ValueError, match=message):
        gsm(**{"ratio": 0.5} | kwargs)
    with pytest.raises(ValueError, match=message):
        gsm_sgd(0.1, **{"ratio": 0.5} | kwargs)


@pytest.mark.promotes
@pytest.mark.parametrize("passive_decay", [None, 0.05])
def test_half_precision_gradients_do_not_hold_up_the_decay(passive_decay):
    """Of float32 parameters, which keep what a passive weight loses at a step."""
    decay = {"weight_decay": 1e-3 if passive_decay else 0.05}
    tx = gsm_sgd(0.1, 0.5, momentum=0.9, passive_decay=passive_decay, **decay)

    def run(dtype):
        params = jnp.array([[1.0, 2.0], [1e-3, 1e-3]])
        grads, state = jnp.array([[0.1, 0.1], [0, 0]], dtype), tx.init(params)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), updates

        (params, _), updates = jax.lax.scan(step, (params, state), length=400)
        assert updates.dtype == jnp.float32
        return params[1]

    np.testing.assert_allclose(run(jnp.float16), run(jnp.float32), rtol=1e-3)


@pytest.mark.optimize(False)
def test_momentum_too_coarse_to_decay_is_told():
    tells = lambda dtype: pytest.warns(UserWarning, match=f"in {dtype}.*too coarse")
    params = jnp.ones((2, 3))
    for momentum, dtype in ((0.995, "bfloat16"), (0.9, "float16")):
        with tells(dtype):
            gsm(0.5, momentum=momentum, accumulator_dtype=dtype).init(params)
    gsm(0.5, momentum=0.99, accumulator_dtype="bfloat16").init(params)
    gsm(0.5, momentum=0.0, accumulator_dtype="float16").init(params)


@pytest.mark.promotes
def test_gradients_of_another_half_precision_keep_theirs():
    tx = gsm_sgd(0.1, 0.5, passive_decay=0.05)
    params = jnp.ones((2, 3), jnp.bfloat16)
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of half precision
            state = tx.init(params)
        updates, _ = tx.update(params.astype(dtype), state, params)
        assert updates.dtype == dtype


# Settings that change on the way


RAMP = optax.linear_schedule(0.1, 0.5, 10)
DECAYS = optax.linear_schedule(1e-3, 1e-2, 10)


def steps_on(settings, state=None, number=3):
    """Take steps of random gradients, from a new state or an old one, in a scan."""
    tx, (params,) = (
        gsm_sgd(0.1, **settings),
        draw(np.random.default_rng(0), "f4", "normal")[:1],
    )
    grads = jax.random.normal(jax.random.key(1), (number, *params.shape))
    state = tx.init(params) if state is None else state
    step = lambda state, grad: (tx.update(grad, state, params)[1], None)
    return jax.lax.scan(step, state, grads)[0]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ratio": RAMP}, {"ratio": 0.5}),
        ({"ratio": 0.5, "weight_decay": DECAYS}, {"ratio": 0.5, "weight_decay": 1e-3}),
        ({"ratio": 0.5, "track_churn": True}, {"ratio": 0.5}),
        ({"ratio": 0.5, "smoothing": 0.9}, {"ratio": 0.5}),
    ],
)
def test_what_a_state_holds_is_kept_up_by_settings_that_need_it_no_more(before, after):
    state = steps_on(before)
    there_and_back = steps_on(before, steps_on(after, state))
    assert jax.tree.structure(there_and_back) == jax.tree.structure(state)
    for name in ("step", "count"):  # of the ratio, of the decay
        counts = [x for _, x in optax.tree.get_all_with_path(there_and_back, name)]
        assert all(count == 9 for count in counts if count is not None)
    if "track_churn" in before:
        churn = [
            optax.tree.get(steps_on(s, state, 1), "churn") for s in (before, after)
        ]
        assert churn[0] == churn[1] != optax.tree.get(state, "churn")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"ratio": RAMP}, "ratio or passive_decay"),
        ({"weight_decay": DECAYS}, "weight_decay"),
        ({"passive_decay": DECAYS}, "ratio or passive_decay"),
        ({"smoothing": 0.9}, "smoothing"),
        ({"track_churn": True}, "track_churn"),
    ],
)
def test_a_state_without_room_for_new_settings_is_refused(change, word):
    with pytest.raises(ValueError, match=rf"without .*{word}.*tx\.init\(params\)"):
        steps_on({"ratio": 0.5} | change, steps_on({"ratio": 0.5}))


def test_a_momentum_that_drops_imaginary_parts_is_refused():
    params = {"kernel": jnp.ones((2, 3), jnp.complex64)}
    with pytest.raises(
        ValueError, match="kernel is complex64: accumulator_dtype=float32"
    ):
        gsm_sgd(0.1, 0.5, accumulator_dtype=jnp.float32).init(params)
    tx = gsm_sgd(0.1, 0.5, accumulator_dtype=jnp.complex64)
    assert optax.tree.get(tx.init(params), "trace")["kernel"].dtype == jnp.complex64


@pytest.mark.promotes
def test_a_scheduled_decay_is_that_of_its_step():
    tx = gsm_sgd(
        1.0, 0.5, momentum=0.0, weight_decay=optax.linear_schedule(0.0, 1.0, 4)
    )
    params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
    zeros, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    for step in range(3):
        updates, state = tx.update(zeros, state, params)
        np.testing.assert_array_equal(
            updates["kernel"], -0.25 * step * params["kernel"]
        )
