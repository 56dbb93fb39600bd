"""Encoders: every supported type, loaded from anywhere, tapped at any depth, frozen, and blind to padding."""

import pytest
import torch
import zoo
from crossmodal.modeling.encoders_crossmodal import ENCODERS, has_batch_norm
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    WhisperForConditionalGeneration,
)

from crossmodal import CrossModalConfig, CrossModalForVQA, CrossModalModel


COLUMN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**COLUMN, "image_size": 64, "patch_size": 16}
TEXT = {**COLUMN, "vocab_size": 60, "max_position_embeddings": 40}


def compose(model_type, model_class=CrossModalForVQA, freeze=(), **settings):
    """A model over one tiny encoder in eval mode, the name of its modality, and a batch of two rows."""
    encoder, kind, batch = zoo.tiny_encoder(model_type)
    name = {"features": "eeg"}.get(kind, kind)
    if kind == "features":
        batch = {f"{name}_{key}": value for key, value in batch.items()}
        encoder = CrossModalConfig(modalities={name: encoder}).eeg_config
    model = model_class.from_encoders(
        **{name: {"model": encoder, **settings}}, freeze=freeze, num_labels=5, **zoo.TINY
    )
    return model.eval(), name, batch


@pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)
def test_tokens_have_the_fusion_width_at_one_depth_and_at_several(model_type):
    for levels in ([-1], [0, -1], [1, 2], None):
        model, name, batch = compose(model_type, CrossModalModel, levels=levels)
        output = model(**batch, output_hidden_states=True)
        tokens = output.modality_tokens[name]
        assert tokens.shape[::2] == (2, 16) and tokens.isfinite().all()
        encoded, _ = model.encode(model._collect_inputs(batch))
        sizes = model.config.level_sizes_of(name)
        assert [level.shape[-1] for level in encoded[name].levels] == [sizes[i] for i in model.config.levels_of(name)]
        assert len({level.shape[:2] for level in encoded[name].levels}) == 1


@pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)
def test_last_level_is_the_last_hidden_state_of_the_plain_encoder(model_type):
    model, name, batch = compose(model_type, CrossModalModel, levels=[-1])
    encoded, _ = model.encode(model._collect_inputs(batch))
    if model.encoders[name].config.model_type in ENCODERS:
        expected = model.encoders[name](*batch.values())[0][-1]
    else:
        expected = model.encoders[name](**batch).last_hidden_state
    if expected.dim() == 4:
        expected = expected.flatten(2).transpose(1, 2)
    # Convolutional encoders read another layout of the same numbers, in which sums have another order.
    atol = 1e-5 if has_batch_norm(model.encoders[name]) else 0
    torch.testing.assert_close(encoded[name].levels[-1], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("model_type", ["resnet", "mobilenet_v2"])
def test_convolutions_with_batch_norm_run_with_channels_side_by_side(model_type):
    model, _, batch = compose(model_type, CrossModalModel, levels=[-1])
    seen = []
    convolutions = [m for m in model.encoders["vision"].modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions:
        conv.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model.encode(model._collect_inputs(batch))
    assert len(seen) == len(convolutions)
    for values in (values for pair in seen for values in pair):
        assert values.is_contiguous(memory_format=torch.channels_last)


def test_one_image_without_its_batch_is_refused_by_convolutions():
    model, _, batch = compose("resnet", CrossModalModel, levels=[-1])
    image = batch["pixel_values"][0]
    with pytest.raises(ValueError, match=r"images of shape .* Expected \(batch, channels, height, width\)"):
        model(pixel_values=image)


@pytest.mark.parametrize("model_type", ["swin", "resnet", "mobilenet_v2", "convnext"])
def test_levels_of_a_pyramid_are_averaged_onto_the_grid_of_the_deepest(model_type):
    model, name, batch = compose(model_type, CrossModalModel, levels=[1, -1])
    model.eval()
    encoder = model.encoders[name]
    outputs = encoder(**batch, output_hidden_states=True)
    plain = getattr(outputs, "reshaped_hidden_states", None) or outputs.hidden_states
    deepest = plain[-1].shape[-2:]
    assert plain[0].shape[-2:] != deepest
    encoded, _ = model.encode(model._collect_inputs(batch))
    assert encoded[name].grid == tuple(deepest)
    for level, found in zip(plain[1:2], encoded[name].levels[:1], strict=True):
        expected = torch.nn.functional.adaptive_avg_pool2d(level, deepest).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)
def test_gradient_reaches_every_trainable_parameter(model_type):
    model, _, batch = compose(model_type)
    model.train()(**batch, labels=torch.tensor([1, 2])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    untrained = [name for name, p in model.named_parameters() if not p.requires_grad]
    # Heads, mask tokens and constant positions alone are left out of training.
    known = ("mask_token", "post_layernorm", ".head.", "embed_positions", "encoders.vision.layernorm")
    assert [name for name in untrained if not any(part in name for part in known)] == []


@pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)
def test_frozen_encoder_has_no_gradient_stays_in_eval_mode_and_survives_save_and_load(model_type, tmp_path):
    model, name, batch = compose(model_type, freeze=[zoo.tiny_encoder(model_type)[1].replace("features", "eeg")])
    model.save_pretrained(tmp_path)
    for each in (model, CrossModalForVQA.from_pretrained(tmp_path)):
        each.train()(**batch, labels=torch.tensor([1, 2])).loss.backward()
        encoder = each.crossmodal.encoders[name]
        assert not any(module.training for module in encoder.modules())
        assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
        assert each.classifier.out_proj.weight.grad.abs().sum() > 0
        assert each.config.frozen_modalities == [name]
    model.unfreeze(name)
    assert (
        any(p.requires_grad for p in model.crossmodal.encoders[name].parameters())
        and model.config.frozen_modalities == []
    )


@pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)
def test_save_and_load_gives_bit_equal_logits(model_type, tmp_path):
    model, _, batch = compose(model_type, levels=[1, -1])
    model.save_pretrained(tmp_path)
    loaded, info = CrossModalForVQA.from_pretrained(tmp_path, output_loading_info=True)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    assert not info["missing_keys"] and not info["unexpected_keys"]


