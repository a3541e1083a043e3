"""Prune a small network while it trains: 60x on handwritten digits, in a minute.

    python examples/prune_digits.py

Trains 64-300-100-10 on the 1,797 real digits that scikit-learn ships (nothing is
downloaded): densely first, then with GSM, then pruned in one stroke, for three seeds.
Prints test accuracies and the density of every layer, and draws both to
`results/prune_digits.png`. Expect the pruned network to be as accurate as before
pruning and about as accurate as the dense one, where pruning the dense network at once
destroys it.
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from gsm_optax import Recorder, decay_budget, gsm_sgd, plot, prune, sparsity_report

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH = 64  # images
GSM_RECIPE = {"momentum": 0.98, "weight_decay": 5e-3}


class MLP(nnx.Module):
    """64-300-100-10 with ReLU: 50,200 kernel entries."""

    def __init__(self, rngs: nnx.Rngs):
        """Initialise the three layers."""
        self.dense1 = nnx.Linear(64, 300, rngs=rngs)
        self.dense2 = nnx.Linear(300, 100, rngs=rngs)
        self.head = nnx.Linear(100, 10, rngs=rngs)

    def __call__(self, x):
        """Map images [batch, 64] to logits [batch, 10]."""
        return self.head(nnx.relu(self.dense2(nnx.relu(self.dense1(x)))))


def load_data():
    """Return ((images, labels), (images, labels)): 1,437 to train on, 360 to test."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images.astype(np.float32) / 16,
        labels,
        test_size=360,
        random_state=0,
        stratify=labels,
    )
    return (split[0], split[2]), (split[1], split[3])


