"""The paper's experiments: models, data, schedules, and runs that go on bit for bit."""

import gzip
import json
import re
import struct
import sys
import time
import types
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.paper import experiment, figures, methods, records, tables, training
from examples.paper.__main__ import main
from examples.paper.data import STATISTICS, Arrays, Data, Stream, load, read_idx
from examples.paper.models import MODELS, DenseNet40, ResNet, create, max_pool
from examples.paper.recipes import RECIPES, Phase, settings
from examples.paper.training import Trainer, normalise, shift_and_mirror
from gsm_optax import apply_mask, magnitude_mask

# optax's schedules and flax's batch normalisation promote.
pytestmark = [pytest.mark.promotes, pytest.mark.optimize(False)]

# Models


LARGE = {"resnet56", "densenet40", "resnet50"}  # which flax takes seconds to build


@pytest.mark.parametrize(
    "names", [set(MODELS) - LARGE, pytest.param(LARGE, marks=pytest.mark.slow)]
)
def test_kernel_entries_are_those_of_the_paper(names):
    def count(name):
        params = nnx.eval_shape(lambda: nnx.state(create(name, 0), nnx.Param))
        return sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1)

    wanted = {
        "mlp": 50_200,
        "lenet_300_100": 266_200,
        "lenet5": 430_500,
        "resnet8": 77_072,
        "resnet20": 67_848,
        "resnet56": 851_504,
        "densenet40": 1_001_616,
        "resnet50": 25_502_912,
    }
    assert set(MODELS) == set(wanted)
    assert {recipe.model for recipe in RECIPES.values()} <= set(MODELS)
    assert {name: count(name) for name in names} == {n: wanted[n] for n in names}


def test_max_pool_takes_the_greatest_of_four():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    pooled = nnx.max_pool(x, (2, 2), (2, 2))
    np.testing.assert_array_equal(max_pool(x), pooled)


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet5"])
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(name):
    def logits_and_params():
        model = create(name, 0, jnp.bfloat16)
        return model(jnp.zeros((2, 28, 28, 1))), nnx.state(model, nnx.Param)

    logits, params = nnx.eval_shape(logits_and_params)
    assert logits.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


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
    with pytest.raises(
        ValueError, match=r"file is cut off.* size 19 into shape \(4,5\)"
    ):
        read_idx(path)


def test_a_folder_that_is_named_is_the_only_one(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    write_mnist(tmp_path / "mnist", "")
    monkeypatch.setenv("GSM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"elsewhere/mnist, .*elsewhere"):
        load("mnist", tmp_path / "elsewhere")
    assert load("mnist").source == str(tmp_path / "mnist")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet"])
def test_missing_data_fail_at_once_and_say_what_to_do(name, tmp_path):
    begin = time.monotonic()
    with pytest.raises(FileNotFoundError, match="download_and_prepare") as caught:
        load(name, tmp_path)
    assert f"data_dir='{tmp_path}'" in str(caught.value)  # where it was looked for
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


@pytest.fixture
def prepared(tmp_path):
    """A folder that looks like CIFAR-10 and ImageNet, prepared."""
    for name in ("cifar10", "imagenet2012"):
        (tmp_path / name / "1.0.0").mkdir(parents=True)
        (tmp_path / name / "1.0.0" / f"{name}-train.array_record-0").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "builder", "test"),
    [("cifar10", "cifar10", "test"), ("imagenet", "imagenet2012", "validation")],
)
def test_prepared_data_are_read_and_never_downloaded(
    name, builder, test, prepared, monkeypatch
):
    def data_source(asked, *, split, data_dir, download):
        assert (asked, data_dir, download) == (builder, prepared, False)
        image = np.full((32, 32, 3), split == "train", np.uint8)
        return [{"image": image, "label": i} for i in range(3 if split == test else 5)]

    tfds = types.SimpleNamespace(data_source=data_source)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    data = load(name, prepared)
    assert (len(data.train), len(data.test)) == (5, 3)
    images, labels = data.train.read(np.array([4, 2]))
    assert labels.tolist() == [4, 2]
    assert images.min() == 1
    assert data.augmented == (name == "cifar10")


def test_prepared_data_without_the_package(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        load("cifar10", prepared)


def test_tensorflow_datasets_itself(prepared):
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=5):
        data = load("cifar10", prepared)
    assert data.train.images.shape == (5, 32, 32, 3)


# Schedules and optimizers


def test_the_papers_schedule():
    phase = RECIPES["mnist-lenet300-60x"].gsm
    rate = methods.schedule(phase, 234)
    at = lambda epoch: float(rate(round(epoch * 234)))
    assert at(0) == 0
    assert at(2.5) == pytest.approx(5e-3, rel=1e-2)
    assert [at(e) for e in (5, 159, 161, 201, 241, 279)] == pytest.approx(
        [1e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-5]
    )


