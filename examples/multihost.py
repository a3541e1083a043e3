"""The digits job on several processes, sharded: what to adapt to a pod or a cluster.

    python examples/multihost.py --launch 2      # try it: two processes on this machine

On a cluster, start the same script once per host and leave `--launch` away:
`jax.distributed.initialize()` finds the other processes by itself on TPU pod slices,
under SLURM (`srun python examples/multihost.py`), Open MPI and Kubernetes (GKE).

Parameters and momentum are split over all devices (FSDP), batches over all devices, and
every process ends with the same parameters and the same mask. With `--checkpoint DIR`
(a folder that all hosts see) a run that was killed goes on from its last checkpoint,
bit for bit.
"""

import argparse
import hashlib
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from prune_digits import BATCH, GSM_RECIPE, MLP, load_data, steps_schedule

from gsm_optax import gsm_sgd, prune, sparsity_report

RATIO = 0.9


def fsdp(mesh, tree):
    """Shardings that split every matrix over its first axis that the devices divide."""

    def split(leaf):
        for axis, size in enumerate(leaf.shape):
            if leaf.ndim > 1 and size % mesh.size == 0:
                return NamedSharding(mesh, P(*[None] * axis, "data"))
        return NamedSharding(mesh, P())

    return jax.tree.map(split, tree)


def global_batches(mesh, images, labels, epoch):
    """Yield the batches of an epoch as global arrays; a process brings its own rows."""
    order = np.random.default_rng(epoch).permutation(len(images))
    mine = np.array_split(np.arange(BATCH), jax.process_count())[jax.process_index()]
    sharding = NamedSharding(mesh, P("data"))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[start : start + BATCH][mine]
        yield tuple(
            jax.make_array_from_process_local_data(sharding, array[rows])
            for array in (images, labels)
        )


def train(args, mesh):
    """Train with GSM, from the last checkpoint if there is one; return the network."""
    (images, labels), _ = load_data()
    graph, params = nnx.split(MLP(nnx.Rngs(0)))
    params = jax.device_put(params, fsdp(mesh, params))
    steps = args.epochs * (len(images) // BATCH)
    tx = gsm_sgd(steps_schedule(3e-2, steps), RATIO, **GSM_RECIPE)
    split = fsdp(mesh, jax.eval_shape(tx.init, params))
    state = jax.jit(tx.init, out_shardings=split)(params)

    def train_step(params, state, images, labels):
        def loss(params):
            logits = nnx.merge(graph, params)(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    train_step = jax.jit(
        train_step,
        donate_argnums=(0, 1),
        out_shardings=(fsdp(mesh, params), fsdp(mesh, state)),
    )

    checkpoints, start = open_checkpoints(args.checkpoint), 0
    if checkpoints and checkpoints.latest_step() is not None:
        start = checkpoints.latest_step()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
        restored = checkpoints.restore(start, args=ocp.args.StandardRestore(target))
        params, state = restored
        say(f"resumed after epoch {start}")
    for epoch in range(start, args.epochs):
        for batch in global_batches(mesh, images, labels, epoch):
            params, state = train_step(params, state, *batch)
        active = int(optax.tree.get(state, "num_active"))
        say(f"epoch {epoch + 1}/{args.epochs}: {active:,} entries active")
        if checkpoints:
            checkpoints.save(
                epoch + 1, args=ocp.args.StandardSave((params, state)), force=True
            )
            checkpoints.wait_until_finished()
    return graph, params


def open_checkpoints(folder):
    """Return an Orbax manager that keeps the last two checkpoints, or None."""
    if folder is None:
        return None
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    return ocp.CheckpointManager(folder.resolve(), options=options)


def report(graph, params):
    """Prune and print accuracy, density and a digest that all processes must share."""
    params = prune(params, RATIO)
    sparse = sparsity_report(params).prunable
    everywhere = multihost_utils.process_allgather(params, tiled=True)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(everywhere):
        digest.update(np.asarray(leaf).tobytes())
    model = nnx.merge(graph, jax.tree.map(jnp.asarray, everywhere))
    images, labels = load_data()[1]
    accuracy = 100 * np.mean(np.argmax(model(images), -1) == labels)
    print(
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{accuracy:.2f} % with {sparse.nonzero:,} of {sparse.entries:,} entries, "
        f"parameters {digest.hexdigest()[:16]}",
        flush=True,
    )


def say(text):
    """Print once for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def launch(args, argv):
    """Start `args.launch` local processes; if one of them fails, end the others."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    common = [sys.executable, __file__, *argv, "--coordinator", address]
    workers = [
        subprocess.Popen([*common, "--process", f"{i}/{args.launch}"])
        for i in range(args.launch)
    ]
    while any(worker.poll() is None for worker in workers):
        if any(worker.poll() for worker in workers):
            print("a process failed: stopping the others", file=sys.stderr)
            for worker in workers:
                worker.kill()
        time.sleep(0.1)
    sys.exit(int(any(worker.returncode for worker in workers)))


def work(args):
    """Join the other processes, train, report."""
    if args.process:
        index, count = map(int, args.process.split("/"))
        jax.distributed.initialize(args.coordinator, count, index)
    else:
        jax.distributed.initialize()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    say(f"{jax.process_count()} processes, {jax.device_count()} devices")
    report(*train(args, mesh))


def main(argv=None):
    """Read the command line and start one process or several."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launch", type=int, help="start this many local processes")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of GSM")
    parser.add_argument("--checkpoint", type=Path, help="folder to save to and resume")
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--process", help="this process, as INDEX/COUNT")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.launch and not args.process:
        launch(args, argv)
    try:
        work(args)
    except BaseException:
        # Without this a process that raised would wait for the others to finish, and
        # they for it in the next all-reduce, until a timeout of minutes.
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
