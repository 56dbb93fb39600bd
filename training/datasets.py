"""Rows of datasets to samples."""

import copy
import difflib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler

from ..processing.reading_crossmodal import evenly, read_image, read_sound, read_video
from .schemas import DATASETS, find_adapter, label_name


class BrokenSample(ValueError):
    """A sample whose data cannot be read, as opposed to a fault of the code that reads it. where: which one it is."""

    # An error that comes out of a worker is made anew of its message alone.
    def __init__(self, where, reason=None):
        super().__init__(where if reason is None else f"{where}, {reason}")
        self.where = where


def _no_numbers(where, column):
    return BrokenSample(where, f"column {column!r}: NaN or infinity. Correct or remove the row.")


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
        labels = {key: None if value is None else label_name(value) for key, value in own.items()}
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
                raise _no_numbers(where, column)
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
            `{"array": (2K+1,F), "mask": (2K+1,)}`, 0 in the mask beyond the ends. No other recording is looked at. With `skip_broken`
            the mask is 0 too at neighbours whose features are no numbers.

    Raises:
        BrokenSample: for features with context that are no numbers, unless `skip_broken`: then where a sample is such a row itself.
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
        for key, column in columns.items():
            for row, values in enumerate(self.features[key]):
                if values is None or np.isfinite(values).all():
                    continue
                if not self.skip_broken:
                    raise _no_numbers(self._name_of(row), column)
                # No neighbour sees it.
                self.features[key][row] = None

    def _in_context(self, row, key):
        (order, place), size = self.neighbours[row], self.contexts[key]
        own = self.features[key]
        if own[row] is None:
            raise _no_numbers(self._name_of(row), self.adapter.inputs[key])
        array, mask = np.zeros((2 * size + 1, len(own[row])), dtype=np.float32), np.zeros(2 * size + 1, dtype=bool)
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

    def contents(self, key):
        """Iterates over all that an input is made of, as it is stored: `raw_column`, or a dict of the columns where it has several."""
        column = self.adapter.inputs.get(key)
        if key == "points" and self.adapter.points is not None:
            parts = self.adapter.vectors
        elif column == "signal":
            parts = (column, "sampling_rate")
        else:
            return self.raw_column(key)
        rows = self.rows.select_columns([part for part in parts if part in self.rows.column_names])
        stored = ({part: value for part, value in rows[row].items() if value is not None} for row, _ in self.places)
        return (values if column in values else None for values in stored)

    def variants_of(self, key):
        """What an input may become in training: functions of its value, the first of which changes nothing."""
        augmented = self.augmentation is not None and self.augmentation.input == key
        return self.augmentation.variants if augmented else (lambda value: value,)

    def input_of(self, index, key, variant=0):
        """One input of a row, decoded, in one of its variants."""
        return self.variants_of(key)[variant](self._read_at(index, self.rows[self.places[index][0]], key))

    def picture_of(self, index):
        """The image of a row, or frames of its video from beginning to end, side by side.

        Raises:
            ValueError: if it has neither.
        """
        if "images" in self.adapter.inputs:
            return self.input_of(index, "images")
        if "videos" not in self.adapter.inputs:
            raise ValueError(f"rows of {sorted(self.adapter.inputs)} have no picture to draw. Leave the picture out.")
        frames = self.input_of(index, "videos")
        frames = frames if isinstance(frames, list) else read_video(frames)
        shown = [read_image(frames[place]) for place in evenly(len(frames), min(3, len(frames)))]
        strip = Image.new("RGB", (sum(frame.width for frame in shown), max(frame.height for frame in shown)))
        for number, frame in enumerate(shown):
            strip.paste(frame, (sum(before.width for before in shown[:number]), 0))
        return strip

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
