"""The networks of the paper, one file each: `create(name, seed)` makes one."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from examples.paper.models.densenet40 import DenseNet40
from examples.paper.models.lenet5 import LeNet5
from examples.paper.models.lenet_300_100 import LeNet300
from examples.paper.models.mlp import MLP
from examples.paper.models.resnet50 import ResNet50
from examples.paper.models.resnet56 import ResNet56

MODELS: dict[str, Callable[..., Any]] = {
    "mlp": MLP,
    "lenet_300_100": LeNet300,
    "lenet5": LeNet5,
    "resnet56": ResNet56,
    "densenet40": DenseNet40,
    "resnet50": ResNet50,
}


def create(name: str, seed: int, dtype: Any = None) -> Any:
    """Initialise a network; it computes in `dtype`, its parameters are float32."""
    return MODELS[name](rngs=nnx.Rngs(seed), dtype=dtype)
