"""CrossModalForSequenceClassification: its losses, its Auto class, and a run on rows with labels."""

import copy
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import zoo
from crossmodal.training.classification import ClassificationTask, RegressionTask, SentimentTask
from crossmodal.training.collator import SampleCollator
from crossmodal.training.datasets import BrokenSample, RowDataset, read_samples
from crossmodal.training.evaluate import evaluate
from crossmodal.training.protocols import PROTOCOLS
from crossmodal.training.recipes import Recipe
from crossmodal.training.schemas import DATASETS
from crossmodal.training.statistics import take_statistics
from crossmodal.training.token_cache import with_cached_tokens
from crossmodal.training.train import train
from PIL import Image
from transformers import ViTImageProcessorPil
from world import TINY_RECIPE, picture, run_as_stranger, tiny_processor_and_model

from crossmodal import (
    CrossModalConfig,
    CrossModalForSequenceClassification,
    CrossModalProcessor,
    FeatureSequenceConfig,
)


def head(**overrides):
    torch.manual_seed(0)
    return CrossModalForSequenceClassification(zoo.tiny_config(**overrides)).eval()


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type", "loss"),
    [
        (torch.tensor([0, 4, 2, 1]), 5, "single_label_classification", torch.nn.functional.cross_entropy),
        (torch.rand(4, 5), 5, "multi_label_classification",
         lambda x, y: 5 * torch.nn.functional.binary_cross_entropy_with_logits(x, y)),
        (torch.randn(4), 1, "regression", lambda x, y: torch.nn.functional.mse_loss(x[:, 0], y)),
    ],
    ids=["one label", "many labels", "a number"],
)  # fmt: skip
def test_the_loss_follows_the_labels(labels, num_labels, problem_type, loss):
    model = head(num_labels=num_labels)
    output = model(**zoo.tiny_batch(model.config), labels=labels)
    assert model.config.problem_type == problem_type
    torch.testing.assert_close(output.loss, loss(output.logits, labels))


def test_weights_of_classes_are_those_of_torch_with_labels_and_with_probabilities():
    weights = [0.5, 2.0, 1.0, 0.0, 3.0]
    model = head(num_labels=5, problem_type="single_label_classification", class_weights=weights, label_smoothing=0.1)
    batch, labels = zoo.tiny_batch(model.config), torch.tensor([4, 1, -100, 0])
    output = model(**batch, labels=labels)
    own = {"weight": torch.tensor(weights), "label_smoothing": 0.1}
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels, **own))
    model.config.class_weights = None
    mixed = torch.rand(4, 5).softmax(-1)
    expected = torch.nn.functional.cross_entropy(output.logits, mixed, label_smoothing=0.1)
    torch.testing.assert_close(model(**batch, labels=mixed).loss, expected)
    sure = torch.nn.functional.one_hot(torch.tensor([4, 1, 2, 0]), 5).float()
    model.config.class_weights = weights
    torch.testing.assert_close(model(**batch, labels=sure).loss, model(**batch, labels=sure.argmax(-1)).loss)
    with pytest.raises(ValueError, match="do not sum to 1.*multi_label_classification"):
        model(**batch, labels=torch.rand(4, 5))


def test_weights_of_several_labels_and_the_distance_of_a_regression():
    model = head(num_labels=3, problem_type="multi_label_classification", class_weights=[1.0, 4.0, 0.5])
    batch, labels = zoo.tiny_batch(model.config), torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    output, weights = model(**batch, labels=labels), torch.tensor([1.0, 4.0, 0.5])
    p = output.logits.sigmoid()
    expected = -(weights * labels * p.log() + (1 - labels) * (1 - p).log()).sum() / 4
    torch.testing.assert_close(output.loss, expected)
    model = head(num_labels=1, problem_type="regression", regression_loss="absolute")
    numbers = torch.randn(4)
    output = model(**batch, labels=numbers)
    torch.testing.assert_close(output.loss, torch.nn.functional.l1_loss(output.logits[:, 0], numbers))
    for key in ("class_weights", "thresholds"):
        with pytest.raises(ValueError, match=f"{key}=.*Expected 5 numbers"):
            zoo.tiny_config(num_labels=5, **{key: [0.5, 0.5]})


