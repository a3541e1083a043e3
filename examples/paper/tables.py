"""Tables over the results, in Markdown: means and spreads of all seeds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.paper.recipes import RECIPES, Recipe
from examples.paper.records import PRUNED, TICKETS, Record, read

HEAD = ("network, data", "compression", "epochs", "seeds")
STUDIED = ("gradual", "GSM", "GSM pruned", "GSM tuned")


def results_table(results: Path) -> str:
    """All tables, of pruned networks, tickets and studies, and where they were made."""
    studied = lambda recipe: recipe.name.startswith("study-")
    studies = [r for r in RECIPES.values() if studied(r)]
    recipes = [r for r in RECIPES.values() if not studied(r)]
    tested = {r.name: read(results, r) for r in RECIPES.values()}
    validated = {r.name: read(results, r, validate=True) for r in RECIPES.values()}
    found = [*tested.values(), *validated.values()]

    def table(columns, recipes):
        rows = [row(recipe, tested[recipe.name], columns) for recipe in recipes]
        return markdown([*HEAD, *columns, "paper"], rows)

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
            [study_row(recipe, validated[recipe.name]) for recipe in studies],
        ),
        *sorted({machine(record) for records in found for record in records}),
    ]
    return "\n\n".join(parts)


def study_row(recipe: Recipe, records: Sequence[Record]) -> list[str]:
    """Cells of a study: its decay budget and its accuracies."""
    budget = f"{records[0]['decay_budget']:.1f}" if records else "-"
    _, _, _, seeds, *cells, _ = row(recipe, records, STUDIED)
    return [recipe.name.removeprefix("study-"), budget, seeds, *cells]


def row(recipe: Recipe, records: Sequence[Record], columns: Sequence[str]):
    """Cells of a recipe; those of columns that have not been run are dashes."""
    scores = [record["accuracy"] for record in records]
    cell = lambda name: spread([score[name] for score in scores if name in score])
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
    rows = []
    for recipe in RECIPES.values():
        title = recipe.title + (", tickets" if recipe.tickets else "")
        size = f"{recipe.compression:g}x"
        rows.append([f"`{recipe.name}`", title, size, epochs(recipe)])
    return markdown(["recipe", "network, data", "compression", "epochs"], rows, 2)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words=1) -> str:
    """A table, aligned in plain text too; its first columns hold words."""
    ruler = ["---"] * words + ["---:"] * (len(head) - words)
    cells = np.array([head, ruler, *rows])
    width = np.strings.str_len(cells).max(0)
    left = np.strings.ljust(cells[:, :words], width[:words])
    right = np.strings.rjust(cells[:, words:], width[words:])
    lines = np.hstack([left, right]).tolist()
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
