"""Which layers settle first, and what freezing them costs: digits and Fashion-MNIST.

    python -m examples.layer_freezing                  # 10 to 20 minutes, three seeds
    python -m examples.layer_freezing --data digits    # two minutes

A network of five layers is trained with GSM from its initialisation. First it is
compared, epoch by epoch and layer by layer, with what it becomes: activations by linear
CKA, places of the largest weights by structural similarity, at four sparsities (one
seed; activations as they are in training, weights cut to the sparsity). Then
its leading layers are frozen by the four schemes of Yuan et al. (2022), tuned to save
the same FLOPs. Prints the accuracies, and writes two figures and a JSON file.
"""

import argparse
import importlib.metadata
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

from examples.paper.data import load
from gsm_optax import (
    apply_mask,
    gsm_sgd,
    magnitude_mask,
    prune,
)
from gsm_optax.freezing import (
    delayed_periodic,
    freeze_blocks,
    freezing_saving,
    periodic,
    single_shot,
    single_shot_resume,
    single_shot_start,
)
from gsm_optax.similarity import linear_cka, structural_similarity

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTHS = (300, 200, 100, 100, 10)
LAYERS = tuple(f"layer{i + 1}" for i in range(len(WIDTHS)))
SETTINGS = {  # name: (batch, epochs)
    "digits": (64, 100),
    "fashion_mnist": (256, 20),
}
GSM = {"momentum": 0.95, "weight_decay": 6e-3}
LEARNING_RATE = 0.05
SPARSITIES = (0.0, 0.5, 0.8, 0.9)
SCHEMES = ("single-shot", "single-shot & resume", "periodic", "delayed periodic")


def initial(seed, inputs):
    """He-initialised parameters."""
    params, keys = {}, jax.random.split(jax.random.key(seed), len(WIDTHS))
    for name, key, width in zip(LAYERS, keys, WIDTHS, strict=True):
        kernel = jax.random.normal(key, (inputs, width)) * (2 / inputs) ** 0.5
        params[name] = {"kernel": kernel, "bias": jnp.zeros(width)}
        inputs = width
    return params


def activations(params, x):
    """Outputs of every layer, the last ones are the logits."""
    outputs = []
    for name in LAYERS:
        x = x @ params[name]["kernel"] + params[name]["bias"]
        outputs.append(x)
        x = jax.nn.relu(x)
    return outputs


class Trainer:
    """Trains on one data set, an epoch a call."""

    ratio = 0.9
    levels = ((2, 1, 1, 1, 1), (2, 2, 1, 1, 1), (4, 2, 2, 1, 1))  # periods, by block
    freezable = 3  # of five layers: about the two thirds of the paper

    def __init__(self, name, epochs=None):
        """Read the data; by default train for as long as `SETTINGS` says."""
        data = load(name)
        flat = lambda part: part.images.reshape(len(part), -1) / np.float32(255)
        mean, std = data.mean[0], data.std[0]
        self.x, self.test_x = ((flat(p) - mean) / std for p in (data.train, data.test))
        self.y, self.test_y = data.train.labels, data.test.labels
        self.name, (self.batch, usual) = name, SETTINGS[name]
        self.epochs = epochs or usual
        self.epoch_steps = len(self.x) // self.batch
        self.steps = self.epochs * self.epoch_steps

    def costs(self):
        """Multiplications of every layer: forward, and backward with it in front.

        Backward that is the gradient of its weights, and of what the next layer takes.
        """
        forward = np.multiply((self.x.shape[1], *WIDTHS[:-1]), WIDTHS)
        backward = forward + np.append(forward[1:], 0)
        return {"forward": forward.tolist(), "backward": backward.tolist()}

    def run(self, seed, schedule=lambda step: 0 * step, ratio=ratio):
        """Train from a seed; yield the parameters after every epoch."""
        # Ratio and schedule are data, so that one compilation serves all runs.
        frozen = schedule(jnp.arange(self.steps))
        params, rng = initial(seed, self.x.shape[1]), np.random.default_rng(seed)
        state = optimizer(self.steps, ratio, frozen).init(params)
        x, y = jnp.asarray(self.x), jnp.asarray(self.y)
        for _ in range(self.epochs):
            order = rng.permutation(len(x))[: self.epoch_steps * self.batch]
            rows = order.reshape(self.epoch_steps, self.batch)
            params, state = train_epoch(
                params, state, x, y, rows, jnp.float32(ratio), frozen
            )
            yield jax.device_get(params)

    def accuracy(self, params):
        """Percentage of the test images that are named right."""
        logits = activations(params, self.test_x)[-1]
        return 100 * float((logits.argmax(-1) == self.test_y).mean())


