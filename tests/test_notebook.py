"""The Colab notebook runs from its first cell to its last, on the data that is here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

PATH = Path(__file__).parent.parent / "examples" / "gsm_colab.ipynb"
# Of the tools that run the notebook, not of what runs in it.
pytestmark = pytest.mark.filterwarnings("ignore")


def read():
    return nbformat.read(PATH, as_version=4)


def execute(notebook, folder):
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=120, resources=resources).execute()
    return notebook


def texts(notebook):
    """What the cells print, and the figures and tables that they show."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    printed = "".join(out.text for out in outputs if out.output_type == "stream")
    shown = [kind for out in outputs for kind in out.get("data", ())]
    return printed, shown


@pytest.mark.slow
def test_runs_on_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "digits")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    printed, shown = texts(execute(read(), tmp_path))
    assert "digits: 1437 images to train on" in printed
    number = lambda name: float(re.search(rf"{name}: +([\d.]+) %", printed)[1])
    assert number("dense") > 95
    assert number("dense, pruned at once") < 50
    assert number("pruned") == pytest.approx(number("GSM"), abs=0.5)
    assert number("GSM") > 95
    assert "Pruning should be lossless" in printed
    assert "decay budget left 0.00" in printed
    assert number("smaller") == number("pruned")
    assert "entries stay" in printed
    assert shown.count("image/png") == 1
    assert shown.count("text/html") == 2


@pytest.mark.slow
def test_fashion_mnist_without_a_network_fails_at_once_in_plain_words(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("DATA", "fashion_mnist")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://localhost:9")  # nobody listens there
    notebook = read()
    loading = next(i for i, c in enumerate(notebook.cells) if "tfds.load" in c.source)
    del notebook.cells[loading + 1 :]
    with pytest.raises(CellExecutionError, match="which needs no network"):
        execute(notebook, tmp_path)


def test_without_the_package_it_says_what_to_do(tmp_path):
    first = next(c.source for c in read().cells if c.cell_type == "code")
    done = subprocess.run(
        [sys.executable, "-S", "-c", first],  # -S: as though nothing were installed
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"PIP_NO_INDEX": "1", "PIP_IGNORE_INSTALLED": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "upload its wheel (python -m build) or a checkout" in last
    assert "ERROR" not in done.stdout + done.stderr  # as pip would put it


def test_nothing_that_a_run_leaves_behind_is_committed():
    notebook = read()
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_every_step_is_explained():
    kinds = [cell.cell_type for cell in read().cells]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= kinds.count("code") - 2
