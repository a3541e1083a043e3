"""Prune whole units while training, then shrink: a smaller, faster dense network.

    python -m examples.shrink                    # ResNet-8 on the digits, minutes
    python -m examples.shrink --data fashion_mnist   # LeNet-5, a quarter of an hour

For each network: trains densely, goes on with GSM by units, prunes them, removes them,
and compares the small network with the dense one: test accuracy, parameters, FLOPs
(of the compiled program), file size, and latency at batch 1 and 256. Beside it stand
the units of greatest magnitude in the dense network, at once and after as many epochs
of training. Prints a table, and writes `results/shrink.json` and `results/shrink.png`.
"""

import argparse
import io
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from examples.paper.data import load
from examples.paper.models import MODELS, create
from gsm_optax import (
    gsm_sgd,
    kernels,
    plot,
    prune,
    ratio_ramp,
    tempered_importance,
)
from gsm_optax.units import find_units, shrink

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Settings(NamedTuple):
    """How a network is trained on a data set, and how much of it goes."""

    ratio: float  # of the entries that are in units
    dense: int  # epochs
    gsm: int  # epochs, and of the baseline that is trained on
    batch: int = 64
    rate: float = 0.1  # of learning
    gsm_rate: float = 0.1
    passive_decay: float = 3e-2


SETTINGS = {
    ("digits", "resnet8"): Settings(0.9, dense=40, gsm=60),
    ("fashion_mnist", "lenet5"): Settings(
        0.85, dense=8, gsm=10, batch=128, rate=0.05, gsm_rate=3e-2, passive_decay=0.1
    ),
}
TITLES = {"lenet5": "LeNet-5", "resnet8": "ResNet-8"}
BATCHES = (1, 256)  # images, of which latency is measured
ROUNDS = 30


class Images(NamedTuple):
    """Training and test set on the device, normalised."""

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def images_of(name: str, folder: str | None, validate: bool) -> Images:
    """Read a data set of `examples.paper.data`."""
    data = load(name, folder, validate)
    mean, std = (np.float32(x) for x in (data.mean, data.std))
    normal = lambda x: jnp.asarray((x.astype(np.float32) / 255 - mean) / std)
    return Images(
        *((normal(x.images), jnp.asarray(x.labels)) for x in (data.train, data.test))
    )


class Network(NamedTuple):
    """A module as arrays: `graph` is what does not train."""

    graph: Any
    variables: dict[str, Any]  # params, and stats of batch normalisation


def network(name: str, seed: int) -> Network:
    """Initialise a network of `examples.paper.models`."""
    graph, params, stats = nnx.split(create(name, seed), nnx.Param, ...)
    return Network(graph, {"params": params, "stats": stats})


def apply(graph: Any, variables: Any, x: jax.Array) -> jax.Array:
    """Logits, as in inference."""
    model = nnx.merge(graph, variables["params"], variables["stats"])
    model.eval()
    return model(x)