def test_a_regression_of_several_numbers_and_unimodal_ones():
    model = head(num_labels=2, problem_type="regression", auxiliary_loss_weight=1.0)
    labels = torch.randn(4, 2)
    output = model(**zoo.tiny_batch(model.config), labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.mse_loss(output.logits, labels))
    for m in range(2):
        expected = torch.nn.functional.mse_loss(output.auxiliary_logits[:, m], labels)
        torch.testing.assert_close(output.auxiliary_losses[m], expected)
    with pytest.raises(ValueError, match=r"labels of shape \(4,\).*'regression'"):
        model(**zoo.tiny_batch(model.config), labels=labels[:, 0])


def post_rows(count=24):
    """Rows of the schema of MVSA: the label is the color of the picture, or what the text says where there is none."""
    names = ["red", "green", "blue"]
    rows = [
        {"image": picture(names[i % 3]), "id": i, "text": f"it is {names[i % 3]}", "label": names[i % 3]}
        for i in range(count)
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_a_pretrained_encoder_that_is_trained_is_compared_with_what_it_was(tmp_path):
    _, model = tiny_processor_and_model()
    encoder = tmp_path / "encoder"
    model.crossmodal.encoders["vision"].save_pretrained(encoder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(encoder)
    found = {}
    for name, change in {
        "frozen": {"freeze": ["vision"]},
        "trained": {},
        "low rank": {"freeze": ["vision"], "lora": "vision"},
    }.items():
        values = copy.deepcopy(TINY_RECIPE) | {
            "task": "classification",
            "dataset": "posts",
            "output_dir": str(tmp_path / name),
            "lora": change.pop("lora", None),
        }
        values["model"] = {"encoders": {"vision": str(encoder)}, "config": values["model"]["config"]} | change
        values["training"] |= {"num_train_epochs": 1, "learning_rate": 0.1}
        result = train(Recipe(**values, name="posts"), post_rows(48), post_rows(12), write=lambda line: None)
        found[name] = result["baselines"]["logistic regression on plain features"]
    assert found["trained"] == found["frozen"] == found["low rank"]


def test_a_run_on_labelled_posts_ends_in_a_folder_that_a_stranger_loads(tmp_path):
    values = copy.deepcopy(TINY_RECIPE) | {
        "task": "classification",
        "dataset": "posts",
        "output_dir": str(tmp_path / "m"),
    }
    values["training"]["num_train_epochs"] = 5
    values["compare"] = ["concat", "text alone"]
    result = train(Recipe(**values, name="posts"), post_rows(48), post_rows(12), write=lambda line: None)
    assert result["metrics"]["accuracy"] == 1.0 == result["metrics"]["weighted_f1"] == result["metrics"]["f1_red"]
    assert set(result["baselines"]) == {"concat", "text alone"} and result["baselines"]["concat"]["accuracy"] > 0.3
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| concat |" in card and "F1 by label: blue 1.0000" in card and "f1_blue" not in card.split("---")[2]
    for name in ("confusion", "reliability", "learning_curves"):
        assert f"({name}.png)" in card
        assert min(Image.open(tmp_path / "m" / f"{name}.png").size) > 200
    assert "AutoModelForSequenceClassification" in card and "processor(images=..., text=...)" in card
    assert "weighted_f1" in card and "into 3 classes" in card
    assert evaluate(result["model"], result["processor"], post_rows(6), "x", progress=False)["accuracy"] == 1.0
    said = run_as_stranger(
        """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoProcessor
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    output = model(**processor(text=["it is red", "it is blue"]))
print(type(model).__name__, [model.config.id2label[i] for i in output.logits.argmax(-1).tolist()])
""",
        tmp_path / "m",
        cwd=tmp_path,
    )
    assert "CrossModalForSequenceClassification" in said


def test_f1_is_worked_by_hand():
    task = ClassificationTask({0: "a", 1: "b"}, "single_label_classification")
    scores = task.score_labels(["a", "a", "b", "b"], ["a", "b", "b", "b"])
    # a: precision 1/2, recall 1; b: precision 1, recall 2/3; weights 1/4 and 3/4.
    assert scores["accuracy"] == 0.75
    assert (scores["f1_a"], scores["f1_b"]) == (pytest.approx(2 / 3), pytest.approx(0.8))
    assert scores["weighted_f1"] == pytest.approx(0.25 * (2 / 3) + 0.75 * 0.8)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    # A label that training never had is wrong whatever is chosen.
    assert task.score_labels(["a", "b"], ["a", "z"])["accuracy"] == 0.5


def test_calibration_error_is_worked_by_hand():
    task = ClassificationTask({0: "a", 1: "b"}, "single_label_classification")
    # Sure by 0.9 and right; by 0.9 and wrong; by 0.6 and right.
    logits = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]]).log()
    found = task.score(logits, ["a", "a", "a"])
    assert found["ece"] == pytest.approx(2 / 3 * abs(0.9 - 0.5) + 1 / 3 * abs(0.6 - 1), abs=1e-6)
    assert task.confusion(logits, ["a", "a", "b"]).tolist() == [[1, 1], [1, 0]]


