"""Trees that the tests draw, lay out on meshes and compare."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

# Drawing


def drawn(shapes, make):
    """Put `make(shape)` in the place of every shape of a tree of shapes."""
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    return jax.tree.map(make, shapes, is_leaf=is_shape)


def normal(shapes, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return drawn(shapes, lambda shape: jnp.asarray(rng.normal(size=shape), dtype))


def with_ties(shapes, seed=0):
    """Draw many ties, zeros, and magnitudes over several decades, in NumPy."""
    rng = np.random.default_rng(seed)
    ties = np.float32([0, 1e-9, 1e-5, 1e-3, 0.5, 2])

    def make(shape):
        chosen, other = rng.choice(ties, shape), rng.normal(size=shape)
        return np.where(rng.random(shape) < 0.3, chosen, other).astype(np.float32)

    return drawn(shapes, make)


def first_step(tx, grads, params, **extra):
    """Return updates and state; one compilation is quicker than one an operation."""
    return jax.jit(tx.update)(grads, tx.init(params), params, **extra)


# Comparing


def pairs(actual, wanted):
    """Give (path, leaf, leaf) of two trees of one structure."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    leaves = jax.tree.leaves_with_path(actual)
    for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        yield jax.tree_util.keystr(path), a, b


def assert_same(actual, wanted):
    """Bit for bit."""
    for path, a, b in pairs(actual, wanted):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, path
        assert a.tobytes() == b.tobytes(), path


def assert_close(actual, wanted, rtol=1e-6, atol=1e-7):
    for path, a, b in pairs(actual, wanted):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)


# Laying out


@contextlib.contextmanager
def mesh_of(mode, shape=(4, 2), names=("x", "y")):
    """Make a mesh that is "auto", "auto, set_mesh" or "explicit"."""
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))
    with contextlib.nullcontext() if mode == "auto" else jax.set_mesh(mesh):
        yield mesh


def place(tree, mesh, layout):
    """Lay out a dict of arrays; the layout may know of more than these."""
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, layout[name]))
        for name, leaf in tree.items()
    }


def place_scalars(state, mesh):
    """Copy the scalars of a state to all devices: its big leaves are where they are."""
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, everywhere), state)
