"""Several processes choose alike, and a run that lost one goes on as if it had not."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "multihost_worker.py"
EXAMPLE = Path(__file__).parent.parent / "examples" / "multihost.py"
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    # One thread for each of the processes here, which share few cores.
    "OMP_NUM_THREADS": "1",
}


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


@contextlib.contextmanager
def started(log, *command):
    """Start a command in a process group of its own, and leave nothing of it behind."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(condition, seconds):
    """Wait until a condition holds; return whether it did in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# The same digests from any number of processes


def digests(count, folder, seconds=120):
    """Run the worker as `count` processes; return what each of them printed."""
    address = free_address()
    logs = [folder / f"{count}-{index}.log" for index in range(count)]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(started(log, WORKER, address, index, count))
            for index, log in enumerate(logs)
        ]
        codes = lambda: [worker.poll() for worker in workers]
        over = lambda: None not in codes() or any(codes())
        in_time = until(over, seconds)
        returned = codes()
    text = [log.read_text() for log in logs]
    assert in_time, "\n".join(text)
    assert returned == [0] * count, "\n".join(text)
    return [re.findall(r"^(Auto|Explicit) (\w{64})$", t, re.M) for t in text]


@pytest.fixture(scope="module")
def digests_of_one_process(tmp_path_factory):
    (alone,) = digests(1, tmp_path_factory.mktemp("alone"))
    assert [kind for kind, _ in alone] == ["Auto", "Explicit"]
    return alone


def test_auto_and_explicit_meshes_agree(digests_of_one_process):
    assert len({digest for _, digest in digests_of_one_process}) == 1


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_agree_with_one(count, digests_of_one_process, tmp_path):
    assert digests(count, tmp_path) == [digests_of_one_process] * count


# A process that dies


EPOCHS = 5
PROCESSES = 2


def training(log, checkpoints):
    """Start `examples/multihost.py` with its own launcher."""
    return started(
        log,
        *(EXAMPLE, "--launch", PROCESSES, "--epochs", EPOCHS),
        *("--checkpoint", checkpoints),
    )


def parameters_of_a_whole_run(folder):
    """Run to the end; return its output and the digest that all processes share."""
    log = folder / "whole.log"
    with training(log, folder / "checkpoints") as launcher:
        assert until(lambda: launcher.poll() is not None, 300), log.read_text()
        assert launcher.returncode == 0, log.read_text()
    found = re.findall(r"parameters ([0-9a-f]{16})", log.read_text())
    assert len(found) == PROCESSES
    assert len(set(found)) == 1
    return log.read_text(), found[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return parameters_of_a_whole_run(tmp_path_factory.mktemp("uninterrupted"))


def worker_pid(launcher, index):
    """Return the process id of a worker; its command line tells which it is."""
    found = subprocess.run(
        ["pgrep", "-P", str(launcher.pid), "-f", f"[-]-process {index}/{PROCESSES}"],
        capture_output=True,
        text=True,
    )
    return int(found.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs pgrep to find a worker")
@pytest.mark.parametrize("victim", range(PROCESSES))
def test_a_run_goes_on_after_a_process_was_killed(victim, uninterrupted, tmp_path):
    checkpoints, log = tmp_path / "checkpoints", tmp_path / "killed.log"
    with training(log, checkpoints) as launcher:
        # Orbax gives a checkpoint its name when it is complete.
        assert until((checkpoints / "1").exists, 240), log.read_text()
        os.kill(worker_pid(launcher, victim), signal.SIGKILL)
        assert until(lambda: launcher.poll() is not None, 60), log.read_text()
        assert launcher.returncode != 0
    assert "parameters" not in log.read_text()  # it died in the middle
    output, parameters = parameters_of_a_whole_run(tmp_path)
    assert re.search("resumed after epoch [1-9]", output)
    assert parameters == uninterrupted[1]