def test_several_labels_are_scored_from_their_thresholds_on():
    task = ClassificationTask.from_targets([["x"], ["x", "y"], []])
    assert task.answers == {"id2label": {0: "x", 1: "y"}, "problem_type": "multi_label_classification"}
    targets = [["x"], ["x", "y"], []]
    assert task.encode_targets(targets).tolist() == [[1, 0], [1, 1], [0, 0]]
    logits = torch.tensor([[0.8, 0.1], [0.9, 0.3], [0.6, 0.2]]).logit()
    found = task.score(logits, targets)
    assert found["accuracy"] == pytest.approx(1 / 3) and found["f1_x"] == pytest.approx(0.8) and found["f1_y"] == 0
    assert found["map"] == 1.0
    assert task.tune(logits, targets) == [pytest.approx(0.8), pytest.approx(0.3)]
    assert task.score(logits, targets)["accuracy"] == 1.0
    assert task.class_weights(targets) == [pytest.approx(1 / 2), 2.0]
    assert ClassificationTask.from_targets(["a", "b", "b"]).class_weights(["a", "b", "b"]) == [1.5, 0.75]
    assert task.majority([["x"], ["x"], ["y"]], targets)["f1_x"] == pytest.approx(0.8)


def test_labels_keep_their_order_through_json():
    id2label = {str(index): f"l{index}" for index in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)}
    task = ClassificationTask(id2label, "multi_label_classification")
    found = task.score(torch.eye(12).logit(eps=1e-6), [[f"l{index}"] for index in range(12)])
    assert found["accuracy"] == 1.0 and found["f1_l10"] == 1.0
    flipped = torch.eye(12)
    flipped[10] = flipped[11]
    found = task.score(flipped.logit(eps=1e-6), [[f"l{index}"] for index in range(12)])
    assert found["f1_l10"] == 0.0 and found["f1_l2"] == 1.0


@pytest.mark.parametrize(
    ("targets", "said"),
    [(["a", 1.5], "type float and str"), ([0.5, 1.5], "task 'regression'"), (["a", "a"], "1 labels occur")],
)
def test_labels_that_are_none_are_refused(targets, said):
    with pytest.raises(ValueError, match=said):
        ClassificationTask.from_targets(targets)


def test_metrics_of_a_regression_and_of_sentiment_are_worked_by_hand():
    found = RegressionTask().score([1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    assert (
        found["mae"] == 1.0 and found["rmse"] == pytest.approx((5 / 3) ** 0.5) and found["r2"] == pytest.approx(-1.5)
    )
    assert found["corr"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 2])[0, 1])
    targets = [{"score": s, "label": label} for s, label in [(0.0, 1), (-1.6, 0), (2.4, 1), (float("nan"), 0)]]
    found = SentimentTask().score([-0.2, -3.8, 1.6, -0.1], targets)
    # Of all four rows; without the one that has no score; without the one that is 0.
    assert (found["accuracy"], found["acc2_nonneg"], found["acc2_negpos"]) == (0.75, pytest.approx(2 / 3), 1.0)
    # Rounded: 0, -2, 2 against 0, -3, 2.
    assert found["acc7"] == pytest.approx(2 / 3) and found["mae"] == pytest.approx((0.2 + 2.2 + 0.8) / 3)
    with pytest.raises(ValueError, match="row 1 has neither a score"):
        SentimentTask.from_targets([targets[0], {"score": float("nan"), "label": None}])
    with pytest.raises(ValueError, match="target of row 0 is 'good'"):
        RegressionTask.from_targets(["good"])


