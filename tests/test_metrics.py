"""metrics, churn and Recorder against NumPy, on one device and on eight."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from trees import first_step, mesh_of, place, with_ties

from gsm_optax import (
    Recorder,
    decay_budget,
    decay_budget_left,
    gradient_importance,
    gsm,
    gsm_sgd,
    magnitude_importance,
    mask_by_importance,
    metrics,
    prune,
)

pytestmark = pytest.mark.optimize(False)

SHAPES = {"bias": (24,), "conv": (3, 16, 8), "dense": (32, 24)}
KERNELS = ("conv", "dense")
SPLIT = {"bias": P(), "conv": P(None, "x", "y"), "dense": P("y")}
TOTAL = 3 * 16 * 8 + 32 * 24


draw = partial(with_ties, SHAPES)


def run(tx, params, steps=5, place=lambda tree: jax.tree.map(jnp.asarray, tree)):
    """Give drawn gradients; return (params before, grads, state after) of each step."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, history = place(params), []
    state = tx.init(params)
    for seed in range(1, steps + 1):
        grads = place(draw(seed))
        new_params, state = step(params, state, grads)
        history.append((params, grads, state))
        params = new_params
    return history


def churn_of(state):
    return int(optax.tree.get(state, "churn"))


# Churn


@pytest.mark.parametrize(
    ("ratio", "importance", "score"),
    [
        (0.0, None, lambda w, g: np.abs(w * g)),
        (0.5, None, lambda w, g: np.abs(w * g)),
        (0.5, magnitude_importance, lambda w, g: np.abs(w)),
        (0.999, gradient_importance, lambda w, g: np.abs(g)),
    ],
)
def test_churn_is_that_of_numpy(ratio, importance, score):
    options = {"importance": importance} if importance else {}
    tx = gsm_sgd(2**-3, ratio, momentum=0.5, **options, track_churn=True)
    before = [np.zeros(SHAPES[name], bool) for name in KERNELS]
    for params, grads, state in run(tx, draw(0)):
        scores = [score(np.asarray(params[k]), np.asarray(grads[k])) for k in KERNELS]
        now = oracle.active(scores, oracle.budget(ratio, TOTAL))
        assert churn_of(state) == sum(
            np.sum(a != b) for a, b in zip(before, now, strict=True)
        )
        for name, mask in zip(KERNELS, now, strict=True):
            np.testing.assert_array_equal(optax.tree.get(state, "active")[name], mask)
        before = now


@pytest.mark.optimize(True)
def test_watching_changes_nothing():
    plain, tx = gsm_sgd(2**-3, 0.9), gsm_sgd(2**-3, 0.9, track_churn=True)
    for (params, _, state), (watched, _, wrapped) in zip(
        run(plain, draw(0)), run(tx, draw(0)), strict=True
    ):
        for name in SHAPES:
            np.testing.assert_array_equal(params[name], watched[name])
        assert optax.tree.get(wrapped, "threshold") == state[0][0].threshold


def test_the_same_gradients_again_are_no_churn():
    tx, params = (
        mask_by_importance(0.9, track_churn=True),
        jax.tree.map(jnp.asarray, draw(0)),
    )
    grads, state = jax.tree.map(jnp.asarray, draw(1)), tx.init(params)
    update = jax.jit(tx.update)
    _, state = update(grads, state, params)
    _, state = update(grads, state, params)
    assert churn_of(state) == 0


@pytest.mark.optimize(True)
def test_gradients_that_are_fused_expressions_give_the_mask_that_is_applied():
    """The threshold entry must not be lost to a rounding of its own."""
    tx = mask_by_importance(0.9, track_churn=True)
    x = jax.random.normal(jax.random.key(0), (16, 64))
    params = jax.random.normal(jax.random.key(1), (64, 48))

    @jax.jit
    def step(params, state):
        loss = lambda w: jnp.mean(jnp.tanh(x @ w) ** 2) + 0.1 * jnp.mean(jnp.sin(w * w))
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return params - updates, updates, state

    state = tx.init(params)
    for _ in range(5):
        params, updates, state = step(params, state)
        np.testing.assert_array_equal(state.active, updates != 0)


def test_leaves_without_gradient_and_other_types_pass():
    params = {
        "a": jnp.ones((4, 4)),
        "b": jnp.ones((2, 2)),
        "n": None,
        "i": jnp.arange(3),
    }
    tx = mask_by_importance(0.5, track_churn=True)
    state = tx.init(params)
    grads = {"a": jnp.eye(4), "b": None, "n": None, "i": np.zeros(3, jax.dtypes.float0)}
    updates, state = jax.jit(tx.update)(grads, state, params)
    assert churn_of(state) == 4
    assert updates["b"] is None
    assert not state.active["b"].any()


