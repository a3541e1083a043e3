"""The figures of runs, one JSON file a recipe and seed.

A record counts once it is complete, and for as long as the recipe has the settings that
it was made with.
"""

import json
from pathlib import Path
from typing import Any

from examples.paper.recipes import RECIPES, Recipe, settings

Record = dict[str, Any]

PRUNED = ("dense", "one-shot", "gradual", "GSM", "GSM pruned", "GSM tuned")
CHOICES = ("magnitude, initial", "magnitude, early", "GSM, initial", "GSM, early")
TICKETS = ("dense", *CHOICES)


def path_of(folder: Path, name: str, seed: int, validate: bool, bfloat16: bool) -> Path:
    """Where the record of a run is kept."""
    kind = "-validation" * validate + "-bfloat16" * bfloat16
    return folder / f"{name}{kind}-seed{seed}.json"


def columns(recipe: Recipe) -> tuple[str, ...]:
    """The accuracies that a complete record has."""
    if recipe.tickets:
        return TICKETS
    left_out = {"gradual": recipe.gradual is None, "GSM tuned": recipe.tuned is None}
    return tuple(name for name in PRUNED if not left_out.get(name))


def belongs(record: Record, recipe: Recipe) -> bool:
    """Whether a record was made with the settings that the recipe has now."""
    then, now = record["recipe"], settings(recipe)
    decisive = (then.keys() | now.keys()) - {"name", "title", "paper"}
    return all(then.get(name) == now.get(name) for name in decisive)


def complete(record: Record, recipe: Recipe) -> bool:
    """Whether a run of the recipe has nothing left to do."""
    return belongs(record, recipe) and set(columns(recipe)) <= set(record["accuracy"])


def load(path: Path, recipe: Recipe) -> Record:
    """The record of an earlier run with the same settings; empty if there is none."""
    record = json.loads(path.read_text()) if path.exists() else {}
    return record if record and belongs(record, recipe) else {}


def write(path: Path, record: Record) -> None:
    """Replace the record at once: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1))
    part.replace(path)


def read(folder: Path, validate=False, bfloat16=False) -> dict[str, list[Record]]:
    """All complete records in a folder, by recipe: those of tests, or of validation."""
    found: dict[str, list[Record]] = {}
    for path in sorted(Path(folder).glob("*-seed*.json")):
        record = json.loads(path.read_text())
        recipe = RECIPES.get(record["recipe"]["name"])
        kind = (record["validate"], record["bfloat16"])
        if recipe and kind == (validate, bfloat16) and complete(record, recipe):
            found.setdefault(recipe.name, []).append(record)
    return found
