"""How sparse a model is: exact counts per leaf and in total, to read or to process."""

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from gsm_optax._histogram import EXPONENTS, histograms
from gsm_optax._paths import check_arrays, leaf_names
from gsm_optax._prunable import Prunable, prunable_tree
from gsm_optax._tables import align

DECADES = tuple(range(-8, 1))  # exponents of the edges 1e-8, 1e-7, ..., 1
EDGES = tuple(10.0**exponent for exponent in DECADES)

MAGNITUDES = (
    "exactly 0",
    "below 1e-8",
    *(f"1e{a} to 1e{b}" for a, b in pairwise(DECADES)),
    "1 and above",
    "NaN",
    "no magnitude",
)
"""Names of the magnitude classes, in the order of `LeafSparsity.magnitudes`.

The last is of entries that are no numbers: PRNG keys.
"""


@dataclass(frozen=True)
class LeafSparsity:
    """Counts of one leaf, or of several together (`shape` is then None)."""

    path: str
    shape: tuple[int, ...] | None
    prunable: bool
    magnitudes: tuple[int, ...]  # entries of each class in MAGNITUDES

    @property
    def entries(self) -> int:
        """Number of entries."""
        return sum(self.magnitudes)

    @property
    def nonzero(self) -> int:
        """Number of entries that are not exactly zero (NaN and PRNG keys included)."""
        return self.entries - self.magnitudes[0]

    @property
    def density(self) -> float:
        """Non-zero fraction, in [0, 1]; NaN for a leaf without entries."""
        return self.nonzero / self.entries if self.entries else math.nan

    @property
    def compression(self) -> float:
        """Entries per non-zero entry; inf if all are zero, NaN without entries."""
        if not self.entries:
            return math.nan
        return self.entries / self.nonzero if self.nonzero else math.inf

    def below(self, magnitude: float) -> float:
        """Fraction of the entries that are smaller than `magnitude`, a power of ten.

        Args:
            magnitude: one of 1e-8, 1e-7, ..., 1.

        Returns:
            A fraction in [0, 1], zeros included and NaN not, nor PRNG keys.

        Raises:
            ValueError: if `magnitude` is not one of the edges that were counted.
        """
        for i, edge in enumerate(EDGES):
            if math.isclose(edge, magnitude):
                return sum(self.magnitudes[: i + 2]) / max(self.entries, 1)
        raise ValueError(f"magnitude={magnitude} is not one of {EDGES}.")


@dataclass(frozen=True)
class SparsityReport:
    """Counts of a pytree, leaf by leaf; print it, or let a notebook show it."""

    leaves: tuple[LeafSparsity, ...]

    @property
    def prunable(self) -> LeafSparsity:
        """All prunable leaves together."""
        return _together("prunable", (leaf for leaf in self.leaves if leaf.prunable))

    @property
    def total(self) -> LeafSparsity:
        """All leaves together."""
        return _together("all", self.leaves)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one plain dict a leaf, for `json.dump` or `pandas.DataFrame`."""
        return [
            {
                "path": leaf.path,
                "shape": list(leaf.shape or ()),
                "prunable": leaf.prunable,
                "entries": leaf.entries,
                "nonzero": leaf.nonzero,
                "density": leaf.density,
                "compression": leaf.compression,
                "magnitudes": dict(zip(MAGNITUDES, leaf.magnitudes, strict=True)),
            }
            for leaf in self.leaves
        ]

    def to_markdown(self) -> str:
        """Return the table of leaves and totals in GitHub's Markdown."""
        head, *rows = _table(self)
        lines = [head, [*["---"] * 3, *["---:"] * (len(head) - 3)], *rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)

    def __str__(self) -> str:
        """Return aligned tables of the leaves and of the magnitudes."""
        table = align(_table(self), words={0, 1, 2})
        magnitudes = _magnitude_rows(self.prunable)
        if not magnitudes:
            return table
        rows = [[*row, "▇" * round(30 * part)] for *row, part in magnitudes]
        bars = align(rows, words={0, 3})
        return f"{table}\n\nmagnitude of the prunable entries\n{bars}"

    def _repr_html_(self) -> str:
        head, *rows = _table(self)
        bars = [
            [*row, f"<meter style='width:12em' value='{part:.4f}'></meter>"]
            for *row, part in _magnitude_rows(self.prunable)
        ]
        leaves = _html_rows([head], "th") + _html_rows(rows, "td")
        caption = "<caption>magnitude of the prunable entries</caption>"
        magnitudes = f"<table>{caption}{''.join(map(_html_bar, bars))}</table>"
        return f"<table>{leaves}</table>" + (magnitudes if bars else "")


