"""One process of `test_multihost.py`: train on a mesh over all of them, print digests.

python multihost_worker.py HOST:PORT INDEX COUNT
"""

import hashlib
import os
import sys
import traceback

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from gsm_optax import gsm_sgd

DEVICES = 4  # of all processes together
STEPS = 5
LAYOUT = {
    "both": ((32, 48), P("x", "y")),
    "flat": ((24, 16), P(("x", "y"))),
    "replicated": ((7, 5), P()),
    "bias": ((40,), P("x")),
}


def draw(mesh, seed):
    """Draw the same global tree everywhere; a process keeps the shards it holds."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, (shape, spec) in LAYOUT.items():
        leaf = rng.normal(size=shape).astype(np.float32)
        sharding = NamedSharding(mesh, spec)
        tree[name] = jax.make_array_from_callback(shape, sharding, leaf.__getitem__)
    return tree


def digest(mesh):
    """Train, and hash updates, parameters and state of every step."""
    # Powers of two, so that no compiler can round a product.
    tx = gsm_sgd(2**-3, ratio=0.9, momentum=0.5, weight_decay=2**-7)
    params = draw(mesh, 0)
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, mesh, params))(params)
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    sha = hashlib.sha256()
    for seed in range(1, STEPS + 1):
        params, state, updates = step(params, state, draw(mesh, seed))
        for leaf in jax.tree.leaves(whole((params, state, updates))):
            sha.update(np.asarray(leaf.addressable_data(0)).tobytes())
    return sha.hexdigest()


def state_shardings(tx, mesh, params):
    """Momentum lies as the parameters do, scalars are everywhere."""
    scalars = jax.tree.map(
        lambda _: NamedSharding(mesh, P()), jax.eval_shape(tx.init, params)
    )
    return optax.tree.set(scalars, trace=jax.tree.map(lambda x: x.sharding, params))


def main(address, index, count):
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    jax.distributed.initialize(address, count, index, initialization_timeout=60)
    assert (jax.process_count(), jax.device_count()) == (count, DEVICES)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh):
            print(kind.name, digest(mesh), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    except BaseException:
        # Waiting for the others at exit would hold up the test until its deadline.
        traceback.print_exc()
        os._exit(1)
