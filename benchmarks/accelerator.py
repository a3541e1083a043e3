"""What gsm costs on one GPU or TPU: a step, its passes and launches, its share.

    python benchmarks/accelerator.py            # under eight minutes
    python benchmarks/accelerator.py --quick    # tiny: does it run? on a CPU too

Tree by tree, first the masks are compared with that of `lax.top_k`, bit for bit. Then
`optax.sgd`, `gsm` warm and cold, two forms of the selection with a fixed
number of passes, and concatenate + `lax.top_k` take turns on the same gradients; last,
whole training steps of ResNet-50 and GPT-2 small with `optax.sgd` and with `gsm`.
Prints tables, and writes `accelerator.json` after each of them, so that a run that is
cut short leaves what it has.

Launches are counted twice. In the compiled program's text: operations that run by
themselves, outside the loops and in an iteration of each. In a profile of one step, on
a GPU or TPU: what ran on the device, all iterations and copies included.
"""

import argparse
import copy
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import common
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import trees
from jax import lax

from gsm_optax import (
    _importance,
    gsm_sgd,
    kernels,
    mask_by_importance,
    taylor_importance,
)
from gsm_optax._bracket import Bracket, narrow, next_probes, offset_by, search

NAN_KEY = 0x7F800001
FAN = np.array([-16, -6, -3, -1, 1, 3, 6, 16], np.int32) * 2**20
SPREAD = np.array([-4, -1.6, -0.6, -0.15, 0.15, 0.6, 1.6, 4], np.float32)
GUESSED, EVENLY = 5, 10  # passes: what a search needs as a rule; 9¹⁰ > 2³¹ keys

ENOUGH = 300  # seconds after which no further part is begun
MANY = 1000  # leaves, from which on compiling takes so long that less is compared
ROUNDS = 20
COUNTED = 4  # steps over which passes are counted
YARDSTICK = "optax.sgd"
TREES = {
    "resnet50": trees.resnet50,
    "gpt2": trees.gpt2,
    "equal1500": partial(trees.equal, 1500, 128, 128),
}
RUNS = [(tree, dtype) for tree in TREES for dtype in ("float32", "bfloat16")]
QUICK_TREES = {
    "resnet50": partial(trees.resnet50, (1,), 4, 10),
    "gpt2": partial(trees.gpt2, 1, 16, 96, 16),
    "equal1500": partial(trees.equal, 2, 16, 16),
}
QUICK_RUNS = [("equal1500", "bfloat16")]
STEP_HEAD = ["", "ms", "q1 - q3", "ratio", "q1 - q3", "compile s", "temporary"]
STEP_HEAD += ["scored", "launches", "in loops"]  # see `show_steps`
TRAINING_HEAD = ["", "ms", "q1 - q3", "compile s", "share of the step"]


# A selection with a fixed number of passes: a loop whose end is known does not ask the
# host after every pass, as a while loop on a GPU does.


class InPassesState(NamedTuple):
    """What the next search starts from."""

    threshold: jax.Array  # float32, shape ()


def order_keys(importance, param, grad):
    """Scores as integers of the same order, as the library compares them."""
    score = importance(param.astype(jnp.float32), grad.astype(jnp.float32))
    return lax.bitcast_convert_type(score, jnp.int32)


def threshold_in_passes(keys, pairs, kept, start, passes, guess) -> jax.Array:
    """Return a key that exactly the Q greatest reach, or the Q-th greatest if it ties.

    Args:
        keys: `(param, grad) -> order keys`.
        pairs: the leaves, fewer than 2³¹ entries.
        kept: Q, a Python int.
        start: float32 scalar, the last threshold, or 0.
        passes: how many.
        guess: interpolate, from the last threshold on, and let the library's search
            finish where that was not enough. Else split evenly: ten always are enough.
    """
    total = sum(param.size for param, _ in pairs)

    def excess_at(probes):
        probes, leaves = lax.optimization_barrier((probes, pairs))
        counts = jnp.int32(0)
        for pair in leaves:
            key = keys(*pair)
            counts += jnp.stack([jnp.sum(key >= p, dtype=jnp.int32) for p in probes])
        return counts - kept

    def one_pass(_, carry):
        old, probes = carry
        new = narrow(old, probes, excess_at(probes))
        # Against itself a bracket has not shrunk, and is split evenly.
        return new, next_probes(old if guess else new, new, SPREAD)

    whole = Bracket(*map(jnp.int32, (0, NAN_KEY + 1, total - kept, -kept)))
    first = next_probes(whole, whole, SPREAD)
    if guess:
        last = lax.bitcast_convert_type(start, jnp.int32)
        first = jnp.where(last > 0, offset_by(last, FAN, whole), first)
    bracket, probes = lax.fori_loop(0, passes, one_pass, (whole, first))
    if guess:
        bracket = search(excess_at, bracket, probes, SPREAD)
    return jnp.maximum(bracket.low, 1)  # a score of zero is never active


