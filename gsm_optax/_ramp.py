"""A ratio that rises, so that the network has time to give up its entries."""

import optax

from gsm_optax._checks import check_count, check_ratio, is_static


def ratio_ramp(ratio: float, steps: int, start: float = 0.0) -> optax.Schedule:
    r"""Make a schedule that raises the pruned fraction, steeply at first.

    .. math::
        r_k = r + (r_0 - r) \left(1 - \frac{\min(k, n)}{n}\right)^3

    (Zhu and Gupta, 2017, equation 1), for the `ratio` of `gsm_sgd`. Entries that turn
    passive last have the least time to decay: what counts is the `decay_budget` of the
    steps after the ramp, or, nearly always, a strong `passive_decay`.

    Args:
        ratio: r, the fraction of the prunable entries at the end, in [0, 1).
        steps: n, the number of optimizer steps until then; at least 1.
        start: :math:`r_0`, the fraction at the first step, in [0, 1).

    Returns:
        An optax schedule: step in, float32 scalar out.

    Raises:
        ValueError: for arguments outside their range.

    Example:
        >>> from gsm_optax import ratio_ramp
        >>> ramp = ratio_ramp(0.9, steps=1000)
        >>> [round(float(ramp(step)), 2) for step in (0, 250, 500, 1000, 2000)]
        [0.0, 0.52, 0.79, 0.9, 0.9]

    References:
        Zhu and Gupta, *To prune, or not to prune: exploring the efficacy of pruning for
        model compression*, 2017, https://arxiv.org/abs/1710.01878
    """
    for name, value in {"ratio": ratio, "start": start}.items():
        if not is_static(value):
            raise ValueError(f"{name}={value!r} must be a number in [0, 1).")
        check_ratio(value, name)
    check_count("steps", steps, 1, "the optimizer steps of the ramp")
    return optax.polynomial_schedule(start, ratio, power=3, transition_steps=steps)
