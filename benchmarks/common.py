"""What the benchmarks share: donated steps, interleaved timing, tables and records."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

import gsm_optax
from gsm_optax import (
    MaskByImportanceState,
    gsm_sgd,
    kernels,
    taylor_importance,
    tempered_importance,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RATIO = 0.95  # one entry in twenty is active
MOMENTUM = 0.98
WEIGHT_DECAY = 1e-4
LEARNING_RATE = 1e-3
SEED = 0


def sgd() -> optax.GradientTransformation:
    """Return the yardstick: momentum SGD, without selection or decay."""
    return optax.sgd(LEARNING_RATE, momentum=MOMENTUM)


def decayed_sgd() -> optax.GradientTransformation:
    """Return what is left of gsm without the selection: decay, momentum, step."""
    decay = optax.add_decayed_weights(WEIGHT_DECAY, mask=kernels)
    return optax.chain(decay, sgd())


def gsm(**settings: Any) -> optax.GradientTransformation:
    """Return what is measured: the whole optimizer of this library."""
    settings = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY} | settings
    return gsm_sgd(LEARNING_RATE, RATIO, **settings)


def beyond_gsm() -> optax.GradientTransformation:
    """Return the same with all that goes beyond the paper, but for the ramp."""
    power = tempered_importance(0.5)
    return gsm(importance=power, smoothing=0.99, passive_decay=3e-2)


def top_k(scores: jax.Array, kept: int) -> jax.Array:
    """Q-th greatest score by `lax.top_k`."""
    return jax.lax.top_k(scores, kept)[0][-1]


def full_sort(scores: jax.Array, kept: int) -> jax.Array:
    """Q-th greatest score by a full sort."""
    return jnp.sort(scores)[scores.size - kept]


def num_kept(total: int) -> int:
    """Q = N − round(ratio·N)."""
    return total - round(Fraction(RATIO) * total)


def flat_scores(params: Any, grads: Any) -> jax.Array:
    """Concatenate the float32 scores of all kernels."""
    leaves = map(jax.tree.leaves, (kernels(params), params, grads))
    triples = zip(*leaves, strict=True)
    return jnp.concatenate([_score(p, g).reshape(-1) for flag, p, g in triples if flag])


def _score(param, grad):
    return taylor_importance(param.astype(jnp.float32), grad.astype(jnp.float32))


def concatenating_mask(find: Callable) -> optax.GradientTransformation:
    """Mask like `mask_by_importance`, in the obvious way: join all scores, then find.

    Args:
        find: `(scores, kept) -> threshold`.
    """

    def update(grads, state, params):
        scores = flat_scores(params, grads)
        threshold = find(scores, num_kept(scores.size))

        def masked(flag, param, grad):
            if not flag:
                return grad
            return jnp.where(_score(param, grad) >= threshold, grad, 0)

        return jax.tree.map(masked, kernels(params), params, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def concatenating_gsm(find: Callable) -> optax.GradientTransformation:
    """Return the optimizer that `gsm` is, but selecting by `concatenating_mask`."""
    return optax.chain(
        concatenating_mask(find),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=kernels),
        optax.trace(MOMENTUM),
        optax.scale_by_learning_rate(LEARNING_RATE),
    )


def apply_step(tx: optax.GradientTransformation) -> Callable:
    """Return `(params, state, grads) -> (params, state)`."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compile_step(tx, params, state, grads, out_shardings=None) -> tuple[Any, float]:
    """Compile a step that donates params and state; return it and the seconds it took.

    Tracing and lowering count: a user waits for all three.
    """
    jax.clear_caches()  # what another optimizer traced must not help this one
    step = jax.jit(apply_step(tx), donate_argnums=(0, 1), out_shardings=out_shardings)
    start = time.perf_counter()
    compiled = step.lower(params, state, grads).compile()
    return compiled, time.perf_counter() - start


