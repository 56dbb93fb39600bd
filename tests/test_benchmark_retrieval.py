"""The benchmark of retrieval: that it measures what it says, on sizes small enough for a test."""

import pytest
import torch
from crossmodal.training import benchmark_retrieval as bench
from crossmodal.training.peers import RANKERS, Size


SMALL = Size(width=64, heads=2, depth=1, fusion=1, image=(32, 32), patch=8, vocabulary=100)


def test_every_ranker_is_measured_beside_ours():
    model = bench.model_of(SMALL)
    table = bench.ranking_cost(model, SMALL, rounds=1, device="cpu")
    assert [row["model"] for row in table] == ["CrossModalForRetrieval", *RANKERS]
    assert table[0]["ours_times_cheaper"] == 1 and all(row["ms_per_pair"] > 0 for row in table)
    shape = bench.shape_of(model)
    assert (shape.width, shape.heads, shape.depth, shape.fusion) == (64, 2, 1, 1)


def test_the_product_and_faiss_find_the_same():
    pytest.importorskip("faiss")
    table = bench.nearest_cost(count=500, width=8, queries=(1, 3), top_k=5, rounds=1)
    assert [row["queries"] for row in table] == [1, 3]
    assert all(row["product_over_faiss"] > 0 and row["faiss_ms"] > 0 for row in table)


def test_without_faiss_the_product_is_measured_alone(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    row = bench.nearest_cost(count=500, width=8, queries=(2,), top_k=5, rounds=1)[0]
    assert row["faiss_ms"] is None and row["product_ms"] > 0


def test_tiles_give_the_gradient_of_the_whole_in_less_memory():
    small, large = bench.contrast_memory(sizes=(512, 2048), width=16, chunk_size=256, device="cpu")
    assert max(small["difference"], large["difference"]) < 1e-4
    if large["whole_mib"] is not None:
        # Four scores of 16 MiB each against tiles of a quarter of a MiB.
        assert large["chunked_mib"] < 0.5 * large["whole_mib"]
    assert torch.tensor([small["whole_seconds"], large["chunked_seconds"]]).gt(0).all()
