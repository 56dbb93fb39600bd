"""Streams: every row once, in an order that can be taken up anywhere, shared among ranks, with what is broken left out."""

import copy
import io
import json
import tarfile
import tracemalloc
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from crossmodal.training.collator import SampleCollator
from crossmodal.training.datasets import BrokenSample, RowDataset
from crossmodal.training.draws import Batches, SeededSampler, seeded
from crossmodal.training.recipes import Recipe
from crossmodal.training.streaming import StreamedRows, read_whole
from crossmodal.training.tasks import VQATask
from crossmodal.training.train import train
from test_distributed import run_on_two
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from world import COLORS, QUESTIONS, TINY_RECIPE, color_rows, picture, tiny_processor_and_model

from crossmodal import CrossModalTrainer


def shards(folder, sizes, broken=(), split="train", start=0):
    """Parquet files with so many rows each, whose `image_id` numbers all rows; images of `broken` rows do not decode."""
    folder.mkdir(exist_ok=True)
    first, names = start, list(COLORS)
    for number, size in enumerate(sizes):
        rows = range(first, first + size)
        images = [{"bytes": b"no image" if r in broken else _bytes(picture(names[r % 3])), "path": None} for r in rows]
        columns = {"image": images, "image_id": list(rows), "question": [QUESTIONS[r % 2] for r in rows]}
        columns |= {"answer": [names[r % 3] for r in rows]}
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
        table.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}-{number:05d}.parquet")
        first += size
    return str(folder)


