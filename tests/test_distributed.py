"""Two gloo ranks by torchrun against one process: losses, gradients, evaluation, and no hang where one rank lacks a modality."""

import os
import subprocess
import sys

import pytest
import ranks
import torch


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two ranks found, once for all tests."""
    file = tmp_path_factory.mktemp("ranks") / "found"
    done = torchrun([ranks.__file__, file])
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{file}-{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def one():
    return ranks.everything()


def torchrun(arguments, launcher=("torch.distributed.run", "--standalone", "--nproc_per_node", "2")):
    return subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def assert_same(found, expected, **close):
    for name, value in expected.items():
        there = found.get(name, torch.zeros_like(value))
        torch.testing.assert_close(there, value, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", [*ranks.COMPARED, "found unused"])
def test_losses_and_gradients_are_those_of_one_process_with_the_whole_batch(one, two, case):
    for rank in two:
        assert len(rank[case]["losses"]) == 2
        assert_same(rank[case], one[case], rtol=1e-4, atol=2e-6)


def test_ranks_of_the_second_step_count_unequally():
    """Else nothing above could fail."""
    for kind in ("ids", "numbers", "words"):
        labels = ranks.labels_of(kind)
        counts = ((labels != -100) & ~labels.isnan()).view(4, -1).sum(1)
        assert len(set(counts.tolist())) > 2, kind


@pytest.mark.parametrize("case", ranks.COMPARED)
def test_evaluation_counts_each_row_of_an_uneven_last_batch_once(one, two, case):
    expected = one[f"{case}, evaluated"]
    for rank in two:
        found = rank[f"{case}, evaluated"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for name in set(found) - {"loss"}:
            assert len(found[name]) == 7
        assert len({len(text) for text in found.get("texts", ["", "a"])}) > 1


def test_contrast_over_unequal_ranks_has_the_gradient_of_one_process_with_all_rows(one, two):
    assert len(one["contrast"]) > 300
    assert_same(two[0]["contrast"], one["contrast"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ranks.SHARDED)
def test_shards_of_layers_have_the_gradients_of_the_whole_model_though_one_rank_lacks_images(one, two, case):
    expected = one[f"{case}, sharded"]
    assert any(name.startswith("gradient_norm") for name in expected)
    assert_same(two[0][f"{case}, sharded"], expected, rtol=1e-4, atol=5e-6)


def test_an_epoch_of_unequal_parts_ends_on_all_ranks(two):
    losses = [rank["all losses"]["losses"] for rank in two]
    assert len(losses[0]) == 4 and losses[0].isfinite().all()
    assert torch.equal(*losses)