@pytest.mark.promotes
def test_churn_can_be_read_through_wrappers():
    tx = gsm_sgd(2**-3, 0.9, track_churn=True)
    bare = run(tx, draw(0), steps=1)[-1][2]
    tx = optax.MultiSteps(optax.partition({"all": tx}, "all"), 1)
    tx = optax.apply_if_finite(tx.gradient_transformation(), 3)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    params, _, state = run(tx, draw(0), steps=1)[-1]
    assert metrics(params, state)["gsm/churn"] == churn_of(bare)


def test_map_params_places_the_mask_like_the_parameters():
    params = jax.tree.map(jnp.asarray, draw(0))
    tx = gsm_sgd(0.1, 0.9, track_churn=True)
    state = optax.tree.map_params(tx, lambda x: x + x, tx.init(params))
    assert optax.tree.get(state, "active")["dense"].shape == SHAPES["dense"]


# On meshes


MESHES = ["auto, set_mesh", "explicit"]


@pytest.mark.optimize(True)
@pytest.mark.parametrize("mode", MESHES)
def test_eight_devices_record_what_one_does(mode):
    tx = gsm_sgd(2**-3, 0.9, momentum=0.5, weight_decay=2**-7, track_churn=True)
    alone, sharded = Recorder(), Recorder()
    for step, (params, _, state) in enumerate(run(tx, draw(0), steps=3)):
        alone(step, params, state)
    with mesh_of(mode) as mesh:
        put = partial(place, mesh=mesh, layout=SPLIT)
        history = run(tx, draw(0), steps=3, place=put)
        for step, (params, _, state) in enumerate(history):
            sharded(step, params, state)
    assert sharded.records == alone.records
    active = optax.tree.get(state, "active")["dense"]
    assert active.sharding.is_equivalent_to(params["dense"].sharding, 2)


@pytest.mark.optimize(True)
@pytest.mark.parametrize("mode", MESHES)
def test_devices_exchange_no_arrays(mode):
    tx = mask_by_importance(0.9, track_churn=True)
    with mesh_of(mode) as mesh:
        params = place(draw(0), mesh, SPLIT)
        lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
    text = lowered.compile().as_text()
    assert "all-reduce" in text
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)


@pytest.mark.optimize(False)
def test_inside_shard_map_over_parts_nothing_is_counted_or_pruned():
    tx = mask_by_importance(0.75, axis_name="x", prunable=True)
    params = jnp.arange(1.0, 33).reshape(8, 4)

    def local(params, what):
        _, state = tx.update(params, tx.init(params), params)
        return (
            metrics(params, state)
            if what == "metrics"
            else prune(params, 0.75, prunable=True)
        )

    with mesh_of("auto", (8,), ("x",)) as mesh:
        over = partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        for what, check_vma in (("metrics", True), ("prune", True), ("prune", False)):
            call = over(partial(local, what=what), check_vma=check_vma)
            with pytest.raises(ValueError, match=r"shard_map.*'x'.*call it outside"):
                jax.jit(call)(params)
        copies = lambda x: metrics(x, tx.init(x))["gsm/density"]
        assert jax.jit(over(copies, in_specs=P(), out_specs=P()))(params) == 1


@pytest.mark.optimize(True)
def test_under_shard_map_with_an_axis_name():
    tx = mask_by_importance(0.9, axis_name="x", track_churn=True)
    params, grads = jnp.asarray(draw(0)["dense"]), jnp.asarray(draw(1)["dense"])

    def local(params, grads):
        return tx.update(grads, tx.init(params), params)[1].churn

    with mesh_of("auto", (8,), ("x",)) as mesh:
        churn = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P())
    alone = mask_by_importance(0.9, track_churn=True)
    _, state = alone.update(grads, alone.init(params), params)
    assert jax.jit(churn)(params, grads) == churn_of(state)


# Metrics


