"""Schemas of datasets: an adapter each, matched on columns and never on a path."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .rooms import ROOM_CLASSES


@dataclass(frozen=True)
class Adapter:
    """How the rows of one schema become samples.

    Args:
        task: row of `TASKS` that the samples serve.
        columns: columns a dataset must have to be of this schema.
        inputs: input of the processor to the column that holds it.
        target: row (without its images) to what the task learns from.
        images, sounds, clips: columns that hold images, encoded sound, and videos: lists of images, or files.
        group: row (without its images) to what it shares with others, which no split may tear apart, or None.
        several: column that may hold a list, each item of which makes a sample of its own (captions of an image), or None.
        items: of such a list to the numbers of its items that make a sample.
        take: (list, number) to what is the input then: the item itself, or the turns of a dialogue before it.
        vectors: columns that hold one feature vector, or a sequence of them.
        recording, place: row to what it is a part of, and to where in it, for those that have neighbours.
        subject: row to the person it was recorded of.
        points: row to the points of its scene, for the input `points`.
        unimodal: input to the column that holds its own label, where data has one for each: see `unimodal_targets` of the model.
    """

    task: str
    columns: tuple[str, ...]
    inputs: dict[str, str]
    target: Callable[[dict], object]
    images: tuple[str, ...] = ("image",)
    sounds: tuple[str, ...] = ()
    clips: tuple[str, ...] = ()
    group: Callable[[dict], object] = lambda row: row.get("image_id")
    several: str | None = None
    items: Callable[[list], object] = lambda values: range(len(values))
    take: Callable[[list, int], object] = lambda values, item: values[item]
    vectors: tuple[str, ...] = ()
    recording: Callable[[dict], object] | None = None
    place: Callable[[dict], object] | None = None
    subject: Callable[[dict], object] | None = None
    points: Callable[[dict], dict] | None = None
    unimodal: dict[str, str] | None = None

    @property
    def files(self):
        """Columns that are decoded only when a sample is read."""
        return [*self.images, *self.sounds, *self.clips, *self.vectors]

    def without_files(self, rows):
        """Rows without those columns."""
        return rows.remove_columns([column for column in self.files if column in rows.column_names])


def _annotators(row):
    """Ten answers of VQA v2, stored as strings or as dicts with `answer`."""
    if row["answers"] is None:
        raise ValueError(
            f"question {row.get('question_id')} has no answers: those of the test splits of VQA v2 are not public, their server scores "
            "them. Evaluate on validation."
        )
    return [answer["answer"] if isinstance(answer, dict) else answer for answer in row["answers"]]


def _pair(column):
    """Target of a retrieval adapter: the image it is about, and what makes other pairs right too."""

    def target(row):
        image = next(
            (row[name] for name in ("image_id", "imgid", "img_id", "cocoid", "id", "filename") if name in row), None
        )
        text = row[column]
        text = text["raw"] if isinstance(text, dict) else text
        return {"id": image, "keys": [("image", image), ("text", text)]}

    return target


def _pairs(*columns, **options):
    """An adapter of images with a text, or a list of texts, in the last column."""
    inputs = {"images": columns[0], "text": columns[-1]}
    return Adapter("retrieval", columns, inputs, _pair(columns[-1]), several=columns[-1], **options)


def _first_five(values):
    """Captions that are paired with an image of COCO, where a few have six or seven: 25,000 of the 5,000 test images."""
    return range(min(5, len(values)))


def _captions(*columns):
    """An adapter of images whose text, or list of texts, in the last column is to be written."""

    def target(row):
        texts = row.get(f"{columns[-1]}_all") or [row[columns[-1]]]
        plain = [text["raw"] if isinstance(text, dict) else text for text in (row[columns[-1]], *texts)]
        return {"text": plain[0], "references": plain[1:]}

    return Adapter("captioning", columns, {"images": columns[0]}, target, several=columns[-1])


def _answered(row):
    """Target of a question that is answered freely: the most common answer, and all that were given."""
    answers = _annotators(row) if "answers" in row else [str(row["answer"])]
    return {"text": Counter(answers).most_common(1)[0][0], "references": answers}


def _answers(*columns):
    return Adapter("answering", columns, {"images": "image", "text": "question"}, _answered)


def _turns(messages):
    """Numbers of what the assistant says."""
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _said(row):
    """Target of a turn of a dialogue: what is said in it."""
    content = row["messages"]["content"]
    if not isinstance(content, str):
        content = " ".join(part["text"] for part in content if part.get("type") == "text")
    return {"text": content, "references": [content]}


def _labelled(*columns, label=None, **options):
    """An adapter of rows with a label in the last column."""
    return Adapter("classification", columns, target=label or (lambda row: label_name(row[columns[-1]])), **options)


def label_name(value):
    """A label, or all that hold, as strings."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else str(value)


