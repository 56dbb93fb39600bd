"""A recipe to a trained model in a whole Hub folder."""

import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets import IterableDataset
from transformers import set_seed
from transformers.trainer_utils import has_length

from .building import build, encoders_and_config
from .checkpoints import last_whole_checkpoint, write_whole
from .console import load_config
from .datasets import BrokenSample, RowDataset
from .hub import publish
from .loading import contexts_of, cut_recordings, hold_out, load_rows, some_of
from .lora import add_lora, describe, merged, save_adapter
from .plots import learning_curves_plot
from .points import labels_table, pseudo_labelled, second_stage
from .processes import alone_in, begin, is_main, on_main
from .publish import export_folder, remove_unfinished
from .recipes import Recipe
from .retrieval import fill_query_bank
from .statistics import standardised_shortcuts, take_statistics
from .streaming import STATISTICS_ROWS, StreamedRows, read_whole, steps_instead_of_epochs
from .task import OpenTask
from .tasks import TASKS
from .token_cache import with_cached_tokens
from .trainer import DEFAULTS, fit, score
from .warm_up import warm_up


# What a model reached before one that learns from its pseudo-labels.
_FIRST_STAGE = "first stage"


def train(recipe, train_rows=None, eval_rows=None, fresh=False, write=print, export=True, warm_up_folder=None):
    """Runs a recipe.

    Args:
        recipe: Recipe.
        train_rows, eval_rows: rows to use instead of `recipe.dataset`; train_rows may be a `datasets.IterableDataset`.
        fresh: discard an earlier run in `recipe.output_dir`.
        write: takes each line of report.
        export: write the Hub folder (off for baselines that are only measured).
        warm_up_folder: of finished stages of `warm_up` that several runs share; None keeps them with the run.

    Returns:
        dict with `metrics` on the evaluation split, `majority`, `baselines`, `model`, `processor`, `minutes` (of this call alone, where it
        `resumed` an earlier one), `parameters`, `broken_samples`, the number of those left out.

    Raises:
        ValueError: for data, models or folders that do not fit, before training starts; `FolderTaken` for a folder that another run
            is at work in.
    """
    learnt = recipe.train_split.split("+")
    measured_on_held_out = eval_rows is None and not {recipe.eval_split, *recipe.eval_split.split("+")}.isdisjoint(
        learnt
    )
    if measured_on_held_out and not recipe.holdout:
        raise ValueError(
            f"eval_split={recipe.eval_split!r} is part of train_split={recipe.train_split!r}: the model would be measured on what it "
            "learnt. Set holdout, whose rows are then what is measured, or use `crossmodal cross-validate`."
        )
    begin(cpu=bool(recipe.training.get("use_cpu")), recipe=recipe.stated(leave_out=("token_cache",)))
    with alone_in(recipe.output_dir):
        return _train(
            recipe,
            train_rows,
            eval_rows,
            fresh,
            write if is_main() else _silent,
            export,
            warm_up_folder,
            measured_on_held_out,
        )