PADDED = ["bert", "roberta", "distilbert", "modernbert", "mpnet", "crossmodal_features", "wav2vec2", "whisper",
          "audio-spectrogram-transformer", "crossmodal_mmvit_sound"]  # fmt: skip


def with_padding(model, name, batch, padding):
    """The batch with its second row's last third padded, and `padding` standing in the padded positions."""
    values_key, mask_key = model.config.input_keys(name)
    values = batch[values_key].clone()
    axis = 2 if values_key == "input_features" else 1
    length = values.shape[axis]
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length - length // 3 :] = 0
    place = mask[:, None].bool() if axis == 2 else mask.bool().view(*mask.shape, *[1] * (values.dim() - 2))
    return {
        **batch,
        values_key: torch.where(place, values, torch.as_tensor(padding, dtype=values.dtype)),
        mask_key: mask,
    }


@pytest.mark.parametrize("model_type", PADDED)
def test_content_of_padded_positions_changes_nothing(model_type):
    model, name, batch = compose(model_type)
    odd = 59 if name == "text" else float("nan")
    one, other = (model(**with_padding(model, name, batch, padding)) for padding in (3, odd))
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=0)
    assert one.logits.isfinite().all()
    real = model(**batch)
    assert not torch.equal(one.logits[1], real.logits[1]), "padding was not taken out"


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "crossmodal_features", "crossmodal_mmvit_sound"])
def test_a_padded_row_equals_the_same_row_without_padding(model_type):
    model, name, batch = compose(model_type)
    values, _ = model.config.input_keys(name)
    padded = model(**with_padding(model, name, batch, 3)).logits[1:]
    axis = 2 if values == "input_features" else 1
    length = batch[values].shape[axis]
    alone = model(**{values: batch[values][1:].narrow(axis, 0, length - length // 3)}).logits
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("model_type", ["vit", "resnet", "bert", "whisper", "crossmodal_features", "crossmodal_mmvit"])
def test_max_tokens_limits_the_tokens_of_a_modality(model_type):
    for limit in (1, 3, 1000):
        model, name, batch = compose(model_type, CrossModalModel, max_tokens=limit)
        tokens = model(**batch, output_hidden_states=True).modality_tokens[name]
        assert 1 <= tokens.shape[1] <= limit and tokens.isfinite().all()


def test_max_tokens_averages_real_tokens_only():
    model, name, batch = compose("crossmodal_features", max_tokens=4)
    one, other = (model(**with_padding(model, name, batch, padding)).logits for padding in (0, 50))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_same_weights(tower, original):
    weights = original.state_dict()
    assert len(tower.state_dict()) > 10
    for key, value in tower.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("model_class, config_class", [(CLIPModel, CLIPConfig), (SiglipModel, SiglipConfig)])
def test_towers_load_from_the_folder_of_a_dual_encoder(model_class, config_class, tmp_path):
    original = model_class(config_class(vision_config=VISION, text_config={**TEXT, "projection_size": 32}))
    original.save_pretrained(tmp_path)
    model = CrossModalForVQA.from_encoders(vision=str(tmp_path), text=tmp_path, num_labels=5, **zoo.TINY)
    assert_same_weights(model.crossmodal.encoders["vision"], original.vision_model)
    assert_same_weights(model.crossmodal.encoders["text"], original.text_model)
    batch = {**zoo.tiny_encoder("vit")[2], **zoo.tiny_encoder("bert")[2]}
    model.save_pretrained(tmp_path / "fused")
    loaded = CrossModalForVQA.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=0)
    assert str(tmp_path) not in (tmp_path / "fused" / "config.json").read_text()


def test_towers_are_taken_from_a_dual_encoder_in_memory_and_by_type_under_any_name(tmp_path):
    original = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT))
    original.save_pretrained(tmp_path)
    model = CrossModalModel.from_encoders(
        left={"model": tmp_path, "type": "vision"}, right={"model": original, "type": "vision"}, **zoo.TINY
    )
    for name in ("left", "right"):
        assert_same_weights(model.encoders[name], original.vision_model)
    with pytest.raises(ValueError, match=r"'left'.*towers.*'type': 'vision' or 'text'"):
        CrossModalModel.from_encoders(left=tmp_path, **zoo.TINY)


