"""Checkpoints with Orbax: kill the run at any moment, start it again, lose nothing.

    python examples/resume.py --folder results/resume       # press Ctrl-C, run it again

Prunes the digits of `prune_digits.py` with GSM and saves the network, the momentum and
the step every `--every` steps. A run that was stopped goes on from its last checkpoint
and ends with the same parameters and the same mask as one that never was, bit for bit:
the digests it prints are equal. Three things make it so: the whole optimizer state is
saved, the order of the data is a function of the step, and Orbax restores into the
structure of a fresh start, so that states come back as what they were.
"""

import argparse
import hashlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from prune_digits import (
    BATCH,
    GSM_RECIPE,
    MLP,
    accuracy,
    load_data,
    pruned,
    steps_schedule,
    train_step,
)
from tqdm import tqdm

from gsm_optax import gsm_sgd, magnitude_mask

RATIO = 0.9


def batch_of(step, images, labels):
    """Images and labels of a step: every epoch has an order of its own."""
    epoch, index = divmod(step, len(images) // BATCH)
    order = np.random.default_rng(epoch).permutation(len(images))
    rows = order[index * BATCH : (index + 1) * BATCH]
    return images[rows], labels[rows]


def train(args, data):
    """Train from the last checkpoint, or from the start; return the network."""
    model = MLP(nnx.Rngs(0))
    tx = gsm_sgd(steps_schedule(3e-2, args.steps), RATIO, **GSM_RECIPE)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=args.every
    )
    with ocp.CheckpointManager(args.folder.resolve(), options=options) as checkpoints:
        start = restore(checkpoints, model, optimizer)
        # Without a terminal there is no bar, and the result is the line to read.
        left = range(start, args.steps)
        for step in tqdm(left, initial=start, total=args.steps, disable=None):
            train_step(model, optimizer, *batch_of(step, *data))
            # Saved in the background, and only every --every steps.
            state = nnx.state((model, optimizer))
            checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
    return model


def restore(checkpoints, model, optimizer):
    """Load the last checkpoint, if there is one, in place; return the steps done."""
    step = checkpoints.latest_step()
    if step is None:
        return 0
    target = jax.eval_shape(lambda: nnx.state((model, optimizer)))
    saved = checkpoints.restore(step, args=ocp.args.StandardRestore(target))
    nnx.update((model, optimizer), saved)
    print(f"resumed after step {step}")
    return step


def digest(tree):
    """Eight hexadecimal digits that tell whether two trees are equal bit for bit."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()[:8]


def main():
    """Train, prune, and print what a run without interruption prints."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where checkpoints are")
    add("--steps", type=int, default=2000, help="of training, all in all")
    add("--every", type=int, default=100, help="steps between checkpoints")
    args = parser.parse_args()

    data, test = load_data()
    model = train(args, data)
    params = nnx.state(model, nnx.Param)
    print(f"pruned: {float(accuracy(pruned(model, RATIO), *test)):.2f} % accurate")
    print(f"parameters {digest(params)}, mask {digest(magnitude_mask(params, RATIO))}")


if __name__ == "__main__":
    main()
