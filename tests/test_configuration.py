"""CrossModalConfig: normalisation, round trip, and errors that name key, value, what is allowed and the fix."""

import json

import pytest
import torch
import zoo
from transformers import BertConfig, ConvNextConfig, MobileNetV2Config, ViTConfig

from crossmodal import CrossModalConfig, CrossModalForVQA, CrossModalModel, FeatureSequenceConfig


AUTO_CLASSES = {
    "AutoConfig",
    "AutoModel",
    "AutoModelForVisualQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForSemanticSegmentation",
    "AutoProcessor",
}


def feature_config(size=6):
    return FeatureSequenceConfig(feature_size=size, hidden_size=16, num_hidden_layers=1, intermediate_size=32)


def error_of(make, *arguments, **keywords):
    with pytest.raises(ValueError) as caught:
        make(*arguments, **keywords)
    return str(caught.value)


NEAR_MISSES = {
    "fusion_typ": ("concat", "fusion_type"),
    "hidden_sizes": (48, "hidden_size"),
    "modality_weightings": ("uniform", "modality_weighting"),
    "num_fusion_layer": (2, "num_fusion_layers"),
    "fusion_level": ("single", "fusion_levels"),
    "num_label": (3, "num_labels"),
}


@pytest.mark.parametrize("key", NEAR_MISSES)
def test_a_near_miss_of_a_key_is_an_error_with_the_right_name(key, tmp_path):
    value, meant = NEAR_MISSES[key]
    config = zoo.tiny_config()
    config.save_pretrained(tmp_path)
    CrossModalModel(config).save_pretrained(tmp_path / "model")
    vision = zoo.tiny_encoder("vit")[0]
    for message in (
        error_of(CrossModalConfig, **{key: value}),
        error_of(CrossModalConfig.from_pretrained, tmp_path, **{key: value}),
        error_of(CrossModalModel.from_pretrained, tmp_path / "model", **{key: value}),
        error_of(CrossModalForVQA.from_encoders, vision=vision, **{key: value}),
    ):
        assert f"{key}={value!r}" in message and f"Did you mean {meant!r}?" in message and "Correct" in message


def test_a_near_miss_of_freeze_and_of_a_nested_config_are_errors(tmp_path):
    config = zoo.tiny_config()
    config.save_pretrained(tmp_path)
    assert "'freeze'" in error_of(CrossModalForVQA.from_encoders, vision=config.vision_config, freez=("vision",))
    message = error_of(CrossModalConfig.from_pretrained, tmp_path, vision_confg={"hidden_dropout_prob": 0.3})
    assert "Did you mean 'vision_config'?" in message


def test_unrelated_unknown_keys_survive_save_and_load(tmp_path):
    kept = {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "custom_pipelines": {"visual-question-answering": {"impl": "pipeline_crossmodal.X", "pt": []}},
        "my_note": "hello",
    }
    zoo.tiny_config(**kept).save_pretrained(tmp_path)
    loaded = CrossModalConfig.from_pretrained(tmp_path)
    assert {key: getattr(loaded, key) for key in kept} == kept


def test_the_default_config_works_and_round_trips(tmp_path):
    config = CrossModalConfig()
    assert config.modality_names == ["vision", "text"]
    config.save_pretrained(tmp_path)
    assert CrossModalConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("names", [("zebra", "text", "apple"), ("b", "a"), ("text", "vision", "eeg")])
def test_order_of_modalities_survives_json(names, tmp_path):
    modalities = {name: feature_config(5 + i) for i, name in enumerate(names)}
    config = CrossModalConfig(modalities=modalities, **zoo.TINY)
    config.save_pretrained(tmp_path)
    loaded = CrossModalConfig.from_pretrained(tmp_path)
    assert loaded.modality_names == list(names)
    assert [getattr(loaded, f"{name}_config").feature_size for name in names] == [5, 6, 7][: len(names)]
    assert list(CrossModalModel(loaded).encoders) == list(names)


def test_settings_of_an_entry_survive_json(tmp_path):
    entry = {"config": zoo.tiny_encoder("bert")[0], "levels": [0, -1], "max_tokens": 3}
    config = CrossModalConfig(modalities={"text": entry, "vision": zoo.tiny_encoder("vit")[0]}, **zoo.TINY)
    config.save_pretrained(tmp_path)
    loaded = CrossModalConfig.from_pretrained(tmp_path)
    assert loaded.levels_of("text") == [0, 2]
    assert loaded.modality_settings == config.modality_settings
    assert loaded.modality_settings["text"]["max_tokens"] == 3


