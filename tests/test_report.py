"""sparsity_report: exact counts, and what a person sees."""

import json
import math
from functools import partial
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trees import normal

from gsm_optax import magnitude_mask, prune, sparsity_report
from gsm_optax.report import MAGNITUDES

pytestmark = pytest.mark.optimize(False)

random_tree = partial(normal, {"a": (8, 9), "b": {"bias": (7,), "kernel": (2, 3, 4)}})


def test_counts_are_those_of_numpy():
    params = prune(random_tree(), 0.75)
    report = sparsity_report(params)
    assert [leaf.path for leaf in report.leaves] == ["a", "b/bias", "b/kernel"]
    arrays = [params["a"], params["b"]["bias"], params["b"]["kernel"]]
    for leaf, array in zip(report.leaves, arrays, strict=True):
        assert leaf.shape == array.shape
        assert leaf.entries == array.size
        assert leaf.nonzero == np.count_nonzero(array)
        assert leaf.density == leaf.nonzero / leaf.entries
    assert report.prunable.entries == 96
    assert report.prunable.nonzero == 24
    assert report.prunable.compression == 4
    assert report.total.entries == 103
    assert report.total.nonzero == 31


def test_magnitudes_are_counted_by_decade():
    values = [0, -1e-9, 1e-8, 2e-8, -5e-5, 0.05, 0.5, 1, -30, math.inf, math.nan]
    report = sparsity_report({"w": jnp.asarray([values], jnp.float32)})
    got = dict(zip(MAGNITUDES, report.leaves[0].magnitudes, strict=True))
    assert {name: count for name, count in got.items() if count} == {
        "exactly 0": 1,
        "below 1e-8": 1,
        "1e-8 to 1e-7": 2,
        "1e-5 to 1e-4": 1,
        "1e-2 to 1e-1": 1,
        "1e-1 to 1e0": 1,
        "1 and above": 3,
        "NaN": 1,
    }
    assert report.prunable.below(1e-4) == pytest.approx(5 / 11)
    with pytest.raises(ValueError, match="not one of"):
        report.prunable.below(3e-4)


def test_a_mask_is_counted_like_the_parameters_it_makes():
    params = random_tree()
    mask = sparsity_report(magnitude_mask(params, 0.75))
    pruned = sparsity_report(prune(params, 0.75))
    assert [leaf.nonzero for leaf in mask.leaves] == [x.nonzero for x in pruned.leaves]
    assert mask.prunable.compression == 4
    assert "magnitude" not in str(mask)


@pytest.mark.parametrize(
    "leaf",
    [jnp.zeros((0, 3)), jnp.zeros((3, 3)), jnp.ones(()), np.arange(6).reshape(2, 3)],
)
def test_odd_leaves_are_shown(leaf):
    report = sparsity_report({"kernel": jnp.ones((2, 2)), "odd": leaf, "none": None})
    assert report.leaves[1].entries == leaf.size
    assert "odd" in str(report)
    assert "odd" in report.to_markdown()


def with_dropout():
    """A state with what nnx keeps for Dropout, and other leaves that are no weights."""
    dropout = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    return {
        "complex": jnp.array([[3j, 0]], jnp.complex64),
        "drop": dropout,
        "kernel": jnp.full((2, 2), 0.5),
        "raw": jax.random.PRNGKey(7),  # the older uint32 keys
        "steps": np.zeros(3, jax.dtypes.float0),
        "streams": jax.random.split(jax.random.key(0), 4),
    }


def test_keys_and_counters_are_leaves_like_others():
    report = sparsity_report(with_dropout())
    leaves = {leaf.path: leaf for leaf in report.leaves}
    assert {path: (x.entries, x.nonzero) for path, x in leaves.items()} == {
        "complex": (2, 1),
        "drop/rngs/count": (1, 0),
        "drop/rngs/key": (1, 1),
        "kernel": (4, 4),
        "raw": (2, 1),
        "steps": (3, 0),
        "streams": (4, 4),
    }
    classes = dict(zip(MAGNITUDES, leaves["streams"].magnitudes, strict=True))
    assert classes["no magnitude"] == 4
    assert report.total.entries == 17
    assert not any(x.prunable for path, x in leaves.items() if "/" in path)
    assert "no magnitude" not in str(report)  # which is of the prunable entries
    assert "| drop/rngs/key |" in report.to_markdown()
    json.dumps(report.to_records())


def test_text_is_aligned():
    lines = (
        str(sparsity_report(prune(random_tree(), 0.75))).split("\n\n")[0].splitlines()
    )
    ends = [line.rstrip().endswith(("x", "compression")) for line in lines]
    assert all(ends)
    assert len({len(line) for line in lines}) == 1
    assert "prunable" in lines[-2]
    assert "25.00%" in lines[-2]


def test_markdown_has_one_row_a_leaf():
    rows = sparsity_report(random_tree()).to_markdown().splitlines()
    assert len(rows) == 2 + 3 + 2
    assert {row.count("|") for row in rows} == {8}


def test_records_survive_json():
    report = sparsity_report(random_tree())
    records = json.loads(json.dumps(report.to_records()))
    assert [r["path"] for r in records] == ["a", "b/bias", "b/kernel"]
    assert records[0]["entries"] == sum(records[0]["magnitudes"].values()) == 72


def test_html_is_well_formed_and_escaped():
    opened = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    page = sparsity_report({"<w>": jnp.full((2, 2), 0.5)})._repr_html_()
    Checker().feed(page)
    assert not opened
    assert "&lt;w&gt;" in page


def test_a_prunable_tree_that_does_not_match_is_refused():
    with pytest.raises(ValueError, match="prunable does not match"):
        sparsity_report(random_tree(), prunable={"a": True})
