"""The benchmark: that it measures what it says, on models small enough for a test."""

import copy
import statistics
import time

import pytest
import torch
from crossmodal.training import benchmark
from crossmodal.training.peers import PEERS, PUBLISHED_WORDS, Size, accuracy_of, train_for
from crossmodal.training.recipes import Recipe
from world import TINY_RECIPE, color_rows


SMALL = Size(width=64, heads=2, depth=1, fusion=1, image=(32, 32), patch=8, vocabulary=100, answers=7)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(benchmark.SIZES, "tiny", SMALL)


def test_every_contender_is_measured_in_every_scenario():
    table = benchmark.compare(rounds=1, device="cpu", write=lambda line: None)
    names = set(benchmark.contenders("tiny"))
    assert len(table) == 2 * len(benchmark.SCENARIOS) * len(names)
    for row in table:
        assert row["model"] in names and row["samples_per_second"] > 0 and 0 < row["part_of_peak"] < 1.5
        assert row["ours_over_this"] == 1 or row["model"] != "CrossModalForVQA"
    work = {(row["mode"], row["scenario"], row["model"]): row["gflop_per_sample"] for row in table}
    ours = work["forward", "batch 8", "CrossModalForVQA"]
    assert ours == pytest.approx(work["forward", "batch 32", "CrossModalForVQA"])
    # Attention by another way is as much work.
    assert ours == pytest.approx(work["forward", "batch 8", "CrossModalForVQA, eager"])
    # A quarter of the images, and fewer words.
    assert work["forward", "32 questions, 8 images", "CrossModalForVQA"] < 0.5 * ours
    # Pixels have no gradient, nor has what does not reach the logits: LXMERT's image in its last layer.
    trained = {name: work["training", "batch 8", name] / work["forward", "batch 8", name] for name in names}
    assert 2.7 < trained["CrossModalForVQA"] < 3 and trained["LxmertForQuestionAnswering"] < 2.8
    # Peers alone read padding.
    pads = [
        work["forward", "the same, padded by peers", name] > work["forward", "32 questions, 8 images", name]
        for name in names
    ]
    assert dict(zip(names, pads, strict=True)) == {name: name in PEERS for name in names}


def test_what_peers_pad_is_masked():
    for name, length in {**PUBLISHED_WORDS, "CrossModalForVQA": 3}.items():
        batch = benchmark._batch(name, "tiny", 4, 2, 3, "cpu", torch.Generator(), padded=True)
        assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * (length - 3)] * 4
        assert batch["input_ids"].shape == (4, length) and len(batch["pixel_values"]) == (4 if name in PEERS else 2)
    assert PUBLISHED_WORDS.keys() == PEERS.keys()


def test_one_of_ours_attends_as_peers_without_another_way_do():
    models = benchmark.contenders("tiny")
    eager = models["CrossModalForVQA, eager"]
    assert {benchmark._backend(part) for part in (eager, *eager.crossmodal.encoders.values())} == {"eager"}
    assert benchmark._backend(models["CrossModalForVQA"]) == "sdpa"


def test_flops_are_those_of_a_linear_layer():
    class Model(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model, x = Model(10, 20), torch.randn(3, 10)
    assert benchmark.flops_of(model, {"x": x}) == 2 * 3 * 10 * 20
    # Of the weight, and of an input that learns.
    assert benchmark.flops_of(model, {"x": x}, training=True) == 2 * (2 * 3 * 10 * 20)
    assert benchmark.flops_of(model, {"x": x.requires_grad_()}, training=True) == 3 * (2 * 3 * 10 * 20)
    assert model.weight.grad is None


def test_what_runs_in_turn_is_timed_alone():
    times = benchmark.in_turn(
        {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.01)}, torch.device("cpu"), 3, seconds=0.03
    )
    assert statistics.median(times["long"]) / statistics.median(times["short"]) == pytest.approx(5, rel=0.4)


def test_questions_that_share_an_image_give_the_same_logits_and_gradients():
    logits, gradients = benchmark.grouping_is_exact()
    assert logits < 1e-5 and gradients < 1e-5


def test_parts_of_the_time_sum_to_one():
    parts = benchmark.where_time_goes(questions=4, images=2, words=5)
    assert sum(parts.values()) == pytest.approx(1) and min(parts.values()) > 0
    assert {"encoder: vision", "encoder: text", "fusion", "head"} < parts.keys()


