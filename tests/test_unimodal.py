"""Labels of each modality alone, and what their classifiers say as evidence for the head."""

import pytest
import torch
import zoo
from crossmodal.training.classification import ClassificationTask
from crossmodal.training.collator import SampleCollator
from crossmodal.training.datasets import RowDataset
from crossmodal.training.mixing import MixingCollator
from test_classification import post_rows
from torch.nn.functional import cross_entropy
from world import tiny_processor_and_model

from crossmodal import CrossModalForSequenceClassification


def head(**overrides):
    torch.manual_seed(0)
    options = {"auxiliary_loss_weight": 0.5, "problem_type": "single_label_classification", "num_labels": 3}
    return CrossModalForSequenceClassification(zoo.tiny_config(**(options | overrides))).eval()


def test_each_modality_is_taught_by_its_own_labels():
    model = head(class_weights=[1.0, 3.0, 0.5])
    batch, labels = zoo.tiny_batch(model.config), torch.tensor([0, 1, 2, 1])
    batch["modality_mask"] = torch.tensor([[1, 1], [1, 1], [0, 1], [1, 1]]).bool()
    targets = torch.stack([torch.tensor([1, 1, 2, 0]), torch.tensor([0, -100, 2, 1])], dim=1)
    output, weights = model(**batch, labels=labels, unimodal_targets=targets), torch.tensor([1.0, 3.0, 0.5])
    present = [0, 1, 3]
    expected = cross_entropy(output.auxiliary_logits[present, 0], targets[present, 0], weights)
    torch.testing.assert_close(output.auxiliary_losses[0], expected)
    expected = cross_entropy(output.auxiliary_logits[:, 1], targets[:, 1], weights)
    torch.testing.assert_close(output.auxiliary_losses[1], expected)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels, weights))
    counts = model.count_items(labels=labels, unimodal_targets=targets, **batch)
    torch.testing.assert_close(counts, torch.tensor([7.5, 3 + 3 + 1.0, 1 + 0.5 + 3]))
    with pytest.raises(ValueError, match=r"unimodal_targets of shape \(4,\).*Expected \(4, 2\)"):
        model(**batch, labels=labels, unimodal_targets=labels)


def test_parts_of_a_step_add_up_to_the_whole_with_targets_of_their_own():
    model = head(num_labels=5).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch, labels = zoo.tiny_batch(model.config), torch.tensor([0, 4, 2, 1])
    targets = torch.tensor([[1, 2], [-100, 3], [4, 0], [-100, 1]])
    whole = model(**batch, labels=labels, unimodal_targets=targets).loss
    total = model.count_items(labels=labels, unimodal_targets=targets, **batch)
    assert total.tolist() == [4, 2, 4]
    parts = 0
    for rows in (slice(0, 1), slice(1, 4)):
        own = {key: value[rows] for key, value in batch.items()}
        parts += model(**own, labels=labels[rows], unimodal_targets=targets[rows], num_items_in_batch=total).loss
    torch.testing.assert_close(parts, whole)


def test_evidence_is_nothing_at_first_and_then_what_each_classifier_says():
    plain, model = head(), head(unimodal_evidence=True)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing == [f"classifier.evidence.{m}.weight" for m in range(2)] and not unexpected
    batch = zoo.tiny_batch(model.config) | {"modality_mask": torch.tensor([[1, 1], [0, 1], [1, 0], [1, 1]]).bool()}
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    with torch.no_grad():
        for layer in model.classifier.evidence:
            layer.weight.normal_(std=0.5)
    before = model(**batch)
    assert not torch.allclose(before.logits, plain(**batch).logits)
    with torch.no_grad():
        model.auxiliary.classifiers[0].bias += torch.tensor([3.0, 0.0, 0.0])
    moved = (model(**batch).logits - before.logits).abs().amax(dim=1) > 1e-4
    assert moved.tolist() == [True, False, True, True]
    # The loss of the head teaches no classifier of a modality what it does not know.
    model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert model.classifier.evidence[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in model.auxiliary.parameters())
    with pytest.raises(ValueError, match="unimodal_evidence=True.*auxiliary_loss_weight=0"):
        zoo.tiny_config(unimodal_evidence=True)


def test_other_answers_and_other_modalities_keep_the_evidence_that_fits():
    model = head(unimodal_evidence=True, id2label={0: "a", 1: "b", 2: "c"})
    with torch.no_grad():
        for layer in model.classifier.evidence:
            layer.weight.normal_()
    smaller, _ = model.with_modalities(drop=model.config.modality_names[0])
    assert torch.equal(smaller.classifier.evidence[0].weight, model.classifier.evidence[1].weight)
    before = model.classifier.evidence[1].weight.detach().clone()
    model.resize_answers({0: "c", 1: "d"})
    after = model.classifier.evidence[1].weight
    assert torch.equal(after[:, 0], before[:, 2]) and not after[:, 1].any() and after.requires_grad
    batch = zoo.tiny_batch(model.config)
    assert model(**batch, labels=torch.zeros(4, dtype=torch.long)).logits.shape == (4, 2)


def posts_with_own_labels():
    rows = post_rows(6)
    return rows.add_column("image_label", ["blue"] * 6).add_column("text_label", [*["red"] * 5, None])


def test_labels_of_each_modality_come_from_their_columns_and_are_mixed_like_the_others():
    samples = RowDataset(posts_with_own_labels(), "classification")
    assert samples[0]["unimodal_targets"] == {"images": "blue", "text": "red"}
    processor, _ = tiny_processor_and_model()
    task = ClassificationTask({0: "red", 1: "green", 2: "blue"}, "single_label_classification")
    batch = SampleCollator(processor, task.encode_targets, deduplicate=False)([samples[i] for i in range(6)])
    assert processor.modality_names == ["vision", "text"]
    assert batch["unimodal_targets"].tolist() == [[2, 0]] * 5 + [[2, -100]]
    assert "unimodal_targets" not in SampleCollator(processor, task.encode_targets, unimodal=False)([samples[0]])
    assert "unimodal_targets" not in RowDataset(post_rows(3), "classification")[0]

    class Pixels:
        deduplicate = True

        def __call__(self, rows):
            keys = ("pixel_values", "labels", "unimodal_targets")
            return {key: batch[key][:5] for key in keys}

    mixed = MixingCollator(Pixels(), processor.modalities, 3, "single_label_classification", mixup=1.0)(None)
    assert mixed["unimodal_targets"].shape == (5, 2, 3)
    torch.testing.assert_close(mixed["unimodal_targets"][:, 0], torch.tensor([[0.0, 0, 1]] * 5))
    assert mixed["labels"].shape == (5, 3)
