"""Recipes that write: captions of images, and answers in words; trained, scored by what is written, and saved."""

import copy
import json

import datasets
import pytest
from crossmodal.training.datasets import RowDataset
from crossmodal.training.evaluate import evaluate
from crossmodal.training.recipes import Recipe
from crossmodal.training.train import train
from world import TINY_RECIPE, color_rows, picture, run_as_stranger


DECODER = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 12, "hidden_dropout": 0.0,
}  # fmt: skip


def recipe(task, folder, *modalities, **changes):
    values = copy.deepcopy(TINY_RECIPE) | {"task": task, "dataset": "rows", "output_dir": str(folder)}
    values["model"]["encoders"] = {name: values["model"]["encoders"][name] for name in modalities}
    values["model"]["decoder"] = DECODER
    values["training"] |= {"num_train_epochs": 30, "learning_rate": 5.0e-3}
    return Recipe(**values | changes)


def caption_rows(count=18):
    colors = ["red", "green", "blue"]
    names = [colors[i % 3] for i in range(count)]
    columns = {
        "image": [picture(name) for name in names],
        "image_id": range(count),
        "captions": [[f"a {name} picture", f"all {name}"] for name in names],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_captions_are_learnt_and_scored_once_for_each_image(tmp_path):
    pytest.importorskip("pycocoevalcap")
    rows = caption_rows()
    own = recipe("captioning", tmp_path / "model", "vision", generation={"num_beams": 3})
    result = train(own, rows, rows.select(range(3)), write=lambda s: None)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["num_beams"] == 3
    # Two captions of each image: either is right.
    assert result["metrics"]["exact_match"] == 1 and result["metrics"]["cider_d"] > 1
    assert result["majority"]["exact_match"] == pytest.approx(1 / 3, abs=0.01)
    found = evaluate(result["model"], result["processor"], rows.select(range(3)), None, progress=False, num_beams=2)
    assert found["exact_match"] == 1 and found["bleu1"] > 0.9
    with pytest.raises(ValueError, match="rerank does not go with CrossModalForCaptioning.*num_beams"):
        evaluate(result["model"], result["processor"], rows, None, rerank=3)
    assert "image-text-to-text" in (tmp_path / "model" / "README.md").read_text()
    assert len(RowDataset(rows, "captioning")) == 36


def test_answers_are_written_and_the_folder_answers_strangers(tmp_path):
    rows = color_rows()
    result = train(recipe("answering", tmp_path / "model", "vision", "text"), rows, rows, write=lambda s: None)
    assert result["metrics"]["exact_match"] > 0.9 > result["majority"]["exact_match"]
    name = rows[0]["answer"]
    rows[0]["image"].save(tmp_path / "image.png")
    code = """
from transformers import pipeline
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
print(pipe(sys.argv[2], text=sys.argv[3], return_full_text=False)[0]["generated_text"])
"""
    said = run_as_stranger(code, tmp_path / "model", tmp_path / "image.png", rows[0]["question"], cwd=tmp_path)
    assert said.splitlines()[-1].strip() == name


def test_what_a_model_does_by_itself_is_checked_before_training(tmp_path):
    with pytest.raises(ValueError, match="generation.num_beam is no field of GenerationConfig. Nearest: .*num_beams"):
        recipe("captioning", tmp_path, "vision", generation={"num_beam": 3})
    with pytest.raises(ValueError, match="generation=.*'vqa', whose model writes nothing"):
        Recipe(**copy.deepcopy(TINY_RECIPE), output_dir=str(tmp_path), dataset="x", generation={"num_beams": 3})


def test_a_recipe_that_writes_needs_words(tmp_path):
    rows = caption_rows(6)
    with pytest.raises(ValueError, match="needs processor.tokenizer"):
        train(recipe("captioning", tmp_path, "vision", processor={"image_size": [32, 32]}), rows, rows)
