"""How settled a layer is: its activations, and the places of its largest weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gsm_optax._entries import Entries
from gsm_optax._pruning import greatest
from gsm_optax._words import to_words


class LinearCKA(NamedTuple):
    r"""Linear CKA of two layers, batch by batch: a pytree that holds no examples.

    Its value after all batches is that of `linear_cka` on their rows together, in
    memory of :math:`p^2 + q^2 + pq` numbers for :math:`p` and :math:`q` features. It
    works inside jit and `lax.scan`. There is no debiased form of it: give it many more
    rows than features, and the bias is small. Features are squared as they are: their
    spread is to be between 1e-18 and 1e18, or scaled first.

    Example:
        >>> import jax
        >>> from gsm_optax.similarity import LinearCKA
        >>> x = jax.random.normal(jax.random.key(0), (100, 4))
        >>> cka = LinearCKA.start(4, 8)
        >>> for batch in x.reshape(4, 25, 4):
        ...     cka = cka.update(batch, jax.numpy.concatenate([batch, -batch], 1))
        >>> print(f"{cka.value():.3f}")
        1.000
    """

    count: jax.Array  # int32, shape (): rows so far
    mean_x: jax.Array  # float32, shape (p,)
    mean_y: jax.Array  # float32, shape (q,)
    xx: jax.Array  # float32, shape (p, p): XᵀX of centred columns
    yy: jax.Array  # float32, shape (q, q)
    xy: jax.Array  # float32, shape (p, q)

    @classmethod
    def start(cls, p: int, q: int) -> "LinearCKA":
        """Return the accumulator for `p` and `q` features, before any row."""
        zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
        count = jnp.zeros((), jnp.int32)
        return cls(count, zeros(p), zeros(q), zeros(p, p), zeros(q, q), zeros(p, q))

    def update(self, x: jax.Array, y: jax.Array) -> "LinearCKA":
        """Add the activations of a batch, shapes (rows, p) and (rows, q).

        Raises:
            ValueError: for other shapes.
        """
        x, y = _rows(x, y)
        if x.shape[1:] != self.mean_x.shape or y.shape[1:] != self.mean_y.shape:
            raise ValueError(
                f"x has {x.shape[1]} and y {y.shape[1]} features, but this was started "
                f"for {self.mean_x.size} and {self.mean_y.size}."
            )
        (x, mean_x), (y, mean_y) = _centre(x), _centre(y)
        # Sums about the mean of each batch, and then what the means differ by (Chan et
        # al., 1979): sums of raw squares would cancel where the mean is large.
        rows, old = jnp.float32(len(x)), self.count.astype(jnp.float32)
        by_x, by_y = mean_x - self.mean_x, mean_y - self.mean_y
        weight, step = rows * old / (rows + old), rows / (rows + old)

        def add(total, a, b, by_a, by_b):
            return total + _product(a.T, b) + weight * jnp.outer(by_a, by_b)

        return LinearCKA(
            self.count + len(x),
            self.mean_x + step * by_x,
            self.mean_y + step * by_y,
            add(self.xx, x, x, by_x, by_x),
            add(self.yy, y, y, by_y, by_y),
            add(self.xy, x, y, by_x, by_y),
        )

    def value(self) -> jax.Array:
        """Return CKA of all rows so far, as `linear_cka` does: float32, shape ()."""
        scale_x, scale_y = jnp.max(jnp.diag(self.xx)), jnp.max(jnp.diag(self.yy))
        # No entry exceeds these, so that nothing overflows when it is squared.
        common = self.xy / jnp.sqrt(scale_x) / jnp.sqrt(scale_y)
        norms = jnp.linalg.norm(self.xx / scale_x) * jnp.linalg.norm(self.yy / scale_y)
        return jnp.sum(common**2) / norms


def linear_cka(x: jax.Array, y: jax.Array, *, debiased: bool = False) -> jax.Array:
    r"""Linear centred kernel alignment: how alike two layers represent the same inputs.

    .. math::
        \mathrm{CKA}(X, Y) = \frac{\|Y^T X\|_F^2}{\|X^T X\|_F \, \|Y^T Y\|_F}

    with the columns of :math:`X` and :math:`Y` centred (Kornblith et al., 2019). It is
    1 for representations that differ by a rotation and a common scale only, and does
    not change under these; the numbers of features need not be the same. Activations of
    a convolution are flattened first, `x.reshape(len(x), -1)`.

    This is what Kornblith et al. (2019) define, and with them the layer freezing of
    Yuan et al. (2022). It is biased upwards where examples are few for the features:
    32 examples of independent layers give 0.2 with 8 features each, 0.97 with 1000.
    `debiased=True` puts the unbiased estimate of the Hilbert-Schmidt independence
    criterion (Song et al., 2012) in numerator and denominator, as Nguyen et al. (2021)
    do: near 0 for independent layers, however few the examples.

    .. math::
        n(n-3)\,\mathrm{HSIC}_1(X, Y) = \|X^T Y\|_F^2
        - \frac{n}{n-2} \sum_i |x_i|^2 |y_i|^2
        + \frac{\|X\|_F^2 \, \|Y\|_F^2}{(n-1)(n-2)}

    For more examples than fit into memory see `LinearCKA`.

    Args:
        x: activations of one layer, shape (n, p); computed with in float32.
        y: activations of the other on the same inputs, shape (n, q).
        debiased: whether to estimate without bias; needs four examples.

    Returns:
        A float32 scalar in [0, 1], but for rounding; NaN if all features of one of them
        are constant, because then there is nothing to align. Debiased in [-1, 1]:
        independent layers are spread about 0, so it can be slightly negative. It is
        also NaN where the denominator is lost in rounding, as for a layer that only
        tells one example from the rest, or tells all apart equally.

    Raises:
        ValueError: if they are not matrices with the same number of rows, or of fewer
            than four if `debiased`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gsm_optax.similarity import linear_cka
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> print(f"{linear_cka(x, 3 * x[:, ::-1] + 1):.3f}")
        1.000
        >>> print(f"{linear_cka(x, x * jnp.array([[1.0, 0.0]])):.3f}")
        0.7...

    References:
        Kornblith et al., *Similarity of Neural Network Representations Revisited*,
        ICML 2019, https://arxiv.org/abs/1905.00414

        Song et al., *Feature Selection via Dependence Maximization*, JMLR 13 (2012),
        equation 4

        Nguyen et al., *Do Wide and Deep Networks Learn the Same Things?*, ICLR 2021,
        https://arxiv.org/abs/2010.15327
    """
    x, y = map(_standard, _rows(x, y))
    if debiased:
        return _debiased_cka(x, y)
    if len(x) >= max(x.shape[1], y.shape[1]):
        return LinearCKA.start(x.shape[1], y.shape[1]).update(x, y).value()
    # With fewer examples than features the n × n products are smaller, and since
    # ‖YᵀX‖² = ⟨XXᵀ, YYᵀ⟩ they say the same.
    k, l = _product(x, x.T), _product(y, y.T)  # noqa: E741
    k, l = k / jnp.max(jnp.diag(k)), l / jnp.max(jnp.diag(l))  # noqa: E741
    return jnp.sum(k * l) / (jnp.linalg.norm(k) * jnp.linalg.norm(l))


def _debiased_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    n = len(x)
    if n < 4:
        raise ValueError(
            f"x{list(x.shape)} and y{list(y.shape)} have {n} rows, but a debiased CKA "
            "needs 4 or more: give more examples, or leave debiased out."
        )
    hsic = _hsic_of_features if n >= max(x.shape[1], y.shape[1]) else _hsic_of_examples
    (common, _), (own_x, known_x), (own_y, known_y) = hsic(x, y), hsic(x, x), hsic(y, y)
    value = common / jnp.sqrt(own_x) / jnp.sqrt(own_y)
    return jnp.where(known_x & known_y, value, jnp.nan)


def _hsic_of_features(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """n(n−3) HSIC₁ of centred rows, and whether it stands out from the rounding."""
    n = len(x)
    by_row = jnp.sum(x * x, 1), jnp.sum(y * y, 1)
    square = jnp.sum(_product(x.T, y) ** 2)
    own = n / (n - 2) * jnp.sum(by_row[0] * by_row[1])
    hsic = square - own + jnp.sum(by_row[0]) * jnp.sum(by_row[1]) / (n - 1) / (n - 2)
    return hsic, hsic > 1e-4 * (square + own)


def _hsic_of_examples(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, by products of n × n: with many features its terms would cancel."""
    u, v = _u_centred(_product(x, x.T)), _u_centred(_product(y, y.T))
    scale = jnp.max(jnp.sum(x * x, 1)) * jnp.max(jnp.sum(y * y, 1))
    hsic = jnp.sum(u * v)
    return hsic, hsic > 1e-9 * len(x) ** 2 * scale


