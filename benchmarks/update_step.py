"""What a gsm step costs, as a ratio to the donated step of `optax.sgd(momentum)`.

    python benchmarks/update_step.py              # ResNet-50, bfloat16, GPT-2; minutes
    python benchmarks/update_step.py --quick      # LeNet-300-100, seconds

Contenders take turns in random order on the same gradients, which change at every step;
parameters and state are donated; the first round is not counted. Prints a table, writes
`update_step.json` and `update_step.png`.
"""

import argparse
import importlib
import time
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import networks
import numpy as np
import trees
from matplotlib import pyplot as plt

from gsm_optax import mask_by_importance
from gsm_optax.units import find_units

DEFAULT_TREES = ["resnet50", "resnet50:bfloat16", "gpt2"]
QUICK_TREES = ["lenet300", "lenet300:bfloat16"]
PEER_REPETITIONS = 3  # they take seconds each
PEER_ENTRIES = 50_000_000  # of the largest tree that the peers are given
YARDSTICK = "optax.sgd"
HEAD = ["", "ms", "q1 - q3", "ratio", "q1 - q3", "compile s", "temporary", "state"]


class Alone:
    """A peer that is no optimizer: it finds the entries to keep, and nothing else."""

    repetitions = PEER_REPETITIONS

    def __init__(self, name, prepare, call):
        """Time `call(prepare(grads))`, without the preparation."""
        self.name, self.prepare, self.call = name, prepare, call

    def __call__(self, grads):
        """Return the seconds of one call."""
        scores = self.prepare(grads)
        start = time.perf_counter()
        self.call(scores)
        return time.perf_counter() - start


def torch_peer(params):
    """`torch.topk` on the flat scores."""
    torch = importlib.import_module("torch")
    flat = jax.jit(common.flat_scores)

    def prepare(grads):
        return torch.from_numpy(np.array(flat(params, grads)))

    def call(scores):
        return torch.topk(scores, common.num_kept(len(scores)), sorted=False)

    return Alone("torch.topk, alone", prepare, call)


def jaxpruner_peer(params):
    """The global saliency pruner of jaxpruner: masks from scores."""
    jaxpruner = importlib.import_module("jaxpruner")
    pruner = jaxpruner.GlobalSaliencyPruning(use_normalization=False)
    scores = jax.jit(lambda p, g: jax.tree.map(lambda a, b: jnp.abs(a * b), p, g))
    masks = jax.jit(lambda scores: pruner.create_masks(scores, common.RATIO))
    return Alone(
        "jaxpruner, masks alone",
        lambda grads: jax.block_until_ready(scores(params, grads)),
        lambda scores: jax.block_until_ready(masks(scores)),
    )


def peers(params, grads):
    """Return the peers that can run here, and lines about the others."""
    if trees.entries(params) > PEER_ENTRIES:
        return [], [f"peers skipped: more than {PEER_ENTRIES:,} entries"]
    found, notes = [], [same_mask(params, grads)]
    for name, find in (("top_k", common.top_k), ("sort", common.full_sort)):
        tx = common.concatenating_gsm(find)
        name = f"concatenate + {name}"
        found.append(
            common.Stepper(name, tx, params, grads, repetitions=PEER_REPETITIONS)
        )
    for name, make in (("torch", torch_peer), ("jaxpruner", jaxpruner_peer)):
        try:
            peer = make(params)
            peer.call(peer.prepare(grads))
            found.append(peer)
        except Exception as error:  # whatever a peer dies of, the others are timed
            notes.append(f"{name} skipped: {type(error).__name__}: {error}")
    return found, notes


def same_mask(params, grads):
    """Compare with concatenate + top_k, bit for bit; return a line about it.

    Raises:
        RuntimeError: if a gradient differs, for then the times mean nothing.
    """

    def masked(tx):
        return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)

    ours = masked(mask_by_importance(common.RATIO))
    theirs = masked(common.concatenating_mask(common.top_k))
    if not all(jax.tree.leaves(jax.tree.map(jnp.array_equal, ours, theirs))):
        raise RuntimeError("the mask is not that of concatenate + top_k")
    active = sum(int(jnp.sum(g != 0)) for g in jax.tree.leaves(ours) if g.ndim > 1)
    return f"same mask as concatenate + top_k, {active:,} active entries"


def measure(name, run, steps):
    """Time all contenders on one run; return its record."""
    grads = run.gradients(0, run.params)
    warm = common.Stepper("gsm, warm", common.gsm(), run.params, grads)
    contenders = [
        common.Stepper(YARDSTICK, common.sgd(), run.params, grads),
        common.Stepper("decay, then sgd", common.decayed_sgd(), run.params, grads),
        warm,
        common.Stepper("gsm, cold", common.gsm(), run.params, grads, cold=True),
        common.Stepper("gsm, tempered", common.beyond_gsm(), run.params, grads),
        common.Stepper(
            "gsm, units", common.gsm(units=units_of(name, run)), run.params, grads
        ),
    ]
    found, notes = peers(run.params, grads)
    contenders += found
    seconds = common.interleave(
        contenders, lambda step: run.gradients(step, warm.params), steps, name
    )
    rows = common.timings(seconds, YARDSTICK)
    for contender in contenders:
        if isinstance(contender, common.Stepper):
            rows[contender.name] |= cost(contender, contenders[0])
    return {
        "tree": name,
        "entries": trees.entries(run.params),
        "leaves": len(jax.tree.leaves(run.params)),
        "notes": notes,
        "contenders": rows,
    }