def test_encoder_loads_from_the_folder_of_an_encoder_decoder(tmp_path):
    original = WhisperForConditionalGeneration(zoo.tiny_encoder("whisper")[0])
    original.save_pretrained(tmp_path)
    model = CrossModalModel.from_encoders(audio=tmp_path, **zoo.TINY)
    assert_same_weights(model.encoders["audio"], original.model.encoder)


def test_encoder_loads_from_the_folder_of_a_classifier_without_its_head(tmp_path):
    original = ViTForImageClassification(ViTConfig(**VISION, num_labels=3))
    original.save_pretrained(tmp_path)
    model = CrossModalModel.from_encoders(vision=tmp_path, **zoo.TINY)
    assert_same_weights(model.encoders["vision"], original.vit)
    assert_same_weights(CrossModalModel.from_encoders(vision=original, **zoo.TINY).encoders["vision"], original.vit)


def test_a_model_in_memory_is_used_as_it_is():
    original = BertModel(BertConfig(**TEXT))
    before = {key: value.clone() for key, value in original.state_dict().items()}
    model = CrossModalForVQA.from_encoders(text=original, **zoo.TINY)
    assert model.crossmodal.encoders["text"] is original
    for key, value in original.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_encoders_of_any_dtype_are_brought_to_one(tmp_path):
    BertModel(BertConfig(**TEXT)).to(torch.bfloat16).save_pretrained(tmp_path)
    encoders = {"text": tmp_path, "vision": ViTConfig(**VISION)}
    assert {p.dtype for p in CrossModalModel.from_encoders(**encoders, **zoo.TINY).parameters()} == {torch.float32}
    half = CrossModalModel.from_encoders(**encoders, dtype="bfloat16", **zoo.TINY)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


class Custom(nn.Module):
    """A module that keeps the contract of ENCODERS."""

    level_sizes = [5, 6]

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 6)

    def forward(self, values, mask=None):
        first = self.first(values)
        return [first, self.second(first)], mask


