"""The figures of runs, one JSON file a recipe and seed.

A record counts once it is complete, and for as long as the recipe has the settings that
it was made with.
"""

import json
from pathlib import Path
from typing import Any

from examples.paper.recipes import Recipe, settings

Record = dict[str, Any]

PRUNED = ("dense", "one-shot", "gradual", "GSM", "GSM pruned", "GSM tuned")
CHOICES = ("magnitude, initial", "magnitude, early", "GSM, initial", "GSM, early")
TICKETS = ("dense", *CHOICES)


def path_of(folder: Path, name: str, seed: int | str, validate: bool = False) -> Path:
    """Where the record of a run is kept."""
    return folder / f"{name}{'-validation' * validate}-seed{seed}.json"


def columns(recipe: Recipe) -> tuple[str, ...]:
    """The accuracies that a complete record has."""
    if recipe.tickets:
        return TICKETS
    left_out = {"gradual": recipe.gradual is None, "GSM tuned": recipe.tuned is None}
    return tuple(name for name in PRUNED if not left_out.get(name))


def load(path: Path, recipe: Recipe) -> Record:
    """The record of an earlier run with the same settings; empty if there is none."""
    record = json.loads(path.read_text()) if path.exists() else {}
    then, now = record.get("recipe", {}), settings(recipe)
    decisive = (then.keys() | now.keys()) - {"name", "title", "paper"}
    return record if all(then.get(key) == now.get(key) for key in decisive) else {}


def complete(record: Record, recipe: Recipe) -> bool:
    """Whether a run of the recipe has nothing left to do."""
    return set(columns(recipe)) <= record.get("accuracy", {}).keys()


def write(path: Path, record: Record) -> None:
    """Replace the record at once: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1))
    part.replace(path)


def read(folder: Path, recipe: Recipe, validate: bool = False) -> list[Record]:
    """The complete records of a recipe, one a seed."""
    paths = folder.glob(path_of(folder, recipe.name, "*", validate).name)
    found = [load(path, recipe) for path in sorted(paths)]
    return [record for record in found if complete(record, recipe)]
