"""Figures of a run, from the records of a `gsm_optax.Recorder`, and of schedules.

    from gsm_optax import plot

    plot.overview(recorder.records).savefig("run.png")

Every function of records draws into the `Axes` it is given, or else into a new figure,
and returns the `Axes`. Nothing is shown or saved, and no backend is chosen: a notebook
shows the figures by itself. Needs matplotlib: `pip install "gsm_optax[plot]"`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsm_optax._freezing_schedules import FreezingSchedule
from gsm_optax._histogram import EXPONENTS

try:
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter
except ImportError as error:
    raise ImportError(
        'gsm_optax.plot draws with matplotlib: pip install "gsm_optax[plot]"'
    ) from error

Records = Sequence[Mapping[str, Any]]

BLUE, ORANGE, GREY = "#1f4e9c", "#d55e00", "0.35"
FEW_LAYERS = 8  # that many have a line style and a name each


def magnitudes(records: Records, ax: Axes | None = None) -> Axes:
    """Draw the distribution of log10|w| over the steps, as a map.

    Args:
        records: of a `Recorder`.
        ax: where to draw; by default a new figure.

    Returns:
        The axes. Each column adds up to 100 % of the prunable entries (NaN aside); the
        lowest row holds those below 1e-12 and those that are exactly zero.
    """
    ax, steps = _axes(ax, records), _column(records, "step")
    counts = np.array([record["magnitudes"] for record in records], float)
    shares = 100 * counts / counts.sum(1, keepdims=True)
    # Zeros and those below the first edge are one row; NaN is none.
    rows = np.column_stack([shares[:, 0] + shares[:, 1], shares[:, 2:-1]]).T
    edges = np.array([EXPONENTS[0] - 1, *EXPONENTS, EXPONENTS[-1] + 0.25])
    # Logarithmic, so that the few entries that stay are seen beside the many that go.
    image = ax.pcolormesh(
        _edges(steps), edges, rows, cmap="Blues", norm=LogNorm(0.01, 100)
    )
    image.set_rasterized(True)
    ax.figure.colorbar(image, ax=ax, label="prunable entries (%)", format="%g")
    ticks = range(-10, 2, 2)
    ax.set_yticks([edges[:2].mean(), *ticks], ["<1e-12", *(f"1e{x}" for x in ticks)])
    used = np.flatnonzero(rows.max(1))
    if used.size:  # not where all are NaN
        ax.set_ylim(edges[used[0]], edges[used[-1] + 1])
    return _label(ax, "Magnitudes", "|w|")


def near_zero(records: Records, ax: Axes | None = None) -> Axes:
    """Draw how many of the prunable entries are near zero, and how many are to be.

    Args:
        records: of a `Recorder`.
        ax: where to draw; by default a new figure.

    Returns:
        The axes: in percent, entries below 1e-4 as a line, and passive ones dashed.
        Pruning is lossless once the line has come to the dashes. (Of frozen blocks all
        entries count as passive, and none decays.)
    """
    ax, steps = _axes(ax, records), _column(records, "step")
    near = 100 * _column(records, "gsm/near_zero")
    passive = 100 - 100 * _column(records, "gsm/active_fraction")
    ax.plot(steps, near, color=BLUE, label="below 1e-4")
    ax.plot(steps, passive, "--", color=GREY, linewidth=1, label="passive")
    ax.set_ylim(0, 104)
    ax.legend(frameon=False)
    return _label(ax, "On their way to zero", "prunable entries (%)")


def density(records: Records, ax: Axes | None = None) -> Axes:
    """Draw what is left of every layer: its entries that are not near zero.

    Args:
        records: of a `Recorder`.
        ax: where to draw; by default a new figure.

    Returns:
        The axes, one line a layer from first (dark) to last (light): in percent, its
        entries of at least 1e-4. Named, with the last percentage, are up to eight
        layers, or else the first and the last.
    """
    ax, steps = _axes(ax, records), _column(records, "step")
    names = list(records[0]["layers"])
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(names)))
    styles = ["-", "--", "-.", ":"] if len(names) <= FEW_LAYERS else ["-"]
    labels = _short(names)
    for i, name in enumerate(names):
        layers = [record["layers"][name] for record in records]
        left = [100 - 100 * x["near_zero"] / max(x["entries"], 1) for x in layers]
        named = len(names) <= FEW_LAYERS or i in (0, len(names) - 1)
        label = f"{labels[i]} {left[-1]:.1f} %" if named else None
        style = styles[i % len(styles)]
        ax.plot(steps, left, style, color=shades[i], label=label)
    ax.set_ylim(0, 104)
    ax.legend(frameon=False)
    return _label(ax, "Density by layer", "entries above 1e-4 (%)")


def threshold(records: Records, ax: Axes | None = None) -> Axes:
    """Draw the threshold of importance, and which fraction of the entries is active.

    Args:
        records: of a `Recorder`.
        ax: where to draw; by default a new figure.

    Returns:
        The axes of the threshold, logarithmic; the active fraction, in percent and
        dashed, has an axis of its own on the right.
    """
    ax, steps = _axes(ax, records), _column(records, "step")
    least = _column(records, "gsm/threshold")
    ax.plot(steps, least, color=BLUE)
    # Zero where every entry is active, NaN or inf where something is wrong.
    drawn = least[(least > 0) & np.isfinite(least)]
    if drawn.size:
        bottom, top = np.floor(np.log10(drawn.min())), np.ceil(np.log10(drawn.max()))
        ax.set(yscale="log", ylim=(10**bottom, 10 ** max(top, bottom + 1)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    right = ax.twinx()
    active = 100 * _column(records, "gsm/active_fraction")
    right.plot(steps, active, "--", color=ORANGE)
    right.set_ylim(0, 1.25 * active.max() or 1)
    right.set_ylabel("active (%), dashed", color=ORANGE)
    return _label(ax, "Threshold", "least active importance")


def churn(records: Records, ax: Axes | None = None) -> Axes:
    """Draw how many entries changed side, active or passive, at the recorded steps.

    Args:
        records: of a `Recorder`, of an optimizer with `track_churn=True`.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if the records have no churn.
    """
    if not _has_churn(records):
        raise ValueError(
            "these records have no churn: make the optimizer with "
            "gsm_sgd(..., track_churn=True)."
        )
    ax = _axes(ax, records)
    changed = _column(records, "gsm/churn")
    ax.plot(_column(records, "step"), changed, color=BLUE)
    ax.set_ylim(0, 1.05 * max(changed.max(), 1))
    return _label(ax, "Churn", "entries changing side")


def overview(records: Records) -> Figure:
    """Draw everything the records have into one new figure.

    Args:
        records: of a `Recorder`.

    Returns:
        The figure, 9 x 5.2 inches.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax import Recorder, gsm_sgd, plot
        >>> params, recorder = {"kernel": jnp.array([[1.0, -2.0]])}, Recorder()
        >>> tx = gsm_sgd(0.1, ratio=0.5)
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> recorder(1, params, state)
        >>> figure = plot.overview(recorder.records)
        >>> [axes.get_title() for axes in figure.axes if axes.get_title()]
        ['Magnitudes', 'On their way to zero', 'Density by layer', 'Threshold']
    """
    figure = plt.figure(figsize=(9, 5.2), layout="constrained")
    rows = figure.add_gridspec(2, 1)  # each of them aligned by itself
    upper, lower = figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])
    left, right = upper.subplots(1, 2, width_ratios=(2, 1))
    magnitudes(records, left)
    near_zero(records, right)
    panels = [density, threshold, *([churn] if _has_churn(records) else [])]
    for draw, ax in zip(panels, lower.subplots(1, len(panels)), strict=True):
        draw(records, ax)
    return figure


def frozen_blocks(
    schedules: Mapping[str, FreezingSchedule], steps: int, blocks: int
) -> Figure:
    """Draw which blocks are frozen when, a panel a schedule.

    Args:
        schedules: by their names; see `gsm_optax.freezing.single_shot`.
        steps: how many steps to draw.
        blocks: how many blocks the model has.

    Returns:
        The figure, 7.5 inches wide, two panels a row. Block 1, nearest the input, is at
        the bottom; what is filled is frozen.

    Example:
        >>> from gsm_optax import plot
        >>> from gsm_optax.freezing import periodic, single_shot
        >>> schedules = {"single-shot": single_shot(40, interval=20, blocks=3)}
        >>> schedules["periodic"] = periodic((4, 2, 2, 1), interval=10)
        >>> figure = plot.frozen_blocks(schedules, steps=100, blocks=4)
        >>> [axes.get_title() for axes in figure.axes]
        ['single-shot', 'periodic']
    """
    rows = -(-len(schedules) // 2)
    figure = plt.figure(figsize=(7.5, 0.5 + 1.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, (name, schedule) in zip(axes, schedules.items(), strict=False):
        frozen = np.asarray(jax.vmap(schedule)(jnp.arange(steps, dtype=jnp.int32)))
        edges = np.append(frozen, frozen[-1])
        ax.fill_between(range(steps + 1), edges, step="post", color=BLUE, linewidth=0)
        ax.hlines(range(1, blocks), 0, steps, color=GREY, linewidth=0.4)
        ax.set(title=name, xlim=(0, steps), ylim=(0, blocks))
        ax.set_yticks(np.arange(blocks) + 0.5, map(str, range(1, blocks + 1)))
        ax.tick_params(axis="y", length=0)
    for ax in axes[len(schedules) :]:
        ax.remove()
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("block (filled: frozen)", fontsize="medium")
    return figure


def _axes(ax: Axes | None, records: Records) -> Axes:
    if not records:
        raise ValueError("no records: call recorder(step, params, opt_state) first.")
    if ax is not None:
        return ax
    return plt.figure(figsize=(5, 3.2), layout="constrained").add_subplot()


def _label(ax: Axes, title: str, ylabel: str) -> Axes:
    ax.set(title=title, xlabel="step", ylabel=ylabel)
    return ax


def _column(records: Records, name: str) -> np.ndarray:
    return np.array([record[name] for record in records], float)


def _has_churn(records: Records) -> bool:
    return all("gsm/churn" in record for record in records)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Halfway between steps, and as far beyond the first and the last."""
    if len(steps) == 1:
        return steps[0] + np.array([-0.5, 0.5])
    between = (steps[1:] + steps[:-1]) / 2
    first, last = 2 * steps[0] - between[0], 2 * steps[-1] - between[-1]
    return np.array([first, *between, last])


def _short(paths: Iterable[str]) -> list[str]:
    """Paths without what all of them end in, as in dense/kernel and head/kernel."""
    parts = [path.split("/") for path in paths]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]
