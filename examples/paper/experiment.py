"""Runs a recipe for a seed, phase by phase, and keeps the figures in a JSON file.

Every phase is saved under a name made from everything it depends on, so that recipes
share dense networks, and what was cut off goes on where it was. What is complete is not
run again.
"""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.paper import methods, records
from examples.paper.data import Arrays, load
from examples.paper.methods import Phase
from examples.paper.models import create
from examples.paper.recipes import Recipe
from examples.paper.training import Task, evaluate, train
from gsm_optax import (
    apply_mask,
    decay_budget_left,
    magnitude_mask,
    sparsity_report,
)

LOOPED_ON_CPU = ("mlp", "lenet_300_100", "lenet5")


@dataclass(frozen=True)
class Options:
    """What the command line decides for all recipes."""

    results: Path
    data: str | None = None
    validate: bool = False
    bfloat16: bool = False


class Network(NamedTuple):
    """Weights, and the name of all that made them."""

    params: Any
    stats: Any
    name: str

    def masked(self, mask: Any, name: str) -> "Network":
        """Return it with the entries outside the mask set to zero."""
        return Network(apply_mask(self.params, mask), self.stats, f"{self.name} {name}")


class Experiment:
    """A recipe and a seed: trains what is missing and notes the figures."""

    def __init__(self, recipe: Recipe, seed: int, options: Options):
        """Load the data and initialise the network."""
        self.recipe, self.seed, self.options = recipe, seed, options
        data = load(recipe.data, options.data, options.validate)
        dtype = jnp.bfloat16 if options.bfloat16 else None
        model = create(recipe.model, seed, dtype)
        graph, params, stats = nnx.split(model, nnx.Param, ...)
        # XLA has no fast convolution inside a loop on the CPU.
        looped = isinstance(data.train, Arrays) and (
            recipe.model in LOOPED_ON_CPU or jax.default_backend() != "cpu"
        )
        self.task = Task(graph, data, recipe.batch, seed, looped)
        fingerprint = data.train.fingerprint  # not its folder, which may move
        parts = (recipe.model, recipe.data, fingerprint, recipe.batch, seed, dtype)
        self.initial = Network(params, stats, " ".join(map(str, parts)))
        kind = (options.validate, options.bfloat16)
        self.path = records.path_of(options.results, recipe.name, seed, *kind)
        earlier = records.load(self.path, recipe) or {}
        self.record = {
            "recipe": records.as_json(recipe),
            "seed": seed,
            "validate": options.validate,
            "bfloat16": options.bfloat16,
            "decay_budget": decay(recipe.gsm, self.task.steps_per_epoch),
            "data": data.source,
            "accuracy": {},
            "seconds": earlier.get("seconds", {}),
            **environment(),
        }
        if earlier and records.complete(earlier, recipe):
            self.record = earlier

    def train(self, label, optimizer, start, phase: Phase, *args, until=None):
        """Train from a network through a phase; `args` go to the optimizer."""
        tx = optimizer(phase, self.task.steps_per_epoch, *args)
        name = f"{start.name} > {label} {phase}"
        if optimizer in (methods.gsm, methods.gradual):
            name += f" {args}"  # the ratio; a mask is in the name of the start
        if until is not None:
            name += f" until {until}"
        digest = hashlib.sha256(name.encode()).hexdigest()
        folder = self.options.results / "checkpoints" / digest[:16]
        whole, begin = not folder.exists(), time.monotonic()
        state = train(
            self.task,
            tx,
            start.params,
            start.stats,
            phase.epochs,
            folder,
            f"{self.recipe.name}, seed {self.seed}: {label}",
            until,
        )
        if whole:
            self.record["seconds"][label] = round(time.monotonic() - begin, 1)
        return Network(state.params, state.stats, name)

    def note(self, label: str, network: Network) -> None:
        """Evaluate a network, and write all that is known so far."""
        top1, top5 = evaluate(self.task, network.params, network.stats)
        self.record["accuracy"][label] = top1
        if self.recipe.data == "imagenet":
            self.record["accuracy"][f"{label}, top 5"] = top5
        records.write(self.path, self.record)

    def dense(self) -> Network:
        """The dense network, which recipes share."""
        return self.train("dense", methods.dense, self.initial, self.recipe.dense)

    def run(self) -> dict[str, Any]:
        """Run the phases that are left; return the record, which has been written."""
        if not records.complete(self.record, self.recipe):
            if self.recipe.tickets:
                self.tickets()
            else:
                self.columns()
        return self.record

    def columns(self) -> None:
        """Dense, pruned at once, gradually pruned, GSM before and after, fine-tuned."""
        recipe, ratio, dense = self.recipe, self.recipe.ratio, self.dense()
        self.note("dense", dense)
        self.note("one-shot", dense.masked(magnitude_mask(dense.params, ratio), ""))
        if recipe.gradual:
            by_magnitude = self.train(
                "gradual", methods.gradual, dense, recipe.gradual, ratio
            )
            mask = magnitude_mask(by_magnitude.params, ratio)
            self.note("gradual", by_magnitude.masked(mask, ""))
        trained = self.train("GSM", methods.gsm, dense, recipe.gsm, ratio)
        mask = magnitude_mask(trained.params, ratio)
        pruned = trained.masked(mask, f"> pruned {ratio}")
        report = sparsity_report(trained.params).prunable
        self.record["near_zero"] = report.below(1e-4)
        self.record["layers"] = layers(pruned.params)
        self.note("GSM", trained)
        self.note("GSM pruned", pruned)
        if recipe.tuned:
            tuned = self.train("tuned", methods.frozen, pruned, recipe.tuned, mask)
            self.check_frozen("tuned", tuned, mask)
            self.note("GSM tuned", tuned)

    def tickets(self) -> None:
        """Rewind the survivors to initial and early weights and train them anew."""
        recipe, ratio, dense = self.recipe, self.recipe.ratio, self.dense()
        self.note("dense", dense)
        trained = self.train("GSM", methods.gsm, dense, recipe.gsm, ratio)
        masks = {
            "GSM": magnitude_mask(trained.params, ratio),
            "magnitude": magnitude_mask(dense.params, ratio),
        }
        early_step = recipe.tickets * self.task.steps_per_epoch
        early = self.train(
            "early", methods.dense, self.initial, recipe.dense, until=early_step
        )
        for start, rewound in {"initial": self.initial, "early": early}.items():
            for by, mask in masks.items():
                label = f"{by}, {start}"
                ticket = rewound.masked(mask, f"> ticket by {by} {recipe.gsm} {ratio}")
                winner = self.train(label, methods.frozen, ticket, recipe.dense, mask)
                self.check_frozen(label, winner, mask)
                self.note(label, winner)

    def check_frozen(self, label: str, network: Network, mask: Any) -> None:
        """Note how many entries are not zero outside the mask; none may be."""
        outside = jax.tree.map(jnp.logical_not, mask)
        moved = sparsity_report(apply_mask(network.params, outside)).total.nonzero
        self.record.setdefault("zeros_moved", {})[label] = moved
        if moved:
            raise AssertionError(f"{moved} pruned entries of {label!r} have moved.")


def decay(phase: Phase, steps_per_epoch: int) -> float:
    """The decay budget of a phase of GSM."""
    left = decay_budget_left(
        phase.schedule(steps_per_epoch),
        phase.epochs * steps_per_epoch,
        momentum=phase.momentum,
        weight_decay=phase.weight_decay,
    )
    return float(left(0))


def layers(params: Any) -> list[dict[str, Any]]:
    """Entries and survivors of every kernel, in the order of the network."""
    report = sparsity_report(nnx.to_pure_dict(params))
    return [
        {"path": leaf.path, "entries": leaf.entries, "nonzero": leaf.nonzero}
        for leaf in report.leaves
        if leaf.prunable
    ]


def environment() -> dict[str, Any]:
    """What ran this, where and when."""
    packages = ("jax", "flax", "optax", "gsm_optax")
    devices = jax.devices()
    return {
        "command": " ".join(["python -m examples.paper", *sys.argv[1:]]),
        "machine": f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} cores",
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