def mask_in_passes(passes, guess, importance=taylor_importance):
    """Mask like `mask_by_importance(common.RATIO)`, by `threshold_in_passes`."""
    keys = partial(order_keys, importance)

    def init(params):
        del params
        return InPassesState(jnp.float32(0))

    def update(grads, state, params):
        leaves, treedef = jax.tree.flatten(grads)
        flags = jax.tree.leaves(kernels(params))
        pairs = list(zip(jax.tree.leaves(params), leaves, strict=True))
        pairs = lax.optimization_barrier(pairs)
        chosen = [pair for flag, pair in zip(flags, pairs, strict=True) if flag]
        kept = common.num_kept(sum(param.size for param, _ in chosen))
        key = threshold_in_passes(keys, chosen, kept, state.threshold, passes, guess)
        masked = [
            jnp.where(keys(*pair) >= key, pair[1], 0) if flag else pair[1]
            for flag, pair in zip(flags, pairs, strict=True)
        ]
        threshold = lax.bitcast_convert_type(key, jnp.float32)
        return treedef.unflatten(masked), InPassesState(threshold)

    return optax.GradientTransformation(init, update)


def gsm_in_passes(passes, guess, importance=taylor_importance):
    """Return the optimizer that `gsm_sgd` is, but selecting by `mask_in_passes`."""
    return optax.chain(
        mask_in_passes(passes, guess, importance),
        optax.add_decayed_weights(common.WEIGHT_DECAY, mask=kernels),
        optax.trace(common.MOMENTUM),
        optax.scale_by_learning_rate(common.LEARNING_RATE),
    )


def gsm(importance=taylor_importance):
    """Return the library's own, as `common.gsm`, with another importance."""
    return gsm_sgd(
        common.LEARNING_RATE,
        common.RATIO,
        momentum=common.MOMENTUM,
        weight_decay=common.WEIGHT_DECAY,
        importance=importance,
    )


def ours(params) -> dict[str, Callable]:
    """Name the optimizers to compare; each is made from an importance."""
    made: dict[str, Callable] = {"gsm, warm": gsm}
    made[f"gsm, {GUESSED} passes"] = partial(gsm_in_passes, GUESSED, True)
    if not many(params):
        made[f"gsm, {EVENLY} even passes"] = partial(gsm_in_passes, EVENLY, False)
    return made


def many(params) -> bool:
    """Whether compiling takes so long that less is compared and nothing counted."""
    return len(jax.tree.leaves(params)) >= MANY


def drawn(shapes, dtype, steps) -> trees.Run:
    """`trees.made_up`, but drawn on the device: numbers of the same kind."""
    leaves, treedef = jax.tree.flatten(shapes)
    layer = 1e-3 * np.exp(np.random.default_rng(common.SEED).normal(size=len(leaves)))
    steps_scale = np.exp(trees.log_scales(steps + 1, common.SEED))

    @partial(jax.jit, static_argnames=("shape", "heavy"))
    def draw(step, i, scale, shape, heavy):
        key = jax.random.fold_in(jax.random.key(common.SEED), step)
        normal = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
        return (scale * (normal * jnp.abs(normal) if heavy else normal)).astype(dtype)

    def gradients(step, params=None):
        del params
        scales = np.float32(layer * steps_scale[step])
        return treedef.unflatten(
            draw(step + 1, i, scales[i], leaf.shape, True)
            for i, leaf in enumerate(leaves)
        )

    def param(i, leaf):
        fan_in = max(leaf.size // leaf.shape[-1], 1)
        return draw(0, i, np.float32(fan_in**-0.5), leaf.shape, False)

    return trees.Run(
        treedef.unflatten(param(i, x) for i, x in enumerate(leaves)), gradients
    )


def check_masks(run: trees.Run) -> None:
    """Compare all selections with concatenate + `lax.top_k`, bit for bit.

    Raises:
        RuntimeError: if a gradient differs, for then the times mean nothing.
    """
    grads = run.gradients(0)

    def masked(tx):
        update = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])
        return update(grads, run.params)

    expected = masked(common.concatenating_mask(common.top_k))
    contenders = {
        "mask_by_importance": mask_by_importance(common.RATIO),
        f"{GUESSED} passes": mask_in_passes(GUESSED, True),
    }
    if not many(grads):
        contenders[f"{EVENLY} even passes"] = mask_in_passes(EVENLY, False)
    for name, tx in contenders.items():
        wrong = jax.tree.map(lambda a, b: jnp.sum(a != b), masked(tx), expected)
        wrong = sum(map(int, jax.tree.leaves(wrong)))
        if wrong:
            raise RuntimeError(f"{name} differs from lax.top_k in {wrong} entries")


def scorings(make: Callable, run: trees.Run) -> dict[str, float]:
    """How often a step computes the score of an entry: passes, and once for the mask.

    Counted by an importance that tells the host how many entries it is given; warm, and
    cold, which the first step is anyway.
    """
    scored = []

    def counting(param, grad):
        jax.debug.callback(partial(scored.append, param.size))
        single = param.astype(jnp.float32), grad.astype(jnp.float32)
        return taylor_importance(*single)

    tx = make(importance=counting)
    step = jax.jit(common.apply_step(tx))
    # As one of the library's own, which a search computes anew in every pass.
    entrywise = mock.patch.dict(_importance._ENTRYWISE, {counting: counting})
    chosen = jax.tree.map(
        lambda flag, x: flag * x.size, kernels(run.params), run.params
    )
    total = sum(jax.tree.leaves(chosen))

    def count(params, state, cold):
        scored.clear()
        for i in range(1, COUNTED + 1):
            state = common.forget(state) if cold else state
            params, state = jax.block_until_ready(step(params, state, run.gradients(i)))
        jax.effects_barrier()
        return sum(scored) / COUNTED / total

    with entrywise:  # while it is traced
        start = step(run.params, tx.init(run.params), run.gradients(0))
    jax.block_until_ready(start)
    jax.effects_barrier()
    return {"warm": count(*start, cold=False), "cold": count(*start, cold=True)}


# Operations that name or group what others compute.
_NO_LAUNCH = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_NO_LAUNCH |= {"after-all", "opt-barrier", "partition-id"}


