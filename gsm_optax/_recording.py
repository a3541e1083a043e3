"""What to remember of a run, so that it can be drawn: see `gsm_optax.plot`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsm_optax._counting import NAN_KEY, WORD, count
from gsm_optax._importance import Prunable, kernels, magnitude_score, prunable_tree
from gsm_optax._metrics import NEAR_ZERO, metrics
from gsm_optax._paths import path_name

EXPONENTS = tuple(float(x) for x in np.arange(-48, 6) / 4)
"""Decimal logarithms of the edges between the classes of magnitude: -12, ..., 1.25."""

_EDGES = np.power(10, EXPONENTS).astype(np.float32)
# Order keys: 1 is that of the smallest number above zero. Eight keys at a time, because
# a reduction with many operands takes seconds to compile.
_KEYS = np.array([1, *_EDGES.view(np.int32), NAN_KEY], np.int32).reshape(-1, 8)
_BELOW = 2 + EXPONENTS.index(round(np.log10(NEAR_ZERO)))


@dataclass
class Recorder:
    """Collects records of a run: plain numbers, for `gsm_optax.plot` or for JSON.

    Call it after every epoch, or as often as a figure is to have points. Counts are
    exact and are made where the arrays are, sharded or not; only counts leave the
    devices. It stands outside the training step, which is the same with or without it;
    a record costs about as much as seven passes over the parameters.

    Attributes:
        decay_left: what `decay_budget_left` returns, to record `gsm/decay_budget_left`.
        prunable: the prunable leaves that the optimizer was given.
        records: one dict a call, ready for `json.dump`. To go on after a restart, give
            the old ones: `Recorder(records=json.load(file))`. Each has

            * `step`,
            * the numbers of `metrics`, under their names,
            * `magnitudes`: how many of the prunable entries are exactly zero, then how
              many are in each class between 0, 1e-12, 10**-11.75, ..., 10**1.25 and
              inf, then how many are NaN,
            * `layers`: for the path of every prunable leaf a dict of its number of
              `entries`, those that are `nonzero`, and those `near_zero` (below 1e-4,
              zeros included).

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import Recorder, gsm_sgd
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [0.0, 1e-5]])}
        >>> tx = gsm_sgd(0.1, ratio=0.75)
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> recorder = Recorder()
        >>> recorder(1, params, state)
        >>> recorder.records[0]["gsm/num_active"]
        1
        >>> recorder.records[0]["layers"]
        {'kernel': {'entries': 4, 'nonzero': 3, 'near_zero': 2}}
    """

    decay_left: Callable[[int], Any] | None = None
    prunable: Prunable = kernels
    records: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, step: int, params: Any, opt_state: Any) -> None:
        """Append a record.

        Args:
            step: number of optimizer steps taken so far.
            params: pytree of arrays; under flax nnx, `nnx.state(model, nnx.Param)`.
            opt_state: the state of the optimizer; under flax nnx,
                `optimizer.opt_state`.

        Raises:
            ValueError: as `metrics` does.
        """
        step = int(step)
        left = self.decay_left(step) if self.decay_left else None
        watched = metrics(params, opt_state, decay_left=left, prunable=self.prunable)
        flags = jax.tree.leaves(prunable_tree(self.prunable, params))
        chosen = list(compress(jax.tree.leaves_with_path(params), flags))
        # Everything is started before the first result is waited for.
        reaching = jax.device_get([_reaching(jnp.asarray(leaf)) for _, leaf in chosen])
        classes = [
            _classes(leaf.size, *words)
            for (_, leaf), words in zip(chosen, reaching, strict=True)
        ]
        paths = [path_name(path) for path, _ in chosen]
        self.records.append(
            {"step": step}
            | {name: value.item() for name, value in watched.items()}
            | {"magnitudes": [sum(column) for column in zip(*classes, strict=True)]}
            | {"layers": dict(zip(paths, map(_layer, classes), strict=True))}
        )


@jax.jit
def _reaching(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many entries reach each of the keys: two words of shape (passes, 8)."""
    leaves = [(leaf, leaf)]
    eight_keys = lambda keys: count(magnitude_score, leaves, keys)
    return lax.map(eight_keys, jnp.asarray(_KEYS))


def _classes(entries: int, high: np.ndarray, low: np.ndarray) -> list[int]:
    """How many of the entries are between one key and the next."""
    reaching = (high.astype(np.int64).ravel() << WORD) + low.ravel()
    return [a - b for a, b in pairwise([entries, *reaching.tolist(), 0])]


def _layer(classes: list[int]) -> dict[str, int]:
    entries = sum(classes)
    return {
        "entries": entries,
        "nonzero": entries - classes[0],
        "near_zero": sum(classes[:_BELOW]),
    }
