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
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.paper import methods, records, training
from examples.paper.data import load
from examples.paper.models import create
from examples.paper.recipes import Phase, Recipe, settings
from gsm_optax import apply_mask, decay_budget_left, magnitude_mask, sparsity_report

Network = tuple[Any, Any]  # parameters and batch statistics


def run(
    recipe: Recipe,
    seed: int,
    results: Path,
    folder: str | Path | None = None,
    *,
    validate: bool = False,
    bfloat16: bool = False,
) -> records.Record:
    """Run what is left of a recipe, and return its record.

    The seed is that of the initial weights, the order of the images and their
    augmentation. Records and checkpoints are in `results`, the data in `folder`
    (`examples.paper.data.load`). The record is written whenever an accuracy is known.
    """
    path = records.path_of(results, recipe.name, seed, validate, bfloat16)
    data = load(recipe.data, folder, validate)
    record = records.load(path, recipe)
    if record and records.complete(record, recipe):
        return record
    epoch = len(data.train) // recipe.batch  # steps
    kind = {"seed": seed, "validate": validate, "bfloat16": bfloat16}
    record = {"recipe": settings(recipe), **kind} | {
        "decay_budget": decay(recipe.gsm, epoch),
        "data": data.source,
        "accuracy": {},
        "seconds": record.get("seconds", {}),
        **environment(),
    }
    dtype = jnp.bfloat16 if bfloat16 else None
    graph, *initial = nnx.split(create(recipe.model, seed, dtype), nnx.Param, ...)
    mesh = training.mesh_of(recipe.batch)
    feed = partial(training.batches, data.train, recipe.batch, seed, mesh)
    # The data by their content: their folder may move.
    run_name = [recipe.model, data.train.fingerprint, recipe.batch, seed, bfloat16]

    def train(label: str, phase: Phase, network: Network, method, *args, until=None):
        """Train a network through a phase; `args` go to the optimizer."""
        tx = method(phase, epoch, *args)
        name = [*run_name, settings(phase), method.__name__, until]
        saved = results / "checkpoints" / digest(name, (network, args))
        whole, begin = not saved.exists(), time.monotonic()
        state = training.train(
            partial(training.step, graph, data, seed, tx),
            training.start(*network, tx, mesh),
            feed,
            until or phase.epochs * epoch,
            saved,
            f"{recipe.name}, seed {seed}: {label}",
        )
        if whole:
            record["seconds"][label] = round(time.monotonic() - begin, 1)
        return state.params, state.stats

    def note(label: str, network: Network) -> None:
        """Evaluate a network, and write all that is known so far."""
        top1, top5 = training.evaluate(graph, data, *network)
        record["accuracy"][label] = top1
        if recipe.data == "imagenet":
            record["accuracy"][f"{label}, top 5"] = top5
        records.write(path, record)

    dense = train("dense", recipe.dense, initial, methods.dense)
    note("dense", dense)
    if recipe.tickets:
        until = recipe.tickets * epoch
        early = train("early", recipe.dense, initial, methods.dense, until=until)
        rewound = {"initial": initial, "early": early}
        tickets(recipe, dense, rewound, record, train, note)
    else:
        columns(recipe, dense, record, train, note)
    return record


def columns(recipe, dense: Network, record, train: Callable, note: Callable) -> None:
    """Pruned at once, gradually pruned, GSM before and after, fine-tuned."""
    ratio = recipe.ratio
    note("one-shot", masked(dense, magnitude_mask(dense[0], ratio)))
    if recipe.gradual:
        least = train("gradual", recipe.gradual, dense, methods.gradual, ratio)
        note("gradual", masked(least, magnitude_mask(least[0], ratio)))
    trained = train("GSM", recipe.gsm, dense, methods.gsm, ratio)
    mask = magnitude_mask(trained[0], ratio)
    pruned = masked(trained, mask)
    record["near_zero"] = sparsity_report(trained[0]).prunable.below(1e-4)
    record["layers"] = layers(pruned[0])
    note("GSM", trained)
    note("GSM pruned", pruned)
    if recipe.tuned:
        tuned = train("tuned", recipe.tuned, pruned, methods.frozen, mask)
        check_frozen(record, "tuned", tuned, mask)
        note("GSM tuned", tuned)


def tickets(recipe, dense: Network, rewound, record, train, note) -> None:
    """Train the survivors anew, from initial and from early weights."""
    trained = train("GSM", recipe.gsm, dense, methods.gsm, recipe.ratio)
    for when, network in rewound.items():
        for by, (params, _) in {"GSM": trained, "magnitude": dense}.items():
            mask, label = magnitude_mask(params, recipe.ratio), f"{by}, {when}"
            ticket = masked(network, mask)
            winner = train(label, recipe.dense, ticket, methods.frozen, mask)
            check_frozen(record, label, winner, mask)
            note(label, winner)


def masked(network: Network, mask: Any) -> Network:
    """Set the entries outside the mask to zero."""
    return apply_mask(network[0], mask), network[1]


def check_frozen(record, label: str, network: Network, mask: Any) -> None:
    """Note how many entries are not zero outside the mask; none may be."""
    outside = jax.tree.map(jnp.logical_not, mask)
    moved = sparsity_report(apply_mask(network[0], outside)).total.nonzero
    record.setdefault("zeros_moved", {})[label] = moved
    if moved:
        raise AssertionError(f"{moved} pruned entries of {label!r} have moved.")


def digest(name: Any, arrays: Any) -> str:
    """Sixteen digits that stand for a name and the bits of all arrays."""
    found = hashlib.sha256(json.dumps(name).encode())
    for leaf in jax.tree.leaves(arrays):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


def decay(phase: Phase, steps_per_epoch: int) -> float:
    """The decay budget of a phase of GSM."""
    rate, steps = (
        methods.schedule(phase, steps_per_epoch),
        phase.epochs * steps_per_epoch,
    )
    names = ("momentum", "weight_decay", "passive_decay", "nesterov")
    kind = {name: getattr(phase, name) for name in names}
    return float(decay_budget_left(rate, steps, **kind)(0))


def layers(params: Any) -> list[dict[str, Any]]:
    """Entries and survivors of every kernel, in the order of the network."""
    report = sparsity_report(nnx.to_pure_dict(params))
    names = ("path", "entries", "nonzero")
    told = lambda leaf: {name: getattr(leaf, name) for name in names}
    return [told(leaf) for leaf in report.leaves if leaf.prunable]


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
