"""Modalities and encoders added to, dropped from and swapped in a trained model: what fits is kept, by name."""

import pytest
import torch
import zoo
from crossmodal.modeling.editing_crossmodal import BY_MODALITY
from crossmodal.modeling.fusion_crossmodal import FUSIONS
from transformers import BertConfig

from crossmodal import (
    CrossModalForCaptioning,
    CrossModalForPointSegmentation,
    CrossModalForRetrieval,
    CrossModalForSequenceClassification,
    CrossModalForVQA,
    CrossModalModel,
    PointsConfig,
    TextDecoderConfig,
)


# Whose outputs for a modality that is absent are those of a model without it.
RETAINING = [name for name in FUSIONS if name != "interlaced"]
EXACT = {"rtol": 0, "atol": 1e-6}
EVERY = ("vision", "text", "eeg")
DECODER = TextDecoderConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1, eos_token_id=2
)  # fmt: skip


def model_of(*names, head=CrossModalForVQA, **overrides):
    """A model whose weights are all different from their first values."""
    model = head(zoo.tiny_config(*names, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def encoder_of(name):
    return getattr(zoo.tiny_config(name), f"{name}_config")


@pytest.mark.parametrize("fusion_type", RETAINING)
@pytest.mark.parametrize("dropped", EVERY)
def test_dropping_a_modality_gives_the_outputs_of_its_absence(fusion_type, dropped):
    model = model_of(*EVERY, fusion_type=fusion_type, auxiliary_loss_weight=0.3, pooled_features=True)
    smaller, report = model.with_modalities(drop=dropped)
    batch = zoo.tiny_batch(smaller.config)
    left = [index for index, name in enumerate(EVERY) if name != dropped]
    expected, found = model(**batch), smaller(**batch)
    torch.testing.assert_close(found.logits, expected.logits, **EXACT)
    torch.testing.assert_close(found.modality_weights, expected.modality_weights[:, left], **EXACT)
    torch.testing.assert_close(found.auxiliary_logits, expected.auxiliary_logits[:, left], **EXACT)
    assert smaller.config.modality_names == [name for name in EVERY if name != dropped]
    assert not report.new and f"crossmodal.modality_types.weight[{dropped}]" in report.left
    assert all(dropped in name or name.startswith("auxiliary") for name in report.left)


@pytest.mark.parametrize("fusion_type", RETAINING)
@pytest.mark.parametrize("bottleneck", ["exchange", "resample"])
def test_adding_a_modality_changes_nothing_where_it_is_absent(fusion_type, bottleneck):
    if bottleneck == "resample" and fusion_type != "bottleneck":
        pytest.skip("of one operator")
    model = model_of("vision", "text", fusion_type=fusion_type, bottleneck=bottleneck, task_names=["one", "two"])
    larger, report = model.with_modalities(add={"eeg": encoder_of("eeg")})
    batch = zoo.tiny_batch(model.config) | {"task_ids": torch.tensor([0, 1, 1, 0])}
    torch.testing.assert_close(larger(**batch).logits, model(**batch).logits, **EXACT)
    assert not report.left and "crossmodal.modality_types.weight[eeg]" in report.new
    assert all("eeg" in name for name in report.new)
    # And it is looked at where it is there.
    whole = batch | {key: value for key, value in zoo.tiny_batch(larger.config).items() if key.startswith("eeg")}
    assert not torch.allclose(larger(**whole).logits, larger(**batch).logits)


def test_rows_by_modality_go_by_name_when_the_first_one_is_dropped():
    model = model_of(*EVERY, missing_tokens=True, task_names=["one", "two"], auxiliary_loss_weight=0.3)
    smaller, _ = model.with_modalities(drop=["vision"], add={"photo": encoder_of("photo")})
    assert smaller.config.modality_names == ["text", "eeg", "photo"]
    for path, axis in BY_MODALITY.items():
        old, new = (m.crossmodal.state_dict()[path].movedim(axis, 0) for m in (model, smaller))
        assert torch.equal(new[:2], old[1:]) and not torch.equal(new[2], old[0]), path
    assert torch.equal(smaller.auxiliary.classifiers[0].weight, model.auxiliary.classifiers[1].weight)


def test_no_other_tensor_has_a_row_for_each_modality():
    """Of two models with 5 and 3 modalities, in which no other size is 5 or 3."""
    names = [f"signal_{letter}" for letter in "abcde"]
    modalities = {name: encoder_of("eeg") for name in names}
    options = {"missing_tokens": True, "task_names": ["one", "two"], "auxiliary_loss_weight": 0.3, "num_labels": 7}
    heads = {
        CrossModalForVQA: {},
        CrossModalForRetrieval: {"alignment_weight": 1.0, "loss_weighting": "learned"},
        CrossModalForCaptioning: {"decoder_config": DECODER},
    }
    for head, own in heads.items():
        config = type(zoo.tiny_config())(modalities=modalities, **zoo.TINY, **options, **own)
        larger = head(config)
        smaller, _ = larger.with_modalities(drop=names[3:])
        sizes = {name: value.shape for name, value in smaller.state_dict().items()}
        by_modality = {
            name for name, value in larger.state_dict().items()
            if name in sizes and value.shape != sizes[name]
        }  # fmt: skip
        assert by_modality == {f"crossmodal.{path}" for path in BY_MODALITY}


def test_another_encoder_keeps_the_fusion_and_begins_anew_where_it_is_read():
    model = model_of("vision", "text", pooled_features=True)
    model.freeze("text")
    wider = BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=60, max_position_embeddings=40
    )  # fmt: skip
    swapped, report = model.with_modalities(swap={"text": wider})
    assert all(".text." in name for name in (*report.new, *report.left))
    rooms = {name.split(".")[1] for name in report.new}
    assert rooms == {"encoders", "projections", "shortcuts"}
    for name in ("fusion", "poolings", "outputs", "weighting", "modality_types"):
        old, new = (getattr(m.crossmodal, name).state_dict() for m in (model, swapped))
        assert all(torch.equal(old[key], new[key]) for key in new)
    assert swapped.config.frozen_modalities == [] and swapped.config.modality_names == ["vision", "text"]
    batch = zoo.tiny_batch(model.config)
    images = {"pixel_values": batch["pixel_values"]}
    torch.testing.assert_close(swapped(**images).logits, model(**images).logits, **EXACT)


def test_an_encoder_of_the_same_kind_keeps_what_reads_it():
    model, other = model_of("vision", "text"), model_of("vision", "text")
    given = other.crossmodal.encoders["text"]
    swapped, report = model.with_modalities(swap={"text": given})
    assert all(".encoders.text." in name for name in report.new)
    assert torch.equal(swapped.get_input_embeddings().weight, given.get_input_embeddings().weight)
    swapped, report = model.with_modalities(swap={"text": model.crossmodal.encoders["text"]})
    batch = zoo.tiny_batch(model.config)
    torch.testing.assert_close(swapped(**batch).logits, model(**batch).logits, **EXACT)


def test_the_query_bank_of_another_encoder_begins_empty():
    model = model_of("vision", "text", head=CrossModalForRetrieval, query_bank_size=6)
    size = model.config.projection_dim
    model.query_bank.fill({name: torch.randn(6, size) for name in ("vision", "text")})
    given = model_of("vision", "text").crossmodal.encoders["text"]
    swapped, report = model.with_modalities(swap={"text": given})
    assert "query_bank.text_embeddings" in report.new and not swapped.query_bank.text_embeddings.any()
    assert torch.equal(swapped.query_bank.vision_embeddings, model.query_bank.vision_embeddings)


@pytest.mark.parametrize(
    ("head", "options"),
    [
        (CrossModalModel, {}),
        (CrossModalForSequenceClassification, {"modality_weighting": "uncertainty", "auxiliary_loss_weight": 0.3}),
        (CrossModalForRetrieval, {"alignment_weight": 1.0}),
        (CrossModalForCaptioning, {"decoder_config": DECODER}),
    ],
)  # fmt: skip
def test_every_head_can_be_changed_saved_and_loaded(tmp_path, head, options):
    options = {
        **options,
        "modality_dropout": {"eeg": 0.3},
        "modality_prior": {"vision": 2.0},
        "frozen_modalities": ["vision"],
    }
    model = model_of(*EVERY, head=head, **options)
    changed, report = model.with_modalities(drop="eeg", add={"photo": encoder_of("photo")})
    assert changed.config.modality_dropout == {} and changed.config.modality_prior == {"vision": 2.0}
    assert changed.config.frozen_modalities == ["vision"] and not changed._base.encoders["vision"].training
    changed.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = zoo.tiny_batch(changed.config)
    torch.testing.assert_close(loaded.eval()(**batch)[0], changed(**batch)[0], **EXACT)
    # The one before is untouched.
    assert model.config.modality_names == list(EVERY)
    assert "loaded: " in str(report) and "photo (" in str(report) and "eeg (" in str(report)


def test_points_can_lose_their_images(tmp_path):
    points = PointsConfig(feature_size=6, hidden_size=12, cell_sizes=[0.3, 0.6], extent=1.0)
    model = CrossModalForPointSegmentation.from_encoders(
        points=points, vision=encoder_of("vision"), **zoo.TINY, num_unimodal_layers=1, voxel_size=0.5, num_labels=4
    ).eval()
    alone, report = model.with_modalities(drop="vision", fusion_type="concat")
    assert not any(".streams.points." in name for name in report.left) and "streams.points.norm" not in str(report)
    alone.save_pretrained(tmp_path)
    batch = {"points_values": torch.rand(2, 24, 6) * 2 - 1, "points_uv": torch.rand(2, 24, 1, 2)}
    loaded = CrossModalForPointSegmentation.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, alone(**batch).logits, **EXACT)


