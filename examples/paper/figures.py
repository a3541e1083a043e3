"""Figures over the results: densities by layer, and accuracy against compression."""

from pathlib import Path

import matplotlib
import numpy as np

from examples.paper.recipes import RECIPES, Recipe
from examples.paper.records import Record, read

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FEW = 6  # layers that there is room to name
NETWORK = "fashion-lenet300"
# What the curve has: recipes whose names go on so, a column of theirs, and its look.
LINES = {
    "dense": ("", "dense", ":", "black"),
    "GSM, tempered": ("-tempered", "GSM pruned", "o-", "#0072b2"),
    "gradual magnitude": ("-tempered", "gradual", "s--", "#e69f00"),
    "GSM, the paper's": ("", "GSM pruned", "^-.", "#56b4e9"),
    "pruned at once": ("", "one-shot", "x:", "0.5"),
}


def save(figure: plt.Figure, output: Path) -> plt.Figure:
    """Save a figure and say where."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    print(f"figure: {output}")
    return figure


def densities(results: Path, output: Path) -> plt.Figure:
    """Draw the densities by layer that GSM finds without being told any.

    A panel a recipe that has been run: the mean of its seeds, and their range.
    """
    pruned = [r for r in RECIPES.values() if not r.tickets and not r.tuned]
    found = [(r, records) for r in pruned if (records := read(results, r))]
    if not found:
        raise SystemExit(f"error: no results in {results}: run some recipes first.")
    figure = plt.figure(figsize=(2.5 * len(found), 3.2), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axis, (recipe, records) in zip(axes, found, strict=True):
        panel(axis, recipe, records)
    axes[0].set_ylabel("entries kept (%)")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    return save(figure, output)


def panel(axis: plt.Axes, recipe: Recipe, records: list[Record]) -> None:
    """Draw the densities of one network on a logarithmic axis."""
    kept = [[x["nonzero"] / x["entries"] for x in r["layers"]] for r in records]
    density = 100 * np.array(kept)
    mean, places = density.mean(0), np.arange(density.shape[1])
    reach = [mean - density.min(0), density.max(0) - mean]
    bars = axis.bar(places, mean, yerr=reach, color="#56b4e9", edgecolor="k", capsize=3)
    if len(mean) > FEW:
        axis.set_xlabel("kernels, from the input on", fontsize=8)
    else:
        layers = [(x["path"].split("/")[0], x["entries"]) for x in records[0]["layers"]]
        axis.set_xticks(places, [f"{name}\n{entries:,}" for name, entries in layers])
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axis.bar_label(bars, fmt="%.3g", padding=4, fontsize=8, bbox=plain)
    whole = 100 / recipe.compression
    axis.axhline(whole, color="k", ls="--", lw=1, zorder=2, label="whole model")
    axis.set(yscale="log", ylim=(0.05, 300))
    axis.set_title(
        f"{recipe.title}\n{recipe.compression:g}x: {whole:.2g} %", fontsize=9
    )
    axis.tick_params(labelsize=7)


def compression(results: Path, output: Path) -> plt.Figure:
    """Draw the mean accuracy of the seeds, and their range, at every compression."""
    figure = plt.figure(figsize=(7, 4.2), layout="constrained")
    upper, lower = axes = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    sizes, seeds = set(), set()
    for label, (ending, column, fmt, color) in LINES.items():
        points = {
            recipe.compression: [r["accuracy"][column] for r in records]
            for name, recipe in RECIPES.items()
            if name.rsplit("-", 1)[0] == NETWORK + ending
            and (records := read(results, recipe))
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
        look = {"fmt": fmt, "color": color, "capsize": 3, "markersize": 5}
        for axis in axes:
            axis.errorbar(x, mean, reach, label=label, **look)
    many = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
    title = f"LeNet-300-100, Fashion-MNIST: mean and range of {many} seeds"
    upper.set_title(title, fontsize=10)
    upper.set(xscale="log", ylim=(81, 91), ylabel="test accuracy (%)")
    upper.legend(fontsize=8, frameon=False, loc="lower left")
    lower.set(ylim=(0, 70), xlabel="compression of the kernels")
    lower.set_xticks(sorted(sizes), [f"{c:g}x" for c in sorted(sizes)])
    lower.minorticks_off()
    for axis in axes:
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
    return save(figure, output)
