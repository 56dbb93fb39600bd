"""Explanations: maps between modalities under every operator, a deletion test that attention passes, pictures."""

import numpy as np
import pytest
import torch
import zoo
from crossmodal.modeling.fusion_crossmodal import FUSIONS
from crossmodal.training.explain import attention_across, deletion_test, explain, removable, rows_of_steps, without
from crossmodal.training.pictures import explanation_picture
from matplotlib.axes import Axes
from PIL import Image
from test_encoders import compose
from test_pipeline import picture, tiny_processor_and_model

from crossmodal import (
    CrossModalConfig,
    CrossModalForRetrieval,
    CrossModalForSequenceClassification,
    CrossModalModel,
    CrossModalProcessor,
    FeatureSequenceConfig,
)


STEPS, CLASSES = 12, 3


def haystack(count, seed):
    """Sequences of noise with one marked step, whose other numbers tell the class; and a sequence that asks."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, STEPS, 8)).astype(np.float32)
    values[..., 0] = 0
    labels, places = rng.integers(CLASSES, size=count), rng.integers(STEPS, size=count)
    values[np.arange(count), places, 0] = 3
    values[np.arange(count), places, 1:] = 2 * np.eye(7)[labels]
    return values, labels, places


@pytest.fixture(scope="module")
def finder():
    """A model that has learnt to find the marked step."""
    torch.manual_seed(0)
    encoder = {"feature_size": 8, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 0}
    config = CrossModalConfig(
        modalities={"signal": FeatureSequenceConfig(**encoder), "question": FeatureSequenceConfig(**encoder)},
        fusion_queries=["question"],
        hidden_size=32,
        num_attention_heads=2,
        num_fusion_layers=1,
        intermediate_size=64,
        hidden_dropout=0.0,
        pooling="first",
        num_labels=CLASSES,
    )
    model = CrossModalForSequenceClassification(config)
    values, labels, _ = haystack(2048, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(160):
        rows = slice(step * 64 % 2048, step * 64 % 2048 + 64)
        batch = {"signal_values": torch.tensor(values[rows]), "question_values": torch.ones(64, 1, 8)}
        loss = model(**batch, labels=torch.tensor(labels[rows])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), CrossModalProcessor.from_config(config)


def test_removing_what_was_attended_to_hurts_more_than_chance(finder):
    model, processor = finder
    values, labels, places = haystack(200, seed=1)
    samples = [{"signal": value, "question": np.ones((1, 8), np.float32)} for value in values]
    with torch.no_grad():
        output = model(**processor(**samples[0]), output_attentions=True)
    assert attention_across(model, output)["question<-signal"][0].mean(dim=0).argmax() == places[0]
    table = deletion_test(model, processor, samples, "signal", fractions=(1 / STEPS, 0.25), progress=False)
    for row in table:
        assert row["drop"] > row["drop_random"] + 5 * row["error"] + 0.1, row
        assert row["changed"] > 2 * row["changed_random"] > 0, row
    # One step of twelve: at random the marked one is hit in a twelfth of the rows.
    assert table[0]["drop"] > 0.4 and table[0]["drop_random"] < 0.12


def test_the_same_seed_gives_the_same_table_and_batches_do_not_matter(finder):
    model, processor = finder
    values, _, _ = haystack(20, seed=2)
    samples = [{"signal": value, "question": np.ones((1, 8), np.float32)} for value in values]
    tables = [
        deletion_test(model, processor, samples, "signal", (0.25,), batch_size=size, progress=False)[0]
        for size in (20, 20, 7)
    ]
    assert tables[0] == tables[1]
    # What is drawn at random depends on the batches; what attention says does not.
    assert tables[0]["drop"] == pytest.approx(tables[2]["drop"], abs=1e-5)
    assert deletion_test(model, processor, samples[:1], "signal", (0.25,), progress=False)[0]["error"] == 0


@pytest.mark.parametrize("fusion_type", FUSIONS)
def test_maps_between_modalities_under_every_operator(fusion_type):
    processor, model = tiny_processor_and_model(fusion_type=fusion_type)
    batch = processor(images=[picture(), picture()], text=["what color is this?", "which?"])
    with torch.no_grad():
        output = model(**batch, output_attentions=True)
    if fusion_type == "concat":
        assert attention_across(model, output) == {}
        with pytest.raises(ValueError, match="nothing attends to 'vision' in this model .fusion_type='concat'"):
            deletion_test(model, processor, [{"images": picture(), "text": "what?"}], "vision", progress=False)
        return
    maps = attention_across(model, output)
    words, patches = batch["input_ids"].shape[1], np.prod(output.token_grids["vision"])
    assert maps["text<-vision"].shape[:2] == (2, words) and maps["text<-vision"].shape[2] >= patches
    for pair, weights in maps.items():
        assert (weights >= 0).all() and (weights.sum(dim=-1) <= 1 + 1e-5).all(), pair
        if pair.endswith("<-text"):
            assert (weights[..., ~batch["attention_mask"][1].bool()][1] == 0).all(), pair


@pytest.mark.parametrize("bottleneck", ["exchange", "resample"])
def test_maps_through_latents_are_products_of_reading_and_collecting(bottleneck):
    """Tokens read what latents collected: in the same layer, or in the one before."""
    processor, model = tiny_processor_and_model(fusion_type="bottleneck", bottleneck=bottleneck, num_fusion_layers=2)
    batch = processor(images=[picture()], text=["what color is this?"])
    with torch.no_grad():
        output = model(**batch, output_attentions=True)
    layers = output.cross_attentions
    maps = attention_across(model, output)
    if bottleneck == "exchange":
        expected = layers[1]["text<-latents"] @ layers[0]["latents<-vision"]
    else:
        expected = sum(layer["text<-latents"] @ layer["latents<-vision"] for layer in layers) / 2
    torch.testing.assert_close(maps["text<-vision"], expected.mean(dim=1))


def test_parts_of_an_input_are_taken_away():
    processor, model = tiny_processor_and_model()
    batch = processor(images=[picture()], text=["what color is this?"])
    with torch.no_grad():
        output = model(**batch, output_attentions=True, output_hidden_states=True)
    length, grid = output.modality_tokens["vision"].shape[1], output.token_grids["vision"]
    free = removable(model, processor, batch, "vision", length, grid, "cpu")
    assert free.sum() == np.prod(grid) and free[:, -np.prod(grid) :].all()
    chosen = torch.zeros_like(free)
    chosen[0, -1] = True
    changed = without(model, batch, "vision", chosen, grid)["pixel_values"]
    height, width = (size // side for size, side in zip(changed.shape[-2:], grid, strict=True))
    whole = batch["pixel_values"]
    assert torch.equal(changed[..., :-height, :], whole[..., :-height, :])
    mean = whole.mean(dim=(2, 3))[..., None, None].expand(1, 3, height, width)
    torch.testing.assert_close(changed[..., -height:, -width:], mean)
    free = removable(model, processor, batch, "text", batch["input_ids"].shape[1], None, "cpu")
    assert not free[0, 0] and not free[0, -1] and free[0, 1:-1].all()
    assert without(model, batch, "text", free, None)["attention_mask"].sum() == 2


def test_record_and_picture_of_an_answer(tmp_path):
    processor, model = tiny_processor_and_model(num_fusion_layers=2)
    record = explain(model, processor, images=picture(), text="what color is this?")
    assert len(record["gates"]) == 2 and record["gates"][0].keys() == {"text<-vision", "vision<-text"}
    assert all(size > 0 for layer in record["gates"] for size in layer.values())
    assert sum(record["modality_weights"].values()) == pytest.approx(1)
    assert record["words"]["text"][:2] == [("what", [1]), ("color", [2])] and record["words"]["vision"] is None
    explanation_picture(record, tmp_path / "out.png", ["color"])
    assert min(Image.open(tmp_path / "out.png").size) > 400
    with pytest.raises(ValueError, match="the text has no word 'horse'. Expected any of ..what'"):
        explanation_picture(record, tmp_path / "none.png", ["horse"])
    assert not (tmp_path / "none.png").exists()
    alone = explain(model, processor, text="what color is this?")
    explanation_picture(alone, tmp_path / "alone.png")
    assert alone["modality_weights"]["vision"] == 0


def test_sequences_are_drawn_over_time(finder, tmp_path):
    model, processor = finder
    values, _, places = haystack(1, seed=3)
    record = explain(model, processor, signal=values[0], question=np.ones((1, 8), np.float32))
    assert record["token_weights"]["signal"].argmax() == places[0]
    explanation_picture(record, tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size[0] > 400


def test_rows_without_a_modality_spectrograms_and_regression_are_refused():
    processor, model = tiny_processor_and_model()
    samples = [{"images": picture(), "text": "what?"}, {"images": None, "text": "what?"}]
    with pytest.raises(ValueError, match="some rows lack a modality"):
        deletion_test(model, processor, samples, "vision", progress=False)
    listener, _, batch = compose("audio-spectrogram-transformer")
    with pytest.raises(ValueError, match="its tokens are no parts of the input"):
        without(listener, batch, "audio", torch.ones(2, 5, dtype=torch.bool), None)
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="problem_type='regression' has no probability"):
        explain(model, processor, text="what?")


@pytest.mark.parametrize(
    "overrides",
    [
        {"fusion_type": "concat"},
        {"fusion_queries": ["text"]},
        {"fusion_queries": ["text"], "gate": "closed"},
        {"fusion_type": "mutual"},
        {"fusion_type": "bottleneck", "bottleneck": "resample"},
    ],
    ids=str,
)
def test_an_answer_is_drawn_whatever_looks_at_what_and_whatever_is_given(overrides, tmp_path):
    processor, model = tiny_processor_and_model(num_fusion_layers=2, **overrides)
    model = model.to(torch.bfloat16)
    for inputs in ({"images": picture(), "text": "what color?"}, {"vision": picture()}, {"text": "what color?"}):
        record = explain(model, processor, **inputs)
        explanation_picture(record, tmp_path / "out.png")
        assert record["answers"][0][1] > 0


@pytest.mark.parametrize("head", [CrossModalForRetrieval, CrossModalModel])
def test_a_model_that_chooses_no_answer_says_so(head):
    processor, _ = tiny_processor_and_model()
    model = head(zoo.tiny_config())
    with pytest.raises(ValueError, match=f"{head.__name__} chooses no answer.*CrossModalForVQA"):
        explain(model, processor, images=picture("red"), text="what color?")


@pytest.mark.parametrize("kind", ["audio-spectrogram-transformer", "crossmodal_mmvit_sound"])
def test_patches_of_sound_lie_in_bands_over_time(kind):
    model, name, batch = compose(kind, CrossModalModel, levels=[0])
    key = model.config.input_keys(name)[0]
    time = 1 if kind.startswith("audio") else 2
    late = batch[key].clone()
    late.transpose(0, time)[-late.shape[time] // 4 :] += 3.0
    with torch.no_grad():
        tokens = [
            model.encode(model._collect_inputs({**batch, key: x}))[0][name].levels[0] for x in (batch[key], late)
        ]
    rows, steps = rows_of_steps(model, batch, name, tokens[0].shape[1])
    assert 0 <= tokens[0].shape[1] - rows * steps <= 2 and 1 < steps < late.shape[time]
    # Sound that changes late changes the last step, in every band, and not the first.
    change = (tokens[1] - tokens[0]).norm(dim=-1)[0, -rows * steps :].view(rows, steps)
    assert (change[:, -1] > 0.1).all() and (change[:, 0] < 1e-4).all()


def test_a_spectrogram_is_explained_and_drawn(tmp_path, monkeypatch):
    model, name, batch = compose("audio-spectrogram-transformer", CrossModalForSequenceClassification)
    length = model(**batch, output_hidden_states=True).modality_tokens[name].shape[1]
    rows, steps = rows_of_steps(model, batch, name, length)
    seen = np.zeros(length)
    seen[-rows * steps :] = np.tile(np.arange(steps), rows)
    record = {
        "inputs": {}, "types": {name: "audio"}, "answers": [("a", 0.7), ("b", 0.3)], "modality_weights": {name: 1.0},
        "attention": {}, "gates": [], "words": {name: None}, "grids": {}, "rows_of_steps": {name: (rows, steps)},
        "token_weights": {name: seen},
    }  # fmt: skip
    drawn = []
    monkeypatch.setattr(Axes, "fill_between", lambda axes, x, low, high, **options: drawn.append(low - high))
    explanation_picture(record, tmp_path / "why.png")
    # One slope from nothing to the peak, not a slope for each band.
    assert len(drawn) == 1 and len(drawn[0]) == steps > 1 and (np.diff(drawn[0]) > 0).all()


def test_silence_at_the_end_of_sound_is_no_part_to_remove():
    model, _, batch = compose("wav2vec2")
    values = batch["input_values"]
    mask = torch.ones_like(values, dtype=torch.bool)
    mask[1, values.shape[1] // 4 :] = False
    with torch.no_grad():
        length = model.base_model.encode_tokens("audio", values, mask)[0].shape[1]
    free = removable(model, None, {**batch, "audio_attention_mask": mask}, "audio", length, None, "cpu")
    assert free[0].all() and 0 < free[1].sum() < 0.35 * length


def test_words_are_those_that_the_model_saw_and_unknown_ones_count():
    processor, model = tiny_processor_and_model()
    processor.modalities[1]["max_tokens"] = 4
    record = explain(model, processor, images=picture(), text="what color is this?")
    assert [places for _, places in record["words"]["text"]] == [[1], [2]]
    batch = processor(images=[picture()], text=["what zebra"])
    assert (batch["input_ids"] == processor.tokenizer.unk_token_id).sum() == 1
    free = removable(model, processor, batch, "text", batch["input_ids"].shape[1], None, "cpu")
    assert free.sum() == 2