def test_kernels_are_measured_over_lengths_and_their_growth_is_read_off():
    table = benchmark.kernels(lengths=(64, 128), device="cpu", longest_exact=64, write=lambda line: None)
    assert [(row["kernel"], row["tokens"]) for row in table].count(("exact", 64)) == 1
    assert ("exact", 128) not in [(row["kernel"], row["tokens"]) for row in table]
    made = [{"kernel": "exact", "tokens": n, "seconds": 1e-9 * n**2, "mib": 1} for n in (256, 512, 1024, 2048)]
    made += [{"kernel": "linear", "tokens": n, "seconds": 6e-7 * n, "mib": 1} for n in (256, 512, 1024, 2048)]
    found = benchmark.growth_and_crossover(made)
    assert found["exact"]["exponent"] == pytest.approx(2) and found["exact"]["crossover"] is None
    assert found["linear"] == {"exponent": pytest.approx(1), "crossover": 1024}


def test_linear_error_falls_with_features():
    errors = benchmark.feature_errors(counts=(32, 512), keys=128, width=16, draws=3)
    assert errors[512] < 0.5 * errors[32] < errors["exact output"]


def test_training_from_cached_tokens_is_measured_against_raw_inputs(tmp_path):
    color_rows(24).to_parquet(tmp_path / "train.parquet")
    values = copy.deepcopy(TINY_RECIPE) | {"dataset": str(tmp_path), "output_dir": str(tmp_path / "out")}
    values["model"]["freeze"] = ["vision", "text"]
    found = benchmark.cached_training(Recipe(**values), rows=24, rounds=1)
    assert found["cached"] > 0 and found["ratio"] == pytest.approx(found["cached"] / found["raw"])
    assert found["logits_difference"] < 1e-5 and not (tmp_path / "out").exists()
    values["model"]["freeze"] = []
    with pytest.raises(ValueError, match="model.freeze names no encoder"):
        benchmark.cached_training(Recipe(**values), rows=24, rounds=1)


def test_peers_learn_as_long_as_ours_from_the_same_rows(tmp_path):
    color_rows(24).to_parquet(tmp_path / "train.parquet")
    color_rows(12).to_parquet(tmp_path / "validation.parquet")
    values = copy.deepcopy(TINY_RECIPE) | {"dataset": str(tmp_path), "output_dir": str(tmp_path / "out")}
    values["training"] |= {"num_train_epochs": 1}
    values["warm_up"] = [{"dataset": str(tmp_path), "training": {"max_steps": 1}}]
    recipe = Recipe(**values)
    table = benchmark.equal_training_time(
        recipe, ["ViltForQuestionAnswering"], patch=8, depth=1, write=lambda line: None
    )
    ours, vilt = table
    assert vilt["minutes"] == ours["minutes"] > 0 and vilt["steps"] >= 1 and vilt["parameters"] > 0
    assert 0 <= vilt["accuracy"] <= 1 and ours["ours_over_this"] == 1 and vilt["samples_per_second"] > 0
    with pytest.raises(ValueError, match="holds an earlier run, whose minutes are not known"):
        benchmark.equal_training_time(recipe, ["ViltForQuestionAnswering"], write=lambda line: None)


@pytest.mark.parametrize("name", PEERS)
def test_peers_learn_from_what_our_processor_makes(name):
    from test_pipeline import tiny_processor_and_model

    processor, _ = tiny_processor_and_model()
    rows = color_rows(16)
    samples = [{"images": r["image"], "text": r["question"], "target": r["answer"]} for r in rows]
    labels = {answer: index for index, answer in enumerate(sorted(set(rows["answer"])))}
    side = processor(images=[samples[0]["images"]], text=["what?"])["pixel_values"].shape[-1]
    size = Size(64, 2, 1, 1, (side, side), side // 2, len(processor.tokenizer), len(labels))
    torch.manual_seed(0)
    peer = PEERS[name](size)
    before = accuracy_of(peer, processor, labels, samples, set(labels))
    steps = train_for(peer, processor, labels, [(samples, 1.0)], minutes=0.15, batch_size=16, learning_rate=2e-3)
    assert steps > 5 and accuracy_of(peer, processor, labels, samples, set(labels)) > max(before, 0.9)
