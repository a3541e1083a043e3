"""Eight CPU devices, no implicit promotion of types, and shared compilations."""

import os

import jax
import pytest

# XLA splits a program into 32 parts, to compile them at once. That takes a quarter more
# time in all, and the workers of pytest have the cores.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    # XLA's emitters of fusions take twice as long to compile as what was there before
    # them, and five times without LLVM's optimizations. Newer versions have no other
    # way, so that `pytest -m core`, which is for these, compiles as users do.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# What `pytest -m core` runs, which is to pass on any Python and JAX within two minutes:
CORE = (
    "test_selection",
    "test_masking",
    "test_sharding",
    "test_freezing",
    "test_contracts",
)
# files whose name starts like one of these, without their slowest tests.
NOT_CORE = (
    "test_auto_mesh_one_all_reduce_a_pass_if_all_is_split_alike",
    "test_bfloat16_keeps_its_dtype",
    "test_budget_is_exact_for_any_static_ratio",
    "test_choice_is_the_definition_over_the_leaves_that_take_part",
    "test_devices_exchange_as_many_bytes_for_larger_leaves",
    "test_devices_exchange_as_often_for_more_leaves",
    "test_devices_exchange_scalars_only",
    "test_flatten_needs_prunable_and_chooses_the_same",
    "test_gradients_through_update_are_those_of_the_finite_difference",
    "test_injected_is_the_plain_one",
    "test_nested_it_freezes_what_either_freezes",
    "test_the_rest_trains_as_though_the_frozen_blocks_were_not_there",
    "test_transformer_step_compiles_from_shapes_alone",
    "test_without_a_frozen_block_it_is_the_optimizer_itself",
)

# Files that take longest come first, so that no worker waits for the other at the end.
LONG = ("test_unit_training", "test_shrink", "test_sharding", "test_smoothing")


def pytest_collection_modifyitems(items):
    """Mark the core tests; of each file, the tests that are optimized come first."""
    for item in items:
        name = getattr(item, "originalname", item.name)
        slow = item.get_closest_marker("slow") or name in NOT_CORE
        if item.path.stem.startswith(CORE) and not slow:
            item.add_marker("core")
    paths = sorted(
        dict.fromkeys(x.path for x in items), key=lambda p: p.stem not in LONG
    )
    items.sort(key=lambda item: (paths.index(item.path), not is_optimized(item)))


# Most of the time goes into compiling, and three quarters of that into LLVM's passes. A
# test whose subject they do not touch goes without, marked by `optimize(False)`. Those
# that compare the bits of two programs, or read a compiled one, compile as users do.


def is_optimized(item):
    mark = item and item.get_closest_marker("optimize")
    return mark is None or mark.args[0]


def pytest_runtest_setup(item):
    """Compile for this test as it is marked."""
    _optimize(is_optimized(item))


def pytest_runtest_teardown(item, nextitem):
    """Compile for the next one as it is marked; a doctest has no setup here."""
    _optimize(is_optimized(nextitem))


def _optimize(whether):
    global optimized
    if whether != optimized:
        optimized = whether
        jax.config.update("jax_disable_most_optimizations", not whether)
        jax.clear_caches()  # what was compiled otherwise must not be used again


optimized = True


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
