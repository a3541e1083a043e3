"""Densities that GSM finds layer by layer, without being told any."""

from pathlib import Path

import matplotlib
import numpy as np

from examples.paper.recipes import RECIPES
from examples.paper.records import read

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FEW = 6  # layers that there is room to name


def draw(results: Path, output: Path) -> plt.Figure:
    """Draw one panel a recipe that has been run, mean and range of its seeds.

    Args:
        results: folder of the records.
        output: the figure, PNG.

    Returns:
        The figure, which has been saved.
    """
    records = read(results)
    names = [
        name
        for name, recipe in RECIPES.items()
        if not recipe.tickets and not recipe.tuned and name in records
    ]
    if not names:
        raise SystemExit(f"error: no results in {results}: run some recipes first.")
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(2.5 * len(names), 3.2),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis, name in zip(axes[0], names, strict=True):
        panel(axis, RECIPES[name], [record["layers"] for record in records[name]])
    axes[0, 0].set_ylabel("entries kept (%)")
    axes[0, 0].legend(fontsize=8, frameon=False, loc="upper left")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    print(f"figure: {output}")
    return figure


def panel(axis, recipe, runs) -> None:
    """Draw the densities of one network on a logarithmic axis."""
    density = 100 * np.array(
        [[layer["nonzero"] / layer["entries"] for layer in layers] for layers in runs]
    )
    mean = density.mean(0)
    reach = [mean - density.min(0), density.max(0) - mean]
    bars = axis.bar(
        np.arange(len(mean)),
        mean,
        yerr=reach,
        color="#56b4e9",
        edgecolor="black",
        capsize=3,
    )
    if len(mean) > FEW:
        axis.set_xlabel("kernels, from the input on", fontsize=8)
    else:
        layers = [(x["path"].split("/")[0], x["entries"]) for x in runs[0]]
        labels = [f"{name}\n{entries:,}" for name, entries in layers]
        axis.set_xticks(np.arange(len(mean)), labels)
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axis.bar_label(bars, fmt="%.3g", padding=4, fontsize=8, bbox=plain)
    whole = 100 / recipe.compression
    line = {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 2}
    axis.axhline(whole, label="whole model", **line)
    axis.set(yscale="log", ylim=(0.05, 300))
    axis.set_title(
        f"{recipe.title}\n{recipe.compression:g}x: {whole:.2g} %", fontsize=9
    )
    axis.tick_params(labelsize=7)
