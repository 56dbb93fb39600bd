"""Videos: an encoder of images reads the frames one by one, each at its time; what is no frame changes nothing."""

import pytest
import torch
import zoo
from PIL import Image
from test_modeling import lively
from transformers import ViTImageProcessorPil

from crossmodal import CrossModalConfig, CrossModalForSequenceClassification, CrossModalProcessor


def clip_config(encoder="vit", sound=True, **settings):
    """A classifier of clips, their frames read by `encoder`, beside a sequence of sound features."""
    modalities = {"clip": {"config": zoo.tiny_encoder(encoder)[0], "type": "video", **settings}}
    if sound:
        modalities["sound"] = zoo.tiny_encoder("crossmodal_features")[0]
    return CrossModalConfig(modalities=modalities, **{**zoo.TINY, "num_labels": 3})


def clip_batch(frames=5, rows=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values_videos": torch.randn(rows, frames, 3, 64, 64, generator=generator),
        "sound_values": torch.randn(rows, 9, 6, generator=generator),
    }


def model_of(config):
    torch.manual_seed(0)
    return lively(CrossModalForSequenceClassification(config)).eval()


@pytest.mark.parametrize("encoder, frame_tokens", [("vit", 1), ("resnet", 1), ("resnet", 4)])
def test_a_frame_is_encoded_as_the_image_it_is_and_stands_at_its_time(encoder, frame_tokens):
    from crossmodal.modeling.encoders_crossmodal import grid_positions, sine_positions

    model = model_of(clip_config(encoder, frame_tokens=frame_tokens)).base_model
    frames = clip_batch()["pixel_values_videos"]
    encoded, _ = model.encode({"clip": (frames, None, None, False)})
    found = model.project(encoded)[0]["clip"][-1].unflatten(1, (5, frame_tokens))
    # The same images, with no time about them.
    config = CrossModalConfig(modalities={"vision": zoo.tiny_encoder(encoder)[0]}, **zoo.TINY)
    images = model_of(config).base_model
    images.encoders["vision"].load_state_dict(model.encoders["clip"].state_dict())
    alone, _ = images.encode({"vision": (frames.flatten(0, 1), None, None, False)})
    levels = alone["vision"].levels[-1]
    side = int(frame_tokens**0.5)
    if encoder == "resnet":
        grid = levels.transpose(1, 2).unflatten(2, alone["vision"].grid)
        levels = torch.nn.functional.adaptive_avg_pool2d(grid, (side, side)).flatten(2).transpose(1, 2)
    else:
        levels = levels.mean(1, keepdim=True)
    projection = model.projections["clip"]
    shift = model.modality_types.weight[0] + sine_positions(torch.arange(5), 16)[:, None]
    if encoder == "resnet":
        shift = shift + grid_positions(side, side, 16, "cpu")
    expected = projection.projections[-1](projection.norms[-1](levels)).unflatten(0, (3, 5)) + shift
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ["vit", "resnet"])
@pytest.mark.parametrize("training", [False, True])
def test_frames_that_are_padding_change_nothing(encoder, training):
    # In training mode the batch norm of the ResNet would mix them in.
    config = clip_config(encoder)
    config.hidden_dropout = config.classifier_dropout = 0.0
    model, batch = model_of(config).train(training), clip_batch()
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    batch["video_attention_mask"] = mask
    state = {key: value.clone() for key, value in model.state_dict().items()}
    clean = model(**batch).logits
    model.load_state_dict(state)
    batch["pixel_values_videos"][~mask] = torch.nan
    torch.testing.assert_close(model(**batch).logits, clean, rtol=0, atol=0)
    if not training:
        short = {key: value[1:2] for key, value in batch.items()} | {
            "pixel_values_videos": batch["pixel_values_videos"][1:2, :3],
            "video_attention_mask": None,
        }
        torch.testing.assert_close(model(**short).logits, clean[1:2], rtol=1e-4, atol=1e-5)


