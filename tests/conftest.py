"""Strictness for every test: eight CPU devices, no implicit promotion of types."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _strict_dtypes(request):
    """Promotion is strict, but where optax's own schedules and optimizers promote."""
    mode = "standard" if request.node.get_closest_marker("promotes") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield
