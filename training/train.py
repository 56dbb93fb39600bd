"""A recipe to a trained model in a whole Hub folder."""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import yaml
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback

from ..modeling import modeling_crossmodal
from ..modeling.configuration_crossmodal import _as_config
from ..processing.processing_crossmodal import CrossModalProcessor
from .collator import SampleCollator
from .datasets import RowDataset, load_rows
from .publish import export_folder, remove_unfinished
from .tasks import TASKS
from .trainer import CrossModalTrainer, EpochReport, QuietProgress, component_of, last_whole_checkpoint


def train_tokenizer(texts, vocab_size=2000):
    """A lower-casing WordPiece tokenizer with BERT's special tokens, trained on texts. For worlds small enough."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _texts(datasets):
    columns = (dataset.rows[dataset.adapter.inputs["text"]] for dataset in datasets)
    return [text for text in dict.fromkeys(text for column in columns for text in column) if text]


def build(recipe, task, datasets):
    """(model, processor) of a recipe. `task` says the labels; a tokenizer may be trained on the texts of `datasets`."""
    options = dict(recipe.model.get("config") or {}) | task.answers | {"label2id": task.label2id}
    if recipe.model.get("preset"):
        from ..configs import load_preset

        preset = load_preset(recipe.model["preset"])
        encoders, options = preset.pop("modalities"), preset | options
    else:
        encoders = recipe.model["encoders"]
    encoders = {name: dict(v) if isinstance(v, dict) else {"model": v} for name, v in encoders.items()}
    for name, entry in encoders.items():
        if "model_type" in entry:
            encoders[name] = {"model": entry}
        elif "config" in entry:
            entry["model"] = entry.pop("config")
    sources = {name: entry["model"] for name, entry in encoders.items() if isinstance(entry["model"], str)}
    tokenizer = _tokenizer(recipe, sources, datasets)
    for name, entry in encoders.items():
        if isinstance(entry["model"], dict):
            made = _as_config(name, entry["model"])
            if hasattr(made, "vocab_size") and tokenizer is not None:
                made.vocab_size, made.pad_token_id = len(tokenizer), tokenizer.pad_token_id
            entry["model"] = made
    model = getattr(modeling_crossmodal, task.model_class).from_encoders(
        freeze=tuple(recipe.model.get("freeze") or ()), **encoders, **options
    )
    return model, _processor(recipe, model.config, sources, tokenizer)


def _tokenizer(recipe, sources, datasets):
    source = recipe.processor.get("tokenizer") or sources.get("text")
    if source == "train":
        return train_tokenizer(_texts(datasets), recipe.processor.get("vocab_size", 2000))
    return AutoTokenizer.from_pretrained(source) if source else None


def _processor(recipe, config, sources, tokenizer):
    image_processor = None
    size = recipe.processor.get("image_size")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image_processor = ViTImageProcessorPil(size={"height": height, "width": width})
    elif "vision" in sources:
        image_processor = AutoImageProcessor.from_pretrained(sources["vision"])
    return CrossModalProcessor.from_config(config, image_processor=image_processor, tokenizer=tokenizer)


def train(recipe, train_rows=None, eval_rows=None, fresh=False, write=print, export=True):
    """Runs a recipe.

    Args:
        recipe: Recipe.
        train_rows, eval_rows: rows to use instead of `recipe.dataset`.
        fresh: discard an earlier run in `recipe.output_dir`.
        write: takes each line of report.
        export: write the Hub folder (off for baselines that are only measured).

    Returns:
        dict with `metrics` on the evaluation split, `majority`, `model`, `processor`, `minutes`, `parameters`.

    Raises:
        ValueError: for data, models or folders that do not fit, before training starts.
    """
    started = time.time()
    output = Path(recipe.output_dir)
    checkpoint = _claim_folder(recipe, output, fresh, write)
    set_seed(recipe.seed)
    train_dataset = _split(recipe, train_rows, recipe.train_split, recipe.max_train_rows, recipe.augment)
    eval_dataset = _split(recipe, eval_rows, recipe.eval_split, recipe.max_eval_rows)
    task = TASKS[recipe.task].from_targets(train_dataset.targets, recipe.min_answer_count)
    task.check_targets(eval_dataset.targets)
    if recipe.warm_up:
        model, processor = _warm_up(recipe, task, train_dataset, output / "checkpoints" / "warm_up", write)
    else:
        model, processor = build(recipe, task, [train_dataset])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    write(
        f"{recipe.name}: {len(train_dataset):,} training and {len(eval_dataset):,} evaluation rows, "
        f"{len(task.id2label)} labels; {trainable:,} of {total:,} parameters are trained."
    )
    trainer = _fit(
        model,
        processor,
        task,
        train_dataset,
        eval_dataset,
        {**_DEFAULTS, "metric_for_best_model": task.main_metric, **recipe.training},
        output / "checkpoints",
        recipe,
        checkpoint,
        write,
    )
    metrics = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    metrics = {key: value for key, value in metrics.items() if key in ("loss", "accuracy", "vqa_accuracy")}
    result = {
        "metrics": metrics,
        "majority": task.majority(train_dataset.targets, eval_dataset.targets),
        "parameters": total,
        "trainable_parameters": trainable,
        "minutes": (time.time() - started) / 60,
        "seed": recipe.seed,
        "epochs": trainer.state.epoch,
        "eval_rows": len(eval_dataset),
    }
    if export and trainer.is_world_process_zero():
        export_folder(trainer.model, processor, output, recipe=recipe, result=result)
    return result | {"model": trainer.model, "processor": processor, "log": trainer.state.log_history}


def _fit(model, processor, task, train_dataset, eval_dataset, training, folder, recipe, checkpoint, write):
    """Trains a model in place, from a checkpoint on if there is one. Returns the trainer."""
    callbacks = [EpochReport(task.main_metric, write)]
    if recipe.early_stopping_patience is not None and eval_dataset is not None:
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping_patience))
    trainer = CrossModalTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), seed=recipe.seed, remove_unused_columns=False, **training),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=SampleCollator(processor, task.encode_targets),
        processing_class=processor,
        compute_metrics=lambda prediction: task.score(prediction.predictions, eval_dataset.targets),
        callbacks=callbacks,
        learning_rates=recipe.learning_rates,
        rows_per_image=recipe.rows_per_image,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress())
    if checkpoint is not None:
        write(f"resuming from {checkpoint.name}.")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def _warm_up(recipe, task, train_dataset, folder, write):
    """(model, processor) trained on the stages of `recipe.warm_up`; finished and cut-off stages are taken up again."""
    stages = []
    for own in recipe.warm_up:
        keys = ("dataset", "train_split", "augment", "rows_per_image", "learning_rates")
        # What suits the rows of the run itself (permuting their boxes, say) need not suit these.
        changes = {"augment": None, "rows_per_image": 1} | {key: own[key] for key in keys if key in own}
        stage = replace(recipe, warm_up=[], early_stopping_patience=None, **changes)
        rows = load_rows(stage.dataset, stage.train_split, own.get("rows"))
        stages.append((stage, own, _split(stage, rows, stage.train_split, own.get("rows"), stage.augment)))
    tasks = [TASKS[recipe.task].from_targets(dataset.targets) for _, _, dataset in stages] + [task]
    datasets = [train_dataset, *(dataset for _, _, dataset in stages)]
    model, processor = build(recipe, tasks[0], datasets)
    for number, (stage, own, dataset) in enumerate(stages, 1):
        done = folder / f"stage-{number}-done"
        if done.is_dir():
            write(f"warm-up {number} of {len(stages)} was finished earlier.")
            model = type(model).from_pretrained(done)
        else:
            labels = len(tasks[number - 1].id2label)
            write(f"warm-up {number} of {len(stages)}: {len(dataset):,} rows of {stage.dataset}, {labels} labels.")
            if "modalities" in own or "config" in own:
                trained, reader = build(_of_its_own(stage, own), tasks[number - 1], datasets)
            else:
                trained, reader = model, processor
            trained._set_frozen(set(trained._known(own.get("freeze", recipe.model.get("freeze") or ()))))
            running = folder / f"stage-{number}"
            checkpoint, _ = last_whole_checkpoint(running)
            training = {**_DEFAULTS, **recipe.training, **own.get("training", {})}
            training |= {"eval_strategy": "no", "load_best_model_at_end": False}
            model = _fit(
                trained, reader, tasks[number - 1], dataset, None, training, running, stage, checkpoint, write
            ).model
            # Written aside and renamed: a folder with this name is whole.
            model.save_pretrained(running / "writing")
            os.replace(running / "writing", done)
        if "keep" in own:
            fresh = build(recipe, tasks[number], datasets)[0]
            _take_over(fresh, model, own["keep"])
            model = fresh
        else:
            model.resize_answers(**tasks[number].answers)
    model._set_frozen(set(recipe.model.get("freeze") or ()))
    return model, processor


def _of_its_own(stage, own):
    """The recipe of a stage that trains a model of its own: some of the modalities, another fusion."""
    model = dict(stage.model)
    if "modalities" in own:
        encoders = stage.model.get("encoders") or {}
        unknown = [name for name in own["modalities"] if name not in encoders]
        if unknown:
            raise ValueError(f"warm_up: modalities has {unknown[0]!r}. Expected any of {sorted(encoders)}.")
        model["encoders"] = {name: encoders[name] for name in own["modalities"]}
    model["config"] = {**(stage.model.get("config") or {}), **own.get("config", {})}
    model["freeze"] = []
    return replace(stage, model=model)


def _take_over(model, trained, components):
    """Copies the weights of components (see `component_of`) from one model to another of the same recipe, in place."""
    known = {component_of(name) for name in model.state_dict()}
    for component in components:
        if component not in known:
            raise ValueError(f"warm_up: keep has {component!r}. Expected any of {sorted(known)}.")
    state = {name: value for name, value in trained.state_dict().items() if component_of(name) in components}
    model.load_state_dict(state, strict=False)


_DEFAULTS = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "logging_steps": 50,
    "lr_scheduler_type": "cosine",
    "report_to": "none",
    # Else it follows the verbosity of the logs, which the command line turns down.
    "disable_tqdm": False,
}


def _split(recipe, rows, split, limit, augment=None):
    rows = load_rows(recipe.dataset, split) if rows is None else rows
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=recipe.seed).select(range(limit))
    return RowDataset(rows, recipe.task, augment)


def _claim_folder(recipe, output, fresh, write):
    """Makes `output` this recipe's own. Returns the checkpoint to resume from, or None."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir={str(output)!r} is a file. Give a folder.")
    checkpoints, stamp = output / "checkpoints", output / "checkpoints" / "recipe.json"
    remove_unfinished(output, write)
    wanted = json.loads(json.dumps(asdict(recipe)))
    # A path says where a run lies, not what it is.
    wanted.pop("output_dir")
    if fresh:
        import shutil

        shutil.rmtree(checkpoints, ignore_errors=True)
    elif stamp.exists():
        earlier = json.loads(stamp.read_text())
        different = sorted(key for key in wanted.keys() | earlier.keys() if wanted.get(key) != earlier.get(key))
        if different:
            raise ValueError(
                f"output_dir={str(output)!r} holds a run with another {', '.join(different)} (for example "
                f"{different[0]}: {earlier.get(different[0])!r}, now {wanted.get(different[0])!r}). Choose another "
                "output_dir, or pass --fresh to discard that run."
            )
        checkpoint, broken = last_whole_checkpoint(checkpoints)
        for name in broken:
            write(f"{name} was cut off while it was saved: ignored and removed.")
        return checkpoint
    elif any(output.glob("*.safetensors")):
        raise ValueError(
            f"output_dir={str(output)!r} holds a model already. Choose another, or pass --fresh to replace it."
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(wanted, indent=1))
    return None


def recipe_text(recipe):
    """The recipe as published: without the paths of this machine."""
    values = {key: value for key, value in asdict(recipe).items() if value not in (None, {}, "")}
    for key in ("dataset", "output_dir", "name"):
        values[key] = (
            Path(str(values.get(key, ""))).name if Path(str(values.get(key, ""))).exists() else values.get(key)
        )
    return yaml.safe_dump(values, sort_keys=False)