def test_of_a_regression_the_checkpoint_with_the_smallest_error_is_kept(tmp_path):
    numbers = [float(len(label)) for label in post_rows(16)["label"]]
    rows = post_rows(16).select_columns(["text"]).add_column("score", numbers)
    values = copy.deepcopy(TINY_RECIPE) | {
        "task": "regression",
        "dataset": "rows",
        "output_dir": str(tmp_path / "run"),
    }
    values["model"] = {"encoders": {"text": values["model"]["encoders"]["text"]}}
    values["training"] |= {"num_train_epochs": 4, "learning_rate": 3e-2, "save_strategy": "epoch"}
    result = train(Recipe(**values, name="numbers"), rows, rows, write=lambda line: None, export=False)
    errors = [entry["eval_mae"] for entry in result["log"] if "eval_mae" in entry]
    assert len(set(errors)) > 2 and result["metrics"]["mae"] == pytest.approx(min(errors))


def test_a_row_without_a_number_teaches_nothing():
    model = head(num_labels=1, problem_type="regression")
    batch = zoo.tiny_batch(model.config)
    output = model(**batch, labels=torch.tensor([1.0, float("nan"), 0.5, float("nan")]))
    expected = torch.nn.functional.mse_loss(output.logits[[0, 2], 0], torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# What a linear probe would find


def test_pooled_features_stand_beside_the_fused_tokens():
    model = head(pooled_features=True, auxiliary_loss_weight=1.0).double()
    batch = zoo.tiny_batch(model.config)
    base = model.crossmodal
    encoded, presence = base.encode(base._collect_inputs(batch))
    levels, masks = base.project(encoded)
    plain = base.fuse(levels, masks, presence)[1]
    unimodal = base.pool_unimodal(levels, masks, {})
    output = base(**batch)
    for index, (name, item) in enumerate(encoded.items()):
        shortcut = base.shortcuts[name]
        for row in range(4):
            real = slice(None) if item.mask is None else item.mask[row]
            pooled = [values for x in item.levels for values in (x[row, real].mean(0), x[row, real].amax(0))]
            pooled = torch.cat([norm(vector) for norm, vector in zip(shortcut.norms, pooled, strict=True)])
            own = shortcut.out_proj.weight @ pooled
            torch.testing.assert_close(output.modality_embeddings[row, index], plain[row, index] + own)
            torch.testing.assert_close(output.unimodal_embeddings[row, index], unimodal[row, index] + own)


def test_features_of_frozen_encoders_are_standardised_over_the_training_rows(tmp_path):
    processor, model = tiny_processor_and_model(pooled_features=True, frozen_modalities=["vision"])
    model = CrossModalForSequenceClassification(model.config)
    rows = post_rows(9).to_list()
    rows = datasets.Dataset.from_list(
        [row | {"image": None if i == 4 else row["image"]} for i, row in enumerate(rows)]
    )
    samples = RowDataset(rows.cast_column("image", datasets.Image()), "classification")
    assert take_statistics(model, processor, samples, batch_size=4, progress=False) == ["vision"]
    with torch.no_grad():
        batch = processor(images=[samples[i]["images"] for i in range(9) if i != 4])
        item = model.eval().crossmodal.encode(model.crossmodal._collect_inputs(batch))[0]["vision"]
    found = [x.mean(1) if n % 2 == 0 else x.amax(1) for x in item.levels for n in range(2)]
    for norm, vectors in zip(model.crossmodal.shortcuts["vision"].norms, found, strict=True):
        torch.testing.assert_close(norm.shift, vectors.mean(0), rtol=1e-4, atol=1e-5)
        scaled = (vectors - norm.shift) * norm.scale
        varies = vectors.std(0, correction=0) > 1e-3
        torch.testing.assert_close(
            scaled.std(0, correction=0)[varies], torch.ones(int(varies.sum())), rtol=1e-3, atol=0
        )
    words = model.crossmodal.shortcuts["text"].norms[0]
    assert words.shift.eq(0).all() and words.scale.eq(1).all()
    model.save_pretrained(tmp_path)
    loaded = CrossModalForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(
        loaded.crossmodal.shortcuts["vision"].norms[0].scale, model.crossmodal.shortcuts["vision"].norms[0].scale
    )


def test_pooled_features_of_absent_and_shared_inputs():
    model = head(pooled_features=True)
    batch = zoo.tiny_batch(model.config)
    mask = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
    expected = model(**batch, modality_mask=mask).logits
    hidden = batch | {"pixel_values": batch["pixel_values"].clone()}
    hidden["pixel_values"][1] = 99.0
    torch.testing.assert_close(model(**hidden, modality_mask=mask).logits, expected)
    shared = batch | {"pixel_values": batch["pixel_values"][:2], "pixel_values_index": torch.tensor([0, 1, 1, 0])}
    spread = batch | {"pixel_values": batch["pixel_values"][[0, 1, 1, 0]]}
    torch.testing.assert_close(model(**shared).logits, model(**spread).logits, rtol=1e-4, atol=1e-5)


# Context


def utterance_rows(videos=6, segments=5):
    """Rows of the schema of CMU-MOSI, out of order, whose sentiment is the mean sign of the words of the row and those beside it."""
    draw, rows = np.random.default_rng(0), []
    for video in range(videos):
        signs = draw.choice([-1.0, 1.0], size=segments)
        for segment in range(segments):
            near = signs[max(0, segment - 1) : segment + 2].mean()
            rows.append(
                {
                    "video": f"v{video}",
                    "segment": segment,
                    "text": "good" if signs[segment] > 0 else "bad",
                    "text_values": (signs[segment] * np.array([1, -1, 2, -2]) + 0.1 * draw.normal(size=4)).tolist(),
                    "audio_values": draw.normal(size=3).tolist(),
                    "video_values": draw.normal(size=2).tolist(),
                    "score": float(near),
                    "label": int(near >= 0),
                }
            )
    rows = [rows[i] for i in draw.permutation(len(rows))]
    return datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})


