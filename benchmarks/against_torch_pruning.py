"""What Torch-Pruning makes of the networks of `examples.shrink`, to compare GSM with.

    pip install torch torch-pruning scikit-learn    # JAX is not needed
    python benchmarks/against_torch_pruning.py --seeds 3     # ResNet-8, digits
    python benchmarks/against_torch_pruning.py --network lenet5 --validate

Networks, initialisation, data, batches and dense training are those of
`examples.shrink`, in PyTorch. Then the pruner and importance of Torch-Pruning's README
(arXiv:2301.12900) remove channels in small steps until a share of the FLOPs is left:
at once, or before each of the first 60 % of the epochs of fine-tuning; ranked layer by
layer, or globally. Fine-tuning has as many epochs as GSM, and the step size of the
baseline in `examples.shrink`. Prints a table, writes JSON.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from examples.paper.data import load

try:
    import torch
    import torch_pruning as tp
    from torch import nn
except ImportError as error:
    raise SystemExit(
        f"error: {error.name} is not installed: pip install torch torch-pruning"
    ) from None

RAMP = 0.6  # of the epochs of fine-tuning; GSM's ratio rises as long
STEPS = 400  # of the pruner from all channels to none
SCHEMES = tuple(product(("at once", "iteratively"), ("by layer", "globally")))


def lenet5() -> nn.Sequential:
    """Build LeNet-5."""
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """Build a convolution without bias, then batch normalisation."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        """Build the layers."""
        super().__init__()
        first = conv_norm(inputs, outputs, 3, stride)
        self.layers = nn.Sequential(first, nn.ReLU(), conv_norm(outputs, outputs, 3))
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, inputs, ...] to [batch, outputs, ...]."""
        return torch.relu(self.layers(x) + self.shortcut(x))