def sparsity_report(
    params_or_mask: Any, *, prunable: Prunable | None = None
) -> SparsityReport:
    """Count the zeros of every leaf, and the magnitudes of the rest by decade.

    Near-zero counts show `gsm` at work before anything is pruned: entries wander down
    the decades while the accuracy holds.

    Args:
        params_or_mask: pytree of arrays of any shape and dtype: parameters, or a mask
            of bools (`False` counts as zero). What else a model's state holds is
            counted too: counters by their value, float0 as zeros, and PRNG keys as
            entries that are not zero and have no magnitude.
        prunable: which leaves the totals by magnitude are taken over: pytree prefix of
            bools, or a callable `params -> such a prefix`. By default
            `kernels`, told by name and shape.

    Returns:
        A `SparsityReport`: `print(report)` is an aligned table, in a notebook it is
        HTML; `to_markdown()` and `to_records()` convert it. Counts are exact integers,
        taken where the arrays are; only the counts leave the device.

    Raises:
        ValueError: if `prunable` does not match the tree, or a leaf is no array.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import sparsity_report
        >>> report = sparsity_report({
        ...     "bias": jnp.ones(2),
        ...     "kernel": jnp.array([[0.0, 3e-5], [0.0, 0.2], [0.0, 0.1]]),
        ... })
        >>> print(report)
        path      shape  prunable  entries  non-zero  density  compression
        bias      2                      2         2  100.00%         1.0x
        kernel    3x2    yes             6         3   50.00%         2.0x
        prunable                         6         3   50.00%         2.0x
        all                              8         5   62.50%         1.6x
        <BLANKLINE>
        magnitude of the prunable entries
        exactly 0     3  50.00%  ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇
        1e-5 to 1e-4  1  16.67%  ▇▇▇▇▇
        1e-4 to 1e-3  0   0.00%
        1e-3 to 1e-2  0   0.00%
        1e-2 to 1e-1  0   0.00%
        1e-1 to 1e0   2  33.33%  ▇▇▇▇▇▇▇▇▇▇
    """
    check_arrays(params_or_mask)
    # A mask stands for the parameters it masks, so its bools count as inexact here.
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), _countable(x)), params_or_mask
    )
    flags = jax.tree.leaves(prunable_tree(prunable, shapes))
    names, leaves = leaf_names(params_or_mask), jax.tree.leaves(params_or_mask)
    counted = iter(histograms([x for x in leaves if _is_number(x)]))
    return SparsityReport(
        tuple(
            LeafSparsity(
                name,
                jnp.shape(leaf),
                flag,
                _by_decade(next(counted)) if _is_number(leaf) else _no_numbers(leaf),
            )
            for name, leaf, flag in zip(names, leaves, flags, strict=True)
        )
    )


def _countable(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    return jnp.float32 if dtype == jnp.bool_ else dtype


def _is_number(leaf: Any) -> bool:
    """Whether it can be compared: not so float0, a gradient of integers, and keys."""
    dtype = jnp.result_type(leaf)
    return dtype != jax.dtypes.float0 and not jnp.issubdtype(dtype, jax.dtypes.extended)


def _no_numbers(leaf: Any) -> tuple[int, ...]:
    entries, others = math.prod(jnp.shape(leaf)), (0,) * (len(MAGNITUDES) - 1)
    is_zero = jnp.result_type(leaf) == jax.dtypes.float0
    return (entries, *others) if is_zero else (*others, entries)


def _by_decade(classes: list[int]) -> tuple[int, ...]:
    """Counts by `MAGNITUDES` from those of a histogram, whose edges are closer."""
    zero, *below, nan = classes
    edges = [EXPONENTS.index(float(decade)) + 1 for decade in DECADES]
    bounds = [0, *edges, len(below)]
    return zero, *(sum(below[a:b]) for a, b in pairwise(bounds)), nan, 0


def _together(path: str, leaves: Iterable[LeafSparsity]) -> LeafSparsity:
    columns = [leaf.magnitudes for leaf in leaves] or [(0,) * len(MAGNITUDES)]
    sums = tuple(map(sum, zip(*columns, strict=True)))
    return LeafSparsity(path, None, True, sums)


def _table(report: SparsityReport) -> list[list[str]]:
    head = [
        "path",
        "shape",
        "prunable",
        "entries",
        "non-zero",
        "density",
        "compression",
    ]
    rows = [
        [
            leaf.path,
            "x".join(map(str, leaf.shape)) if leaf.shape is not None else "",
            "yes" if leaf.prunable and leaf.shape is not None else "",
            f"{leaf.entries:,}",
            f"{leaf.nonzero:,}",
            f"{leaf.density:.2%}",
            f"{leaf.compression:,.1f}x",
        ]
        for leaf in (*report.leaves, report.prunable, report.total)
    ]
    return [head, *rows]


def _magnitude_rows(leaf: LeafSparsity) -> list[tuple[str, str, str, float]]:
    """Name, count, percentage, fraction, from the first class with entries to the last.

    Empty for a mask, whose entries are all 0 or 1.
    """
    present = [i for i, count in enumerate(leaf.magnitudes) if count]
    if not set(present) - {0, MAGNITUDES.index("1 and above")}:
        return []
    rows = [
        (name, f"{count:,}", f"{count / leaf.entries:.2%}", count / leaf.entries)
        for name, count in zip(MAGNITUDES, leaf.magnitudes, strict=True)
    ]
    first = next((i for i in present if i > 0), 0)
    zeros = rows[:1] if leaf.magnitudes[0] else []
    return zeros + rows[first : present[-1] + 1]


def _html_rows(rows: list[list[str]], tag: str) -> str:
    def cell(i: int, text: str) -> str:
        side = "left" if i < 3 else "right"
        return f"<{tag} style='text-align:{side}'>{html.escape(text)}</{tag}>"

    cells = ("".join(cell(i, text) for i, text in enumerate(row)) for row in rows)
    return "".join(f"<tr>{row}</tr>" for row in cells)


def _html_bar(row: list[str]) -> str:
    name, count, percentage, meter = row
    right = "style='text-align:right'"
    return (
        f"<tr><td>{name}</td><td {right}>{count}</td><td {right}>{percentage}</td>"
        f"<td>{meter}</td></tr>"
    )
