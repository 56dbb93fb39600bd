"""Runs that were cut off: wherever that was, they end with the weights of one that was not."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from crossmodal.training.checkpoints import is_whole, last_whole_checkpoint
from crossmodal.training.collator import SampleCollator
from crossmodal.training.datasets import RowDataset
from crossmodal.training.recipes import Recipe
from crossmodal.training.tasks import VQATask
from crossmodal.training.train import train
from PIL import Image
from safetensors.torch import load_file
from test_distributed import run_on_two
from transformers import TrainerCallback, TrainingArguments
from world import COLORS, QUESTIONS, TINY_RECIPE, tiny_processor_and_model

from crossmodal import CrossModalTrainer


def box_rows(count=24, seed=0):
    """Rows of easy-VQA's schema with three boxes of different colors in each picture, two questions each."""
    draw, rows = np.random.default_rng(seed), []
    for image_id in range(count // 2):
        colors = draw.permutation(list(COLORS))
        picture = Image.new("RGB", (104, 32))
        for place, color in enumerate(colors):
            picture.paste(COLORS[color], (36 * place, 0, 36 * place + 32, 32))
        rows += [{"image": picture, "image_id": image_id, "question": q, "answer": colors[0]} for q in QUESTIONS]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def values_of(folder, training=None, **changes):
    """A recipe with all that draws at random, which saves often and keeps little."""
    values = copy.deepcopy(TINY_RECIPE) | {"dataset": "rows", "output_dir": str(folder), "name": "tiny"}
    values |= {"augment": "permute_boxes", "rows_per_image": 2, "early_stopping_patience": 20}
    values["model"]["config"] |= {"modality_dropout": 0.3, "hidden_dropout": 0.2}
    values["training"] |= {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_total_limit": 1}
    values["training"] |= {
        f"{what}_{key}": v for what in ("save", "eval") for key, v in (("strategy", "steps"), ("steps", 2))
    }
    values["training"] |= training or {}
    return values | changes


class CutOff(Exception):
    """What a test ends a run with."""


class _CutOffAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise CutOff


def cut_off(monkeypatch, step, *args, **kwargs):
    """Trains until a step, of whichever trainer comes to it first."""
    plain = CrossModalTrainer.__init__

    def with_end(self, *given, **named):
        plain(self, *given, **named)
        self.add_callback(_CutOffAt(step))

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(CrossModalTrainer, "__init__", with_end)
        train(*args, write=lambda line: None, **kwargs)


def weights_of(*args, **kwargs):
    return train(*args, write=lambda line: None, export=False, **kwargs)["model"].state_dict()


def assert_same(found, expected):
    for name, value in expected.items():
        difference = (found[name].float() - value.float()).abs().max().item()
        assert torch.equal(found[name], value), f"{name} differs by up to {difference}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"training": {"gradient_accumulation_steps": 2}}, marks=pytest.mark.slow),
        pytest.param(
            {"rows_per_image": 1, "training": {"train_sampling_strategy": "group_by_length"}}, marks=pytest.mark.slow
        ),
        pytest.param({"training": {"dataloader_num_workers": 1}}, marks=pytest.mark.slow),
        pytest.param(
            {"training": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}}, marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "accumulated", "by length", "a worker", "persistent workers"],
)
def test_a_run_that_was_cut_off_draws_what_it_would_have_drawn(tmp_path, monkeypatch, changes):
    rows = box_rows(24), box_rows(12, seed=1)
    steps = 6 if "gradient_accumulation_steps" in changes.get("training", {}) else 12
    whole = weights_of(Recipe(**values_of(tmp_path / "whole", **changes)), *rows)
    # In the first epoch, at its end, in the second.
    for step in (steps // 3 - 1, steps // 2 + 1, steps - 1):
        cut_off(monkeypatch, step, Recipe(**values_of(tmp_path / "cut", **changes)), *rows)
    assert_same(weights_of(Recipe(**values_of(tmp_path / "cut", **changes)), *rows), whole)


def _written(folder, **changes):
    """Folder of data and file of a recipe that reads it, as the command line takes them."""
    (folder / "data").mkdir()
    box_rows(24).to_parquet(folder / "data" / "train.parquet")
    box_rows(12, seed=1).to_parquet(folder / "data" / "validation.parquet")
    values = values_of(folder / "out", dataset=str(folder / "data"), **changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def _killed(folder, kills, seed, **changes):
    """What killing.py says of a recipe."""
    command = [sys.executable, str(Path(__file__).parent / "killing.py"), str(_written(folder, **changes))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, str(folder), str(kills), str(seed)], env=environment, capture_output=True, text=True, timeout=1800
    )
    logs = "".join((folder / f"{name}.log").read_text()[-2000:] for name in ("whole", "killed") if (folder / f"{name}.log").exists())  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:] + logs
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_by_the_system_ends_with_the_weights_of_one_that_was_not(tmp_path):
    found = _killed(tmp_path, kills=1, seed=0)
    assert found["kills"] >= 1 and found["equal"] == found["runs"] >= 1, found


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    stage = {"dataset": str(tmp_path / "data"), "training": {"max_steps": 4, "save_steps": 2}, "keep": ["vision"]}
    found = _killed(tmp_path, kills=20, seed=1, warm_up=[stage])
    print(found)
    assert found["kills"] >= 20 and found["equal"] == found["runs"] >= 1, found


