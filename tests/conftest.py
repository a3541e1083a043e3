"""Eight CPU devices, no implicit promotion of types, and shared compilations."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# What any Python and JAX is to pass within two minutes, `pytest -m core`: the files
# whose names start like this.
CORE = (
    "test_selection",
    "test_masking",
    "test_sharding",
    "test_freezing",
    "test_contracts",
)


def pytest_collection_modifyitems(items):
    """Mark the core tests."""
    for item in items:
        slow = item.get_closest_marker("slow")
        if item.path.stem.startswith(CORE) and not slow:
            item.add_marker("core")


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Let tests share what they compile, which is most of what they do.

    In a folder of this session and worker: JAX writes it without a lock, and a cache
    that outlives the session could be left broken by a run that was killed.
    """
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


@pytest.fixture(autouse=True)
def _strict_dtypes(request):
    """Promotion is strict, but where optax's own schedules and optimizers promote."""
    mode = "standard" if request.node.get_closest_marker("promotes") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield
