"""What freezing the front of a ResNet costs: the four schemes on ResNet-20, digits.

    python -m examples.freezing_resnet             # three seeds; an hour on one core
    python -m examples.freezing_resnet --seeds 1 --ratios 0.9

As `examples.layer_freezing` does with five linear layers, but with residual blocks and
batch normalisation: trained from its initialisation, with GSM at 90 % and densely,
nothing frozen and by the four schemes of Yuan et al. (2022), each planned to save the
same training FLOPs. Prints a table for each ratio, and writes a figure and a JSON file.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.layer_freezing import compare, draw_schemes, print_table
from examples.paper import methods
from examples.paper.data import load
from examples.paper.models import create
from examples.paper.recipes import beyond
from examples.paper.training import normalise
from gsm_optax import gsm_sgd, ratio_ramp, tempered_importance
from gsm_optax.freezing import freeze_blocks

MODEL, BATCH = "resnet20", 64
BLOCKS = ("stem", *(f"blocks/{i}" for i in range(9)), "head")


class Trainer:
    """Trains the network on the digits, an epoch a call."""

    levels = ((2,) * 5 + (1,) * 6, (4,) * 3 + (2,) * 4 + (1,) * 4)  # periods, by block
    freezable = 7  # of eleven blocks: about the two thirds of the paper

    def __init__(self, ratio, epochs):
        """Read the data."""
        data = load("digits")
        read = lambda part: normalise(jnp.asarray(part.images), data.mean, data.std)
        self.x, self.test_x = read(data.train), read(data.test)
        self.y, self.test_y = map(jnp.asarray, (data.train.labels, data.test.labels))
        self.name, self.ratio = f"ResNet-20, digits, {ratio:.0%} pruned", ratio
        self.epochs, self.epoch_steps = epochs, len(self.x) // BATCH
        self.steps = epochs * self.epoch_steps

    def costs(self):
        """Multiplications of every block: forward, and backward with it in front.

        Backward that is the gradients of its weights, of what its second layer takes,
        and of what the next block takes.
        """
        model, pixels = create(MODEL, 0), self.x[0].size
        size = lambda layer: layer.conv.kernel.size * pixels if layer else 0
        entry, second = [size(model.stem)], [0]
        for i, block in enumerate(model.blocks):
            pixels //= 4 if i in (3, 6) else 1
            entry.append(size(block.layers[0]) + size(block.shortcut))
            second.append(size(block.layers[1]))
        entry, second = np.array([*entry, model.head.kernel.size]), np.append(second, 0)
        backward = entry + 2 * second + np.append(entry[1:], 0)
        return {"forward": (entry + second).tolist(), "backward": backward.tolist()}

    def run(self, seed, schedule=lambda step: 0 * step):
        """Train from a seed; yield the network after every epoch."""
        phase, steps = beyond(self.epochs), jnp.arange(self.steps)
        plan = {
            "rate": methods.schedule(phase, self.epoch_steps),
            "ratio": ratio_ramp(self.ratio, round(phase.ramp * self.steps)),
            "frozen": schedule,
        }
        # As data, so that one compilation serves all runs.
        plan = {name: jax.vmap(value)(steps) for name, value in plan.items()}
        graph, params, stats = nnx.split(create(MODEL, seed), nnx.Param, ...)
        net, state = {"params": params, "stats": stats}, optimizer(plan).init(params)
        rng = np.random.default_rng(seed)
        for _ in range(self.epochs):
            order = rng.permutation(len(self.x))[: self.epoch_steps * BATCH]
            rows = order.reshape(self.epoch_steps, BATCH)
            net, state = train_epoch(graph, net, state, self.x, self.y, rows, plan)
            yield jax.device_get(net)

    def accuracy(self, net):
        """Percentage of the test images that are named right."""
        model = nnx.merge(nnx.graphdef(create(MODEL, 0)), net["params"], net["stats"])
        model.eval()
        return 100 * float((model(self.test_x).argmax(-1) == self.test_y).mean())


def optimizer(plan):
    """GSM by the recipe beyond the paper; everything that changes is in the plan."""
    phase = beyond(1)  # of its settings those that do not depend on the length
    tx = gsm_sgd(
        lambda step: plan["rate"][step],
        lambda step: plan["ratio"][step],
        importance=tempered_importance(phase.power),
        smoothing=phase.smoothing,
        **methods.decay(phase),
    )
    return freeze_blocks(tx, lambda step: plan["frozen"][step], BLOCKS)


@partial(jax.jit, static_argnames="graph", donate_argnames=("net", "state"))
def train_epoch(graph, net, state, x, y, rows, plan):
    """Take one step for each row of indices."""
    tx = optimizer(plan)

    def loss(params, stats, chosen):
        model = nnx.merge(graph, params, stats, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(x[chosen]), y[chosen]
        )
        return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

    def one(carry, chosen):
        net, state = carry
        gradient = jax.grad(loss, has_aux=True)
        grads, stats = gradient(net["params"], net["stats"], chosen)
        updates, state = tx.update(grads, state, net["params"])
        params = optax.apply_updates(net["params"], updates)
        return ({"params": params, "stats": stats}, state), None

    return jax.lax.scan(one, (net, state), rows)[0]


def main(argv=None):
    """Run everything for each ratio, print the tables, draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ratios", nargs="+", type=float, default=[0.9, 0.0], help="0 trains densely")
    add("--seeds", type=int, default=3, help="runs of every scheme")
    add("--epochs", type=int, default=40, help="of every run")
    add("--output", type=Path, default=Path("results/freezing_resnet"), help="folder")
    args, results = parser.parse_args(argv), {}
    args.output.mkdir(parents=True, exist_ok=True)
    for trainer in [Trainer(ratio, args.epochs) for ratio in args.ratios]:
        records = compare(trainer, args.seeds)
        results[trainer.name] = {"schemes": records}
        print_table(trainer.name, records)
        (args.output / "freezing_resnet.json").write_text(json.dumps(results, indent=1))
    figure = args.output / "freezing_resnet.png"
    draw_schemes(results).savefig(figure, dpi=90)
    print(f"\nfigure: {figure}")


if __name__ == "__main__":
    main()
