"""Data larger than memory: rows read shard by shard, in an order that is known beforehand and can be taken up at any sample.

`datasets` reads the shards (of the Hub or of a folder: parquet, tars of WebDataset, jsonl, ...). The order is ours, since the shuffle buffer
of an `IterableDataset` is lost when a run is cut off: what lies in a buffer at any moment follows from the seed alone, so that a run
that goes on draws numbers first and opens only those shards whose rows it still needs.
"""

import random
from functools import cached_property
from itertools import accumulate, count, islice, repeat

import fsspec
from torch.utils.data import Sampler

from .datasets import BrokenSample, RowDataset, SampleReader
from .loading import load_source


# Columns of what the files of a WebDataset sample are called by their endings, where they are called otherwise.
_OF_ENDING = {"txt": "caption", "text": "caption", "cls": "label"}
_OF_ENDING |= dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp"), "image")
_OF_ENDING |= dict.fromkeys(("wav", "flac", "ogg", "mp3"), "audio")
# So many different targets are kept in memory; of more, all are read anew when they are asked for.
MOST_TARGETS = 100_000
# Rows by which a stream that nobody counted is judged.
FIRST_ROWS = 10_000
# Rows by which features are standardised.
STATISTICS_ROWS = 2_000
# Batches among which rows of like length are put together, as transformers does.
_LENGTH_BATCHES = 50


def open_stream(source, split, **options):
    """(`datasets.IterableDataset` of a split, its files in the order of the shards). source: see `load_rows`.

    Raises:
        ValueError: if there is no such dataset or split, naming those there are.
    """

    def read(name, given, data_files=None):
        import datasets

        builder = datasets.load_dataset_builder(name, data_files=data_files, **options)
        return builder.as_streaming_dataset(given), builder.config.data_files[given]

    return load_source(source, split, read)


def named_columns(row):
    """A row whose columns are called as everywhere else: of WebDataset, files by what they hold, and the fields of its json apart."""
    if "__key__" not in row:
        return row
    named = {}
    for name, value in row.items():
        if name == "json":
            named |= value
        elif not name.startswith("__"):
            named[_OF_ENDING.get(name, name)] = value
    return named


def read_whole(source, split, limit=None):
    """A `datasets.Dataset` of the first rows of a split (None: all), in memory: for evaluation, without a copy of other splits on disk."""
    import datasets

    rows, _ = open_stream(source, split)
    rows = _undecoded(rows)
    return datasets.Dataset.from_list([named_columns(row) for row in islice(rows, limit)])


def _undecoded(rows):
    """A stream whose images and sounds come as `{"bytes", "path"}`."""
    import datasets

    if rows.features is None:
        raise ValueError(
            "the stream does not say what its columns are, as after `map`. Give `map` its features, or rows as they are."
        )
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            rows = rows.cast_column(column, type(feature)(decode=False))
    return rows


class StreamedRows(SampleReader):
    """Samples of rows that are read one after the other. A `sampler()` gives rows in their order, `dataset[row]` decodes one, wherever
    workers do that. Of a row with several texts, one is drawn each time.

    Args:
        rows: a `datasets.IterableDataset` with as many shards as there are files.
        task, augment, skip_broken: see `SampleReader`.
        buffer_size: rows among which the next one is drawn; so many lie in memory, undecoded.
        sizes: rows of each shard; None: not known, until `count` reads all of it.
        plain: the rows without images and sounds, where they can be read without them.
        names: of the shards.
    """

    def __init__(
        self, rows, task, augment=None, skip_broken=False, buffer_size=1000, sizes=None, plain=None, names=None
    ):
        if buffer_size < 1:
            raise ValueError(f"shuffle_buffer={buffer_size}. Expected a number of rows, 1 (no shuffling) or more.")
        self.rows = _undecoded(rows)
        first = next(iter(self.rows), None)
        if first is None:
            raise ValueError("the stream has no rows.")
        super().__init__(list(named_columns(first)), task, augment, skip_broken)
        self.task, self.buffer_size, self.sizes = task, buffer_size, sizes
        if names is None or len(names) != rows.num_shards:
            names = [f"shard {number}" for number in range(rows.num_shards)]
        self.names = names
        self._plain = self.rows if plain is None else plain
        self.targets = StreamedTargets(self)

    @classmethod
    def load(cls, source, split, task, **options):
        """Of a Hub id, a folder or a file. Rows of parquet are counted by what the files say of themselves."""
        rows, files = open_stream(source, split)
        names = [str(file).rpartition("/")[2] for file in files]
        if not all(name.endswith(".parquet") for name in names) or len(names) != rows.num_shards:
            return cls(rows, task, names=names, **options)
        samples = cls(rows, task, names=names, sizes=list(map(_rows_of, files)), **options)
        heavy = {*samples.adapter.images, *samples.adapter.sounds, *samples.adapter.vectors}
        samples._plain = open_stream(source, split, columns=[c for c in rows.column_names if c not in heavy])[0]
        return samples

    def __len__(self):
        if self.sizes is None:
            raise TypeError("the rows of this stream are not counted yet")
        return sum(self.sizes)

    def count(self):
        """Reads all of it, unless its rows are counted. Returns their number."""
        if self.sizes is None:
            sizes = []
            for shard in range(len(self.names)):
                sizes.append(0)
                for row in self._shard(self._plain, shard):
                    for item in self._items_of(row):
                        self.targets.keep(self._target(row, item, (shard, sizes[shard])))
                    sizes[shard] += 1
            self.sizes, self.targets.whole = sizes, True
        return len(self)

    @staticmethod
    def _shard(rows, shard, start=0):
        rows = rows.shard(num_shards=rows.num_shards, index=shard)
        return map(named_columns, rows.skip(start) if start else rows)

    def plain_rows(self):
        """Iterates over all rows without decoding; over the first of a stream that is not counted."""
        rows = (row for shard in range(len(self.names)) for row in self._shard(self._plain, shard))
        return rows if self.sizes is not None else islice(rows, FIRST_ROWS)

    def plain_samples(self):
        """Iterates over (row, item) of all samples."""
        return ((row, item) for row in self.plain_rows() for item in self._items_of(row))

    def raw_column(self, key):
        """Iterates over the values of an input as they are stored."""
        column = self.adapter.inputs.get(key)
        if column is None or column in self.adapter.files:
            return iter(())
        return (self._item(row[column], column, item) for row, item in self.plain_samples())

    def read_from(self, shards, start):
        """Iterates over rows of shards in the order given, from the row `start` on, with their places: ((shard, row), row)."""
        for shard in shards:
            if self.sizes is not None and start >= self.sizes[shard]:
                start -= self.sizes[shard]
                continue
            for number, row in enumerate(self._shard(self.rows, shard, start), start):
                yield (shard, number), row
            start = 0

    def __getitem__(self, placed):
        (shard, number), row = placed
        items, where = self._items_of(row), f"row {number} of {self.names[shard]}"
        if not items:
            raise BrokenSample(where, f"column {self.adapter.several!r}: nothing to learn in it.")
        item = random.choice(items)
        sample = self._augmented({key: self._read(row, item, key, where) for key in self.adapter.inputs})
        if self.sizes is not None:
            sample["row"] = self._first_of_shards[shard] + number
        return sample | self._targets_of(row, self._target(row, item, (shard, number)))

    @cached_property
    def _first_of_shards(self):
        return [0, *accumulate(self.sizes)]

    def first(self, number, seed=0):
        """A `RowDataset` of the first rows of an epoch, in memory."""
        import datasets

        placed = islice(self.sampler(seed), number)
        rows = datasets.Dataset.from_list([row for _, (_, row), _ in placed])
        return RowDataset(rows, self.task, skip_broken=self.skip_broken)

    def length_of(self, row):
        """See `SampleReader._length`; of a row with several texts, of the first."""
        return self._length(row, next(iter(self._items_of(row)), None))

    def sampler(self, seed=0, rank=0, ranks=1, length_batch=None):
        """The `StreamSampler` of one rank. length_batch: rows of a batch that should be of like length; None: any."""
        return StreamSampler(self, seed, rank, ranks, length_batch)


class StreamedTargets:
    """Targets of a stream, as often as one iterates over them. A few different ones are read once and kept with how often they occur;
    others are read anew each time, and never all in memory."""

    def __init__(self, samples):
        self.samples, self._kept, self.whole = samples, {}, False

    def keep(self, target):
        if len(self._kept) <= MOST_TARGETS:
            self._kept.setdefault(repr(target), [target, 0])[1] += 1

    def __len__(self):
        return sum(1 for _ in self)

    def __iter__(self):
        if self.whole and len(self._kept) <= MOST_TARGETS:
            for target, times in self._kept.values():
                yield from repeat(target, times)
            return
        self._kept = {}
        for place, (row, item) in enumerate(self.samples.plain_samples()):
            target = self.samples._target(row, item, place)
            self.keep(target)
            yield target
        self.whole = True


