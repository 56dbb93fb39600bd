"""Clips of pictures that move and sounds: what is made of them, what reads them, and what a recipe learns of them."""

import io
import json

import datasets
import numpy as np
import pytest
import soundfile
from crossmodal.training.clips import CLASSES, FRAMES_EACH, RATE, SECONDS_EACH, clips_dataset
from crossmodal.training.datasets import RowDataset
from crossmodal.training.loading import load_rows
from crossmodal.training.robustness import CORRUPTIONS
from crossmodal.training.token_cache import content_key
from PIL import Image
from test_cli import run


def tone(digit, rate=8000):
    """A recording of a class: a tone as high as its number, as a WAV file."""
    written = io.BytesIO()
    soundfile.write(
        written, 0.5 * np.sin(2 * np.pi * (500 + 700 * digit) * np.arange(rate // 4) / rate), rate, format="WAV"
    )
    return {"bytes": written.getvalue(), "path": None}


@pytest.fixture(scope="module")
def sources():
    """Sounds and pictures of four classes: a picture is as bright as its number."""
    digits = [0, 1, 2, 3] * 3
    sounds = datasets.Dataset.from_list([{"audio": tone(digit), "digit": digit} for digit in digits])
    pictures = [Image.new("L", (28, 28), 60 + 60 * digit) for digit in digits]
    images = datasets.Dataset.from_dict({"image": pictures, "digit": digits}).cast_column("image", datasets.Image())
    return sounds.cast_column("audio", datasets.Audio(decode=False)), images


def seen_in(frames):
    """Classes of a clip, from the brightest spot of each part's first frame."""
    return [(int(np.asarray(frames[FRAMES_EACH * part]).max()) - 60) // 60 for part in range(CLASSES)]


def heard_in(sound):
    """Classes of a sound, from the strongest frequency of each part."""
    length, found = int(SECONDS_EACH * RATE), []
    for part in range(CLASSES):
        strength = np.abs(np.fft.rfft(sound["array"][part * length : (part + 1) * length]))
        found.append(round((strength.argmax() * RATE / length - 500) / 700))
    return found


def test_what_is_seen_is_said_at_the_same_time(sources):
    samples = RowDataset(clips_dataset(*sources, "digit", "train", count=6), "retrieval")
    assert samples.adapter_name == "sounds_and_clips"
    for number in range(6):
        sample = samples[number]
        assert len(sample["videos"]) == CLASSES * FRAMES_EACH and len(sample["audio"]["array"]) == CLASSES * int(
            SECONDS_EACH * RATE
        )
        assert seen_in(sample["videos"]) == heard_in(sample["audio"])
        assert sample["target"]["keys"] == [("class", " ".join(map(str, seen_in(sample["videos"]))))]


def test_half_of_matching_clips_are_beside_another_sound(sources):
    samples = RowDataset(clips_dataset(*sources, "digit", "train", matching=True, count=40), "classification")
    assert samples.adapter_name == "labelled_clips_with_sound"
    reordered = 0
    for number, label in enumerate(samples.targets):
        seen, heard = seen_in(samples[number]["videos"]), heard_in(samples[number]["audio"])
        assert (seen == heard) == (label == "same")
        reordered += label == "different" and sorted(seen) == sorted(heard)
    assert samples.targets.count("same") == 20 and 4 <= reordered <= 16


def test_clips_are_the_same_every_time_and_others_in_another_split(sources):
    first, again, other = (clips_dataset(*sources, "digit", split, count=3) for split in ("train", "train", "test"))
    assert first["class"] == again["class"] and first["video"] == again["video"]
    assert first["class"] != other["class"]


def test_a_picture_moves(sources):
    frames = RowDataset(clips_dataset(*sources, "digit", "train", count=1), "retrieval")[0]["videos"]
    places = {tuple(np.argwhere(np.asarray(frame)[..., 0] > 50).min(0)) for frame in frames[:FRAMES_EACH]}
    assert len(places) > FRAMES_EACH // 2


def test_the_name_of_a_dataset_makes_clips(sources, tmp_path):
    for name, rows in zip(("sounds", "images"), sources, strict=True):
        (tmp_path / name).mkdir()
        rows.to_parquet(tmp_path / name / "train.parquet")
    source = f"clips of {tmp_path / 'sounds'} + {tmp_path / 'images'} on digit"
    assert len(load_rows(source, "train")) == 36
    assert set(load_rows(f"matching {source}", "train", limit=4)["label"]) == {"same", "different"}
    with pytest.raises(ValueError, match=r"\['label'\] is not in"):
        load_rows(source.replace("on digit", "on label"), "train")


def test_clips_are_searched_by_a_sound_and_shown_as_frames_side_by_side(sources, tmp_path, capsys):
    for name, rows in zip(("sounds", "images"), sources, strict=True):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            rows.to_parquet(tmp_path / name / f"{split}.parquet")
    source = f"clips of {tmp_path / 'sounds'} + {tmp_path / 'images'} on digit"
    changes = ("max_train_rows=8", "max_eval_rows=8", "training.max_steps=1")
    assert run("train", "retrieval_clips", f"dataset={source}", f"output_dir={tmp_path / 'model'}", *changes) == 0
    where = ("--dataset", source, "--split", "train")
    assert run("index", tmp_path / "model", *where, "--output", tmp_path / "index") == 0
    rows = load_rows(source, "train")
    samples = RowDataset(rows, "retrieval")
    frames, query, asked = samples.input_of(0, "videos"), tmp_path / "query.wav", tmp_path / "query.npy"
    query.write_bytes(rows[0]["audio"]["bytes"])
    np.save(asked, np.stack([np.asarray(frame) for frame in frames]))
    search, picture = ("search", tmp_path / "index", "--top-k", 3, "--json"), tmp_path / "hits.png"
    capsys.readouterr()
    for given in (("--audio", query, *where, "--output", picture), ("--input", f"videos={asked}")):
        assert run(*search, *given) == 0
        hits = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len({hit["row"] for hit in hits}) == 3
    assert Image.open(picture).size[0] > 400
    assert run(*search, "--text", "seven") == 2
    assert "Expected exactly one of ['audio', 'videos']" in capsys.readouterr().err
    strip = samples.picture_of(0)
    assert strip.size == (3 * frames[0].width, frames[0].height)
    assert seen_in(
        [strip.crop((48 * part, 0, 48 * part + 48, 48)) for part in range(3) for _ in range(FRAMES_EACH)]
    ) == seen_in(frames)
    sounds = RowDataset(load_rows(str(tmp_path / "sounds"), "train").rename_column("digit", "label"), "classification")
    with pytest.raises(ValueError, match="have no picture to draw"):
        sounds.picture_of(0)


def test_frames_have_a_key_of_their_own_and_can_be_made_noisy(sources):
    samples = RowDataset(clips_dataset(*sources, "digit", "train", count=2), "retrieval")
    one, two = samples.raw_column("videos")
    assert content_key(one) != content_key(two) and content_key(one) == content_key([dict(frame) for frame in one])
    frames, draw = samples[0]["videos"], np.random.default_rng(0)
    for corruption in CORRUPTIONS["video"].values():
        made = corruption.apply(frames, corruption.levels[-1], draw)
        assert len(made) == len(frames) and any(
            np.asarray(a).tolist() != np.asarray(b).tolist() for a, b in zip(made, frames, strict=True)
        )
