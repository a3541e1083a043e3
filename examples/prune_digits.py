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

from gsm_optax import decay_budget, gsm_sgd, prune, sparsity_report

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


def train(model, tx, data, epochs, rng, history, label):
    """Train `model` in place; append (accuracy, near-zero %) to `history` by epoch."""
    (images, labels), test = data
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    progress = tqdm(range(epochs), desc=label, unit="epoch", leave=False)
    for _ in progress:
        order = rng.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            train_step(model, optimizer, images[batch], labels[batch])
        near_zero = 100 * report(model).prunable.below(1e-4)
        history.append((float(accuracy(model, *test)), near_zero))
        progress.set_postfix_str(
            f"accuracy {history[-1][0]:.1f}%, near zero {history[-1][1]:.1f}%"
        )


def run(seed, data, tx, args):
    """Dense training, GSM, pruning; returns the accuracies (%) and what to draw."""
    test, rng = data[1], np.random.default_rng(seed)
    steps_per_epoch = len(data[0][0]) // BATCH
    model, history = MLP(nnx.Rngs(seed)), []

    dense_steps = args.dense_epochs * steps_per_epoch
    dense_tx = optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(steps_schedule(3e-2, dense_steps), momentum=0.9),
    )
    train(model, dense_tx, data, args.dense_epochs, rng, history, f"seed {seed} dense")
    dense = float(accuracy(model, *test))
    one_shot = float(accuracy(pruned(model, args.ratio), *test))

    train(model, tx, data, args.epochs, rng, history, f"seed {seed} GSM")
    gsm = float(accuracy(model, *test))

    sparse = pruned(model, args.ratio)
    scores = {
        "dense": dense,
        "GSM": gsm,
        "GSM pruned": float(accuracy(sparse, *test)),
        "one-shot": one_shot,
    }
    return scores, history, report(sparse)


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


def draw(path, results, histories, reports, args):
    """Draw accuracy, near-zero fraction and per-layer density, side by side."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.4), layout="constrained"
    )
    history = np.array(histories)  # [seed, epoch, (accuracy, near zero)]
    draw_history(left, history[..., 0], args.dense_epochs)
    draw_history(middle, history[..., 1], args.dense_epochs)
    mean = {name: np.mean([scores[name] for scores in results]) for name in results[0]}
    mark_accuracies(left, mean, args.dense_epochs, history.shape[1])
    goal = 100 * args.ratio
    middle.axhline(goal, color="black", linestyle="--", linewidth=1)
    middle.text(history.shape[1], goal - 3, "to be pruned", ha="right", va="top")
    middle.set(ylabel="kernel entries below 1e-4 (%)", title="On their way to zero")
    draw_density(right, reports, 100 - goal)
    seeds = f"{args.seeds} seed{'s' if args.seeds > 1 else ''}"
    figure.suptitle(
        f"Digits, 64-300-100-10, {1 / (1 - args.ratio):.0f}x: mean and range of {seeds}"
    )
    figure.savefig(path, dpi=110)


def draw_history(axis, values, dense_epochs):
    """Draw percentages [seed, epoch]: the mean as a line, the range as a band."""
    epochs, colour = np.arange(1, values.shape[1] + 1), "#1f4e9c"
    axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.25)
    axis.plot(epochs, values.mean(0), color=colour, linewidth=1.5)
    axis.axvline(dense_epochs, color="0.4", linestyle=":", linewidth=1)
    axis.set(ylim=(0, 104), xlabel="epoch")


def mark_accuracies(axis, mean, dense_epochs, last_epoch):
    """Mark what pruning costs after GSM, and at once."""
    gsm, one_shot = mean["GSM pruned"], mean["one-shot"]
    axis.plot(last_epoch, gsm, "*", color="#d55e00", markersize=13, zorder=3)
    axis.annotate(
        f"GSM, then pruned\n{gsm:.1f} %",
        (last_epoch, gsm),
        xytext=(-10, -34),
        textcoords="offset points",
        ha="right",
        color="#b34700",
    )
    axis.plot(dense_epochs, one_shot, "X", color="black", markersize=9)
    axis.annotate(
        f"dense, pruned at once\n{one_shot:.1f} %",
        (dense_epochs, one_shot),
        xytext=(10, -4),
        textcoords="offset points",
    )
    axis.text(dense_epochs, 60, "  GSM from here", color="0.3", fontsize=9)
    axis.set(ylabel="test accuracy (%)", title="Accuracy")


def draw_density(axis, reports, kept):
    """Draw the percentage of entries that every layer kept, and that of the model."""
    layers = [[leaf for leaf in report.leaves if leaf.prunable] for report in reports]
    density = 100 * np.array([[leaf.density for leaf in row] for row in layers])
    names = [
        f"{leaf.path.split('/')[0]}\n{leaf.shape[0]}x{leaf.shape[1]}"
        for leaf in layers[0]
    ]
    mean = density.mean(0)
    spread = [mean - density.min(0), density.max(0) - mean]
    bars = axis.bar(
        names, mean, yerr=spread, color="#56b4e9", edgecolor="black", capsize=4
    )
    label = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axis.bar_label(bars, fmt="%.1f %%", padding=6, bbox=label)
    line = {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 0}
    axis.axhline(kept, label=f"whole model: {kept:.1f} %", **line)
    axis.legend(loc="upper left", frameon=False)
    axis.set(ylabel="entries kept (%)", title="Density found by layer")
    axis.margins(y=0.2)


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
    print(decay_budget(schedule, steps, **GSM_RECIPE), end="\n\n")

    seeds = tqdm(range(args.seeds), desc="seeds", unit="seed")
    runs = [run(seed, data, tx, args) for seed in seeds]
    results, histories, reports = zip(*runs, strict=True)
    print()
    print_table(results)
    print(f"\nlayers after pruning, seed 0\n{reports[0]}")

    args.output.mkdir(parents=True, exist_ok=True)
    figure = args.output / "prune_digits.png"
    draw(figure, results, histories, reports, args)
    (args.output / "prune_digits.json").write_text(json.dumps(results, indent=1))
    print(f"\nfigure: {figure}")
    return results


if __name__ == "__main__":
    main()