def test_recordings_of_numbers_are_dealt_to_all_folds():
    rows = list(utterance_rows(7, 3).remove_columns(["text_values", "audio_values", "video_values"]))
    of = PROTOCOLS["held_out_recordings"](rows, DATASETS["mosi_scores"], 3, 0)
    folds = {}
    for row, fold in zip(rows, of, strict=True):
        folds.setdefault(fold, set()).add(row["video"])
    assert sorted(map(len, folds.values())) == [2, 2, 3] and len(set.union(*folds.values())) == 7


def test_a_row_sees_its_neighbours_and_no_other_recording():
    rows = utterance_rows(2, 3)
    samples = RowDataset(rows, "sentiment", contexts={"text_features": 2})
    for index, row in enumerate(rows):
        found = samples[index]
        others = {r["segment"]: r["text_values"] for r in rows if r["video"] == row["video"]}
        assert found["audio_features"].shape == (1, 3)
        for step in range(5):
            segment = row["segment"] + step - 2
            array, real = found["text_features"]["array"][step], found["text_features"]["mask"][step]
            assert real == (segment in others)
            np.testing.assert_allclose(array, others.get(segment, [0] * 4), atol=1e-6)
    with pytest.raises(ValueError, match="parts of a recording"):
        RowDataset(post_rows(4), "classification", contexts={"text": 1})
    with pytest.raises(
        ValueError, match=r"context of 'text'.*\['text_features', 'audio_features', 'video_features'\] are"
    ):
        RowDataset(rows, "sentiment", contexts={"text": 1})


def test_a_row_that_is_no_numbers_is_named_itself_and_seen_by_no_neighbour():
    rows = utterance_rows(1, 4)
    rows = rows.select(np.argsort(rows["segment"]))
    spoilt = rows.map(lambda row: {"text_values": [float("nan")] * 4 if row["segment"] == 2 else row["text_values"]})
    said = "row 2 of the dataset, column 'text_values': NaN or infinity"
    with pytest.raises(BrokenSample, match=said):
        RowDataset(spoilt, "sentiment", contexts={"text_features": 1})
    samples = RowDataset(spoilt, "sentiment", contexts={"text_features": 1}, skip_broken=True)
    read, broken = read_samples(samples, range(4))
    assert [sample["row"] for sample in read] == [0, 1, 3]
    assert [error.where for error in broken] == ["row 2 of the dataset"] and said in str(broken[0])
    assert [sample["text_features"]["mask"].tolist() for sample in read] == [
        [False, True, True],
        [True, True, False],
        [False, True, False],
    ]
    for sample in read:
        assert np.isfinite(sample["text_features"]["array"]).all()
        np.testing.assert_allclose(sample["text_features"]["array"][1], rows["text_values"][sample["row"]], atol=1e-6)


