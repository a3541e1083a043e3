"""The pages' Python blocks run and say the truth; no public name is missing."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gsm_optax
from gsm_optax import magnitude_mask

pytestmark = pytest.mark.optimize(False)

ROOT = Path(__file__).parent.parent
PAGES = [
    path
    for path in (ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in path.read_text()
]


def run(path):
    """Run the `python` blocks of a page in order; other people's code is in `py`."""
    namespace = {}
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S):
        exec(compile(block, str(path), "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def namespaces():
    """Names that a page's blocks leave behind, as a reader's defaults make them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return {path.name: run(path) for path in PAGES}


def test_blocks_run(namespaces):
    assert {"index.md", "from_pytorch.md", "from_jaxpruner.md", "CONTRIBUTING.md"} <= (
        set(namespaces)
    )
    assert jnp.count_nonzero(namespaces["index.md"]["params"]["kernel"]) == 1
    assert jnp.count_nonzero(namespaces["CONTRIBUTING.md"]["updates"]["kernel"]) == 2


def test_links_between_files_lead_somewhere():
    for path in (ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(((?!http|#)[^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


# From PyTorch's GSM code


@pytest.mark.promotes
def test_schedule_is_that_of_the_authors(namespaces):
    """A multi-step schedule: it drops at a boundary, and warms up linearly from 0."""
    steps, warmup = np.arange(280 * 234), 5 * 234
    dropped = np.searchsorted(np.array([160, 200, 240]) * 234, steps, "right")
    wanted = 1e-2 * np.minimum(steps / warmup, 1) * 0.1**dropped
    actual = jax.vmap(namespaces["from_pytorch.md"]["schedule"])(jnp.asarray(steps))
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-7)


def test_counts_on_lenet_300_100(namespaces):
    page = namespaces["from_pytorch.md"]
    kernels = [layer["kernel"] for layer in page["dense"]]
    total = sum(kernel.size for kernel in kernels)
    assert total == 266_200
    assert int(1 / 60 * total) == 4436
    assert total - int(total * (1 - 1 / 60)) == 4437
    for ratio, kept in ((1 - 1 / 60, 4437), (1 - 4436 / 266_200, 4436)):
        assert sum(map(jnp.count_nonzero, magnitude_mask(kernels, ratio))) == kept


def test_ticket_keeps_its_zeros(namespaces):
    page = namespaces["from_pytorch.md"]
    for mask, layer in zip(page["mask"], page["retrained"], strict=True):
        assert not jnp.any(layer["kernel"][~mask["kernel"]])
    assert jnp.any(page["retrained"][-1]["bias"])  # it was trained


def test_weights_from_torch(namespaces):
    from_torch = namespaces["from_pytorch.md"]["from_torch"]
    shapes = {"conv": (20, 1, 5, 3), "dense": (300, 784), "bias": (300,)}
    moved = from_torch({k: np.zeros(s, np.float32) for k, s in shapes.items()})
    assert moved["conv"].shape == (5, 3, 1, 20)
    assert moved["dense"].shape == (784, 300)
    assert moved["bias"].shape == (300,)


# From jaxpruner


@pytest.mark.promotes
def test_cubic_schedule_is_that_of_jaxpruner(namespaces):
    steps = np.arange(100, 1001, 10)
    progress = np.clip(steps + 1 - 100, 0, 900) / 900
    wanted = 0.95 * (1 - (1 - progress) ** 3)
    actual = jax.vmap(namespaces["from_jaxpruner.md"]["cubic"])(jnp.asarray(steps))
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-7)


def test_summary_and_budget_per_layer(namespaces):
    page = namespaces["from_jaxpruner.md"]
    assert page["summary"]["_nparams"] == 64 * 32 + 32 * 10
    # The page cuts what it has cut before, so that a layer may be sparser.
    for name in ("dense/kernel", "head/kernel"):
        assert 0.949 < page["summary"][name] < 1


# The API


def public_objects():
    """Functions and classes of `gsm_optax` and of its public modules, with names."""
    found = {}
    modules = [m.name for m in pkgutil.iter_modules(gsm_optax.__path__)]
    names = [f"gsm_optax.{name}" for name in modules if not name.startswith("_")]
    for module in map(importlib.import_module, ["gsm_optax", *names]):
        for name, value in vars(module).items():
            if name.startswith("_") or not (
                inspect.isclass(value) or inspect.isfunction(value)
            ):
                continue
            # gsm_optax.freezing is made of _freezing and _freezing_schedules.
            own = module.__name__, module.__name__.replace(".", "._")
            if module is gsm_optax or value.__module__.startswith(own):
                found.setdefault(value, f"{module.__name__}.{name}")
    return found


def documented_objects():
    """Objects that the API page names."""
    module, found = None, set()
    for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)", API, re.M):
        if kind == "currentmodule":
            module = importlib.import_module(name)
        elif kind in ("autofunction", "autoclass"):
            found.add(getattr(module, name))
    return found


API = (ROOT / "docs" / "api.md").read_text()


def test_every_public_name_is_documented():
    documented = documented_objects()
    missing = [name for x, name in public_objects().items() if x not in documented]
    assert not missing, f"add to docs/api.md: {', '.join(missing)}"
    assert len(documented) >= 15
    assert all(x.__doc__ for x in documented)