class Stepper:
    """An optimizer at work: compiled, with parameters and state of its own."""

    def __init__(
        self,
        name: str,
        tx: optax.GradientTransformation,
        params: Any,
        grads: Any,
        *,
        cold: bool = False,
        repetitions: int | None = None,
        shardings: tuple[Any, Any] | None = None,
    ):
        """Compile.

        Args:
            name: how the table calls it.
            tx: the optimizer.
            params: copied, so that several optimizers can start from the same ones.
            grads: any gradients, for their types.
            cold: whether the search forgets the last threshold before every step.
            repetitions: how often it is timed; by default in every round.
            shardings: those of the parameters and of the state.
        """
        self.name, self.cold, self.repetitions = name, cold, repetitions
        self.params = jax.tree.map(jnp.copy, params)
        split = shardings[1] if shardings else None
        self.state = jax.jit(tx.init, out_shardings=split)(self.params)
        self.step, self.compile_seconds = compile_step(
            tx, self.params, self.state, grads, shardings
        )
        self.temporary_bytes = self.step.memory_analysis().temp_size_in_bytes
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))

    def __call__(self, grads: Any) -> float:
        """Make one step; return its seconds."""
        if self.cold:
            self.state = forget(self.state)
        jax.block_until_ready((self.params, self.state))
        start = time.perf_counter()
        self.params, self.state = self.step(self.params, self.state, grads)
        jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - start


def forget(state: Any) -> Any:
    """Set what the selection remembers to zero; keep the momentum."""

    def is_selection(node):
        return isinstance(node, MaskByImportanceState)

    def reset(node):
        return jax.tree.map(jnp.zeros_like, node) if is_selection(node) else node

    return jax.tree.map(reset, state, is_leaf=is_selection)


def interleave(
    contenders: Sequence[Any], gradients: Callable[[int], Any], rounds: int, title: str
) -> dict[str, list[float]]:
    """Time every contender once a round, in random order, on the same gradients.

    Round 0 is warm-up. A contender with `repetitions` set takes part in so many rounds.

    Returns:
        Seconds by name.
    """
    rng = np.random.default_rng(SEED)
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in tqdm(range(rounds + 1), desc=title, leave=False, disable=None):
        grads = jax.block_until_ready(gradients(i))
        for j in rng.permutation(len(contenders)):
            contender = contenders[j]
            if i in _rounds_of(contender, rounds):
                taken = contender(grads)
                if i > 0:
                    seconds[contender.name].append(taken)
    return seconds


def _rounds_of(contender, rounds) -> set[int]:
    count = min(contender.repetitions or rounds, rounds)
    return {0, *np.linspace(1, rounds, count).round().astype(int).tolist()}


def quartiles(values: Sequence[float], unit: float = 1.0) -> dict[str, Any]:
    """Median, first and third quartile, in multiples of `unit`."""
    first, median, third = (
        float(q) / unit for q in np.quantile(values, [0.25, 0.5, 0.75])
    )
    return {"median": median, "q1": first, "q3": third, "repetitions": len(values)}


def timings(seconds: dict[str, list[float]], yardstick: str) -> dict[str, Any]:
    """Milliseconds, and ratios to the median of the yardstick, by name."""
    unit = float(np.median(seconds[yardstick]))
    return {
        name: {"ms": quartiles(taken, 1e-3), "ratio": quartiles(taken, unit)}
        for name, taken in seconds.items()
    }


def spread(summary: dict[str, Any], digits: int = 2) -> list[str]:
    """Format quartiles as two cells: the median, and the range q1 - q3."""
    low, middle, high = (f"{summary[k]:,.{digits}f}" for k in ("q1", "median", "q3"))
    return [middle, f"{low} - {high}"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Align columns: the first `words` of them to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def size(count: float) -> str:
    """Format bytes for a person: 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def environment() -> dict[str, Any]:
    """Describe the machine, the versions and the seed."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "optax", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": versions | {"gsm_optax": gsm_optax.__version__},
        "seed": SEED,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor())


def save_json(output: Path, name: str, record: dict[str, Any]) -> None:
    """Write a record with its environment to `output`/`name`.json."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.json"
    path.write_text(
        json.dumps({"environment": environment(), **record}, indent=1) + "\n"
    )
    print(f"wrote {path}")


def save_figure(output: Path, name: str, figure: Any) -> None:
    """Write a figure to `output`/`name`.png, wide enough to be read in a README."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    print(f"wrote {path}")
