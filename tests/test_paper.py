"""The paper's experiments: models, data, schedules, and runs that go on bit for bit."""

import gzip
import json
import re
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.paper import bench, figure, methods, tables
from examples.paper.data import Arrays, Data, Stream, load, read_idx
from examples.paper.experiment import Experiment, Options
from examples.paper.methods import Phase
from examples.paper.models import MODELS, create
from examples.paper.models.densenet40 import DenseNet40
from examples.paper.models.lenet5 import PatchConv, max_pool
from examples.paper.models.resnet50 import ResNet50
from examples.paper.models.resnet56 import ResNet56
from examples.paper.recipes import DIGITS, RECIPES, RESNET50, RESNET56
from examples.paper.training import (
    State,
    Task,
    evaluate,
    normalise,
    shift_and_mirror,
    step,
    train,
)
from gsm_optax import apply_mask, magnitude_mask

# optax's schedules and flax's batch normalisation promote.
pytestmark = pytest.mark.promotes

ROOT = Path(__file__).parent.parent


# Models


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("mlp", 50_200),
        ("lenet_300_100", 266_200),
        ("lenet5", 430_500),
        ("resnet56", 851_504),
        ("densenet40", 1_001_616),
        ("resnet50", 25_502_912),
    ],
)
def test_kernel_entries_are_those_of_the_paper(name, kernels):
    params = nnx.eval_shape(lambda: nnx.state(create(name, 0), nnx.Param))
    assert sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1) == kernels


def test_every_model_has_a_count():
    assert set(MODELS) == {recipe.model for recipe in RECIPES.values()}


def test_convolution_by_patches_is_a_convolution():
    layer = PatchConv(3, 4, nnx.Rngs(0), None)
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    layer.bias[...] = jnp.arange(4.0)
    np.testing.assert_allclose(layer(x), nnx.Conv.__call__(layer, x), atol=1e-5)


def test_max_pool_takes_the_greatest_of_four():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    pooled = nnx.max_pool(x, (2, 2), (2, 2))
    np.testing.assert_array_equal(max_pool(x), pooled)


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet5"])
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(name):
    model = create(name, 0, jnp.bfloat16)
    assert model(jnp.zeros((2, 28, 28, 1))).dtype == jnp.bfloat16
    dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))}
    assert dtypes == {jnp.dtype("float32")}


# Data


def write_idx(path, array):
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, end):
    """Write a small data set in MNIST's four files; return its training images."""
    images = np.arange(12 * 28 * 28).reshape(12, 28, 28) % 256
    for part, images_of in {"train": images, "t10k": images[:5]}.items():
        write_idx(folder / f"{part}-images-idx3-ubyte{end}", images_of)
        labels = np.arange(len(images_of)) % 10
        write_idx(folder / f"{part}-labels-idx1-ubyte{end}", labels)
    return images


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files(tmp_path, end):
    images = write_mnist(tmp_path, end)
    data = load("mnist", tmp_path)
    np.testing.assert_array_equal(data.train.images[..., 0], images)
    assert data.test.labels.tolist() == [0, 1, 2, 3, 4]
    assert data.train.images.dtype == np.uint8


