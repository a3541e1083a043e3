"""Prune whole units while training, then shrink: a smaller, faster dense network.

    python -m examples.shrink                    # ResNet-8 on the digits, minutes
    python -m examples.shrink --data fashion_mnist   # LeNet-5, ResNet-8: an hour

For each network: trains densely, goes on with GSM by units, prunes them, removes them,
and compares the small network with the dense one: test accuracy, parameters, FLOPs
(of the compiled program), file size, and latency at batch 1 and 256. Beside it stand
the same with sizes that are multiples of eight, which costs FLOPs and saves time, and
the units of greatest magnitude in the dense network, at once and after as many epochs
of training. Prints a table, and writes `results/shrink.json` and `results/shrink.png`.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

from examples.paper import methods
from examples.paper.data import Data, load
from examples.paper.models import MODELS, create
from examples.paper.recipes import Phase, beyond
from examples.paper.training import Trainer, normalise
from gsm_optax import plot, prune
from gsm_optax.units import find_units, shrink

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Settings(NamedTuple):
    """How a network is trained on a data set, and how much of it goes."""

    ratio: float  # of the entries that are in units
    dense: int  # epochs
    gsm: int  # epochs, and of the baseline that is trained on
    changes: dict[str, Any]  # to the phase of GSM, which is `beyond`
    batch: int = 64
    rate: float = 0.1  # of learning


SHORT = {"learning_rate": 0.05, "passive_decay": 0.05, "ramp": 0.4, "cosine": True}
SETTINGS = {
    ("digits", "resnet8"): Settings(0.9, 40, 60, changes={}),
    ("fashion_mnist", "lenet5"): Settings(0.7, 8, 10, SHORT, batch=128, rate=0.05),
    ("fashion_mnist", "resnet8"): Settings(0.6, 5, 7, SHORT, batch=128),
}
TITLES = {"lenet5": "LeNet-5", "resnet8": "ResNet-8"}
COLOURS = (plot.BLUE, plot.ORANGE)
BATCHES = (1, 256)  # images, of which latency is measured
ROUNDS = 30

Network = dict[str, Any]  # params, and stats of batch normalisation


def run(name: str, data: Data, settings: Settings, seed: int) -> dict[str, Any]:
    """Train one network densely and by units, and measure what comes of it."""
    graph, params, stats = nnx.split(create(name, seed), nnx.Param, ...)
    call, trainer = partial(apply, graph), Trainer(graph, data, settings.batch, seed)
    test = lambda net: trainer.accuracy((net["params"], net["stats"]))[0]
    images = data.test.read(np.arange(max(BATCHES)) % len(data.test))[0]
    images = normalise(jnp.asarray(images), data.mean, data.std)

    def learn(label, net, phase, method, *args):
        steps, tx = phase.epochs * trainer.epoch, method(phase, trainer.epoch, *args)
        label, given = f"{name}, seed {seed}: {label}", (net["params"], net["stats"])
        with TemporaryDirectory() as folder:
            params, stats = trainer.train(given, tx, steps, label, Path(folder))
        # Training is on all devices, what is measured on one.
        return jax.device_put({"params": params, "stats": stats}, jax.devices()[0])

    first = Phase(settings.dense, settings.rate, cosine=True)
    dense = learn("dense", {"params": params, "stats": stats}, first, methods.dense)
    units, ratio = find_units(call, dense, images[:2]), settings.ratio
    trainer.seed += 1000  # another order of the images
    gsm = replace(beyond(settings.gsm), **settings.changes)
    trained = learn("GSM", dense, gsm, methods.gsm, ratio, units)
    sparse = pruned(trained, ratio, units)
    once = shrink(pruned(dense, ratio, units), units)[0]
    more = Phase(settings.gsm, settings.rate / 2, cosine=True)
    found = {
        "dense": dense,
        "GSM by units, shrunk": shrink(sparse, units)[0],
        "the same, in eights": shrink(sparse, units, round_to=8)[0],
        "magnitude of units, at once": once,
        "magnitude, trained on": learn("trained on", once, more, methods.dense),
    }
    times = latencies(call, found, images)
    rows = {
        key: {"accuracy": test(net)} | cost(call, net, images[:1]) | times[key]
        for key, net in found.items()
    }
    loss = {"before": test(trained), "after": test(sparse)}
    about = {"network": name, "seed": seed, "ratio": ratio}
    return about | {"pruning": loss, "rows": rows}


def apply(graph: Any, net: Network, x: jax.Array) -> jax.Array:
    """Logits, as in inference."""
    model = nnx.merge(graph, net["params"], net["stats"])
    model.eval()
    return model(x)


def pruned(net: Network, ratio: float, units: Any) -> Network:
    """The network with the units of least magnitude at zero."""
    return net | {"params": prune(net["params"], ratio, units=units)}


def cost(call: Callable, net: Network, image: jax.Array) -> dict[str, float]:
    """Parameters, FLOPs of an image, and bytes of an npz file."""
    file = io.BytesIO()
    np.savez_compressed(file, *map(np.asarray, jax.tree.leaves(net)))
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(net["params"])),
        "flops": jax.jit(call).lower(net, image).compile().cost_analysis()["flops"],
        "bytes": file.getbuffer().nbytes,
    }


def latencies(
    call: Callable, nets: dict[str, Network], images: jax.Array
) -> dict[str, dict[str, float]]:
    """Median milliseconds of inference; the networks take turns, in random order."""
    found: dict[str, dict[str, float]] = {key: {} for key in nets}
    for size in BATCHES:
        some = images[:size]
        calls = {k: jax.jit(call).lower(net, some).compile() for k, net in nets.items()}
        times: dict[str, list[float]] = {key: [] for key in nets}
        rng = np.random.default_rng(size)
        for i in range(ROUNDS + 1):
            for key in rng.permutation(list(nets)):
                begin = time.perf_counter()
                jax.block_until_ready(calls[key](nets[key], some))
                times[key].append(time.perf_counter() - begin)
            if i == 0:  # to warm up
                times = {key: [] for key in nets}
        for key, seconds in times.items():
            found[key][f"ms at {size}"] = 1000 * float(np.median(seconds))
    return found


def show(record: dict[str, Any]) -> None:
    """Print the table of one network."""
    keep = record["pruning"]
    print(
        f"\n{record['network']}, seed {record['seed']}: {record['ratio']:.0%} of the "
        f"entries in units go; pruning: {keep['before']:.2f} -> {keep['after']:.2f} %"
    )
    head = [
        "accuracy",
        "parameters",
        "MFLOPs",
        "npz kB",
        *(f"ms at {n}" for n in BATCHES),
    ]
    print(f"{'':29}" + "".join(f"{word:>12}" for word in head))
    for key, row in record["rows"].items():
        cells = [
            f"{row['accuracy']:.2f}",
            f"{row['parameters']:,}",
            f"{row['flops'] / 1e6:.2f}",
            f"{row['bytes'] / 1e3:.0f}",
            *(f"{row[f'ms at {n}']:.2f}" for n in BATCHES),
        ]
        print(f"{key:29}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def draw(path: Path, records: list[dict[str, Any]], data: str) -> None:
    """Draw for each network what is left of the dense one's costs: means over seeds."""
    names = list(dict.fromkeys(record["network"] for record in records))
    kinds = {"parameters": "parameters", "flops": "FLOPs", "bytes": "file"}
    kinds |= {f"ms at {n}": f"time, batch {n}" for n in BATCHES}
    size = (4.6 * len(names) + 0.8, 2.9)
    figure, axes = plt.subplots(
        1, len(names), figsize=size, layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        rows = [list(x["rows"].values()) for x in records if x["network"] == name]
        mean = lambda key, i, rows=rows: np.mean([row[i][key] for row in rows])
        for i, label in enumerate(("exact sizes", "multiples of 8"), 1):
            shares = [100 * mean(key, i) / mean(key, 0) for key in kinds]
            places = np.arange(len(kinds)) + 0.4 * (i - 1.5)
            bars = axis.barh(places, shares, 0.38, color=COLOURS[i - 1], label=label)
            axis.bar_label(bars, [f"{x:.0f} %" for x in shares], padding=3, fontsize=8)
        axis.set_yticks(range(len(kinds)), list(kinds.values()))
        axis.axvline(100, color="0.5", linewidth=0.8)
        axis.set(xlim=(0, 115), xlabel="of the dense network (%)")
        axis.invert_yaxis()
        axis.legend(fontsize="small", loc="lower right")
        seeds = f"{len(rows)} seed{'s' if len(rows) > 1 else ''}"
        axis.set_title(
            f"{TITLES.get(name, name)}, {data.replace('_', '-')}, {seeds}\n"
            f"accuracy {mean('accuracy', 0):.2f} % dense, "
            f"{mean('accuracy', 1):.2f} % shrunk",
            fontsize="medium",
        )
    figure.savefig(path, dpi=110)


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=sorted({d for d, _ in SETTINGS}), default="digits")
    add("--folder", help="where idx files lie, if not in the usual places")
    add("--models", nargs="+", choices=MODELS, help="those of the data, by default")
    add("--ratio", type=float, help="fraction of the entries in units that goes")
    add("--dense-epochs", type=int, help="epochs of dense training")
    add("--epochs", type=int, help="epochs of GSM")
    add("--seeds", type=int, default=1, help="number of independent runs")
    add("--validate", action="store_true", help="test on a sixth of the training set")
    add("--output", type=Path, default=Path("results"), help="folder for the figure")
    return parser.parse_args(argv)


def settings_of(args, name: str) -> Settings:
    """Settings of a network, those of the command line first."""
    if (args.data, name) not in SETTINGS:
        known = ", ".join(model for data, model in SETTINGS if data == args.data)
        raise SystemExit(f"error: --models {name} with --data {args.data}: try {known}")
    given = {"ratio": args.ratio, "dense": args.dense_epochs, "gsm": args.epochs}
    given = {key: value for key, value in given.items() if value is not None}
    return SETTINGS[args.data, name]._replace(**given)


def main(argv=None):
    """Run all networks and seeds, print their tables, write the figure."""
    args = parse_args(argv)
    models = args.models or [model for data, model in SETTINGS if data == args.data]
    settings = {name: settings_of(args, name) for name in models}
    try:
        data = load(args.data, args.folder, args.validate)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from None
    records = []
    for seed in range(args.seeds):
        for name in models:
            records.append(run(name, data, settings[name], seed))
            show(records[-1])
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "shrink.json").write_text(json.dumps(records, indent=1))
    figure = args.output / "shrink.png"
    draw(figure, records, args.data)
    print(f"\nfigure: {figure}")
    return records


if __name__ == "__main__":
    main()
