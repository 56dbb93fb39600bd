"""A trained model to a whole Hub folder: weights, code, processor, pipeline and card; nothing half-written."""

import json
import os
import shutil
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template

from ..model_cards import card_template
from .tasks import TASKS


_UNFINISHED = ".unfinished"


def remove_unfinished(folder, write=print):
    """Clears what a kill in the middle of an export left behind, and says so."""
    leftover = Path(folder) / _UNFINISHED
    if leftover.exists():
        shutil.rmtree(leftover)
        write(f"{folder}: an export was cut off here. What it had written is removed.")


def export_folder(model, processor, folder, recipe=None, result=None, pictures=None):
    """Writes a Hub repo that loads anywhere with `trust_remote_code=True`.

    Everything is written aside first and then moved, `config.json` last: a folder without it is no model, so that no
    load ever takes a half-written folder for a whole one.

    Args:
        model: a head of the family. processor: CrossModalProcessor.
        recipe, result: what `train` was given and returned, for the card.
        pictures: {file name: what draws it into a path}, which the card shows.
    """
    folder = Path(folder)
    aside = folder / _UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
        if result is not None:
            numbers = {k: v for k, v in result.items() if k in _REPORTED}
            (aside / "eval_results.json").write_text(json.dumps(numbers, indent=2) + "\n")
        if recipe is not None:
            from .train import recipe_text

            (aside / "recipe.yaml").write_text(recipe_text(recipe))
        for name, draw in (pictures or {}).items():
            draw(aside / name)
        arguments = [processor.argument_of(name) for name in processor.modality_names]
        model_card(model, recipe, result, arguments, list(pictures or ())).save(aside / "README.md")
        (folder / "config.json").unlink(missing_ok=True)
        for path in sorted(aside.iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


_REPORTED = (
    "metrics",
    "majority",
    "chosen_on",
    "baselines",
    "parameters",
    "trainable_parameters",
    "minutes",
    "resumed",
    "seed",
    "epochs",
    "eval_rows",
)


# An F1 of all rows.
_NO_LABEL = ("f1_negpos",)

# Task of the Hub that a head serves, as cards name it.
_HUB_TASKS = {
    "CrossModalForVQA": "visual-question-answering",
    "CrossModalForSequenceClassification": "text-classification",
    "CrossModalForRetrieval": "zero-shot-image-classification",
    "CrossModalForCaptioning": "image-text-to-text",
}


def model_card(model, recipe=None, result=None, arguments=None, pictures=()):
    """The card of a model, from the template of its head, with the numbers of `result`.

    arguments: of the processor, for the lines that show how to use it. pictures: files that lie beside.
    """
    config = model.config
    head = type(model).__name__
    metrics = {k: v for k, v in (result or {}).get("metrics", {}).items() if k != "loss"}
    dataset = Path(recipe.dataset).name if recipe is not None else "unknown"
    split = recipe.eval_split if recipe is not None else None
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=_HUB_TASKS.get(head),
        tags=["crossmodal", "multimodal", config.fusion_type],
        model_name=recipe.name if recipe is not None else head,
        eval_results=[
            EvalResult(
                task_type=_HUB_TASKS[head],
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=split,
                metric_type=name,
                metric_value=round(value, 4),
            )
            for name, value in metrics.items()
        ]
        or None,
    )
    modalities = [
        {
            "name": name,
            "encoder": getattr(config, f"{name}_config").model_type,
            "levels": config.levels_of(name),
            "frozen": name in config.frozen_modalities,
        }
        for name in config.modality_names
    ]
    table = {}
    if metrics:
        task = TASKS[recipe.task]
        table = task.table_beside(task.table("this model", metrics), result)
    values = {
        "head": head,
        "table": table,
        "columns": list(dict.fromkeys(column for row in table.values() for column in row)),
        "title": data.model_name,
        "config": config,
        "modalities": modalities,
        "arguments": arguments or config.modality_names,
        "dataset": dataset,
        "split": split,
        "metrics": metrics,
        "per_label": {
            k.removeprefix("f1_"): v for k, v in metrics.items() if k.startswith("f1_") and k not in _NO_LABEL
        },
        "pictures": {name: Path(name).stem.replace("_", " ") for name in pictures},
        "result": result or {},
        "recipe": recipe,
        "answers": list(config.id2label.values())[:20],
        "num_answers": len(config.id2label),
    }
    common = Template(card_template("common").read_text()).render(**values)
    return ModelCard.from_template(data, template_path=str(card_template(head)), common=common, **values)
