"""Every entry for itself: T, and which Q of them are active."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from gsm_optax._importance import Importance, Pair, only_parts, score_leaves, stored
from gsm_optax._placement import AxisName, Leaves, most_entries, shares
from gsm_optax._reductions import ScoreFn, order_key
from gsm_optax._selection import Selection, select
from gsm_optax._smoothing import smooth
from gsm_optax._words import Words, add_words, to_words

Scores = tuple[ScoreFn, Leaves]  # a function, and for each leaf what it is called with


class Entries:
    """The entries of all leaves, to be chosen among one by one.

    Attributes:
        total: N, in words.
        most: no fewer than `total`, known before tracing.
        reserved: entries that are active whatever Q is (of parts, where these are).
        floor: what reserves them.
    """

    floor = "min_kept of every leaf"

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        parts: Sequence[jax.Array] | None = None,
        axis_name: AxisName = None,
        min_kept: int = 0,
    ):
        """Take parameters and their gradients, leaf by leaf.

        Args:
            pairs: (parameter, gradient) of every leaf.
            parts: bool scalars, whether a leaf takes part now; None if all do.
            axis_name: in `shard_map` or `pmap`, the axes that leaves are split over.
            min_kept: entries of every leaf that are active before others are.
        """
        self._pairs, self._parts = pairs, parts
        self._axis_name, self._min_kept = axis_name, min_kept
        self._entries = [share.entries for share in shares(pairs, axis_name)]
        if parts is not None:
            self._entries = [
                (jnp.where(part, high, 0), jnp.where(part, low, 0))
                for (high, low), part in zip(self._entries, parts, strict=True)
            ]
        self.total = add_words(self._entries)
        self.most = most_entries(pairs, axis_name)
        self.reserved = sum(min(min_kept, x.size) for x, _ in pairs)

    def scores(self, importance: Importance) -> Scores:
        """T."""
        return score_leaves(importance, jax.lax.stop_gradient(self._pairs))

    def averaged(
        self, scores: Scores, smoothing: Any, before: Sequence[Any], counts: jax.Array
    ) -> tuple[Scores, list[jax.Array], jax.Array]:
        """The average of T, that by leaf, and over how many steps: see `smooth`."""
        score, leaves = scores
        new = [score(*args) for args in leaves]
        dead = [(x == 0) & (t == 0) for (x, _), t in zip(self._pairs, new, strict=True)]
        after, counts = smooth(smoothing, before, counts, new, dead, self._parts)
        return (stored, [(mean,) for mean in after]), after, counts

    def choose(
        self, scores: Scores, kept: Words, start: jax.Array
    ) -> tuple[Selection, list[jax.Array]]:
        """B of every leaf, and what the choice came to.

        Args:
            scores: what is compared.
            kept: Q, in words.
            start: float32 scalar, a guess of the threshold: it saves passes, no more.
        """
        score, leaves = scores
        if self._parts is not None:
            score, leaves = only_parts(score, leaves, self._parts)
        if self._min_kept:
            score, leaves = self._with_floor(score, leaves)
        found = select(
            score,
            leaves,
            kept,
            self.total,
            start,
            most=self.most,
            axis_name=self._axis_name,
        )
        active = [order_key(score(*args)) >= found.key for args in leaves]
        if self._parts is not None:
            active = list(map(jnp.logical_and, self._parts, active))
        return found, active

    def _with_floor(self, score: ScoreFn, leaves: Leaves) -> Scores:
        """Scores of which the greatest of every leaf are above all others."""
        raised = []
        for args, entries in zip(leaves, self._entries, strict=True):
            most = most_entries([args], self._axis_name)
            found = select(
                score,
                [args],
                to_words(min(self._min_kept, most)),
                entries,
                jnp.float32(0),
                most=most,
                axis_name=self._axis_name,
            )
            raised.append((*args, found.key))
        return _raised(score), raised


@cache  # one function each, because jit knows functions by their identity
def _raised(score: ScoreFn) -> ScoreFn:
    """Score that is inf where it is positive and reaches the order key that is last."""

    def raised(*args):
        own = score(*args[:-1])
        return jnp.where((order_key(own) >= args[-1]) & (own > 0), jnp.inf, own)

    return raised
