"""The benchmark of views: contenders of equal FLOP, each measured in every mode."""

from crossmodal.training import benchmark_views as bench


def test_contenders_have_as_many_flop_and_are_measured_beside_ours():
    table = bench.compare(
        width=8, spectrogram=(32, 64), batches=(1, 2), rounds=1, device="cpu", write=lambda line: None
    )
    assert len(table) == 2 * 2 * 3
    for row in table:
        ours = next(r for r in table if (r["mode"], r["batch"]) == (row["mode"], row["batch"]))
        assert abs(row["gflop_per_sample"] / ours["gflop_per_sample"] - 1) < 0.1, row
        assert row["samples_per_second"] > 0 and row["ours_over_this"] > 0
    assert [row["model"] for row in table[:3]] == ["MMViT, two views", "MViT, one view", "AST"]
