"""Missing modalities, in training and for good: dropout of modalities, tokens that stand in, weights, unimodal losses."""

import math

import pytest
import torch
import zoo
from crossmodal.modeling.fusion_crossmodal import FUSIONS
from crossmodal.modeling.losses_crossmodal import row_losses, unimodal_losses
from peft import LoraConfig, PeftModel, get_peft_model
from test_modeling import CLOSE, EXACT, NAMES, assert_same_output, lively, poison, without

from crossmodal import CrossModalForVQA, CrossModalModel


LABELS = torch.tensor([0, 1, 2, 3])
PRESENCE = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [True, True, False]])
fusion_types = pytest.mark.parametrize("fusion_type", FUSIONS)


def model_of(*names, **overrides):
    torch.manual_seed(0)
    return lively(CrossModalForVQA(zoo.tiny_config(*(names or NAMES), **overrides)))


# Modality dropout


@pytest.mark.parametrize("rates", [0.9, {"text": 0.9}], ids=["all", "one"])
def test_modality_dropout_takes_modalities_but_never_the_last_one(rates):
    model = CrossModalModel(zoo.tiny_config(*NAMES, modality_dropout=rates)).train()
    presence = PRESENCE.repeat(100, 1)
    kept = model._drop_modalities(presence)
    assert kept.any(1).all() and not (kept & ~presence).any()
    lost = (presence & ~kept).float().sum(0) / presence.float().sum(0)
    if isinstance(rates, dict):
        # Rows that have text alone keep it.
        assert lost[0] == lost[2] == 0 and lost[1] == pytest.approx(0.9 * 2 / 3, abs=0.08)
        assert kept[2::4, 1].all()
    else:
        # Of three, each is lost unless it is kept, or is the highest of three that all would go; of two likewise.
        lost = 1 - kept.view(100, 4, 3).float().mean(0)
        assert lost[0].mean() == pytest.approx(0.9 - 0.9**3 / 3, abs=0.08)
        assert lost[3, :2].mean() == pytest.approx(0.9 - 0.9**2 / 2, abs=0.08)


def test_modality_dropout_works_in_training_alone_and_changes_what_is_learnt_from():
    model = model_of(modality_dropout=0.5)
    batch = zoo.tiny_batch(model.config)
    model.eval()
    assert_same_output(model(**batch), model(**batch), EXACT)
    assert (model(**batch).modality_weights > 0).all()
    model.train()
    weights = torch.cat([model(**batch).modality_weights for _ in range(10)])
    assert (weights == 0).any() and ((weights > 0).sum(1) >= 1).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(40))


def test_modality_dropout_keeps_to_the_rows_that_have_the_modality():
    model = model_of(modality_dropout=0.5).train()
    batch = zoo.tiny_batch(model.config)
    for _ in range(5):
        weights = model(**poison(model, batch, PRESENCE), modality_mask=PRESENCE).modality_weights
        assert weights.isfinite().all() and (weights[~PRESENCE] == 0).all()


# Tokens that stand in


@fusion_types
def test_a_missing_modality_is_one_however_it_is_missing(fusion_type):
    model = model_of(fusion_type=fusion_type, missing_tokens=True).eval()
    batch = zoo.tiny_batch(model.config)
    never_given = model(**without(model, batch, "text"))
    mask = torch.tensor([True, False, True]).expand(4, 3)
    assert_same_output(model(**poison(model, batch, mask), modality_mask=mask), never_given, CLOSE)
    clean, poisoned = (model(**inputs, modality_mask=PRESENCE) for inputs in (batch, poison(model, batch, PRESENCE)))
    assert_same_output(clean, poisoned, EXACT)
    assert (clean.modality_weights[~PRESENCE] == 0).all()
    torch.testing.assert_close(clean.modality_weights.sum(1), torch.ones(4))


@pytest.mark.parametrize("fusion_type", ["cross", "joint", "bottleneck"])
def test_the_others_look_at_what_stands_in_and_it_learns(fusion_type):
    model = model_of(fusion_type=fusion_type, missing_tokens=True).eval()
    batch = without(model, zoo.tiny_batch(model.config), "text")
    before = model(**batch)
    gradient = torch.autograd.grad(before.logits.sum(), model.crossmodal.missing_tokens.weight)[0]
    assert (gradient[1] != 0).any() and (gradient[[0, 2]] == 0).all()
    with torch.no_grad():
        model.crossmodal.missing_tokens.weight[1] += torch.randn(16)
    assert not torch.allclose(before.logits, model(**batch).logits)
    with torch.no_grad():
        model.crossmodal.missing_tokens.weight[0] += torch.randn(16)
    whole = zoo.tiny_batch(model.config)
    expected = model(**whole).logits
    with torch.no_grad():
        model.crossmodal.missing_tokens.weight[1] += torch.randn(16)
    torch.testing.assert_close(model(**whole).logits, expected, **EXACT)