@pytest.mark.parametrize("step", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 8)), 6])
def test_a_run_cut_off_in_its_stages_ends_as_if_it_were_not(tmp_path, monkeypatch, step):
    box_rows(16, seed=2).to_parquet(tmp_path / "other.parquet")
    stage = {"dataset": str(tmp_path / "other.parquet"), "training": {"max_steps": 4, "save_steps": 2}}
    stages = [
        stage | {"modalities": ["vision"], "config": {"fusion_type": "concat"}, "keep": ["vision"]},
        stage | {"keep": ["text"]},
    ]
    rows, changes = (box_rows(24), box_rows(12, seed=1)), {"warm_up": stages, "training": {"num_train_epochs": 1}}
    whole = weights_of(Recipe(**values_of(tmp_path / "whole", **changes)), *rows)
    # Steps of the first stage, the second, and the run itself: every trainer counts its own.
    plain, count = CrossModalTrainer.training_step, []

    def counted(self, *args, **kwargs):
        count.append(1)
        if len(count) == step + 1:
            raise CutOff
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(CrossModalTrainer, "training_step", counted)
        train(Recipe(**values_of(tmp_path / "cut", **changes)), *rows, write=lambda line: None)
    assert_same(weights_of(Recipe(**values_of(tmp_path / "cut", **changes)), *rows), whole)


def test_early_stopping_has_waited_as_long_as_before_it_was_cut_off(tmp_path, monkeypatch):
    def recipe(name):
        training = {"num_train_epochs": 8, "learning_rate": 0.0, "save_steps": 3, "eval_steps": 3}
        # The last one stays beside the best.
        training["save_total_limit"] = 2
        return Recipe(**values_of(tmp_path / name, early_stopping_patience=3, training=training))

    rows = box_rows(24), box_rows(12, seed=1)

    def steps(found):
        return max(entry["step"] for entry in found["log"])

    whole = train(recipe("whole"), *rows, write=lambda line: None, export=False)
    # The first evaluation is the best, three more without progress.
    assert steps(whole) == 12
    cut_off(monkeypatch, 8, recipe("cut"), *rows)
    found = train(recipe("cut"), *rows, write=lambda line: None, export=False)
    assert steps(found) == 12
    # Killed after it was stopped, and before it was exported: nothing is left to train.
    trained = []
    monkeypatch.setattr(CrossModalTrainer, "training_step", lambda *args, **kwargs: trained.append(args))
    again = train(recipe("cut"), *rows, write=lambda line: None, export=False)
    assert not trained and steps(again) == 12
    assert_same(again["model"].state_dict(), whole["model"].state_dict())


