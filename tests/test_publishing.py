"""What is published says the same everywhere, and its links lead somewhere."""

import re
import tomllib
from pathlib import Path

import gsm_optax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert PROJECT["project"]["version"] == gsm_optax.__version__
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == gsm_optax.__version__
    assert f"## {gsm_optax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_links_of_the_readme_lead_somewhere_from_the_package_index():
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    readme = (ROOT / "README.md").read_text()
    for rule in hook["substitutions"]:
        readme = re.sub(rule["pattern"], rule["replacement"], readme)
    links = re.findall(r"\]\(([^)]+)\)|(?:src|href)=\"([^\"]+)\"", readme)
    links = [link or source for link, source in links]
    assert any(link.endswith(".png") for link in links)
    assert all(link.startswith(("https://", "#")) for link in links), links
    repository = re.escape(PROJECT["project"]["urls"]["Repository"])
    for kind, path in re.findall(rf"{repository}/(raw|blob)/HEAD/([^)\"#]+)", readme):
        assert (ROOT / path).exists(), path
        assert (kind == "raw") == path.endswith(".png")