def test_cosine_and_ramp():
    phase = Phase(10, 0.1, cosine=True, ramp=0.5)
    rate, ratio = methods.schedule(phase, 10), methods.rising(phase, 10, 0.9)
    assert float(rate(50)) == pytest.approx(0.05)
    assert float(rate(100)) == pytest.approx(0, abs=1e-9)
    assert float(ratio(0)) == 0
    assert float(ratio(25)) == pytest.approx(0.9 * (1 - 0.5**3))
    assert float(ratio(50)) == float(ratio(99)) == pytest.approx(0.9)


def test_gradual_pruning_keeps_its_zeros_and_reaches_the_ratio():
    params = {"kernel": jax.random.normal(jax.random.key(0), (20, 10))}
    ratio = methods.rising(Phase(1, 0.1, ramp=0.6), 50, 0.9)
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


def noise(size=32, classes=10, count=16):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    arrays = Arrays(images, rng.integers(0, classes, count).astype(np.int32))
    return Data(arrays, arrays, *STATISTICS["cifar10"], augmented=size == 32)


def two_epochs(folder, model, data, batch, until=None):
    """Run two epochs of GSM, up to a step; return parameters and statistics."""
    graph, *network = nnx.split(model, nnx.Param, ...)
    trainer = Trainer(graph, data, batch, seed=0)
    tx = methods.gsm(Phase(2, 3e-2, momentum=0.9), trainer.epoch, 0.9)
    steps = until or 2 * trainer.epoch
    return trainer.train(network, tx, steps, "test", folder)


