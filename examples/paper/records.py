"""The figures of runs, one JSON file a recipe and seed.

A record counts once it is complete, and for as long as the recipe has the settings that
it was made with.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.paper.recipes import RECIPES, Recipe

PRUNED = ("dense", "one-shot", "gradual", "GSM", "GSM pruned", "GSM tuned")
TICKETS = (
    "dense",
    "magnitude, initial",
    "magnitude, early",
    "GSM, initial",
    "GSM, early",
)


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


def as_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it is read back from a record."""
    return json.loads(json.dumps(asdict(recipe)))


def belongs(record: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a record was made with the settings that the recipe has now."""
    now = as_json(recipe)
    decisive = set(now) - {"name", "title", "paper"}
    return all(record["recipe"].get(name) == now[name] for name in decisive)


def complete(record: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a run of the recipe has nothing left to do."""
    return belongs(record, recipe) and set(columns(recipe)) <= set(record["accuracy"])


def load(path: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The record of an earlier run with the same settings, if there is one."""
    record = json.loads(path.read_text()) if path.exists() else None
    return record if record and belongs(record, recipe) else None


def write(path: Path, record: dict[str, Any]) -> None:
    """Replace the record at once: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1))
    part.replace(path)


def read(
    folder: Path, validate: bool = False, bfloat16: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """All complete records in a folder, by recipe: those of tests, or of validation."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob("*-seed*.json")):
        record = json.loads(path.read_text())
        recipe = RECIPES.get(record["recipe"]["name"])
        kind = (record["validate"], record["bfloat16"])
        if recipe and kind == (validate, bfloat16) and complete(record, recipe):
            found.setdefault(recipe.name, []).append(record)
    return found
