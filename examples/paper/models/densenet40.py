"""DenseNet-40 for CIFAR-10, growth 12, no bottlenecks; 1,001,616 kernel entries."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.paper.models.layers import batch_norm, conv

GROWTH = 12  # channels that every layer adds


class DenseNet40(nnx.Module):
    """A convolution, three blocks of twelve layers, each fed by all before it."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None, layers: int = 12):
        """Initialise the layers."""
        self.stem = conv(3, 16, 3, rngs, dtype=dtype)
        blocks, transitions, channels = [], [], 16
        for block in range(3):
            if block > 0:
                transitions.append(NormConv(channels, channels, 1, rngs, dtype))
            sizes = [channels + GROWTH * i for i in range(layers)]
            blocks.append(
                nnx.List([NormConv(size, GROWTH, 3, rngs, dtype) for size in sizes])
            )
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


class NormConv(nnx.Module):
    """Batch normalisation and ReLU, then a convolution."""

    def __init__(self, inputs, outputs, size, rngs: nnx.Rngs, dtype: Any):
        """Initialise both."""
        self.norm = batch_norm(inputs, rngs, dtype)
        self.conv = conv(inputs, outputs, size, rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, inputs] to [batch, height, width, outputs]."""
        return self.conv(nnx.relu(self.norm(x)))