def digest(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


class Normalised(nnx.Module):
    """A small network with batch normalisation."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path, capfd):
    """With its momentum, batch statistics, augmentation and order of images."""
    run = lambda name, until=None: two_epochs(
        tmp_path / name, Normalised(nnx.Rngs(0)), noise(), 4, until
    )
    whole = run("whole")
    run("cut", 5)  # in the middle of the second epoch
    assert [x.name for x in (tmp_path / "cut").iterdir()] == ["5"]
    cut = run("cut")
    assert digest(cut) == digest(whole)
    assert digest(run("cut")) == digest(whole)  # nothing is left to do
    lines = capfd.readouterr().err.splitlines()  # no terminal: a line for each run
    assert [line.split(",")[0] for line in lines if line.startswith("test")] == [
        f"test: {steps} steps" for steps in (8, 5, 8)
    ]


def test_batches_are_split_over_all_devices_and_every_image_is_seen():
    images = Arrays(np.arange(70)[:, None], np.arange(70, dtype=np.int32))
    mesh = training.mesh_of(16)
    assert mesh.size == len(jax.devices()) == 8
    assert training.mesh_of(6).size == 6  # the most that divide it
    first = list(training.batches(images, 16, 0, 0, 8))
    assert {x.data.shape for x in first[0][0].addressable_shards} == {(2, 1)}
    labels = np.array([labels for _, labels in first]).reshape(2, -1)
    assert all(len(set(epoch.tolist())) == 64 for epoch in labels)
    assert (labels[0] != labels[1]).any()
    later = training.batches(images, 16, 0, 3, 8)
    assert np.array_equal([y for _, y in later], labels.reshape(8, -1)[3:])


def mlp(change):
    """A trainer for the digits, and a changed network."""
    graph, params, stats = nnx.split(create("mlp", 0), nnx.Param, ...)
    return Trainer(graph, load("digits"), 64, 0), (jax.tree.map(change, params), stats)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = Normalised(nnx.Rngs(0))
    model.head.bias[...] *= jnp.nan
    with pytest.raises(FloatingPointError, match="loss is nan after 3 steps"):
        two_epochs(tmp_path, model, noise(), 4, 3)


def test_evaluation_counts_hits():
    trainer, network = mlp(jnp.zeros_like)
    network[0]["head"]["bias"][...] = jnp.arange(10.0)  # the answer is always 9
    top1, top5 = trainer.accuracy(network)
    labels = trainer.data.test.labels
    assert top1 == pytest.approx(100 * (labels == 9).mean())
    assert top5 == pytest.approx(100 * (labels >= 5).mean())


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_answers_that_are_all_the_same_are_misses(value):
    trainer, network = mlp(lambda x: jnp.full_like(x, value))
    assert trainer.accuracy(network) == [0, 0]


# Experiments


SHORT = replace(
    RECIPES["digits-60x"],
    name="short",
    compression=10,
    dense=Phase(4, 5e-2),
    gsm=Phase(8, 5e-2, momentum=0.95, weight_decay=2e-2),
    gradual=Phase(8, 5e-2, ramp=0.6),
    tuned=Phase(2, 5e-2),
)


@pytest.fixture
def phases(monkeypatch):
    """What `train` was given and what it returned, by label; it may be cut."""
    seen = types.SimpleNamespace(starts={}, ends={}, cut=None, train=Trainer.train)

    def spy(trainer, network, tx, steps, label, folder):
        label = label.split(": ")[1]
        if label == seen.cut:
            raise KeyboardInterrupt
        seen.starts[label] = network[0]
        if not folder.exists():
            seen.trained.append(label)
        network = seen.train(trainer, network, tx, steps, label, folder)
        seen.ends[label] = network[0]
        return network

    seen.trained = []
    monkeypatch.setattr(Trainer, "train", spy)
    return seen


@pytest.mark.slow
def test_a_row_is_run_once_cut_off_or_not(tmp_path, phases):
    phases.cut = "GSM"
    with pytest.raises(KeyboardInterrupt):
        experiment.run(SHORT, 0, tmp_path)
    assert not records.read(tmp_path, SHORT)
    phases.cut = None
    record = experiment.run(SHORT, 0, tmp_path)
    assert phases.trained == ["dense", "gradual", "GSM", "tuned"]  # each of them once
    accuracy = record["accuracy"]
    assert set(accuracy) == set(records.PRUNED)
    assert min(accuracy[name] for name in ("dense", "gradual", "GSM tuned")) > 80
    assert sum(layer["nonzero"] for layer in record["layers"]) == 5020
    on_disk = json.loads((tmp_path / "short-seed0.json").read_text())
    assert on_disk["accuracy"] == accuracy
    assert on_disk["versions"]["jax"] == jax.__version__
    # What is complete is not run again; other settings are.
    phases.starts.clear()
    assert experiment.run(SHORT, 0, tmp_path) == record
    assert not phases.starts
    phases.cut = "dense"
    with pytest.raises(KeyboardInterrupt):  # it wants to train
        experiment.run(replace(SHORT, batch=63), 0, tmp_path)


@pytest.mark.slow
def test_tickets_are_survivors_with_the_weights_of_before(tmp_path, phases):
    check_tickets(TICKETS, tmp_path, phases)
    # Another recipe shares all but the early weights and what comes of them.
    phases.trained.clear()
    experiment.run(replace(TICKETS, tickets=2), 0, tmp_path)
    assert set(phases.trained) == {"early", "magnitude, early", "GSM, early"}


def test_tickets_without_training(tmp_path, phases, monkeypatch):
    """Weights that no phase trains, but each changes as it likes."""

    def change(trainer, network, tx, steps, label, folder):
        rng = np.random.default_rng(sum(label.encode()))
        change = lambda x: x * rng.uniform(0.5, 2, x.shape).astype(x.dtype)
        return jax.tree.map(change, network[0]), network[1]

    phases.train = change
    monkeypatch.setattr(Trainer, "accuracy", lambda trainer, network: [0.0, 0.0])
    check_tickets(TICKETS, tmp_path, phases)


TICKETS = replace(SHORT, name="tickets", tickets=1, dense=Phase(3, 5e-2))


def check_tickets(recipe, folder, phases):
    record = experiment.run(recipe, 0, folder)
    assert set(record["accuracy"]) == set(records.TICKETS)
    weights = {"initial": phases.starts["dense"], "early": phases.ends["early"]}
    chosen_by = {"magnitude": phases.ends["dense"], "GSM": phases.ends["GSM"]}
    for when, rewound in weights.items():
        for by, chosen in chosen_by.items():
            ticket = apply_mask(rewound, magnitude_mask(chosen, recipe.ratio))
            assert digest(phases.starts[f"{by}, {when}"]) == digest(ticket)
    assert digest(phases.starts["GSM"]) == digest(phases.ends["dense"])


def write_records(folder, recipe, accuracies, layers=()):
    for seed, accuracy in enumerate(accuracies):
        record = {
            "recipe": settings(recipe),
            "accuracy": dict.fromkeys(records.columns(recipe), accuracy),
            "layers": layers,
            "versions": {"jax": "1"},
            "machine": "m",
            "command": "c",
        }
        path = records.path_of(folder, recipe.name, seed)
        records.write(path, record)


def test_curve_draws_every_method_at_every_compression(tmp_path):
    with pytest.raises(SystemExit, match="run fashion-lenet300-60x and others first"):
        figures.compression(tmp_path, tmp_path / "curve.png")
    for name in ("fashion-lenet300-60x", "fashion-lenet300-tempered-60x"):
        write_records(tmp_path, RECIPES[name], [90.0, 88.0])
    write_records(tmp_path, RECIPES["fashion-lenet300-tempered-20x"], [89.0])
    upper, lower = figures.compression(tmp_path, tmp_path / "curve.png").axes
    assert (tmp_path / "curve.png").stat().st_size > 5_000
    for axis in (upper, lower):
        lines = {x.get_label(): x.lines[0].get_xydata() for x in axis.containers}
        assert set(lines) == set(figures.LINES)
        np.testing.assert_array_equal(lines["GSM, tempered"], [[20, 89], [60, 89]])
        np.testing.assert_array_equal(lines["dense"], [[60, 89]])
    assert [x.get_text() for x in lower.get_xticklabels()] == ["20x", "60x"]


def test_table_and_figure(tmp_path):
    recipe = RECIPES["digits-20x"]
    layers = [
        {"path": f"blocks/{i}/kernel", "entries": 100, "nonzero": 5 + i}
        for i in range(3)
    ]
    write_records(tmp_path, recipe, [97.0, 98.0, 99.0], layers)
    table = tables.results_table(tmp_path)
    assert re.search(r"digits +\| +20x \| .* 3 \| 98.00 ± 1.00 \| 98.00", table)
    assert "not run" in table
    drawn = figures.densities(tmp_path, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    bars = [bar.get_x() for bar in drawn.axes[0].patches]
    assert len(set(bars)) == 3  # of equal names, side by side


def test_runs_that_are_not_complete_or_of_other_settings_are_not_in_the_table(tmp_path):
    recipe = RECIPES["digits-20x"]
    write_records(tmp_path, recipe, [98.0])
    path = records.path_of(tmp_path, recipe.name, 0)
    whole = json.loads(path.read_text())
    assert records.read(tmp_path, recipe) == [whole]
    assert not records.read(tmp_path, recipe, validate=True)
    none = whole | {"recipe": whole["recipe"] | {"new_setting": None}}
    records.write(path, none)  # as good as not there
    assert records.read(tmp_path, recipe) == [none]
    part = whole | {"accuracy": {"dense": 98.0}}
    other = whole | {"recipe": whole["recipe"] | {"batch": 7}}
    for record in (part, other):
        records.write(path, record)
        assert not records.read(tmp_path, recipe)
    with pytest.raises(SystemExit, match="no results in"):
        figures.densities(tmp_path, tmp_path / "figure.png")


def test_command_line(tmp_path, capsys):
    main(["list"])
    listed = capsys.readouterr().out
    assert all(f"`{name}`" in listed for name in RECIPES)
    with pytest.raises(SystemExit, match=r"^error: cifar10 is not on this"):
        main(["run", "cifar-resnet56-10x", "--data", str(tmp_path)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "digits-60x", "--seeds", "0"], "'0' must be a whole number from 1 on"),
        (["run", "digits-60x", "--seeds", "x"], "'x' must be a whole number"),
        (["run", "digits"], "invalid choice: 'digits'"),
    ],
)
def test_bad_arguments(args, message, capsys):
    with pytest.raises(SystemExit):
        main(args)
    assert message in capsys.readouterr().err


# The deep networks


def check_steps(recipe, model, size, classes, batch=8):
    """Take steps of the recipe's GSM phase on noise."""
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    data = noise(size, classes, batch)
    tx = methods.gsm(recipe.gsm, 2, recipe.ratio)
    step = jax.jit(partial(training.step, graph, data, 0, tx))
    state, losses = training.start(params, stats, tx, batch), []
    for images, labels in training.batches(data.train, batch, 0, 0, 3):
        state, loss = step(state, images, labels)
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    kernels = sum(x.size for x in jax.tree.leaves(state.params) if x.ndim > 1)
    active = int(optax.tree.get(state.opt_state, "num_active"))
    kept = kernels - round(recipe.ratio * kernels)
    assert kept <= active <= kept + 10  # ties
    before, after = (jax.tree.leaves(tree) for tree in (stats, state.stats))
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


SHALLOW = {
    "ResNet, basic blocks": (
        RECIPES["cifar-resnet56-10x"],
        lambda: ResNet(nnx.Rngs(0), blocks=(1, 1, 1), width=16, classes=10),
        (32, 10),
    ),
    "DenseNet": (
        RECIPES["cifar-densenet40-8x"],
        lambda: DenseNet40(nnx.Rngs(0), layers=1),
        (32, 10),
    ),
    "ResNet, bottlenecks": (
        RECIPES["imagenet-resnet50-5x"],
        lambda: ResNet(nnx.Rngs(0), blocks=(1, 1), imagenet=True),
        (32, 1000),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHALLOW)
def test_some_steps_of_shallow_networks(name):
    recipe, make, shape = SHALLOW[name]
    check_steps(recipe, make(), *shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cifar-resnet56-10x", 32),
        ("cifar-densenet40-8x", 32),
        ("imagenet-resnet50-5x", 64),
    ],
)
def test_some_steps_of_the_deep_networks(name, size):
    recipe = RECIPES[name]
    check_steps(recipe, create(recipe.model, 0), size, 1000 if size == 64 else 10)