def _train(recipe, train_rows, eval_rows, fresh, write, export, warm_up_folder, measured_on_held_out):
    started, output = time.time(), Path(recipe.output_dir)
    resumed, checkpoint = on_main(lambda: _claim_folder(recipe, output, fresh, write))
    variants = _variants(recipe, write)
    set_seed(recipe.seed)
    entries = encoders_and_config(recipe)[0]
    contexts, skip = contexts_of(entries), bool(recipe.max_broken_samples)
    streams = isinstance(train_rows, IterableDataset) or (recipe.streaming and train_rows is None)
    if eval_rows is None and streams:
        eval_rows = read_whole(recipe.dataset, recipe.eval_split, recipe.max_eval_rows)
    eval_rows = cut_recordings(_rows(recipe, eval_rows, recipe.eval_split, recipe.max_eval_rows), entries)
    eval_dataset = RowDataset(eval_rows, recipe.task, contexts=contexts)
    choosing_dataset, chosen_on = eval_dataset, f"`{recipe.eval_split}` itself"
    if streams:
        train_dataset = _stream(recipe, train_rows, contexts, skip)
    else:
        train_rows = cut_recordings(_rows(recipe, train_rows, recipe.train_split, recipe.max_train_rows), entries)
        kept_rows = train_rows
        if recipe.holdout:
            kept_rows, held_out = hold_out(train_rows, recipe.task, recipe.holdout, recipe.holdout_by)
            choosing_dataset = RowDataset(held_out, recipe.task, contexts=contexts)
            if measured_on_held_out:
                eval_dataset = choosing_dataset
            chosen_on = f"{len(held_out):,} held-out training rows"
        train_dataset = RowDataset(kept_rows, recipe.task, recipe.augment, contexts, skip)
    task = _task(recipe, train_dataset)
    task.check_targets(eval_dataset.targets)
    if recipe.warm_up:
        stages = output / "checkpoints" / "warm_up"
        model, processor = warm_up(recipe, task, train_dataset, stages, write, warm_up_folder)
    else:
        model, processor = build(recipe, task, [train_dataset])
    whole, total = model, sum(p.numel() for p in model.parameters())
    if recipe.lora:
        model = add_lora(model, fresh=not recipe.model.get("checkpoint"), **recipe.lora)
        write(f"{recipe.name}: {describe(model)}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    write(
        f"{recipe.name}: {_number(train_dataset)} training and {len(eval_dataset):,} evaluation rows, "
        f"{task.describe()}; {trainable:,} of {total:,} parameters are trained."
    )
    datasets = {"training": train_dataset, "choosing": choosing_dataset, "evaluation": eval_dataset}
    plain = model.get_base_model() if recipe.lora else model
    datasets = with_cached_tokens(recipe, plain, processor, datasets, write)
    starts = checkpoint is None and not (recipe.warm_up or recipe.model.get("checkpoint"))
    if starts and standardised_shortcuts(plain):
        seen = train_dataset.first(STATISTICS_ROWS, recipe.seed) if streams else datasets["training"]
        take_statistics(plain, processor, seen)
    training = {**DEFAULTS, "metric_for_best_model": task.main_metric, "hub_model_id": output.name}
    if recipe.training.get("metric_for_best_model", task.main_metric) == task.main_metric:
        # Of a metric of another name Trainer, or the recipe, knows the direction.
        training["greater_is_better"] = task.greater_is_better
    if not has_length(train_dataset):
        training |= steps_instead_of_epochs(recipe.training["max_steps"])
    training |= recipe.training
    # What is only measured is not published either.
    training["push_to_hub"] = export and training.get("push_to_hub", False)
    trainer = fit(
        model,
        processor,
        task,
        datasets["training"],
        datasets["choosing"],
        training,
        output / "checkpoints",
        recipe,
        checkpoint,
        write,
    )
    if recipe.generation:
        trainer.model.generation_config.update(**recipe.generation)
    before = {}
    if recipe.pseudo_labels:
        before[_FIRST_STAGE] = score(trainer, task, datasets["evaluation"], processor)[0]
        trainer = _second_stage(recipe, trainer, processor, task, datasets, training, output, write)
    if getattr(task, "several", False) and recipe.holdout:
        # Of several labels each holds from where its F1 is highest on rows that nothing is reported of.
        outputs = trainer.predict(datasets["choosing"]).predictions
        trainer.model.config.thresholds = task.tune(outputs, choosing_dataset.targets)
    plain = trainer.accelerator.unwrap_model(trainer.model)
    plain = plain.get_base_model() if recipe.lora else plain
    if hasattr(plain, "query_bank"):
        # Before an adapter is written, which holds it too.
        some = train_dataset.first(STATISTICS_ROWS, recipe.seed) if streams else datasets["training"].unaugmented()
        fill_query_bank(plain, processor, some)
    adapter = output / "checkpoints" / "adapter" if recipe.lora and export else None
    if recipe.lora:
        # In four bits the model that was trained is a copy.
        _merge(recipe, trainer, processor, whole if recipe.lora.get("bits") else None, adapter)
    metrics, outputs = score(trainer, task, datasets["evaluation"], processor)
    baselines = (
        _compare(recipe, variants, train_rows, None if measured_on_held_out else eval_rows, output, write)
        if recipe.compare
        else {}
    )
    baselines |= before
    broken = trainer.broken_samples
    if broken:
        write(f"{len(broken)} broken samples were left out: {'; '.join(broken.values())}")
    if not streams:
        known = train_dataset.without(broken) if broken else datasets["training"]
        try:
            read_by = _before_training(recipe, task, trainer.model, train_dataset)
            baselines |= task.baselines(read_by, processor, known.unaugmented(), datasets["evaluation"])
        except BrokenSample as error:
            if not skip:
                raise
            write(f"no baseline on the same features, for training has not met all that is broken: {error}")
    result = {
        "metrics": metrics,
        "chosen_on": chosen_on if training["load_best_model_at_end"] else None,
        "majority": task.majority(train_dataset.targets, eval_dataset.targets),
        "baselines": baselines,
        "parameters": total,
        "trainable_parameters": trainable,
        "minutes": (time.time() - started) / 60,
        "resumed": resumed,
        "seed": recipe.seed,
        "epochs": trainer.state.epoch,
        "eval_rows": len(eval_dataset),
        "train_rows": len(train_dataset) if has_length(train_dataset) else None,
        "broken_samples": len(broken),
    }
    if export and trainer.is_world_process_zero():
        pictures = {"learning_curves.png": partial(learning_curves_plot, trainer.state.log_history, task)}
        pictures |= task.pictures(outputs, eval_dataset.targets)
        export_folder(trainer.model, processor, output, recipe, result, pictures, adapter)
        if training["push_to_hub"]:
            write(f"published: {publish(output, trainer.hub_model_id)['url']}")
    return result | {"model": trainer.model, "processor": processor, "log": trainer.state.log_history}


