"""Prune whole units while training, then shrink: a smaller, faster dense network.

    python -m examples.shrink                    # ResNet-8 on the digits, minutes
    python -m examples.shrink --data fashion_mnist --models lenet5 resnet8

For each network: trains densely, goes on with GSM by units, prunes them, removes them,
and compares the small network with the dense one: test accuracy, parameters, FLOPs
(of the compiled program), file size, and latency at batch 1 and 256. Beside it stand
the units of greatest magnitude in the dense network, at once and after as many epochs
of training. Prints a table, and writes `results/shrink.json` and `results/shrink.png`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from examples.paper.data import load
from examples.paper.models import create

matplotlib.use("Agg")


class Settings(NamedTuple):
    """How a network is trained on a data set, and how much of it goes."""

    ratio: float  # of the entries that are in units
    dense: int  # epochs
    gsm: int  # epochs, and of the baseline that is trained on
    batch: int = 64
    rate: float = 0.1


SETTINGS = {
    ("digits", "resnet8"): Settings(0.75, dense=40, gsm=60),
    ("fashion_mnist", "lenet5"): Settings(0.8, dense=12, gsm=20, batch=128, rate=0.05),
    ("fashion_mnist", "resnet8"): Settings(0.6, dense=12, gsm=20, batch=128),
}
GSM = {"momentum": 0.95, "weight_decay": 5e-4, "passive_decay": 3e-2}


class Images(NamedTuple):
    """Training and test set on the device, normalised."""

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def images_of(name: str, folder: str | None, validate: bool) -> Images:
    """Read a data set of `examples.paper.data`."""
    data = load(name, folder, validate)
    mean, std = (np.float32(x) for x in (data.mean, data.std))
    normal = lambda x: jnp.asarray((x.astype(np.float32) / 255 - mean) / std)
    return Images(
        *((normal(x.images), jnp.asarray(x.labels)) for x in (data.train, data.test))
    )


class Network(NamedTuple):
    """A module as arrays: `graph` is what does not train."""

    graph: Any
    variables: dict[str, Any]  # params, and stats of batch normalisation


def network(name: str, seed: int) -> Network:
    """Initialise a network of `examples.paper.models`."""
    graph, params, stats = nnx.split(create(name, seed), nnx.Param, ...)
    return Network(graph, {"params": params, "stats": stats})


def apply(graph: Any, variables: Any, x: jax.Array) -> jax.Array:
    """Logits, as in inference."""
    model = nnx.merge(graph, variables["params"], variables["stats"])
    model.eval()
    return model(x)


def train(net: Network, tx, data: Images, epochs: int, batch: int, seed: int, label):
    """Return the network after some epochs: a scan over the batches of each."""
    images, labels = data.train
    steps = len(labels) // batch

    def loss_of(params, stats, rows):
        model = nnx.merge(net.graph, params, stats, copy=True)
        logits = model(images[rows])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

    def step(carry, rows):
        variables, opt_state = carry
        params, stats = variables["params"], variables["stats"]
        grads, stats = jax.grad(loss_of, has_aux=True)(params, stats, rows)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return ({"params": params, "stats": stats}, opt_state), None

    epoch = jax.jit(partial(jax.lax.scan, step), donate_argnums=0)
    variables = jax.tree.map(jnp.copy, net.variables)
    carry = variables, tx.init(variables["params"])
    bar = tqdm(range(epochs), desc=label, unit="epoch", leave=False, disable=None)
    for i in bar:
        order = np.random.default_rng((seed, i)).permutation(len(labels))
        carry, _ = epoch(carry, order[: steps * batch].reshape(steps, batch))
        jax.block_until_ready(carry)
    net = net._replace(variables=carry[0])
    if bar.disable:  # no terminal: one line a phase
        print(f"{label}: {epochs} epochs, {accuracy(net, data):.2f} %", flush=True)
    return net


def accuracy(net: Network, data: Images) -> float:
    """Percentage of the test images whose greatest logit is the label's."""
    images, labels = data.test
    hits = 0
    logits = jax.jit(partial(apply, net.graph))
    for rows in np.array_split(np.arange(len(labels)), max(1, len(labels) // 1000)):
        hits += int(
            (logits(net.variables, images[rows]).argmax(-1) == labels[rows]).sum()
        )
    return 100 * hits / len(labels)