@pytest.mark.slow
def test_a_run_goes_on_in_a_folder_that_was_moved(tmp_path, monkeypatch):
    rows = box_rows(24), box_rows(12, seed=1)
    whole = weights_of(Recipe(**values_of(tmp_path / "whole")), *rows)
    cut_off(monkeypatch, 5, Recipe(**values_of(tmp_path / "cut")), *rows)
    (tmp_path / "cut").rename(tmp_path / "elsewhere")
    assert_same(weights_of(Recipe(**values_of(tmp_path / "elsewhere")), *rows), whole)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Folder of the checkpoints 2 and 4 of a run."""
    values = values_of(tmp_path / "run", training={"save_total_limit": None})
    cut_off(monkeypatch, 5, Recipe(**values), box_rows(24), box_rows(12, seed=1))
    return tmp_path / "run" / "checkpoints"


def test_a_checkpoint_that_lacks_any_of_its_files_or_the_end_of_one_is_never_taken(saved):
    newest = saved / "checkpoint-4"
    files = [path for path in newest.iterdir() if path.stat().st_size]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {path.name for path in files}
    assert is_whole(newest)
    for path in files:
        content = path.read_bytes()
        for part in (content[: len(content) // 2], content[:-2], None):
            path.unlink()
            if part is not None:
                path.write_bytes(part)
            assert not is_whole(newest), f"{path.name} cut to {part and len(part)} bytes"
            path.write_bytes(content)
    (newest / "optimizer.pt").unlink()
    assert last_whole_checkpoint(saved) == (saved / "checkpoint-2", ["checkpoint-4"])
    assert not newest.exists()


def test_a_checkpoint_of_an_earlier_release_is_whole_if_it_has_all_that_is_needed(saved):
    state = saved / "checkpoint-4" / "trainer_state.json"
    values = json.loads(state.read_text())
    for name in ("CheckpointContents", "BrokenSamples"):
        del values["stateful_callbacks"][name]
    state.write_text(json.dumps(values))
    assert is_whole(saved / "checkpoint-4")
    train(Recipe(**values_of(saved.parent, training={"save_total_limit": None})), box_rows(24), box_rows(12, seed=1), write=lambda line: None)  # fmt: skip
    assert is_whole(saved / "checkpoint-12")
    (saved / "checkpoint-4" / "rng_state.pth").unlink()
    assert not is_whole(saved / "checkpoint-4")


def _full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def _full_archive(*args, **kwargs):
    # What torch 2.13 says on a full disk.
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize(
    ("place", "full"),
    [
        ("torch.save", _full_archive),
        pytest.param("transformers.modeling_utils.safe_save_file", _full, marks=pytest.mark.slow),
        pytest.param("transformers.trainer_callback.TrainerState.save_to_json", _full, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_keeps_the_last_whole_checkpoint_and_says_so_in_one_line(tmp_path, monkeypatch, place, full):
    rows = box_rows(24), box_rows(12, seed=1)
    cut_off(monkeypatch, 5, Recipe(**values_of(tmp_path / "run")), *rows)
    kept = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints" / "checkpoint-4").iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(place, full)
        train(Recipe(**values_of(tmp_path / "run")), *rows, write=lambda line: None)
    message = str(error.value)
    assert "no room on the disk for checkpoint-6" in message and "checkpoint-4 is kept: make room" in message
    assert "\n" not in message and not (tmp_path / "run" / "checkpoints" / "checkpoint-6").exists()
    assert kept == {path: path.read_bytes() for path in kept}
    # With room, the same command ends as if nothing had been.
    whole = weights_of(Recipe(**values_of(tmp_path / "whole")), *rows)
    assert_same(weights_of(Recipe(**values_of(tmp_path / "run")), *rows), whole)


def test_an_error_that_is_none_of_a_full_disk_is_not_taken_for_one(tmp_path, monkeypatch):
    def fault(*args, **kwargs):
        raise RuntimeError("a fault")

    monkeypatch.setattr("torch.save", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        train(Recipe(**values_of(tmp_path / "run")), box_rows(24), box_rows(12, seed=1), write=lambda line: None)


_RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from crossmodal.training.checkpoints import last_whole_checkpoint
from crossmodal.training.collator import SampleCollator
from crossmodal.training.datasets import RowDataset
from crossmodal.training.tasks import VQATask
from transformers import TrainingArguments
from test_resume import CutOff, _CutOffAt, box_rows
from world import tiny_processor_and_model
from crossmodal import CrossModalTrainer

weights, folder = [], Path(sys.argv[2])
for name, cuts in (("whole", []), ("cut", [2, 5])):
    for cut in [*cuts, None]:
        torch.manual_seed(0)
        processor, model = tiny_processor_and_model(modality_dropout=0.3)
        arguments = TrainingArguments(
            f"{folder}-{name}", per_device_train_batch_size=int(sys.argv[3]), num_train_epochs=2, save_steps=1, use_cpu=True,
            remove_unused_columns=False, disable_tqdm=True, report_to="none", ddp_find_unused_parameters=True,
        )
        collator = SampleCollator(processor, VQATask.from_config(model.config).encode_targets)
        trainer = CrossModalTrainer(model=model, args=arguments, data_collator=collator, rows_per_image=2,
                                    train_dataset=RowDataset(box_rows(24), "vqa", "permute_boxes"))
        if cut is not None:
            trainer.add_callback(_CutOffAt(cut))
        last = last_whole_checkpoint(f"{folder}-{name}")[0]
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except CutOff:
            assert trainer.state.global_step == cut
    weights.append(model.state_dict())
if trainer.is_world_process_zero():
    torch.save(weights, folder)
"""