def resnet8() -> nn.Sequential:
    """Build ResNet-8 for grey images."""
    blocks = (Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(conv_norm(1, 16, 3), nn.ReLU(), *blocks, *head)


class Settings(NamedTuple):
    """Those of `examples.shrink`, and the share of the FLOPs that GSM leaves."""

    data: str
    keep: float
    dense: int  # epochs
    tuning: int  # epochs
    batch: int
    rate: float  # of learning; half of it for fine-tuning


NETWORKS = {
    "resnet8": (resnet8, Settings("digits", 0.10, 40, 60, batch=64, rate=0.1)),
    "lenet5": (lenet5, Settings("fashion_mnist", 0.46, 8, 10, batch=128, rate=0.05)),
}


def create(name: str, seed: int) -> nn.Sequential:
    """Initialise a network as `examples.paper.models` does."""
    torch.manual_seed(seed)
    model = NETWORKS[name][0]()
    for key, x in model.named_parameters():
        if x.ndim > 1:
            normed = name == "resnet8" and x.ndim == 4
            variance = 2 / x[:, 0].numel() if normed else 1 / x[0].numel()
            std = (
                math.sqrt(variance) / 0.87962566
            )  # that of numbers cut off at 2 is less
            nn.init.trunc_normal_(x, 0, std, -2 * std, 2 * std)
        elif key.endswith("bias"):
            nn.init.zeros_(x)
    return model


def tensors(arrays, mean: float, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normalised images [n, 1, height, width], and labels [n]."""
    images = torch.from_numpy((np.float32(arrays.images) / 255 - mean) / std)
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor(arrays.labels).long()


def train(model, data, epochs, rate, batch, seed, prune=lambda epoch: False) -> None:
    """Train; `prune(epoch)` may change the network first, and says whether it has."""
    (images, labels), step = data, 0
    steps = epochs * (len(labels) // batch)
    for epoch in range(epochs):
        if prune(epoch) or epoch == 0:  # the pruner makes new parameters
            decay = lambda x: {"params": x, "weight_decay": 5e-4 * (x.ndim > 1)}
            optimizer = torch.optim.SGD(map(decay, model.parameters()), momentum=0.9)
        model.train()
        order = np.random.default_rng((seed, epoch)).permutation(len(labels))
        for rows in order[: len(order) // batch * batch].reshape(-1, batch):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            step += 1


@torch.no_grad()
def accuracy(model: nn.Module, data) -> float:
    """Percentage of the images whose greatest logit is the label's."""
    model.eval()
    batches = zip(*(x.split(1000) for x in data), strict=True)
    hits = sum(int((model(x).argmax(1) == labels).sum()) for x, labels in batches)
    return 100 * hits / len(data[1])


def measure(model: nn.Module, data) -> dict[str, float]:
    """Accuracy in %, multiply-adds of an image, and parameters."""
    flops, parameters = tp.utils.count_ops_and_params(model, data[0][:1])
    return dict(accuracy=accuracy(model, data), flops=flops, parameters=parameters)


def compress(dense, train_set, test_set, settings, seed, when, scope):
    """Prune a copy of the dense network and fine-tune it; return what came of it."""
    model, image, pruned = copy.deepcopy(dense).eval(), train_set[0][:1], {}
    pruner = tp.pruner.BasePruner(
        model,
        image,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=scope == "globally",
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[model[-1]],
    )
    flops = lambda: tp.utils.count_ops_and_params(model, image)[0]
    whole, last = flops(), 1 if when == "at once" else round(RAMP * settings.tuning)

    def prune(epoch: int) -> bool:
        if epoch >= last:
            return False
        while flops() > whole * (1 - (1 - settings.keep) * (epoch + 1) / last):
            if pruner.current_step == STEPS:
                raise SystemExit(f"error: --keep {settings.keep} is out of reach")
            pruner.step()
        pruned["pruned"] = accuracy(model, test_set)
        return True

    rest = (settings.rate / 2, settings.batch, seed + 1000, prune)
    train(model, train_set, settings.tuning, *rest)
    kernels = [x for x in model.parameters() if x.ndim > 1]
    return measure(model, test_set) | pruned | {"widths": [len(x) for x in kernels]}


def run(name: str, train_set, test_set, settings: Settings, seed: int):
    """Train one network densely, prune it by all schemes; return their rows."""
    model = create(name, seed)
    train(model, train_set, settings.dense, settings.rate, settings.batch, seed)
    rows = {"dense": measure(model, test_set)}
    say = lambda key: print(f"{name}, seed {seed}, {key}: {rows[key]}", flush=True)
    say("dense")
    for scheme in SCHEMES:
        key = ", ".join(scheme)
        rows[key] = compress(model, train_set, test_set, settings, seed, *scheme)
        say(key)
    return rows


def show(runs) -> None:
    """Print means and standard deviations over the seeds; costs in % of the dense."""
    whole = runs[0]["dense"]
    print(f"\ndense: {whole['parameters']:,} parameters, {whole['flops']:,.0f} FLOPs")
    head = ("pruned", "accuracy", "parameters", "flops")
    print(f"{'':24}" + "".join(f"{word:>16}" for word in head))
    for key in runs[0]:
        cells = ""
        for word in head:
            unit = whole[word] / 100 if word in head[2:] else 1
            values = [row[key][word] / unit for row in runs if word in row[key]]
            spread = f" ± {statistics.stdev(values):.2f}" if values[1:] else ""
            cell = f"{statistics.mean(values):.2f}{spread}" if values else ""
            cells += f"{cell:>16}"
        print(f"{key:24}{cells}")


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="resnet8")
    add("--data-folder", help="where idx files lie, if not in the usual places")
    add("--seeds", type=int, default=1, help="number of independent runs")
    add("--validate", action="store_true", help="test on a sixth of the training set")
    add("--epochs", type=int, help="of fine-tuning; by default those of GSM")
    add("--dense-epochs", type=int, help="of dense training")
    add("--keep", type=float, help="share of the FLOPs; by default that of GSM")
    add("--output", type=Path, default=Path("results"), help="folder for the record")
    args = parser.parse_args(argv)
    if args.keep is not None and not 0 < args.keep < 1:
        parser.error(f"--keep {args.keep} is no share of the FLOPs between 0 and 1")
    return args


def main(argv=None) -> None:
    """Run all seeds, print the table, write the record."""
    args = parse_args(argv)
    # With oneDNN torch 2.13 corrupts the heap where layers have but few channels.
    torch.backends.mkldnn.enabled = False
    given = {"keep": args.keep, "dense": args.dense_epochs, "tuning": args.epochs}
    given = {key: value for key, value in given.items() if value is not None}
    settings = NETWORKS[args.network][1]._replace(**given)
    try:
        data = load(settings.data, args.data_folder, args.validate)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from None
    sets = [tensors(x, data.mean[0], data.std[0]) for x in (data.train, data.test)]
    runs = [run(args.network, *sets, settings, seed) for seed in range(args.seeds)]
    show(runs)
    record = {x: metadata.version(x) for x in ("torch", "torch-pruning", "numpy")}
    record |= settings._asdict() | {"validate": args.validate, "seeds": runs}
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"torch_pruning-{args.network}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
