"""`nox` runs the tests with the oldest and with the newest supported versions."""

import nox

nox.options.default_venv_backend = "uv"


@nox.session
@nox.parametrize("resolution", ["lowest-direct", "highest"])
def tests(session, resolution):
    """Install as pyproject.toml declares it, the lowest or the highest, and test."""
    session.install("-e", ".[dev]", env={"UV_RESOLUTION": resolution})
    session.run("uv", "pip", "list", external=True)
    # Warnings are errors; but old versions use what has been deprecated since.
    lenient = ["-W", "default::DeprecationWarning"] if "lowest" in resolution else []
    session.run("pytest", *lenient, *session.posargs)
