"""The processor: raw rows of any modalities, some missing, to batches; clear words for what cannot be read."""

import io
import pickle

import numpy as np
import pytest
import torch
from crossmodal.processing.reading_crossmodal import evenly
from transformers import ASTFeatureExtractor, AutoProcessor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from world import noise, picture, tiny_processor_and_model

from crossmodal import CrossModalProcessor


EEG = {"eeg": {"model_type": "crossmodal_features", "feature_size": 6, "hidden_size": 16, "intermediate_size": 32}}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor_and_model(EEG)[0]


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_every_form_of_the_same_image_gives_the_same_pixels(processor, tmp_path):
    image = picture("blue", (40, 30))
    image.putpixel((3, 5), (250, 10, 20))
    path = tmp_path / "image.png"
    image.save(path)
    array = np.asarray(image)
    forms = [image, str(path), path, png(image), {"bytes": png(image)}, {"bytes": None, "path": str(path)}, array]
    forms += [array.transpose(2, 0, 1), torch.from_numpy(array.copy()), array.astype(np.float32) / 255]
    pixels = processor(images=forms, text=["what color is this?"] * len(forms))["pixel_values"]
    torch.testing.assert_close(pixels, pixels[:1].expand_as(pixels), rtol=0, atol=0)


def test_a_text_longer_than_the_encoder_takes_is_cut_with_one_warning(monkeypatch):
    from crossmodal.processing import processing_crossmodal as module

    processor, model = tiny_processor_and_model()
    limit, said = model.config.text_config.max_position_embeddings, []
    monkeypatch.setattr(module.logger, "warning_once", said.append)
    whole = "what color is this? " * limit
    batch = processor(images=[picture()] * 2, text=["which color?", whole])
    assert batch["input_ids"].shape == (2, limit) and len(said) == 1 and f"limit of {limit} tokens" in said[0]
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    processor(images=picture(), text="which color?")
    assert len(said) == 1


@pytest.mark.parametrize("kind, pad, limit", [("bert", 0, 64), ("roberta", 1, 62), ("mpnet", 1, 62)])
def test_positions_of_an_encoder_are_those_that_a_text_may_take(kind, pad, limit):
    from crossmodal.processing.processing_crossmodal import _positions_of
    from transformers import CONFIG_MAPPING

    assert _positions_of(CONFIG_MAPPING[kind](max_position_embeddings=64, pad_token_id=pad)) == limit


def test_rows_that_lack_a_modality_are_marked_in_the_order_of_the_config(processor):
    batch = processor(
        images=[picture(), None, None],
        text=["what color is this?", "which color?", None],
        eeg=[None, None, noise(4, 6)],
    )
    assert batch["modality_mask"].tolist() == [[True, True, False], [False, True, False], [False, False, True]]
    assert batch["pixel_values"].shape == (3, 3, 32, 32) and not batch["pixel_values"][1:].any()
    assert not batch["attention_mask"][2].any()
    assert batch["eeg_mask"].sum(1).tolist() == [0, 0, 4]


def test_a_modality_that_no_row_has_is_left_out(processor):
    batch = processor(images=[None, None], text=["which color?", "what color is this?"])
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_single_item_makes_a_batch_of_one_and_is_repeated_beside_lists(processor):
    assert processor(images=picture(), text="which color?")["pixel_values"].shape[0] == 1
    batch = processor(images=picture(), text=["which color?", "what color is this?"])
    assert batch["pixel_values"].shape[0] == batch["input_ids"].shape[0] == 2


def test_shared_images_are_given_once_when_asked(processor):
    red, blue = picture("red"), picture("blue")
    images = [red, None, red, blue]
    plain = processor(images=images, text=["which color?"] * 4)
    shared = processor(images=images, text=["which color?"] * 4, deduplicate=True)
    assert shared["pixel_values"].shape[0] == 2
    rebuilt = shared["pixel_values"][shared["pixel_values_index"]]
    present = plain["modality_mask"][:, 0]
    torch.testing.assert_close(rebuilt[present], plain["pixel_values"][present], rtol=0, atol=0)


def test_shared_images_change_no_answer():
    processor, model = tiny_processor_and_model(EEG)
    red, blue = picture("red"), picture("blue")
    rows = {"images": [red, None, red, blue], "text": ["which color?", "what color is this?"] * 2}
    with torch.no_grad():
        plain = model(**processor(**rows)).logits
        shared = model(**processor(**rows, deduplicate=True)).logits
    torch.testing.assert_close(shared, plain)


def test_feature_sequences_are_padded_to_the_longest(processor):
    batch = processor(eeg=[noise(4, 6), noise(2, 6)])
    assert batch["eeg_values"].shape == (2, 4, 6)
    assert batch["eeg_mask"].tolist() == [[True] * 4, [True, True, False, False]]