def _u_centred(k: jax.Array) -> jax.Array:
    """Off the diagonal, where every row and column then sums to 0; and 0 on it."""
    n = len(k)
    off = ~jnp.eye(n, dtype=bool)
    k = jnp.where(off, k, 0)
    rows = jnp.sum(k, 1, keepdims=True) / (n - 2)
    return jnp.where(off, k - rows - rows.T + jnp.sum(rows) / (n - 1), 0)


def mask_overlap(a: Any, b: Any) -> jax.Array:
    r"""Fraction of the positions that two masks have in common.

    .. math::
        \frac{2\,|A \cap B|}{|A| + |B|}

    For masks of equally many positions, the fraction of them that is in both.

    Args:
        a: a mask: a bool array, or a pytree of them, counted together.
        b: the other one, same structure and shapes.

    Returns:
        A float32 scalar in [0, 1]; NaN if both are empty.

    Raises:
        ValueError: if structures, shapes or dtypes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax.similarity import mask_overlap
        >>> a, b = jnp.array([True, True, False]), jnp.array([False, True, True])
        >>> print(mask_overlap(a, b))
        0.5
    """
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(
            f"the masks have different structures: {jax.tree.structure(a)} and "
            f"{jax.tree.structure(b)}."
        )
    leaves = (map(jnp.asarray, jax.tree.leaves(tree)) for tree in (a, b))
    pairs = list(zip(*leaves, strict=True))
    for x, y in pairs:
        if x.shape != y.shape or x.dtype != bool or y.dtype != bool:
            raise ValueError(
                f"masks must be bool arrays of the same shapes, not {x.dtype}"
                f"{list(x.shape)} and {y.dtype}{list(y.shape)}."
            )
    common = sum((_number(x & y) for x, y in pairs), jnp.float32(0))
    both = sum((_number(x) + _number(y) for x, y in pairs), jnp.float32(0))
    return 2 * common / both


