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
        rows += measure(name, args.batch, args.steps, args.bfloat16)
        print(f"{name} done", flush=True)
    head = ["model", "optimizer", "batch", "ms a step", "q1 - q3", "compile, s", "MiB"]
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    print(markdown(head, rows, words=2))


def synthetic(size: int, classes: int, count: int, seed: int = 0) -> Data:
    """Noise with labels: as much work as the real images, and nothing to learn."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    labels = rng.integers(0, classes, count).astype(np.int32)
    arrays = Arrays(images, labels)
    return Data(arrays, arrays, *STATISTICS["cifar10"], augmented=size == 32)


def measure(name: str, batch: int | None, steps: int, bfloat16: bool):
    """Let both optimizers take turns at the same batch; return a row of each."""
    size, classes, recipe = SHAPES[name]
    batch = batch or recipe.batch
    model = create(name, 0, jnp.bfloat16 if bfloat16 else None)
    task = Task(
        nnx.graphdef(model), synthetic(size, classes, batch), batch, 0, looped=False
    )
    runs = [
        Run(task, "SGD", methods.dense(recipe.dense, 1000), model),
        Run(task, "GSM", methods.gsm(recipe.gsm, 1000, recipe.ratio), model),
    ]
    data = task.data.train.read(np.arange(batch))
    seconds = np.array([[run(*data) for run in runs] for _ in range(steps + 1)])
    milliseconds = 1000 * seconds[1:]  # the first round is warm-up
    return [
        [
            name,
            run.optimizer,
            str(batch),
            f"{median:,.0f}",
            f"{q1:,.0f} - {q3:,.0f}",
            f"{run.compile_time:.1f}",
            f"{run.memory / 2**20:,.0f}",
        ]
        for run, (q1, median, q3) in zip(
            runs, np.quantile(milliseconds, [0.25, 0.5, 0.75], axis=0).T, strict=True
        )
    ]


class Run:
    """A step compiled ahead of time, its state, and what compiling told."""

    def __init__(self, task: Task, optimizer: str, tx, model):
        """Compile for the shapes of the task's batch."""
        self.optimizer = optimizer
        _, params, stats = nnx.split(model, nnx.Param, ...)
        state = State(jnp.int32(0), params, stats, tx.init(params))
        # Copies: both runs start from one model, and donate it.
        self.state = jax.tree.map(jnp.copy, task.replicate(state))
        data = task.data.train.read(np.arange(task.batch))
        jitted = jax.jit(lambda *args: step(task, tx, *args), donate_argnums=0)
        begin = time.perf_counter()
        self.step = jitted.lower(self.state, *data).compile()
        self.compile_time = time.perf_counter() - begin
        memory = self.step.memory_analysis()
        self.memory = memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def __call__(self, *data) -> float:
        """Make one step; return its seconds."""
        begin = time.perf_counter()
        self.state, *_ = jax.block_until_ready(self.step(self.state, *data))
        return time.perf_counter() - begin
