"""Stages of training on other data before a run, such as the worlds that the project draws itself."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import set_seed

from .building import build, encoders_and_config, said_of
from .checkpoints import last_whole_checkpoint
from .datasets import RowDataset
from .loading import contexts_of, load_rows, some_of
from .processes import on_main
from .tasks import TASKS
from .token_cache import with_cached_tokens
from .trainer import DEFAULTS, component_of, fit


def warm_up(recipe, task, train_dataset, folder, write, shared=None):
    """(model, processor) trained on the stages of `recipe.warm_up`; finished and cut-off stages are taken up again.

    Args:
        recipe: Recipe, whose stages were checked when it was made.
        task, train_dataset: of the run that follows.
        folder: of the stages' checkpoints. write: takes each line of report.
        shared: folder of first stages that train a model of their own: runs whose stage is the same take it from there.
    """
    stages, datasets, tasks = [], [], []
    for own in recipe.warm_up:
        stages.append(stage := stage_of(recipe, own))
        rows = load_rows(stage.dataset, stage.train_split, own.get("rows"))
        rows = some_of(rows, own.get("rows"), recipe.seed)
        contexts = contexts_of(encoders_and_config(stages[-1])[0])
        datasets.append(RowDataset(rows, stage.task, stage.augment, contexts))
        tasks.append(TASKS[stage.task].from_targets(datasets[-1].targets))
    read = [train_dataset, *datasets]

    def task_from(number):
        """Of the first stage from `number` on that trains the model of the run."""
        return next((t for t, s in zip(tasks[number:], stages[number:], strict=True) if s.task == recipe.task), task)

    model, processor = build(recipe, task_from(0), read)
    for number, (stage, own, dataset) in enumerate(zip(stages, recipe.warm_up, datasets, strict=True), 1):
        task_now, task_next = tasks[number - 1], task_from(number)
        done = folder / f"stage-{number}-done"
        if shared is not None and number == 1 and stage.model is not recipe.model:
            done = Path(shared) / _hash_of(stage, own)
            done.parent.mkdir(parents=True, exist_ok=True)
        if on_main(done.is_dir):
            write(f"warm-up {number} of {len(stages)} was finished earlier.")
            model = type(model).from_pretrained(done)
        else:
            write(
                f"warm-up {number} of {len(stages)}: {len(dataset):,} rows of {stage.dataset}, {task_now.describe()}."
            )
            set_seed(recipe.seed)
            trained, reader = (model, processor) if stage.model is recipe.model else build(stage, task_now, read)
            names = trained.config.modality_names
            trained._set_frozen(set(own.get("freeze", recipe.model.get("freeze") or ())) & set(names))
            rates = {key: rate for key, rate in stage.learning_rates.items() if key in (*names, "fusion", "head")}
            stage = replace(stage, learning_rates=rates)
            running = folder / f"stage-{number}"
            training = {**DEFAULTS, **recipe.training, **own.get("training", {})}
            training |= {"eval_strategy": "no", "load_best_model_at_end": False}
            checkpoint, _ = last_whole_checkpoint(running)
            if trained.config.frozen_modalities:
                dataset = with_cached_tokens(stage, trained, reader, {f"stage {number}": dataset}, write)[
                    f"stage {number}"
                ]
            model = fit(trained, reader, task_now, dataset, None, training, running, stage, checkpoint, write).model
            on_main(partial(_keep, model, running / "writing", done))
        # What starts afresh now is the same whether this stage was trained in this process or earlier.
        set_seed(recipe.seed)
        if "keep" in own:
            fresh = build(recipe, task_next, read)[0]
            kept = {n: v for n, v in model.state_dict().items() if component_of(n) in own["keep"]}
            fresh.load_state_dict(kept, strict=False)
            model = fresh
        else:
            if task_next.answers:
                model.resize_answers(**task_next.answers)
    model._set_frozen(set(recipe.model.get("freeze") or ()))
    return model, processor


def stage_of(recipe, own):
    """The recipe of a stage of `recipe.warm_up`."""
    keys = ("task", "dataset", "train_split", "augment", "rows_per_image", "learning_rates")
    # What suits the rows of the run itself (permuting their boxes, say) need not suit these.
    changes = {"augment": None, "rows_per_image": 1} | {key: own[key] for key in keys if key in own}
    stage = replace(recipe, warm_up=[], generation={}, early_stopping_patience=None, **changes)
    return _of_its_own(stage, own) if "modalities" in own or "config" in own else stage


def _keep(model, aside, done):
    """Writes a finished stage aside and renames it: a folder with this name is whole."""
    model.save_pretrained(aside)
    try:
        os.replace(aside, done)
    except OSError:
        # Another run that shares this stage was faster.
        if not done.is_dir():
            raise
        shutil.rmtree(aside)


def _hash_of(stage, own):
    """What a first stage with a model of its own depends on."""
    config = {key: value for key, value in stage.model["config"].items() if value is not None}
    data = {
        key: own[key]
        for key in ("dataset", "rows", "train_split", "augment", "rows_per_image", "freeze")
        if key in own
    }
    learning = (stage.training, own.get("training"), stage.learning_rates)
    parts = (data, learning, stage.model["encoders"], config, stage.processor, stage.seed, stage.task)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _of_its_own(stage, own):
    """The recipe of a stage that trains a model of its own: some of the modalities, another fusion."""
    encoders, config = encoders_and_config(stage)
    encoders = {name: encoders[name] for name in own.get("modalities", encoders)}
    return replace(stage, model={"encoders": encoders, "config": said_of(config, encoders) | own.get("config", {})})