class StreamSampler(Sampler):
    """The order of a stream for one rank: shards permuted, and rows drawn out of a buffer; another one in each epoch.

    The rows of all shards, in their order of the epoch, are cut into one stretch for each rank: no row is on two ranks, and all
    ranks have as many (fewer than `ranks` rows are left out of an epoch). Of a stream that is not counted, ranks take whole shards and
    go through them without end.

    Args:
        samples: StreamedRows. seed: of all that is drawn, with the epoch.
        rank, ranks: of this process, and how many there are.
        length_batch: rows of a batch that should be of like length: of `_LENGTH_BATCHES` such batches at most (and no more rows than a
            buffer), the longest first.

    Yields:
        (parts of a seed, ((shard, number), row), the same of the row before), as `Batches` takes them; None in place of the first `skip`,
        which are not read.
    """

    def __init__(self, samples, seed=0, rank=0, ranks=1, length_batch=None):
        counted = samples.sizes is not None
        if ranks > (len(samples) if counted else len(samples.names)):
            raise ValueError(
                f"{ranks} ranks and {len(samples) if counted else len(samples.names)} {'rows' if counted else 'shards'}. Write more "
                "shards, or give fewer processes."
            )
        self.samples, self.seed, self.rank, self.ranks = samples, seed, rank, ranks
        self.window = length_batch and max(
            length_batch, min(_LENGTH_BATCHES * length_batch, samples.buffer_size) // length_batch * length_batch
        )
        self.length_batch = length_batch
        self.epoch = self.skip = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.samples) // self.ranks

    def __iter__(self):
        skip, self.skip = self.skip, 0
        epochs = count() if self.samples.sizes is None else [self.epoch]
        # The row before the first that is wanted is read too, and what is skipped in an epoch that is read all the same dropped here.
        rows = (row for epoch in epochs for row in self._in_windows(epoch, max(0, skip - 1)))
        before = None
        for number, row in enumerate(rows):
            yield None if number < skip else ((self.seed, self.epoch, self.rank, number), row, before)
            before = row

    def _in_windows(self, epoch, skip):
        if self.window is None:
            yield from self._rows(epoch, skip)
            return
        draw = random.Random(f"{self.seed}-{epoch}-{self.rank}-lengths")
        rows = self._rows(epoch, skip // self.window * self.window)
        while window := list(islice(rows, self.window)):
            if window[0] is not None:
                window.sort(key=lambda row: -self.samples.length_of(row[1]))
            batches = [window[i : i + self.length_batch] for i in range(0, len(window), self.length_batch)]
            # The longest first: if it does not fit in memory, that shows at once. A batch that is not full comes last.
            full = batches[1:-1] if len(batches[-1]) < self.length_batch else batches[1:]
            rest = batches[1 + len(full) :]
            draw.shuffle(full)
            for batch in (batches[0], *full, *rest):
                yield from batch

    def _rows(self, epoch, skip):
        """Rows of an epoch, None in place of the first `skip` where the order can be told without reading."""
        samples, draw = self.samples, random.Random(f"{self.seed}-{epoch}")
        shards = draw.sample(range(len(samples.names)), len(samples.names))
        counted = samples.sizes is not None
        if counted:
            share = len(self)
            reached, end = self.rank * share, (self.rank + 1) * share
        else:
            shards, reached, end, skip = shards[self.rank :: self.ranks], 0, None, 0
        draw = random.Random(f"{self.seed}-{epoch}-{self.rank}")
        held, rows, reader = [], {}, None
        for number in count():
            # Fill up: numbers of rows alone, until rows are wanted.
            if reader is None and number >= skip:
                oldest, wanted = min(held, default=reached), set(held)
                reader = samples.read_from(shards, oldest)
                known = zip(range(oldest, reached), reader, strict=False)
                rows = {place: row for place, row in known if place in wanted}
            while len(held) < samples.buffer_size and reached != end:
                if reader is not None:
                    row = next(reader, None)
                    if row is None:
                        end = reached
                        break
                    rows[reached] = row
                held.append(reached)
                reached += 1
            if not held:
                if number == 0:
                    raise ValueError(f"no rows in {', '.join(samples.names[shard] for shard in shards)}.")
                return
            chosen = draw.randrange(len(held))
            held[chosen], held[-1] = held[-1], held[chosen]
            place = held.pop()
            yield None if reader is None else rows.pop(place)


def _rows_of(file):
    """Rows of a parquet file, here or on the Hub."""
    import pyarrow.parquet

    with fsspec.open(file) as opened:
        return pyarrow.parquet.ParquetFile(opened).metadata.num_rows


def steps_instead_of_epochs(max_steps):
    """Arguments of TrainingArguments for a stream whose epochs have no end: what is done after each, ten times."""
    every = max(1, max_steps // 10)
    return {"eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every}
