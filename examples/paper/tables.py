"""Tables over the results, in Markdown: means and spreads of all seeds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.paper.recipes import RECIPES, Recipe
from examples.paper.records import PRUNED, TICKETS, Record, read

STUDIED = ("gradual", "GSM", "GSM pruned", "GSM tuned")


def results_table(folder: Path) -> str:
    """All tables, of pruned networks, tickets and studies, and where they were made."""
    tested, validated = read(folder), read(folder, validate=True)
    rounded = read(folder, bfloat16=True)
    recipes = [r for r in RECIPES.values() if not r.name.startswith("study-")]
    studies = [r for r in RECIPES.values() if r.name.startswith("study-")]

    def table(columns, recipes):
        rows = [row(r, tested.get(r.name, []), columns) for r in recipes]
        for recipe in (r for r in recipes if r.name in rounded):
            title, *cells = row(recipe, rounded[recipe.name], columns)
            rows.append([f"{title}, bfloat16", *cells])
        head = ["network, data", "compression", "epochs", "seeds", *columns, "paper"]
        return markdown(head, rows)

    found = (tested, rounded, validated)
    records = [r for by_name in found for some in by_name.values() for r in some]
    parts = [
        "Test accuracy in %, mean ± standard deviation of the seeds; of ImageNet both "
        "top-1 and top-5.",
        table(PRUNED, [r for r in recipes if not r.tickets]),
        "Winning tickets: survivors rewound to initial or early weights, retrained.",
        table(TICKETS, [r for r in recipes if r.tickets]),
        "What matters, LeNet-300-100, 60x: accuracy on the last sixth of the training "
        "set, which is not trained on.",
        markdown(
            ["study", "decay budget", "seeds", *STUDIED],
            [study_row(recipe, validated.get(recipe.name, [])) for recipe in studies],
        ),
        *sorted({machine(record) for record in records}),
    ]
    return "\n\n".join(parts)


def study_row(recipe: Recipe, records: Sequence[Record]) -> list[str]:
    """Cells of a study: its decay budget and its accuracies."""
    budget = f"{records[0]['decay_budget']:.1f}" if records else "-"
    _, _, _, seeds, *cells, _ = row(recipe, records, STUDIED)
    return [recipe.name.removeprefix("study-"), budget, seeds, *cells]


def row(recipe: Recipe, records: Sequence[Record], columns: Sequence[str]):
    """Cells of a recipe; those of columns that have not been run are dashes."""
    accuracies = [record["accuracy"] for record in records]

    def cell(name):
        return spread([scores[name] for scores in accuracies if name in scores])

    cells = [cell(name) for name in columns]
    if recipe.data == "imagenet" and records:
        cells = [f"{cell(name)} / {cell(f'{name}, top 5')}" for name in columns]
    other = " (MNIST)" if recipe.paper and recipe.data == "fashion_mnist" else ""
    paper = (recipe.paper or "-") + other
    seeds = str(len(records)) if records else "not run"
    head = [recipe.title, f"{recipe.compression:g}x", epochs(recipe), seeds]
    return [*head, *cells, paper]


def epochs(recipe: Recipe) -> str:
    """Epochs of dense training and of what follows."""
    phases = (recipe.dense, recipe.gsm, recipe.tuned)
    return " + ".join(str(phase.epochs) for phase in phases if phase)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of the seeds."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def machine(record: Record) -> str:
    """Where, and by which command, a record was made."""
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    return f"`{record['command']}` on {record['machine']}; {versions}."


def recipes_table() -> str:
    """Names of all recipes and what they are."""
    lines = []
    for recipe in RECIPES.values():
        title = recipe.title + (", tickets" if recipe.tickets else "")
        size = f"{recipe.compression:g}x"
        lines.append([f"`{recipe.name}`", title, size, epochs(recipe)])
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
