"""Datasets in the files that their authors publish, to rows: VQA v2, Karpathy's COCO and Flickr30K, MMSA's MOSI and MOSEI, DEAP,
Kinetics-Sounds."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Layout:
    """How a folder of published files becomes rows.

    Args:
        files: pattern of the files by which such a folder, or one level below it, is known.
        splits: {split: what the files call it}, one name or several.
        read: (folder, files of the pattern in order, names of the split) to a `datasets.Dataset`.
    """

    files: str
    splits: dict[str, tuple[str, ...]]
    read: Callable


def find_layout(folder):
    """(Layout, its files) of a folder, or None of a folder of none."""
    for layout in LAYOUTS.values():
        files = sorted(folder.glob(layout.files)) or sorted(folder.glob(f"*/{layout.files}"))
        if files:
            return layout, files
    return None


def read_layout(layout, folder, files, split):
    """Rows of a split. Raises ValueError for a split or a file that is not there, naming it."""
    if split not in layout.splits:
        raise ValueError(f"the dataset {str(folder)!r} has no split {split!r}. It has: {', '.join(layout.splits)}.")
    return layout.read(folder, files, layout.splits[split])


def _vqa_v2(folder, files, names):
    """The questions and annotations of visualqa.org with COCO's images, `<split>/COCO_<split>_<12 digits>.jpg`, here or in `images`."""
    import datasets

    (name,) = names
    questions = next((file for file in files if f"_{name}_" in file.name), None)
    answers = sorted(folder.glob(f"**/v2_mscoco_{name}_annotations.json")) if questions else []
    if not answers:
        raise ValueError(
            f"the folder {str(folder)!r} lacks the questions or the annotations of {name}. Answers of the test splits are not public, "
            "their server scores them: evaluate on validation."
        )
    asked = {item["question_id"]: item["question"] for item in json.loads(questions.read_text())["questions"]}
    rows = json.loads(answers[0].read_text())["annotations"]
    places = _places(folder, name)
    columns = {key: [row[key] for row in rows] for key in ("question_id", "image_id", "question_type", "answer_type")}
    columns["question"] = [asked[row["question_id"]] for row in rows]
    columns["answers"] = [[answer["answer"] for answer in row["answers"]] for row in rows]
    columns["image"] = [_image(places, f"COCO_{name}_{row['image_id']:012d}.jpg") for row in rows]
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def _karpathy(folder, files, names):
    """Karpathy's `dataset_coco.json` or `dataset_flickr30k.json` with the images, in the folders that it names, here or in `images`."""
    import datasets

    columns = {"image": [], "image_id": [], "captions": []}
    places = {}
    for row in json.loads(files[0].read_text())["images"]:
        if row["split"] in names:
            inside = row.get("filepath", "")
            places.setdefault(inside, _places(folder, inside, "flickr30k-images"))
            columns["image"].append(_image(places[inside], row["filename"]))
            columns["image_id"].append(row.get("cocoid", row["imgid"]))
            columns["captions"].append([sentence["raw"] for sentence in row["sentences"]])
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def _places(folder, *names):
    return [place for name in names for place in (folder / name, folder / "images" / name)] + [folder / "images"]


def _image(places, name):
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        raise ValueError(f"the image {name!r} lies in none of {[str(place) for place in places]}. Put it into one.")
    return str(found)


def _mmsa(folder, files, names):
    """`aligned_50.pkl` or `unaligned_50.pkl` of MMSA (Mao et al. 2022), CMU-MOSI or MOSEI: a row per utterance, with sequences of features
    (T,F) as long as it is, without the padding."""
    import datasets

    if len(files) > 1:
        raise ValueError(f"{[file.name for file in files]} lie together. Give a folder with one of them.")
    data = _unpickled(files[0])[names[0]]
    words = np.asarray(data["text_bert"])[:, 1].sum(axis=-1).astype(int)
    # Aligned to words, the others are as long as the text.
    lengths = {"text": words} | {key: data.get(f"{key}_lengths", words) for key in ("audio", "vision")}
    columns = {"video": [], "segment": []}
    for name in data["id"]:
        video, _, segment = str(name).partition("$_$")
        columns["video"].append(video)
        columns["segment"].append(int(segment))
    columns["text"] = [str(text) for text in data["raw_text"]]
    columns["score"] = np.asarray(data["regression_labels"], dtype=float).tolist()
    for key, column in {"text": "text_values", "audio": "audio_values", "vision": "video_values"}.items():
        # COVAREP is infinite where a voice is silent.
        values = [np.nan_to_num(np.asarray(row, dtype=np.float32), posinf=0.0, neginf=0.0) for row in data[key]]
        columns[column] = [row[: max(1, int(n))] for row, n in zip(values, lengths[key], strict=True)]
    return datasets.Dataset.from_dict(columns)


# Of a trial of DEAP as it is published: 3 seconds before the video and 60 of it, at 128 Hz; 32 channels of EEG, then others.
_DEAP_RATE, _DEAP_BEFORE, _DEAP_EEG = 128, 3 * 128, 32
_RATINGS = ("valence", "arousal", "dominance", "liking")


def _deap(folder, files, names):
    """`data_preprocessed_python` of DEAP (Koelstra et al. 2012): a row per trial, with `signal` (32 channels, samples) of the video alone,
    `subject`, `recording`, and the four ratings by name.

    The files give ratings by place. Where `participant_ratings.csv`, which names them, lies beside, both must agree.
    """
    import datasets

    named = _deap_ratings(folder)
    columns = {key: [] for key in ("signal", "sampling_rate", "subject", "recording", *_RATINGS)}
    for file in files:
        data = _unpickled(file)
        for trial, (signal, ratings) in enumerate(zip(data["data"], data["labels"], strict=True), 1):
            ratings = dict(zip(_RATINGS, map(float, ratings), strict=True))
            other = named.get((int(file.stem[1:]), trial), ratings)
            if not np.allclose([other[key] for key in _RATINGS], list(ratings.values()), atol=0.01):
                raise ValueError(
                    f"{file.name}, trial {trial}: ratings {ratings}, and participant_ratings.csv has {other}. The columns of one of them "
                    "are in another order: correct it."
                )
            row = {"signal": np.asarray(signal[:_DEAP_EEG, _DEAP_BEFORE:], dtype=np.float32)}
            row |= {"sampling_rate": _DEAP_RATE, "subject": file.stem, "recording": f"{file.stem}-{trial}"} | ratings
            for key, value in row.items():
                columns[key].append(value)
    return datasets.Dataset.from_dict(columns)


def _deap_ratings(folder):
    """{(participant, number of the video): {rating: value}} of `participant_ratings.csv`, empty without it."""
    import pandas

    files = sorted(folder.glob("**/participant_ratings.csv"))
    rows = pandas.read_csv(files[0]).rename(columns=str.lower).to_dict("records") if files else []
    return {
        (int(row["participant_id"]), int(row["experiment_id"])): {key: float(row[key]) for key in _RATINGS}
        for row in rows
    }


# Of Kinetics-400, what can be both seen and heard (Arandjelovic and Zisserman 2017, "Look, Listen and Learn"). They name 34 classes of an
# early release; these are the 31 that later work has, with about 14,700 clips to train on and 2,600 to test: others have 26, 30 or 32.
KINETICS_SOUNDS = (
    "blowing nose", "blowing out candles", "bowling", "chopping wood", "dribbling basketball", "laughing", "mowing lawn",
    "playing accordion", "playing bagpipes", "playing bass guitar", "playing clarinet", "playing drums", "playing guitar",
    "playing harmonica", "playing keyboard", "playing organ", "playing piano", "playing saxophone", "playing trombone",
    "playing trumpet", "playing violin", "playing xylophone", "ripping paper", "shoveling snow", "shuffling cards", "singing",
    "stomping grapes", "tap dancing", "tapping guitar", "tapping pen", "tickling",
)  # fmt: skip


def _kinetics_sounds(folder, files, names):
    """Clips of Kinetics in `<split>/video/<class>/<clip>.mp4`, their sound in `<split>/audio/<class>/<clip>.wav`: those of the classes
    `KINETICS_SOUNDS`, with None for a sound that is not there."""
    import datasets

    columns = {"id": [], "video": [], "audio": [], "label": []}
    for file in files:
        label, split = file.parent.name.replace("_", " "), file.parents[2]
        if split.name in names and label in KINETICS_SOUNDS:
            sound = split / "audio" / file.parent.name / f"{file.stem}.wav"
            columns["id"].append(file.stem)
            columns["video"].append(str(file))
            columns["audio"].append(str(sound) if sound.is_file() else None)
            columns["label"].append(label)
    if not columns["id"]:
        raise ValueError(
            f"the folder {str(folder)!r} has no clip of {names[0]} in any class of Kinetics-Sounds. Expected "
            f"{names[0]}/video/<class>/<clip>.mp4, with classes such as {KINETICS_SOUNDS[0]!r}."
        )
    # All without sound would have no type.
    features = {key: datasets.Value("string") for key in columns}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


class _ArraysOnly(pickle.Unpickler):
    """A pickle of arrays, lists and dicts; whatever else it wants to call might do anything."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "encode")

    def find_class(self, module, name):
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self._ALLOWED:
            raise ValueError(f"the file asks for {module}.{name}, which no array needs. It is not read.")
        return super().find_class(module, name)


def _unpickled(file):
    with Path(file).open("rb") as opened:
        # Written by Python 2.
        return _ArraysOnly(opened, encoding="latin1").load()


_EVERY = {"train": ("train",), "validation": ("valid",), "test": ("test",)}

LAYOUTS = {
    "vqa_v2": Layout(
        "v2_OpenEnded_mscoco_*_questions.json",
        {"train": ("train2014",), "validation": ("val2014",), "test": ("test2015",), "testdev": ("test-dev2015",)},
        _vqa_v2,
    ),
    "karpathy": Layout(
        "dataset_*.json", {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}, _karpathy
    ),
    "mmsa": Layout("*aligned_50.pkl", _EVERY, _mmsa),
    "kinetics_sounds": Layout(
        "*/video/*/*.mp4",
        {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)},
        _kinetics_sounds,
    ),
    "deap": Layout("s[0-9][0-9].dat", {"train": ("train",)}, _deap),
}
