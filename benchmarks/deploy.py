"""What pruning buys: file size, and latency on a CPU, of LeNet-300-100 at 60x and 300x.

    pip install safetensors onnxruntime jax2onnx qwix    # what this alone needs
    python benchmarks/deploy.py            # Fashion-MNIST where it is found, or digits
    python benchmarks/deploy.py --quick    # digits, a few epochs: does it run?

Trains densely, then for each compression with GSM by the README's recipe, prunes by
entries and shrinks. All forms of the networks take turns in random order on the same
test images, NumPy arrays in and out; each must give the logits of the trained network
to 1e-4, or the run ends. Then the 60x network is trained on for int8 with its zeros
frozen; if one moves, the run ends. What is not installed is left out, with a line that
says so. Prints tables, writes `deploy.json`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import sparse
from pruned import COMPRESSIONS, Trainer, choose, train
from scipy.sparse import csr_array

sys.path.append(str(Path(__file__).parent.parent))
from examples.paper import methods, training
from examples.paper.models import create
from gsm_optax import apply_mask, magnitude_mask
from gsm_optax.units import find_units, shrink

BATCHES = (1, 256)
CALLS = 20  # that are timed together
TOLERANCE = 1e-4  # of logits of order 1 to 10
LAYERS = ("dense1", "dense2", "head")
EXTRAS = ("safetensors", "onnxruntime", "jax2onnx", "qwix")
MISSING = {name for name in EXTRAS if util.find_spec(name) is None}


def plain(params: Any) -> Any:
    """Return NumPy arrays {layer: {"kernel": [inputs, outputs], "bias": [outputs]}}."""
    return jax.tree.map(np.asarray, nnx.to_pure_dict(params))


def forward(params: Any, x: Any, matmul: Callable = jnp.matmul, xp: Any = jnp) -> Any:
    """Map images [batch, pixels] to logits [batch, 10], by layers of any size."""
    for name in LAYERS:
        x = matmul(x, params[name]["kernel"]) + params[name]["bias"]
        x = x if name == "head" else xp.maximum(x, 0)
    return x


def without_dead(params: Any) -> Any:
    """Remove the neurons that pruning has left without anything to do."""
    images = jax.ShapeDtypeStruct((8, len(params["dense1"]["kernel"])), jnp.float32)
    small, _ = shrink(params, find_units(forward, params, images))
    return jax.tree.map(np.asarray, small)


def kernels_of(params: Any) -> list[np.ndarray]:
    """Return the kernels in the order of the network."""
    return [params[name]["kernel"] for name in LAYERS]


def describe(params: Any) -> dict[str, Any]:
    """Return what is left of a network, and its bytes on disk by format."""
    flat = {f"{a}/{b}": x for a, layer in params.items() for b, x in layer.items()}
    kernels = kernels_of(params)
    record = {
        "weights": int(sum(map(np.count_nonzero, kernels))),
        "entries": sum(x.size for x in flat.values()),
        "widths": [len(kernel) for kernel in kernels] + [kernels[-1].shape[1]],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "orbax", params)
        np.savez_compressed(folder / "npz", **flat)
        if "safetensors" not in MISSING:
            save = import_module("safetensors.numpy").save_file
            save(flat, folder / "safetensors")
        return record | {path.stem: size_of(path) for path in folder.iterdir()}


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path, *path.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def in_jax(params: Any, matmul: Callable = jnp.matmul) -> Callable:
    """Compile for fixed parameters."""
    jitted = jax.jit(lambda x: forward(params, x, matmul))
    return lambda x: np.asarray(jitted(x))


def in_onnx(params: Any) -> Callable:
    """Export with jax2onnx, load in ONNX Runtime."""
    jax2onnx, runtime = map(import_module, ("jax2onnx", "onnxruntime"))
    pixels = len(params["dense1"]["kernel"])
    model = jax2onnx.to_onnx(lambda x: forward(params, x), [("B", pixels)])
    options = runtime.SessionOptions()
    # Its threads would go on spinning, and slow down whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    cpu = ["CPUExecutionProvider"]
    session = runtime.InferenceSession(model.SerializeToString(), options, cpu)
    (images,) = session.get_inputs()
    return lambda x: session.run(None, {images.name: x})[0]


def forms(params: Any) -> dict[str, Callable]:
    """Return every way to run a network: functions of images [batch, pixels]."""

    def sparsely(make):  # matrices [outputs, inputs]
        turned = lambda layer: {**layer, "kernel": make(layer["kernel"].T)}
        return {name: turned(layer) for name, layer in params.items()}

    found, small = {"JAX": in_jax(params)}, without_dead(params)
    onnx = MISSING.isdisjoint({"jax2onnx", "onnxruntime"})
    if onnx:
        found["ONNX Runtime"] = in_onnx(params)
    if all(map(np.all, kernels_of(params))):
        return found  # nothing was pruned
    found["JAX, shrunk"] = in_jax(small)
    if onnx:
        found["ONNX Runtime, shrunk"] = in_onnx(small)
    times = lambda x, matrix: (matrix @ x.T).T
    bcsr, csr = map(sparsely, (sparse.BCSR.fromdense, csr_array))
    found["JAX, BCSR"] = in_jax(bcsr, times)
    found["SciPy, CSR"] = lambda x: forward(csr, x, times, np)
    return found


class Contender:
    """A network at work."""

    repetitions = None

    def __init__(self, name: str, call: Callable, images: np.ndarray, wanted: Any):
        """Check the logits.

        Raises:
            RuntimeError: if they differ by more than rounding: times mean nothing then.
        """
        self.name, self.call = name, call
        self.difference = float(np.abs(call(images) - wanted).max())
        if not self.difference <= TOLERANCE:
            raise RuntimeError(f"the logits of {name} differ by {self.difference:.2g}.")

    def __call__(self, images: np.ndarray) -> float:
        """Return the seconds of a call, the mean of several after one to warm up."""
        self.call(images)
        start = time.perf_counter()
        for _ in range(CALLS):
            self.call(images)
        return (time.perf_counter() - start) / CALLS


def measure(networks: dict[str, Any], trainer: Trainer, rounds: int) -> list[Any]:
    """Check all forms of all networks, and time them in turn; return their records."""
    data, rng = trainer.data, np.random.default_rng(common.SEED)
    rows = rng.integers(len(data.test), size=(rounds + 1, max(BATCHES)))

    def images(batch, i):
        raw = jnp.asarray(data.test.read(rows[i, :batch])[0])
        x = training.normalise(raw, data.mean, data.std)
        return np.asarray(x).reshape(batch, -1)

    contenders, first = [], images(max(BATCHES), 0)
    for name, params in networks.items():
        wanted = np.asarray(nnx.merge(trainer.graph, params, trainer.rest)(first))
        for form, call in forms(plain(params)).items():
            contenders.append(Contender(f"{name}, {form}", call, first, wanted))
    records = [{"form": x.name, "difference": x.difference} for x in contenders]
    for batch in BATCHES:
        inputs, title = partial(images, batch), f"batch {batch}"
        seconds = common.interleave(contenders, inputs, rounds, title)
        for record in records:
            record[title] = common.quartiles(seconds[record["form"]], 1e-6)
    return records


def quantize(params: Any, trainer: Trainer) -> dict[str, Any]:
    """Train on for int8 with the zeros frozen, and convert.

    Raises:
        RuntimeError: if a zero has moved.
    """
    qwix, recipe, data = import_module("qwix"), trainer.recipe, trainer.data
    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    image = jnp.ones((1, *data.test.images.shape[1:]))
    model = nnx.merge(trainer.graph, params, trainer.rest)
    aware = qwix.quantize_model(model, qwix.QtProvider([rule]), image)
    tuner = Trainer(aware, recipe, data)
    mask = magnitude_mask(tuner.params, 1 - 1 / COMPRESSIONS[0])
    tuned = tuner("int8", recipe.dense, tuner.params, methods.frozen, mask)
    moved = apply_mask(tuned, jax.tree.map(jnp.logical_not, mask))
    if any(map(np.any, jax.tree.leaves(moved))):
        raise RuntimeError("pruned entries have moved while training for int8.")

    def served(params):
        nnx.update(aware, params)
        int8 = qwix.quantize_model(aware, qwix.PtqProvider([rule]), image)
        return Trainer(int8, recipe, data)

    at_once, after = served(tuner.params), served(tuned)
    leaves = list(map(np.asarray, jax.tree.leaves(after.params)))
    with tempfile.TemporaryDirectory() as folder:
        np.savez_compressed(Path(folder) / "int8", *leaves)
        size = size_of(Path(folder))
    return {
        "at once": at_once.accuracy(at_once.params),
        "trained for it": after.accuracy(after.params),
        "weights": sum(int(np.count_nonzero(x)) for x in leaves if x.dtype == np.int8),
        "npz": size,
    }


def tabulate(networks: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """Describe every network, whole and shrunk; print a table, return the records."""
    records = {}
    for name, params in networks.items():
        whole, accuracy = plain(params), {"accuracy": trainer.accuracy(params)}
        records[name] = describe(whole) | accuracy
        if name != "dense":
            records[f"{name}, shrunk"] = describe(without_dead(whole)) | accuracy
    files = [x for x in ("orbax", "npz", "safetensors") if x in records["dense"]]
    head = ["", "accuracy", "layers", "entries", "weights not 0", *files]
    rows = [
        [
            name,
            f"{record['accuracy']:.2f}",
            "-".join(map(str, record["widths"])),
            *(f"{record[x]:,}" for x in ("entries", "weights")),
            *(common.size(record[x]) for x in files),
        ]
        for name, record in records.items()
    ]
    print(common.table(head, rows), flush=True)
    return records


def main():
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="timed (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="tiny, three rounds")
    args = parser.parse_args()
    for name in sorted(MISSING):
        print(f"{name} is left out: pip install {name}")
    recipe, data = choose(args.quick)
    trainer = Trainer(create(recipe.model, common.SEED), recipe, data)
    networks = train(trainer)
    record = {"data": data.source, "left out": sorted(MISSING)}
    record["networks"] = tabulate(networks, trainer)
    record["latency"] = measure(networks, trainer, 3 if args.quick else args.rounds)
    titles = [f"batch {batch}" for batch in BATCHES]
    head = ["microseconds", *(x for title in titles for x in (title, "q1 - q3"))]
    rows = [
        [row["form"], *(x for title in titles for x in common.spread(row[title], 1))]
        for row in record["latency"]
    ]
    print(f"\n{common.table(head, rows)}")
    worst = max(row["difference"] for row in record["latency"])
    print(f"logits differ by {worst:.1e} at most from those of the trained network")
    if "qwix" not in MISSING:
        name = f"{COMPRESSIONS[0]}x"
        int8 = record["int8"] = quantize(networks[name], trainer)
        print(
            f"\n{name} in int8: accuracy {int8['at once']:.2f} at once, "
            f"{int8['trained for it']:.2f} trained for it with the zeros frozen, then "
            f"{int8['weights']:,} weights not 0, npz {common.size(int8['npz'])}"
        )
    found = [name for name in (*EXTRAS, "scipy", "flax") if name not in MISSING]
    record["versions"] = {name: metadata.version(name) for name in found}
    common.save_json(args.output, "deploy", record)


if __name__ == "__main__":
    main()