@nnx.jit
def train_step(model, optimizer, images, labels):
    """One optimizer step on a batch."""

    def loss(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def accuracy(model, images, labels):
    """Percentage of images whose greatest logit is the label's."""
    return 100 * jnp.mean(jnp.argmax(model(images), -1) == labels)


def report(model):
    """Sparsity report of the parameters as a plain nested dict, for short paths."""
    return sparsity_report(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def steps_schedule(learning_rate, steps):
    """A tenth of the learning rate from 60 % of the steps, a hundredth from 80 %."""
    return optax.piecewise_constant_schedule(
        learning_rate, {int(0.6 * steps): 0.1, int(0.8 * steps): 0.1}
    )


def train(model, tx, data, epochs, rng, label, after_epoch=lambda *args: None):
    """Train `model` in place; call `after_epoch(step, model, optimizer)`."""
    (images, labels), test = data
    optimizer, step = nnx.Optimizer(model, tx, wrt=nnx.Param), 0
    progress = tqdm(range(epochs), desc=label, unit="epoch", leave=False, disable=None)
    for _ in progress:
        order = rng.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch, step = order[start : start + BATCH], step + 1
            train_step(model, optimizer, images[batch], labels[batch])
        after_epoch(step, model, optimizer)
        status = f"accuracy {float(accuracy(model, *test)):.1f}%"
        progress.set_postfix_str(status)
    if progress.disable:  # no terminal: one line a phase
        print(f"{label}: {epochs} epochs, {status}", flush=True)


def run(seed, data, tx, args):
    """Dense training, GSM, pruning; returns the accuracies (%) and what to draw."""
    test, rng = data[1], np.random.default_rng(seed)
    steps_per_epoch = len(data[0][0]) // BATCH
    model, recorder = MLP(nnx.Rngs(seed)), Recorder()

    dense_steps = args.dense_epochs * steps_per_epoch
    dense_tx = optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(steps_schedule(3e-2, dense_steps), momentum=0.9),
    )
    train(model, dense_tx, data, args.dense_epochs, rng, f"seed {seed} dense")
    scores = {"dense": float(accuracy(model, *test))}
    one_shot = float(accuracy(pruned(model, args.ratio), *test))

    def record(step, model, optimizer):
        recorder(step, nnx.state(model, nnx.Param), optimizer.opt_state)
        recorder.records[-1]["accuracy"] = float(accuracy(model, *test))

    train(model, tx, data, args.epochs, rng, f"seed {seed} GSM", record)
    sparse = pruned(model, args.ratio)
    scores["GSM"] = float(accuracy(model, *test))
    scores["GSM pruned"] = float(accuracy(sparse, *test))
    scores["one-shot"] = one_shot
    return scores, recorder.records, report(sparse)


def pruned(model, ratio):
    """Return a copy of `model` without the `ratio` smallest kernel entries."""
    graph, params = nnx.split(model)
    return nnx.merge(graph, prune(params, ratio))


def print_table(results):
    """Print the accuracies of every seed, their mean and their spread."""
    names = list(results[0])
    print(f"{'test accuracy, %':18}" + "".join(f"{name:>12}" for name in names))
    for seed, scores in enumerate(results):
        print(f"{f'seed {seed}':18}" + "".join(f"{v:12.2f}" for v in scores.values()))
    columns = np.array([list(scores.values()) for scores in results])
    for name, row in (
        ("mean", columns.mean(0)),
        ("std", columns.std(0, ddof=min(1, len(columns) - 1))),
    ):
        print(f"{name:18}" + "".join(f"{value:12.2f}" for value in row))


def draw(path, results, runs, ratio):
    """Draw accuracy, near-zero fraction and density by layer over the steps of GSM."""
    figure = plt.figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for records in runs:
        steps = [record["step"] for record in records]
        values = [record["accuracy"] for record in records]
        left.plot(steps, values, color=plot.BLUE, linewidth=0.8, alpha=0.5)
    mean = {name: np.mean([scores[name] for scores in results]) for name in results[0]}
    marks = {  # place on the axis, look, and what it says
        "dense": (0, mean["dense"], "o", "0.35", "dense"),
        "one-shot": (0, mean["one-shot"], "X", "black", "dense, pruned at once"),
        "GSM": (steps[-1], mean["GSM pruned"], "*", plot.ORANGE, "GSM, pruned"),
    }
    for step, value, marker, colour, text in marks.values():
        label = f"{text}: {value:.1f} %"
        left.plot(step, value, marker, color=colour, label=label, ms=10, clip_on=False)
    left.set(ylim=(0, 104), xlabel="step", ylabel="test accuracy (%)", title="Accuracy")
    left.legend(frameon=False, loc="center right")
    plot.near_zero(runs[0], middle)
    plot.density(runs[0], right)
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    figure.suptitle(
        f"Digits, 64-300-100-10, {1 / (1 - ratio):.0f}x, while GSM trains: "
        f"accuracy of {seeds}, weights of seed 0"
    )
    figure.savefig(path, dpi=110)


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ratio", type=float, default=1 - 1 / 60, help="fraction of entries to prune")
    add("--epochs", type=int, default=200, help="epochs of GSM")
    add("--dense-epochs", type=int, default=60, help="epochs of dense training before")
    add("--seeds", type=int, default=3, help="number of independent runs")
    add("--output", type=Path, default=Path("results"), help="folder for the figure")
    return parser.parse_args(argv)


def main(argv=None):
    """Run all seeds, print the table and the report, write the figure."""
    args = parse_args(argv)
    data = load_data()

    steps = args.epochs * (len(data[0][0]) // BATCH)
    schedule = steps_schedule(3e-2, steps)
    try:
        tx = gsm_sgd(schedule, args.ratio, **GSM_RECIPE)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(decay_budget(schedule, steps, **GSM_RECIPE), end="\n\n", flush=True)

    seeds = tqdm(range(args.seeds), desc="seeds", unit="seed", disable=None)
    runs = [run(seed, data, tx, args) for seed in seeds]
    results, records, reports = zip(*runs, strict=True)
    print()
    print_table(results)
    print(f"\nlayers after pruning, seed 0\n{reports[0]}")

    args.output.mkdir(parents=True, exist_ok=True)
    figure = args.output / "prune_digits.png"
    draw(figure, results, records, args.ratio)
    (args.output / "prune_digits.json").write_text(json.dumps(results, indent=1))
    print(f"\nfigure: {figure}")
    return results


if __name__ == "__main__":
    main()
