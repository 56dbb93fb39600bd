"""The benchmark of writing: every contender writes as many words, and what does not work is said."""

import pytest
import torch
from crossmodal.training import benchmark_generation as bench
from crossmodal.training.peers import Size


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(
        bench.SIZES, "small", Size(width=16, heads=2, depth=1, fusion=1, image=(16, 16), patch=8, vocabulary=40)
    )


def test_all_contenders_write_the_same_number_of_words(small):
    size = bench.SIZES["small"]
    for make in bench.CONTENDERS.values():
        model, pixels = make(size).eval(), torch.randn(2, 3, 16, 16)
        for search in bench.SEARCHES.values():
            words = model.generate(pixel_values=pixels, min_new_tokens=5, max_new_tokens=5, do_sample=False, **search)
            assert words.shape[0] == 2 and words.shape[1] - 5 in (0, 1)


def test_the_table_has_every_mode_and_what_failed(small, monkeypatch):
    monkeypatch.setattr(bench, "_NEW_WORDS", 4)

    def broken(size):
        model = bench._bert(size)
        model.generate = lambda **kwargs: (_ for _ in ()).throw(RuntimeError("not here"))
        return model

    monkeypatch.setattr(
        bench,
        "CONTENDERS",
        {"CrossModalForCaptioning": bench._ours, "GPT-2": bench._gpt2, "broken": broken},
    )
    table = bench.compare("small", rounds=1, batches=(1, 2), write=lambda line: None)
    assert [(row["search"], row["batch"]) for row in table[::3]] == [
        ("greedy", 1), ("greedy", 2), ("beam 4", 1), ("beam 4", 2),
    ]  # fmt: skip
    for row in table:
        if row["model"] == "broken":
            assert row["words_per_second"] is None and row["why"] == "RuntimeError: not here"
        else:
            assert row["words_per_second"] > 0 and row["ours_over_this"] > 0 and row["why"] is None


def test_the_parts_of_the_time_are_the_whole(small, monkeypatch):
    monkeypatch.setattr(bench, "_NEW_WORDS", 4)
    assert sum(bench.where_time_goes("small", rounds=1).values()) == pytest.approx(1)
