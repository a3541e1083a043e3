"""What to remember of a run, so that it can be drawn: see `gsm_optax.plot`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import jax
import numpy as np

from gsm_optax._histogram import EXPONENTS, histograms
from gsm_optax._masking import find_state
from gsm_optax._metrics import NEAR_ZERO, metrics
from gsm_optax._paths import leaf_names
from gsm_optax._prunable import from_marks

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
        watched = metrics(params, opt_state, decay_left=left)
        flags = jax.tree.leaves(from_marks(find_state(opt_state).prunable, params))
        paths = list(compress(leaf_names(params), flags))
        classes = histograms(list(compress(jax.tree.leaves(params), flags)))
        self.records.append(
            {"step": step}
            | {name: value.item() for name, value in watched.items()}
            | {"magnitudes": [sum(column) for column in zip(*classes, strict=True)]}
            | {"layers": dict(zip(paths, map(_layer, classes), strict=True))}
        )


def _layer(classes: list[int]) -> dict[str, int]:
    entries = sum(classes)
    return {
        "entries": entries,
        "nonzero": entries - classes[0],
        "near_zero": sum(classes[:_BELOW]),
    }