def optimizer(steps, ratio, frozen):
    """GSM, with as many leading layers frozen as `frozen` has for the step."""
    tx = gsm_sgd(optax.cosine_decay_schedule(LEARNING_RATE, steps), ratio, **GSM)
    return freeze_blocks(tx, lambda step: frozen[step], LAYERS)


@partial(jax.jit, donate_argnums=(0, 1))
def train_epoch(params, state, x, y, rows, ratio, frozen):
    """Take one step for each row of indices."""
    tx = optimizer(len(frozen), ratio, frozen)

    def loss(params, chosen):
        logits = activations(params, x[chosen])[-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[chosen])
        return losses.mean()

    def one(carry, chosen):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, chosen), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(one, (params, state), rows)[0]


def progress(items, label):
    """Yield the items, with a bar or, where there is no terminal, a line at the end."""
    bar = tqdm(items, desc=label, disable=None)
    yield from bar
    if bar.disable:
        print(f"{label} done", flush=True)


def similarities(trainer, ratio, seed=0):
    """CKA and structural similarity with the final network: [epoch, layer] each."""
    history = list(trainer.run(seed, ratio=ratio))
    inputs = trainer.test_x[:2000]
    layers = jax.jit(lambda params: activations(params, inputs))
    cka, final = jax.jit(linear_cka), layers(history[-1])
    alike = [
        [float(cka(a, b)) for a, b in zip(layers(params), final, strict=True)]
        for params in history
    ]
    if ratio:  # the smallest weights are on their way out: compare what is kept
        history = [apply_mask(p, magnitude_mask(p, ratio)) for p in history]
    kernels = lambda params: [params[name]["kernel"] for name in LAYERS]
    places = jax.jit(structural_similarity)
    placed = [
        [
            float(places(a, b))
            for a, b in zip(kernels(params), kernels(history[-1]), strict=True)
        ]
        for params in history
    ]
    return {"cka": alike, "structure": placed}


