"""Training runs: they learn, end in a whole Hub folder, resume after a kill, and refuse what does not fit."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from crossmodal.training.checkpoints import last_whole_checkpoint
from crossmodal.training.collator import SampleCollator
from crossmodal.training.datasets import RowDataset
from crossmodal.training.evaluate import evaluate
from crossmodal.training.loading import hold_out
from crossmodal.training.processes import FolderTaken, alone_in
from crossmodal.training.publish import export_folder, recipe_text
from crossmodal.training.recipes import Recipe
from crossmodal.training.seeds import seeds_table, train_seeds
from crossmodal.training.tasks import VQATask
from crossmodal.training.train import train
from crossmodal.training.trainer import TrainingDiverged
from datasets import Dataset, Image
from killing import at_work_in
from transformers import TrainingArguments
from world import TINY_RECIPE, color_rows, tiny_processor_and_model

from crossmodal import CrossModalForRetrieval, CrossModalForVQA, CrossModalTrainer


def recipe(folder, **changes):
    values = copy.deepcopy(TINY_RECIPE) | {"dataset": "rows", "output_dir": str(folder), "name": "tiny"}
    values["training"] |= changes.pop("training", {})
    return Recipe(**values | changes)


def quiet(line):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    lines = []
    result = train(
        recipe(folder, training={"num_train_epochs": 6, "logging_steps": 5}, rows_per_image=2),
        color_rows(48),
        color_rows(12),
        write=lines.append,
    )
    return folder, result, lines


def test_a_run_learns_and_beats_the_most_common_answer(trained):
    _, result, lines = trained
    assert result["metrics"]["accuracy"] == 1.0 > result["majority"]["accuracy"]
    assert any("48 training and 12 evaluation rows, 3 labels" in line for line in lines)


def test_the_output_folder_is_a_whole_hub_repo(trained):
    folder, result, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= names
    assert {"modeling_crossmodal.py", "processing_crossmodal.py", "pipeline_crossmodal.py", "recipe.yaml"} <= names
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: visual-question-answering" in card and "model-index" in card
    assert json.loads((folder / "eval_results.json").read_text())["metrics"] == result["metrics"]
    for path in folder.iterdir():
        if path.suffix in (".json", ".md", ".yaml", ".py"):
            assert str(folder) not in path.read_text(), f"{path.name} tells where it was made"


def test_a_published_recipe_names_no_path_of_this_machine(tmp_path):
    (tmp_path / "data").mkdir()
    run = recipe(tmp_path / "run", token_cache=str(tmp_path / "tokens"), warm_up=[{"dataset": str(tmp_path / "data")}])
    run.model["encoders"]["vision"] = {"model": str(tmp_path / "gone" / "encoder")}
    text = recipe_text(run)
    assert str(tmp_path) not in text and "token_cache: true" in text
    assert "model: encoder" in text and "dataset: data" in text


def test_the_saved_model_scores_what_the_run_reported(trained):
    folder, result, _ = trained
    from crossmodal import CrossModalProcessor

    model, processor = CrossModalForVQA.from_pretrained(folder), CrossModalProcessor.from_pretrained(folder)
    assert (
        evaluate(model, processor, color_rows(12), "validation", progress=False)["accuracy"]
        == result["metrics"]["accuracy"]
    )


def test_the_log_shows_the_modality_weights(trained):
    _, result, _ = trained
    logged = [entry for entry in result["log"] if "weight_vision" in entry]
    assert logged
    for entry in logged:
        assert entry["weight_vision"] + entry["weight_text"] == pytest.approx(1, abs=1e-3)


def test_the_log_shows_how_modalities_share_the_work(tmp_path):
    run = recipe(tmp_path / "run", training={"max_steps": 4, "logging_steps": 2, "max_grad_norm": 1e9})
    run.model["config"] = {**run.model.get("config", {}), "auxiliary_loss_weight": 0.5}
    logged = [e for e in train(run, color_rows(24), color_rows(12), write=quiet, export=False)["log"] if "loss" in e]
    assert len(logged) == 2
    for entry in logged:
        for name in ("vision", "text"):
            assert entry[f"auxiliary_loss_{name}"] > 0 and entry[f"gradient_norm_{name}"] > 0
        both = (entry["gradient_norm_vision"] ** 2 + entry["gradient_norm_text"] ** 2) ** 0.5
        assert both < entry["grad_norm"]


@pytest.mark.parametrize(
    ("training", "logged_at"),
    [
        # Three batches, two a step.
        ({"logging_strategy": "epoch", "num_train_epochs": 2, "gradient_accumulation_steps": 2}, [2, 4]),
        ({"logging_strategy": "epoch", "max_steps": 4}, [3, 4]),
        ({"logging_steps": 2, "logging_first_step": True, "max_steps": 4}, [1, 2, 4]),
    ],
)
def test_gradient_norms_are_in_every_entry_of_the_log(tmp_path, training, logged_at):
    run = recipe(tmp_path / "run", training={"per_device_train_batch_size": 8, **training})
    logged = [e for e in train(run, color_rows(24), color_rows(12), write=quiet, export=False)["log"] if "loss" in e]
    assert [entry["step"] for entry in logged] == logged_at
    for entry in logged:
        assert entry["gradient_norm_vision"] > 0 and entry["gradient_norm_text"] > 0 and "weight_vision" in entry


@pytest.mark.parametrize(("where", "max_grad_norm"), [("loss", 1.0), ("gradient", 1.0), ("gradient", 0.0)])
def test_a_loss_or_gradient_that_is_no_number_stops_training_and_names_the_rows(tmp_path, where, max_grad_norm):
    processor, model = tiny_processor_and_model()
    task, samples = VQATask.from_config(model.config), RowDataset(color_rows(24), "vqa")
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=6, save_steps=2, learning_rate=0.0, use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, report_to="none", max_grad_norm=max_grad_norm,
    )  # fmt: skip
    seen = []

    class Spoilt(SampleCollator):
        def __call__(self, rows):
            seen.append([row["row"] for row in rows])
            batch = super().__call__(rows)
            if len(seen) == 4 and where == "loss":
                batch["pixel_values"][:] = torch.nan
            return batch

    trainer = CrossModalTrainer(
        model=model, args=arguments, train_dataset=samples, data_collator=Spoilt(processor, task.encode_targets)
    )
    if where == "gradient":
        steps = []
        model.classifier.out_proj.weight.register_hook(
            lambda gradient: steps.append(0) or (gradient * torch.nan if len(steps) == 4 else gradient)
        )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingDiverged, match=f"the {where} .*nan at step 4 on rows .*checkpoint-2 is kept") as error:
        trainer.train()
    assert str(seen[3]) in str(error.value)
    assert ("which clips nothing" in str(error.value)) == (max_grad_norm == 0)
    # Nothing of it reached the weights, and what was saved is whole.
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items() if "running" not in key
               and "num_batches" not in key)  # fmt: skip
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])


def test_trainer_divides_the_loss_by_accumulation_steps(tmp_path):
    """transformers takes a forward with **kwargs for one that divides by itself: 4 steps would give 4 times the loss."""
    processor, model = tiny_processor_and_model()
    task = VQATask.from_config(model.config)
    samples = RowDataset(color_rows(16), "vqa")
    losses = []
    for size, steps in ((16, 1), (4, 4)):
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
            learning_rate=0.0, logging_steps=1, remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
            save_strategy="no", report_to="none",
        )  # fmt: skip
        trainer = CrossModalTrainer(
            model=copy.deepcopy(model), args=arguments, train_dataset=samples,
            data_collator=SampleCollator(processor, task.encode_targets),
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_learning_rates_follow_the_component(tmp_path):
    processor, model = tiny_processor_and_model()
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-3, weight_decay=0.1, use_cpu=True, report_to="none")
    trainer = CrossModalTrainer(model=model, args=arguments, learning_rates={"vision": 1e-5, "head": 1e-2})
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"]
    for name, parameter in model.named_parameters():
        expected = 1e-5 if ".encoders.vision." in name else 1e-2 if name.startswith("classifier") else 1e-3
        assert rates[id(parameter)] == expected, name
    with pytest.raises(ValueError, match="'audio'. Expected any of"):
        CrossModalTrainer(model=model, args=arguments, learning_rates={"audio": 1})


def test_weights_of_products_decay_and_temperatures_gates_and_variances_do_not(tmp_path):
    model = CrossModalForRetrieval(
        zoo.tiny_config(alignment_weight=1.0, alignment="late_interaction", loss_weighting="learned", gate="static")
    )
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    decayed = set(CrossModalTrainer(model=model, args=arguments).get_decay_parameter_names(model))
    named = dict(model.named_parameters())
    free = set(named) - decayed
    assert {name.rsplit(".", 1)[-1] for name in free} >= {"bias", "scale", "log_variances"}
    assert {"logit_scale.scale", "alignment.temperature.scale", "loss_weights.log_variances"} <= free
    assert any(".gate." in name for name in free)
    assert all(named[name].dim() > 1 for name in decayed) and len(decayed) > 50


def test_the_same_seed_gives_the_same_weights(tmp_path):
    weights = []
    for name in ("one", "two"):
        result = train(
            recipe(tmp_path / name, training={"num_train_epochs": 1}),
            color_rows(16),
            color_rows(6),
            write=quiet,
            export=False,
        )
        weights.append(result["model"].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_early_stopping_ends_a_run_that_no_longer_improves(tmp_path):
    result = train(
        recipe(tmp_path, training={"num_train_epochs": 20, "learning_rate": 0.0}, early_stopping_patience=2),
        color_rows(8), color_rows(6), write=quiet, export=False,
    )  # fmt: skip
    assert result["epochs"] <= 4


def test_an_output_folder_of_another_run_is_refused(tmp_path, trained):
    train(recipe(tmp_path, training={"num_train_epochs": 1}), color_rows(8), color_rows(6), write=quiet, export=False)
    with pytest.raises(ValueError, match="holds a run with another seed"):
        train(recipe(tmp_path, seed=7, training={"num_train_epochs": 1}), color_rows(8), color_rows(6), write=quiet)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        train(recipe(file), color_rows(8), color_rows(6), write=quiet)


def test_a_folder_that_another_run_is_at_work_in_is_refused_and_left_as_it_is(tmp_path):
    one = recipe(tmp_path / "run", training={"num_train_epochs": 1})
    with at_work_in(tmp_path / "run") as other:
        unfinished = tmp_path / "run" / ".unfinished"
        unfinished.mkdir(parents=True)
        with pytest.raises(FolderTaken, match="another run is at work in .*run'. Wait until it has ended"):
            train(one, color_rows(8), color_rows(6), fresh=True, write=quiet, export=False)
        assert unfinished.is_dir()
        other.kill()
        other.wait()
        # Within a run a folder may be entered again, and is still held after that.
        with alone_in(tmp_path / "run"):
            train(one, color_rows(8), color_rows(6), write=quiet, export=False)
            with alone_in(tmp_path / "run"):
                pass
            probe = (
                f"from crossmodal.training.processes import alone_in\nwith alone_in({str(tmp_path / 'run')!r}): pass"
            )
            tried = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
            assert tried.returncode and "FolderTaken" in tried.stderr
    assert not list(tmp_path.glob(".*.lock"))
    with at_work_in(tmp_path / "run"):
        pass


def test_answers_outside_the_vocabulary_are_refused_before_training(tmp_path):
    rows = color_rows(12)
    with pytest.raises(ValueError, match="outside the model's 2 answers"):
        train(recipe(tmp_path), rows.filter(lambda row: row["answer"] != "blue"), rows, write=quiet)


def test_a_full_disk_leaves_no_half_written_model(tmp_path, monkeypatch):
    processor, model = tiny_processor_and_model()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_folder(model, processor, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_the_config_last(tmp_path, monkeypatch):
    processor, model = tiny_processor_and_model()
    export_folder(model, processor, tmp_path)
    moved, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), real(a, b)))
    export_folder(model, processor, tmp_path)
    assert moved[-1] == "config.json" and "model.safetensors" in moved


def test_a_warm_up_is_taken_over_and_not_repeated(tmp_path):
    color_rows(24).to_parquet(tmp_path / "other.parquet")
    two = color_rows(24).filter(lambda row: row["answer"] != "blue")
    warm_up = {"dataset": str(tmp_path / "other.parquet"), "training": {"num_train_epochs": 6, "learning_rate": 3e-3}}
    changes = {"warm_up": [warm_up], "training": {"num_train_epochs": 1, "learning_rate": 0.0}}
    lines = []
    result = train(recipe(tmp_path / "run", **changes), two, two, write=lines.append, export=False)
    assert any("warm-up 1 of 1: 24 rows" in line and "3 labels" in line for line in lines)
    # Nothing was learnt after the warm-up, and the answers that both share were kept.
    assert set(result["model"].config.label2id) == {"red", "green"} and result["metrics"]["accuracy"] == 1.0
    again = []
    resumed = train(recipe(tmp_path / "run", **changes), two, two, write=again.append)
    assert any("finished earlier" in line for line in again)
    assert resumed["resumed"] and not result["resumed"]
    assert "minutes since it was last resumed" in (tmp_path / "run" / "README.md").read_text()


def test_a_stage_may_train_a_model_of_its_own_of_which_the_run_keeps_an_encoder(tmp_path):
    color_rows(24).to_parquet(tmp_path / "other.parquet")
    own = {"modalities": ["vision"], "config": {"fusion_type": "concat"}, "keep": ["vision"], "freeze": []}
    warm_up = {"dataset": str(tmp_path / "other.parquet"), "training": {"num_train_epochs": 1}} | own
    plain = recipe(tmp_path / "run", training={"num_train_epochs": 1, "learning_rate": 0.0})
    changes = {"warm_up": [warm_up], "model": plain.model | {"freeze": ["vision"]}, "training": plain.training}
    result = train(recipe(tmp_path / "run", **changes), color_rows(24), color_rows(24), export=False)
    model = result["model"]
    assert model.config.modality_names == ["vision", "text"] and model.config.fusion_type == "cross"
    assert model.config.frozen_modalities == ["vision"] and result["trainable_parameters"] < result["parameters"]
    stage = tmp_path / "run" / "checkpoints" / "warm_up" / "stage-1-done"
    kept = type(model).from_pretrained(stage)
    assert kept.config.modality_names == ["vision"] and kept.config.fusion_type == "concat"
    for name, value in kept.crossmodal.encoders["vision"].state_dict().items():
        assert torch.equal(value, model.crossmodal.encoders["vision"].state_dict()[name]), name


def test_a_run_keeps_the_fusion_that_a_stage_of_another_task_has_trained(tmp_path):
    rows = color_rows(24)
    pairs = Dataset.from_dict({"image": list(rows["image"]), "caption": list(rows["answer"])})
    pairs.cast_column("image", Image()).to_parquet(tmp_path / "pairs.parquet")
    warm_up = {"task": "retrieval", "dataset": str(tmp_path / "pairs.parquet"), "config": {"projection_dim": 16}}
    warm_up |= {"keep": ["vision", "text", "fusion"], "training": {"num_train_epochs": 1}}
    changes = {"warm_up": [warm_up], "training": {"num_train_epochs": 1, "learning_rate": 0.0}}
    model = train(recipe(tmp_path / "run", **changes), rows, rows, export=False)["model"]
    stage = CrossModalForRetrieval.from_pretrained(tmp_path / "run" / "checkpoints" / "warm_up" / "stage-1-done")
    fresh = train(recipe(tmp_path / "fresh", training=changes["training"]), rows, rows, export=False)["model"]
    kept, learnt, other = (dict(one.crossmodal.named_parameters()) for one in (model, stage, fresh))
    torch.testing.assert_close(kept, learnt, rtol=0, atol=0)
    assert any("cross_attn" in name and not torch.equal(kept[name], other[name]) for name in kept)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"modalities": ["vision"]}, ["modalities", "keep"]),
        ({"modalities": ["vison"], "keep": ["vision"]}, ["vison", "['vision', 'text']"]),
        ({"keep": ["visoin"]}, ["visoin", "fusion", "vision"]),
        ({"keep": ["head"]}, ["head", "fusion", "vision"]),
        ({"keep": "vision"}, ["'vision'", "no list"]),
        ({"config": {"gate": "none"}, "keep": ["fusion"]}, ["keep", "'fusion'", "vision"]),
        ({"modalities": ["vision"], "keep": ["text"]}, ["keep", "'text'", "['vision']"]),
        ({"freeze": ["visoin"]}, ["freeze", "visoin", "vision"]),
        ({"dataset": None}, ["dataset"]),
        ({"kepe": ["vision"]}, ["kepe", "keep"]),
        ({"task": "capitoning"}, ["capitoning", "captioning"]),
        ({"task": "captioning"}, ["trains a model of its own", "modalities: [vision]"]),
    ],
)
def test_a_stage_that_cannot_be_is_refused_with_what_is_expected(tmp_path, own, words):
    warm_up = {"dataset": "drawn:shapes", "training": {"max_steps": 1}} | own
    with pytest.raises(ValueError) as error:
        recipe(tmp_path / "run", warm_up=[warm_up])
    for word in words:
        assert word in str(error.value)


def test_a_stage_of_a_preset_may_train_one_of_its_modalities(tmp_path):
    color_rows(24).to_parquet(tmp_path / "other.parquet")
    own = {"modalities": ["vision"], "config": {"fusion_type": "concat"}, "keep": ["vision"]}
    warm_up = {"dataset": str(tmp_path / "other.parquet"), "training": {"max_steps": 1}} | own
    model, training = {"preset": "tiny", "freeze": ["text"]}, {"max_steps": 1}
    rates = {"text": 1e-4, "vision": 1e-4}
    run = recipe(tmp_path / "run", model=model, warm_up=[warm_up], training=training, learning_rates=rates)
    trained = train(run, color_rows(24), color_rows(24), export=False)["model"]
    assert trained.config.modality_names == ["vision", "text"] and trained.config.frozen_modalities == ["text"]


def test_the_checkpoint_is_chosen_on_rows_held_out_of_training(tmp_path):
    lines = []
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    run = recipe(tmp_path / "run", training={"num_train_epochs": 2, **workers}, holdout=0.3)
    rows = color_rows(60)
    result = train(run, rows, color_rows(12), write=lines.append)
    kept, held = hold_out(rows, "vqa", 0.3)
    assert len(kept) + len(held) == 60 and 0 < len(held) < 40
    assert f"{len(kept)} training and 12 evaluation rows" in "".join(lines)
    assert result["eval_rows"] == 12 and result["chosen_on"] == f"{len(held)} held-out training rows"
    assert f"chosen on {len(held)} held-out training rows" in (tmp_path / "run" / "README.md").read_text()
    # Every epoch was scored on the rows held out, the end on the others.
    chosen = [entry["eval_accuracy"] * len(held) for entry in result["log"] if "eval_accuracy" in entry][:2]
    assert all(value == pytest.approx(round(value)) for value in chosen)


def test_rows_that_belong_together_are_held_out_together():
    rows = Dataset.from_dict(
        {"image": [None] * 40, "sentence": ["s"] * 40, "label": [True, False] * 20}
        | {"identifier": [f"{i // 4}-{i % 4}" for i in range(40)]}
    )
    kept, held = hold_out(rows, "vqa", 0.4)
    groups = [{name.split("-")[0] for name in part["identifier"]} for part in (kept, held)]
    assert groups[0] and groups[1] and not groups[0] & groups[1]
    assert hold_out(rows.shuffle(seed=1), "vqa", 0.4)[1].num_rows == held.num_rows
    with pytest.raises(ValueError, match="leaves 40 to train on and 0"):
        hold_out(rows, "vqa", 1e-9)


def test_a_model_without_text_trains_without_a_tokenizer(tmp_path):
    plain = recipe(tmp_path / "run")
    images = {"vision": plain.model["encoders"]["vision"]}
    changes = {"model": plain.model | {"encoders": images}, "processor": {"image_size": [32, 32]}}
    result = train(recipe(tmp_path / "run", training={"max_steps": 2}, **changes), color_rows(24), color_rows(24))
    assert not result["processor"].tokenizer and result["metrics"]["accuracy"] >= 0
    from transformers import AutoProcessor

    loaded = AutoProcessor.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert not loaded.tokenizer and "pixel_values" in loaded(images=color_rows(24)[0]["image"])


def test_other_answers_keep_what_was_learnt_of_shared_ones():
    _, model = tiny_processor_and_model()
    before = model.classifier.out_proj.weight[model.config.label2id["blue"]].clone()
    model.resize_answers({0: "mauve", 1: "blue"})
    assert model.config.num_labels == 2 and model.config.label2id == {"mauve": 0, "blue": 1}
    assert torch.equal(model.classifier.out_proj.weight[1], before)


def test_rows_with_many_true_answers_are_scored(tmp_path):
    task = VQATask.from_targets([{"1 red": 1.0, "2 red": 1.0}, {"1 blue": 1.0}])
    scores = task.score_answers(["2 red", "1 red"], [{"1 red": 1.0, "2 red": 1.0}, {"1 blue": 1.0}])
    assert scores == {"accuracy": 0.5, "vqa_accuracy": 0.5}
    assert task.majority([{"1 red": 1.0}] * 2, [{"1 red": 1.0}])["accuracy"] == 1.0


def test_what_was_learnt_is_not_what_is_measured(tmp_path):
    color_rows(24).to_parquet(tmp_path / "rows.parquet")
    values = copy.deepcopy(TINY_RECIPE) | {
        "dataset": str(tmp_path / "rows.parquet"),
        "output_dir": str(tmp_path / "m"),
    }
    values["eval_split"] = "train"
    for split in ("train", "validation+train"):
        with pytest.raises(ValueError, match="measured on what it learnt. Set holdout"):
            train(Recipe(**values | {"train_split": split}, name="m"), write=lambda line: None)
    result = train(Recipe(**values | {"holdout": 0.4}, name="m"), write=lambda line: None)
    assert 0 < result["eval_rows"] < 24 and result["eval_rows"] % 2 == 0


def test_seeds_are_trained_once_each_and_summed_up(tmp_path):
    values = copy.deepcopy(TINY_RECIPE) | {"dataset": "colors", "output_dir": str(tmp_path)}
    recipe, said = Recipe(**values, name="colors"), []
    found = train_seeds(recipe, 2, color_rows(24), color_rows(12), write=said.append)
    scores = [run["metrics"]["accuracy"] for run in found["runs"]]
    assert found["seeds"] == [42, 43] and found["metrics"]["accuracy"] == pytest.approx(sum(scores) / 2)
    assert found["deviation"]["accuracy"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    table = seeds_table(recipe, found)
    assert list(table) == ["this model, mean of 2", "this model, deviation", "most common answer"]
    # Finished runs are read, and one of another recipe is not taken for one.
    again = train_seeds(recipe, 2, color_rows(24), color_rows(12), write=said.append)
    assert again["metrics"] == found["metrics"] and said[-1] == "colors, seed 43 was finished earlier."
    other = Recipe(**values | {"holdout": 0.25}, name="colors")
    with pytest.raises(ValueError, match="holds a run with another holdout"):
        train_seeds(other, 1, color_rows(24), color_rows(12), write=said.append)
    assert CrossModalForVQA.from_pretrained(tmp_path / "seed-43").config.num_labels == 3


def test_no_is_a_strategy_in_yaml(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "task: vqa\ndataset: d\noutput_dir: o\nmodel: {preset: tiny}\ntraining: {eval_strategy: no}\n"
    )
    training = Recipe.load(str(tmp_path / "r.yaml"), ["training.save_strategy=no"]).training
    assert training["eval_strategy"] == training["save_strategy"] == "no"
