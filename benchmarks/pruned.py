"""Networks for `deploy`: LeNet-300-100, trained densely, then with GSM, and pruned."""

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
from flax import nnx

sys.path.append(str(Path(__file__).parent.parent))
from examples.paper import methods, training
from examples.paper.data import Data, load
from examples.paper.recipes import RECIPES, Phase, Recipe
from gsm_optax import prune

COMPRESSIONS = (60, 300)
DIGITS = RECIPES["digits-tempered-60x"]
FASHION = RECIPES["fashion-lenet300-tempered-60x"]
FASHION = replace(
    FASHION,
    dense=replace(FASHION.dense, epochs=10, drops=(6, 8)),
    gsm=replace(FASHION.gsm, epochs=20, drops=(15, 18)),
)
QUICK = replace(
    DIGITS,
    dense=replace(DIGITS.dense, epochs=2, drops=()),
    gsm=replace(DIGITS.gsm, epochs=4, drops=()),
)


def choose(quick: bool) -> tuple[Recipe, Data]:
    """Return what is trained on what."""
    if quick:
        return QUICK, load("digits")
    try:
        return FASHION, load("fashion_mnist")
    except FileNotFoundError as error:
        print(f"{error}\nThe digits are taken in its place.\n")
        return DIGITS, load("digits")


class Trainer(training.Trainer):
    """Trains one model on one data set, from any parameters."""

    def __init__(self, model: nnx.Module, recipe: Recipe, data: Data):
        """Begin with the model's own parameters."""
        graph, self.params, self.rest = nnx.split(model, nnx.Param, ...)
        super().__init__(graph, data, recipe.batch, common.SEED)
        self.recipe = recipe

    def __call__(self, label: str, phase: Phase, params: Any, method, *args) -> Any:
        """Return the parameters after a phase."""
        tx, steps = method(phase, self.epoch, *args), phase.epochs * self.epoch
        with TemporaryDirectory() as folder:
            return self.train((params, self.rest), tx, steps, label, Path(folder))[0]

    def accuracy(self, params: Any) -> float:
        """Return the accuracy on the test set in %."""
        return super().accuracy((params, self.rest))[0]


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