def _bytes(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def tars(folder, sizes, with_json=True):
    """The same as tars of WebDataset: an image and a json, or an image and a text, under one name."""
    folder.mkdir(exist_ok=True)
    first, names = 0, list(COLORS)
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{number:05d}.tar", "w") as archive:
            for row in range(first, first + size):
                text = json.dumps({"question": QUESTIONS[row % 2], "answer": names[row % 3], "image_id": row}).encode()
                second = ("json", text) if with_json else ("txt", f"a {names[row % 3]} picture, {row}".encode())
                for ending, content in (("png", _bytes(picture(names[row % 3]))), second):
                    info = tarfile.TarInfo(f"{row:06d}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        first += size
    return str(folder)


def ids(sampler, epoch=0):
    """`image_id` of the rows that a sampler gives in an epoch."""
    sampler.set_epoch(epoch)
    return [row["image_id"] for _, (_, row), _ in sampler]


@pytest.mark.parametrize("write", [shards, tars])
def test_every_row_comes_once_an_epoch_in_another_order_each_time(tmp_path, write):
    stream = StreamedRows.load(write(tmp_path / "data", [7, 1, 12]), "train", "vqa", buffer_size=5)
    assert stream.count() == len(stream) == 20
    orders = [ids(stream.sampler(seed=3), epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3 and orders[0] != sorted(orders[0])
    assert ids(stream.sampler(seed=3), 1) == orders[1] != ids(stream.sampler(seed=4), 1)


def test_a_buffer_of_one_row_keeps_the_order_of_the_files(tmp_path):
    stream = StreamedRows.load(shards(tmp_path / "data", [9]), "train", "vqa", buffer_size=1)
    assert ids(stream.sampler()) == list(range(9))


@pytest.mark.parametrize("length_batch", [None, 4])
def test_an_order_is_taken_up_at_any_row_and_opens_only_the_files_it_needs(tmp_path, length_batch):
    stream = StreamedRows.load(shards(tmp_path / "data", [5] * 30), "train", "vqa", buffer_size=6)
    whole = list(stream.sampler(5, length_batch=length_batch))
    opened, plain = [], stream._shard
    stream._shard = lambda rows, shard, start=0: opened.append(shard) or plain(rows, shard, start)
    for skip in (0, 1, 7, 70, 121, 149, 150):
        opened.clear()
        sampler = stream.sampler(5, length_batch=length_batch)
        sampler.skip = skip
        found = list(sampler)
        assert found[:skip] == [None] * skip and found[skip:] == whole[skip:]
        # A row may stay in the buffer for long.
        assert len(opened) <= 30 - max(0, skip - 50) // 5


@pytest.mark.parametrize("sizes", [[10, 10], [3, 17, 1], [21]])
def test_ranks_share_no_row_and_have_equally_many(tmp_path, sizes):
    stream = StreamedRows.load(shards(tmp_path / "data", sizes), "train", "vqa", buffer_size=4)
    for epoch in range(3):
        parts = [ids(stream.sampler(1, rank, 2), epoch) for rank in range(2)]
        assert len(parts[0]) == len(parts[1]) == sum(sizes) // 2
        assert len({*parts[0], *parts[1]}) == sum(sizes) // 2 * 2


def test_ranks_of_an_uncounted_stream_take_whole_files_and_go_through_them_without_end(tmp_path):
    stream = StreamedRows.load(tars(tmp_path / "data", [3, 4, 5]), "train", "vqa", buffer_size=2)
    with pytest.raises(TypeError, match="not counted"):
        len(stream)
    parts = [[row["image_id"] for _, (_, row), _ in islice(stream.sampler(1, rank, 2), 40)] for rank in range(2)]
    assert all(len(part) == 40 for part in parts)
    # Of the first pass.
    assert not set(parts[0][:3]) & set(parts[1][:3])
    # Skipping reads, and comes to the same rows.
    sampler = stream.sampler(1, 0, 2)
    sampler.skip = 17
    assert [row[1][1]["image_id"] for row in islice(sampler, 17, 40)] == parts[0][17:]
    with pytest.raises(ValueError, match="4 ranks and 3 shards. Write more shards, or give fewer processes."):
        stream.sampler(0, 0, 4)


def test_what_a_task_must_know_is_read_without_images(tmp_path):
    folder = shards(tmp_path / "data", [9, 6], broken=range(15))
    stream, rows = StreamedRows.load(folder, "train", "vqa"), datasets.load_dataset(folder, split="train")
    plain = RowDataset(rows, "vqa")
    assert Counter(stream.targets) == Counter(plain.targets) and len(stream.targets) == 15
    assert VQATask.from_targets(stream.targets).id2label == VQATask.from_targets(plain.targets).id2label
    assert list(stream.raw_column("text")) == list(plain.raw_column("text"))
    assert next(iter(stream._plain)).keys() == {"image_id", "question", "answer"}


def test_targets_of_which_there_are_many_are_not_kept(tmp_path, monkeypatch):
    stream = StreamedRows.load(tars(tmp_path / "data", [6], with_json=False), "train", "captioning")
    monkeypatch.setattr("crossmodal.training.streaming.MOST_TARGETS", 3)
    stream.count()
    assert len(stream.targets._kept) == 4 and len(list(stream.targets)) == 6
    assert {target["text"] for target in stream.targets} == {f"a {list(COLORS)[r % 3]} picture, {r}" for r in range(6)}


def test_samples_are_those_of_rows_in_memory(tmp_path):
    folder = shards(tmp_path / "data", [4, 3])
    stream, plain = (
        StreamedRows.load(folder, "train", "vqa"),
        RowDataset(datasets.load_dataset(folder, split="train"), "vqa"),
    )
    for _, placed, _ in stream.sampler():
        sample, number = stream[placed], placed[1]["image_id"]
        expected = plain[number]
        assert sample["row"] == expected["row"] and sample["target"] == expected["target"]
        assert sample["text"] == expected["text"] and sample["images"].tobytes() == expected["images"].tobytes()


def test_a_row_with_several_texts_gives_another_one_now_and_then(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [picture()] * 2, "captions": [["a", "b", "c"], ["d"]]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "train.parquet")
    for task in ("retrieval", "captioning"):
        stream = StreamedRows.load(str(tmp_path), "train", task)
        found = {row: set() for row in range(2)}
        for place, placed in enumerate(item for _ in range(20) for _, item, _ in stream.sampler()):
            with seeded(place):
                sample = stream[placed]
            found[sample["row"]].add(sample["text"] if task == "retrieval" else sample["target"]["text"])
        assert found == {0: {"a", "b", "c"}, 1: {"d"}}
        assert len({stream.length_of(row) for _, (_, row), _ in stream.sampler()}) == 1
        assert len(list(stream.targets)) == 4


@pytest.mark.parametrize("length_batch", [1, 3])
def test_batches_of_a_stream_have_rows_of_like_length(tmp_path, length_batch):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 100, 90).tolist()
    rows = datasets.Dataset.from_dict({"text": ["x" * n for n in lengths], "label": ["a", "b"] * 45})
    rows.to_parquet(tmp_path / "train.parquet")
    stream = StreamedRows.load(str(tmp_path), "train", "classification", buffer_size=30)

    def padding(order, size=3):
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    plain = [len(row["text"]) for _, (_, row), _ in stream.sampler(2)]
    grouped = [len(row["text"]) for _, (_, row), _ in stream.sampler(2, length_batch=3)]
    assert sorted(plain) == sorted(grouped) == sorted(lengths)
    assert padding(grouped) < 0.4 * padding(plain)


def test_rows_in_memory_know_their_lengths(tmp_path):
    texts = datasets.Dataset.from_dict({"text": ["ab", "abcd"], "label": ["x", "y"]})
    assert RowDataset(texts, "classification").lengths() == [2, 4]
    captions = datasets.Dataset.from_dict({"image": [picture()] * 2, "captions": [["a", "bb"], ["ccc"]]})
    assert RowDataset(captions.cast_column("image", datasets.Image()), "captioning").lengths() == [1, 2, 3]


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    def peak(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        content = np.random.default_rng(0).bytes(20_000)
        for shard in range(number):
            columns = {"image": [{"bytes": content, "path": None}] * 50, "question": ["q"] * 50, "answer": ["a"] * 50}
            datasets.Dataset.from_dict(columns).to_parquet(folder / f"train-{shard:05d}.parquet")
        stream = StreamedRows.load(str(folder), "train", "vqa", buffer_size=20)
        tracemalloc.start()
        read = sum(len(row["image"]["bytes"]) for _, (_, row), _ in stream.sampler())
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return read, found

    (few, low), (many, high) = peak(2), peak(16)
    assert many == 8 * few == 16_000_000
    assert high < 1.2 * low + 200_000 and high < many / 4, (low, high)


def sequence(folder, tmp_path, name, steps, workers, resume=False, batch_size=4, **options):
    """(rows of each batch that a trainer has seen, the trainer): two epochs of a stream, or so many steps, each of which is saved."""
    processor, model = tiny_processor_and_model()
    stream = StreamedRows.load(folder, "train", "vqa", buffer_size=6, skip_broken=True)
    stream.count()
    arguments = TrainingArguments(
        str(tmp_path / name), per_device_train_batch_size=batch_size, learning_rate=0.0, use_cpu=True, save_steps=1, save_strategy="no" if steps == 99 else "steps",
        remove_unused_columns=False, disable_tqdm=True, report_to="none", dataloader_num_workers=workers, num_train_epochs=2,
        **options,
    )  # fmt: skip
    seen = []

    class Watching(CrossModalTrainer):
        def training_step(self, model, inputs, *args):
            seen.append(inputs["row_ids"].tolist())
            if len(seen) > steps:
                raise KeyboardInterrupt
            return super().training_step(model, inputs, *args)

    collator = SampleCollator(processor, VQATask.from_config(model.config).encode_targets)
    trainer = Watching(model=model, args=arguments, train_dataset=stream, data_collator=collator, max_broken_samples=2)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        seen.pop()
    return seen, trainer


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"train_sampling_strategy": "group_by_length"}], ids=["any", "by length"])
def test_a_run_goes_on_at_the_exact_sample_across_epochs(tmp_path, workers, options):
    folder = shards(tmp_path / "data", [5, 8, 9])
    # Workers change nothing of the order.
    whole, _ = sequence(folder, tmp_path, "whole", 99, 0, **options)
    assert len(whole) == 12
    for epoch in (whole[:6], whole[6:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(22))
    found = []
    for steps in (3, 3, 2, 99):
        found += sequence(folder, tmp_path, "cut", steps, workers, resume=bool(found), **options)[0]
    assert found == whole


def test_broken_samples_are_named_counted_and_left_out_up_to_a_limit(tmp_path):
    folder = shards(tmp_path / "data", [5, 8], broken=(3, 6))
    seen, trainer = sequence(folder, tmp_path, "run", 8, 0)
    assert len(seen) == 8 and sorted(row for batch in seen[:4] for row in batch) == [0, 1, 2, 4, 5, *range(7, 13)]
    names = {"row 3 of train-00000.parquet", "row 1 of train-00001.parquet"}
    assert trainer.broken_samples.keys() == names
    assert all("column 'image'" in why and "cannot be read" in why for why in trainer.broken_samples.values())
    # Those met before a run was cut off count too.
    seen, trainer = sequence(folder, tmp_path, "run", 99, 0, resume=True)
    assert not seen and trainer.broken_samples.keys() == names
    one_more = shards(tmp_path / "other", [5, 8], broken=(3, 6, 9))
    with pytest.raises(
        BrokenSample, match="3 broken samples, and max_broken_samples=2. Remove or repair them"
    ) as error:
        sequence(one_more, tmp_path, "other run", 99, 2)
    assert "row 4 of train-00001.parquet" in str(error.value) or "row 1 of train-00001" in str(error.value)


def test_a_batch_of_which_nothing_is_left_takes_the_sample_before_it(tmp_path):
    folder = shards(tmp_path / "data", [6], broken=(2,))
    seen, _ = sequence(folder, tmp_path, "run", 99, 0, batch_size=1)
    rows = [row for batch in seen for row in batch]
    assert (
        len(rows) == 12
        and set(rows) == {0, 1, 3, 4, 5}
        and sum(a == b for a, b in zip(rows, rows[1:], strict=False)) == 2
    )
    # So does a run that goes on just there.
    again = rows.index(next(a for a, b in zip(rows, rows[1:], strict=False) if a == b)) + 1
    found = sequence(folder, tmp_path, "cut", again, 0, batch_size=1)[0]
    found += sequence(folder, tmp_path, "cut", 99, 0, resume=True, batch_size=1)[0]
    assert found == seen
    whole = shards(tmp_path / "other", [3], broken=(0, 1, 2))
    with pytest.raises(ValueError, match="nothing is left of a batch of 3, nor the sample before it: row"):
        sequence(whole, tmp_path, "other run", 99, 0)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"bytes": b"no image", "path": None}, "cannot be read"),
        ({"bytes": None, "path": "/nowhere.png"}, "nowhere.png"),
    ],
)
def test_without_a_limit_a_broken_sample_ends_training_with_its_name(value, words, tmp_path):
    rows = datasets.Dataset.from_dict({"image": [value], "question": ["q"], "answer": ["a"]})
    samples = RowDataset(rows.cast_column("image", datasets.Image()), "vqa")
    loader = DataLoader(
        Batches(samples, list), sampler=SeededSampler([0], 0), batch_size=1, collate_fn=list, num_workers=1
    )
    with pytest.raises(BrokenSample, match="row 0 of the dataset, column 'image'") as error:
        next(iter(loader))
    assert words in str(error.value)