def train(net: Network, tx, data: Images, epochs: int, batch: int, seed: int, label):
    """Return the network after some epochs."""
    images, labels = data.train

    def loss_of(params, stats, rows):
        model = nnx.merge(net.graph, params, stats, copy=True)
        logits = model(images[rows])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

    # Not a scan over the batches: in a loop XLA's convolutions are slow on a CPU.
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, opt_state, rows):
        params, stats = variables["params"], variables["stats"]
        grads, stats = jax.grad(loss_of, has_aux=True)(params, stats, rows)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return {"params": params, "stats": stats}, opt_state

    variables = jax.tree.map(jnp.copy, net.variables)
    state = tx.init(variables["params"])
    bar = tqdm(range(epochs), desc=label, unit="epoch", leave=False, disable=None)
    for i in bar:
        order = np.random.default_rng((seed, i)).permutation(len(labels))
        for rows in order[: len(order) // batch * batch].reshape(-1, batch):
            variables, state = step(variables, state, rows)
        jax.block_until_ready(variables)
    net = net._replace(variables=variables)
    if bar.disable:  # no terminal: one line a phase
        print(f"{label}: {epochs} epochs, {accuracy(net, data):.2f} %", flush=True)
    return net


def accuracy(net: Network, data: Images) -> float:
    """Percentage of the test images whose greatest logit is the label's."""
    images, labels = data.test
    logits, hits = jax.jit(partial(apply, net.graph)), 0
    for rows in np.array_split(np.arange(len(labels)), max(1, len(labels) // 1000)):
        found = logits(net.variables, images[rows]).argmax(-1)
        hits += int((found == labels[rows]).sum())
    return 100 * hits / len(labels)


def dense_optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """Momentum SGD along a cosine, with decay of the kernels."""
    decay = optax.add_decayed_weights(5e-4, mask=kernels)
    return optax.chain(decay, optax.sgd(optax.cosine_decay_schedule(rate, steps), 0.9))


def gsm_optimizer(settings: Settings, units: Any, steps: int):
    """The recipe of the README, by units."""
    drops = {int(0.75 * steps): 0.1, int(0.92 * steps): 0.1}
    return gsm_sgd(
        optax.piecewise_constant_schedule(settings.gsm_rate, drops),
        ratio_ramp(settings.ratio, int(0.6 * steps)),
        momentum=0.95,
        weight_decay=5e-4,
        passive_decay=settings.passive_decay,
        importance=tempered_importance(0.5),
        smoothing=0.99,
        units=units,
    )


def pruned(net: Network, ratio: float, units: Any) -> Network:
    """The network with the units of least magnitude at zero."""
    params = prune(net.variables["params"], ratio, units=units)
    return net._replace(variables=net.variables | {"params": params})


def smaller(net: Network, units: Any) -> Network:
    """The network without the units that add nothing."""
    return net._replace(variables=shrink(net.variables, units)[0])


def run(name: str, data: Images, settings: Settings, seed: int) -> dict[str, Any]:
    """Train one network densely and by units, and measure what comes of it."""
    ratio, batch = settings.ratio, settings.batch
    epoch, label = len(data.train[1]) // batch, f"{name}, seed {seed}"
    learn = partial(train, data=data, batch=batch)
    steps = settings.dense * epoch
    tx = dense_optimizer(settings.rate, steps)
    dense = learn(
        network(name, seed),
        tx,
        epochs=settings.dense,
        seed=seed,
        label=f"{label}: dense",
    )
    units = find_units(partial(apply, dense.graph), dense.variables, data.test[0][:2])

    steps, more = settings.gsm * epoch, {"epochs": settings.gsm, "seed": seed + 1000}
    tx = gsm_optimizer(settings, units, steps)
    trained = learn(dense, tx, label=f"{label}: GSM", **more)
    sparse = pruned(trained, ratio, units)
    once = smaller(pruned(dense, ratio, units), units)
    tx = dense_optimizer(settings.rate / 2, steps)
    tuned = learn(once, tx, label=f"{label}: magnitude, trained on", **more)
    found = {
        "dense": dense,
        "GSM by units, shrunk": smaller(sparse, units),
        "magnitude of units, at once": once,
        "the same, trained on": tuned,
    }
    rows = {
        key: {"accuracy": accuracy(net, data)} | cost(net, data)
        for key, net in found.items()
    }
    for key, seconds in latencies(found, data).items():
        rows[key] |= seconds
    loss = {"before": accuracy(trained, data), "after": accuracy(sparse, data)}
    return {
        "network": name,
        "seed": seed,
        "ratio": ratio,
        "pruning": loss,
        "rows": rows,
    }


def cost(net: Network, data: Images) -> dict[str, float]:
    """Parameters, FLOPs of an image, and bytes of an npz file."""
    leaves = jax.tree.leaves(net.variables["params"])
    compiled = compile_for(net, data.test[0][:1])
    file = io.BytesIO()
    np.savez_compressed(file, *map(np.asarray, jax.tree.leaves(net.variables)))
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "flops": compiled.cost_analysis()["flops"],
        "bytes": file.getbuffer().nbytes,
    }


def compile_for(net: Network, images: jax.Array) -> Any:
    """Compile inference for a batch."""
    return jax.jit(partial(apply, net.graph)).lower(net.variables, images).compile()


def latencies(nets: dict[str, Network], data: Images) -> dict[str, dict[str, float]]:
    """Median milliseconds of inference; the networks take turns, in random order."""
    found: dict[str, dict[str, float]] = {key: {} for key in nets}
    for size in BATCHES:
        images = jnp.concatenate([data.test[0]] * 2)[:size]
        calls = {key: compile_for(net, images) for key, net in nets.items()}
        times: dict[str, list[float]] = {key: [] for key in nets}
        rng = np.random.default_rng(size)
        for i in range(ROUNDS + 1):
            for key in rng.permutation(list(nets)):
                begin = time.perf_counter()
                jax.block_until_ready(calls[key](nets[key].variables, images))
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
        shares = [100 * mean(key, 1) / mean(key, 0) for key in kinds]
        bars = axis.barh(list(kinds.values()), shares, color=plot.BLUE)
        axis.bar_label(bars, [f"{share:.0f} %" for share in shares], padding=3)
        axis.axvline(100, color="0.5", linewidth=0.8)
        axis.set(xlim=(0, 115), xlabel="of the dense network (%)")
        axis.invert_yaxis()
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
        data = images_of(args.data, args.folder, args.validate)
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