def test_long_text_is_cut_at_the_limit_of_the_modality():
    processor, _ = tiny_processor_and_model()
    processor.modalities[1]["max_tokens"] = 5
    assert processor(text="what color is this picture please")["input_ids"].shape[1] == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"images": ["nowhere.png"]}, "image of row 0"),
        ({"images": [picture(), b"not an image"]}, "image of row 1"),
        ({"images": [b""]}, "cannot be read"),
        ({"images": [np.full((4, 4, 3), np.nan)]}, "outside 0 to 255"),
        ({"images": [np.zeros((0, 4, 3))]}, "no image"),
        ({"text": ["which color?", "  "]}, "text of row 1"),
        ({"text": [""]}, "at least one word"),
        ({"text": [3]}, "Expected a string"),
        ({"text": [None], "images": [None]}, "no modality at all"),
        ({"text": ["a", "b"], "images": [picture()]}, "different numbers of rows"),
        ({"txt": ["a"]}, "no input of this processor"),
        ({"text": []}, "empty list"),
        ({}, "no input was given"),
        ({"eeg": [np.full((3, 6), np.nan)]}, "NaN or infinity"),
        ({"eeg": [noise(3, 6), noise(3, 5)]}, "features of row 1"),
        ({"eeg": [noise(3, 6), [[0.0] * 6, [0.0] * 5]]}, "features of row 1 .* are no numbers"),
        ({"eeg": [noise(3, 6) + 1j]}, "features of row 0 .* are of type complex"),
        ({"eeg": [{"values": noise(3, 6)}]}, "features of row 0 .* Expected 'array'"),
        ({"eeg": [{"array": noise(3, 6), "mask": "yes"}]}, "the mask of features of row 0 .* are no numbers"),
        ({"vision_tokens": ["abc"]}, "vision_tokens of row 0 are no numbers"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_its_row_and_the_fix(processor, arguments, said):
    with pytest.raises(ValueError, match=said):
        processor(**arguments)


def test_a_truncated_image_is_named(processor, tmp_path):
    whole = png(picture("red", (64, 64)))
    path = tmp_path / "cut.png"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"image of row 0 .*cut\.png.* cannot be read"):
        processor(images=[path], text=["which color?"])


@pytest.mark.parametrize("kind", ["ast", "whisper", "wav2vec2"])
def test_sound_is_extracted_with_a_mask_of_its_own(kind):
    extractor = {
        "ast": lambda: ASTFeatureExtractor(num_mel_bins=32, max_length=64),
        "whisper": lambda: WhisperFeatureExtractor(feature_size=20, chunk_length=1),
        "wav2vec2": lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True),
    }[kind]()
    tokenizer = tiny_processor_and_model()[0].tokenizer
    processor = CrossModalProcessor(feature_extractor=extractor, tokenizer=tokenizer)
    batch = processor(
        audio=[noise(8000), {"array": noise(4000), "sampling_rate": 16000}],
        text=["which color?"] * 2,
        sampling_rate=16000,
    )
    values = next(key for key in ("input_values", "input_features") if key in batch)
    assert len(batch[values]) == len(batch["input_ids"]) == 2
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    if kind != "ast":
        assert batch["audio_attention_mask"][0].sum() > batch["audio_attention_mask"][1].sum()


@pytest.mark.parametrize(
    ("audio", "rate", "said"),
    [
        ([noise(100)], None, "sampling rate"),
        ([noise(100)], -8000, "Expected Hz, above 0"),
        ([noise(100)], "fast", "Expected Hz, above 0"),
        ([["a", "b"]], 16000, "the samples of row 0 .* are no numbers"),
        ([b"RIFF"], None, "audio of row 0: not readable as sound"),
        (["no/such.wav"], None, "audio of row 0: not readable as sound"),
        ([noise(0)], 16000, "empty clip"),
        ([np.array([0.0, np.nan], dtype=np.float32)], 16000, "got NaN or infinity"),
        ([noise(2, 100)], 16000, "one finite channel"),
    ],
)
def test_bad_sound_is_named(audio, rate, said):
    processor = CrossModalProcessor(feature_extractor=Wav2Vec2FeatureExtractor())
    with pytest.raises(ValueError, match=said):
        processor(audio=audio, sampling_rate=rate)


def test_sound_of_any_rate_and_from_files_is_heard_alike(tmp_path):
    import soundfile

    processor = CrossModalProcessor(feature_extractor=Wav2Vec2FeatureExtractor(do_normalize=False))
    tone = [np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32) for rate in (8000, 16000, 44100)]
    soundfile.write(tmp_path / "a.wav", tone[0], 8000)
    soundfile.write(tmp_path / "b.flac", np.stack([tone[2]] * 2, axis=1), 44100)
    data = (tmp_path / "a.wav").read_bytes()
    sounds = [
        {"array": tone[1], "sampling_rate": 16000},
        str(tmp_path / "a.wav"),
        tmp_path / "b.flac",
        {"bytes": data},
    ]
    expected, *others = processor(audio=sounds)["input_values"]
    assert expected.shape == (16000,)
    for other in others:
        # But for the ends, where a filter sees silence.
        torch.testing.assert_close(other[200:-200], expected[200:-200], atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["int16", "int32", "torch int16"])