def _points_of(row):
    """Points of a scene, as the processor takes them: arrays may be flattened row by row."""
    points = {"coordinates": np.asarray(row["points"], dtype=np.float32).reshape(-1, 3)}
    count = len(points["coordinates"])
    for key, shape in (("colors", (count, 3)), ("uv", (count, -1, 2)), ("segments", (count,))):
        if row.get(key) is not None:
            points[key] = np.asarray(row[key], dtype=np.float32 if key != "segments" else np.int64).reshape(shape)
    return points


def _point_labels(*columns, classes, inputs=None, images=(), **options):
    """An adapter of scenes whose points have labels. classes: {label: name}; any other label is a truth that is not known."""
    names, place = tuple(classes.values()), {label: index for index, label in enumerate(classes)}

    def target(row):
        labels = np.array([place.get(label, -1) for label in row["labels"]], dtype=np.int64)
        return {"labels": labels, "classes": names}

    return Adapter(
        "point_segmentation",
        (*columns, "labels"),
        {"points": "points"} | (inputs or {}),
        target,
        images=images,
        vectors=("points", "colors", "uv", "segments"),
        points=_points_of,
        **options,
    )


_DRIVING = "vehicle two_wheeler pedestrian pole_sign_light building_wall_fence vegetation other"
# NYU40 numbers of the 20 classes that ScanNet is scored on.
_SCANNET = (
    "1 wall, 2 floor, 3 cabinet, 4 bed, 5 chair, 6 sofa, 7 table, 8 door, 9 window, 10 bookshelf, 11 picture, 12 counter, 14 desk, "
    "16 curtain, 24 refrigerator, 28 shower curtain, 33 toilet, 34 sink, 36 bathtub, 39 otherfurniture"
)
_S3DIS = "ceiling floor wall beam column window door table chair sofa bookcase board clutter"

# Features of CMU-MOSI and MOSEI by utterance, in the order of the recording.
_UTTERANCES = {
    "inputs": {
        "text": "text",
        "text_features": "text_values",
        "audio_features": "audio_values",
        "video_features": "video_values",
    },
    "images": (),
    "vectors": ("text_values", "audio_values", "video_values"),
    "group": lambda row: row["video"],
    "recording": lambda row: row["video"],
    "place": lambda row: row["segment"],
}
_UTTERANCE_COLUMNS = ("video", "segment", "text", "text_values", "audio_values", "video_values")