def _before_training(recipe, task, model, train_dataset):
    """The model that baselines read features by: where pretrained encoders were trained, one that has them as they came."""
    entries = encoders_and_config(recipe)[0]
    pretrained = {name for name, entry in entries.items() if isinstance(entry["model"], str)}
    trained = pretrained if recipe.lora else pretrained - set(model.config.frozen_modalities)
    if not (task.reads_features and trained):
        return model
    resting = replace(recipe, model=recipe.model | {"freeze": sorted(pretrained)})
    return build(resting, task, [train_dataset])[0].to(model.device)


def _merge(recipe, trainer, processor, base, folder):
    """Puts a trainer's adapter into the weights of its model, written by itself into `folder` before, if there is one."""
    if folder is not None and trainer.is_world_process_zero():
        source = recipe.model.get("checkpoint")
        on_hub = source is not None and not Path(source).exists()
        # With other labels it is no adapter for the model on the Hub any more.
        alike = on_hub and load_config(source).id2label == trainer.model.config.id2label
        save_adapter(trainer.model, folder, source if alike else None, processor, base)
    trainer.model = trainer.model_wrapped = merged(trainer.model, base)


def _stream(recipe, rows, contexts, skip):
    """The StreamedRows of a recipe, counted unless it says how long to train and all that there is to learn."""
    if contexts:
        raise ValueError(
            "context shows a row its neighbours, which a stream has read already or not yet. Leave streaming out."
        )
    options = {"augment": recipe.augment, "skip_broken": skip, "buffer_size": recipe.shuffle_buffer}
    if rows is None:
        stream = StreamedRows.load(recipe.dataset, recipe.train_split, recipe.task, **options)
    else:
        stream = StreamedRows(rows, recipe.task, **options)
    nothing_to_ask = recipe.labels is not None or issubclass(TASKS[recipe.task], OpenTask)
    if not (nothing_to_ask and recipe.training.get("max_steps", -1) > 0):
        stream.count()
    return stream


def _task(recipe, dataset):
    """The task of a training split, or of the labels that a recipe gives for it."""
    kind = TASKS[recipe.task]
    if recipe.labels is None:
        return kind.from_targets(dataset.targets, recipe.min_answer_count)
    first = next(iter(dataset.targets))
    if isinstance(first, dict):
        return kind.from_targets([dict.fromkeys(recipe.labels, 1.0)])
    return kind.from_targets(recipe.labels if isinstance(first, str) else [recipe.labels])


def _number(dataset):
    return f"{len(dataset):,}" if has_length(dataset) else "uncounted"