def test_an_input_that_rows_share_may_be_missing_in_some():
    model = model_of(missing_tokens=True).eval()
    batch = zoo.tiny_batch(model.config)
    index = torch.tensor([1, 0, 1, 1])
    shared = {**batch, "pixel_values": batch["pixel_values"][:2], "pixel_values_index": index}
    spread = {**batch, "pixel_values": batch["pixel_values"][index]}
    one, other = (model(**inputs, modality_mask=PRESENCE) for inputs in (shared, spread))
    assert_same_output(one, other, CLOSE)


def test_missing_tokens_are_saved_with_lora(tmp_path):
    model = model_of("vision", "text", missing_tokens=True)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["missing_tokens", "classifier"])
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    batch = without(model, zoo.tiny_batch(model.config), "text")
    expected = adapted.eval()(**batch).logits
    adapted.save_pretrained(tmp_path)
    fresh = model_of("vision", "text", missing_tokens=True)
    assert not torch.allclose(fresh.eval()(**batch).logits, expected)
    torch.testing.assert_close(PeftModel.from_pretrained(fresh, tmp_path).eval()(**batch).logits, expected)


# Weights


def test_weights_depend_on_the_task_where_a_model_has_several():
    model = model_of(task_names=["answer", "caption"]).eval()
    batch = zoo.tiny_batch(model.config)
    one, other = (model(**batch, task_ids=torch.full((4,), task)).modality_weights for task in (0, 1))
    assert not torch.allclose(one, other)
    mixed = model(**batch, task_ids=torch.tensor([0, 1, 0, 1])).modality_weights
    torch.testing.assert_close(mixed, torch.stack([one[0], other[1], one[2], other[3]]))
    with pytest.raises(ValueError, match=r"task_names=\['answer', 'caption'\] and none were given"):
        model(**batch)
    with pytest.raises(ValueError, match=r"task_names=None and task_ids \(4,\) were given"):
        model_of()(**batch, task_ids=torch.zeros(4, dtype=torch.long))


def test_weights_follow_the_uncertainty_that_unimodal_losses_teach():
    """One modality tells the label, the other is noise: the weight goes to the first, and the noise is known as such."""
    torch.manual_seed(0)
    modalities = {
        name: {"model_type": "crossmodal_features", "feature_size": 4, "hidden_size": 16, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "intermediate_size": 32}
        for name in ("signal", "noise")
    }
    from crossmodal import CrossModalConfig

    config = CrossModalConfig(
        modalities=modalities, **zoo.TINY, num_labels=4, modality_weighting="uncertainty", auxiliary_loss_weight=1.0,
        hidden_dropout=0.0,
    )  # fmt: skip
    model = CrossModalForVQA(config).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        labels = torch.randint(0, 4, (64,))
        signal = torch.nn.functional.one_hot(labels, 4).float()[:, None].expand(-1, 3, -1)
        batch = {"signal_values": signal + 0.1 * torch.randn(64, 3, 4), "noise_values": torch.randn(64, 3, 4)}
        output = model(**batch, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    model.eval()
    output = model(**batch, labels=labels)
    assert output.modality_weights[:, 0].mean() > 0.9
    assert output.auxiliary_losses[0] < 0 < output.auxiliary_losses[1]
    assert (output.auxiliary_logits[:, 0].argmax(1) == labels).float().mean() > 0.95
    assert (output.auxiliary_logits[:, 1].argmax(1) == labels).float().mean() < 0.6


@pytest.mark.parametrize("weighting", ["uniform", "adaptive"])
def test_a_prior_says_how_far_each_modality_is_trusted(weighting):
    # Adaptive weights are equal at the start.
    config = zoo.tiny_config(
        "vision", "text", "eeg", modality_weighting=weighting, modality_prior={"text": 3, "eeg": 0.5}
    )
    model = CrossModalForVQA(config).eval()
    presence = torch.tensor([[True, True, True], [True, False, True], [False, True, True], [False, False, True]])
    found = model(**zoo.tiny_batch(config), modality_mask=presence).modality_weights
    expected = torch.tensor([[1, 3, 0.5], [1, 0, 0.5], [0, 3, 0.5], [0, 0, 0.5]])
    torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True))
    with pytest.raises(ValueError, match="modality_prior=.*'sound' is no modality of this model"):
        zoo.tiny_config(modality_prior={"sound": 1})
    with pytest.raises(ValueError, match="Expected numbers above 0"):
        zoo.tiny_config(modality_prior={"text": 0})


