"""The networks of the paper, in flax nnx: `create(name, seed)` makes one.

A new one is a class, or a function, of `rngs` and `dtype`, and a line in `MODELS`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

HE = nnx.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
GROWTH = 12  # channels that every layer of DenseNet-40 adds


def create(name: str, seed: int, dtype: Any = None) -> Any:
    """Initialise a network; it computes in `dtype`, its parameters are float32."""
    return MODELS[name](rngs=nnx.Rngs(seed), dtype=dtype)


class LeNet300(nnx.Module):
    """784-300-100-10, three linear layers with ReLU between them."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None, inputs: int = 784):
        """Initialise the layers."""
        self.dense1 = nnx.Linear(inputs, 300, rngs=rngs, dtype=dtype)
        self.dense2 = nnx.Linear(300, 100, rngs=rngs, dtype=dtype)
        self.head = nnx.Linear(100, 10, rngs=rngs, dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [batch, ...] of `inputs` grey values to logits [batch, 10]."""
        x = images.reshape(len(images), -1)
        return self.head(nnx.relu(self.dense2(nnx.relu(self.dense1(x)))))


class LeNet5(nnx.Module):
    """Two 5x5 convolutions of 20 and 50 filters with max pooling, 500 units."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None):
        """Initialise the layers."""
        conv = partial(
            nnx.Conv, kernel_size=(5, 5), padding="VALID", rngs=rngs, dtype=dtype
        )
        self.conv1, self.conv2 = conv(1, 20), conv(20, 50)
        self.dense = nnx.Linear(800, 500, rngs=rngs, dtype=dtype)
        self.head = nnx.Linear(500, 10, rngs=rngs, dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [batch, 28, 28, 1] to logits [batch, 10]."""
        x = max_pool(nnx.relu(self.conv1(images)))
        x = max_pool(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.dense(x.reshape(len(x), -1)))
        return self.head(x)


def max_pool(x: jax.Array) -> jax.Array:
    """Take the greatest of every 2x2 pixels: [b, h, w, c] to [b, h / 2, w / 2, c]."""
    batch, height, width, channels = x.shape
    # A reshape, because the gradient of a window reduction is slow on the CPU.
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def square(inputs: int, outputs: int, size: int, rngs: nnx.Rngs, stride=1, dtype=None):
    """Return a square convolution without bias, padded to keep the size."""
    how = {"use_bias": False, "kernel_init": HE, "rngs": rngs, "dtype": dtype}
    size, padding = (size, size), size // 2
    return nnx.Conv(inputs, outputs, size, stride, padding=padding, **how)


def batch_norm(features: int, rngs: nnx.Rngs, dtype: Any = None) -> nnx.BatchNorm:
    """Return a batch normalisation with the usual momentum and epsilon."""
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs, dtype=dtype)


class ConvNorm(nnx.Module):
    """A convolution, then batch normalisation."""

    def __init__(self, inputs, outputs, size, rngs: nnx.Rngs, stride=1, dtype=None):
        """Initialise both."""
        self.conv = square(inputs, outputs, size, rngs, stride, dtype)
        self.norm = batch_norm(outputs, rngs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, inputs] to [batch, ..., outputs]."""
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Convolutions with a shortcut around them, projected where the shape changes."""

    def __init__(self, inputs, shapes, stride: int, rngs: nnx.Rngs, dtype: Any):
        """Initialise a layer for each (outputs, size, stride) of `shapes`."""
        layers, channels = [], inputs
        for outputs, size, by in shapes:
            layers.append(ConvNorm(channels, outputs, size, rngs, by, dtype))
            channels = outputs
        self.layers, same = nnx.List(layers), stride == 1 and inputs == channels
        self.shortcut = (
            None if same else ConvNorm(inputs, channels, 1, rngs, stride, dtype)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, inputs] to [batch, ..., outputs]."""
        y = x
        for layer in self.layers[:-1]:
            y = nnx.relu(layer(y))
        y = self.layers[-1](y)
        return nnx.relu(y + (self.shortcut(x) if self.shortcut else x))


class ResNet(nnx.Module):
    """Stages of residual blocks, each with twice the channels and half the pixels.

    For CIFAR-10 the blocks are of two 3x3; for ImageNet bottlenecks of 1x1, 3x3 and
    1x1, the stride in the 3x3, after a 7x7 and pooling.
    """

    def __init__(
        self,
        rngs,
        dtype=None,
        *,
        blocks,
        width=64,
        classes=1000,
        colours=3,
        imagenet=False,
    ):
        """Initialise the layers."""
        self.imagenet = imagenet
        size, stride = (7, 2) if imagenet else (3, 1)
        self.stem = ConvNorm(colours, width, size, rngs, stride, dtype)
        layers, inputs = [], width
        for stage, count in enumerate(blocks):
            channels = width * 2**stage
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                shapes = [(channels, 3, stride), (channels, 3, 1)]
                if imagenet:
                    shapes = [(channels, 1, 1), shapes[0], (4 * channels, 1, 1)]
                layers.append(Block(inputs, shapes, stride, rngs, dtype))
                inputs = shapes[-1][0]
        self.blocks = nnx.List(layers)
        self.head = nnx.Linear(inputs, classes, rngs=rngs, dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [batch, height, width, colours] to logits [batch, classes]."""
        x = nnx.relu(self.stem(images))
        if self.imagenet:
            x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class NormConv(nnx.Module):
    """Batch normalisation and ReLU, then a convolution."""

    def __init__(self, inputs, outputs, size, rngs: nnx.Rngs, dtype: Any):
        """Initialise both."""
        self.norm = batch_norm(inputs, rngs, dtype)
        self.conv = square(inputs, outputs, size, rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, inputs] to [batch, height, width, outputs]."""
        return self.conv(nnx.relu(self.norm(x)))


class DenseNet40(nnx.Module):
    """For CIFAR-10: three blocks of twelve layers, each fed by all before it."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None, layers: int = 12):
        """Initialise the layers."""
        self.stem = square(3, 16, 3, rngs, dtype=dtype)
        blocks, transitions, channels = [], [], 16
        for block in range(3):
            if block > 0:
                transitions.append(NormConv(channels, channels, 1, rngs, dtype))
            sizes = [channels + GROWTH * i for i in range(layers)]
            layer = partial(NormConv, outputs=GROWTH, size=3, rngs=rngs, dtype=dtype)
            blocks.append(nnx.List(map(layer, sizes)))
            channels += GROWTH * layers
        self.blocks, self.transitions = nnx.List(blocks), nnx.List(transitions)
        self.norm = batch_norm(channels, rngs, dtype)
        self.head = nnx.Linear(channels, 10, rngs=rngs, dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [batch, 32, 32, 3] to logits [batch, 10]."""
        x = self.stem(images)
        for i, block in enumerate(self.blocks):
            if i > 0:
                x = nnx.avg_pool(self.transitions[i - 1](x), (2, 2), (2, 2))
            for layer in block:
                x = jnp.concatenate([x, layer(x)], -1)
        return self.head(nnx.relu(self.norm(x)).mean((1, 2)))


MODELS = {
    "mlp": partial(LeNet300, inputs=64),  # scikit-learn's digits of 8x8 pixels
    "lenet_300_100": LeNet300,
    "lenet5": LeNet5,
    "resnet8": partial(ResNet, blocks=(1, 1, 1), width=16, classes=10, colours=1),
    "resnet20": partial(ResNet, blocks=(3, 3, 3), width=8, classes=10, colours=1),
    "resnet56": partial(ResNet, blocks=(9, 9, 9), width=16, classes=10),
    "densenet40": DenseNet40,
    "resnet50": partial(ResNet, blocks=(3, 4, 6, 3), imagenet=True),
}
