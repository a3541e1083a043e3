"""Selection by averaged importance, and the decay of what is passive."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import averages, budget, gsm_step, importance

from gsm_optax import (
    gradient_importance,
    gsm,
    gsm_sgd,
    magnitude_importance,
    mask_by_importance,
    prune,
    ratio_ramp,
    taylor_importance,
    tempered_importance,
)
from gsm_optax.freezing import freeze_blocks

SHAPES = [(7, 9), (3, 3, 2, 4)]
TOTAL = 7 * 9 + 72


def draw(rng, dtype=jnp.float32):
    values = [rng.normal(size=shape) for shape in SHAPES]
    # Some zeros: in parameters they are pruned, in gradients they are dead units.
    return [jnp.asarray(x * (rng.random(x.shape) < 0.8), dtype) for x in values]


def state_of(state):
    return optax.tree.get(state, "average"), optax.tree.get(state, "trace")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("smoothing", "power", "passive"),
    [(0.9, 1.0, 0.3), (0.99, 0.5, None), (0.0, 0.5, 0.3), (0.5, 0.0, 0.0)],
)
def test_every_step_is_the_equations(smoothing, power, passive, dtype):
    """Averages from the whole history; then weights and momenta, step by step."""
    rng, ratio = np.random.default_rng(0), 0.7
    settings = {"lr": 0.05, "beta": 0.8, "eta": 0.01, "passive_eta": passive}
    tx = gsm_sgd(
        0.05,
        ratio,
        momentum=0.8,
        weight_decay=0.01,
        importance=tempered_importance(power),
        smoothing=smoothing,
        passive_decay=passive,
    )
    weights, step, history = draw(rng, dtype), jax.jit(tx.update), []
    state, kept = tx.init(weights), budget(ratio, TOTAL)
    for _ in range(12):
        grads, momenta = draw(rng, dtype), optax.tree.get(state, "trace")
        history.append(
            (weights, [importance(*x, power) for x in zip(weights, grads, strict=True)])
        )
        updates, state = step(grads, state, weights)
        scores = None
        if smoothing:
            scores = optax.tree.get(state, "average")
            for i, got in enumerate(scores):
                past = [(np.asarray(w[i], np.float32), t[i]) for w, t in history]
                want = averages([t for _, t in past], [w for w, _ in past], smoothing)
                assert got.dtype == jnp.float32
                np.testing.assert_allclose(got, want[-1], rtol=2e-5, atol=1e-7)
        want = gsm_step(
            weights, momenta, grads, kept=kept, power=power, scores=scores, **settings
        )
        weights = optax.apply_updates(weights, updates)
        rtol = 1e-6 if dtype == jnp.float32 else 2e-2
        got = weights, optax.tree.get(state, "trace")
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(np.float64(a), b, rtol=rtol, atol=4 * rtol)
        assert optax.tree.get(state, "num_active") == kept


@pytest.mark.optimize(False)
def test_without_smoothing_there_is_no_such_state():
    params = draw(np.random.default_rng(1))
    plain, asked = gsm(0.5).init(params), gsm(0.5, smoothing=0.0).init(params)
    injected = optax.inject_hyperparams(gsm)(0.5).init(params).inner_state
    for state in (plain, asked, injected, jax.jit(gsm(0.5).init)(params)):
        assert optax.tree.get(state, "average") is None
        assert optax.tree.get(state, "averaged") is None


def test_injected_smoothing_is_the_plain_one_and_may_change():
    rng = np.random.default_rng(2)
    params, grads = draw(rng), [draw(rng) for _ in range(3)]
    plain = mask_by_importance(0.5, smoothing=0.75)
    tx = optax.inject_hyperparams(mask_by_importance)(0.5, smoothing=0.75)
    state, want_state, step = tx.init(params), plain.init(params), jax.jit(tx.update)
    for g in grads:
        updates, state = step(g, state, params)
        want, want_state = plain.update(g, want_state, params)
        for a, b in zip(updates, want, strict=True):
            np.testing.assert_array_equal(a, b)
    state.hyperparams["smoothing"] = jnp.float32(0)  # then it is the last batch alone
    updates, _ = step(grads[0], state, params)
    want, _ = mask_by_importance(0.5).update(
        grads[0], mask_by_importance(0.5).init(params), params
    )
    for a, b in zip(updates, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert step._cache_size() == 1


@pytest.mark.optimize(False)
@pytest.mark.parametrize(
    "importance",
    [taylor_importance, magnitude_importance, tempered_importance(0.5)],
)
def test_a_pruned_weight_stays_pruned_whatever_its_past(importance):
    rng = np.random.default_rng(3)
    params = draw(rng)
    tx = gsm_sgd(0.1, 0.3, momentum=0.0, smoothing=0.99, importance=importance)
    state = tx.init(params)
    for _ in range(3):  # everything has a past
        _, state = tx.update(draw(rng), state, params)
    params = prune(params, 0.8)
    zeros = [np.asarray(p == 0) for p in params]
    for _ in range(3):
        updates, state = tx.update(draw(rng), state, params)
        params = optax.apply_updates(params, updates)
    for p, zero in zip(params, zeros, strict=True):
        np.testing.assert_array_equal(np.asarray(p == 0), zero)


@pytest.mark.optimize(False)
def test_an_importance_of_zeros_may_revive_them():
    params = [jnp.array([[0.0, 1.0], [1.0, 1.0]])]
    grads = [jnp.array([[4.0, 1.0], [0.5, 0.1]])]
    tx = mask_by_importance(0.5, smoothing=0.9, importance=gradient_importance)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates[0], [[4.0, 1.0], [0.0, 0.0]])


@pytest.mark.optimize(False)
def test_nan_shows_and_stays():
    params = [jnp.ones((3, 4))]
    tx = mask_by_importance(0.75, smoothing=0.9, passive_decay=0.1)
    state, good = tx.init(params), [jnp.arange(12.0).reshape(3, 4) + 1]
    bad = [good[0].at[0, 0].set(jnp.nan)]
    updates, state = tx.update(bad, state, params)
    assert np.isnan(updates[0][0, 0])
    assert np.isfinite(updates[0].ravel()[1:]).all()
    updates, state = tx.update(good, state, params)
    assert updates[0][0, 0] == 1.0  # active, with the gradient that it has now
    assert np.isnan(state.average[0][0, 0])
    # A parameter that is NaN shows, passive as it may be.
    _, state = tx.update(good, tx.init(params), params)
    updates, _ = tx.update(good, state, [params[0].at[0, 0].set(jnp.nan)])
    assert np.isnan(updates[0][0, 0]) or updates[0][0, 0] == 1.0


@pytest.mark.optimize(False)
def test_passive_entries_get_their_own_decay_in_place_of_a_gradient():
    params = [jnp.array([[1.0, -2.0], [3.0, 0.5]])]
    grads = [jnp.array([[0.1, 0.4], [-0.2, 0.6]])]
    passive = optax.linear_schedule(0.0, 1.0, 4)
    tx = mask_by_importance(0.75, passive_decay=passive)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(grads, state, params)
        want = np.asarray(params[0]) * step / 4
        want[0, 1] = 0.4  # |-2 · 0.4| is the greatest
        np.testing.assert_allclose(updates[0], want, rtol=1e-6)


@pytest.mark.optimize(False)
def test_the_same_decay_for_all_is_the_papers():
    rng = np.random.default_rng(4)
    params, grads = draw(rng), draw(rng)
    plain, asked = (
        gsm(0.8, weight_decay=0.1),
        gsm(0.8, weight_decay=optax.constant_schedule(0.1), passive_decay=0.1),
    )
    want, _ = plain.update(grads, plain.init(params), params)
    got, _ = asked.update(grads, asked.init(params), params)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.optimize(False)
@pytest.mark.parametrize("trainable", ["updates", "blocks"])
def test_what_sits_a_step_out_keeps_its_average(trainable):
    """It is averaged over its own steps, and neither moves nor decays meanwhile."""
    rng = np.random.default_rng(5)
    params = dict(zip("ab", draw(rng), strict=True))
    grads = [dict(zip("ab", draw(rng), strict=True)) for _ in range(4)]
    out = {1, 2}  # the steps that `a` sits out
    inner = partial(mask_by_importance, 0.5, smoothing=0.8, passive_decay=0.1)
    tx = inner()
    if trainable == "blocks":
        frozen = lambda step: ((step == 1) | (step == 2)).astype(jnp.int32)
        tx = freeze_blocks(tx, frozen, ["a", "b"])
    state, step = tx.init(params), jax.jit(tx.update)
    for k, g in enumerate(grads):
        flags = {"trainable": {"a": k not in out, "b": True}}
        extra = {} if trainable == "blocks" else flags
        updates, state = step(g, state, params, **extra)
        if k in out:
            assert not updates["a"].any()
    for name, steps in {"a": (0, 3), "b": range(4)}.items():
        scores = [importance(params[name], grads[k][name]) for k in steps]
        w = [np.asarray(params[name])] * len(scores)
        want = averages(scores, w, 0.8)[-1]
        got = optax.tree.get(state, "average")[name]
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-7)


@pytest.mark.optimize(False)
def test_what_has_no_gradient_keeps_its_average():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}
    tx = gsm(0.5, smoothing=0.9, passive_decay=0.1)
    _, state = tx.update(params, tx.init(params), params)
    for grads, steps in (
        ({"a": None, "b": None}, [1, 1]),
        (params | {"a": None}, [1, 2]),
    ):
        updates, after = tx.update(grads, state, params)
        assert updates["a"] is None
        got = optax.tree.get(after, "average")["a"]
        np.testing.assert_array_equal(got, optax.tree.get(state, "average")["a"])
        np.testing.assert_array_equal(optax.tree.get(after, "averaged"), steps)


@pytest.mark.parametrize("axis_name", ["x", ()])
@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_gives_the_same_choice(axis_name, check_vma):
    """Parts of the parameters by their axis, and copies of them by none."""
    rng = np.random.default_rng(7)
    params, *grads = (
        {"w": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)} for _ in range(3)
    )
    options = {"smoothing": 0.9, "passive_decay": 0.2}
    options["importance"] = tempered_importance(0.5)
    one, tx = gsm(0.75, **options), gsm(0.75, axis_name=axis_name, **options)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("x",), axis_types=auto)
    spec = jax.P("x") if axis_name else jax.P()
    state, want_state = tx.init(params), one.init(params)
    like = jax.tree.map(lambda x: spec if x.ndim == 2 else jax.P(), (params, state))
    step = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=(like[0], like[1], like[0]),
            out_specs=like,
            check_vma=check_vma,
        )
    )
    for g in grads:
        updates, state = step(g, state, params)
        want, want_state = one.update(g, want_state, params)
        np.testing.assert_allclose(updates["w"], want["w"], rtol=1e-6)
    assert optax.tree.get(state, "num_active") == 12


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_mesh_gives_the_same_bits(kind):
    rng, kind = np.random.default_rng(6), jax.sharding.AxisType[kind]
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    make = lambda: [normal(8, 6), normal(4, 16)]
    params, grads = make(), [make() for _ in range(3)]
    tx = gsm_sgd(
        0.1, 0.7, smoothing=0.9, passive_decay=0.2, importance=tempered_importance(0.5)
    )

    def run(place):
        place = lambda tree, put=place: [put(x, i) for i, x in enumerate(tree)]
        p = place(params)
        state, step = jax.jit(tx.init)(p), jax.jit(tx.update)
        for g in grads:
            updates, state = step(place(g), state, p)
            p = jax.tree.map(jnp.add, p, updates)
        return p, optax.tree.get(state, "average")

    want = run(lambda x, i: x)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = [jax.P("x", "y"), jax.P(None, ("x", "y"))]
    with jax.set_mesh(mesh):
        got = run(lambda x, i: jax.device_put(x, jax.NamedSharding(mesh, specs[i])))
    for x, spec in zip(got[1], specs, strict=True):
        assert x.sharding.spec == spec  # as its parameter
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.optimize(False)
def test_the_average_has_the_dtype_asked_for():
    params = [jnp.ones((4, 5), jnp.bfloat16)]
    for dtype in (None, jnp.bfloat16):
        tx = gsm(0.5, smoothing=0.9, accumulator_dtype=dtype)
        # Where (1 - 0.9) of a change is below half of 2^-7, it rounds away.
        tells = pytest.warns(
            UserWarning, match=r"0.9 is kept in bfloat16: .* within 3.9%"
        )
        with tells if dtype else contextlib.nullcontext():
            state, step = tx.init(params), jax.jit(tx.update)
        for _ in range(2):
            updates, state = step(params, state, params)
        assert step._cache_size() == 1
        assert optax.tree.get(state, "average")[0].dtype == (dtype or jnp.float32)
        assert updates[0].dtype == jnp.bfloat16


@pytest.mark.promotes
@pytest.mark.optimize(False)
def test_the_average_of_complex_weights_is_real():
    params = [jnp.array([[1 + 2j, 3j], [1, 0.1]]), jnp.ones((2, 3))]
    tx = gsm(0.5, smoothing=0.9, accumulator_dtype=jnp.complex64)
    updates, state = tx.update(params, tx.init(params), params)
    average = optax.tree.get(state, "average")
    assert [x.dtype for x in average] == [jnp.float32] * 2
    assert [x.dtype for x in updates] == [x.dtype for x in params]


@pytest.mark.optimize(False)
@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0])
def test_powers_lie_between_magnitude_and_taylor(power):
    param = jnp.array([2.0, -3.0, 0.0, 1.0, 1.0, 1e-20])
    grad = jnp.array([0.25, -0.01, 5.0, 1e-30, 0.0, 1e25])
    got = tempered_importance(power)(param, grad)
    np.testing.assert_allclose(got, importance(param, grad, power), rtol=1e-5)
    assert np.isnan(tempered_importance(power or 0.5)(jnp.ones(1), jnp.nan)).all()
    ends = {0.0: magnitude_importance, 1.0: taylor_importance}
    assert ends.get(power) in (None, tempered_importance(power))


def test_zeros_are_told_of_under_every_power():
    params = {"lora_b": {"kernel": jnp.zeros((2, 3))}, "w": jnp.ones((2, 3))}
    with pytest.warns(UserWarning, match="lora_b"):
        gsm(0.5, importance=tempered_importance(0.25)).init(params)


@pytest.mark.optimize(False)
def test_the_ramp_is_cubic_and_ends_at_its_ratio():
    ramp = ratio_ramp(0.95, 100, start=0.2)
    steps = np.array([0, 1, 33, 99, 100, 1000])
    want = 0.95 + (0.2 - 0.95) * (1 - np.minimum(steps, 100) / 100) ** 3
    np.testing.assert_allclose([ramp(k) for k in steps], want, rtol=1e-6)
    assert ramp(100) == ramp(10**6) == np.float32(0.95)
    params = [jnp.arange(1.0, 201).reshape(10, 20)]
    tx = gsm_sgd(0.01, ratio_ramp(0.9, 2))
    state = tx.init(params)
    for kept in (200, 200 - round(0.7875 * 200), 20, 20):
        _, state = tx.update(params, state, params)
        assert optax.tree.get(state, "num_active") == kept


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gsm(0.5, smoothing=1.0), r"smoothing=1.0 is outside \[0, 1\)"),
        (lambda: gsm(0.5, smoothing=None), "smoothing=None must be a number"),
        (lambda: gsm(0.5, smoothing=lambda k: 0.9), "smoothing=.* must be a number"),
        (lambda: gsm(0.5, accumulator_dtype="int32"), "accumulator_dtype=int32 is no"),
        (lambda: gsm(0.5, accumulator_dtype=bool), "accumulator_dtype=bool is no"),
        (lambda: gsm(0.5, passive_decay=-1.0), "passive_decay=-1.0 must be finite"),
        (lambda: gsm(0.5, passive_decay="x"), "passive_decay='x' must be a number"),
        (lambda: gsm(0.5, passive_decay=lambda k: -1.0), r"passive_decay\(0\)=-1.0"),
        (lambda: mask_by_importance(0.5, passive_decay=jnp.ones(2)), "passive_decay="),
        (lambda: mask_by_importance(0.5, passive_decay=jnp.nan), "passive_decay=nan"),
        (lambda: tempered_importance(1.5), r"power=1.5 must be a number in \[0, 1\]"),
        (lambda: tempered_importance("x"), "power='x'"),
        (lambda: ratio_ramp(60, 10), r"did you mean ratio=1-1/60\?"),
        (lambda: ratio_ramp(0.5, 10, start=1.0), r"start=1 is outside"),
        (lambda: ratio_ramp(0.5, 0), "steps=0 must be a whole number"),
        (lambda: ratio_ramp(optax.constant_schedule(0.5), 10), "ratio=.* must be a"),
    ],
)
def test_bad_arguments_are_refused_when_built(call, message):
    with pytest.raises(ValueError, match=message):
        call()
