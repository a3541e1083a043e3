"""The README's Python blocks run, in order, and its commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.promotes
@pytest.mark.filterwarnings("ignore:decay budget")
def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "prunable" in capsys.readouterr().out


def test_files_and_figures_it_names_exist():
    named = re.findall(r"(?:\]\(|src=\")((?!http|#)[^)\"]+)", README)
    named += re.findall(r"(?:examples|benchmarks)/\w+\.\w+", README)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path
