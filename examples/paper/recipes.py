"""One recipe a row of the paper's tables, and of ours: `RECIPES[name]`.

A recipe is data: what is trained on what, for how long, with which settings. Recipes
named after MNIST, CIFAR-10 and ImageNet are the paper's own; the settings that neither
the paper nor its authors' code tells are marked. Those named after the digits and
Fashion-MNIST are ours, with as many epochs as two CPU cores bear.

A new row is a line in `ROWS`. A new setting is a field, here and in `methods.py`; with
None as its default nothing that was run before has to run again.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Phase:
    """A stretch of training: its length and the settings of its optimizer."""

    epochs: int
    learning_rate: float
    drops: tuple[int, ...] = ()  # epochs from which on it is divided by ten once more
    warmup: int = 0  # epochs in which it rises from 0
    cosine: bool = False  # whether it falls to 0 along a cosine
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    ramp: float = 0.0  # fraction of the phase in which the ratio rises from 0
    passive_decay: float | None = None  # None is the paper's, as in what follows
    smoothing: float | None = None  # of the importance
    power: float | None = None  # of the gradient in it
    adam: bool | None = None  # whether Adam follows the selection, in place of momentum


@dataclass(frozen=True)
class Recipe:
    """A network, its data, a compression, and the phases of every column."""

    name: str
    title: str
    model: str
    data: str
    batch: int
    compression: float
    dense: Phase
    gsm: Phase  # from the dense network
    gradual: Phase | None = None  # from the dense network too
    tuned: Phase | None = None  # after GSM and pruning, the zeros frozen
    tickets: int | None = None  # epoch of the early weights, if this is about tickets
    paper: str = ""  # its accuracies: dense → GSM, or tickets by magnitude → by GSM

    @property
    def ratio(self) -> float:
        """The fraction of the kernel entries that goes."""
        return 1 - 1 / self.compression


def settings(of: Recipe | Phase) -> dict[str, Any]:
    """A recipe or phase as it is read back from JSON; None is as good as not there."""
    some = lambda pairs: {key: value for key, value in pairs if value is not None}
    return json.loads(json.dumps(asdict(of, dict_factory=some)))


NETWORKS = {  # title, model, data, batch
    "digits": ("64-300-100-10, digits", "mlp", "digits", 64),
    "digits-resnet8": ("ResNet-8, digits", "resnet8", "digits", 64),
    "fashion-lenet300": (
        "LeNet-300-100, Fashion-MNIST",
        "lenet_300_100",
        "fashion_mnist",
        256,
    ),
    "fashion-lenet5": ("LeNet-5, Fashion-MNIST", "lenet5", "fashion_mnist", 256),
    "mnist-lenet300": ("LeNet-300-100, MNIST", "lenet_300_100", "mnist", 256),
    "mnist-lenet5": ("LeNet-5, MNIST", "lenet5", "mnist", 256),
    "cifar-resnet56": ("ResNet-56, CIFAR-10", "resnet56", "cifar10", 64),
    "cifar-densenet40": ("DenseNet-40, CIFAR-10", "densenet40", "cifar10", 64),
    "imagenet-resnet50": ("ResNet-50, ImageNet", "resnet50", "imagenet", 256),
}


def row(network: str, compression: float, phases, word: str = "", **more) -> Recipe:
    """The recipe of a network and its phases; a word tells them from its others."""
    name = "-".join(filter(None, (network, word.lower(), f"{compression:g}x")))
    title, *kind = NETWORKS[network]
    title = f"{title}, {word}" if word else title
    return Recipe(name, title, *kind, compression, **phases, **more)


def tickets(recipe: Recipe, paper: str, gsm: Phase | None = None) -> Recipe:
    """The search for winning tickets: the paper turns Nesterov momentum on for it."""
    gsm = gsm or replace(recipe.gsm, nesterov=True)
    recipe = replace(recipe, name=f"{recipe.name}-tickets", gsm=gsm, paper=paper)
    return replace(recipe, gradual=None, tuned=None, tickets=1)


# Costs are of one seed on two CPU cores, accuracies before → after pruning by GSM in %
# (mean of three seeds), commands `python -m examples.paper run` and what is told.

# Digits: a minute; 97.2 → 97.2 at 20x, 96.9 at 60x: `run digits-20x digits-60x`.
DIGITS = {
    "dense": Phase(60, 3e-2, drops=(36, 48)),
    "gsm": Phase(200, 3e-2, drops=(120, 160), momentum=0.98, weight_decay=5e-3),
    "gradual": Phase(200, 3e-2, drops=(120, 160), ramp=0.6),
}
# Fashion-MNIST, LeNet-300-100, 160 epochs of about a second: dense 90.1, GSM
# 89.0 → 89.0 (gradual 89.0): `run fashion-lenet300-60x`.
FASHION = {
    "dense": Phase(40, 3e-2, drops=(24, 32)),
    "gsm": Phase(60, 0.1, drops=(45, 55), momentum=0.95, weight_decay=7e-4),
    "gradual": Phase(60, 3e-2, drops=(36, 48), ramp=0.6),
}
# As long: 88.4 → 85.3, fine-tuned 89.1 (gradual 89.2):
# `run fashion-lenet300-tuned-60x`.
FASHION_TUNED = FASHION | {
    "gsm": Phase(30, 5e-2, momentum=0.95, weight_decay=2e-3, ramp=0.6),
    "tuned": Phase(30, 0.1, cosine=True),
    # The step size was chosen for both, each on the validation set.
    "gradual": Phase(60, 0.1, drops=(36, 48), ramp=0.6),
}
# Fashion-MNIST, LeNet-5, 16 epochs of 10 to 20 seconds: dense 90.2, GSM 87.7 → 87.7 at
# 125x, 86.6 → 86.6 at 300x: `run fashion-lenet5-125x fashion-lenet5-300x`.
FASHION_LENET5 = {
    "dense": Phase(4, 5e-2, cosine=True),
    "gsm": Phase(6, 0.1, (5,), momentum=0.95, weight_decay=5e-3, nesterov=True),
    "gradual": Phase(6, 5e-2, cosine=True, ramp=0.6),
}
# MNIST, the paper's: 760 epochs, a quarter of an hour for LeNet-300-100, two to four
# hours for LeNet-5: `run mnist-lenet300-60x --data FOLDER_OF_IDX_FILES`.
MNIST = {
    "dense": Phase(200, 3e-2, drops=(40, 80, 120, 160), warmup=5),
    "gsm": Phase(280, 1e-2, drops=(160, 200, 240), warmup=5, momentum=0.99),
    "gradual": Phase(280, 3e-2, drops=(160, 200, 240), warmup=5, ramp=0.5),  # ours
}
LENET5_TICKETS = Phase(240, 3e-2, (160, 200), momentum=0.99, nesterov=True)
# CIFAR-10, the paper's: 1,700 epochs, for an accelerator: `run cifar-resnet56-10x`.
CIFAR = {  # the dense training of DenseNet-40 is not told: as that of ResNet-56
    "dense": Phase(500, 0.1, (100, 200, 300, 400), warmup=5, weight_decay=1e-4),
    "gsm": Phase(600, 5e-3, (400, 500), warmup=5, momentum=0.98, weight_decay=1e-4),
    "gradual": Phase(600, 5e-2, (400, 500), weight_decay=1e-4, ramp=0.5),  # ours
}
# ImageNet, the paper's: for several accelerators: `run imagenet-resnet50-5x`.
IMAGENET = {  # neither its dense training nor the epochs of GSM are told: both are ours
    "dense": Phase(90, 0.1, (30, 60, 80), warmup=5, weight_decay=1e-4),
    "gsm": Phase(90, 5e-3, (60, 75), warmup=5, momentum=0.98, weight_decay=1e-4),
}


def beyond(epochs: int) -> Phase:
    """What goes beyond the paper.

    Importance between magnitude and Taylor, averaged over a hundred steps; a strong
    decay for passive entries alone; a ramp of the ratio.
    """
    drops = (int(0.75 * epochs), int(0.92 * epochs))
    choice = {"passive_decay": 3e-2, "smoothing": 0.99, "power": 0.5}
    return Phase(epochs, 0.1, drops, momentum=0.95, ramp=0.6, **choice)


def tempered(dense: Phase, epochs: int) -> dict[str, Phase]:
    """Beyond the paper; gradual pruning with the step size that is best for it too."""
    gradual = Phase(epochs, 0.1, (int(0.6 * epochs), int(0.8 * epochs)), ramp=0.6)
    return {"dense": dense, "gsm": beyond(epochs), "gradual": gradual}


BEYOND_DIGITS = tempered(DIGITS["dense"], 200)
BEYOND_FASHION = tempered(FASHION["dense"], 60)
BEYOND_LENET5 = tempered(Phase(20, 5e-2, cosine=True), 30)
BEYOND_MNIST = tempered(MNIST["dense"], 60)
MNIST_LENET5 = tempered(Phase(40, 5e-2, cosine=True), 60), "tempered"  # hours
# Residual blocks with batch normalisation, 0.08 M parameters.
BEYOND_RESNET8 = tempered(Phase(60, 0.1, cosine=True), 100)
ADAM = {"learning_rate": 1e-3, "passive_decay": 1e-2, "adam": True}
ADAM_DIGITS = {"dense": DIGITS["dense"], "gsm": replace(beyond(200), **ADAM)}
ADAM_FASHION = {"dense": FASHION["dense"], "gsm": replace(beyond(60), **ADAM)}
UNCOMPARED = FASHION | {"gradual": None}

# What matters: one change at a time to FASHION. `run --validate study-plain ...`, so
# that no choice is made on the test set.
STUDIES = {
    "budget-5": {"weight_decay": 3e-4},
    "budget-36": {"weight_decay": 2e-3},
    "large-steps": {"learning_rate": 0.2, "weight_decay": 3.5e-4},
    "small-steps": {"learning_rate": 3e-2, "weight_decay": 2.3e-3},
    "momentum-0.9": {"momentum": 0.9, "weight_decay": 1.4e-3},
    "momentum-0.98": {"momentum": 0.98, "weight_decay": 2.8e-4},
    "nesterov": {"nesterov": True},
    "cosine": {"cosine": True, "weight_decay": 1e-3},
    "ramp": {"ramp": 0.3},
    "ramp-budget-27": {"ramp": 0.3, "weight_decay": 1.5e-3},
}
PLAIN = row("fashion-lenet300", 60, FASHION)
TUNED = row("fashion-lenet300", 60, FASHION_TUNED)
CHANGED = [
    replace(PLAIN, name=f"study-{k}", gsm=replace(PLAIN.gsm, **change), gradual=None)
    for k, change in STUDIES.items()
]

ROWS = [  # in the order of the tables
    *(row("digits", c, DIGITS) for c in (20, 60)),
    *(row("digits", c, BEYOND_DIGITS, "tempered") for c in (20, 60)),
    *(row("digits", c, ADAM_DIGITS, "Adam") for c in (20, 60)),
    row("fashion-lenet300", 60, FASHION, paper="98.19 → 98.18"),
    replace(TUNED, name="fashion-lenet300-tuned-60x", paper="98.19 → 98.18"),
    *(
        row("fashion-lenet300", c, BEYOND_FASHION, "tempered")
        for c in (20, 60, 125, 250, 500)
    ),
    *(row("fashion-lenet300", c, ADAM_FASHION, "Adam") for c in (60, 250)),
    *(row("fashion-lenet300", c, UNCOMPARED) for c in (20, 125, 250, 500)),
    row("fashion-lenet5", 125, FASHION_LENET5, paper="99.21 → 99.22"),
    row("fashion-lenet5", 300, FASHION_LENET5, paper="99.21 → 99.06"),
    row("fashion-lenet5", 125, BEYOND_LENET5, "tempered"),
    row("fashion-lenet5", 300, BEYOND_LENET5, "tempered", paper="99.21 → 99.06"),
    row("digits-resnet8", 20, BEYOND_RESNET8, "tempered"),
    row("mnist-lenet300", 60, MNIST, paper="98.19 → 98.18"),
    *(row("mnist-lenet300", c, BEYOND_MNIST, "tempered") for c in (60, 250)),
    row("mnist-lenet5", 125, MNIST, paper="99.21 → 99.22"),
    row("mnist-lenet5", 300, MNIST, paper="99.21 → 99.06"),
    *(row("mnist-lenet5", c, *MNIST_LENET5) for c in (125, 300)),
    row("cifar-resnet56", 6.6, CIFAR, paper="94.05 → 94.10"),
    row("cifar-resnet56", 10, CIFAR, paper="94.05 → 93.80"),
    row("cifar-densenet40", 6.6, CIFAR, paper="93.86 → 94.07"),
    row("cifar-densenet40", 8, CIFAR, paper="93.86 → 94.02"),
    row("cifar-densenet40", 10, CIFAR, paper="93.86 → 93.90"),
    row("imagenet-resnet50", 4, IMAGENET, paper="75.72 / 92.75 → 75.33 / 92.47"),
    row("imagenet-resnet50", 5, IMAGENET, paper="75.72 / 92.75 → 74.30 / 91.98"),
    tickets(row("fashion-lenet300", 60, FASHION), "97.39 → 98.22"),
    tickets(row("fashion-lenet5", 125, FASHION_LENET5), "97.60 → 99.04"),
    tickets(row("fashion-lenet5", 300, FASHION_LENET5), "11.35 → 98.88"),
    tickets(row("mnist-lenet300", 60, MNIST), "97.39 → 98.22"),
    tickets(row("mnist-lenet5", 125, MNIST), "97.60 → 99.04", LENET5_TICKETS),
    tickets(row("mnist-lenet5", 300, MNIST), "11.35 → 98.88", LENET5_TICKETS),
    tickets(row("mnist-lenet5", 125, *MNIST_LENET5), "97.60 → 99.04", beyond(60)),
    tickets(row("mnist-lenet5", 300, *MNIST_LENET5), "11.35 → 98.88", beyond(60)),
    replace(PLAIN, name="study-plain"),
    *CHANGED,
    replace(TUNED, name="study-tuned"),
]
RECIPES = {recipe.name: recipe for recipe in ROWS}
