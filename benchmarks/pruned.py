"""Networks for `deploy`: LeNet-300-100, trained densely, then with GSM, and pruned."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import jax
from flax import nnx
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent))
from examples.paper import methods, training
from examples.paper.data import Data, load
from examples.paper.recipes import BEYOND_DIGITS, BEYOND_FASHION, Phase, Recipe
from gsm_optax import prune

COMPRESSIONS = (60, 300)
FASHION = replace(
    BEYOND_FASHION,
    dense=replace(BEYOND_FASHION.dense, epochs=10, drops=(6, 8)),
    gsm=replace(BEYOND_FASHION.gsm, epochs=20, drops=(15, 18)),
)
QUICK = replace(
    BEYOND_DIGITS,
    dense=replace(BEYOND_DIGITS.dense, epochs=2, drops=()),
    gsm=replace(BEYOND_DIGITS.gsm, epochs=4, drops=()),
)


def choose(quick: bool) -> tuple[Recipe, Data]:
    """Return what is trained on what."""
    if quick:
        return QUICK, load("digits")
    try:
        return FASHION, load("fashion_mnist")
    except FileNotFoundError as error:
        print(f"{error}\nThe digits are taken in its place.\n")
        return BEYOND_DIGITS, load("digits")


class Trainer:
    """Trains one model on one data set, from any parameters."""

    def __init__(self, model: nnx.Module, recipe: Recipe, data: Data):
        """Begin with the model's own parameters."""
        self.graph, self.params, self.rest = nnx.split(model, nnx.Param, ...)
        self.recipe, self.data = recipe, data

    def __call__(self, label: str, phase: Phase, params: Any, method, *args) -> Any:
        """Return the parameters after a phase."""
        data, batch = self.data, self.recipe.batch
        epoch, mesh = len(data.train) // batch, training.mesh_of(batch)
        tx, steps = method(phase, epoch, *args), phase.epochs * epoch
        step = partial(training.step, self.graph, data, common.SEED, tx)
        step = jax.jit(step, donate_argnums=0)
        state = training.start(params, self.rest, tx, mesh)
        feed = training.batches(data.train, batch, common.SEED, mesh, 0, steps)
        for images, labels in tqdm(feed, label, steps, leave=False, disable=None):
            state, _ = jax.block_until_ready(step(state, images, labels))
        return state.params

    def accuracy(self, params: Any) -> float:
        """Return the accuracy on the test set in %."""
        return training.evaluate(self.graph, self.data, params, self.rest)[0]


def train(trainer: Trainer) -> dict[str, Any]:
    """Train densely, then with GSM from there for every compression, and prune."""
    recipe = trainer.recipe
    dense = trainer("dense", recipe.dense, trainer.params, methods.dense)
    networks = {"dense": dense}
    for compression in COMPRESSIONS:
        ratio, name = 1 - 1 / compression, f"{compression}x"
        params = trainer(name, recipe.gsm, dense, methods.gsm, ratio)
        networks[name] = prune(params, ratio)
    return networks
