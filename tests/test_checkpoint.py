"""Orbax brings every state back bit for bit: after a kill, and on another mesh."""

import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_a_killed_run_ends_as_one_that_never_was(tmp_path):
    steps = 4000
    saved = kill_after(60, tmp_path / "killed", steps)
    assert saved < steps
    # From where it was killed to a near end: the schedule belongs to the steps.
    _, wanted = finish(tmp_path / "whole", saved + 200)
    killed = tmp_path / "again"
    kill_after(60, killed, saved + 200)
    text, actual = finish(killed, saved + 200)
    assert "resumed after step" in text
    assert actual == wanted