def launches_in(text: str) -> tuple[int, list[int]]:
    """Operations that run by themselves: outside all loops, and in those one by one.

    Args:
        text: of a compiled program. A fusion is one operation, a called computation
            those that it holds, a loop those of its body and its condition.
    """
    bodies, entry = _computations(text)
    loops: list[int] = []

    def launches(name: str) -> int:
        number = 0
        for operation, line in bodies.get(name, ()):
            called = re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)", line)
            if operation == "while":
                loops.append(sum(map(launches, called)))
            elif operation == "conditional":  # one of its branches: the largest
                branches = re.search(r"branch_computations=\{([^}]*)\}", line)
                names = branches[1].split(",") if branches else []
                names += re.findall(r"(?:true|false)_computation=(\S+)", line)
                number += max(map(launches, (n.strip(" %,") for n in names)), default=0)
            elif operation == "call":
                number += sum(map(launches, called))
            elif operation not in _NO_LAUNCH and not operation.endswith("-done"):
                number += 1
        return number

    return launches(entry), loops


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """(operation, line) by computation, and the name of the one that is run."""
    bodies: dict[str, list[tuple[str, str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif found := re.match(r"\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z][\w-]*)\(", line):
            bodies[name].append((found[1], line))
    return bodies, entry


def launches_seen(step: Callable, grads: Any) -> int | None:
    """How many kernels and copies a step ran, by the profiler; None if it cannot tell.

    A CPU has no such lines in its profile.
    """
    step(grads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                step(grads)
            (path,) = Path(folder).rglob("*.xplane.pb")
            planes = jax.profiler.ProfileData.from_file(str(path)).planes
            lines = [
                (line.name, len(list(line.events)))
                for plane in planes
                if plane.name.startswith("/device:")
                for line in plane.lines
            ]
    except Exception as error:  # it needs permissions and libraries of its own
        print(f"profiler: {type(error).__name__}: {error}")
        return None
    streams = [number for name, number in lines if name.startswith("Stream")]
    operations = [number for name, number in lines if name == "XLA Ops"]
    return sum(streams or operations) or None


def steppers(run: trees.Run) -> list[common.Stepper]:
    """Compile all contenders."""
    grads = run.gradients(0)
    top_k = common.concatenating_gsm(common.top_k)
    made = [common.Stepper(YARDSTICK, common.sgd(), run.params, grads)]
    for name, make in ours(run.params).items():
        made.append(common.Stepper(name, make(), run.params, grads))
    cold = copy.copy(made[1])  # the same program
    cold.name, cold.cold = "gsm, cold", True
    cold.params, cold.state = jax.tree.map(jnp.copy, (cold.params, cold.state))
    peer = common.Stepper("concatenate + top_k", top_k, run.params, grads)
    return [*made[:2], cold, *made[2:], peer]


def measure_steps(title: str, run: trees.Run, rounds: int) -> dict[str, Any]:
    """Time all contenders on one tree, and count."""
    contenders = steppers(run)
    seconds = common.interleave(contenders, run.gradients, rounds, title)
    rows = common.timings(seconds, YARDSTICK)
    for contender in contenders:
        name = contender.name
        outside, loops = launches_in(contender.step.as_text())
        rows[name] |= {
            "compile_s": contender.compile_seconds,
            "temporary_bytes": contender.temporary_bytes,
            "launches_outside_loops": outside,
            "launches_in_loops": loops,
            "launches_seen": launches_seen(contender, run.gradients(rounds)),
        }
    counted_ones = {} if many(run.params) else ours(run.params)
    for name, make in counted_ones.items():
        counted = scorings(make, run)
        rows[name]["scorings"] = counted["warm"]
        if make is gsm:
            rows["gsm, cold"]["scorings"] = counted["cold"]
    return {
        "tree": title,
        "entries": trees.entries(run.params),
        "leaves": len(jax.tree.leaves(run.params)),
        "contenders": rows,
    }


def show_steps(record: dict[str, Any]) -> None:
    """Print the table of one tree.

    *scored*: see `scorings`. *launches*: as seen by the profiler, or else those outside
    the loops; *in loops*: per iteration.
    """
    rows = []
    for name, row in record["contenders"].items():
        seen, outside = row["launches_seen"], row["launches_outside_loops"]
        cells = [*common.spread(row["ms"]), *common.spread(row["ratio"])]
        cells += [f"{row['compile_s']:.1f}", common.size(row["temporary_bytes"])]
        cells.append(f"{row['scorings']:.1f}" if "scorings" in row else "")
        cells.append(f"{seen} seen" if seen else f"{outside} +")
        cells.append(" + ".join(map(str, row["launches_in_loops"])))
        rows.append([name, *cells])
    title = f"{record['entries']:,} entries in {record['leaves']} leaves"
    print(f"{record['tree']}: {title}\n{common.table(STEP_HEAD, rows)}", flush=True)


class Trainer:
    """A network in training: forward, backward and optimizer in one program."""

    repetitions = None

    def __init__(self, name, tx, loss, params, data):
        """Compile the step, which donates all but the data."""
        self.name = name

        def step(params, state, data):
            grads = jax.grad(loss)(params, *data)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        start = jax.jit(lambda p: (jax.tree.map(jnp.copy, p), tx.init(p)))
        self.carry = start(params)
        jax.clear_caches()
        start = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.step = jitted.lower(*self.carry, data).compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self, data):
        """Make one step; return its seconds."""
        jax.block_until_ready(self.carry)
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.step(*self.carry, data))
        return time.perf_counter() - start


def images(batch, size, classes):
    """Make up a batch of images."""
    rng = np.random.default_rng(common.SEED)
    pixels = jnp.asarray(rng.normal(size=(batch, size, size, 3)), jnp.bfloat16)
    return pixels, jnp.asarray(rng.integers(classes, size=batch), jnp.int32)


def tokens(batch, length, vocabulary):
    """Make up a batch of texts."""
    rng = np.random.default_rng(common.SEED)
    text = jnp.asarray(rng.integers(vocabulary, size=(batch, length + 1)), jnp.int32)
    return text[:, :-1], text[:, 1:]


TRAININGS = {  # tree: loss, data, their sizes
    "resnet50": (networks.resnet_loss, images, (64, 224, 1000)),
    "gpt2": (networks.gpt_loss, tokens, (8, 1024, 50257)),
}
QUICK_SIZES = {"resnet50": (2, 32, 10), "gpt2": (2, 16, 96)}


def measure_training(name, shapes, sizes, rounds) -> dict[str, Any]:
    """Time whole training steps; gsm's share is what they take longer."""
    loss, make_data, _ = TRAININGS[name]
    data = make_data(*sizes)
    params = trees.made_up(shapes, jnp.float32, 0, common.SEED).params
    optimizers = {YARDSTICK: common.sgd(), "gsm": common.gsm()}
    contenders = [
        Trainer(title, tx, loss, params, data) for title, tx in optimizers.items()
    ]
    seconds = common.interleave(contenders, lambda i: data, rounds, f"training {name}")
    rows = common.timings(seconds, YARDSTICK)
    for contender in contenders:
        rows[contender.name]["compile_s"] = contender.compile_seconds
    sgd_ms, gsm_ms = (rows[title]["ms"]["median"] for title in optimizers)
    return {
        "network": name,
        "batch and sizes": sizes,
        "contenders": rows,
        "share": 1 - sgd_ms / gsm_ms,
    }


def show_training(record: dict[str, Any]) -> None:
    """Print the table of one network."""
    rows = []
    for name, row in record["contenders"].items():
        share = f"{record['share']:.1%}" if name == "gsm" else ""
        cells = [*common.spread(row["ms"]), f"{row['compile_s']:.1f}", share]
        rows.append([name, *cells])
    print(f"\ntraining {record['network']}, {record['batch and sizes']}")
    print(common.table(TRAINING_HEAD, rows), flush=True)


def main():
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="tiny, two rounds")
    args = parser.parse_args()
    quick = QUICK_TREES, QUICK_RUNS, 2
    made, runs, rounds = quick if args.quick else (TREES, RUNS, ROUNDS)
    begin = time.perf_counter()
    device = jax.devices()[0]
    print(f"{device.device_kind}, {device.platform}")
    record: dict[str, Any] = {"rounds": rounds, "steps": [], "training": []}

    def step_table(tree, dtype):
        run = drawn(made[tree](), jnp.dtype(dtype), max(rounds, COUNTED))
        check_masks(run)
        print(f"\n{tree}:{dtype}: every mask is that of lax.top_k, bit for bit")
        record["steps"].append(measure_steps(f"{tree}:{dtype}", run, rounds))
        show_steps(record["steps"][-1])

    def training(name):
        sizes = QUICK_SIZES[name] if args.quick else TRAININGS[name][-1]
        measured = measure_training(name, made[name](), sizes, rounds)
        record["training"].append(measured)
        show_training(measured)

    # What matters most comes first.
    tables = [partial(step_table, *run) for run in runs]
    parts = [*tables[:4], *(partial(training, name) for name in TRAININGS), *tables[4:]]
    for part in parts:
        if time.perf_counter() - begin > ENOUGH:
            print(f"left out after {ENOUGH} s: {part.args}")
            continue
        part()
        record["seconds"] = time.perf_counter() - begin
        common.save_json(args.output, "accelerator", record)


if __name__ == "__main__":
    main()