def test_whole_numbers_of_a_wav_file_are_heard_like_the_file(kind):
    processor = CrossModalProcessor(feature_extractor=Wav2Vec2FeatureExtractor(do_normalize=False))
    tone = np.sin(np.arange(1600) / 10).astype(np.float32) * 0.9
    bits = 32 if kind == "int32" else 16
    whole = (tone * 2.0 ** (bits - 1)).astype(kind.split()[-1])
    whole = torch.from_numpy(whole) if kind.startswith("torch") else whole
    heard = processor(audio=[tone, whole], sampling_rate=16000)["input_values"]
    torch.testing.assert_close(heard[1], heard[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("parts", [{"vision"}, {"text"}, {"audio"}, {"vision", "text"}, {"vision", "text", "audio"}])
def test_any_subset_of_sub_processors_saves_loads_and_pickles(parts, tmp_path):
    full = tiny_processor_and_model()[0]
    given = {
        "image_processor": full.image_processor if "vision" in parts else None,
        "tokenizer": full.tokenizer if "text" in parts else None,
        "feature_extractor": Wav2Vec2FeatureExtractor() if "audio" in parts else None,
    }
    processor = CrossModalProcessor(**given)
    inputs = {"images": [picture()], "text": ["which color?"], "audio": [noise(800)]}
    inputs = {key: v for key, v in inputs.items() if {"images": "vision"}.get(key, key) in parts}
    expected = processor(**inputs, sampling_rate=16000)
    processor.save_pretrained(tmp_path)
    for loaded in (
        CrossModalProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(processor)),
    ):
        assert loaded.modalities == processor.modalities
        batch = loaded(**inputs, sampling_rate=16000)
        assert set(batch) == set(expected)
        for key in expected:
            torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0)


def test_a_processor_without_what_a_modality_needs_is_refused():
    processor, model = tiny_processor_and_model()
    with pytest.raises(ValueError, match="'text' of type 'text' needs tokenizer"):
        CrossModalProcessor.from_config(model.config, image_processor=processor.image_processor)


def test_a_second_image_modality_takes_its_own_name_and_options():
    from transformers import ViTConfig

    extra = {"left": ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8)}  # fmt: skip
    processor, model = tiny_processor_and_model(extra)
    processor.modalities[2]["options"] = {"size": {"height": 16, "width": 16}}
    batch = processor(images=picture(), left=picture("blue"), text="which color?")
    assert batch["left_pixel_values"].shape == (1, 3, 16, 16) and batch["pixel_values"].shape == (1, 3, 32, 32)
    assert model(**batch).logits.shape == (1, 3)


def test_frames_of_a_video_become_one_tensor():
    processor = tiny_processor_and_model()[0]
    processor.modalities.append({"name": "video", "type": "video", "values": "pixel_values_videos", "mask": None})
    frames = [picture("red"), picture("blue")]
    assert processor(videos=[frames, frames], text=["a", "b"])["pixel_values_videos"].shape == (2, 2, 3, 32, 32)
    assert processor(videos=frames, text="a")["pixel_values_videos"].shape == (1, 2, 3, 32, 32)
    with pytest.raises(ValueError, match="same number"):
        processor(videos=[frames, frames[:1]], text=["a", "b"])


def test_frames_are_drawn_at_even_distances():
    assert evenly(8, 4) == [1, 3, 5, 7] and evenly(3, 3) == [0, 1, 2] and evenly(2, 4) == [0, 0, 1, 1]
    processor = tiny_processor_and_model()[0]
    processor.modalities.append(
        {"name": "video", "type": "video", "values": "pixel_values_videos", "mask": None, "num_frames": 2}
    )
    clip = [picture(color) for color in ("red", "green", "blue", "red")]
    array = np.stack([np.asarray(frame) for frame in clip])
    made = processor(videos=[clip, clip[:2], array], text=["a"] * 3)["pixel_values_videos"]
    assert made.shape == (3, 2, 3, 32, 32)
    torch.testing.assert_close(made[0], processor(videos=[clip[1], clip[3]], text="a")["pixel_values_videos"][0])
    torch.testing.assert_close(made[2], made[0])


def test_a_video_that_nothing_here_can_read_says_what_to_install(tmp_path):
    processor = tiny_processor_and_model()[0]
    processor.modalities.append({"name": "video", "type": "video", "values": "pixel_values_videos", "mask": None})
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"video of row 0 .*cannot be read|video files are read with one of \['av'"):
        processor(videos=[str(tmp_path / "broken.mp4")], text=["a"])
    with pytest.raises(ValueError, match=r"video of row 0 has shape \(0, 4, 4, 3\)"):
        processor(videos=np.zeros((0, 4, 4, 3)), text=["a"])
