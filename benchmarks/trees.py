"""Parameter trees of known networks, and gradients that behave as in training.

Shapes are nested dicts of `jax.ShapeDtypeStruct`; nothing is allocated before
`made_up` or `digits` is called.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Shapes = dict[str, Any]
MLP_WIDTHS = (64, 4096, 4096, 10)  # of the network that is trained on real digits
BATCH = 64  # images


class Run(NamedTuple):
    """A training run: where it starts, and what gradient every step gets."""

    params: Any
    gradients: Callable[[int, Any], Any]  # (step, params) -> grads


def _leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _dense(inputs: int, outputs: int) -> Shapes:
    return {"kernel": _leaf(inputs, outputs), "bias": _leaf(outputs)}


def _norm(width: int) -> Shapes:
    return {"scale": _leaf(width), "bias": _leaf(width)}


def mlp(*widths: int) -> Shapes:
    """Fully connected network."""
    return {f"dense{i}": _dense(*pair) for i, pair in enumerate(pairwise(widths))}


def lenet300() -> Shapes:
    """LeNet-300-100 for 28x28 images: 0.27 M entries, 6 leaves."""
    return mlp(784, 300, 100, 10)


def _convolution(size: int, inputs: int, outputs: int) -> Shapes:
    return {"kernel": _leaf(size, size, inputs, outputs), "norm": _norm(outputs)}


def _bottleneck(inputs: int, width: int, project: bool) -> Shapes:
    block = {
        "conv1": _convolution(1, inputs, width),
        "conv2": _convolution(3, width, width),
        "conv3": _convolution(1, width, 4 * width),
    }
    if project:
        block["project"] = _convolution(1, inputs, 4 * width)
    return block


def resnet50(
    blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000
) -> Shapes:
    """ResNet-50 for ImageNet: 25.56 M entries, 161 leaves, 54 of them kernels."""
    tree = {"stem": _convolution(7, 3, width)}
    inputs = width
    for stage, number in enumerate(blocks):
        for block in range(number):
            name = f"stage{stage}_block{block}"
            tree[name] = _bottleneck(inputs, width << stage, project=block == 0)
            inputs = 4 * width << stage
    return {**tree, "head": _dense(inputs, classes)}


def equal(number: int, *shape: int) -> Shapes:
    """Kernels of one shape, and nothing else."""
    return {f"kernel{i}": _leaf(*shape) for i in range(number)}


def gpt2_blocks(layers: int, width: int) -> Shapes:
    """Layers of a GPT-2: 12 leaves each, 4 of them kernels; XL has 48 of width 1600."""
    block = {
        "norm1": _norm(width),
        "attention_in": _dense(width, 3 * width),
        "attention_out": _dense(width, width),
        "norm2": _norm(width),
        "up": _dense(width, 4 * width),
        "down": _dense(4 * width, width),
    }
    return {f"block{i}": block for i in range(layers)}


def gpt2(
    layers: int = 12, width: int = 768, vocabulary: int = 50257, positions: int = 1024
) -> Shapes:
    """GPT-2 small: 124.4 M entries, 148 leaves; the head is the embedding."""
    return {
        "embedding": _leaf(vocabulary, width),
        "positions": _leaf(positions, width),
        **gpt2_blocks(layers, width),
        "norm": _norm(width),
    }


def transformer(
    layers: int = 32, width: int = 4096, hidden: int = 11008, vocabulary: int = 32000
) -> Shapes:
    """Gated decoder, layers not stacked; by default 6.74 G entries, 291 leaves."""
    block = {
        "norm1": _leaf(width),
        "query": _leaf(width, width),
        "key": _leaf(width, width),
        "value": _leaf(width, width),
        "attention_out": _leaf(width, width),
        "norm2": _leaf(width),
        "gate": _leaf(width, hidden),
        "up": _leaf(width, hidden),
        "down": _leaf(hidden, width),
    }
    return {
        "embedding": _leaf(vocabulary, width),
        **{f"block{i}": block for i in range(layers)},
        "norm": _leaf(width),
        "head": _leaf(width, vocabulary),
    }


TREES = {"lenet300": lenet300, "resnet50": resnet50, "gpt2": gpt2}


def entries(tree: Any) -> int:
    """Count the entries of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def log_scales(steps: int, seed: int) -> np.ndarray:
    """Logarithm of the gradient's scale: moves by 0.1 to 0.5 a step, within about ±2.

    That is how far the threshold of a real run moves from one step to the next.
    """
    rng = np.random.default_rng(seed)
    scales = np.zeros(steps)
    for i in range(1, steps):
        down = rng.random() < 0.5 + scales[i - 1] / 4  # the further up, the likelier
        scales[i] = scales[i - 1] + rng.uniform(0.1, 0.5) * (-1 if down else 1)
    return scales


def made_up(shapes: Shapes, dtype: Any, steps: int, seed: int) -> Run:
    """Normal parameters, and new heavy-tailed gradients at every step.

    A gradient entry is a signed square of a normal number (kurtosis 12), times a scale
    of its layer (a factor of e up or down is usual), times a scale of the step
    (`log_scales`).
    """
    leaves, treedef = jax.tree.flatten(shapes)
    layer = 1e-3 * np.exp(np.random.default_rng(seed).normal(size=len(leaves)))
    steps_scale = np.exp(log_scales(steps + 1, seed))

    def draw(purpose, i):
        rng = np.random.default_rng((seed, purpose, i))
        return rng.standard_normal(leaves[i].shape, np.float32)

    def gradient(step, i):
        normal = draw(step + 1, i)
        normal *= np.abs(normal)
        normal *= np.float32(layer[i] * steps_scale[step])
        return jnp.asarray(normal.astype(dtype))

    def param(i):
        fan_in = max(leaves[i].size // leaves[i].shape[-1], 1)
        return jnp.asarray((draw(0, i) / np.sqrt(np.float32(fan_in))).astype(dtype))

    def gradients(step, params):
        del params
        return treedef.unflatten([gradient(step, i) for i in range(len(leaves))])

    return Run(treedef.unflatten([param(i) for i in range(len(leaves))]), gradients)


def digits(widths: tuple[int, ...], dtype: Any, seed: int) -> Run:
    """Train a wide network on scikit-learn's digits: every gradient is a real one."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, dtype)
    params = made_up(mlp(*widths), dtype, 0, seed).params

    def loss(params, rows):
        logits = mlp_logits(params, images[rows]).astype(jnp.float32)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(BATCH), labels[rows]])

    gradient = jax.jit(jax.grad(loss))
    labels = jnp.asarray(labels)

    def gradients(step, params):
        rows = np.random.default_rng((seed, step)).integers(len(images), size=BATCH)
        return gradient(params, rows)

    return Run(params, gradients)


def mlp_logits(params: Any, x: jax.Array) -> jax.Array:
    """Logits of a fully connected network with ReLU."""
    layers = list(params.values())
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]
