"""What freezing the front of a ResNet costs: the four schemes on ResNet-20.

    python -m examples.freezing_resnet             # three seeds; half an hour
    python -m examples.freezing_resnet --seeds 1 --ratios 0.9
    python -m examples.freezing_resnet --data fashion_mnist --ratios 0.9

As `examples.layer_freezing` does with five linear layers, but with residual blocks and
batch normalisation: trained from its initialisation, with GSM at 90 % and densely,
nothing frozen and by the four schemes of Yuan et al. (2022), each planned to save the
same training FLOPs. Prints a table for each ratio, and writes a figure and a JSON file.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.layer_freezing import compare, draw_schemes, print_table
from examples.paper import methods, training
from examples.paper.data import Arrays, load
from examples.paper.models import create
from examples.paper.recipes import beyond
from gsm_optax import gsm_sgd, ratio_ramp, tempered_importance
from gsm_optax.freezing import freeze_blocks

MODEL = "resnet20"
BLOCKS = ("stem", *(f"blocks/{i}" for i in range(9)), "head")
SETTINGS = {  # name: (training images, their side in pixels, batch, epochs)
    "digits": (1437, 8, 64, 40),
    "fashion_mnist": (10_000, 14, 128, 12),  # of 60,000, of 28 pixels
}


class Trainer:
    """Trains the network on one data set."""

    levels = ((2,) * 5 + (1,) * 6, (4,) * 3 + (2,) * 4 + (1,) * 4)  # periods, by block
    freezable = 7  # of eleven blocks: about the two thirds of the paper

    def __init__(self, name, ratio, epochs=None):
        """Read the data; by default train for as long as `SETTINGS` says."""
        images, self.side, self.batch, usual = SETTINGS[name]
        data = load(name)
        parts = data.train.read(slice(images)), data.test.read(slice(None))
        train, test = (Arrays(shrunk(x, self.side), y) for x, y in parts)
        self.data = data._replace(train=train, test=test)
        self.name, self.ratio = f"ResNet-20, {name}, {ratio:.0%} pruned", ratio
        self.epochs, self.epoch_steps = epochs or usual, images // self.batch
        self.steps = self.epochs * self.epoch_steps
        self.graph = nnx.graphdef(create(MODEL, 0))

        def take(plan, state, *batch):
            tx = optimizer(plan)
            return training.step(self.graph, self.data, 0, tx, state, *batch)[0]

        self.take = jax.jit(take, donate_argnums=1)

    def costs(self):
        """Multiplications of every block: forward, and backward with it in front.

        Backward that is the gradients of its weights, of what its second layer takes,
        and of what the next block takes.
        """
        model, side = create(MODEL, 0), self.side
        size = lambda layer: layer.conv.kernel.size * side**2 if layer else 0
        entry, second = [size(model.stem)], [0]
        for i, block in enumerate(model.blocks):
            side = -(-side // 2) if i in (3, 6) else side
            entry.append(size(block.layers[0]) + size(block.shortcut))
            second.append(size(block.layers[1]))
        entry, second = np.array([*entry, model.head.kernel.size]), np.append(second, 0)
        backward = entry + 2 * second + np.append(entry[1:], 0)
        return {"forward": (entry + second).tolist(), "backward": backward.tolist()}

    def run(self, seed, schedule=lambda step: 0 * step):
        """Train from a seed; yield parameters and statistics after every epoch."""
        phase, steps = beyond(self.epochs), jnp.arange(self.steps)
        plan = {
            "rate": methods.schedule(phase, self.epoch_steps),
            "ratio": ratio_ramp(self.ratio, round(phase.ramp * self.steps)),
            "frozen": schedule,
        }
        # As data, so that one compilation serves all runs.
        plan = {name: jax.vmap(value)(steps) for name, value in plan.items()}
        _, *network = nnx.split(create(MODEL, seed), nnx.Param, ...)
        state = training.start(*network, optimizer(plan), self.batch)
        # Not in `lax.scan`: there XLA's convolutions take eight times as long on a CPU.
        feed = training.batches(self.data.train, self.batch, seed, 0, self.steps)
        for i, batch in enumerate(feed, 1):
            state = self.take(plan, state, *batch)
            if i % self.epoch_steps == 0:
                yield jax.device_get((state.params, state.stats))

    def accuracy(self, network):
        """Percentage of the test images that are named right."""
        trainer = training.Trainer(self.graph, self.data, self.batch, seed=0)
        return trainer.accuracy(network)[0]


def shrunk(images, side):
    """Average pixels [n, height, width, 1] of uint8 to `side` pixels each way."""
    pixels = images.shape[1] // side
    blocks = images.reshape(len(images), side, pixels, side, pixels, 1)
    return blocks.mean((2, 4)).round().astype(np.uint8)


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


def main(argv=None):
    """Run everything for each ratio, print the tables, draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", nargs="+", choices=[*SETTINGS], default=["digits"], help="data sets")
    add("--ratios", nargs="+", type=float, default=[0.9, 0.0], help="0 trains densely")
    add("--seeds", type=int, default=3, help="runs of every scheme")
    add("--epochs", type=int, help="of every run, instead of the usual number")
    add("--output", type=Path, default=Path("results/freezing_resnet"), help="folder")
    args, results = parser.parse_args(argv), {}
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        trainers = [Trainer(d, r, args.epochs) for d in args.data for r in args.ratios]
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from None
    for trainer in trainers:
        records = compare(trainer, args.seeds)
        results[trainer.name] = {"schemes": records}
        print_table(trainer.name, records)
        (args.output / "freezing_resnet.json").write_text(json.dumps(results, indent=1))
    figure = args.output / "freezing_resnet.png"
    draw_schemes(results).savefig(figure, dpi=90)
    print(f"\nfigure: {figure}")


if __name__ == "__main__":
    main()
