import inspect
import json

import pytest
import torch

from accel_tools.measure import plans, records
from accel_tools.measure.arms import offering

GRID, X = (1, 8, 8), torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small(monkeypatch):
    pytest.importorskip("tomesd")
    monkeypatch.setattr(plans, "SHAPES", {"a small grid": (2, 8, 8, 320)})


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in plans.ways() if way not in ("plan of tome", "product")])
def test_every_way_reduces_and_restores(way):
    if way == "tomesd":
        pytest.importorskip("tomesd")
    out = plans.ways()[way](X, GRID)
    assert out.shape == X.shape and out.isfinite().all()
    assert torch.linalg.matrix_rank(out[0]) <= 32 < torch.linalg.matrix_rank(X[0])        # half of the tokens is left


def test_every_method_that_offers_a_round_trip_is_among_the_ways():
    offered = offering("roundtrip")
    assert len(offered) >= 4 and offered.keys() <= plans.ways().keys()
    assert all(inspect.getfile(module).endswith(f"/{slug}.py") for slug, module in offered.items())


def test_a_pair_leaves_half_of_the_tokens():
    pytest.importorskip("tomesd")
    for pair in (plans.tome_pair, plans.tomesd_pair):
        reduce, restore = pair(X, GRID)
        assert reduce(X).shape == (2, 32, 48) and restore(reduce(X)).shape == X.shape


def test_the_product_is_that_of_sources_with_destinations():
    pieces = plans.product(X, GRID)
    expected = X[:, 16:] @ X[:, :16].mT
    torch.testing.assert_close(torch.cat([piece.to_dense() for piece in pieces]).view_as(expected), expected)


def test_what_is_measured_is_written(small, tmp_path):
    found = plans.measure(rounds=3)
    assert {row["way"] for row in found["rows"]} == set(plans.ways())
    assert all(row["of_tomesd"] == 1 for row in found["rows"] if row["way"] == "tomesd")
    layers = {row["way"]: row for row in found["layers"]}
    assert layers["plain"]["speedup"] == 1 and layers["tome"]["peak_bytes"] < layers["plain"]["peak_bytes"]
    written = records.write_plans(found, tmp_path / "plans.json")
    assert json.loads((tmp_path / "plans.json").read_text()) == written
    assert written["hardware"] and len(written["layers"]) == 3