def test_data_folder_from_the_environment(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    write_mnist(tmp_path / "mnist", "")
    monkeypatch.setenv("GSM_DATA", str(tmp_path))
    assert len(load("mnist").train) == 12


def test_idx_files_that_are_none_or_cut_off(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not an idx file"):
        read_idx(path)
    write_idx(path, np.zeros((4, 5)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"19 bytes, its header says \(4, 5\)"):
        read_idx(path)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet"])
def test_missing_data_fail_at_once_and_say_what_to_do(name, tmp_path):
    begin = time.monotonic()
    with pytest.raises(FileNotFoundError, match="download_and_prepare"):
        load(name, tmp_path)
    assert time.monotonic() - begin < 1


def test_unknown_data():
    with pytest.raises(ValueError, match="'mnits' is unknown; there are digits, mnist"):
        load("mnits")


def test_validation_leaves_the_test_set_alone():
    whole, part = load("digits"), load("digits", validate=True)
    assert len(part.train) + len(part.test) == len(whole.train)
    together = np.concatenate([part.train.images, part.test.images])
    np.testing.assert_array_equal(together, whole.train.images)


def test_normalised_images_have_no_mean_and_unit_variance():
    images = np.random.default_rng(0).normal(0.286, 0.1, (64, 8, 8, 1)) * 255
    images = jnp.asarray(images.clip(0, 255).astype(np.uint8))
    x = normalise(images, (0.286,), (0.1,))
    assert abs(x.mean()) < 0.05
    assert abs(x.std() - 1) < 0.05


def test_augmentation_shifts_and_mirrors():
    image = jnp.arange(1, 1 + 32 * 32 * 3, dtype=jnp.int32).reshape(1, 32, 32, 3)
    batch = jnp.repeat(image, 64, 0)
    moved = shift_and_mirror(batch, jax.random.key(0))
    inside = moved[:, 4:28, 4:28]  # pixels that no shift replaces
    assert set(np.unique(inside)) <= set(np.unique(image))
    row_order = np.sign(inside[:, 0, 1, 0] - inside[:, 0, 0, 0])
    assert {-1, 1} == set(row_order.tolist())
    assert len({tuple(x.ravel().tolist()[:6]) for x in np.asarray(inside)}) > 32
    assert (moved == 0).any()  # the black around an image


def test_streamed_images_are_cropped_by_seed():
    rng = np.random.default_rng(0)
    shapes = [(300, 200, 3), (80, 500, 3), (224, 224, 3)]
    source = [
        {"image": rng.integers(0, 256, shape).astype(np.uint8), "label": i}
        for i, shape in enumerate(shapes)
    ]
    stream, rows = Stream(source, random=True, size=32), np.array([2, 0, 1])
    images, labels = stream.read(rows, 1)
    assert images.shape == (3, 32, 32, 3)
    assert labels.tolist() == [2, 0, 1]
    np.testing.assert_array_equal(stream.read(rows, 1)[0], images)
    assert (stream.read(rows, 2)[0] != images).any()
    fixed = Stream(source, random=False, size=32)
    np.testing.assert_array_equal(fixed.read(rows, 1)[0], fixed.read(rows, 2)[0])


def test_prepared_cifar10_is_read_from_tensorflow_datasets(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    (tmp_path / "cifar10" / "3.0.2" / "cifar10-train.array_record-0").touch()
    with tfds.testing.mock_data(num_examples=5):
        data = load("cifar10", tmp_path)
    assert data.train.images.shape == (5, 32, 32, 3)
    assert data.augmented


# Schedules and optimizers


def test_the_papers_schedule():
    phase = RECIPES["mnist-lenet300-60x"].gsm
    rate = phase.schedule(234)
    at = lambda epoch: float(rate(round(epoch * 234)))
    assert at(0) == 0
    assert at(2.5) == pytest.approx(5e-3, rel=1e-2)
    assert [at(e) for e in (5, 159, 161, 201, 241, 279)] == pytest.approx(
        [1e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-5]
    )


def test_cosine_and_ramp():
    phase = Phase(10, 0.1, cosine=True, ramp=0.5)
    rate, ratio = phase.schedule(10), phase.ratio_schedule(0.9, 10)
    assert float(rate(50)) == pytest.approx(0.05)
    assert float(rate(100)) == pytest.approx(0, abs=1e-9)
    assert float(ratio(0)) == 0
    assert float(ratio(25)) == pytest.approx(0.9 * (1 - 0.5**3))
    assert float(ratio(50)) == float(ratio(99)) == pytest.approx(0.9)


def test_gradual_pruning_keeps_its_zeros_and_reaches_the_ratio():
    params = {"kernel": jax.random.normal(jax.random.key(0), (20, 10))}
    ratio = Phase(1, 0.1, ramp=0.6).ratio_schedule(0.9, 50)
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9), methods.prune_gradually(ratio, every=5)
    )
    state, zeros, history = tx.init(params), np.zeros((20, 10), bool), []
    update = jax.jit(tx.update)
    for i in range(50):
        grads = jax.tree.map(lambda x: jnp.sin(x + i), params)  # noqa: B023
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        now = np.asarray(params["kernel"]) == 0
        assert (now >= zeros).all()
        zeros = now
        history.append(int(zeros.sum()))
    assert history[0] == 0
    assert history[20] == round(200 * float(ratio(20)))
    assert history[-1] == 180


# Training


def task_of(name, batch=64, graph=None, data=None, looped=True):
    graph = graph or nnx.split(create(name, 0), nnx.Param, ...)[0]
    return Task(graph, data or load("digits"), batch, 0, looped)


def digits_phase(folder, until=None, looped=True, batch=64):
    """Run two epochs of GSM on the digits, up to a step; return the state."""
    graph, params, stats = nnx.split(create("mlp", 0), nnx.Param, ...)
    task = task_of("mlp", batch, graph, looped=looped)
    tx = methods.gsm(Phase(2, 3e-2, momentum=0.9), task.steps_per_epoch, 0.9)
    return train(task, tx, params, stats, 2, folder, "test", until)


def digest(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return digest(digits_phase(tmp_path_factory.mktemp("whole")))


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(whole_run, tmp_path):
    assert int(digits_phase(tmp_path, until=7).step) == 7
    assert int(digits_phase(tmp_path, until=30).step) == 30  # in the second epoch
    assert digest(digits_phase(tmp_path)) == whole_run
    assert digest(digits_phase(tmp_path)) == whole_run  # nothing is left to do


def test_steps_from_the_host_are_those_in_the_loop(whole_run, tmp_path):
    state = digits_phase(tmp_path, looped=False)
    for a, b in zip(digest(state), whole_run, strict=True):
        a, b = np.frombuffer(a, np.float32), np.frombuffer(b, np.float32)
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_batches_are_split_over_all_devices():
    task = task_of("mlp")
    assert task.mesh.size == len(jax.devices()) == 8
    assert task_of("mlp", batch=6).mesh.size == 6  # the most that divide it
    split = jax.jit(task.split)(jnp.zeros((64, 3)))
    assert {shard.data.shape for shard in split.addressable_shards} == {(8, 3)}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    graph, params, stats = nnx.split(create("mlp", 0), nnx.Param, ...)
    params = jax.tree.map(lambda x: x * jnp.nan, params)
    task = task_of("mlp", graph=graph)
    with pytest.raises(FloatingPointError, match="loss is nan after 22 steps"):
        train(task, optax.sgd(0.1), params, stats, 1, tmp_path, "test")


def test_evaluation_counts_hits():
    graph, params, stats = nnx.split(create("mlp", 0), nnx.Param, ...)
    params = jax.tree.map(jnp.zeros_like, params)
    params["head"]["bias"][...] = jnp.arange(10.0)  # the answer is always 9
    task = task_of("mlp", graph=graph)
    labels = task.data.test.labels
    top1, top5 = evaluate(task, params, stats)
    assert top1 == pytest.approx(100 * (labels == 9).mean())
    assert top5 == pytest.approx(100 * (labels >= 5).mean())


# Experiments


SHORT = replace(
    DIGITS,
    name="short",
    compression=10,
    dense=Phase(4, 5e-2),
    gsm=Phase(8, 5e-2, momentum=0.95, weight_decay=2e-2),
    gradual=Phase(8, 5e-2, ramp=0.6),
    tuned=Phase(2, 5e-2),
)


def test_all_columns_of_a_row(tmp_path):
    record = Experiment(SHORT, 0, Options(tmp_path)).run()
    accuracy = record["accuracy"]
    assert set(accuracy) == set(tables.COLUMNS)
    assert min(accuracy[name] for name in ("dense", "gradual", "GSM tuned")) > 80
    layers = record["layers"]
    assert sum(layer["nonzero"] for layer in layers) == 5020
    assert record["zeros_moved"] == {"tuned": 0}
    on_disk = json.loads((tmp_path / "short-seed0.json").read_text())
    assert on_disk["accuracy"] == accuracy
    assert on_disk["versions"]["jax"] == jax.__version__


def test_tickets_share_the_dense_network_and_keep_their_zeros(tmp_path):
    recipe = replace(SHORT, name="tickets", tickets=1, dense=Phase(3, 5e-2))
    experiment = Experiment(recipe, 0, Options(tmp_path))
    record = experiment.run()
    assert set(record["accuracy"]) == set(tables.TICKETS)
    assert set(record["zeros_moved"].values()) == {0}
    assert len(record["zeros_moved"]) == 4
    again = Experiment(recipe, 0, Options(tmp_path)).run()
    assert again["accuracy"] == record["accuracy"]


def test_a_ticket_starts_from_the_initial_weights_of_the_survivors(tmp_path):
    experiment = Experiment(SHORT, 0, Options(tmp_path))
    mask = magnitude_mask(experiment.initial.params, 0.5)
    ticket = experiment.initial.masked(mask, "ticket")
    frozen = methods.frozen(SHORT.dense, 22, mask)
    state = frozen.init(ticket.params)
    grads = jax.tree.map(jnp.ones_like, ticket.params)
    updates, _ = frozen.update(grads, state, ticket.params)
    moved = optax.apply_updates(ticket.params, updates)
    expected = apply_mask(moved, mask)
    jax.tree.map(np.testing.assert_array_equal, moved, expected)


def test_table_and_figure(tmp_path):
    recipe = replace(SHORT, name="digits-20x")
    layers = [
        {"path": f"dense{i}/kernel", "entries": 100, "nonzero": 5 + i} for i in range(3)
    ]
    for seed, accuracy in enumerate([97.0, 98.0, 99.0]):
        record = {
            "recipe": {"name": recipe.name},
            "validate": False,
            "accuracy": {"dense": accuracy},
            "layers": layers,
            "versions": {"jax": "1"},
            "machine": "m",
            "command": "c",
        }
        path = tmp_path / f"digits-20x-seed{seed}.json"
        path.write_text(json.dumps(record))
    table = tables.results_table(tmp_path)
    assert re.search(r"digits +\| +20x \| .* 3 \| 98.00 ± 1.00 \| +- \|", table)
    assert "not run" in table
    figure.draw(tmp_path, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_command_line(tmp_path):
    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "examples.paper", *args],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
        )

    done = run("list")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in RECIPES)
    done = run("run", "cifar-resnet56-10x", "--data", str(tmp_path))
    assert done.returncode != 0
    assert "error: cifar10 is not on this machine" in done.stderr
    assert "Traceback" not in done.stderr


# The deep networks


def steps_of(recipe, model, size, classes, batch, count=3):
    """Take steps of the recipe's GSM phase on noise; return losses and state."""
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    data = bench.synthetic(size, classes, batch)
    task = Task(graph, data, batch, 0, looped=False)
    tx = methods.gsm(recipe.gsm, 2, recipe.ratio)
    state = task.replicate(State(jnp.int32(0), params, stats, tx.init(params)))
    jitted, losses = jax.jit(lambda *args: step(task, tx, *args)), []
    for _ in range(count):
        state, _, loss = jitted(state, *data.train.read(np.arange(batch)))
        losses.append(float(loss))
    return losses, state, stats


def check_steps(recipe, model, size, classes, batch):
    losses, state, stats = steps_of(recipe, model, size, classes, batch)
    assert np.isfinite(losses).all()
    kernels = sum(x.size for x in jax.tree.leaves(state.params) if x.ndim > 1)
    active = int(optax.tree.get(state.opt_state, "num_active"))
    kept = kernels - round(recipe.ratio * kernels)
    assert kept <= active <= kept + 10  # ties
    before, after = (jax.tree.leaves(tree) for tree in (stats, state.stats))
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("recipe", "make"),
    [
        (RESNET56, lambda: ResNet56(nnx.Rngs(0), blocks=1)),
        (RECIPES["cifar-densenet40-8x"], lambda: DenseNet40(nnx.Rngs(0), layers=1)),
    ],
)
def test_some_steps_of_shallow_networks(recipe, make):
    check_steps(recipe, make(), 32, 10, 8)


def test_some_steps_of_a_shallow_resnet50():
    check_steps(RESNET50, ResNet50(nnx.Rngs(0), blocks=(1, 1)), 32, 1000, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "size"),
    [(RESNET56, 32), (RECIPES["cifar-densenet40-8x"], 32), (RESNET50, 64)],
)
def test_some_steps_of_the_deep_networks(recipe, size):
    classes = 1000 if size == 64 else 10
    check_steps(recipe, create(recipe.model, 0), size, classes, 8)


def test_data_of_noise_is_a_data_set():
    data = bench.synthetic(32, 10, 4)
    assert isinstance(data, Data)
    assert isinstance(data.train, Arrays)