def test_features_that_are_no_numbers_are_broken_and_faults_of_code_are_not(tmp_path, monkeypatch):
    values = {"video": ["v"] * 2, "segment": [0, 1], "text": ["t"] * 2, "label": [0, 1]}
    values |= {f"{name}_values": [[1.0, 2.0], [1.0, float("nan")]] for name in ("text", "audio", "video")}
    samples = RowDataset(datasets.Dataset.from_dict(values), "classification", skip_broken=True)
    batches = Batches(samples, lambda samples: {"rows": [sample["row"] for sample in samples]})
    batch = batches.__getitems__([((0,), 0, 1), ((0,), 1, 0)])
    assert batch["rows"] == [0] and batch["broken_samples"][0][0] == "row 1 of the dataset"
    assert "column 'text_values': NaN or infinity" in batch["broken_samples"][0][1]

    def fault(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(samples, "_target", fault)
    monkeypatch.setattr(samples, "_read", fault)
    with pytest.raises(ZeroDivisionError):
        batches.__getitems__([((0,), 0, 1)])


def recipe(folder, data, **changes):
    values = copy.deepcopy(TINY_RECIPE) | {
        "dataset": data,
        "output_dir": str(folder),
        "name": "tiny",
        "streaming": True,
    }
    values["training"] |= {"num_train_epochs": 1} | changes.pop("training", {})
    return Recipe(**values | changes)


def test_a_recipe_streams_and_scores_rows_in_memory(tmp_path):
    data = shards(tmp_path / "data", [12, 20, 16], broken=(7,))
    shards(tmp_path / "data", [12], split="validation", start=100)
    lines = []
    run = recipe(
        tmp_path / "run",
        data,
        training={"num_train_epochs": 6, "logging_steps": 5},
        shuffle_buffer=16,
        max_broken_samples=1,
    )
    result = train(run, write=lines.append)
    assert result["metrics"]["accuracy"] == 1.0 and result["majority"]["accuracy"] < 0.5
    assert any("48 training and 12 evaluation rows, 3 labels" in line for line in lines)
    assert result["broken_samples"] == 1 and any("1 broken samples were left out: row 7 of" in line for line in lines)
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["broken_samples"] == 1
    assert [entry["broken_samples"] for entry in result["log"] if "broken_samples" in entry]


def test_a_recipe_in_memory_leaves_broken_samples_out_too(tmp_path):
    data = shards(tmp_path / "data", [24], broken=(7, 8))
    rows = datasets.load_dataset(data, split="train").cast_column("image", datasets.Image(decode=False))
    run = recipe(tmp_path / "run", data, streaming=False, max_broken_samples=2)
    assert train(run, rows, color_rows(12), write=lambda line: None, export=False)["broken_samples"] == 2


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("task", ["classification", "retrieval", "captioning"])
def test_other_tasks_stream_tars_and_lines_counted_or_not(tmp_path, task, known):
    data, labels = tars(tmp_path / "data", [10, 14], with_json=False), None
    rows = read_whole(data, "train", 6)
    if task == "classification":
        data, labels = str(tmp_path / "texts.jsonl"), ["0", "1", "2"]
        columns = {
            "text": [QUESTIONS[row % 2] + " now" * (row % 3) for row in range(24)],
            "label": [row % 3 for row in range(24)],
        }
        rows = datasets.Dataset.from_dict(columns)
        rows.to_json(data)
    model = copy.deepcopy(TINY_RECIPE["model"])
    if task == "classification":
        model["encoders"].pop("vision")
    changes = {"task": task, "model": model, "labels": None if known else labels}
    if task == "captioning":
        model["encoders"].pop("text")
        model["decoder"] = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
    run = recipe(tmp_path / "run", data, training={} if known else {"max_steps": 4}, **changes)
    lines = []
    result = train(run, eval_rows=rows, write=lines.append, export=False)
    assert any(("24" if known else "uncounted") + " training and" in line for line in lines), lines
    assert result["metrics"]["loss"] > 0 and not result["broken_samples"]
    if not known:
        assert [entry["step"] for entry in result["log"] if "eval_loss" in entry][:4] == [1, 2, 3, 4]


def test_what_cannot_be_streamed_is_refused(tmp_path):
    for key, value in {"holdout": 0.1, "token_cache": True, "max_train_rows": 5, "rows_per_image": 2}.items():
        with pytest.raises(ValueError, match=f"{key}={value} needs all rows at once"):
            recipe(tmp_path, "rows", **{key: value})
    with pytest.raises(ValueError, match="shuffle_buffer=0"):
        StreamedRows.load(shards(tmp_path / "data", [3]), "train", "vqa", buffer_size=0)
    rows = datasets.load_dataset(str(tmp_path / "data"), split="train", streaming=True).map(dict)
    with pytest.raises(ValueError, match="does not say what its columns are"):
        StreamedRows(rows, "vqa")
    with pytest.raises(ValueError, match="has no split 'other'. It has: train"):
        StreamedRows.load(str(tmp_path / "data"), "other", "vqa")
    with pytest.raises(ValueError, match="does not exist"):
        StreamedRows.load(str(tmp_path / "nowhere"), "train", "vqa")
    with pytest.raises(ValueError, match="labels are read from the rows"):
        recipe(tmp_path, "rows", streaming=False, labels=["a"])


_RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from crossmodal.training import trainer
from test_streaming import sequence
seen, trainer = sequence(sys.argv[2] + "-data", Path(sys.argv[2]).parent, "run", 99, 0, batch_size=int(sys.argv[3]))
torch.save(seen, f"{sys.argv[2]}-{trainer.args.process_index}")
if trainer.args.process_index == 0:
    torch.save(sorted(trainer.broken_samples), sys.argv[2])
"""


@pytest.mark.slow
def test_two_ranks_stream_uneven_files_without_overlap_and_end_together(tmp_path):
    shards(tmp_path / "out-data", [3, 15, 3], broken=(1, 12))
    broken = run_on_two(_RANKS, tmp_path / "out", 4)
    seen = [torch.load(tmp_path / f"out-{rank}") for rank in range(2)]
    assert len(seen[0]) == len(seen[1]) == 6
    for epoch in (slice(0, 3), slice(3, 6)):
        rows = [row for part in seen for batch in part[epoch] for row in batch]
        # One of 21 is left out, and at most two do not decode.
        assert len(rows) == len(set(rows)) and len(rows) >= 18
    # What either rank met.
    assert set(broken) <= {"row 1 of train-00000.parquet", "row 9 of train-00001.parquet"} and broken
