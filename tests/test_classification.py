"""CrossModalForSequenceClassification: its losses, its Auto class, and a run on rows with labels."""

import copy

import datasets
import pytest
import torch
import zoo
from crossmodal.training.evaluate import evaluate
from crossmodal.training.recipes import Recipe
from crossmodal.training.tasks import ClassificationTask
from crossmodal.training.train import train
from world import TINY_RECIPE, picture, run_as_stranger

from crossmodal import CrossModalForSequenceClassification


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


def test_a_run_on_labelled_posts_ends_in_a_folder_that_a_stranger_loads(tmp_path):
    values = copy.deepcopy(TINY_RECIPE) | {
        "task": "classification",
        "dataset": "posts",
        "output_dir": str(tmp_path / "m"),
    }
    values["training"]["num_train_epochs"] = 5
    result = train(Recipe(**values, name="posts"), post_rows(48), post_rows(12), write=lambda line: None)
    assert result["metrics"]["accuracy"] == 1.0 == result["metrics"]["weighted_f1"]
    card = (tmp_path / "m" / "README.md").read_text()
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


def test_weighted_f1_is_worked_by_hand():
    scores = ClassificationTask.score_answers(["a", "a", "b", "b"], ["a", "b", "b", "b"])
    # a: precision 1/2, recall 1; b: precision 1, recall 2/3; weights 1/4 and 3/4.
    assert scores["accuracy"] == 0.75
    assert scores["weighted_f1"] == pytest.approx(0.25 * (2 / 3) + 0.75 * 0.8)