def test_an_encoder_with_fewer_layers_than_the_fusion_gives_its_embeddings_too():
    text = zoo.tiny_encoder("bert")[0]
    depths = {layers: CrossModalConfig(modalities={"text": text}, **zoo.TINY | {"num_fusion_layers": layers})
              for layers in (1, 2, 3, 4)}  # fmt: skip
    assert [config.levels_of("text") for config in depths.values()] == [[2], [1, 2], [0, 1, 2], [0, 1, 1, 2]]
    assert CrossModalConfig.from_preset("tiny").levels_of("text") == [0, 1]


def test_overrides_of_a_nested_config_are_merged(tmp_path):
    CrossModalModel(zoo.tiny_config()).save_pretrained(tmp_path)
    for loaded in (
        CrossModalConfig.from_pretrained(tmp_path, vision_config={"hidden_dropout_prob": 0.3}),
        CrossModalModel.from_pretrained(tmp_path, vision_config={"hidden_dropout_prob": 0.3}).config,
    ):
        assert loaded.vision_config.hidden_dropout_prob == 0.3
        assert loaded.vision_config.hidden_size == 32 and isinstance(loaded.vision_config, ViTConfig)


def test_an_override_that_does_not_fit_the_whole_is_refused_by_the_model(tmp_path):
    CrossModalModel(zoo.tiny_config()).save_pretrained(tmp_path)
    message = error_of(CrossModalModel.from_pretrained, tmp_path, hidden_size=33)
    assert "hidden_size=33 is not divisible by num_attention_heads=2" in message


def test_validation_runs_on_construction_and_when_a_model_is_built():
    config = zoo.tiny_config()
    config.fusion_type = "crosss"
    for model_class in (CrossModalModel, CrossModalForVQA):
        assert "fusion_type='crosss' is unknown" in error_of(model_class, config)
    assert "fusion_type='crosss' is unknown" in error_of(zoo.tiny_config, fusion_type="crosss")


def test_auto_map_is_complete_from_every_way_to_a_config(tmp_path):
    CrossModalForVQA(zoo.tiny_config(auto_map={"AutoModelForX": "x.X"})).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(stored) == AUTO_CLASSES | {"AutoModelForX"}
    assert all("/" not in target for target in stored.values())
    assert set(CrossModalConfig().auto_map) == AUTO_CLASSES
    assert AUTO_CLASSES <= set(CrossModalConfig.from_pretrained(tmp_path).auto_map)


def test_input_keys_follow_the_encoder_and_further_ones_take_a_prefix():
    vit, bert = zoo.tiny_encoder("vit")[0], zoo.tiny_encoder("bert")[0]
    config = CrossModalConfig(
        modalities={"right": vit, "left": vit.__class__(**vit.to_dict()), "text": bert, "eeg": feature_config()},
        **zoo.TINY,
    )
    assert [config.input_keys(name) for name in config.modality_names] == [
        ("pixel_values", None),
        ("left_pixel_values", None),
        ("input_ids", "attention_mask"),
        ("eeg_values", "eeg_mask"),
    ]
    image = torch.randn(2, 3, 64, 64)
    weights = CrossModalModel(config)(pixel_values=image, left_pixel_values=image).modality_weights
    assert (weights[:, :2] > 0).all() and (weights[:, 2:] == 0).all()


BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "overrides, parts",
    [
        ({"fusion_type": "crosss"}, ["fusion_type='crosss'", "['cross', 'concat'", "FUSIONS"]),
        ({"fusion_levels": "mutli"}, ["fusion_levels='mutli'", "['multi', 'single']"]),
        ({"modality_weighting": "adaptiv"}, ["modality_weighting='adaptiv'", "['adaptive', "]),
        ({"gate": "contents"}, ["gate='contents'", "['content', "]),
        *(
            ({"gate": "closed", **operator}, ["gate='closed'", repr(operator["fusion_type"]), "fusion_type='concat'"])
            for operator in (
                {"fusion_type": "joint"},
                {"fusion_type": "mutual"},
                {"fusion_type": "concat"},
                {"fusion_type": "bottleneck"},
                {"fusion_type": "bottleneck", "bottleneck": "resample"},
            )
        ),
        ({"pooling": "max"}, ["pooling='max'", "'mean'"]),
        ({"problem_type": "multi_label"}, ["problem_type='multi_label'", "multi_label_classification"]),
        ({"num_attention_heads": 3}, ["hidden_size=16", "num_attention_heads=3", "[2, 4", "nearest first"]),
        ({"hidden_size": 18}, ["hidden_size=18", "multiple of 4"]),
        ({"num_fusion_layers": 0}, ["num_fusion_layers=0", "at least 1"]),
        ({"frozen_modalities": ["visoin"]}, ["frozen_modalities=['visoin']", "['vision', 'text']"]),
    ],
)
def test_an_impossible_value_is_an_error_that_names_it_and_what_is_allowed(overrides, parts):
    message = error_of(zoo.tiny_config, **overrides)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    "entry, parts",
    [
        ({"config": BERT, "levels": [7]}, ["'text'", "7", "0 to 2", "Correct `levels`"]),
        ({"config": BERT, "levels": [-4]}, ["'text'", "-4", "-3 to -1"]),
        ({"config": BERT, "levels": [0, 1, 2]}, ["'text'", "3 depths", "num_fusion_layers=2"]),
        ({"config": BERT, "levels": []}, ["'text'", "0 depths"]),
        ({"config": BERT, "max_tokens": 0}, ["'text'", "max_tokens=0", "at least 1"]),
        ({"config": BERT, "levles": [1]}, ["'text'", "levles", "['levels', "]),
        ({"levels": [1]}, ["'text'", "'config'"]),
        ({"config": BERT, "type": "txt"}, ["'text'", "type='txt'", "['text', "]),
        ({"model_type": "bertt"}, ["'text'", "model_type='bertt'", "'bert'"]),
        ("bert-base-uncased", ["'text'", "'bert-base-uncased'", "from_encoders"]),
    ],
)
def test_a_wrong_entry_of_a_modality_is_an_error_that_names_it(entry, parts):
    message = error_of(CrossModalConfig, modalities={"text": entry}, **zoo.TINY)
    assert [part for part in parts if part not in message] == [], message


def test_a_modality_name_that_cannot_be_an_attribute_is_refused():
    for name in ("my text", "1st", "modality"):
        assert repr(name) in error_of(CrossModalConfig, modalities={name: BERT})


def test_no_modality_at_all_is_refused():
    assert "Every modality needs" in error_of(CrossModalConfig, modalities={})


def mixed_config(**overrides):
    """Two encoders without a choice of attention, one with."""
    modalities = {
        "vision": MobileNetV2Config(depth_multiplier=0.35),
        "photo": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        "text": BertConfig(**{**BERT, "vocab_size": 60, "intermediate_size": 32}),
    }
    return CrossModalConfig(modalities=modalities, **zoo.TINY, **overrides)


def attention_of(model):
    chosen = {
        module.config._attn_implementation for module in model.encoders["text"].modules() if hasattr(module, "config")
    }
    assert len(chosen) == 1
    return model.config._attn_implementation, chosen.pop()


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
def test_the_choice_of_attention_reaches_every_encoder_that_has_one(choice, tmp_path):
    config = mixed_config()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(5, 50, (2, 5))}
    model = CrossModalModel._from_config(config, attn_implementation=choice).eval()
    assert attention_of(model) == (choice, choice)
    model.save_pretrained(tmp_path)
    loaded = CrossModalModel.from_pretrained(tmp_path, attn_implementation=choice).eval()
    assert attention_of(loaded) == (choice, choice)
    torch.testing.assert_close(loaded(**batch).pooler_output, model(**batch).pooler_output)
    encoders = {name: getattr(mixed_config(), f"{name}_config") for name in config.modality_names}
    assert attention_of(CrossModalModel.from_encoders(**encoders, attn_implementation=choice, **zoo.TINY)) == (
        choice,
        choice,
    )


def test_the_choice_of_attention_can_be_changed_on_a_model():
    model = CrossModalModel._from_config(mixed_config(), attn_implementation="sdpa").eval()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(5, 50, (2, 5))}
    before = model(**batch).pooler_output
    model.set_attn_implementation("eager")
    assert attention_of(model) == ("eager", "eager")
    torch.testing.assert_close(model(**batch).pooler_output, before)
    model.set_attn_implementation({"": "sdpa", "text_config": "eager"})
    assert attention_of(model) == ("sdpa", "eager")


def test_single_level_keeps_the_deepest_of_explicit_levels():
    entry = {"config": zoo.tiny_encoder("bert")[0], "levels": [0, -2]}
    multi, single = (
        CrossModalConfig(modalities={"text": entry}, **zoo.TINY, fusion_levels=key) for key in ("multi", "single")
    )
    assert multi.levels_of("text") == [0, 1] and single.levels_of("text") == [1]
