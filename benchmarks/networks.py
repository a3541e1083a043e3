"""Forward passes for the trees of `trees`, to time whole training steps.

Parameters are float32, activations bfloat16, as networks are trained on accelerators.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax


def resnet_loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy of a bottleneck ResNet; images (batch, size, size, 3)."""
    x = jax.nn.relu(_convolve(params["stem"], images.astype(jnp.bfloat16), 2))
    window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
    x = lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME")
    for name in sorted(params):
        if name.startswith("stage"):
            first = name.endswith("block0") and not name.startswith("stage0")
            x = _bottleneck(params[name], x, 2 if first else 1)
    x = x.mean((1, 2), jnp.float32)
    return _cross_entropy(_dense(params["head"], x), labels)


def _bottleneck(block, x, stride):
    y = jax.nn.relu(_convolve(block["conv1"], x))
    y = jax.nn.relu(_convolve(block["conv2"], y, stride))
    y = _convolve(block["conv3"], y)
    if "project" in block:
        x = _convolve(block["project"], x, stride)
    return jax.nn.relu(x + y)


def _convolve(layer, x, stride=1):
    """Convolution, then normalisation by the statistics of the batch."""
    x = lax.conv_general_dilated(
        x,
        layer["kernel"].astype(x.dtype),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return _normalise(layer["norm"], x, (0, 1, 2))


def gpt_loss(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy of a decoder of GPT-2's form; tokens (batch, length)."""
    x = params["embedding"][tokens] + params["positions"][: tokens.shape[1]]
    x = x.astype(jnp.bfloat16)
    for name in sorted(params):
        if name.startswith("block"):
            x = _decode(params[name], x)
    x = _normalise(params["norm"], x, -1)
    return _cross_entropy(x @ params["embedding"].T.astype(x.dtype), targets)


def _decode(block, x, head=64):
    batch, length, width = x.shape
    heads = (batch, length, 3 * max(width // head, 1), -1)
    joined = _dense(block["attention_in"], _normalise(block["norm1"], x, -1))
    query, key, value = jnp.split(joined.reshape(heads), 3, 2)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + _dense(block["attention_out"], mixed.reshape(x.shape))
    wide = jax.nn.gelu(_dense(block["up"], _normalise(block["norm2"], x, -1)))
    return x + _dense(block["down"], wide)


def _dense(layer, x):
    return x @ layer["kernel"].astype(x.dtype) + layer["bias"].astype(x.dtype)


def _normalise(norm, x, axes):
    wide = x.astype(jnp.float32)
    mean, variance = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
    wide = (wide - mean) * lax.rsqrt(variance + 1e-5)
    return (wide * norm["scale"] + norm["bias"]).astype(x.dtype)


def _cross_entropy(logits, labels):
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