@pytest.mark.parametrize("ratio", [0.0, 0.9])
def test_metrics_are_those_of_numpy(ratio):
    tx = gsm_sgd(2**-3, ratio)
    for params, grads, state in run(tx, prune(draw(0), 0.2), steps=2):
        values = metrics(params, state)
        assert values == jax.jit(metrics)(params, state)
        weights = np.concatenate([np.ravel(params[k]) for k in KERNELS])
        scores = [np.abs(np.asarray(params[k]) * np.asarray(grads[k])) for k in KERNELS]
        active = oracle.active(scores, oracle.budget(ratio, TOTAL))
        chosen = np.concatenate([s[b] for s, b in zip(scores, active, strict=True)])
        expected = {
            "gsm/threshold": chosen.min() if ratio else 0,
            "gsm/num_active": chosen.size,
            "gsm/shortfall": max(oracle.budget(ratio, TOTAL) - chosen.size, 0),
            "gsm/active_fraction": chosen.size / TOTAL,
            "gsm/density": np.mean(weights != 0),
            "gsm/near_zero": np.mean(np.abs(weights) < np.float32(1e-4)),
        }
        assert list(values) == list(expected)
        for name, value in expected.items():
            assert values[name].shape == ()
            assert float(values[name]) == pytest.approx(value, rel=1e-6), name


def test_everything_and_nothing_are_exact_fractions():
    """56 entries, because 56 * (1 / 56) is not 1 in float32."""
    params, tx = {"w": jnp.full((7, 8), 0.1)}, gsm_sgd(0.1, 0.0)
    _, state = tx.update(params, tx.init(params), params)
    values = jax.jit(metrics)(params, state)
    assert values["gsm/density"] == values["gsm/active_fraction"] == 1
    assert values["gsm/near_zero"] == 0


def test_optional_metrics_are_there_when_asked_for():
    params, _, state = run(gsm_sgd(0.1, 0.9, track_churn=True), draw(0), steps=1)[-1]
    left = decay_budget_left(0.1, 100, momentum=0.9, weight_decay=0.1)
    values = jax.jit(lambda *args: metrics(*args, decay_left=left(1)))(params, state)
    assert values["gsm/churn"] == churn_of(state)
    assert values["gsm/decay_budget_left"] == pytest.approx(-99 * np.log(0.9) / 2)


@pytest.mark.parametrize(
    ("params", "tx", "message"),
    [
        (
            {"w": jnp.ones((2, 2))},
            optax.adam(0.1),
            "found 0 states.*optimizer with gsm",
        ),
        ({"w": jnp.ones((2, 2))}, optax.chain(gsm(0.5), gsm(0.75)), "one by one"),
    ],
)
def test_a_state_without_one_choice_is_refused(params, tx, message):
    with pytest.raises(ValueError, match=message):
        metrics(params, tx.init(params))