def test_the_order_of_frames_counts_and_absent_clips_are_as_if_never_given():
    model, batch = model_of(clip_config()), clip_batch()
    whole = model(**batch)
    turned = batch | {"pixel_values_videos": batch["pixel_values_videos"].flip(1)}
    assert (model(**turned).logits - whole.logits).abs().max() > 1e-4
    mask = torch.tensor([[False, True], [True, True], [True, False]])
    part = model(**batch, modality_mask=mask)
    torch.testing.assert_close(part.logits[0], model(sound_values=batch["sound_values"]).logits[0])
    torch.testing.assert_close(part.logits[1], whole.logits[1], rtol=1e-4, atol=1e-5)
    assert part.modality_weights[0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("encoder, frame_tokens, axes", [("vit", 1, 4), ("resnet", 4, 5)])
def test_tokens_of_a_frozen_encoder_stand_for_the_frames(encoder, frame_tokens, axes):
    model = model_of(clip_config(encoder, frame_tokens=frame_tokens))
    model.freeze("clip")
    batch = clip_batch() | {"video_attention_mask": torch.arange(5) < torch.tensor([[5], [3], [4]])}
    tokens, mask = model.base_model.encode_tokens("clip", batch["pixel_values_videos"], batch["video_attention_mask"])
    assert tokens.dim() == axes and mask.shape == (3, 5)
    given = {"clip_tokens": tokens, "clip_tokens_mask": mask, "sound_values": batch["sound_values"]}
    torch.testing.assert_close(model(**given).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_sound_and_frames_meet_where_they_are_near_in_time():
    # 12 frames and 24 steps of sound: a step sees the frames at most two places from its own time.
    config = clip_config(num_frames=12)
    config.attention_kernel, config.attention_window, config.fusion_queries = "window", 2, ["sound"]
    model, batch = model_of(config), clip_batch(frames=12, rows=1)
    batch["sound_values"] = torch.randn(1, 24, 6)
    seen = model(**batch, output_attentions=True).cross_attentions[-1]["sound<-clip"][0].mean(0)
    centres = ((torch.arange(24) + 0.5) / 24 * 12).floor()
    far = (torch.arange(12)[None] - centres[:, None]).abs() > 2
    assert (seen[far] == 0).all() and (seen[~far] > 0).all()


def test_clips_of_several_lengths_are_padded_or_cut_to_frames_at_even_distances_or_in_the_middle():
    images = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(0, 250, 25)]

    def processor(**settings):
        return CrossModalProcessor.from_config(
            clip_config(sound=False, **settings), ViTImageProcessorPil(size={"height": 64, "width": 64})
        )

    def shades(pixels):
        return ((pixels[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().int().tolist()

    batch = processor()(videos=[images[:4], images[:2]])
    assert batch["pixel_values_videos"].shape == (2, 4, 3, 64, 64)
    assert batch["video_attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert "video_attention_mask" not in processor()(videos=[images[:4], images[4:8]])
    even = processor(num_frames=5)(videos=images)["pixel_values_videos"][0]
    assert shades(even) == [25, 75, 125, 175, 225]
    middle = processor(num_frames=4, frame_sampling="window")(videos=[images, images[:3]])
    assert shades(middle["pixel_values_videos"][0]) == [75, 100, 125, 150]
    assert middle["video_attention_mask"][1].tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match=r"the video of row 1 \('clip'\) has no frame"):
        processor()(videos=[images, []])


def test_what_is_said_of_frames_must_fit():
    with pytest.raises(ValueError, match="frame_tokens=0. Expected a whole number"):
        clip_config(frame_tokens=0)
    with pytest.raises(
        ValueError, match=r"frame_sampling='evenly' is unknown. Expected one of \['window', 'uniform'\]"
    ):
        clip_config(frame_sampling="evenly")
    with pytest.raises(ValueError, match="max_tokens=3 would mix frames"):
        clip_config(max_tokens=3)
    with pytest.raises(ValueError, match="an encoder of type 'bert' reads text, not images"):
        clip_config("bert")
    with pytest.raises(ValueError, match="num_frames=4 of type 'vision'"):
        CrossModalConfig(modalities={"vision": {"config": zoo.tiny_encoder("vit")[0], "num_frames": 4}})
    with pytest.raises(ValueError, match=r"Expected \(batch, frames, channels, height, width\)"):
        model_of(clip_config())(pixel_values_videos=torch.randn(2, 3, 64, 64))


def test_a_model_of_clips_is_saved_and_loaded(tmp_path):
    model, batch = model_of(clip_config(num_frames=5)), clip_batch()
    model.save_pretrained(tmp_path)
    loaded = CrossModalForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.modality_settings["clip"]["num_frames"] == 5
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
