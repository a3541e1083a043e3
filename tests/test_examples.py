"""The examples run, on a small budget, as a newcomer would start them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from examples import freezing_resnet, layer_freezing, shrink

pytestmark = pytest.mark.optimize(False)

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=EXAMPLES.parent,
    )


@pytest.mark.promotes
@pytest.mark.filterwarnings("ignore:decay budget")
def test_prune_digits(tmp_path, capsys):
    arguments = ["--seeds", "1", "--dense-epochs", "12", "--epochs", "30"]
    arguments += ["--ratio", "0.9", "--output", str(tmp_path)]
    with jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(EXAMPLES / "prune_digits.py"))["main"](arguments)
    assert (tmp_path / "prune_digits.png").stat().st_size > 10_000
    (scores,) = json.loads((tmp_path / "prune_digits.json").read_text())
    assert scores["dense"] > 90
    assert scores["GSM pruned"] > 90
    assert scores["one-shot"] < scores["GSM pruned"]
    printed = capsys.readouterr().out
    for text in (
        "test accuracy, %",
        "dense1/kernel",
        "prunable",
        "10.0x",
        "decay budget",
    ):
        assert text in printed


def test_prune_digits_refuses_a_compression_as_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--ratio", "60", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .*did you mean ratio=1-1/60\?"):
        runpy.run_path(str(EXAMPLES / "prune_digits.py"), run_name="__main__")


@pytest.mark.slow
def test_layer_freezing(tmp_path):
    done = run(
        *("-m", "examples.layer_freezing", "--data", "digits", "--seeds", 1),
        *("--epochs", 4, "--output", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "layer_freezing.json").read_text())["digits"]
    for measured in results["similarity"].values():
        for by_epoch in measured.values():
            assert all(abs(x - 1) < 1e-4 for x in by_epoch[-1])  # the final network
            assert all(-1e-4 < x < 1 + 1e-4 for row in by_epoch for x in row)
    assert len(results["schemes"]) == 1 + 3 * 4  # without freezing; savings x schemes
    assert "| single-shot & resume |" in done.stdout
    for name in ("layers_settle.png", "freezing_schemes.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.optimize(True)
@pytest.mark.promotes
def test_freezing_resnet(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(freezing_resnet.Trainer, "levels", ((2,) * 5 + (1,) * 6,))
    arguments = ["--ratios", "0.9", "--seeds", "1", "--epochs", "8"]
    freezing_resnet.main([*arguments, "--output", str(tmp_path)])
    assert "| single-shot & resume |" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "freezing_resnet.json").read_text()).values()
    by_scheme = {record["scheme"]: record for record in result["schemes"]}
    savings = [by_scheme[name]["saving"] for name in layer_freezing.SCHEMES]
    np.testing.assert_allclose(savings, savings[0], atol=0.03)
    assert by_scheme["none"]["saving"] == 0
    assert min(record["before pruning"] for record in by_scheme.values()) > 30
    assert (tmp_path / "freezing_resnet.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.optimize(True)
@pytest.mark.promotes
def test_shrink(tmp_path, capsys):
    arguments = ["--dense-epochs", "4", "--epochs", "12", "--ratio", "0.7"]
    with jax.numpy_rank_promotion("allow"):
        (record,) = shrink.main([*arguments, "--output", str(tmp_path)])
    dense, small, eights, once, _ = record["rows"].values()
    assert small["parameters"] < 0.35 * dense["parameters"]
    assert small["parameters"] < eights["parameters"] < dense["parameters"]
    assert abs(small["accuracy"] - eights["accuracy"]) < 0.3
    assert small["flops"] < dense["flops"]
    # Shrinking changes nothing but the last digits.
    assert abs(small["accuracy"] - record["pruning"]["after"]) < 0.3
    assert once["accuracy"] < small["accuracy"]
    assert "ms at 256" in capsys.readouterr().out
    assert (tmp_path / "shrink.png").stat().st_size > 10_000


def test_shrink_names_the_networks_of_its_data():
    with pytest.raises(SystemExit, match="lenet5 with --data digits: try resnet8"):
        shrink.main(["--models", "lenet5"])


def test_freezing_schedules(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "figure.png")])
    runpy.run_path(str(EXAMPLES / "freezing_schedules.py"), run_name="__main__")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