def test_another_tree_is_refused():
    state = gsm(0.5).init({"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"chooses among w, .* parameters: u, v\."):
        metrics({"u": jnp.ones(2), "v": jnp.ones((2, 2))}, state)


@pytest.mark.optimize(False)
def test_of_an_ensemble_each_is_asked_alone():
    params = jnp.arange(1.0, 25).reshape(2, 3, 4)  # the second is the greater
    tx = gsm_sgd(0.1, 0.75)
    _, state = jax.vmap(tx.update)(params, jax.vmap(tx.init)(params), params)
    for call in (
        metrics,
        lambda p, s: prune(p, 0.75, opt_state=s),
        Recorder().__call__,
    ):
        with pytest.raises(ValueError, match=r"in axes \[2\].*jax\.vmap\(metrics\)"):
            call(*([0] * (call.__name__ == "__call__")), params, state)
    values = jax.vmap(metrics)(params, state)
    assert values["gsm/active_fraction"].tolist() == [0.25, 0.25]
    pruned = jax.vmap(lambda p, s: prune(p, 0.75, opt_state=s))(params, state)
    assert (pruned != 0).sum((1, 2)).tolist() == [3, 3]


@pytest.mark.optimize(False)
def test_parts_that_are_left_out_as_a_whole_are_not_counted():
    """As many holes as leaves once made the bias of one layer the kernel of another."""
    layer = lambda scale: (scale * jnp.arange(1.0, 5).reshape(2, 2), jnp.arange(1.0, 3))
    params = [layer(9.0), layer(1.0), ()]
    halves = {"pruned": gsm_sgd(0.1, 0.5), "other": optax.sgd(0.1)}
    for tx in (
        optax.masked(gsm_sgd(0.1, 0.5), [False, True, False]),
        optax.partition(halves, ["other", "pruned", "other"]),
    ):
        _, state = first_step(tx, params, params)
        pruned = prune(params, 0.5, opt_state=state)
        np.testing.assert_array_equal(pruned[1][0], [[0, 0], [3, 4]])
        longer = [*params, jnp.ones((2, 2))]
        with pytest.raises(ValueError, match=r"^3 is not among the parameters"):
            prune(longer, 0.5, opt_state=state)
        for some in (params, {1: params[1]}):
            values = metrics(some, state)
            assert values["gsm/active_fraction"] == 0.5
            assert values["gsm/density"] == 1
        pruned[1] = params[1]
        for one, other in zip(*map(jax.tree.leaves, (pruned, params)), strict=True):
            np.testing.assert_array_equal(one, other)


# Decay left


@pytest.mark.promotes
@pytest.mark.filterwarnings("ignore:decay budget")
def test_decay_left_is_the_tail_of_the_budget():
    schedule = optax.piecewise_constant_schedule(0.1, {60: 0.1, 80: 0.1})
    options = {"momentum": 0.9, "weight_decay": 0.2}
    left = decay_budget_left(schedule, 100, **options)
    total = decay_budget(schedule, 100, **options).total
    assert float(left(0)) == pytest.approx(total)
    for step in (1, 59, 60, 99):
        spent = decay_budget(schedule, step, **options).total
        assert float(jax.jit(left)(step)) == pytest.approx(total - spent, rel=1e-4)
    assert left(100) == left(1000) == 0


def test_decay_left_refuses_what_decay_budget_does():
    with pytest.raises(ValueError, match="steps=0 must be"):
        decay_budget_left(0.1, 0)


# Recorder


def test_records_are_counts_of_numpy():
    tx, recorder = gsm_sgd(2**-3, 0.9, track_churn=True), Recorder()
    exponents = np.arange(-12, 1.5, 0.25)
    for step, (params, _, state) in enumerate(run(tx, draw(0), steps=3)):
        recorder(step, params, state)
        record = recorder.records[-1]
        assert record["step"] == step
        for name, value in metrics(params, state).items():
            assert record[name] == value
        weights = np.abs(np.concatenate([np.ravel(params[k]) for k in KERNELS]))
        nonzero = weights[weights > 0]
        edges = np.float32([0, *10.0**exponents, np.inf])
        counts = np.histogram(nonzero, edges)[0]
        assert record["magnitudes"] == [np.sum(weights == 0), *counts, 0]
        for name in KERNELS:
            leaf = np.abs(params[name])
            assert record["layers"][name] == {
                "entries": leaf.size,
                "nonzero": np.count_nonzero(leaf),
                "near_zero": np.sum(leaf < np.float32(1e-4)),
            }


def test_odd_values_have_their_classes():
    params = jnp.asarray([[0, 1e-40, 1e-13, 1e-4, 30, np.inf, np.nan]], jnp.float32)
    tx, recorder = gsm(0.5, prunable=True), Recorder()
    recorder(0, params, tx.init(params))
    counts = recorder.records[0]["magnitudes"]
    assert sum(counts) == 7
    assert counts[0] + counts[1] == 3
    assert counts[-2:] == [2, 1]
    assert recorder.records[0]["layers"][""]["near_zero"] == 3


def test_records_survive_json_and_go_on():
    left = decay_budget_left(0.1, 10)
    recorder = Recorder(decay_left=left)
    params, _, state = run(gsm_sgd(0.1, 0.9), draw(0), steps=1)[-1]
    recorder(np.int64(3), params, state)
    saved = json.loads(json.dumps(recorder.records))
    assert saved == recorder.records
    assert saved[0]["gsm/decay_budget_left"] == left(3)
    resumed = Recorder(decay_left=left, records=saved)
    resumed(4, params, state)
    assert [record["step"] for record in resumed.records] == [3, 4]


def test_prunable_is_followed():
    options = {"prunable": {"bias": False, "conv": False, "dense": True}}
    tx = gsm_sgd(0.1, 0.9, **options, track_churn=True)
    recorder = Recorder()
    recorder(1, *run(tx, draw(0), steps=1)[-1][::2])
    (record,) = recorder.records
    assert list(record["layers"]) == ["dense"]
    assert record["gsm/active_fraction"] == pytest.approx(
        record["gsm/num_active"] / (32 * 24)
    )


@pytest.mark.promotes
def test_a_flax_nnx_model_is_recorded_and_unchanged():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs))
    tx = gsm_sgd(optax.constant_schedule(0.1), 0.5, track_churn=True)
    optimizer, recorder = nnx.Optimizer(model, tx, wrt=nnx.Param), Recorder()

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean(model(jnp.ones((2, 4))) ** 2)
        optimizer.update(model, nnx.grad(loss)(model))
        return metrics(nnx.state(model, nnx.Param), optimizer.opt_state)

    for i in range(3):
        values = step(model, optimizer)
        recorder(i, nnx.state(model, nnx.Param), optimizer.opt_state)
        for name, value in values.items():
            assert recorder.records[-1][name] == value
    assert len(recorder.records[0]["layers"]) == 2
    assert recorder.records[0]["gsm/churn"] == recorder.records[0]["gsm/num_active"]