def test_uncertainty_without_what_teaches_it_is_refused():
    with pytest.raises(ValueError, match="auxiliary_loss_weight=0"):
        zoo.tiny_config(modality_weighting="uncertainty")


# Unimodal losses


@pytest.mark.parametrize("labels", [torch.tensor([0, 2, -100, 1]), torch.rand(4, 3)], ids=["labels", "scores"])
@pytest.mark.parametrize("uncertain", [False, True])
def test_unimodal_losses_are_their_equation(labels, uncertain):
    logits, log_variances = torch.randn(4, 2, 3), torch.randn(4, 2)
    presence = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    problem_type = "single_label_classification" if labels.dim() == 1 else "multi_label_classification"
    found = unimodal_losses(logits, labels, presence, log_variances if uncertain else None, problem_type)
    for m in range(2):
        losses = []
        for row in range(4):
            if not presence[row, m] or (labels.dim() == 1 and labels[row] == -100):
                continue
            if labels.dim() == 1:
                loss = -logits[row, m].log_softmax(0)[labels[row]]
            else:
                p = logits[row, m].sigmoid()
                loss = -(labels[row] * p.log() + (1 - labels[row]) * (1 - p).log()).sum()
            if uncertain:
                loss = math.exp(-log_variances[row, m]) * loss + log_variances[row, m] / 2
            losses.append(loss)
        torch.testing.assert_close(found[m], sum(losses) / len(losses))
    nobody = torch.zeros(4, 2, dtype=torch.bool)
    assert unimodal_losses(logits, labels, nobody, problem_type=problem_type).tolist() == [0, 0]


def test_row_losses_average_to_the_loss_of_the_head():
    model = model_of().eval()
    batch = zoo.tiny_batch(model.config)
    labels = torch.tensor([0, 1, -100, 3])
    output = model(**batch, labels=labels)
    losses, counts = row_losses(output.logits, labels, "single_label_classification")
    assert counts.tolist() == [1, 1, 0, 1]
    torch.testing.assert_close(losses.sum() / 3, output.loss)


def test_unimodal_losses_are_added_in_training_alone_and_know_nothing_of_other_modalities():
    model = model_of(auxiliary_loss_weight=0.5, hidden_dropout=0.0, classifier_dropout=0.0).eval()
    batch = zoo.tiny_batch(model.config)
    output = model(**batch, labels=LABELS)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, LABELS))
    changed = {key: value.flip(0) if "eeg" in key else value for key, value in batch.items()}
    other = model(**changed, labels=LABELS)
    torch.testing.assert_close(output.auxiliary_logits[:, :2], other.auxiliary_logits[:, :2], **EXACT)
    assert not torch.equal(output.auxiliary_logits[:, 2], other.auxiliary_logits[:, 2])
    model.train()
    output = model(**batch, labels=LABELS)
    expected = torch.nn.functional.cross_entropy(output.logits, LABELS) + 0.5 * output.auxiliary_losses.mean()
    torch.testing.assert_close(output.loss, expected)


def test_every_part_of_adaptive_weighting_survives_a_save(tmp_path):
    options = {"task_names": ["a", "b"], "modality_dropout": {"text": 0.2}, "missing_tokens": True}
    model = model_of("vision", "text", **options, auxiliary_loss_weight=0.3, modality_weighting="uncertainty").eval()
    model.save_pretrained(tmp_path)
    loaded = CrossModalForVQA.from_pretrained(tmp_path).eval()
    assert loaded.config.modality_dropout == {"text": 0.2} and loaded.config.task_names == ["a", "b"]
    batch = without(model, zoo.tiny_batch(model.config), "text") | {"task_ids": torch.tensor([0, 1, 1, 0])}
    assert_same_output(loaded(**batch), model(**batch), EXACT)
    loaded.resize_answers({0: "yes", 1: "no"})
    assert loaded(**batch).auxiliary_logits.shape == (4, 2, 2)


def test_a_model_without_text_is_told_what_the_rows_of_a_step_count():
    model = CrossModalForVQA(
        zoo.tiny_config("vision", "eeg", auxiliary_loss_weight=0.3, hidden_dropout=0.0, classifier_dropout=0.0)
    )
    batch = zoo.tiny_batch(model.config) | {"labels": torch.tensor([0, 1, 2, 3])}
    alone = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=model.count_items(**batch)).loss, alone)
