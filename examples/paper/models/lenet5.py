"""LeNet-5 with 20 and 50 filters of 5x5 and 500 units; 430,500 kernel entries."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class LeNet5(nnx.Module):
    """Two convolutions with max pooling, two linear layers."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None):
        """Initialise the layers."""
        self.conv1 = PatchConv(1, 20, rngs, dtype)
        self.conv2 = PatchConv(20, 50, rngs, dtype)
        self.dense = nnx.Linear(800, 500, rngs=rngs, dtype=dtype)
        self.head = nnx.Linear(500, 10, rngs=rngs, dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [batch, 28, 28, 1] to logits [batch, 10]."""
        x = max_pool(nnx.relu(self.conv1(images)))
        x = max_pool(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.dense(x.reshape(len(x), -1)))
        return self.head(x)


class PatchConv(nnx.Conv):
    """A 5x5 convolution without padding, as a matrix product with its patches.

    XLA has no fast convolution inside a loop on the CPU: one step of LeNet-5 took
    1.9 s that way, and takes 0.06 s this way (batch 256, two cores). Outside a loop
    both take about the same.
    """

    def __init__(self, inputs: int, filters: int, rngs: nnx.Rngs, dtype: Any):
        """Initialise kernel [5, 5, inputs, filters] and bias."""
        super().__init__(
            inputs, filters, (5, 5), padding="VALID", rngs=rngs, dtype=dtype
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, inputs] to [batch, height - 4, width - 4, ...]."""
        dtype = self.dtype or x.dtype
        high, wide, _, filters = self.kernel.shape
        height, width = x.shape[1] - high + 1, x.shape[2] - wide + 1
        shifted = [
            x[:, i : i + height, j : j + width].astype(dtype)
            for i in range(high)
            for j in range(wide)
        ]
        kernel = self.kernel[...].reshape(-1, filters).astype(dtype)
        bias = self.bias[...].reshape(1, 1, 1, filters).astype(dtype)
        return jnp.concatenate(shifted, -1) @ kernel + bias


def max_pool(x: jax.Array) -> jax.Array:
    """Take the greatest of every 2x2 pixels: [b, h, w, c] to [b, h / 2, w / 2, c]."""
    batch, height, width, channels = x.shape
    # A reshape, because the gradient of a window reduction is slow on the CPU.
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
