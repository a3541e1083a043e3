"""Runs a recipe for a seed, phase by phase, and keeps the figures in a JSON file.

Every phase is saved under a name made from everything it depends on, so that recipes
share dense networks, and what was cut off goes on where it was. What is complete is not
run again.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.paper import methods, records
from examples.paper.data import Data, load
from examples.paper.models import create
from examples.paper.recipes import Phase, Recipe, settings
from examples.paper.training import Network, Trainer
from gsm_optax import apply_mask, magnitude_mask, sparsity_report


def run(
    recipe: Recipe,
    seed: int,
    results: Path,
    folder: str | Path | None = None,
    validate: bool = False,
) -> records.Record:
    """Run what is left of a recipe, and return its record.

    The seed is that of the initial weights, the order of the images and their
    augmentation. Records and checkpoints are in `results`, the data in `folder`
    (`examples.paper.data.load`). The record is written whenever an accuracy is known.
    """
    path = records.path_of(results, recipe.name, seed, validate)
    record = records.load(path, recipe)
    if records.complete(record, recipe):
        return record
    return Experiment(recipe, seed, path, load(recipe.data, folder, validate)).run()


class Experiment:
    """Trains the networks of a recipe from a seed, tests them, and keeps the record."""

    def __init__(self, recipe: Recipe, seed: int, path: Path, data: Data):
        """Initialise the network."""
        graph, *self.initial = nnx.split(create(recipe.model, seed), nnx.Param, ...)
        self.trainer = Trainer(graph, data, recipe.batch, seed)
        self.recipe, self.path = recipe, path
        # The data by their content: their folder may move. False: not in bfloat16.
        self.name = [recipe.model, data.train.fingerprint, recipe.batch, seed, False]
        self.record = {
            "recipe": settings(recipe),
            "seed": seed,
            "decay_budget": methods.decay_budget(recipe.gsm, self.trainer.epoch),
            "data": data.source,
            "accuracy": {},
            **environment(),
        }

    def run(self) -> records.Record:
        """Train densely and go on from there; return the record."""
        dense = self.train("dense", self.recipe.dense, self.initial, methods.dense)
        self.note("dense", dense)
        if self.recipe.tickets:
            self.tickets(dense)
        else:
            self.prune(dense)
        return self.record

    def prune(self, dense: Network) -> None:
        """Pruned at once, gradually pruned, GSM before and after, fine-tuned."""
        recipe, ratio = self.recipe, self.recipe.ratio
        self.note("one-shot", masked(dense, magnitude_mask(dense[0], ratio)))
        if recipe.gradual:
            least = self.train("gradual", recipe.gradual, dense, methods.gradual, ratio)
            self.note("gradual", masked(least, magnitude_mask(least[0], ratio)))
        trained = self.train("GSM", recipe.gsm, dense, methods.gsm, ratio)
        mask = magnitude_mask(trained[0], ratio)
        pruned = masked(trained, mask)
        self.record["near_zero"] = sparsity_report(trained[0]).prunable.below(1e-4)
        self.record["layers"] = [
            {key: getattr(leaf, key) for key in ("path", "entries", "nonzero")}
            for leaf in sparsity_report(nnx.to_pure_dict(pruned[0])).leaves
            if leaf.prunable
        ]
        self.note("GSM", trained)
        self.note("GSM pruned", pruned)
        if recipe.tuned:
            tuned = self.train("tuned", recipe.tuned, pruned, methods.frozen, mask)
            self.note("GSM tuned", tuned)

    def tickets(self, dense: Network) -> None:
        """Train the survivors anew, from initial and from early weights."""
        recipe, initial = self.recipe, self.initial
        until = recipe.tickets * self.trainer.epoch
        early = self.train("early", recipe.dense, initial, methods.dense, until=until)
        trained = self.train("GSM", recipe.gsm, dense, methods.gsm, recipe.ratio)
        for when, network in {"initial": initial, "early": early}.items():
            for by, (params, _) in {"GSM": trained, "magnitude": dense}.items():
                mask, label = magnitude_mask(params, recipe.ratio), f"{by}, {when}"
                ticket = masked(network, mask)
                winner = self.train(label, recipe.dense, ticket, methods.frozen, mask)
                self.note(label, winner)

    def train(self, label, phase: Phase, network: Network, method, *args, until=None):
        """Train a network through a phase, or up to a step; `args` go to `method`."""
        epoch, recipe = self.trainer.epoch, self.recipe
        name = [*self.name, settings(phase), method.__name__, until]
        saved = self.path.parent / "checkpoints" / digest(name, (network, args))
        tx, steps = method(phase, epoch, *args), until or phase.epochs * epoch
        label = f"{recipe.name}, seed {self.trainer.seed}: {label}"
        trained = self.trainer.train(network, tx, steps, label, saved)
        if method is methods.frozen:
            outside = jax.tree.map(jnp.logical_not, args[0])
            moved = sparsity_report(apply_mask(trained[0], outside)).total.nonzero
            if moved:
                raise AssertionError(f"{moved} pruned entries have moved: {label}.")
        return trained

    def note(self, label: str, network: Network) -> None:
        """Test a network, and write all that is known so far."""
        top1, top5 = self.trainer.accuracy(network)
        self.record["accuracy"][label] = top1
        if self.recipe.data == "imagenet":
            self.record["accuracy"][f"{label}, top 5"] = top5
        records.write(self.path, self.record)


def masked(network: Network, mask: Any) -> Network:
    """Set the entries outside the mask to zero."""
    return apply_mask(network[0], mask), network[1]


def digest(name: Any, arrays: Any) -> str:
    """Sixteen digits that stand for a name and the bits of all arrays."""
    found = hashlib.sha256(json.dumps(name).encode())
    for leaf in jax.tree.leaves(arrays):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """What ran this, where and when."""
    packages = ("jax", "flax", "optax", "gsm_optax")
    devices = jax.devices()
    return {
        "command": " ".join(["python -m examples.paper", *sys.argv[1:]]),
        "machine": f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
