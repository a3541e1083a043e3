"""What the convolutional networks share: convolution and batch normalisation."""

from typing import Any

import jax
from flax import nnx

HE = nnx.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


def conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs, stride=1, dtype=None):
    """Return a square convolution without bias, padded to keep the size."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=HE,
        rngs=rngs,
        dtype=dtype,
    )


def batch_norm(features: int, rngs: nnx.Rngs, dtype: Any = None) -> nnx.BatchNorm:
    """Return a batch normalisation with the usual momentum and epsilon."""
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs, dtype=dtype)


class ConvNorm(nnx.Module):
    """A convolution, then batch normalisation."""

    def __init__(self, inputs, outputs, size, rngs: nnx.Rngs, stride=1, dtype=None):
        """Initialise both."""
        self.conv = conv(inputs, outputs, size, rngs, stride, dtype)
        self.norm = batch_norm(outputs, rngs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, inputs] to [batch, ..., outputs]."""
        return self.norm(self.conv(x))
