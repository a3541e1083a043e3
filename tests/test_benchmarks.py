"""The benchmarks run, tiny; that for an accelerator, seldom at hand, on a CPU too."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_quickly(name, folder):
    """Run a benchmark on tiny trees; return what it prints and its record."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--quick", "--output", folder],
        cwd=ROOT,
        # Times mean nothing here, so that what is compiled need not be fast.
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compile_time", "update_step"])
def test_tables_have_every_optimizer(name, tmp_path):
    printed, record = run_quickly(name, tmp_path)
    assert "optax.sgd" in printed
    assert "gsm" in printed
    assert record


@pytest.mark.slow
def test_accelerator(tmp_path):
    printed, record = run_quickly("accelerator", tmp_path)
    assert "every mask is that of lax.top_k, bit for bit" in printed
    (steps,) = record["steps"]
    assert {training["network"] for training in record["training"]} == {
        "resnet50",
        "gpt2",
    }
    rows = steps["contenders"]
    # Ten passes and the mask, exactly; the others depend on the scores.
    assert rows["gsm, 10 even passes"]["scorings"] == 11
    assert rows["gsm, warm"]["scorings"] >= 3
    assert rows["gsm, 5 passes"]["scorings"] >= 6
    assert rows["optax.sgd"]["launches_in_loops"] == []
    assert len(rows["gsm, 10 even passes"]["launches_in_loops"]) == 1
    assert len(rows["gsm, 5 passes"]["launches_in_loops"]) == 2


@pytest.mark.slow
def test_deployment(tmp_path):
    printed, record = run_quickly("deploy", tmp_path)
    networks = record["networks"]
    assert networks["60x"]["weights"] == 837  # of 50,200
    assert networks["300x, shrunk"]["weights"] <= networks["300x"]["weights"] == 167
    assert networks["300x, shrunk"]["entries"] < networks["300x"]["entries"]
    forms = {row["form"]: row for row in record["latency"]}
    assert {"dense, JAX", "60x, JAX, shrunk", "60x, JAX, BCSR", "60x, SciPy, CSR"} <= (
        set(forms)
    )
    assert all(row["difference"] <= 1e-4 for row in forms.values())
    missing = set(record["left out"])
    onnx = missing.isdisjoint({"jax2onnx", "onnxruntime"})
    assert ("60x, ONNX Runtime, shrunk" in forms) == onnx
    assert ("int8" in record) == ("qwix" not in missing)
    assert all(f"pip install {name}" in printed for name in missing)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="pip install torch torch-pruning"):
        runpy.run_path(ROOT / "benchmarks/against_torch_pruning.py")
