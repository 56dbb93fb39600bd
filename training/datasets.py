"""Rows of real datasets to samples: an adapter per schema, matched on columns and never on a path."""

import copy
import difflib
import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import ImageOps
from torch.utils.data import Dataset, Sampler

from ..processing.reading_crossmodal import read_image, read_sound
from .layouts import find_layout, read_layout
from .rooms import ROOM_CLASSES, rooms_dataset


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
    return Adapter("classification", columns, target=label or (lambda row: _label(row[columns[-1]])), **options)


def _label(value):
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
        f"task {task!r}: {schemas}. Rename its columns, or add an adapter to DATASETS in training/datasets.py."
    )


def _drawn_shapes(split, rows):
    from .shapes import QUESTIONS_PER_IMAGE, shapes_dataset

    return shapes_dataset(-(-rows // QUESTIONS_PER_IMAGE), split)


def _drawn_simple_shapes(split, rows):
    from .shapes import SIMPLE_KINDS, shapes_dataset

    return shapes_dataset(-(-rows // len(SIMPLE_KINDS)), split, kinds=SIMPLE_KINDS, different=True)


def _drawn_shape_facts(split, rows):
    from .shapes import facts_dataset

    return facts_dataset(rows, split)


def _drawn_shape_dialogues(split, rows):
    from .shapes import dialogues_dataset

    return dialogues_dataset(rows, split)


def _drawn_shape_turns(split, rows):
    from .shapes import DIALOGUE_TURNS, dialogues_dataset

    return dialogues_dataset(-(-rows // DIALOGUE_TURNS), split, apart=True)


def _drawn_boxes(split, rows):
    from .boxes import boxes_dataset

    return boxes_dataset(rows, split)


def _drawn_box_facts(split, rows):
    from .boxes import facts_dataset

    return facts_dataset(rows, split)


def _drawn_room(split, rows):
    return rooms_dataset(rows, split)


# Worlds that the project draws itself: name to (split, number of rows) -> rows.
DRAWN = {
    "drawn:shapes": _drawn_shapes,
    "drawn:simple_shapes": _drawn_simple_shapes,
    "drawn:shape_facts": _drawn_shape_facts,
    "drawn:shape_turns": _drawn_shape_turns,
    "drawn:shape_dialogues": _drawn_shape_dialogues,
    "drawn:boxes": _drawn_boxes,
    "drawn:box_facts": _drawn_box_facts,
    "drawn:room": _drawn_room,
}
_DRAWN_ROWS = 12_000


def load_rows(source, split, limit=None):
    """One split of a dataset: a Hub id, a folder or a file that `datasets.load_dataset` reads, or a world of `DRAWN`.

    A folder may hold the files that the authors of a dataset publish (see layouts.py). `A by COLUMN >= NUMBER` (or `>`) makes
    labels `high` and `low` of a rating, in the column `state`.

    `A + B on COLUMN` joins two of these: every row of A with a row of B of the same class in COLUMN, drawn once and for all,
    and the class in the column `class`. `clips of A + B on COLUMN` makes clips of the sounds of A and the pictures of B (see
    clips.py); `matching clips of ...`, half of them beside the sound of others, with `label` "same" or "different".

    Where all rows lie in one split, and a column `split` tells more (Flickr30K on the Hub), that column decides.

    Splits that are joined by + (`train+validation`) follow one another. A single file (.parquet, .jsonl, .json, .csv) is taken
    as the split that is asked for. `limit` says how many rows of a drawn world are drawn.

    Raises:
        ValueError: if there is no such dataset or split, naming those there are.
    """
    import datasets

    if "+" in split:
        return datasets.concatenate_datasets([load_rows(source, part.strip(), limit) for part in split.split("+")])
    if made := re.fullmatch(r"(matching )?clips of (.+?) \+ (.+?) on (\w+)", source):
        from .clips import clips_dataset

        matching, first, second, column = made.groups()
        return clips_dataset(load_rows(first, split), load_rows(second, split), column, split, bool(matching), limit)
    if joined := re.fullmatch(r"(.+?) \+ (.+?) on (\w+)", source):
        first, second, column = joined.groups()
        return join_rows(load_rows(first, split, limit), load_rows(second, split, limit), column)
    if rated := re.fullmatch(r"(.+) by (\w+) (>=|>) (-?[\d.]+)", source):
        inner, column, comparison, number = rated.groups()
        return high_or_low(load_rows(inner, split, limit), column, float(number), comparison == ">=")
    if source in DRAWN:
        return DRAWN[source](split, limit or _DRAWN_ROWS)

    def read(name, given, **options):
        return datasets.load_dataset(name, split=given, **options)

    return load_source(source, split, read, by_column=True)


_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tar": "webdataset"}


def load_source(source, split, read, by_column=False):
    """What `read(name, split, data_files=...)` makes of a split of a Hub id, a folder or a file.

    Args:
        by_column: where all lies in one split, a column `split` may tell more.

    Raises:
        ValueError: if there is no such dataset or split, naming those there are.
    """
    import datasets
    from datasets.inspect import SplitsNotFoundError

    path = Path(source)
    try:
        if path.is_file():
            if path.suffix not in _READERS:
                raise ValueError(f"the file {source!r} is none of {', '.join(_READERS)}. Convert it to one of these.")
            return read(_READERS[path.suffix], split, data_files={split: str(path)})
        if path.is_dir() and not any(p.is_file() for p in path.rglob("*")):
            raise ValueError(f"the folder {source!r} is empty. Expected parquet, jsonl, csv, tar or image files.")
        if by_column and path.is_dir() and (found := find_layout(path)):
            return read_layout(found[0], path, found[1], split)
        if not path.exists() and (
            path.suffix in _READERS or source.startswith((".", "/", "~")) or source.count("/") > 1
        ):
            raise ValueError(f"the dataset {source!r} does not exist. Give a folder, a file or a Hub id.")
        splits = datasets.get_dataset_split_names(source)
        if by_column and len(splits) == 1:
            rows = _by_column(read(source, splits[0]), split)
            if rows is not None:
                return rows
        split = next((name for name in _SPLIT_VALUES.get(split, ()) if name in splits), split)
        if split not in splits:
            near = sorted(splits, key=lambda s: -difflib.SequenceMatcher(None, split, s).ratio())
            raise ValueError(f"the dataset {source!r} has no split {split!r}. It has: {', '.join(near)}.")
        return read(source, split)
    except FileNotFoundError as error:
        raise ValueError(
            f"the dataset {source!r} is neither a folder or file here nor a dataset of the Hub. Correct the name; for a "
            "private one log in with `hf auth login`."
        ) from error
    except (ConnectionError, datasets.exceptions.DatasetGenerationError, SplitsNotFoundError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"the dataset {source!r} cannot be read: {str(cause).splitlines()[0]}") from error


# What a column `split` calls them. Karpathy's `restval` of COCO is trained on.
_SPLIT_VALUES = {"train": ("train", "restval"), "validation": ("validation", "val", "valid", "dev")}


def _by_column(rows, split):
    """Rows of a split that a column `split` tells, as in Karpathy's COCO and Flickr30K on the Hub; None if it tells none."""
    if "split" not in rows.column_names:
        return None
    values = _SPLIT_VALUES.get(split, (split,))
    chosen = [row for row, value in enumerate(rows["split"]) if value in values]
    return rows.select(chosen) if chosen else None


def high_or_low(rows, column, number, inclusive=True):
    """Rows with a label in the column `state`: `high` where a rating reaches `number` (not `inclusive`: is above it), else `low`.

    Raises:
        ValueError: for a column that is not there, or a row without a rating.
    """
    if column not in rows.column_names:
        raise ValueError(f"no column {column!r} to make labels of; the dataset has {sorted(rows.column_names)}.")
    ratings = rows[column][:]
    for row, rating in enumerate(ratings):
        if not isinstance(rating, int | float) or not np.isfinite(rating):
            raise ValueError(f"row {row} has the rating {rating!r} in {column!r}. Expected a number in every row.")
    states = ["high" if rating > number or (inclusive and rating == number) else "low" for rating in ratings]
    return rows.remove_columns([name for name in ("state",) if name in rows.column_names]).add_column("state", states)


def join_rows(first, second, column):
    """Rows of `first`, each with the columns of a row of `second` that has the same value in `column`; that value is in the
    column `class` then.

    Raises:
        ValueError: if one lacks the column, or the second a class of the first.
    """
    import datasets

    for name, rows in (("first", first), ("second", second)):
        if column not in rows.column_names:
            raise ValueError(
                f"no column {column!r} in the {name} dataset to join on; it has {sorted(rows.column_names)}."
            )
    places, draw = {}, random.Random(0)
    for place, value in enumerate(second[column]):
        places.setdefault(value, []).append(place)
    if missing := set(first[column]) - set(places):
        raise ValueError(f"the second dataset has no row with {column}={sorted(missing)[0]!r}, and the first has.")
    partners = second.select([draw.choice(places[value]) for value in first[column]])
    own = first.rename_column(column, "class")
    partners = partners.remove_columns([name for name in partners.column_names if name in (column, *own.column_names)])
    return datasets.concatenate_datasets([own, partners], axis=1)


def cut_recordings(rows, entries):
    """Rows of whole recordings to rows of windows, where an entry or the settings of a modality say `window: [seconds, step]`.

    rows with `signal_values` (samples x `channels`, flattened) or `signal` (channels, samples), and `sampling_rate`, in Hz; all else is
    kept. A row of the result has `signal` (channels, samples), and `recording`, the number or name of what it was cut from, and
    `window`, its place in it. Rows that are windows already, and models that take recordings whole, are left as they are.

    Raises:
        ValueError: for a recording that is shorter than a window, or has no sampling rate.
    """
    import datasets

    signals = [name for name in ("signal_values", "signal") if name in rows.column_names]
    if not signals or "window" in rows.column_names:
        return rows
    windows = [tuple(entry["window"]) for entry in entries.values() if entry.get("window")]
    seconds, step = windows[0] if windows else (None, None)
    made = []
    for number, row in enumerate(rows):
        rate, signal = row.get("sampling_rate"), np.asarray(row.pop(signals[0]), dtype=np.float32)
        if not rate:
            raise ValueError(
                f"row {number}: sampling_rate={rate!r}. Expected Hz: what is a second of this signal is not known."
            )
        if signals[0] == "signal_values":
            signal = signal.reshape(-1, row.pop("channels")).T
        width = signal.shape[1] if seconds is None else int(round(seconds * rate))
        if signal.shape[1] < width:
            raise ValueError(
                f"row {number}: a recording of {signal.shape[1] / rate:.2f} seconds, and a window takes {seconds}. Leave it out, or give "
                "the entry a shorter window."
            )
        starts = range(0, signal.shape[1] - width + 1, width if step is None else int(round(step * rate)))
        recording = row.get("recording", number)
        made += [
            row | {"signal": signal[:, start : start + width], "recording": recording, "window": window}
            for window, start in enumerate(starts)
        ]
    return datasets.Dataset.from_list(made)


def contexts_of(entries):
    """{modality: neighbours on each side} of entries or settings of modalities: see `RowDataset`."""
    return {name: entry["context"] for name, entry in entries.items() if entry.get("context")}


def some_of(rows, limit, seed):
    """`limit` of the rows, drawn with the seed; all of them if there are no more, or limit is None."""
    return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=seed).select(range(limit))


def hold_out(rows, task, part, by="group"):
    """(rows to train on, rows held out to choose by), the same whatever the seed: whole groups of the adapter, or, by "time", the last
    part of each recording."""
    adapter = DATASETS[find_adapter(rows.column_names, task)]
    if by == "time" and adapter.recording is None:
        raise ValueError(
            f"holdout_by='time' needs rows that are parts of recordings, and those of task {task!r} here are not."
        )
    kept, held, recordings = [], [], {}
    for index, row in enumerate(adapter.without_files(rows)):
        if by == "time":
            recordings.setdefault(adapter.recording(row), []).append((adapter.place(row), index))
            continue
        group = adapter.group(row)
        group = index if group is None else group
        drawn = int.from_bytes(hashlib.sha256(str(group).encode()).digest()[:8], "big") / 2**64
        (held if drawn < part else kept).append(index)
    for places in recordings.values():
        order = [index for _, index in sorted(places)]
        first = len(order) - round(part * len(order))
        kept, held = kept + order[:first], held + order[first:]
    if not kept or not held:
        raise ValueError(
            f"holdout={part} of {len(rows):,} rows leaves {len(kept):,} to train on and {len(held):,} to choose by. Give "
            "more rows or another part."
        )
    return rows.select(kept), rows.select(held)


class BrokenSample(ValueError):
    """A sample whose data cannot be read, as opposed to a fault of the code that reads it. where: which one it is."""

    # An error that comes out of a worker is made anew of its message alone.
    def __init__(self, where, reason=None):
        super().__init__(where if reason is None else f"{where}, {reason}")
        self.where = where


def read_samples(dataset, items):
    """(samples of a dataset, `BrokenSample`s among them). These are raised where the dataset does not say `skip_broken`."""
    samples, broken = [], []
    for item in items:
        try:
            samples.append(dataset[item])
        except BrokenSample as error:
            if not getattr(dataset, "skip_broken", False):
                raise
            broken.append(error)
    return samples, broken


class SampleReader(Dataset):
    """How rows of one schema are decoded and augmented, wherever they lie.

    Args:
        columns: of the rows.
        task: name of the task, which the adapter is looked up for.
        augment: name of an augmentation of `AUGMENTATIONS`, for training.
        skip_broken: a sample that cannot be read may be left out of its batch (see `read_samples`).
    """

    def __init__(self, columns, task, augment=None, skip_broken=False):
        self.adapter_name = find_adapter(columns, task)
        self.adapter = DATASETS[self.adapter_name]
        if augment is not None and augment not in AUGMENTATIONS:
            near = sorted(AUGMENTATIONS, key=lambda n: -difflib.SequenceMatcher(None, augment, n).ratio())
            raise ValueError(f"augment={augment!r} is unknown. Expected one of {near}.")
        self.augmentation = AUGMENTATIONS[augment] if augment else None
        self.skip_broken = skip_broken

    def undecoded(self, rows):
        """Rows whose images and sounds come as `{"bytes", "path"}`: decoded here, a broken one is named with its row."""
        import datasets

        for column in self.adapter.images:
            # Decoded here, so that a broken image is named with its row.
            encoded = datasets.Image(decode=False)
            several = hasattr((rows.features or {}).get(column), "feature")
            rows = rows.cast_column(column, datasets.List(encoded) if several else encoded)
        for column in self.adapter.sounds:
            rows = rows.cast_column(column, datasets.Audio(decode=False))
        for column in self.adapter.clips:
            kind = (rows.features or {}).get(column)
            if isinstance(kind, datasets.Video):
                rows = rows.cast_column(column, datasets.Video(decode=False))
            elif isinstance(getattr(kind, "feature", None), datasets.Image):
                rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
        return rows

    def _target(self, row, item, place):
        """place: of the row among all, which names its image where no column does."""
        several = self.adapter.several
        target = self.adapter.target(
            row if item is None else row | {several: row[several][item], f"{several}_all": row[several]}
        )
        if self.adapter.task == "retrieval" and ("image", None) in target["keys"]:
            keys = [("image", f"row {place}") if key == ("image", None) else key for key in target["keys"]]
            return target | {"id": f"row {place}", "keys": keys}
        return target

    def _targets_of(self, row, target):
        """What a sample says of its targets: that of the row, and, where there are columns of them, those of its inputs alone."""
        own = {key: row[column] for key, column in (self.adapter.unimodal or {}).items() if column in row}
        if not own:
            return {"target": target}
        labels = {key: None if value is None else _label(value) for key, value in own.items()}
        return {"target": target, "unimodal_targets": labels}

    def _items_of(self, row):
        """Items of the column `several` that make a sample of their own, or None where there is no list."""
        value = row[self.adapter.several] if self.adapter.several is not None else None
        return list(self.adapter.items(value)) if isinstance(value, list) else [None]

    def _augmented(self, sample):
        if self.augmentation and sample.get(self.augmentation.input) is not None:
            sample[self.augmentation.input] = random.choice(self.augmentation.variants)(
                sample[self.augmentation.input]
            )
        return sample

    def _item(self, value, column, item):
        value = self.adapter.take(value, item) if item is not None and column == self.adapter.several else value
        # A sentence of COCO comes with its tokens.
        return value["raw"] if isinstance(value, dict) and "raw" in value else value

    def _read(self, row, item, key, where):
        """One input of a row, decoded. Raises BrokenSample with `where`."""
        column = self.adapter.inputs[key]
        if key == "points" and self.adapter.points is not None:
            return self.adapter.points(row)
        if column in self.adapter.vectors:
            if row[column] is None:
                return None
            values = np.asarray(row[column], dtype=np.float32)
            if not np.isfinite(values).all():
                raise BrokenSample(where, f"column {column!r}: NaN or infinity. Correct or remove the row.")
            if column == "signal":
                return {"array": values, "sampling_rate": row["sampling_rate"]}
            return values[None] if values.ndim == 1 else values
        if column not in self.adapter.files or row[column] is None:
            return self._item(row[column], column, item)
        read = read_sound if column in self.adapter.sounds else _read_once
        try:
            if column in self.adapter.clips:
                return _read_clip(row[column])
            if isinstance(row[column], list):
                return [read(item.get("bytes") or item.get("path")) for item in row[column]]
            return read(row[column].get("bytes") or row[column].get("path"))
        except ValueError as error:
            if isinstance(error.__cause__, ImportError):
                raise
            raise BrokenSample(where, f"column {column!r}: {error}") from error

    def _length(self, row, item):
        """How long a sample is: steps of its longest sequence of features, or else characters of its texts."""
        sequences = [row[column] for column in self.adapter.vectors if row[column] is not None]
        if sequences:
            return max(map(len, sequences))
        columns = {*self.adapter.inputs.values(), self.adapter.several} - {*self.adapter.files, None}
        # Turns of a dialogue are a list.
        return sum(len(str(self._item(row[column], column, item))) for column in columns)


class RowDataset(SampleReader):
    """Samples of a split: `{input of the processor: raw value, ..., "target": what the task learns from, "row": n}`.

    Args:
        rows: a `datasets.Dataset`.
        task, augment, skip_broken: see `SampleReader`.
        contexts: {input: K}: of that sequence of features a sample also holds the K rows before and behind it in its recording, as
            `{"array": (2K+1,F), "mask": (2K+1,)}`, 0 in the mask beyond the ends. No other recording is looked at.
    """

    def __init__(self, rows, task, augment=None, contexts=None, skip_broken=False):
        super().__init__(rows.column_names, task, augment, skip_broken)
        rows = self.undecoded(rows)
        self.rows = rows
        self.contexts = {key: size for key, size in (contexts or {}).items() if size}
        if self.contexts:
            self._read_recordings(plain_rows=self.adapter.without_files(rows))
        # (row, item of the list in the column `several`, or None) of every sample.
        self.places = [(row, None) for row in range(len(rows))]
        several, plain = self.adapter.several, self.adapter.without_files(rows)
        if several is not None:
            self.places = [
                (row, item)
                for row, values in enumerate(plain.select_columns([several]))
                for item in self._items_of(values)
            ]
        # Rows about the same image, which are cheaper in one batch.
        images = rows["image_id"] if "image_id" in rows.column_names else None
        self.groups = None if images is None else [images[row] for row, _ in self.places]
        self.targets = [self._target(plain[row], item, row) for row, item in self.places]

    def _read_recordings(self, plain_rows):
        """Recordings as rows in order, and which place in which each row has; what their features are."""
        if self.adapter.recording is None:
            raise ValueError(
                f"context={max(self.contexts.values())} needs rows that are parts of a recording, and those of schema "
                f"{self.adapter_name!r} are not. Leave it out, or use data with `video` and `segment`."
            )
        self.neighbours, where = {}, {}
        for row, values in enumerate(plain_rows):
            where.setdefault(self.adapter.recording(values), []).append((self.adapter.place(values), row))
        for parts in where.values():
            order = [row for _, row in sorted(parts)]
            self.neighbours |= {row: (order, place) for place, row in enumerate(order)}
        columns = {key: self.adapter.inputs.get(key) for key in self.contexts}
        if wrong := [key for key, column in columns.items() if column not in self.adapter.vectors]:
            raise ValueError(
                f"context of {wrong[0]!r}, which is no sequence of features of schema {self.adapter_name!r}: "
                f"{[key for key, column in self.adapter.inputs.items() if column in self.adapter.vectors]} are."
            )
        # Read at once: a row is looked at by all that it is beside.
        self.features = {
            key: [None if values is None else np.asarray(values, dtype=np.float32) for values in self.rows[column]]
            for key, column in columns.items()
        }

    def _in_context(self, row, key):
        (order, place), size = self.neighbours[row], self.contexts[key]
        own = self.features[key]
        width = len(own[row]) if own[row] is not None else 0
        array, mask = np.zeros((2 * size + 1, width), dtype=np.float32), np.zeros(2 * size + 1, dtype=bool)
        for step, other in enumerate(range(place - size, place + size + 1)):
            if 0 <= other < len(order) and own[order[other]] is not None:
                array[step], mask[step] = own[order[other]], True
        return {"array": array, "mask": mask}

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        return self.sample(index)

    def sample(self, index, leave_out=()):
        """A sample without the inputs named in `leave_out`, which are then not decoded either."""
        row = self.rows[self.places[index][0]]
        sample = {key: self._read_at(index, row, key) for key in self.adapter.inputs if key not in leave_out}
        return self._augmented(sample) | self._targets_of(row, self.targets[index]) | {"row": index}

    def lengths(self):
        """Of every sample, by which those of like length are put into one batch."""
        plain = self.rows.remove_columns([*self.adapter.images, *self.adapter.sounds])
        found = {}
        for row, values in enumerate(plain):
            for item in self._items_of(values):
                found[row, item] = self._length(values, item)
        return [found[place] for place in self.places]

    def raw_column(self, key):
        """Iterates over the values of an input as they are stored: images and sounds as `{"bytes", "path"}`."""
        column = self.adapter.inputs.get(key)
        if column is None:
            return iter([None] * len(self))
        values = self.rows.select_columns([column])
        return (self._item(values[row][column], column, item) for row, item in self.places)

    def variants_of(self, key):
        """What an input may become in training: functions of its value, the first of which changes nothing."""
        augmented = self.augmentation is not None and self.augmentation.input == key
        return self.augmentation.variants if augmented else (lambda value: value,)

    def input_of(self, index, key, variant=0):
        """One input of a row, decoded, in one of its variants."""
        return self.variants_of(key)[variant](self._read_at(index, self.rows[self.places[index][0]], key))

    def _read_at(self, index, row, key):
        place, item = self.places[index]
        if key in self.contexts and row[self.adapter.inputs[key]] is not None:
            return self._in_context(place, key)
        return self._read(row, item, key, self._name_of(place))

    def unaugmented(self):
        """The same samples as they are."""
        plain = copy.copy(self)
        plain.augmentation = None
        return plain

    @staticmethod
    def _name_of(row):
        return f"row {row} of the dataset"

    def without(self, names):
        """The same samples but those of the rows that `BrokenSample`s name."""
        kept = [index for index, (row, _) in enumerate(self.places) if self._name_of(row) not in names]
        part = copy.copy(self)
        part.places, part.targets = ([values[index] for index in kept] for values in (self.places, self.targets))
        part.groups = None if self.groups is None else [self.groups[index] for index in kept]
        return part


def _read_clip(value):
    """Frames of a list of images; a file, as its path or bytes, is left to the processor, which knows how many frames it wants."""
    if isinstance(value, list):
        return [read_image(frame, f"frame {number}") for number, frame in enumerate(value)]
    return (value.get("path") or value.get("bytes")) if isinstance(value, dict) else value


@lru_cache(maxsize=64)
def _read_once(source):
    """An image from its bytes or path. Rows that follow one another and share an image get the same object."""
    return read_image(source)


class GroupedSampler(Sampler):
    """Random order in which up to `rows_per_group` rows of a group stay together.

    Args:
        groups: group of every row, such as the id of its image.
        seed: with the epoch (`set_epoch`), of the order.
    """

    def __init__(self, groups, rows_per_group, seed=0):
        members = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        self.members, self.rows_per_group = list(members.values()), rows_per_group
        self.seed, self.epoch, self.length = seed, 0, len(groups)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        order, chunks = random.Random(f"{self.seed}-{self.epoch}"), []
        for rows in self.members:
            rows = order.sample(rows, len(rows))
            chunks += [rows[i : i + self.rows_per_group] for i in range(0, len(rows), self.rows_per_group)]
        order.shuffle(chunks)
        return iter([row for chunk in chunks for row in chunk])


def _permuted(image, order):
    """The boxes of an image, side by side with equal gaps, in another order."""
    (width, height), boxes = image.size, len(order)
    gap = (width - boxes * height) // (boxes - 1)
    if gap < 0 or width != boxes * height + (boxes - 1) * gap:
        raise ValueError(f"permute_boxes: an image of {width} x {height} pixels does not hold {boxes} square boxes.")
    step = height + gap
    permuted = image.copy()
    for place, source in enumerate(order):
        permuted.paste(image.crop((source * step, 0, source * step + height, height)), (place * step, 0))
    return permuted


def _unchanged(image):
    return image


@dataclass(frozen=True)
class Augmentation:
    """What an input of a training sample may look like as well.

    Args:
        input: of the processor.
        variants: functions from its value to another one, of which one is drawn for every sample; the first leaves it as
            it is. They are finite on purpose: the tokens of all of them can be computed once.
    """

    input: str
    variants: tuple[Callable, ...]


AUGMENTATIONS = {
    # Whatever is neither written nor told by its side.
    "mirror": Augmentation("images", (_unchanged, ImageOps.mirror)),
    # NLVR's own: a sentence about the three boxes as a set stays as true as it was.
    "permute_boxes": Augmentation("images", tuple(partial(_permuted, order=o) for o in permutations(range(3)))),
}
