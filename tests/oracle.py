"""The paper's equations in NumPy, written without a look at the implementation."""

from fractions import Fraction

import jax
import numpy as np


def budget(ratio, total):
    """Q, the number of active entries, of `total` at a passive fraction of `ratio`."""
    return total - round(Fraction(ratio) * total)


def active(scores, kept):
    """B for a list of float32 arrays: at or above the `kept`-th greatest of them all.

    NaN ranks above inf and is always active; zero and less only if all entries are.
    """
    ranks = [np.where(np.isnan(s), np.inf, np.minimum(s, 1e300)) for s in _wide(scores)]
    ordered = np.sort(np.concatenate([r.ravel() for r in ranks]))[::-1]
    if kept == ordered.size:
        return [np.ones(r.shape, bool) for r in ranks]
    kth = ordered[kept - 1] if kept else np.inf
    return [(r >= kth) & (r > 0) for r in ranks]


def _wide(scores):
    # XLA flushes subnormal numbers to zero on the CPU, NumPy does not.
    tiny = np.finfo(np.float32).tiny
    scores = [np.asarray(s, np.float32) for s in scores]
    return [np.where(np.abs(s) < tiny, 0, s).astype(np.float64) for s in scores]


def importance(w, g, power=1.0):
    """|θ|·|∇|^γ; the paper's T at γ = 1."""
    w, g = np.abs(np.asarray(w, np.float32)), np.abs(np.asarray(g, np.float32))
    return (w * g if power == 1 else w * g ** np.float32(power)).astype(np.float32)


def averages(scores, weights, smoothing):
    """Σ_i s^i T_{k-i} / Σ_i s^i of one leaf after every step k = 1, 2, ...

    Where weight and score are zero, the past counts no longer.
    """
    total, norm, found = 0.0, 0.0, []
    for t, w in zip(scores, weights, strict=True):
        total = np.where((w == 0) & (t == 0), 0, smoothing * total + t)
        norm = smoothing * norm + 1
        found.append(total / norm)
    return found


def gsm_step(
    weights,
    momenta,
    grads,
    *,
    kept,
    lr,
    beta,
    eta,
    passive_eta=None,
    nesterov=False,
    power=1.0,
    scores=None,
):
    """One step on lists of arrays, all of them prunable: new weights and momenta.

    The choice is by `scores`, if they are given.
    """
    if scores is None:
        pairs = zip(weights, grads, strict=True)
        scores = [importance(w, g, power) for w, g in pairs]
    masks = active(scores, kept)
    new_weights, new_momenta = [], []
    for w, z, g, b in zip(weights, momenta, grads, masks, strict=True):
        w, z, g = (np.asarray(x, np.float64) for x in (w, z, g))
        passive = eta if passive_eta is None else passive_eta
        push = np.where(b, eta * w + g, passive * w)
        z = beta * z + push
        new_momenta.append(z)
        new_weights.append(w - lr * (push + beta * z if nesterov else z))
    return new_weights, new_momenta


def members(units):
    """For each family, for each unit, which entries of every leaf it holds: bools."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(units.like)]
    found = []
    for family in units.families:
        of_family = []
        for unit in range(family.size):
            held = [np.zeros(shape, bool) for shape in shapes]
            for part in family.slices:
                rows = np.moveaxis(held[part.leaf], part.axis, 0)
                rows[part.indices[unit]] = True
            of_family.append(held)
        found.append(of_family)
    return found


def unit_scores(held, scores):
    """The mean score of each unit's entries, over that of its family.

    What is not finite stays as it is, and does not count in the mean of the family.
    """
    wide = _wide(scores)
    mean = lambda unit: np.concatenate(
        [t[m] for t, m in zip(wide, unit, strict=True)]
    ).mean()
    families = [np.array([mean(unit) for unit in family]) for family in held]

    def beside(means):
        finite = np.isfinite(means)
        level = np.where(finite, means, 0).mean()
        return np.where(finite & (level > 0), means / (level or 1), means)

    return list(map(beside, families))


def active_by_unit(held, means, kept, min_units=1):
    """B: all entries of the units of greatest mean that hold no more than `kept`."""
    means = [np.where(np.isnan(m), np.inf, m) for m in means]
    least = [np.sort(m)[::-1][:min_units][-1] if min_units else np.inf for m in means]
    pairs = zip(means, least, strict=True)
    first = [np.where((m >= x) & (m > 0), np.inf, m) for m, x in pairs]
    in_units = [np.any(m, 0) for m in zip(*(u for f in held for u in f), strict=True)]
    best = [np.ones(m.shape, bool) for m in in_units]
    if kept == sum(m.sum() for m in in_units):
        return best
    for level in [np.inf, *np.unique(np.concatenate(first))[::-1]]:
        masks = [np.ones(m.shape, bool) for m in in_units]
        for family, mean in zip(held, first, strict=True):
            for unit, m in zip(family, mean, strict=True):
                if m < level or m == 0:
                    masks = [a & ~b for a, b in zip(masks, unit, strict=True)]
        number = sum((a & b).sum() for a, b in zip(masks, in_units, strict=True))
        if number <= kept or level == np.inf:
            best = masks
    return best
