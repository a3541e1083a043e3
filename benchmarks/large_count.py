"""Exact counting beyond 2³¹ entries, on a real array.

    python benchmarks/large_count.py                        # 2.7 G entries, about 11 GB
    python benchmarks/large_count.py --entries 3000000      # try it

One bfloat16 leaf, whose scores have eight levels: row j of every matrix has the level
(j mod 8 + 1) / 8. So the count at every level is known without counting. At level 1 it
is 2.36 G, more than an int32 holds and not a number that a float32 has. For each level
Q is set to the count, and to one more: a selection that is off by a single entry fails.
The active entries are counted from the masked gradient, row by row, not taken from the
state.
Prints a table, writes `large_count.json`; exit status 1 if any number is wrong.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from gsm_optax import mask_by_importance

LEVELS = 8
MATRICES = 3


def shape_of(entries):
    """Three matrices with odd sides, of about so many entries together."""
    side = math.isqrt(entries // MATRICES)
    return MATRICES, side | 1, (side | 1) - 2


def counts(shape):
    """Return, for each level from the lowest, how many entries reach it."""
    matrices, rows, columns = shape
    lower = [sum(congruent(rows, i) for i in range(level)) for level in range(LEVELS)]
    return [matrices * columns * (rows - below) for below in lower]


def congruent(rows, remainder):
    """Count the j in [0, rows) with j mod LEVELS equal to `remainder`."""
    return (rows - remainder + LEVELS - 1) // LEVELS


@partial(jax.jit, static_argnums=0)
def gradient(shape):
    """Level by row, in bfloat16."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return ((row % LEVELS + 1) / LEVELS).astype(jnp.bfloat16)


@jax.jit
def active_by_row(masked):
    """Count the non-zero entries of every row, in a loop, to make no int32 copy."""
    rows = masked.reshape(-1, masked.shape[-1])
    return jax.lax.map(lambda row: jnp.sum(row != 0, dtype=jnp.int32), rows)


def select(ratio, params, shape):
    """Mask a fresh gradient, which is donated.

    Returns:
        Active entries, threshold, seconds, and bytes of temporary memory.
    """
    tx = mask_by_importance(ratio)

    @partial(jax.jit, donate_argnums=0)
    def update(grads, params):
        return tx.update(grads, tx.init(params), params)

    grads = {"kernel": gradient(shape)}
    compiled = update.lower(grads, params).compile()
    jax.block_until_ready(grads)
    start = time.perf_counter()
    masked, state = jax.block_until_ready(compiled(grads, params))
    seconds = time.perf_counter() - start
    active = int(np.asarray(active_by_row(masked["kernel"])).sum(dtype=np.int64))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return active, float(optax.tree.get(state, "threshold")), seconds, temporary


def cases(shape, levels):
    """Yield (level, Q, expected active entries): Q met exactly, and Q one more."""
    reaching = counts(shape)
    for level in levels:
        yield level, reaching[level], reaching[level]
        if level > 0:
            yield level - 1, reaching[level] + 1, reaching[level - 1]


def check(shape, levels):
    """Run all cases; return their records."""
    params = {"kernel": jnp.ones(shape, jnp.bfloat16)}
    total = math.prod(shape)
    records = []
    for level, kept, expected in tqdm(list(cases(shape, levels)), disable=None):
        ratio = (total - kept) / total  # float64: Q comes out exact
        got, threshold, seconds, temporary = select(ratio, params, shape)
        below, value = level / LEVELS, (level + 1) / LEVELS
        records.append(
            {
                "kept": kept,
                "expected": expected,
                "got": got,
                "threshold": threshold,
                "right": got == expected and below < threshold <= value,
                "seconds": seconds,
                "temporary_bytes": temporary,
            }
        )
    return records


def main():
    """Check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=int, default=2_700_000_000)
    parser.add_argument(
        "--levels", type=int, nargs="+", default=[1, 4, 7], help="0 to 7 (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    if args.entries < 1000 or not set(args.levels) <= set(range(LEVELS)):
        parser.error("--entries must be 1000 or more and --levels between 0 and 7")
    shape = shape_of(args.entries)
    total = math.prod(shape)
    print(f"{total:,} entries, {total / 2**31:.3f} x 2³¹, bfloat16{list(shape)}")
    records = check(shape, args.levels)
    head = ["Q", "expected", "got", "", "threshold", "seconds", "temporary"]
    rows = [
        [
            *(f"{record[key]:,}" for key in ("kept", "expected", "got")),
            "right" if record["right"] else "WRONG",
            f"{record['threshold']:.4g}",
            f"{record['seconds']:.2f}",
            common.size(record["temporary_bytes"]),
        ]
        for record in records
    ]
    print(common.table(head, rows, words=0))
    common.save_json(args.output, "large_count", {"shape": shape, "cases": records})
    sys.exit(not all(record["right"] for record in records))


if __name__ == "__main__":
    main()
