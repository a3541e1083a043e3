"""Accuracy against compression, for every method that was run."""

from pathlib import Path

import matplotlib
import numpy as np

from examples.paper.recipes import RECIPES
from examples.paper.records import read

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NETWORK = "fashion-lenet300"
# What is drawn: the recipes whose names go on so, a column of theirs, and its look.
LINES = {
    "dense": ("", "dense", {"color": "black", "linestyle": ":"}),
    "GSM, tempered": ("-tempered", "GSM pruned", {"color": "#0072b2", "marker": "o"}),
    "gradual magnitude": (
        "-tempered",
        "gradual",
        {"color": "#e69f00", "marker": "s", "linestyle": "--"},
    ),
    "GSM, the paper's": (
        "",
        "GSM pruned",
        {"color": "#56b4e9", "marker": "^", "linestyle": "-."},
    ),
    "pruned at once": (
        "",
        "one-shot",
        {"color": "0.5", "marker": "x", "linestyle": ":"},
    ),
}


def draw(results: Path, output: Path) -> plt.Figure:
    """Draw and save the mean of the seeds, and their range, at every compression."""
    found = read(results)
    figure = plt.figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    sizes, seeds = set(), set()
    for label, (ending, column, look) in LINES.items():
        points = {
            RECIPES[name].compression: [r["accuracy"][column] for r in records]
            for name, records in found.items()
            if name.rsplit("-", 1)[0] == NETWORK + ending
        }
        if not points:
            raise SystemExit(
                f"error: no results of {NETWORK}{ending} in {results}: run "
                f"{NETWORK}{ending}-60x and others first."
            )
        sizes |= points.keys()
        seeds |= {len(values) for values in points.values()}
        x = sorted(points)
        mean = np.array([np.mean(points[c]) for c in x])
        reach = [mean - [min(points[c]) for c in x], [max(points[c]) for c in x] - mean]
        for axis in axes:
            axis.errorbar(x, mean, reach, label=label, capsize=3, markersize=5, **look)
    axes[0].set_ylim(81, 91)
    axes[1].set_ylim(0, 70)
    axes[0].set_xscale("log")
    axes[1].set_xticks(sorted(sizes), [f"{c:g}x" for c in sorted(sizes)])
    axes[1].minorticks_off()
    axes[1].set_xlabel("compression of the kernels")
    axes[0].set_ylabel("test accuracy (%)")
    many = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
    title = f"LeNet-300-100, Fashion-MNIST: mean and range of {many} seeds"
    axes[0].set_title(title, fontsize=10)
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    for axis in axes:
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    print(f"figure: {output}")
    return figure