def schemes(trainer, periods):
    """The four schemes, the others made to save what `periodic` does."""
    steps, epoch, costs = trainer.steps, trainer.epoch_steps, trainer.costs()
    by_period = periodic(periods, interval=epoch)
    saving = freezing_saving(by_period, steps, **costs)
    blocks, trained = trainer.freezable, len(periods) - trainer.freezable
    start = single_shot_start(saving, steps, epoch, blocks, **costs)
    resume = min(steps // 10, start)  # no block can be frozen before step 0
    seldom = (16,) * blocks + (1,) * trained
    late = lambda epochs: delayed_periodic(epochs * epoch, seldom, epoch)
    error = lambda epochs: abs(freezing_saving(late(epochs), steps, **costs) - saving)
    return {
        "single-shot": single_shot(start, epoch, blocks),
        "single-shot & resume": single_shot_resume(
            start, epoch, blocks, steps=steps, resume=resume
        ),
        "periodic": by_period,
        "delayed periodic": late(min(range(trainer.epochs), key=error)),
    }


def compare(trainer, seeds):
    """Accuracy, pruned, of all schemes at all savings: one record a run."""
    jobs = [("none", 0, lambda step: 0 * step)]
    for level, periods in enumerate(trainer.levels):
        jobs += [(name, level, s) for name, s in schemes(trainer, periods).items()]
    records = []
    for name, level, schedule in progress(jobs, f"{trainer.name}: schemes"):
        record = {
            "scheme": name,
            "level": level,
            "saving": freezing_saving(schedule, trainer.steps, **trainer.costs()),
        }
        for seed in range(seeds):
            *_, params = trainer.run(seed, schedule)
            accuracies = {
                "accuracy": trainer.accuracy(prune(params, trainer.ratio)),
                "before pruning": trainer.accuracy(params),
            }
            records.append(record | {"seed": seed} | accuracies)
    return records


def spread(records, scheme, column="accuracy"):
    """Savings of a scheme, means and standard deviations (0 of one) of accuracies."""
    runs = [r for r in records if r["scheme"] == scheme]
    levels = sorted({r["level"] for r in runs})
    of_level = lambda key: np.array(
        [[r[key] for r in runs if r["level"] == level] for level in levels]
    )
    accuracies = of_level(column)
    stds = accuracies.std(1, ddof=min(1, accuracies.shape[1] - 1))
    return of_level("saving").mean(1), accuracies.mean(1), stds


def print_table(name, records):
    """One row a scheme, one column a saving, in Markdown: accuracy, what is saved."""
    _, (mean,), (std,) = spread(records, "none")
    _, (before,), _ = spread(records, "none", "before pruning")
    savings = spread(records, "periodic")[0]
    print(f"\n{name}, nothing frozen: {mean:.2f} ± {std:.2f}, unpruned {before:.2f}\n")
    print("| | " + " | ".join(f"{saving:.0%}" for saving in savings) + " |")
    print("|---|" + "---:|" * len(savings))
    for scheme in SCHEMES:
        savings, means, stds = spread(records, scheme)
        _, before, _ = spread(records, scheme, "before pruning")
        rows = zip(savings, means, stds, before, strict=True)
        cells = [f"{m:.2f} ± {s:.2f} ({b:.2f}; {x:.1%})" for x, m, s, b in rows]
        print(f"| {scheme} | " + " | ".join(cells) + " |")
    print("\nTest accuracy in %, pruned (in brackets unpruned; training FLOPs saved).")


def draw_similarities(results):
    """A row of panels for each data set and measure, a panel for each sparsity."""
    titles = {"cka": "linear CKA", "structure": "structural similarity"}
    rows = [(name, kind) for name in results for kind in titles]
    figure, axes = plt.subplots(
        len(rows),
        len(SPARSITIES),
        figsize=(10, 2.3 * len(rows)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    shades = plt.colormaps["viridis"](np.linspace(0, 0.85, len(LAYERS)))
    styles = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
    for line, (name, kind) in zip(axes, rows, strict=True):
        for axis, ratio in zip(line, SPARSITIES, strict=True):
            curves = np.array(results[name]["similarity"][str(ratio)][kind])
            epochs = np.arange(1, len(curves) + 1)
            for i, layer in enumerate(LAYERS):
                axis.plot(
                    epochs, curves[:, i], ls=styles[i], color=shades[i], label=layer
                )
            axis.set_title(f"{name}, {ratio:.0%} sparse", fontsize=9)
        line[0].set_ylabel(titles[kind])
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    axes[0, -1].legend(fontsize=7, loc="lower right")
    return figure


def draw_schemes(results):
    """Accuracy against what is saved, a panel a data set."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 3.4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    colours = ("black", "#d55e00", "#56b4e9", "#009e73")
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        records = result["schemes"]
        _, (mean,), (std,) = spread(records, "none")
        axis.axhspan(mean - std, mean + std, color="0.85", label="nothing frozen")
        for scheme, marker, colour in zip(SCHEMES, "osv^", colours, strict=True):
            savings, means, stds = spread(records, scheme)
            axis.errorbar(
                100 * savings, means, stds,
                marker=marker, color=colour, capsize=2, label=scheme,
            )  # fmt: skip
        axis.set(title=name, xlabel="training FLOPs saved (%)")
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[0, 0].legend(fontsize=8)
    return figure


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", nargs="+", choices=[*SETTINGS], default=[*SETTINGS], help="data sets")
    add("--seeds", type=int, default=3, help="runs of every scheme")
    add("--epochs", type=int, help="of every run, instead of the usual number")
    add("--output", type=Path, default=Path("results/layer_freezing"), help="folder")
    return parser.parse_args(argv)


def main(argv=None):
    """Run everything for each data set, print the table, draw both figures."""
    args, results = parse_args(argv), {}
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        trainers = [Trainer(name, args.epochs) for name in args.data]
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from None
    for trainer in trainers:
        similarity = {
            str(ratio): similarities(trainer, ratio)
            for ratio in progress(SPARSITIES, f"{trainer.name}: similarity")
        }
        records = compare(trainer, args.seeds)
        results[trainer.name] = {"similarity": similarity, "schemes": records}
        print_table(trainer.name, records)
    (args.output / "layer_freezing.json").write_text(json.dumps(results, indent=1))
    versions = (f"{p} {importlib.metadata.version(p)}" for p in ("jax", "optax"))
    machine = f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}"
    print(", ".join(["\n" + machine, *versions]))
    draw_similarities(results).savefig(args.output / "layers_settle.png", dpi=80)
    pruned = {f"{name}, 90 % pruned": result for name, result in results.items()}
    draw_schemes(pruned).savefig(args.output / "freezing_schemes.png", dpi=90)
    print(f"\nfigures: {args.output}")


if __name__ == "__main__":
    main()