def units_of(name, run):
    """The units of the network that a tree is the parameters of."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run.params)
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    if name.startswith("resnet50"):
        inputs = shape(jnp.float32, 2, 64, 64, 3), shape(jnp.int32, 2)
        return find_units(networks.resnet_loss, like, *inputs)
    if name.startswith("gpt2"):
        return find_units(networks.gpt_loss, like, *[shape(jnp.int32, 2, 16)] * 2)
    inputs = next(iter(run.params.values()))["kernel"].shape[0]
    return find_units(trees.mlp_logits, like, shape(jnp.float32, 2, inputs))


def cost(contender, yardstick):
    """What a compiled step needs besides time."""
    return {
        "compile_s": contender.compile_seconds,
        "temporary_bytes": contender.temporary_bytes,
        "state_bytes_besides_momentum": contender.state_bytes - yardstick.state_bytes,
    }


def make_run(name, steps):
    """Make the run that a name such as resnet50:bfloat16 stands for."""
    tree, _, dtype = name.partition(":")
    return trees.made_up(
        trees.TREES[tree](), jnp.dtype(dtype or "float32"), steps, common.SEED
    )


def show(record):
    """Print the table of one run."""
    rows = []
    for name, row in record["contenders"].items():
        costs = ["", "", ""]
        if "compile_s" in row:
            costs = [
                f"{row['compile_s']:.1f}",
                common.size(row["temporary_bytes"]),
                common.size(row["state_bytes_besides_momentum"]),
            ]
        cells = [*common.spread(row["ms"]), *common.spread(row["ratio"])]
        rows.append([name, *cells, *costs])
    title = f"{record['entries']:,} entries in {record['leaves']} leaves"
    print(f"\n{record['tree']}: {title}\n{common.table(HEAD, rows)}")
    print("\n".join(record["notes"]), flush=True)


def draw(records):
    """Bars of the ratios, one panel a tree, quartiles as whiskers."""
    heights = [len(record["contenders"]) for record in records]
    figure, axes = plt.subplots(
        len(records),
        figsize=(7, 0.9 * len(records) + 0.28 * sum(heights)),
        gridspec_kw={"height_ratios": heights},
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, record in zip(axes[:, 0], records, strict=True):
        draw_bars(axis, record)
    axes[-1, 0].set_xlabel("time of a step / time of an optax.sgd step")
    return figure


def draw_bars(axis, record):
    """One panel: ours dark, others light."""
    for name, row in record["contenders"].items():
        ratio = row["ratio"]
        middle = ratio["median"]
        whiskers = [[middle - ratio["q1"]], [ratio["q3"] - middle]]
        shade = "0.35" if name.startswith("gsm") else "0.8"
        axis.barh(
            name, middle, xerr=whiskers, color=shade, edgecolor="black", capsize=2
        )
        axis.text(1.15 * ratio["q3"], name, f"{middle:.3g}", va="center", fontsize=8)
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.invert_yaxis()
    axis.set_title(f"{record['tree']}, {record['entries'] / 1e6:.3g} M", fontsize=10)


def arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--trees",
        nargs="+",
        default=DEFAULT_TREES,
        metavar="NAME[:DTYPE]",
        help=f"of {', '.join(trees.TREES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=30, help="timed rounds (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--real", action="store_true", help="and train on real digits")
    parser.add_argument("--quick", action="store_true", help="tiny trees, three rounds")
    args = parser.parse_args()
    if args.quick:
        args.trees, args.steps = QUICK_TREES, 3
    unknown = [n for n in args.trees if n.partition(":")[0] not in trees.TREES]
    if unknown or args.steps < 1:
        parser.error(
            f"unknown trees {unknown}" if unknown else "--steps must be positive"
        )
    return args


def main():
    """Measure, print, write."""
    args = arguments()
    records = []
    for name in args.trees:
        records.append(measure(name, make_run(name, args.steps), args.steps))
        show(records[-1])
    if args.real:
        widths = (64, 256, 10) if args.quick else trees.MLP_WIDTHS
        run = trees.digits(widths, jnp.dtype("float32"), common.SEED)
        records.append(measure("digits, real gradients", run, args.steps))
        show(records[-1])
    common.save_json(args.output, "update_step", {"steps": args.steps, "runs": records})
    common.save_figure(args.output, "update_step", draw(records))


if __name__ == "__main__":
    main()
