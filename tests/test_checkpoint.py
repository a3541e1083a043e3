"""Orbax brings every state back bit for bit: after a kill, and on another mesh."""

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from trees import assert_same, normal

from gsm_optax import (
    freeze_pruned,
    gsm,
    gsm_sgd,
    magnitude_mask,
)

pytestmark = pytest.mark.optimize(False)

EXAMPLE = Path(__file__).parent.parent / "examples" / "resume.py"
LAST_LINES = 2  # of what the example prints: accuracy, and digests


def command(folder, steps):
    return [
        *(sys.executable, str(EXAMPLE)),
        *("--folder", str(folder), "--steps", str(steps), "--every", "20"),
    ]


def finish(folder, steps):
    """Run to the end; return all that was printed, and the last lines of it."""
    done = subprocess.run(
        command(folder, steps), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stdout.splitlines()[-LAST_LINES:]


def kill_after(checkpoint, folder, steps):
    """Start a run and kill it, without a warning, once that checkpoint is there."""
    with subprocess.Popen(
        command(folder, steps), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if latest(folder) >= checkpoint:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    return latest(folder)


def latest(folder):
    steps = [int(x.name) for x in Path(folder).glob("*") if x.name.isdigit()]
    return max(steps, default=0)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_never_was(tmp_path):
    steps = 600
    saved = kill_after(60, tmp_path / "killed", steps)
    assert saved < steps
    text, actual = finish(tmp_path / "killed", steps)
    assert "resumed after step" in text
    _, wanted = finish(tmp_path / "whole", steps)
    assert actual == wanted


# Every state


def parameters():
    params = normal({"kernel": (16, 8), "bias": (8,), "half": (8, 8)})
    return params | {"half": params["half"].astype("bfloat16")}


def gradients(step):
    return jax.tree.map(lambda x: jnp.roll(x, step + 1), parameters())


TRANSFORMATIONS = {
    "gsm": gsm(0.75, accumulator_dtype=jnp.float32),
    "gsm_sgd, schedules": gsm_sgd(
        optax.linear_schedule(0.1, 0.0, 10),
        optax.linear_schedule(0.0, 0.75, 5),
        track_churn=True,
    ),
    "freeze_pruned": freeze_pruned(magnitude_mask(parameters(), 0.5)),
    # A name, because jnp.float32 can be called and would be taken for a schedule.
    "inject_hyperparams": optax.inject_hyperparams(
        gsm_sgd, hyperparam_dtype=jnp.float32
    )(0.1, 0.75, accumulator_dtype="float32"),
}


@pytest.fixture(params=TRANSFORMATIONS)
def tx(request):
    return TRANSFORMATIONS[request.param]


@partial(jax.jit, static_argnums=0)
def step_of(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx, params, state, steps):
    for step in steps:
        put = lambda g, p: jax.device_put(g, p.sharding)
        grads = jax.tree.map(put, gradients(step), params)
        params, state = step_of(tx, grads, state, params)
    return params, state


def restored(folder, tree, target):
    """Save the tree, and read it back into the structure of `target`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "0", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "0", target)


@pytest.mark.promotes
def test_every_state_comes_back_and_goes_on_bit_for_bit(tx, tmp_path):
    params = parameters()
    half = train(tx, params, tx.init(params), range(3))
    one = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    target = placed((params, tx.init(params)), one)  # old versions warn without a place
    back = restored(tmp_path, half, target)
    assert_same(back, half)
    assert_same(train(tx, *back, range(3, 6)), train(tx, *half, range(3, 6)))


def placed(tree, mesh):
    """Shapes on that mesh: kernels are split, the rest is on every device."""

    def place(x):
        spec = P(mesh.axis_names[0]) if x.ndim > 1 else P()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(place, tree)


# One row has every kind of leaf: like the parameters, their masks, and scalars.
@pytest.mark.promotes
@pytest.mark.parametrize("tx", ["gsm_sgd, schedules"], indirect=True)
def test_every_state_moves_to_another_mesh(tx, tmp_path):
    """Saved from eight devices, restored onto two, and then as on one."""
    kinds = (AxisType.Auto,)
    eight = jax.make_mesh((8,), ("x",), axis_types=kinds)
    two = jax.make_mesh((2,), ("y",), axis_types=kinds, devices=jax.devices()[:2])
    params = parameters()
    start = params, tx.init(params)
    put = lambda x, where: jax.device_put(x, where.sharding)
    there = train(tx, *jax.tree.map(put, start, placed(start, eight)), range(3))
    here = restored(tmp_path, there, placed(start, two))
    assert here[0]["kernel"].sharding == NamedSharding(two, P("y"))
    ended, wanted = train(tx, *here, range(3, 6)), train(tx, *start, range(6))
    for a, b in zip(jax.tree.leaves(ended), jax.tree.leaves(wanted), strict=True):
        assert a.sharding.device_set == set(jax.devices()[:2])
        tolerance = 2e-2 if a.dtype == jnp.bfloat16 else 1e-6
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-7)