def _second_stage(recipe, trainer, processor, task, datasets, training, output, write):
    """The trainer of a new model, trained on the labels of points that the model of `trainer` is sure of."""
    dataset = pseudo_labelled(trainer.model, processor, task, datasets["training"])
    write(labels_table(dataset, datasets["training"], task))
    stage, folder = second_stage(recipe), output / "checkpoints" / "pseudo_labels"
    set_seed(recipe.seed)
    model, _ = build(stage, task, [dataset])
    training = {**training, **stage.training}
    checkpoint, _ = last_whole_checkpoint(folder)
    return fit(model, processor, task, dataset, datasets["choosing"], training, folder, stage, checkpoint, write)


def _variants(recipe, write):
    """{name: recipe} of what a recipe is compared with, checked before it is trained itself."""
    from .ablate import variants_of

    return variants_of(recipe, recipe.compare, write) if recipe.compare else {}


def _compare(recipe, variants, train_rows, eval_rows, output, write):
    """{variant: metrics} of what a recipe is compared with, trained on the same rows."""
    from .ablate import train_variant

    found = {}
    for name, run in variants.items():
        if name != "full":
            write(f"{recipe.name}: training {name} to compare with.")
            place = output / "checkpoints" / "compare"
            result = train_variant(run, place, name, train_rows, eval_rows)
            found[name] = result["metrics"]
            before = result["baselines"].get(_FIRST_STAGE)
            found |= {} if before is None else {f"{name}, {_FIRST_STAGE}": before}
    return found


def _rows(recipe, rows, split, limit):
    return some_of(load_rows(recipe.dataset, split) if rows is None else rows, limit, recipe.seed)


def finished_result(recipe):
    """What an earlier run of this very recipe wrote into its folder when it ended, or None."""
    output = Path(recipe.output_dir)
    stamp, result = output / "checkpoints" / "recipe.json", output / "eval_results.json"
    if not (stamp.exists() and result.exists() and (output / "config.json").exists()):
        return None
    leave_out = ("output_dir", "token_cache", "compare", "variants")
    earlier = Recipe(**{"output_dir": "", **json.loads(stamp.read_text())})
    wanted = json.loads(json.dumps(recipe.stated(leave_out=leave_out)))
    if json.loads(json.dumps(earlier.stated(leave_out=leave_out))) != wanted:
        return None
    return json.loads(result.read_text())


def _silent(line):
    pass


def _in_its_folder(recipe):
    """What tells one run from another: paths say where it lies, and what it is compared with changes nothing of it."""
    return json.loads(json.dumps(recipe.stated(leave_out=("output_dir", "token_cache", "compare", "variants"))))


def other_run(recipe):
    """{key: its value} of the run in a recipe's folder, of what the recipe says otherwise; {} where it is this very run, or none."""
    stamp = Path(recipe.output_dir) / "checkpoints" / "recipe.json"
    if not stamp.exists():
        return {}
    earlier = Recipe(**{"output_dir": "", **json.loads(stamp.read_text())}).stated(leave_out=("output_dir",))
    wanted = _in_its_folder(recipe)
    return {k: earlier.get(k) for k in sorted(wanted.keys() | earlier.keys()) if wanted.get(k) != earlier.get(k)}


def _claim_folder(recipe, output, fresh, write):
    """Makes `output` this recipe's own. Returns whether there was a run of it, and the checkpoint to resume from, or None."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir={str(output)!r} is a file. Give a folder.")
    checkpoints, stamp = output / "checkpoints", output / "checkpoints" / "recipe.json"
    remove_unfinished(output, write)
    wanted = _in_its_folder(recipe)
    if fresh:
        shutil.rmtree(checkpoints, ignore_errors=True)
    elif stamp.exists():
        if different := other_run(recipe):
            key, value = next(iter(different.items()))
            raise ValueError(
                f"output_dir={str(output)!r} holds a run with another {', '.join(different)} (for example "
                f"{key}: {value!r}, now {wanted.get(key)!r}). Choose another output_dir, or pass --fresh to discard that run."
            )
        checkpoint, broken = last_whole_checkpoint(checkpoints)
        for name in broken:
            write(f"{name} was cut off while it was saved: ignored and removed.")
        return True, checkpoint
    elif any(output.glob("*.safetensors")):
        raise ValueError(
            f"output_dir={str(output)!r} holds a model already. Choose another, or pass --fresh to replace it."
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_whole(stamp, json.dumps(wanted, indent=1))
    return False, None