def test_a_module_of_the_contract_trains_with_its_own_weights_but_refuses_to_be_saved(tmp_path):
    encoder = Custom()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    model = CrossModalForVQA.from_encoders(radar=encoder, num_labels=5, **zoo.TINY)
    for key, value in encoder.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    model(radar_values=torch.randn(2, 4, 3), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in encoder.parameters())
    with pytest.raises(ValueError, match="'radar'.*class 'Custom'.*ENCODERS"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("choice", ["eager", "sdpa"])
def test_an_encoder_keeps_its_attention_and_output_when_it_is_composed(choice):
    # CLIP's text tower is causal, which its eager form knows only from a mask.
    original = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)).eval()
    original.set_attn_implementation(choice)
    batch = zoo.tiny_encoder("bert")[2]
    expected = original.text_model(**batch).last_hidden_state
    model = CrossModalModel.from_encoders(text={"model": original, "levels": [-1]}, **zoo.TINY).eval()
    assert model.encoders["text"].config._attn_implementation == choice
    encoded, _ = model.encode(model._collect_inputs(batch))
    torch.testing.assert_close(encoded["text"].levels[0], expected, rtol=0, atol=0)


def test_a_folder_without_weights_of_the_encoder_is_a_clear_error(tmp_path):
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    ViTConfig(**VISION).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'vision'.*holds no weights for a ViTModel"):
        CrossModalModel.from_encoders(vision=tmp_path, **zoo.TINY)


def test_what_is_no_encoder_is_a_clear_error(tmp_path):
    for source, part in [
        (tmp_path, "neither a folder with a model"),
        ("no/such-model", "neither a folder with a model"),
        (7, "got int"),
        (nn.Linear(2, 2), "level_sizes"),
    ]:
        with pytest.raises(ValueError, match=part) as caught:
            CrossModalModel.from_encoders(vision=source, **zoo.TINY)
        assert "'vision'" in str(caught.value)
    with pytest.raises(ValueError, match="no encoder"):
        CrossModalModel.from_encoders()


def test_layer_drop_is_switched_off():
    encoder, _, batch = zoo.tiny_encoder("wav2vec2")
    encoder.layerdrop = 0.9
    model = CrossModalModel.from_encoders(audio=encoder, **zoo.TINY).train()
    assert model.config.audio_config.layerdrop == 0
    model(**batch)


def test_pretrained_weights_give_the_plain_encoders_output(shared_encoders):
    folder = shared_encoders / "mobilenet_v2_1.0_224"
    model = CrossModalModel.from_encoders(vision={"model": folder, "levels": [-1]}, **zoo.TINY).eval()
    images = torch.randn(2, 3, 224, 224)
    encoded, _ = model.encode(model._collect_inputs({"pixel_values": images}))
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval()(images).last_hidden_state
    assert expected.shape == (2, 1280, 7, 7) and encoded["vision"].grid == (7, 7)
    torch.testing.assert_close(encoded["vision"].levels[0], expected.flatten(2).transpose(1, 2), rtol=0, atol=0)


def test_no_path_of_this_machine_is_saved(tmp_path):
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    in_memory = ViTForImageClassification(ViTConfig(**VISION))
    in_memory.save_pretrained(tmp_path / "vit")
    in_memory = ViTForImageClassification.from_pretrained(tmp_path / "vit")
    model = CrossModalForVQA.from_encoders(text=tmp_path / "bert", vision=in_memory, **zoo.TINY)
    model.save_pretrained(tmp_path / "fused")
    for file in (tmp_path / "fused").glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file.name


def test_positions_of_a_grid_are_parts_of_the_whole():
    from crossmodal.modeling.encoders_crossmodal import grid_positions

    small, large = grid_positions(4, 4, 64, "cpu").view(4, 4, 64), grid_positions(12, 12, 64, "cpu").view(12, 12, 64)
    # The middle one of three fine cells lies where the coarse cell does.
    torch.testing.assert_close(large[1::3, 1::3], small, rtol=0, atol=1e-5)
    assert torch.equal(small[:, :, :32], small[:, :1, :32].expand(4, 4, 32))
    assert torch.equal(small[:, :, 32:], small[:1, :, 32:].expand(4, 4, 32))
    distances = torch.cdist(small.flatten(0, 1), small.flatten(0, 1)) + 9 * torch.eye(16)
    assert distances.min() > 1, f"two cells are only {distances.min():.3f} apart"
