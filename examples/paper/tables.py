"""Tables over the results, in Markdown: means and spreads of all seeds."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper.recipes import RECIPES, Recipe

COLUMNS = ("dense", "one-shot", "gradual", "GSM", "GSM pruned", "GSM tuned")
STUDIED = ("GSM", "GSM pruned", "GSM tuned")
TICKETS = (
    "dense",
    "magnitude, initial",
    "magnitude, early",
    "GSM, initial",
    "GSM, early",
)


def results_table(folder: Path) -> str:
    """All tables, of pruned networks, tickets and studies, and where they were made."""
    records, validated = read(folder), read(folder, validate=True)
    recipes = [r for r in RECIPES.values() if not r.name.startswith("study-")]
    studies = [r for r in RECIPES.values() if r.name.startswith("study-")]
    pruned = [r for r in recipes if not r.tickets]
    tickets = [r for r in recipes if r.tickets]
    head = ["network, data", "compression", "epochs", "seeds"]
    parts = [
        "Top-1 test accuracy in %, mean ± standard deviation of the seeds.",
        markdown(
            [*head, *COLUMNS, "paper"],
            [row(recipe, records.get(recipe.name, []), COLUMNS) for recipe in pruned],
        ),
        "Winning tickets: survivors rewound to initial or early weights, retrained.",
        markdown(
            [*head, *TICKETS, "paper"],
            [row(recipe, records.get(recipe.name, []), TICKETS) for recipe in tickets],
        ),
        "What matters, LeNet-300-100, 60x: accuracy on the last sixth of the training "
        "set, which is not trained on.",
        markdown(
            ["study", "decay budget", "seeds", *STUDIED],
            [study_row(recipe, validated.get(recipe.name, [])) for recipe in studies],
        ),
        *machines(
            record
            for found in (records, validated)
            for of_one in found.values()
            for record in of_one
        ),
    ]
    return "\n\n".join(parts)


def read(folder: Path, validate: bool = False) -> dict[str, list[dict[str, Any]]]:
    """All records below the folder, by recipe: those of tests, or of validation."""
    records: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob("*-seed*.json")):
        record = json.loads(path.read_text())
        if record["validate"] == validate:
            records.setdefault(record["recipe"]["name"], []).append(record)
    return records


def study_row(recipe: Recipe, records: Sequence[dict[str, Any]]) -> list[str]:
    """Cells of a study: its decay budget and its accuracies."""
    budget = f"{records[0]['decay_budget']:.1f}" if records else "-"
    _, _, _, seeds, *cells, _ = row(recipe, records, STUDIED)
    return [recipe.name.removeprefix("study-"), budget, seeds, *cells]


def row(recipe: Recipe, records: Sequence[dict[str, Any]], columns: Sequence[str]):
    """Cells of a recipe; those of columns that have not been run are dashes."""
    accuracies = [record["accuracy"] for record in records]
    cells = [
        spread([accuracy[name] for accuracy in accuracies if name in accuracy])
        for name in columns
    ]
    paper = " → ".join(f"{value:.2f}" for value in recipe.paper) or "-"
    if recipe.paper and recipe.data == "fashion_mnist":
        paper += " (MNIST)"
    seeds = str(len(records)) if records else "not run"
    head = [recipe.title, f"{recipe.compression:g}x", epochs(recipe), seeds]
    return [*head, *cells, paper]


def epochs(recipe: Recipe) -> str:
    """Epochs of dense training and of what follows."""
    after = [phase.epochs for phase in (recipe.gsm, recipe.tuned) if phase]
    return " + ".join(map(str, [recipe.dense.epochs, *after]))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of the seeds."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def machines(records: Iterable[dict[str, Any]]) -> list[str]:
    """One line for every machine, set of versions and command."""
    lines = set()
    for record in records:
        versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        lines.add(f"`{record['command']}` on {record['machine']}; {versions}.")
    return sorted(lines)


def recipes_table() -> str:
    """Names of all recipes and what they are."""
    lines = [
        [
            f"`{recipe.name}`",
            recipe.title + (", tickets" if recipe.tickets else ""),
            f"{recipe.compression:g}x",
            epochs(recipe),
        ]
        for recipe in RECIPES.values()
    ]
    return markdown(["recipe", "network, data", "compression", "epochs"], lines, 2)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words=1) -> str:
    """A table, aligned in plain text too; its first columns hold words."""
    ruler = ["---"] * words + ["---:"] * (len(head) - words)
    widths = [max(map(len, column)) for column in zip(head, ruler, *rows, strict=True)]
    lines = [
        " | ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, ruler, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)
