"""Time and memory of the paper's training steps: GSM against momentum SGD.

    python benchmarks/training_step.py              # ResNet-56, DenseNet-40, ResNet-50
    python benchmarks/training_step.py --quick      # LeNet-5, three steps: does it run?

The whole step of `examples/paper` on synthetic images: forward, backward, optimizer,
batch statistics. Both optimizers take turns on the same batch; the first round is not
counted. Prints a table, writes `training_step.json`.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.append(str(Path(__file__).parent.parent))
from examples.paper import methods, training
from examples.paper.data import STATISTICS, Arrays, Data
from examples.paper.models import create
from examples.paper.recipes import RECIPES

MODELS = {  # title, shape of the images, classes, recipe
    "resnet56": ("ResNet-56", (32, 32, 3), 10, "cifar-resnet56-10x"),
    "densenet40": ("DenseNet-40", (32, 32, 3), 10, "cifar-resnet56-10x"),
    "resnet50": ("ResNet-50", (224, 224, 3), 1000, "imagenet-resnet50-5x"),
    "lenet5": ("LeNet-5", (28, 28, 1), 10, "mnist-lenet5-125x"),
}
HEAD = ["model", "optimizer", "batch", "ms a step", "q1 - q3", "compile s", "memory"]


class Run:
    """A training step compiled ahead of time, and its state."""

    repetitions = None

    def __init__(self, name: str, tx, model, data: Data):
        """Compile for the training set as a batch."""
        graph, params, stats = nnx.split(model, nnx.Param, ...)
        self.name = name
        self.state = training.start(params, stats, tx, len(data.train))
        step = partial(training.step, graph, data, common.SEED, tx)
        begin = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=0)
        batch = (data.train.images, data.train.labels)
        self.step = jitted.lower(self.state, *batch).compile()
        self.compile_seconds = time.perf_counter() - begin
        memory = self.step.memory_analysis()
        self.bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def __call__(self, batch) -> float:
        """Make one step; return its seconds."""
        begin = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.step(self.state, *batch))
        return time.perf_counter() - begin


def synthetic(shape: tuple[int, ...], classes: int, count: int) -> Data:
    """Noise with labels: as much work as the real images, and nothing to learn."""
    rng = np.random.default_rng(common.SEED)
    images = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
    arrays = Arrays(images, rng.integers(0, classes, count).astype(np.int32))
    statistics = STATISTICS["mnist" if shape[-1] == 1 else "cifar10"]
    return Data(arrays, arrays, *statistics, augmented=shape == (32, 32, 3))


def measure(model: str, batch: int | None, steps: int, bfloat16: bool):
    """Let both optimizers take turns; return one record each."""
    title, shape, classes, name = MODELS[model]
    recipe = RECIPES[name]
    batch = batch or recipe.batch
    network = create(model, common.SEED, jnp.bfloat16 if bfloat16 else None)
    data = synthetic(shape, classes, batch)
    runs = [
        Run("SGD", methods.dense(recipe.dense, 1000), network, data),
        Run("GSM", methods.gsm(recipe.gsm, 1000, recipe.ratio), network, data),
    ]
    same = lambda i: (data.train.images, data.train.labels)
    seconds = common.interleave(runs, same, steps, title)
    return [
        {
            "model": title,
            "optimizer": run.name,
            "batch": batch,
            "ms": common.quartiles(seconds[run.name], 1e-3),
            "compile_seconds": run.compile_seconds,
            "bytes": run.bytes,
        }
        for run in runs
    ]


def row(record) -> list[str]:
    """Cells of a record."""
    first = [record["model"], record["optimizer"], str(record["batch"])]
    last = [f"{record['compile_seconds']:.1f}", common.size(record["bytes"])]
    return [*first, *common.spread(record["ms"], 0), *last]


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    deep = ["resnet56", "densenet40", "resnet50"]
    add("--models", nargs="+", choices=[*MODELS], default=deep, help="networks")
    add("--batch", type=int, help="by default that of the recipe: 64, or 256")
    add("--steps", type=int, default=5, help="steps that are timed")
    add("--bfloat16", action="store_true", help="compute in bfloat16")
    add("--quick", action="store_true", help="only LeNet-5, batch 8, three steps")
    add("--output", type=Path, default=Path("results"), help="folder for the record")
    args = parser.parse_args(argv)
    if args.quick:
        args.models, args.batch, args.steps = ["lenet5"], 8, 3
    return args


def main(argv=None) -> None:
    """Measure, print the table, write the record."""
    args, records = parse_args(argv), []
    for model in args.models:
        records += measure(model, args.batch, args.steps, args.bfloat16)
    print(common.table(HEAD, map(row, records), words=2))
    common.save_json(args.output, "training_step", {"records": records})


if __name__ == "__main__":
    main()