def structural_similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """How alike the largest weights of a layer are placed in two models.

    The fraction of positions in common between the larger half of the non-zero weights
    in one and in the other (Yuan et al., 2022). A half is rounded up, and weights that
    tie with its smallest are in it. For whole models `jax.tree.map(
    structural_similarity, params, final_params)`.

    Args:
        a: the weights of a layer, any shape.
        b: its weights in the other model, same shape.

    Returns:
        A float32 scalar in [0, 1], the `mask_overlap` of the two halves; NaN if all
        weights are zero, or one is NaN.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from gsm_optax.similarity import structural_similarity
        >>> a, b = jnp.array([4.0, -3.0, 2.0, 1.0, 0.0]), jnp.array([4.0, 1, 2, 0.5, 0])
        >>> print(structural_similarity(a, b))
        0.5
    """
    value = mask_overlap(_larger_half(a), _larger_half(b))
    return jnp.where(jnp.isnan(a).any() | jnp.isnan(b).any(), jnp.nan, value)


@jax.jit
def _larger_half(weights: jax.Array) -> jax.Array:
    weights = jnp.asarray(weights)
    half = (jnp.count_nonzero(weights).astype(jnp.int32) + 1) // 2
    return greatest(Entries([(weights, weights)]), to_words(half))[0]


def _number(mask: jax.Array) -> jax.Array:
    return jnp.count_nonzero(mask).astype(jnp.float32)


def _rows(x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
    """Return both as float32 matrices of equally many rows, or raise `ValueError`."""
    x, y = map(jnp.asarray, (x, y))
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        raise ValueError(
            f"x is {x.dtype} and y {y.dtype}, but this is for real numbers: give the "
            "parts side by side, jnp.concatenate([x.real, x.imag], 1)."
        )
    x, y = (a.astype(jnp.float32) for a in (x, y))
    shapes = x.shape, y.shape
    if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"x{list(shapes[0])} and y{list(shapes[1])} must be matrices with a row "
            "for each of the same examples: x.reshape(len(x), -1)."
        )
    if 0 in shapes[0] + shapes[1]:
        raise ValueError(f"x{list(shapes[0])} or y{list(shapes[1])} is empty.")
    return x, y


def _centre(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the rows minus their mean, and the mean; constants become exactly zero."""
    shifted = x - x[:1]
    mean = jnp.mean(shifted, 0, keepdims=True)
    return shifted - mean, (x[:1] + mean)[0]


def _standard(x: jax.Array) -> jax.Array:
    """Centred, the greatest entry 1, so that no square overflows; NaN if constant."""
    x, _ = _centre(x)
    return x / jnp.max(jnp.abs(x))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")
