"""The benchmark for an accelerator, which is seldom at hand, runs on a CPU too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_accelerator(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/accelerator.py", "--quick", "--output", tmp_path],
        cwd=ROOT,
        # Times mean nothing here, so that what is compiled need not be fast.
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "every mask is that of lax.top_k, bit for bit" in done.stdout
    record = json.loads((tmp_path / "accelerator.json").read_text())
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
