"""Time and memory of a training step on synthetic images: GSM against momentum SGD."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.paper import methods
from examples.paper.data import STATISTICS, Arrays, Data
from examples.paper.models import create
from examples.paper.recipes import RESNET50, RESNET56
from examples.paper.tables import markdown
from examples.paper.training import State, Task, step

SHAPES = {  # image size, classes, recipe
    "resnet56": (32, 10, RESNET56),
    "densenet40": (32, 10, RESNET56),
    "resnet50": (224, 1000, RESNET50),
}


def main(args) -> None:
    """Print a table of all models and both optimizers."""
    rows = []
    for name in args.models:
        for optimizer in ("SGD", "GSM"):
            row = measure(name, optimizer, args.batch, args.steps, args.bfloat16)
            rows.append([name, optimizer, *row])
            print(f"{name}, {optimizer}: {row[1]} ms", flush=True)
    head = ["model", "optimizer", "batch", "ms a step", "compile, s", "memory, MiB"]
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    print(markdown(head, rows))


def synthetic(size: int, classes: int, count: int, seed: int = 0) -> Data:
    """Noise with labels: as much work as the real images, and nothing to learn."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    labels = rng.integers(0, classes, count).astype(np.int32)
    arrays = Arrays(images, labels)
    return Data(arrays, arrays, *STATISTICS["cifar10"], augmented=size == 32)


def measure(name: str, optimizer: str, batch: int | None, steps: int, bfloat16: bool):
    """Compile a step ahead of time, and take the median of some steps."""
    size, classes, recipe = SHAPES[name]
    batch = batch or recipe.batch
    model = create(name, 0, jnp.bfloat16 if bfloat16 else None)
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    task = Task(graph, synthetic(size, classes, batch), batch, 0, looped=False)
    tx = (
        methods.gsm(recipe.gsm, 1000, recipe.ratio)
        if optimizer == "GSM"
        else methods.dense(recipe.dense, 1000)
    )
    state = task.replicate(State(jnp.int32(0), params, stats, tx.init(params)))
    images, labels = task.data.train.read(np.arange(batch))
    jitted = jax.jit(lambda *args: step(task, tx, *args), donate_argnums=0)
    begin = time.perf_counter()
    compiled = jitted.lower(state, images, labels).compile()
    compile_time, seconds = time.perf_counter() - begin, []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        state, *_ = jax.block_until_ready(compiled(state, images, labels))
        seconds.append(time.perf_counter() - begin)
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    milliseconds = 1000 * np.median(seconds[1:])
    return [
        str(batch),
        f"{milliseconds:.0f}",
        f"{compile_time:.1f}",
        f"{total / 2**20:.0f}",
    ]