# Most specific schema first. A target of a VQA adapter is a string, the list of all annotators' answers, or the score of
# every answer that holds.
DATASETS = {
    "vqa_v2": Adapter("vqa", ("image", "question", "answers"), {"images": "image", "text": "question"}, _annotators),
    "easy_vqa": Adapter(
        "vqa", ("image", "question", "answer"), {"images": "image", "text": "question"}, lambda row: str(row["answer"])
    ),
    "nlvr": Adapter(
        "vqa",
        ("image", "sentence", "label"),
        {"images": "image", "text": "sentence"},
        # Labels of NLVR are booleans here, and the strings "true" and "false" in its own files.
        lambda row: str(row["label"]).lower(),
        # "1304-0": the first of the pictures that one sentence was written about.
        group=lambda row: str(row["identifier"]).rpartition("-")[0] if "identifier" in row else None,
    ),
    "mvsa": _labelled(
        "image",
        "text",
        "label",
        inputs={"images": "image", "text": "text"},
        group=lambda row: row.get("id"),
        unimodal={"images": "image_label", "text": "text_label"},
    ),
    "mosi": _labelled(
        *_UTTERANCE_COLUMNS,
        "label",
        **_UTTERANCES,
        label=lambda row: "positive" if row["label"] else "negative",
    ),
    "mosi_scores": Adapter(
        "sentiment",
        (*_UTTERANCE_COLUMNS, "score"),
        target=lambda row: {key: row.get(key) for key in ("score", "label")},
        **_UTTERANCES,
    ),
    # Kinetics-Sounds and its like, and clips that may be beside the sound of others.
    "labelled_clips_with_sound": _labelled(
        "video",
        "audio",
        "label",
        inputs={"videos": "video", "audio": "audio"},
        images=(),
        sounds=("audio",),
        clips=("video",),
        group=lambda row: row.get("id"),
    ),
    "labelled_clips": _labelled(
        "video", "label", inputs={"videos": "video"}, images=(), clips=("video",), group=lambda row: row.get("id")
    ),
    # MOSEI as text and sound.
    "mosei_sounds": Adapter(
        "sentiment",
        ("video", "start_time", "text", "audio", "sentiment"),
        {"text": "text", "audio": "audio"},
        lambda row: {"score": row["sentiment"], "label": None},
        images=(),
        sounds=("audio",),
        group=lambda row: row["video"],
        recording=lambda row: row["video"],
        place=lambda row: row["start_time"],
    ),
    "sounds_and_images_of_a_class": _labelled(
        "audio",
        "image",
        "class",
        inputs={"audio": "audio", "images": "image"},
        sounds=("audio",),
        group=lambda row: None,
    ),
    "spoken_digits": _labelled(
        "audio", "digit", inputs={"audio": "audio"}, images=(), sounds=("audio",), group=lambda row: None
    ),
    "labelled_sounds": _labelled(
        "audio", "label", inputs={"audio": "audio"}, images=(), sounds=("audio",), group=lambda row: None
    ),
    "labelled_digits": _labelled("image", "digit", inputs={"images": "image"}),
    "labelled_images": _labelled("image", "label", inputs={"images": "image"}),
    "labelled_texts": _labelled("text", "label", inputs={"text": "text"}, images=(), group=lambda row: None),
    # EEG, cut into windows by `cut_recordings`.
    "eeg": _labelled(
        "signal",
        "sampling_rate",
        "recording",
        "state",
        inputs={"eeg": "signal"},
        images=(),
        vectors=("signal",),
        group=lambda row: row["recording"],
        recording=lambda row: row["recording"],
        place=lambda row: row["window"],
        subject=lambda row: row["subject"],
    ),
    "scored_texts": Adapter(
        "regression",
        ("text", "score"),
        {"text": "text"},
        lambda row: row["score"],
        images=(),
        group=lambda row: None,
    ),
    "fashion_titles": _pairs("image", "title"),
    # Several texts per image: COCO (Karpathy) and Flickr30K as they are on the Hub.
    "captions": _pairs("image", "captions", items=_first_five),
    "caption": _pairs("image", "caption", items=_first_five),
    "sentences": _pairs("image", "sentences", items=_first_five),
    "sentences_raw": _pairs("image", "sentences_raw", items=_first_five),
    "emoji": _pairs("image", "name", "keywords"),
    "titles_to_write": _captions("image", "title"),
    "captions_to_write": _captions("image", "captions"),
    "caption_to_write": _captions("image", "caption"),
    "sentences_to_write": _captions("image", "sentences"),
    "sentences_raw_to_write": _captions("image", "sentences_raw"),
    "vqa_v2_to_write": _answers("image", "question", "answers"),
    "answers_to_write": _answers("image", "question", "answer"),
    # A picture and a conversation about it, as chat models are trained: each turn of the assistant is learnt.
    "messages": Adapter(
        "dialogue",
        ("image", "messages"),
        {"images": "image", "text": "messages"},
        _said,
        several="messages",
        items=_turns,
        take=lambda messages, item: messages[:item],
    ),
    # Of two datasets (see `load_rows`): whatever is of one class belongs together.
    "sounds_and_clips": Adapter(
        "retrieval",
        ("audio", "video", "class"),
        {"audio": "audio", "videos": "video"},
        lambda row: {"id": None, "keys": [("class", row["class"])]},
        images=(),
        sounds=("audio",),
        clips=("video",),
        group=lambda row: None,
    ),
    "sounds_and_images": Adapter(
        "retrieval",
        ("audio", "image", "class"),
        {"audio": "audio", "images": "image"},
        lambda row: {"id": None, "keys": [("class", row["class"])]},
        sounds=("audio",),
        group=lambda row: None,
    ),
    # A mesh of ScanNet v2: its vertices with colours, the NYU40 number of each (`_vh_clean_2.labels.ply`), its segment
    # (`_vh_clean_2.0.010000.segs.json`), and frames of its `.sens` file.
    "scannet": _point_labels(
        "scene_id",
        "points",
        "colors",
        "segments",
        "images",
        classes={int(number): name for number, _, name in (item.partition(" ") for item in _SCANNET.split(", "))},
        inputs={"images": "images"},
        images=("images",),
        # scene0000_00 and scene0000_01 are two scans of a room.
        group=lambda row: row["scene_id"].rpartition("_")[0],
    ),
    # A room of S3DIS, with the class of each point as a number from 0 to 12, in the order in which the authors list them.
    "s3dis": _point_labels(
        "area",
        "room",
        "points",
        "colors",
        classes=dict(enumerate(_S3DIS.split())),
        group=lambda row: (row["area"], row["room"]),
        subject=lambda row: row["area"],
    ),
    "drawn_rooms": _point_labels(
        "room",
        "points",
        "uv",
        "views",
        classes=dict(enumerate(ROOM_CLASSES)),
        inputs={"images": "views"},
        images=("views",),
        group=lambda row: row["room"],
    ),
    # Points of a laser scanner on a car, and what its camera saw; 0 is unlabelled.
    "driving_points": _point_labels(
        "image",
        "points",
        "uv",
        classes=dict(enumerate(_DRIVING.split(), 1)),
        inputs={"images": "image"},
        images=("image",),
        recording=lambda row: row["id"].rpartition("_")[0],
        place=lambda row: int(row["id"].rpartition("_")[2]),
    ),
    "facts": Adapter(
        "vqa",
        ("image", "question", "facts"),
        {"images": "image", "text": "question"},
        lambda row: dict.fromkeys(row["facts"], 1.0),
    ),
}


def find_adapter(columns, task):
    """Name of the adapter of a task whose columns a dataset has. Raises ValueError naming what is missing."""
    candidates = {name: adapter for name, adapter in DATASETS.items() if adapter.task == task}
    for name, adapter in candidates.items():
        if set(adapter.columns) <= set(columns):
            return name
    wanted = min(candidates, key=lambda name: len(set(candidates[name].columns) - set(columns)))
    missing = sorted(set(candidates[wanted].columns) - set(columns))
    schemas = "; ".join(f"{name}: {', '.join(adapter.columns)}" for name, adapter in candidates.items())
    raise ValueError(
        f"no column {' and no column '.join(map(repr, missing))} in the dataset; it has {sorted(columns)}. Schemas for "
        f"task {task!r}: {schemas}. Rename its columns, or add an adapter to DATASETS in training/schemas.py."
    )
