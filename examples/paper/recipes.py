"""One recipe a row of the paper's tables, and of ours: `RECIPES[name]`.

A recipe is data: what is trained on what, for how long, with which settings. Recipes
named after MNIST, CIFAR-10 and ImageNet are the paper's own; the settings that neither
the paper nor its authors' code tells are marked. Those named after the digits and
Fashion-MNIST are ours, with as many epochs as two CPU cores bear.

A new row is a `replace` of another one in `ROWS`. A new setting is a field, here and in
`methods.py`; with None as its default nothing that was run before has to run again.
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


def at(recipe: Recipe, compression: float, paper: str = "") -> Recipe:
    """The same recipe at another compression, where the paper has another figure."""
    name = f"{recipe.name.rsplit('-', 1)[0]}-{compression:g}x"
    return replace(recipe, name=name, compression=compression, paper=paper)


def tickets(recipe: Recipe, paper: str, gsm: Phase | None = None) -> Recipe:
    """The search for winning tickets: the paper turns Nesterov momentum on for it."""
    return replace(
        recipe,
        name=f"{recipe.name}-tickets",
        gsm=replace(gsm or recipe.gsm, nesterov=True),
        gradual=None,
        tuned=None,
        tickets=1,
        paper=paper,
    )


# Costs are of one seed on two CPU cores, accuracies before → after pruning by GSM in %
# (mean of three seeds), commands `python -m examples.paper run` and what is told.

# Digits: a minute; 97.2 → 97.2 at 20x, 96.9 at 60x: `run digits-20x digits-60x`.
DIGITS = Recipe(
    name="digits-60x",
    title="64-300-100-10, digits",
    model="mlp",
    data="digits",
    batch=64,
    compression=60,
    dense=Phase(60, 3e-2, drops=(36, 48)),
    gsm=Phase(200, 3e-2, drops=(120, 160), momentum=0.98, weight_decay=5e-3),
    gradual=Phase(200, 3e-2, drops=(120, 160), ramp=0.6),
)

# Fashion-MNIST, LeNet-300-100, 160 epochs of about a second: dense 90.1, GSM
# 89.0 → 89.0 (gradual 89.0): `run fashion-lenet300-60x`.
FASHION = Recipe(
    name="fashion-lenet300-60x",
    title="LeNet-300-100, Fashion-MNIST",
    model="lenet_300_100",
    data="fashion_mnist",
    batch=256,
    compression=60,
    dense=Phase(40, 3e-2, drops=(24, 32)),
    gsm=Phase(60, 0.1, drops=(45, 55), momentum=0.95, weight_decay=7e-4),
    gradual=Phase(60, 3e-2, drops=(36, 48), ramp=0.6),
    paper="98.19 → 98.18",
)
# As long: 88.4 → 85.3, fine-tuned 89.1 (gradual 89.2):
# `run fashion-lenet300-tuned-60x`.
FASHION_TUNED = replace(
    FASHION,
    name="fashion-lenet300-tuned-60x",
    gsm=Phase(30, 5e-2, momentum=0.95, weight_decay=2e-3, ramp=0.6),
    tuned=Phase(30, 0.1, cosine=True),
    # The step size was chosen for both, each on the validation set.
    gradual=Phase(60, 0.1, drops=(36, 48), ramp=0.6),
)
# Fashion-MNIST, LeNet-5, 16 epochs of 10 to 20 seconds: dense 90.2, GSM 87.7 → 87.7 at
# 125x, 86.6 → 86.6 at 300x: `run fashion-lenet5-125x fashion-lenet5-300x`.
FASHION_LENET5 = replace(
    FASHION,
    name="fashion-lenet5-300x",
    title="LeNet-5, Fashion-MNIST",
    model="lenet5",
    compression=300,
    dense=Phase(4, 5e-2, cosine=True),
    gsm=Phase(6, 0.1, (5,), momentum=0.95, weight_decay=5e-3, nesterov=True),
    gradual=Phase(6, 5e-2, cosine=True, ramp=0.6),
    paper="99.21 → 99.06",
)

# What goes beyond the paper: importance between magnitude and Taylor, averaged over a
# hundred steps; a strong decay for passive entries alone; a ramp of the ratio. Gradual
# pruning has its best step size too.
BEYOND = Phase(
    60,
    0.1,
    drops=(45, 55),
    momentum=0.95,
    ramp=0.6,
    passive_decay=3e-2,
    smoothing=0.99,
    power=0.5,
)
GRADUAL = Phase(60, 0.1, drops=(36, 48), ramp=0.6)
BEYOND_FASHION = replace(
    FASHION,
    name="fashion-lenet300-tempered-60x",
    title="LeNet-300-100, Fashion-MNIST, tempered",
    gsm=BEYOND,
    gradual=GRADUAL,
)
ADAM = replace(BEYOND, learning_rate=1e-3, passive_decay=1e-2, adam=True)
ADAM_FASHION = replace(
    FASHION,
    name="fashion-lenet300-adam-60x",
    title="LeNet-300-100, Fashion-MNIST, Adam",
    gsm=ADAM,
    gradual=None,
)
ADAM_DIGITS = replace(
    DIGITS,
    name="digits-adam-60x",
    title="64-300-100-10, digits, Adam",
    gsm=replace(ADAM, epochs=200, drops=(150, 184)),
    gradual=None,
)
BEYOND_DIGITS = replace(
    DIGITS,
    name="digits-tempered-60x",
    title="64-300-100-10, digits, tempered",
    gsm=replace(BEYOND, epochs=200, drops=(150, 184)),
    gradual=replace(GRADUAL, epochs=200, drops=(120, 160)),
)
# LeNet-5, 50 epochs.
BEYOND_LENET5 = replace(
    FASHION_LENET5,
    name="fashion-lenet5-tempered-300x",
    title="LeNet-5, Fashion-MNIST, tempered",
    dense=Phase(20, 5e-2, cosine=True),
    gsm=replace(BEYOND, epochs=30, drops=(22, 27)),
    gradual=replace(GRADUAL, epochs=30, drops=(18, 24)),
)
# Residual blocks with batch normalisation, 0.08 M parameters, on the digits.
BEYOND_RESNET8 = Recipe(
    name="digits-resnet8-tempered-20x",
    title="ResNet-8, digits, tempered",
    model="resnet8",
    data="digits",
    batch=64,
    compression=20,
    dense=Phase(60, 0.1, cosine=True),
    gsm=replace(BEYOND, epochs=100, drops=(75, 92)),
    gradual=replace(GRADUAL, epochs=100, drops=(60, 80)),
)

# MNIST, the paper's: 760 epochs, a quarter of an hour for LeNet-300-100, two to four
# hours for LeNet-5: `run mnist-lenet300-60x --data FOLDER_OF_IDX_FILES`.
LENET300 = replace(
    FASHION,
    name="mnist-lenet300-60x",
    title="LeNet-300-100, MNIST",
    data="mnist",
    dense=Phase(200, 3e-2, drops=(40, 80, 120, 160), warmup=5),
    gsm=Phase(280, 1e-2, drops=(160, 200, 240), warmup=5, momentum=0.99),
    gradual=Phase(280, 3e-2, drops=(160, 200, 240), warmup=5, ramp=0.5),  # ours
)
LENET5 = replace(
    LENET300,
    name="mnist-lenet5-125x",
    title="LeNet-5, MNIST",
    model="lenet5",
    compression=125,
    paper="99.21 → 99.22",
)
BEYOND_LENET300 = replace(
    BEYOND_FASHION,
    name="mnist-lenet300-tempered-60x",
    title="LeNet-300-100, MNIST, tempered",
    data="mnist",
    dense=LENET300.dense,
)
LENET5_TICKETS = Phase(240, 3e-2, drops=(160, 200), momentum=0.99)

# CIFAR-10, the paper's: 1,700 epochs, for an accelerator: `run cifar-resnet56-10x`.
RESNET56 = Recipe(
    name="cifar-resnet56-10x",
    title="ResNet-56, CIFAR-10",
    model="resnet56",
    data="cifar10",
    batch=64,
    compression=10,
    dense=Phase(500, 0.1, (100, 200, 300, 400), warmup=5, weight_decay=1e-4),
    gsm=Phase(600, 5e-3, (400, 500), warmup=5, momentum=0.98, weight_decay=1e-4),
    gradual=Phase(600, 5e-2, (400, 500), weight_decay=1e-4, ramp=0.5),  # ours
    paper="94.05 → 93.80",
)
DENSENET40 = replace(  # the paper does not tell its dense training: as ResNet-56
    RESNET56,
    name="cifar-densenet40-10x",
    title="DenseNet-40, CIFAR-10",
    model="densenet40",
    paper="93.86 → 93.90",
)
# ImageNet, the paper's: for several accelerators: `run imagenet-resnet50-5x`.
RESNET50 = Recipe(
    name="imagenet-resnet50-5x",
    title="ResNet-50, ImageNet",
    model="resnet50",
    data="imagenet",
    batch=256,
    compression=5,
    # Neither its dense training nor the epochs of GSM are told: both are ours.
    dense=Phase(90, 0.1, (30, 60, 80), warmup=5, weight_decay=1e-4),
    gsm=Phase(90, 5e-3, (60, 75), warmup=5, momentum=0.98, weight_decay=1e-4),
    paper="75.72 / 92.75 → 74.30 / 91.98",
)

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
PLAIN = replace(FASHION, name="study-plain", paper="")
CHANGED = [
    replace(PLAIN, name=f"study-{k}", gsm=replace(FASHION.gsm, **change), gradual=None)
    for k, change in STUDIES.items()
]

ROWS = [  # in the order of the tables
    at(DIGITS, 20),
    DIGITS,
    *(at(BEYOND_DIGITS, c) for c in (20, 60)),
    *(at(ADAM_DIGITS, c) for c in (20, 60)),
    FASHION,
    FASHION_TUNED,
    *(at(BEYOND_FASHION, c) for c in (20, 60, 125, 250, 500)),
    *(at(ADAM_FASHION, c) for c in (60, 250)),
    *(at(replace(FASHION, gradual=None), c) for c in (20, 125, 250, 500)),
    at(FASHION_LENET5, 125, "99.21 → 99.22"),
    FASHION_LENET5,
    at(BEYOND_LENET5, 125),
    BEYOND_LENET5,
    BEYOND_RESNET8,
    LENET300,
    at(BEYOND_LENET300, 60),
    at(BEYOND_LENET300, 250),
    LENET5,
    at(LENET5, 300, "99.21 → 99.06"),
    at(RESNET56, 6.6, "94.05 → 94.10"),
    RESNET56,
    at(DENSENET40, 6.6, "93.86 → 94.07"),
    at(DENSENET40, 8, "93.86 → 94.02"),
    DENSENET40,
    at(RESNET50, 4, "75.72 / 92.75 → 75.33 / 92.47"),
    RESNET50,
    tickets(FASHION, "97.39 → 98.22"),
    tickets(at(FASHION_LENET5, 125), "97.60 → 99.04"),
    tickets(FASHION_LENET5, "11.35 → 98.88"),
    tickets(LENET300, "97.39 → 98.22"),
    tickets(LENET5, "97.60 → 99.04", LENET5_TICKETS),
    tickets(at(LENET5, 300), "11.35 → 98.88", LENET5_TICKETS),
    PLAIN,
    *CHANGED,
    replace(FASHION_TUNED, name="study-tuned", paper=""),
]
RECIPES = {recipe.name: recipe for recipe in ROWS}