def test_queries_of_the_fusion_and_the_first_one_follow_the_modalities():
    model = model_of(*EVERY, fusion_queries=["text", "eeg"])
    assert model.with_modalities(drop="eeg")[0].config.fusion_queries == ["text"]
    with pytest.raises(ValueError, match="fusion_queries=\\[\\] leaves nothing to fuse"):
        model.with_modalities(drop=["text", "eeg"])
    interlaced = model_of("vision", "text", fusion_type="interlaced")
    larger, report = interlaced.with_modalities(add={"eeg": encoder_of("eeg")})
    assert larger.config.first_query == "vision"
    with pytest.raises(ValueError, match="'interlaced' alternates between modalities"):
        interlaced.with_modalities(drop="text")
    assert interlaced.with_modalities(drop="text", fusion_type="cross")[0].config.modality_names == ["vision"]
    assert "crossmodal.fusion.layers.0.self_attn.vision.norm.weight" in report.loaded


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drop": "visoin"}, ["'visoin' is no modality", "vision"]),
        ({"swap": {"eeg": None}}, ["'eeg' is no modality", "text"]),
        ({"add": {"text": None}}, ["'text' is a modality of this model already", "swap"]),
        ({"drop": ["vision", "text"]}, ["leaves no modality", "vision"]),
        ({"drop": "text", "swap": {"text": None}}, ["'text' is named twice"]),
    ],
)
def test_a_change_that_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError) as error:
        model_of("vision", "text").with_modalities(**change)
    for word in words:
        assert word in str(error.value)