@pytest.mark.slow
def test_two_ranks_that_were_cut_off_end_with_the_same_weights(tmp_path):
    whole, cut = run_on_two(_RANKS, tmp_path / "out", 4)
    assert_same(cut, whole)
    names = {path.name for path in (tmp_path / "out-cut" / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names and is_whole(tmp_path / "out-cut" / "checkpoint-6")


@pytest.mark.parametrize("best", [True, False], ids=["the best", "the last"])
def test_weights_that_files_call_otherwise_are_loaded_too(tmp_path, best):
    def trainer(model, processor, steps):
        arguments = TrainingArguments(
            str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=steps, save_steps=1, use_cpu=True, report_to="none",
            remove_unused_columns=False, disable_tqdm=True, learning_rate=1e-2, load_best_model_at_end=best,
            eval_strategy="steps" if best else "no", eval_steps=1, metric_for_best_model="loss", greater_is_better=True,
        )  # fmt: skip
        collator = SampleCollator(processor, VQATask.from_config(model.config).encode_targets)
        samples = RowDataset(box_rows(12), "vqa")
        return CrossModalTrainer(
            model=model, args=arguments, data_collator=collator, train_dataset=samples, eval_dataset=samples
        )

    processor, model = tiny_processor_and_model()
    trained = trainer(model, processor, 3)
    trained.train()
    place = trained.state.best_model_checkpoint if best else str(tmp_path / "run" / "checkpoint-3")
    stored = type(model).from_pretrained(place).state_dict()
    # The attention of ViT.
    assert any(
        ".vision.layers.0.attention." in name for name in set(stored) - set(load_file(f"{place}/model.safetensors"))
    )
    if not best:
        model = tiny_processor_and_model()[1]
        trainer(model, processor, 3).train(resume_from_checkpoint=True)
    assert_same(model.state_dict(), stored)
    with pytest.raises(ValueError, match="lacks the weights .* it is of another model"):
        trainer(tiny_processor_and_model(num_labels=3, pooled_features=True)[1], processor, 4)._load_weights(place)
