"""Training: one phase of it at a time, on all devices, resumable at any step.

What a phase computes depends on its arguments and the seed alone: the order of the
images is a function of (seed, epoch), their augmentation of (seed, step). So a run that
was cut off goes on from its checkpoint, bit for bit.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from tqdm import tqdm

from examples.paper.data import Data
from gsm_optax import sparsity_report

SAVE_EVERY = 60.0  # seconds

Network = tuple[Any, Any]  # parameters and batch statistics


class State(NamedTuple):
    """Everything that training changes."""

    step: jax.Array  # int32, shape (): steps taken in this phase
    params: Any  # float32
    stats: Any  # statistics of batch normalisation; empty without
    opt_state: Any


@dataclass
class Trainer:
    """Trains and tests the parameters of one network on one data set, from a seed.

    A network is a pair: its parameters, and its statistics of batch normalisation.
    """

    graph: Any  # of `nnx.split`: the rest of the network
    data: Data
    batch: int
    seed: int

    @property
    def epoch(self) -> int:
        """Steps of an epoch; the images that fill no batch wait for the next."""
        return len(self.data.train) // self.batch

    def train(
        self, network: Network, tx, steps: int, label: str, folder: Path
    ) -> Network:
        """Take the steps of a phase, from its last checkpoint if there is one.

        Every phase has a folder for its checkpoints; the state after the last step has
        been saved there. Raises a `FloatingPointError` if the loss is not finite.
        """
        take = partial(step, self.graph, self.data, self.seed, tx)
        take = jax.jit(take, donate_argnums=0)
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        with ocp.CheckpointManager(folder.absolute(), options=options) as checkpoints:
            state = start(*network, tx, self.batch)
            if (last := checkpoints.latest_step()) is not None:
                target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
                target = ocp.args.StandardRestore(target)
                state = State(*checkpoints.restore(last, args=target))
            first, saved = int(state.step), time.monotonic()
            feed = batches(self.data.train, self.batch, self.seed, first, steps)
            bar = tqdm(feed, label, steps, leave=False, initial=first, disable=None)
            for done, (images, labels) in enumerate(bar, first + 1):
                # The host has read ahead; but several steps at once would starve each
                # other of threads where many CPU devices share few cores.
                jax.block_until_ready(state)
                state, loss = take(state, images, labels)
                if done == steps or time.monotonic() - saved > SAVE_EVERY:
                    bar.set_postfix_str(status := describe(done, loss, state.params))
                    checkpoints.save(done, args=ocp.args.StandardSave(state))
                    checkpoints.wait_until_finished()  # the next step overwrites it
                    saved = time.monotonic()
        if bar.disable and first < steps:  # no terminal: one line a phase
            print(f"{label}: {steps} steps, {status}", file=sys.stderr, flush=True)
        return state.params, state.stats

    def accuracy(self, network: Network, batch: int = 1000) -> list[float]:
        """Return top-1 and top-5 accuracy on the test set, in percent."""
        hits, test = np.zeros(2, int), self.data.test
        for begin in range(0, len(test), batch):
            images, labels = test.read(np.arange(begin, min(begin + batch, len(test))))
            images = normalise(jnp.asarray(images), self.data.mean, self.data.std)
            hits += np.array(count_hits(self.graph, *network, images, labels))
        return (100 * hits / len(test)).tolist()


def mesh_of(batch: int) -> jax.sharding.Mesh:
    """All devices, or as many of them as divide the batch."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if batch % n == 0)
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("data",), auto, devices=devices[:count])


def start(params: Any, stats: Any, tx, batch: int) -> State:
    """The state before the first step, on all devices."""
    state = State(jnp.int32(0), params, stats, tx.init(params))
    # A copy: training donates it, and the weights may be the start of other phases too.
    return jax.device_put(
        jax.tree.map(jnp.copy, state), NamedSharding(mesh_of(batch), P())
    )


def batches(
    images: Any, batch: int, seed: int, first: int, last: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yield images and labels of the steps after `first`, split over the devices."""
    steps, split = len(images) // batch, NamedSharding(mesh_of(batch), P("data"))
    for epoch in range(first // steps, -(-last // steps)):
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        for i in range(max(first, epoch * steps), min(last, (epoch + 1) * steps)):
            rows = order[i % steps * batch :][:batch]
            yield jax.device_put(images.read(rows, (seed << 32) + i), split)


def describe(step: int, loss: jax.Array, params: Any) -> str:
    """Name the loss of the last batch, which must be finite, and what is near zero."""
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} after {step} steps.")
    near_zero = sparsity_report(params).prunable.below(1e-4)
    return f"loss {loss:.4f}, near zero {near_zero:.2%}"


def step(graph: Any, data: Data, seed: int, tx, state: State, images, labels):
    """One optimizer step on a batch; returns the state and the mean loss."""
    if data.augmented:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        images = shift_and_mirror(images, key)
    images = normalise(images, data.mean, data.std)

    def loss_of(params):
        model = nnx.merge(graph, params, state.stats, copy=True)
        logits = model(images).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        stats = nnx.state(model, nnx.Not(nnx.Param))
        return losses.mean(), stats

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    (loss, stats), grads = gradient(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, stats, opt_state), loss


def normalise(images: jax.Array, mean: Any, std: Any) -> jax.Array:
    """Map uint8 to float32 of about zero mean and unit variance."""
    mean, std = (jnp.array(x, jnp.float32)[None, None, None] for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def shift_and_mirror(images: jax.Array, key: jax.Array) -> jax.Array:
    """Shift every image by up to four pixels each way, and mirror half of them."""
    shift_key, mirror_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 9)
    crop = lambda image, corner: lax.dynamic_slice(
        image, (corner[0], corner[1], jnp.int32(0)), images.shape[1:]
    )
    shifted = jax.vmap(crop)(padded, corners)
    mirrored = jax.random.bernoulli(mirror_key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, shifted[:, :, ::-1], shifted)


@partial(jax.jit, static_argnames="graph")
def count_hits(graph: Any, params: Any, stats: Any, images, labels):
    """How many labels are the greatest logit, and among the five greatest.

    Of tied logits the label is the last, and NaN is a miss: nothing is won by a network
    whose answers are all the same.
    """
    model = nnx.merge(graph, params, stats)
    model.eval()
    logits = model(images)
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    above = (~(logits < own)).sum(1) - 1  # the others that are not less
    return (above < 1).sum(), (above < 5).sum()
