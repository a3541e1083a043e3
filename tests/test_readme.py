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
    printed = capsys.readouterr().out
    before, after = re.findall(r"^prunable .*", printed, re.M)
    assert (before.split()[-1], after.split()[-1]) == ("1.0x", "10.0x")
    near_zero = float(re.search(r"^below 1e-8 .* ([\d.]+)%", printed, re.M)[1])
    assert near_zero == pytest.approx(90, abs=1)  # nine in ten


def test_files_and_figures_it_names_exist():
    named = re.findall(r"(?:\]\(|src=\")((?!http|#)[^)\"]+)", README)
    named += re.findall(r"(?:examples|benchmarks)/\w+\.\w+", README)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path
