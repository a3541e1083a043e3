"""Densities that GSM finds layer by layer, without being told any."""

from pathlib import Path

import matplotlib
import numpy as np

from examples.paper.recipes import RECIPES, Recipe
from examples.paper.records import Record, read

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FEW = 6  # layers that there is room to name


def draw(results: Path, output: Path) -> plt.Figure:
    """Draw and save a panel a recipe that has been run, mean and range of its seeds."""
    records = read(results)
    recipes = [
        recipe
        for name, recipe in RECIPES.items()
        if not recipe.tickets and not recipe.tuned and name in records
    ]
    if not recipes:
        raise SystemExit(f"error: no results in {results}: run some recipes first.")
    size = (2.5 * len(recipes), 3.2)
    figure = plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(recipes), squeeze=False, sharey=True)[0]
    for axis, recipe in zip(axes, recipes, strict=True):
        panel(axis, recipe, records[recipe.name])
    axes[0].set_ylabel("entries kept (%)")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    print(f"figure: {output}")
    return figure


def panel(axis: plt.Axes, recipe: Recipe, records: list[Record]) -> None:
    """Draw the densities of one network on a logarithmic axis."""
    kept = [[x["nonzero"] / x["entries"] for x in r["layers"]] for r in records]
    density = 100 * np.array(kept)
    mean, places = density.mean(0), np.arange(density.shape[1])
    reach = [mean - density.min(0), density.max(0) - mean]
    look = {"color": "#56b4e9", "edgecolor": "black", "capsize": 3}
    bars = axis.bar(places, mean, yerr=reach, **look)
    if len(mean) > FEW:
        axis.set_xlabel("kernels, from the input on", fontsize=8)
    else:
        layers = [(x["path"].split("/")[0], x["entries"]) for x in records[0]["layers"]]
        axis.set_xticks(places, [f"{name}\n{entries:,}" for name, entries in layers])
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axis.bar_label(bars, fmt="%.3g", padding=4, fontsize=8, bbox=plain)
    whole = 100 / recipe.compression
    line = {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 2}
    axis.axhline(whole, label="whole model", **line)
    title = f"{recipe.title}\n{recipe.compression:g}x: {whole:.2g} %"
    axis.set(yscale="log", ylim=(0.05, 300))
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
