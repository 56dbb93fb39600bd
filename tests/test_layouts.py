"""Datasets of the field in the files of their authors: made-up rows in the true layout, read as their protocol has it."""

import json
import pickle

import datasets
import numpy as np
import pytest
from crossmodal.training.datasets import RowDataset
from crossmodal.training.evaluate import evaluate
from crossmodal.training.layouts import KINETICS_SOUNDS
from crossmodal.training.loading import load_rows
from crossmodal.training.protocols import cross_validate
from crossmodal.training.recipes import Recipe
from crossmodal.training.schemas import find_adapter
from crossmodal.training.train import train
from world import noise, picture


def quiet(line):
    pass


# VQA v2


@pytest.fixture
def vqa_v2(tmp_path):
    for split, count in (("train2014", 3), ("val2014", 2)):
        (tmp_path / split).mkdir()
        questions, annotations = [], []
        for image in range(1, count + 1):
            picture().save(tmp_path / split / f"COCO_{split}_{image:012d}.jpg")
            item = {"image_id": image, "question_id": image * 1000}
            questions.append(item | {"question": f"is it picture {image}?"})
            given = [
                {"answer": "yes" if n < 7 else "no", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)
            ]
            annotations.append(
                item
                | {
                    "answers": given,
                    "multiple_choice_answer": "yes",
                    "question_type": "is it",
                    "answer_type": "yes/no",
                }
            )
        # Annotations are in an order of their own.
        annotations.reverse()
        asked = {"task_type": "Open-Ended", "data_subtype": split, "questions": questions}
        (tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(asked))
        (tmp_path / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": annotations}))
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").write_text('{"questions": []}')
    return tmp_path


def test_vqa_v2_is_read_from_its_own_files(vqa_v2):
    rows = load_rows(str(vqa_v2), "train")
    assert find_adapter(rows.column_names, "vqa") == "vqa_v2" and len(load_rows(str(vqa_v2), "validation")) == 2
    samples = RowDataset(rows, "vqa")
    for sample, row in zip(samples, rows, strict=True):
        assert sample["text"] == f"is it picture {row['image_id']}?" and sample["images"].size == (32, 32)
        assert sample["target"] == ["yes"] * 7 + ["no"] * 3


def test_the_test_splits_of_vqa_v2_are_not_scored_here(vqa_v2):
    with pytest.raises(ValueError, match="Answers of the test splits are not public"):
        load_rows(str(vqa_v2), "test")
    # As lmms-lab/VQAv2 has them.
    columns = {"image": [picture()], "question": ["is it?"], "question_id": [7], "answers": [None]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="question 7 has no answers"):
        RowDataset(rows, "vqa")


def test_an_image_that_is_missing_is_named(vqa_v2):
    (vqa_v2 / "val2014" / "COCO_val2014_000000000002.jpg").unlink()
    with pytest.raises(ValueError, match="COCO_val2014_000000000002.jpg.*lies in none of"):
        load_rows(str(vqa_v2), "validation")


# COCO and Flickr30K


def karpathy(folder, name, images):
    """A folder with Karpathy's file and pictures; images: (folder in it, file, split, number of captions)."""
    rows = []
    for number, (inside, file, split, captions) in enumerate(images):
        place = folder / (inside or "flickr30k-images")
        place.mkdir(parents=True, exist_ok=True)
        picture().save(place / file)
        sentences = [
            {"raw": f"caption {n} of {file}", "tokens": ["caption"], "imgid": number, "sentid": 10 * number + n}
            for n in range(captions)
        ]
        row = {"filename": file, "imgid": number, "split": split, "sentences": sentences, "sentids": []}
        rows.append(row | ({"filepath": inside, "cocoid": 500 + number} if inside else {}))
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": rows, "dataset": name}))
    return str(folder)


def test_coco_has_karpathys_splits_and_pairs_five_captions_with_an_image(tmp_path):
    source = karpathy(
        tmp_path, "coco",
        [("train2014", "a.jpg", "train", 5), ("val2014", "b.jpg", "restval", 5), ("val2014", "c.jpg", "val", 5),
         ("val2014", "d.jpg", "test", 7), ("val2014", "e.jpg", "test", 5)],
    )  # fmt: skip
    # Rows of restval are trained on.
    assert load_rows(source, "train")["image_id"][:] == [500, 501]
    assert load_rows(source, "validation")["image_id"][:] == [502]
    rows = load_rows(source, "test")
    pairs = RowDataset(rows, "retrieval")
    assert len(pairs) == 10 and [target["id"] for target in pairs.targets] == [503] * 5 + [504] * 5
    # To be written are all, one text an image against every caption.
    written = RowDataset(rows, "captioning")
    firsts = [target for target, (_, item) in zip(written.targets, written.places, strict=True) if item == 0]
    assert [len(target["references"]) for target in firsts] == [7, 5]


def test_flickr30k_is_read_from_karpathys_file_and_from_the_schema_of_the_hub(tmp_path):
    images = [(None, "1.jpg", "train", 5), (None, "2.jpg", "val", 5), (None, "3.jpg", "test", 5)]
    source = karpathy(tmp_path / "own", "flickr30k", images)
    assert [len(RowDataset(load_rows(source, split), "retrieval")) for split in ("train", "validation", "test")] == [
        5
    ] * 3
    # nlphuji/flickr30k: all in one split, a column tells; others: splits named `val`.
    captions = [[f"{n} of {file}" for n in range(5)] for _, file, _, _ in images]
    columns = {
        "image": [picture()] * 3, "caption": captions, "sentids": [["0"] * 5] * 3, "img_id": ["0", "1", "2"],
        "filename": [file for _, file, _, _ in images],
    }  # fmt: skip
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    hub, splits = tmp_path / "hub", tmp_path / "splits"
    hub.mkdir()
    splits.mkdir()
    rows.add_column("split", [split for _, _, split, _ in images]).to_parquet(hub / "test.parquet")
    for number, name in enumerate(("train", "val", "test")):
        rows.select([number]).to_parquet(splits / f"{name}.parquet")
    for place in (hub, splits):
        for number, split in enumerate(("train", "validation", "test")):
            pairs = RowDataset(load_rows(str(place), split), "retrieval")
            assert len(pairs) == 5 and {target["id"] for target in pairs.targets} == {str(number)}


def test_captions_of_coco_as_a_list_of_raw_sentences_are_found():
    assert find_adapter(["image", "sentences_raw", "cocoid"], "retrieval") == "sentences_raw"
    assert find_adapter(["image", "sentences_raw", "cocoid"], "captioning") == "sentences_raw_to_write"


# MOSI and MOSEI

_STEPS, _SIZES = {"text": 50, "audio": 12, "vision": 15}, {"text": 6, "audio": 3, "vision": 4}


def mmsa(folder, aligned=False, rows=8):
    """A folder with a file of MMSA: padded features, true lengths, scores that the audio tells."""
    folder.mkdir()
    data = {}
    for number, split in enumerate(("train", "valid", "test")):
        scores = np.linspace(-3, 3, rows)
        words = np.arange(rows) % 4 + 2
        steps = {key: (50 if aligned else count) for key, count in _STEPS.items()}
        part = {
            "id": [f"video-{number}-{row // 2}$_${row % 2}" for row in range(rows)],
            "raw_text": np.array([f"words {row}" for row in range(rows)], dtype=object),
            "text_bert": np.stack([np.tile(np.arange(50) < count, (3, 1)) for count in words]).astype(np.float32),
            "regression_labels": scores,
            "classification_labels": np.sign(scores),
            "annotations": ["Positive"] * rows,
        }
        for key, size in _SIZES.items():
            part[key] = noise(rows, steps[key], size, seed=number)
            lengths = words if aligned or key == "text" else words + 1
            part[key][np.arange(steps[key])[None] >= lengths[:, None]] = 0
            if key == "audio":
                part[key][..., 0] = scores[:, None]
                part[key][0, 0, 1] = -np.inf
            if key != "text" and not aligned:
                part[f"{key}_lengths"] = lengths.tolist()
        data[split] = part
    file = folder / f"{'' if aligned else 'un'}aligned_50.pkl"
    file.write_bytes(pickle.dumps(data))
    return str(folder)


@pytest.mark.parametrize("aligned", [True, False])
def test_mosei_is_read_from_mmsas_file_without_its_padding(tmp_path, aligned):
    rows = load_rows(mmsa(tmp_path / "mosei", aligned), "validation")
    assert find_adapter(rows.column_names, "sentiment") == "mosi_scores"
    samples = RowDataset(rows, "sentiment")
    words = np.arange(8) % 4 + 2
    assert [sample["text_features"].shape for sample in samples] == [(count, 6) for count in words]
    assert [len(sample["audio_features"]) for sample in samples] == list(words + (0 if aligned else 1))
    assert all(np.isfinite(sample["audio_features"]).all() for sample in samples)
    assert samples[1]["target"] == {"score": pytest.approx(-3 + 6 / 7), "label": None}
    assert (rows[3]["video"], rows[3]["segment"], rows[3]["text"]) == ("video-1-1", 1, "words 3")


def test_the_recipe_of_mosei_trains_on_it_and_gives_the_metrics_of_the_field(tmp_path):
    sizes = [f"model.encoders.{name}_features.feature_size={_SIZES[key]}" for name, key in
             (("text", "text"), ("audio", "audio"), ("video", "vision"))]  # fmt: skip
    source = mmsa(tmp_path / "mosei")
    given = [f"dataset={source}", f"output_dir={tmp_path / 'out'}", "max_steps=2", "use_cpu=true", "disable_tqdm=true"]
    result = train(Recipe.load("classification_mosei", [*given, *sizes]), write=quiet, export=False)
    found = evaluate(result["model"], result["processor"], source, "test", progress=False)
    wanted = {"accuracy", "weighted_f1", "acc2_nonneg", "acc2_negpos", "f1_negpos", "acc7", "mae", "corr"}
    assert found.keys() == wanted == result["metrics"].keys() - {"loss"}


def test_a_pickle_that_does_more_than_hold_arrays_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    (tmp_path / "aligned_50.pkl").write_bytes(pickle.dumps({"train": Evil()}))
    with pytest.raises(ValueError, match="builtins.print, which no array needs"):
        load_rows(str(tmp_path), "train")
    (tmp_path / "unaligned_50.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="lie together"):
        load_rows(str(tmp_path), "train")


def test_mosei_as_text_and_sound_is_sentiment():
    columns = ["video", "start_time", "end_time", "sentiment", "happy", "text", "audio"]
    assert find_adapter(columns, "sentiment") == "mosei_sounds"


# DEAP


@pytest.fixture
def deap(tmp_path):
    """Two people with six trials of 3 and 12 seconds; the channels beyond the 32 of EEG are 100."""
    ratings = [[8.0, 2.0, 3.0, 4.0], [5.0, 9.0, 3.0, 4.0], [2.0, 4.99, 3.0, 4.0], [1.0, 7.0, 3.0, 9.0]]
    ratings += [[7.0, 1.0, 2.0, 2.0], [3.0, 6.0, 5.0, 1.0]]
    for person in (1, 2):
        signal = noise(6, 40, 15 * 128, seed=person).astype(np.float64)
        signal[:, 32:], signal[:, :32, : 3 * 128] = 100, 50
        data = {"data": signal, "labels": np.array(ratings)}
        # As Python 2 wrote them.
        (tmp_path / f"s{person:02d}.dat").write_bytes(pickle.dumps(data, protocol=2))
    return tmp_path, ratings


def ratings_file(folder, names, ratings):
    lines = ["Participant_id,Trial,Experiment_id,Start_time," + ",".join(names)]
    lines += [
        f"{person},{7 - video},{video},0," + ",".join(map(str, ratings[video - 1]))
        for person in (1, 2)
        for video in range(6, 0, -1)
    ]
    (folder / "participant_ratings.csv").write_text("\n".join(lines) + "\n")


def test_deap_is_read_with_its_ratings_by_name_and_eeg_of_the_video_alone(deap):
    folder, ratings = deap
    rows = load_rows(str(folder), "train")
    assert rows["subject"][:] == ["s01"] * 6 + ["s02"] * 6 and len(set(rows["recording"][:])) == 12
    assert rows["valence"][:6] == [row[0] for row in ratings] and rows["liking"][:6] == [row[3] for row in ratings]
    signal = np.array(rows[5]["signal"])
    assert signal.shape == (32, 12 * 128) and np.abs(signal).max() < 10
    with pytest.raises(ValueError, match="no split 'test'. It has: train"):
        load_rows(str(folder), "test")


def test_ratings_in_another_order_than_their_names_are_refused(deap):
    folder, ratings = deap
    ratings_file(folder, ["Valence", "Arousal", "Dominance", "Liking"], ratings)
    assert len(load_rows(str(folder), "train")) == 12
    # The swap that the published scores of MCA suffer from.
    ratings_file(folder, ["Arousal", "Valence", "Liking", "Dominance"], ratings)
    with pytest.raises(ValueError, match="s01.dat, trial 1: ratings .* are in another order"):
        load_rows(str(folder), "train")


def test_a_rating_becomes_high_or_low_at_five(deap):
    folder, _ = deap
    assert load_rows(f"{folder} by valence >= 5", "train")["state"][:4] == ["high", "high", "low", "low"]
    assert load_rows(f"{folder} by valence > 5", "train")["state"][:4] == ["high", "low", "low", "low"]
    assert load_rows(f"{folder} by arousal >= 5", "train")["state"][:4] == ["low", "high", "low", "high"]
    with pytest.raises(ValueError, match="no column 'valense'"):
        load_rows(f"{folder} by valense >= 5", "train")


def test_the_recipe_of_deap_is_cross_validated_by_person(deap, tmp_path):
    folder, _ = deap
    given = [f"dataset={folder} by valence >= 5", f"output_dir={tmp_path / 'out'}", "max_steps=2", "use_cpu=true"]
    recipe = Recipe.load("classification_deap", [*given, "disable_tqdm=true"])
    assert Recipe.load("classification_deap").dataset == "data/deap by valence >= 5"
    found = cross_validate(recipe, "leave_one_subject_out", write=quiet)
    assert [fold["held_out"] for fold in found["folds"]] == ["s01", "s02"] and not found["leaky"]
    # One window of ten seconds from each trial of twelve.
    assert [fold["rows"] for fold in found["folds"]] == [6, 6] and 0 <= found["metrics"]["accuracy"] <= 1


# Kinetics-Sounds


def test_kinetics_sounds_takes_its_classes_out_of_a_tree_of_clips(tmp_path):
    clips = [
        ("train", "playing_piano", "a"),
        ("train", "tap dancing", "b"),
        ("train", "abseiling", "c"),
        ("val", "singing", "d"),
    ]
    for split, name, clip in clips:
        for kind, suffix in (("video", "mp4"), ("audio", "wav")):
            place = tmp_path / split / kind / name / f"{clip}.{suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            if (clip, kind) != ("b", "audio"):
                place.write_bytes(b"clip")
    rows = load_rows(str(tmp_path), "train")
    samples = RowDataset(rows, "classification")
    assert samples.adapter_name == "labelled_clips_with_sound"
    assert samples.targets == ["playing piano", "tap dancing"] and rows["id"] == ["a", "b"]
    assert rows["audio"][0].endswith("train/audio/playing_piano/a.wav") and rows["audio"][1] is None
    assert load_rows(str(tmp_path), "validation")["label"] == ["singing"]
    with pytest.raises(ValueError, match="no clip of test in any class of Kinetics-Sounds"):
        load_rows(str(tmp_path), "test")
    assert len(set(KINETICS_SOUNDS)) == 31
