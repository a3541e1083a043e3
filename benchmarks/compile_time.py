"""How long a step takes to compile, as a ratio to that of `optax.adamw`.

    python benchmarks/compile_time.py              # up to 1500 kernels; some minutes
    python benchmarks/compile_time.py --quick      # tiny trees, seconds

Tracing, lowering and compiling of a step that donates parameters and state, in one
process, without the persistent cache. Only shapes are needed: nothing is allocated. The
optimizers take turns; each has compiled something before. Prints a table, and writes
`compile_time.json`.
"""

import argparse
import gc
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import trees

TREES = {
    "500 equal kernels, 256 x 256": lambda: trees.equal(500, 256, 256),
    "1500 equal kernels, 256 x 256": lambda: trees.equal(1500, 256, 256),
    "500 equal kernels, 1024 x 1024": lambda: trees.equal(500, 1024, 1024),
    "blocks of GPT-2 XL": lambda: trees.gpt2_blocks(48, 1600),
    "resnet50": trees.resnet50,
}
QUICK_TREES = {
    "20 equal kernels": lambda: trees.equal(20, 32, 32),
    "lenet300": trees.lenet300,
}
OPTIMIZERS = {
    "optax.sgd": common.sgd,
    "optax.adamw": lambda: optax.adamw(common.LEARNING_RATE),
    "gsm": common.gsm,
}
YARDSTICK = "optax.adamw"
HEAD = ["", "leaves", "", "s", "q1 - q3", "ratio", "q1 - q3", "temporary"]


def seconds(tx, params):
    """Compile one step; return the seconds it took and its temporary bytes."""
    state = jax.eval_shape(tx.init, params)
    gc.collect()
    compiled, taken = common.compile_step(tx, params, state, params)
    return taken, compiled.memory_analysis().temp_size_in_bytes


def measure(name, params, repetitions):
    """Compile the step of every optimizer in turns; return the record of one tree."""
    taken = {optimizer: [] for optimizer in OPTIMIZERS}
    temporary = {}
    for _ in range(repetitions):
        for optimizer, make in OPTIMIZERS.items():
            new, temporary[optimizer] = seconds(make(), params)
            taken[optimizer].append(new)
    unit = float(np.median(taken[YARDSTICK]))
    return {
        "tree": name,
        "entries": trees.entries(params),
        "leaves": len(jax.tree.leaves(params)),
        "optimizers": {
            optimizer: {
                "s": common.quartiles(values),
                "ratio": common.quartiles(values, unit),
                "temporary_bytes": temporary[optimizer],
            }
            for optimizer, values in taken.items()
        },
    }


def rows(record):
    """Rows of the table about one tree."""
    for optimizer, row in record["optimizers"].items():
        yield [
            record["tree"],
            str(record["leaves"]),
            optimizer,
            *common.spread(row["s"]),
            *common.spread(row["ratio"]),
            common.size(row["temporary_bytes"]),
        ]


def arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="tiny trees, once")
    args = parser.parse_args()
    if args.quick:
        args.repetitions = 1
    if args.repetitions < 1:
        parser.error(f"--repetitions {args.repetitions} must be positive")
    return args


def main():
    """Measure, print, write."""
    args = arguments()
    jax.config.update("jax_enable_compilation_cache", False)
    for make in OPTIMIZERS.values():
        seconds(make(), {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
    records = []
    for name, make in (QUICK_TREES if args.quick else TREES).items():
        records.append(measure(name, make(), args.repetitions))
        print(common.table(HEAD, rows(records[-1]), words=1), flush=True)
    common.save_json(args.output, "compile_time", {"trees": records})


if __name__ == "__main__":
    main()
