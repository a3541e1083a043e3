"""ResNet-56 for CIFAR-10, with projection shortcuts; 851,504 kernel entries."""

from typing import Any

import jax
from flax import nnx

from examples.paper.models.layers import ConvNorm


class ResNet56(nnx.Module):
    """A convolution, three stages of nine blocks with 16, 32 and 64 channels."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None, blocks: int = 9):
        """Initialise the layers."""
        self.stem = ConvNorm(3, 16, 3, rngs, dtype=dtype)
        stages, inputs = [], 16
        for channels in (16, 32, 64):
            for _ in range(blocks):
                stages.append(Block(inputs, channels, rngs, dtype))
                inputs = channels
        self.blocks = nnx.List(stages)
        self.head = nnx.Linear(64, 10, rngs=rngs, dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [batch, 32, 32, 3] to logits [batch, 10]."""
        x = nnx.relu(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Block(nnx.Module):
    """Two 3x3 convolutions and a shortcut; halves the image where channels double."""

    def __init__(self, inputs: int, channels: int, rngs: nnx.Rngs, dtype: Any):
        """Initialise the layers."""
        stride = channels // inputs
        self.conv1 = ConvNorm(inputs, channels, 3, rngs, stride, dtype)
        self.conv2 = ConvNorm(channels, channels, 3, rngs, dtype=dtype)
        self.shortcut = (
            ConvNorm(inputs, channels, 1, rngs, stride, dtype) if stride > 1 else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, inputs] to [batch, ..., channels]."""
        y = self.conv2(nnx.relu(self.conv1(x)))
        return nnx.relu(y + (self.shortcut(x) if self.shortcut else x))
