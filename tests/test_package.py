"""What `import gsm_optax` brings."""

import subprocess
import sys


def test_import_pulls_in_jax_and_optax_only():
    code = "import sys, jax, optax; a = set(sys.modules); import gsm_optax; "
    code += "print(*{m.split('.')[0] for m in set(sys.modules) - a})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    new = set(run.stdout.split()) - set(sys.stdlib_module_names)
    assert new == {"gsm_optax"}
