"""Adapters by columns, splits and files, tasks and their targets, recipes."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from crossmodal.training.building import train_tokenizer
from crossmodal.training.collator import SampleCollator
from crossmodal.training.datasets import AUGMENTATIONS, GroupedSampler, RowDataset
from crossmodal.training.loading import join_rows, load_rows
from crossmodal.training.recipes import Recipe
from crossmodal.training.schemas import find_adapter
from crossmodal.training.tasks import VQATask
from PIL import Image
from world import color_rows, picture

from crossmodal import configs


ANNOTATED = ["2", "two", "2", "three", "2", "2.", "4", "two", "two", "a cat"]


def vqa_v2_rows(as_dicts):
    """Two rows in the schema of VQA v2 on the Hub, whose answers are strings or dicts."""
    answers = [ANNOTATED, ["yes"] * 10]
    if as_dicts:
        answers = [
            [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(row)] for row in answers
        ]
    columns = {
        "question_type": ["how many", "is"],
        "multiple_choice_answer": ["2", "yes"],
        "answers": answers,
        "image_id": [9, 9],
        "answer_type": ["number", "yes/no"],
        "question_id": [90, 91],
        "question": ["how many cats?", "is it a cat?"],
        "image": [picture(), picture()],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_schemas_are_told_apart_by_their_columns():
    assert find_adapter(["image", "question", "answer", "image_id"], "vqa") == "easy_vqa"
    assert find_adapter(["image", "sentence", "label", "identifier"], "vqa") == "nlvr"
    assert find_adapter(vqa_v2_rows(True).column_names, "vqa") == "vqa_v2"


def test_a_column_tells_the_splits_where_all_rows_lie_in_one(tmp_path):
    values = ["train", "val", "restval", "test", "test"]
    columns = {"image": [picture()] * 5, "caption": [["a"], ["b"], ["c"], ["d"], ["e"]], "split": values}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "test.parquet")
    found = {split: load_rows(str(tmp_path), split)["caption"][:] for split in ("train", "validation", "test")}
    assert found == {"train": [["a"], ["c"]], "validation": [["b"]], "test": [["d"], ["e"]]}
    with pytest.raises(ValueError, match="no split 'other'"):
        load_rows(str(tmp_path), "other")


def test_two_datasets_are_joined_on_a_class(tmp_path):
    rates, sounds = {"low": 220.0, "high": 880.0}, {}
    for name, frequency in rates.items():
        file = io.BytesIO()
        soundfile.write(file, np.sin(np.arange(800) * frequency * 2 * np.pi / 8000), 8000, format="WAV")
        sounds[name] = file.getvalue()
    labels = ["low", "high", "high", "low"]
    columns = {"audio": [{"bytes": sounds[name], "path": None} for name in labels], "kind": labels, "take": range(4)}
    first = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))
    colors = {"low": "red", "high": "blue"}
    columns = {"image": [picture(colors[name]) for name in ("low", "high", "low")], "kind": ["low", "high", "low"]}
    second = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    for name, rows in (("sounds", first), ("pictures", second)):
        (tmp_path / name).mkdir()
        rows.to_parquet(tmp_path / name / "train.parquet")
    source = f"{tmp_path / 'sounds'} + {tmp_path / 'pictures'} on kind"
    samples = RowDataset(load_rows(source, "train"), "retrieval")
    assert samples.adapter_name == "sounds_and_images" and len(samples) == 4
    for sample, name in zip(samples, labels, strict=True):
        assert sample["target"]["keys"] == [("class", name)]
        assert sample["images"].getpixel((0, 0)) == picture(colors[name]).getpixel((0, 0))
        assert sample["audio"]["sampling_rate"] == 8000
        peak = np.abs(np.fft.rfft(sample["audio"]["array"])).argmax() * 10.0
        assert peak == pytest.approx(rates[name], abs=10)
    with pytest.raises(ValueError, match="no column 'take' in the second"):
        load_rows(source.replace("on kind", "on take"), "train")
    with pytest.raises(ValueError, match="no row with kind='high'"):
        join_rows(first, second.select([0, 2]), "kind")


def test_a_broken_sound_is_named_with_its_row():
    columns = {"audio": [{"bytes": b"RIFF nothing", "path": None}], "image": [picture()], "class": [0]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="row 0 of the dataset, column 'audio': sound file: not readable as sound"):
        RowDataset(rows, "retrieval")[0]


def test_a_missing_column_is_named_with_the_schemas_there_are():
    with pytest.raises(ValueError, match=r"no column 'answers?'.*it has \['image', 'question'\].*easy_vqa"):
        find_adapter(["image", "question"], "vqa")


@pytest.mark.parametrize("as_dicts", [True, False])
def test_ten_annotators_become_soft_targets_of_normalised_answers(as_dicts):
    samples = RowDataset(vqa_v2_rows(as_dicts), "vqa")
    assert samples[0]["text"] == "how many cats?" and samples[0]["target"] == ANNOTATED
    task = VQATask.from_targets(samples.targets)
    labels = task.encode_targets(samples.targets)
    # Seven of ten said two, one each three, four and cat; each counts min(1, 0.3 n).
    assert labels[0, task.label2id["2"]] == 1
    assert labels[0, task.label2id["cat"]] == pytest.approx(0.3)
    assert labels[1, task.label2id["yes"]] == 1 and labels[1].sum() == 1


def test_rare_answers_are_no_class():
    targets = [["yes"] * 10, ["yes"] * 9 + ["maybe"], ["no"] * 10, ["no"] * 10]
    assert set(VQATask.from_targets(targets, min_answer_count=2).label2id) == {"yes", "no"}
    with pytest.raises(ValueError, match="min_answer_count=9"):
        VQATask.from_targets(targets, min_answer_count=9)


def test_single_answers_become_ids_and_unknown_ones_are_refused():
    task = VQATask.from_targets(["red", "blue", "red"])
    assert task.encode_targets(["red", "green"]).tolist() == [task.label2id["red"], -100]
    with pytest.raises(ValueError, match="'green' of row 1 is outside the model's 2 answers"):
        task.check_targets(["red", "green"])
    task.check_targets(["red", "green"], allow_unknown=True)


def test_scores_agree_with_hand_worked_cases():
    scores = VQATask.score_answers(["2", "yes", "red"], [ANNOTATED, ["no"] * 9 + ["yes"], "red"])
    # Exact: right, wrong, right. Official: 1, 0.3, 1.
    assert scores["accuracy"] == pytest.approx(2 / 3) and scores["vqa_accuracy"] == pytest.approx(2.3 / 3)


def test_boolean_labels_of_nlvr_are_answers():
    rows = datasets.Dataset.from_dict(
        {
            "image": [Image.new("RGB", (320, 100))] * 2,
            "sentence": ["a", "b"],
            "label": [True, False],
            "identifier": ["1-0", "2-0"],
        }
    ).cast_column("image", datasets.Image())
    assert RowDataset(rows, "vqa").targets == ["true", "false"]


def test_permuted_boxes_are_the_same_boxes_in_every_order():
    shades = [(10, 10, 10), (20, 20, 20), (30, 30, 30)]
    image = Image.new("RGB", (320, 100), (255, 255, 255))
    for box, shade in enumerate(shades):
        image.paste(shade, (box * 110, 0, box * 110 + 100, 100))
    variants = AUGMENTATIONS["permute_boxes"].variants
    seen = []
    for variant in variants:
        permuted = variant(image)
        seen.append(tuple(permuted.getpixel((box * 110 + 50, 50)) for box in range(3)))
        assert sorted(seen[-1]) == shades and permuted.getpixel((105, 50)) == (255, 255, 255)
    assert len(set(seen)) == 6 and seen[0] == tuple(shades)
    with pytest.raises(ValueError, match="does not hold 3 square boxes"):
        variants[1](Image.new("RGB", (100, 100)))
    columns = {"image": [image] * 2, "sentence": ["s", "t"], "label": [True, False]}
    rows = RowDataset(
        datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()), "vqa", augment="permute_boxes"
    )
    drawn = {rows[0]["images"].getpixel((50, 50)) for _ in range(100)}
    assert drawn == set(shades)


def test_mirror_shows_a_picture_from_either_side():
    image = Image.new("RGB", (4, 2), (0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0))
    columns = {"image": [image], "title": ["t"]}
    plain = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows = RowDataset(plain, "captioning", augment="mirror")
    drawn = {tuple(shown.getpixel((x, 0))[0] for x in (0, 3)) for shown in (rows[0]["images"] for _ in range(50))}
    assert drawn == {(255, 0), (0, 255)}
    assert {rows.unaugmented()[0]["images"].getpixel((0, 0))[0] for _ in range(20)} == {255}


def test_a_folder_that_holds_only_a_test_file_has_just_that_split(tmp_path):
    color_rows(6).to_parquet(tmp_path / "test.parquet")
    assert len(load_rows(str(tmp_path), "test")) == 6
    with pytest.raises(ValueError, match="no split 'validation'. It has: test"):
        load_rows(str(tmp_path), "validation")


def test_splits_joined_by_a_plus_follow_one_another(tmp_path):
    for split, count in (("train", 6), ("validation", 4)):
        color_rows(count).to_parquet(tmp_path / f"{split}.parquet")
    both = load_rows(str(tmp_path), "train+validation")
    assert both["answer"] == [*color_rows(6)["answer"], *color_rows(4)["answer"]]


def test_a_single_file_is_the_split_that_is_asked_for(tmp_path):
    color_rows(6).to_parquet(tmp_path / "anything.parquet")
    assert len(load_rows(str(tmp_path / "anything.parquet"), "test")) == 6


@pytest.mark.parametrize("source", ["missing.parquet", "./nowhere", "some/where/deep"])
def test_a_dataset_that_is_not_there_is_named(source):
    with pytest.raises(ValueError, match="does not exist"):
        load_rows(source, "train")


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match="cannot be read"):
        load_rows(str(tmp_path), "train")


def test_a_broken_image_is_named_with_its_row():
    rows = color_rows(4).cast_column("image", datasets.Image(decode=False))
    images = [row["image"] for row in rows]
    images[2] = {"bytes": images[2]["bytes"][:40], "path": None}
    rows = rows.remove_columns("image").add_column("image", images).cast_column("image", datasets.Image(decode=False))
    samples = RowDataset(rows, "vqa")
    assert samples[1]["images"].size == (32, 32)
    with pytest.raises(ValueError, match="row 2 of the dataset, column 'image'"):
        samples[2]


def test_rows_of_one_image_share_it_and_stay_together_in_training():
    samples = RowDataset(color_rows(24, questions_per_image=4), "vqa")
    assert samples[0]["images"] is samples[1]["images"]
    sampler = GroupedSampler(samples.groups, 2, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(24))
    pairs = [(samples.groups[a], samples.groups[b]) for a, b in zip(order[::2], order[1::2], strict=True)]
    assert all(a == b for a, b in pairs)
    assert order == list(sampler)
    sampler.set_epoch(1)
    assert order != list(sampler)


def test_a_batch_begins_with_labels_and_leaves_out_what_the_model_does_not_read():
    from world import tiny_processor_and_model

    processor, _ = tiny_processor_and_model()
    task = VQATask.from_targets(["red", "green", "blue"])
    samples = [dict(RowDataset(color_rows(4), "vqa")[i]) | {"unread": 1} for i in range(4)]
    batch = SampleCollator(processor, task.encode_targets)(samples)
    assert list(batch)[0] == "labels" and "unread" not in batch
    assert batch["pixel_values"].shape[0] == 2 and batch["pixel_values_index"].tolist() == [0, 0, 1, 1]
    assert torch.equal(batch["labels"], torch.tensor([task.label2id[s["target"]] for s in samples]))


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(configs.__file__).parent.glob("training/*.yaml")))
def test_recipes_of_the_package_are_whole(name):
    recipe = Recipe.load(name, ["dataset=elsewhere", "output_dir=there"])
    assert (recipe.dataset, recipe.output_dir) == ("elsewhere", "there")
    # Sentiment is classified by a number.
    kinds = {"sentiment": "classification", "point_segmentation": "segmentation"}
    assert kinds.get(recipe.task, recipe.task) == name.partition("_")[0]


def test_overrides_reach_a_stage_by_its_number():
    recipe = Recipe.load("vqa_nlvr", ["warm_up.1.rows=60000", "warm_up.1.training.num_train_epochs=1"])
    assert recipe.warm_up[1]["rows"] == 60000 and recipe.warm_up[1]["training"]["num_train_epochs"] == 1
    assert recipe.warm_up[0] == Recipe.load("vqa_nlvr").warm_up[0]
    with pytest.raises(ValueError, match="'2' is no item of a list of 2. Expected 0 to 1"):
        Recipe.load("vqa_nlvr", ["warm_up.2.rows=60000"])


def test_overrides_reach_nested_keys_and_arguments_of_training():
    recipe = Recipe.load(
        "vqa_easy", ["num_train_epochs=2", "training.learning_rate=1e-4", "model.config.hidden_size=64"]
    )
    assert recipe.training["num_train_epochs"] == 2 and float(recipe.training["learning_rate"]) == 1e-4
    assert recipe.model["config"]["hidden_size"] == 64


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("datset=x", "Did you mean 'dataset'"),
        ("num_train_epoch=2", "Did you mean 'num_train_epochs'"),
        ("training.learning_rat=1", "learning_rate"),
        ("model.encoder=x", "encoders"),
        ("task=vqaa", "Expected one of"),
        ("dataset", "is no override"),
        ("seed.x=1", "not further keys"),
    ],
)
def test_misspelt_overrides_are_named_with_the_nearest_key(override, said):
    with pytest.raises(ValueError, match=said):
        Recipe.load("vqa_easy", [override])


def test_an_unknown_recipe_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="'vqa_eazy' is not among .* vqa_easy"):
        Recipe.load("vqa_eazy")


def test_a_trained_tokenizer_is_the_same_every_time_and_spells_what_is_rare():
    texts = ["a red box", "a red ball", "the Red box is left of a blue ball"] * 2 + ["zebra"]
    first, *others = (train_tokenizer(texts, 40) for _ in range(4))
    assert all(other.get_vocab() == first.get_vocab() for other in others)
    assert first.tokenize("Red box") == ["red", "box"]
    assert first.tokenize("zebra") == ["z", "##e", "##b", "##r", "##a"]
    assert first.decode(first("zebra red")["input_ids"], skip_special_tokens=True) == "zebra red"
    with pytest.raises(ValueError, match="vocab_size=10 has no room for the"):
        train_tokenizer(texts, 10)
