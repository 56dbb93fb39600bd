"""The card of a model: what it is, what it was trained on, how well it does and how sure that is, what it is for and how it loads."""

import re
from pathlib import Path

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template

import crossmodal

from ..model_cards import card_template
from .tasks import TASKS


# Stands in every card for the repo that it will lie in.
REPO = "path/or/repo-id"

# Task of the Hub that a head serves, as cards name it.
HUB_TASKS = {
    "CrossModalForVQA": "visual-question-answering",
    "CrossModalForSequenceClassification": "text-classification",
    "CrossModalForRetrieval": "zero-shot-image-classification",
    "CrossModalForCaptioning": "image-text-to-text",
    # The nearest that there is.
    "CrossModalForPointSegmentation": "image-segmentation",
}

# An F1 of all rows.
_NO_LABEL = ("f1_negpos",)
# Means of what lies between 0 and 1 in every row of the evaluation.
_SHARES = ("accuracy", "vqa_accuracy", "exact_match")


def model_card(model, recipe=None, result=None, arguments=None, pictures=(), dataset=None):
    """The card of a model, from the template of its head, with the numbers of `result`.

    arguments: of the processor, for the lines that show how to use it. pictures: files that lie beside. dataset: words for the data,
    where no recipe names it.
    """
    config = model.config
    head = type(model).__name__
    metrics = {k: v for k, v in (result or {}).get("metrics", {}).items() if k != "loss"}
    dataset = without_paths(recipe.dataset) if recipe is not None else dataset or "unnamed data"
    split = recipe.eval_split if recipe is not None else None
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=HUB_TASKS.get(head),
        tags=["crossmodal", "multimodal", config.fusion_type],
        datasets=[dataset] if _is_hub_id(dataset) else None,
        base_model=_base_models(recipe),
        metrics=[name for name in metrics if not name.startswith("f1_")] or None,
        model_name=recipe.name if recipe is not None else head,
        eval_results=[
            EvalResult(
                task_type=HUB_TASKS[head],
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
    table = {"this model": metrics} if metrics else {}
    if metrics and recipe is not None:
        task = TASKS[recipe.task]
        table = task.table_beside(task.table("this model", metrics), result)
    rows = (result or {}).get("eval_rows")
    values = {
        "head": head,
        "table": table,
        "columns": list(dict.fromkeys(column for row in table.values() for column in row)),
        "intervals": {
            name: interval(metrics[name], rows) for name in _SHARES if rows and 0 <= metrics.get(name, -1) <= 1
        },
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
        "versions": ", ".join(f"{made.__name__} {made.__version__}" for made in (crossmodal, transformers, torch)),
    }
    common = Template(card_template("common").read_text()).render(**values)
    return ModelCard.from_template(data, template_path=str(card_template(head)), common=common, **values)


def interval(share, rows):
    """The 95 % Wilson interval (low, high) of a share of so many rows (Wilson 1927). Of a mean of scores in [0,1] it is no narrower than
    need be: none varies more than right and wrong do."""
    from scipy.stats import binomtest

    found = binomtest(round(share * rows), rows).proportion_ci(method="wilson")
    return found.low, found.high


def put_section(card, heading, body):
    """Writes a section into the file of a card: in place of the one of that heading, else before the limits, else at the end."""
    card = Path(card)
    text = card.read_text() if card.exists() else ""
    before, found, after = text.partition(heading)
    if found:
        rest = after.find("\n## ")
        after = after[rest + 1 :] if rest >= 0 else ""
    else:
        before, found, after = text.partition("## Limits")
        after = found + after
    card.write_text(f"{before}{heading}\n\n{body.strip()}\n" + (f"\n{after}" if after else ""))


def addressed(text, repo_id, revision):
    """A card as it lies in its repo: with the repo's id, and the revision in every line that loads it."""
    pinned = f'"{repo_id}", revision="{revision}", trust_remote_code=True'
    return text.replace(f'"{REPO}", trust_remote_code=True', pinned).replace(REPO, repo_id)


def pinned_revision(text):
    """The revision that a card pins, or None."""
    found = re.search(r'revision="([0-9a-f]{40})"', text)
    return found and found[1]


def without_paths(value):
    """A value of a recipe, with the last part of a path alone, however deep it lies."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    # Datasets may be joined by a plus.
    return " + ".join(_last_part(part) for part in value.split(" + "))


def _last_part(text):
    # A folder that is gone by now is no name on the Hub either.
    return Path(text).name if Path(text).is_absolute() or Path(text.split(" ")[0]).exists() else text


def _is_hub_id(name):
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _base_models(recipe):
    """Hub ids of the encoders of a recipe, or None."""
    encoders = ((recipe.model.get("encoders") or {}) if recipe is not None else {}).values()
    named = [entry.get("model") if isinstance(entry, dict) else entry for entry in encoders]
    found = [without_paths(name) for name in named if isinstance(name, str)]
    return list(dict.fromkeys(name for name in found if _is_hub_id(name))) or None
