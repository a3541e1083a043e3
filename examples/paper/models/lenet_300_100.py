"""LeNet-300-100: 784-300-100-10, fully connected; 266,200 kernel entries."""

from typing import Any

import jax
from flax import nnx


class LeNet300(nnx.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None, inputs: int = 784):
        """Initialise the layers."""
        self.dense1 = nnx.Linear(inputs, 300, rngs=rngs, dtype=dtype)
        self.dense2 = nnx.Linear(300, 100, rngs=rngs, dtype=dtype)
        self.head = nnx.Linear(100, 10, rngs=rngs, dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [batch, ...] of 784 grey values to logits [batch, 10]."""
        x = images.reshape(len(images), -1)
        return self.head(nnx.relu(self.dense2(nnx.relu(self.dense1(x)))))
