"""Time and FLOPs of a training step against the number of frozen blocks.

    python benchmarks/freezing.py               # LeNet-5 and ResNet-56
    python benchmarks/freezing.py --quick       # smaller, three rounds: does it run?

The whole step is timed: forward, backward without the frozen front
(`stop_frozen_gradients`), and `freeze_blocks` around `gsm_sgd`; the first row is
`gsm_sgd` by itself, against which all others save. FLOPs are those of the compiled
program's cost analysis. Freezing pays off if the time falls as the FLOPs do: the aim is
to save at least 80 % of the time that the FLOPs promise.
Prints a table, writes `freezing.json` and `freezing.png`.
"""

import argparse
import sys
import time
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt

from gsm_optax.freezing import freeze_blocks, single_shot, stop_frozen_gradients

sys.path.append(str(Path(__file__).parent.parent))
from examples.paper.models import create

AIM = 0.8  # of the saved FLOPs, as time
RESNET = ["stem", *(f"blocks/{i}" for i in range(27)), "head"]
NETS = {  # blocks, image, numbers of frozen blocks
    "lenet5": (["conv1", "conv2", "dense", "head"], (28, 28, 1), (0, 1, 2, 3)),
    "resnet56": (RESNET, (32, 32, 3), (0, 5, 10, 15, 19, 24)),
}
TITLES = {"lenet5": "LeNet-5", "resnet56": "ResNet-56"}
HEAD = ["frozen", "ms", "q1 - q3", "GFLOPs", "FLOPs saved", "time saved", "of FLOPs"]


class Trainer:
    """A network in training, with so many blocks frozen: compiled, at work.

    None is a training without `freeze_blocks`.
    """

    repetitions = None

    def __init__(self, net: str, num_frozen: int | None, batch: int):
        """Compile the step, which donates all but the data."""
        self.name = "alone" if num_frozen is None else str(num_frozen)
        blocks, shape, _ = NETS[net]
        model = create(net, common.SEED)
        # Traced in the optimizer, as in a run: it is not compiled in as a constant.
        schedule = single_shot(0 if num_frozen else 10**9, 1, num_frozen or 1)
        tx = common.gsm()
        if num_frozen is not None:
            tx = freeze_blocks(tx, schedule, blocks)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, rest, images, labels):
            params = stop_frozen_gradients(params, num_frozen or 0, blocks)
            model = nnx.merge(graph, params, rest, copy=True)
            values = optax.softmax_cross_entropy_with_integer_labels(
                model(images), labels
            )
            return values.mean(), nnx.split(model, nnx.Param, ...)[2]

        def step(params, rest, state, images, labels):
            grads, rest = jax.grad(loss, has_aux=True)(params, rest, images, labels)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), rest, state

        # Copies: what a model starts from may be shared, and is donated.
        self.carry = jax.tree.map(jnp.copy, (params, rest, tx.init(params)))
        images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
        labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
        jitted = jax.jit(step, donate_argnums=(0, 1, 2))
        self.step = jitted.lower(*self.carry, images, labels).compile()
        self.flops = self.step.cost_analysis()["flops"]

    def __call__(self, data) -> float:
        """Make one step; return its seconds."""
        jax.block_until_ready(self.carry)
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.step(*self.carry, *data))
        return time.perf_counter() - start


def measure(net, batch, rounds):
    """Time all numbers of frozen blocks in turn; return one record each."""
    _, shape, numbers = NETS[net]
    trainers = [Trainer(net, number, batch) for number in (None, *numbers)]

    def data(i):
        rng = np.random.default_rng(i)
        images = rng.normal(size=(batch, *shape)).astype(np.float32)
        return jnp.asarray(images), jnp.asarray(rng.integers(10, size=batch), jnp.int32)

    seconds = common.interleave(trainers, data, rounds, net)
    whole_time, whole_flops = np.median(seconds["alone"]), trainers[0].flops
    return [
        {
            "frozen": trainer.name,
            "ms": common.quartiles(seconds[trainer.name], 1e-3),
            "gflops": trainer.flops / 1e9,
            "flops_saved": 1 - trainer.flops / whole_flops,
            "time_saved": float(1 - np.median(seconds[trainer.name]) / whole_time),
        }
        for trainer in trainers
    ]


def row_of(record):
    """Format one record as a row of the table."""
    flops, taken = record["flops_saved"], record["time_saved"]
    return [
        record["frozen"],
        *common.spread(record["ms"], 1),
        f"{record['gflops']:.3f}",
        f"{flops:.1%}",
        f"{taken:.1%}",
        f"{taken / flops:.0%}" if flops > 0 else "",
    ]


def figure_of(records):
    """Time saved against FLOPs saved, one line a net, and the aim."""
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for (net, rows), style in zip(records.items(), ("o-", "s--"), strict=False):
        points = [[100 * r["flops_saved"], 100 * r["time_saved"]] for r in rows]
        shade = "0.1" if style == "o-" else "0.5"
        axis.plot(*np.transpose(points), style, color=shade, label=TITLES[net])
    axis.axline(
        (0, 0), slope=AIM, color="0.7", linewidth=1, label="aim: time = 80 % of FLOPs"
    )
    axis.set(xlabel="FLOPs saved (%)", ylabel="time saved (%)")
    axis.legend(frameon=False)
    return figure


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batch", type=int, default=128, help="images (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=15, help="timed rounds (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="small, three rounds")
    args = parser.parse_args()
    if args.quick:
        args.nets, args.batch, args.steps = ["lenet5"], 32, 3
    if args.batch < 1 or args.steps < 1:
        parser.error("--batch and --steps must be positive")
    records = {}
    for net in args.nets:
        records[net] = measure(net, args.batch, args.steps)
        print(f"\n{net}, batch {args.batch}; of FLOPs: aim is {AIM:.0%} or more")
        print(common.table(HEAD, map(row_of, records[net])))
    common.save_json(args.output, "freezing", {"batch": args.batch, "nets": records})
    common.save_figure(args.output, "freezing", figure_of(records))


if __name__ == "__main__":
    main()
