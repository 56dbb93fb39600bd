"""Scores under missing and noisy modalities: what is done to inputs, and what comes of it."""

import copy
import json

import numpy as np
import pytest
from crossmodal.training.cli import app
from crossmodal.training.datasets import RowDataset
from crossmodal.training.recipes import Recipe
from crossmodal.training.robustness import CORRUPTIONS, MISSING_RATES, CorruptedDataset, robustness
from crossmodal.training.train import train
from PIL import Image
from typer.testing import CliRunner
from world import TINY_RECIPE, color_rows, noise


ARRAY = noise(20, 4)
VALUES = {
    "vision": Image.fromarray((noise(32, 48, 3) * 40 + 128).clip(0, 255).astype(np.uint8)),
    "video": [Image.fromarray((noise(16, 24, 3, seed=n) * 40 + 128).clip(0, 255).astype(np.uint8)) for n in range(8)],
    "text": "one two three four five six seven eight",
    "audio": {"array": noise(400), "sampling_rate": 8000},
    "features": ARRAY,
    "eeg": {"array": noise(4, 256), "sampling_rate": 128},
}


def as_array(value):
    if isinstance(value, str):
        return np.array([word in value.split() for word in VALUES["text"].split()], dtype=np.float32)
    if isinstance(value, list):
        return np.stack([as_array(frame) for frame in value])
    return np.asarray(value["array"] if isinstance(value, dict) else value, dtype=np.float32)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, row in CORRUPTIONS.items() for name in row])
def test_a_corruption_grows_with_its_level_and_keeps_the_form(kind, name):
    corruption, value = CORRUPTIONS[kind][name], VALUES[kind]
    before = copy.deepcopy(value)
    distances = []
    for level in corruption.levels:
        found = corruption.apply(value, level, np.random.default_rng(0))
        assert type(found) is type(value) or kind == "vision" and isinstance(found, Image.Image)
        assert as_array(found).shape == as_array(value).shape
        distances.append(float(np.square(as_array(found) - as_array(value)).mean()))
    assert 0 < distances[0] and distances == sorted(distances)
    # What was given is as it was.
    np.testing.assert_array_equal(as_array(before), as_array(value))


def test_a_text_keeps_a_word_and_a_row_its_last_modality():
    assert CORRUPTIONS["text"]["token drop"].apply("alone", 1.0, np.random.default_rng(0)) == "alone"
    samples = RowDataset(color_rows(12), "vqa")
    both = {"vision": "images", "text": "text"}
    gone = CorruptedDataset(samples, "vision", both, None, 1.0)
    assert all(gone[i]["images"] is None and gone[i]["text"] for i in range(12))
    lonely = CorruptedDataset(gone, "text", both, None, 1.0)
    assert all(lonely[i]["text"] for i in range(12))
    half = CorruptedDataset(samples, "vision", both, None, 0.5)
    missing = [half[i]["images"] is None for i in range(12)]
    assert 0 < sum(missing) < 12 and missing == [half[i]["images"] is None for i in range(12)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "colors"
    values = copy.deepcopy(TINY_RECIPE) | {"dataset": "rows", "output_dir": str(folder), "name": "colors"}
    values["training"]["num_train_epochs"] = 6
    return folder, train(Recipe(**values), color_rows(48), color_rows(12), write=lambda line: None)


def test_what_the_answer_rests_on_is_what_hurts(trained):
    _, result = trained
    rows = color_rows(36)
    table = robustness(result["model"], result["processor"], rows, "x", write=lambda line: None)
    clean = table[0]
    assert clean["modality"] is None and clean["accuracy"] == 1.0
    missing = {
        name: [row["accuracy"] for row in table if (row["modality"], row["kind"]) == (name, "missing")]
        for name in ("vision", "text")
    }
    assert len(missing["vision"]) == len(MISSING_RATES)
    # The color is in the picture; both questions ask the same.
    assert missing["vision"][-1] <= 0.5 and missing["vision"] == sorted(missing["vision"], reverse=True)
    again = robustness(result["model"], result["processor"], rows, "x", write=lambda line: None)
    assert table == again


def test_the_command_prints_writes_and_fills_the_card(trained, tmp_path):
    folder, _ = trained
    color_rows(12).to_parquet(tmp_path / "rows.parquet")
    command = ["robustness", str(folder), "--dataset", str(tmp_path / "rows.parquet"), "--limit", "8", "--json"]
    for _ in range(2):
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0
    table = json.loads(done.stdout.strip().splitlines()[-1])
    assert table == json.loads((folder / "robustness.json").read_text())
    assert {row["kind"] for row in table} == {"clean", "missing", "gaussian", "blur", "token drop"}
    with Image.open(folder / "robustness.png") as plot:
        assert plot.width > 600 and len(plot.convert("L").getcolors()) > 10
    card = (folder / "README.md").read_text()
    assert card.count("## When a modality is missing or noisy") == 1 and "## Limits" in card
    assert "| vision, missing (rate) | 0.25, 0.5, 0.75, 1 |" in card and "![" in card
