"""Rows of Hub ids, folders, files and drawn worlds, whole or parted."""

import difflib
import hashlib
import random
import re
from pathlib import Path

import numpy as np

from .layouts import find_layout, read_layout
from .rooms import rooms_dataset
from .schemas import DATASETS, find_adapter


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
