"""Every figure draws what the records say; without matplotlib one line says so."""

import importlib
import json
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from trees import normal

from gsm_optax import Recorder, gsm_sgd
from gsm_optax.freezing import periodic, single_shot

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from gsm_optax import plot

pytestmark = pytest.mark.optimize(False)

STEPS = [1, 2, 3, 4, 8]


def record(tx, shapes):
    """Records of a few steps with drawn gradients, as they come back from a file."""
    draw = lambda seed: optax.tree.scale(1e-3, normal(shapes, seed))
    params, recorder = draw(0), Recorder()
    state, update = tx.init(params), jax.jit(tx.update)
    for step in STEPS:
        _, state = update(draw(step), state, params)
        recorder(step, params, state)
        params = {name: 0.3 * leaf for name, leaf in params.items()}
    return json.loads(json.dumps(recorder.records))


@pytest.fixture(scope="module")
def records():
    shapes = {"first/kernel": (8, 6), "last/kernel": (6, 3)}
    return record(gsm_sgd(0.1, 0.75, track_churn=True), shapes)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def column(records, name):
    return np.array([record[name] for record in records])


def assert_line(line, values):
    np.testing.assert_array_equal(line.get_xdata(), STEPS)
    np.testing.assert_allclose(line.get_ydata(), values)


def test_magnitudes_are_the_shares_of_every_class(records):
    ax = plot.magnitudes(records)
    (image,) = ax.collections
    shares = np.asarray(image.get_array())
    counts = column(records, "magnitudes")
    np.testing.assert_allclose(shares.sum(0), 100)
    np.testing.assert_allclose(shares[0], 100 * counts[:, :2].sum(1) / 66)
    np.testing.assert_allclose(shares[1:].T, 100 * counts[:, 2:-1] / 66)
    corners = image.get_coordinates()
    np.testing.assert_array_equal(corners[0, :, 0], [0.5, 1.5, 2.5, 3.5, 6, 10])
    # Rows of log10|w| -4 to -3.75, where the counts between 1e-4 and 10**-3.75 are.
    row = list(corners[:, 0, 1]).index(-4)
    assert corners[row + 1, 0, 1] == -3.75
    near = [sum(x["near_zero"] for x in r["layers"].values()) for r in records]
    np.testing.assert_allclose(shares[:row].sum(0), 100 * np.array(near) / 66)


def test_a_run_that_diverged_is_drawn():
    tx, params = gsm_sgd(0.1, 0.5), {"kernel": jnp.full((3, 4), jnp.nan)}
    recorder = Recorder()
    recorder(1, params, tx.init({"kernel": jnp.ones((3, 4))}))
    (image,) = plot.magnitudes(recorder.records).collections
    assert not np.asarray(image.get_array()).any()
    plot.overview(recorder.records)


def test_near_zero_and_what_is_passive(records):
    near, passive = plot.near_zero(records).lines
    assert_line(near, 100 * column(records, "gsm/near_zero"))
    assert_line(passive, 100 * (1 - column(records, "gsm/active_fraction")))
    assert near.get_ydata()[-1] > near.get_ydata()[0]


def test_density_has_a_named_line_a_layer(records):
    ax = plot.density(records)
    for line, (name, entries) in zip(
        ax.lines, {"first": 48, "last": 18}.items(), strict=True
    ):
        layers = [record["layers"][f"{name}/kernel"] for record in records]
        left = [100 * (1 - layer["near_zero"] / entries) for layer in layers]
        assert_line(line, left)
        assert line.get_label() == f"{name} {left[-1]:.1f} %"


def test_of_many_layers_the_first_and_the_last_are_named(records):
    names = [f"{i:02}/kernel" for i in range(12)]
    layer = records[0]["layers"]["first/kernel"]
    ax = plot.density([r | {"layers": dict.fromkeys(names, layer)} for r in records])
    assert len(ax.lines) == 12
    names = [text.get_text().split()[0] for text in ax.get_legend().get_texts()]
    assert names == ["00", "11"]


def test_threshold_and_active_fraction(records):
    ax = plot.threshold(records)
    assert_line(ax.lines[0], column(records, "gsm/threshold"))
    assert ax.get_yscale() == "log"
    (right,) = (other for other in ax.figure.axes if other is not ax)
    assert_line(right.lines[0], 100 * column(records, "gsm/active_fraction"))


def test_churn(records):
    assert_line(plot.churn(records).lines[0], column(records, "gsm/churn"))


def test_overview_draws_what_there_is(records, tmp_path):
    titles = lambda figure: [ax.get_title() for ax in figure.axes if ax.get_title()]
    figure = plot.overview(records)
    everything = titles(figure)
    assert everything[-1] == "Churn"
    assert len(everything) == 5
    figure.savefig(tmp_path / "all.png")
    untracked = [{k: v for k, v in r.items() if k != "gsm/churn"} for r in records]
    assert titles(plot.overview(untracked)) == everything[:-1]
    plot.overview(untracked[:1]).savefig(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"gsm_sgd\(.*track_churn=True"):
        plot.churn(untracked)


def test_with_every_entry_active_and_with_zeros(tmp_path):
    tx, params, recorder = gsm_sgd(0.1, 0.0), jnp.zeros((3, 3)), Recorder()
    _, state = tx.update(params, tx.init(params), params)
    for step in (1, 2):
        recorder(step, params, state)
    plot.overview(recorder.records).savefig(tmp_path / "zeros.png")
    shares = plot.magnitudes(recorder.records).collections[0].get_array()
    assert shares[0].tolist() == [100, 100]


@pytest.mark.parametrize("name", ["magnitudes", "near_zero", "density", "threshold"])
def test_draws_where_it_is_told_and_nowhere_else(name, records):
    figure, (left, right) = plt.subplots(1, 2)
    assert getattr(plot, name)(records, right) is right
    assert not left.has_data()
    assert right.has_data()
    assert plt.get_fignums() == [figure.number]


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="no records"):
        plot.overview([])


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    """What `import gsm_optax` itself brings is tested in test_package.py."""
    for name in list(sys.modules):
        if name.startswith("matplotlib"):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "gsm_optax.plot")
    with pytest.raises(ImportError, match=r'^[^\n]*pip install "gsm_optax\[plot\]"'):
        importlib.import_module("gsm_optax.plot")


def test_importing_plot_chooses_no_backend():
    matplotlib.use("svg")
    try:
        importlib.reload(plot)
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use("Agg")


def test_frozen_blocks_are_filled_from_the_front():
    schedules = {
        "once": single_shot(4, 2, 3),
        "by turns": periodic((4, 2, 1, 1), 2),
        "later": single_shot(9, 1, 1),
    }
    figure = plot.frozen_blocks(schedules, steps=10, blocks=4)
    assert [ax.get_title() for ax in figure.axes] == list(schedules)
    for ax, schedule in zip(figure.axes, schedules.values(), strict=True):
        (area,) = (path for c in ax.collections[:1] for path in c.get_paths())
        for step in range(10):
            for block in range(4):
                filled = area.contains_point((step + 0.5, block + 0.5))
                assert filled == (block < schedule(step))
