"""ResNet-50 for ImageNet, stride in the 3x3; 25,502,912 kernel entries."""

from typing import Any

import jax
from flax import nnx

from examples.paper.models.layers import ConvNorm


class ResNet50(nnx.Module):
    """A 7x7 convolution, four stages of 3, 4, 6 and 3 bottleneck blocks."""

    def __init__(
        self, rngs: nnx.Rngs, dtype: Any = None, blocks: tuple[int, ...] = (3, 4, 6, 3)
    ):
        """Initialise the layers."""
        self.stem = ConvNorm(3, 64, 7, rngs, stride=2, dtype=dtype)
        layers, inputs = [], 64
        for stage, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(Bottleneck(inputs, 64 * 2**stage, rngs, stride, dtype))
                inputs = 256 * 2**stage
        self.blocks = nnx.List(layers)
        self.head = nnx.Linear(inputs, 1000, rngs=rngs, dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [batch, height, width, 3] to logits [batch, 1000]."""
        x = nnx.relu(self.stem(images))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, the last with four times the channels."""

    def __init__(self, inputs, channels, rngs: nnx.Rngs, stride: int, dtype: Any):
        """Initialise the layers."""
        outputs = 4 * channels
        self.conv1 = ConvNorm(inputs, channels, 1, rngs, dtype=dtype)
        self.conv2 = ConvNorm(channels, channels, 3, rngs, stride, dtype)
        self.conv3 = ConvNorm(channels, outputs, 1, rngs, dtype=dtype)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            None if same else ConvNorm(inputs, outputs, 1, rngs, stride, dtype)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, inputs] to [batch, ..., 4 * channels]."""
        y = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return nnx.relu(self.conv3(y) + (self.shortcut(x) if self.shortcut else x))
