"""Training: one phase of it at a time, on all devices, resumable at any step.

What a phase computes depends on its arguments and the seed alone: the order of the
images is a function of (seed, epoch), their augmentation of (seed, step). So a run that
was cut off goes on from its checkpoint, bit for bit.
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
CHUNK = 250  # steps at a time: an epoch of MNIST in batches of 256


class State(NamedTuple):
    """Everything that training changes."""

    step: jax.Array  # int32, shape (): steps taken in this phase
    params: Any  # float32
    stats: Any  # statistics of batch normalisation; empty without
    opt_state: Any


@dataclass(frozen=True)
class Task:
    """A network and its data; what all phases of a run share."""

    graph: Any  # of flax nnx
    data: Data
    batch: int
    seed: int
    looped: bool  # whether images are on the device, and many steps in one call

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """All devices, or as many of them as divide the batch."""
        devices = jax.devices()
        count = max(n for n in range(1, len(devices) + 1) if self.batch % n == 0)
        return jax.make_mesh(
            (count,),
            ("data",),
            (jax.sharding.AxisType.Auto,),
            devices=devices[:count],
        )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training set."""
        return len(self.data.train) // self.batch

    def replicate(self, tree: Any) -> Any:
        """Copy arrays to all devices."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def split(self, batch: Any) -> Any:
        """Split the first axis of arrays over the devices, inside jit."""
        return lax.with_sharding_constraint(batch, NamedSharding(self.mesh, P("data")))


def train(
    task: Task,
    tx: optax.GradientTransformation,
    params: Any,
    stats: Any,
    epochs: int,
    folder: Path,
    label: str,
    until: int | None = None,
) -> State:
    """Run one phase, from its last checkpoint if there is one.

    Args:
        task: network, data, batch size and seed.
        tx: the optimizer.
        params: parameters to start from.
        stats: batch statistics to start from.
        epochs: length of the phase.
        folder: for the checkpoints of this phase and no other.
        label: what the progress bar is called.
        until: step to stop at; by default the end of the phase.

    Returns:
        The state at that step, which has been saved.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    last = epochs * task.steps_per_epoch if until is None else until
    with ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=1, create=True),
    ) as checkpoints:
        state = State(jnp.int32(0), params, stats, tx.init(params))
        state = task.replicate(jax.tree.map(jnp.copy, state))  # it will be donated
        state = restore(checkpoints, state)
        saved, run = time.monotonic(), Runner(task, tx)
        with progress_bar(task, int(state.step), last, label) as bar:
            for order, first, stop in chunks(task, int(state.step), last):
                state, accuracy = run(state, order, first, stop)
                bar.update(stop - first)
                bar.set_postfix_str(describe(accuracy, state.params), refresh=False)
                if stop < last and time.monotonic() - saved > SAVE_EVERY:
                    save(checkpoints, state)
                    saved = time.monotonic()
        if checkpoints.latest_step() != last:
            save(checkpoints, state)
    return state


def restore(checkpoints: ocp.CheckpointManager, state: State) -> State:
    """Return the last checkpoint, or `state` if there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return state
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return State(*checkpoints.restore(step, args=ocp.args.StandardRestore(target)))


def save(checkpoints: ocp.CheckpointManager, state: State) -> None:
    """Save the state and wait until it is on disk: the next step overwrites it."""
    checkpoints.save(int(state.step), args=ocp.args.StandardSave(state))
    checkpoints.wait_until_finished()


def progress_bar(task: Task, first: int, last: int, label: str) -> tqdm:
    """Return a bar that counts steps and shows the time left."""
    return tqdm(
        total=last, initial=first, desc=label, unit="step", leave=False, mininterval=1
    )


def describe(accuracy: float, params: Any) -> str:
    """Name the training accuracy and the near-zero fraction."""
    near_zero = sparsity_report(params).prunable.below(1e-4)
    return f"training accuracy {accuracy:.1%}, near zero {near_zero:.2%}"


def chunks(task: Task, step: int, last: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield the order of an epoch's images, first and last step of a chunk."""
    size = CHUNK if task.looped else CHUNK // 10
    while step < last:
        epoch = step // task.steps_per_epoch
        rng = np.random.default_rng((task.seed, epoch))
        order = rng.permutation(len(task.data.train))
        end = min((epoch + 1) * task.steps_per_epoch, last)
        for first in range(step, end, size):
            yield order, first, min(first + size, end)
        step = end


class Runner:
    """Takes optimizer steps: many in one call, or one by one from the host."""

    def __init__(self, task: Task, tx: optax.GradientTransformation):
        """Put the images on the devices if steps are to be looped there."""
        self.task, self.step = task, functools.partial(step, task, tx)
        if task.looped:
            train = task.data.train
            self.arrays = task.replicate((train.images, train.labels))
        self.one = jax.jit(self.step, donate_argnums=0)
        self.many = jax.jit(self._many, donate_argnums=0)

    def __call__(self, state: State, order: np.ndarray, first: int, stop: int):
        """Take the steps first, ..., stop - 1; return state and training accuracy."""
        batch, epoch_steps = self.task.batch, self.task.steps_per_epoch
        rows = order[: epoch_steps * batch].reshape(epoch_steps, batch)
        begin = first - first % epoch_steps
        if self.task.looped:
            state, correct, loss = self.many(
                state, self.arrays, rows, first - begin, stop - begin
            )
        else:
            correct = 0
            for i in range(first, stop):
                seed = (self.task.seed << 32) + i
                images, labels = self.task.data.train.read(rows[i - begin], seed)
                # The host has read ahead; but several steps at once would starve each
                # other of threads where many CPU devices share few cores.
                jax.block_until_ready(state)
                state, right, loss = self.one(state, images, labels)
                correct += right
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after {stop} steps.")
        return state, float(correct) / (batch * (stop - first))

    def _many(self, state, arrays, rows, first, stop):
        def body(i, carry):
            state, correct, _ = carry
            images, labels = (array[rows[i]] for array in arrays)
            state, right, loss = self.step(state, images, labels)
            return state, correct + right, loss

        # Bounds that are arguments: one compilation, whatever the chunk.
        return lax.fori_loop(first, stop, body, (state, jnp.int32(0), jnp.float32(0)))


def step(task: Task, tx, state: State, images, labels):
    """One optimizer step on a batch; returns state, correct answers and mean loss."""
    images, labels = task.split((images, labels))
    if task.data.augmented:
        key = jax.random.fold_in(jax.random.key(task.seed), state.step)
        images = shift_and_mirror(images, key)
    images = normalise(images, task.data.mean, task.data.std)

    def loss_of(params):
        model = nnx.merge(task.graph, params, state.stats, copy=True)
        logits = model(images).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        stats = nnx.state(model, nnx.Not(nnx.Param))
        return losses.mean(), (stats, (logits.argmax(-1) == labels).sum())

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (stats, correct)), grads = gradient(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, stats, opt_state), correct, loss


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


def evaluate(task: Task, params: Any, stats: Any, batch: int = 1000) -> list[float]:
    """Return top-1 and top-5 accuracy on the test set, in percent."""
    hits, test = np.zeros(2, int), task.data.test
    for start in range(0, len(test), batch):
        images, labels = test.read(np.arange(start, min(start + batch, len(test))))
        images = normalise(jnp.asarray(images), task.data.mean, task.data.std)
        hits += np.array(count_hits(task.graph, params, stats, images, labels))
    return (100 * hits / len(test)).tolist()


@functools.partial(jax.jit, static_argnames="graph")
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