def test_what_lies_beyond_the_ends_changes_nothing_and_the_row_itself_is_pooled():
    features = {
        "words": {"config": FeatureSequenceConfig(feature_size=4, hidden_size=16, num_attention_heads=2), "context": 2}
    }
    config = CrossModalConfig(modalities=features, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    model = CrossModalForSequenceClassification(config).eval()
    processor = CrossModalProcessor.from_config(config)
    array, mask = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32), [False, True, True, True, False]
    batch = processor(words=[{"array": array, "mask": mask}])
    logits = model(**batch).logits
    batch["words_values"][:, [0, 4]] = 99.0
    torch.testing.assert_close(model(**batch).logits, logits)
    batch["words_values"][:, 1] *= -1.0
    assert not torch.allclose(model(**batch).logits, logits)
    # A row alone stands in the middle.
    alone = processor(words=[array[2:3]])
    assert alone["words_mask"].tolist() == [[False, False, True, False, False]]
    np.testing.assert_allclose(alone["words_values"][0, 2], array[2])
    with pytest.raises(ValueError, match="have 3 steps. This model takes a row with 2 neighbours on each side"):
        processor(words=[array[:3]])
    with pytest.raises(ValueError, match="context=3 of type 'text'"):
        CrossModalConfig(modalities={"text": {"config": zoo.tiny_config().text_config, "context": 3}})


def test_a_row_among_other_neighbours_does_not_take_tokens_that_were_kept(tmp_path):
    width = {"hidden_size": 16, "num_attention_heads": 2}
    features = {
        "text_features": {"config": FeatureSequenceConfig(feature_size=4, **width), "context": 1},
        "audio_features": {"config": FeatureSequenceConfig(feature_size=3, **width)},
    }
    config = CrossModalConfig(
        modalities=features, **width, intermediate_size=32, frozen_modalities=list(features), pooled_features=True
    )
    model, lines = CrossModalForSequenceClassification(config).eval(), []
    processor = CrossModalProcessor.from_config(config)
    rows = utterance_rows(2, 4)
    # The same rows, each a recording of its own: none has neighbours.
    alone = rows.map(lambda row, number: {"video": f"v{number}"}, with_indices=True)
    plain = {
        name: RowDataset(own, "sentiment", contexts={"text_features": 1})
        for name, own in (("beside", rows), ("alone", alone))
    }
    recipe = SimpleNamespace(token_cache=str(tmp_path), output_dir=str(tmp_path))
    cached, logits = with_cached_tokens(recipe, model, processor, plain, lines.append), {}
    for name in plain:
        samples = [[own[i] for i in range(len(rows))] for own in (plain[name], cached[name])]
        assert "audio_features_tokens" in samples[1][0] and "text_features_tokens" not in samples[1][0]
        with torch.no_grad():
            logits[name], found = (model(**SampleCollator(processor)(own)).logits for own in samples)
        torch.testing.assert_close(found, logits[name])
    assert not torch.allclose(logits["beside"], logits["alone"])
    assert [line for line in lines if "not kept" in line] == [
        "tokens of text_features are not kept: with context they depend on the rows beside."
    ]


def test_context_decides_what_a_row_alone_does_not_say(tmp_path):
    features = {"model_type": "crossmodal_features", "feature_size": 4, "hidden_size": 16, "intermediate_size": 32}
    features |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    values = {
        "task": "sentiment",
        "dataset": "made",
        "model": {
            "encoders": {"text_features": {"config": features, "context": 1}},
            "config": {"hidden_size": 32, "intermediate_size": 64, "hidden_dropout": 0.0, "classifier_dropout": 0.0},
        },
        "training": TINY_RECIPE["training"] | {"num_train_epochs": 12, "learning_rate": 5e-3},
    }
    rows, held = utterance_rows(60, 6), utterance_rows(10, 6)
    scores = []
    for name, context in (("with", 1), ("alone", 0)):
        recipe = copy.deepcopy(values) | {"output_dir": str(tmp_path / name)}
        recipe["model"]["encoders"]["text_features"]["context"] = context
        result = train(Recipe(**recipe, name=name), rows, held, write=lambda line: None)
        scores.append(result["metrics"]["mae"])
    assert scores[0] < 0.6 * scores[1]
    # The folder knows its context: a saved model is measured as it was trained.
    model = CrossModalForSequenceClassification.from_pretrained(tmp_path / "with")
    processor = CrossModalProcessor.from_pretrained(tmp_path / "with")
    assert evaluate(model, processor, held, "x", progress=False)["mae"] == pytest.approx(scores[0], abs=1e-4)
