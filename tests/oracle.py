"""The paper's equations in NumPy, written without a look at the implementation."""

from fractions import Fraction

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


def gsm_step(weights, momenta, grads, *, kept, lr, beta, eta, nesterov=False):
    """One step on lists of arrays, all of them prunable: new weights and momenta."""
    masks = active([_product(w, g) for w, g in zip(weights, grads, strict=True)], kept)
    new_weights, new_momenta = [], []
    for w, z, g, b in zip(weights, momenta, grads, masks, strict=True):
        w, z, g = (np.asarray(x, np.float64) for x in (w, z, g))
        push = eta * w + np.where(b, g, 0)
        z = beta * z + push
        new_momenta.append(z)
        new_weights.append(w - lr * (push + beta * z if nesterov else z))
    return new_weights, new_momenta


def _product(w, g):
    return np.abs(np.asarray(w, np.float32) * np.asarray(g, np.float32))
