"""A trained model to a whole Hub folder: weights, code, processor, pipeline and card; nothing half-written."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import yaml

from ..model_cards import LICENSE
from .card import model_card, without_paths


_UNFINISHED = ".unfinished"


def remove_unfinished(folder, write=print):
    """Clears what a kill in the middle of an export left behind, and says so."""
    leftover = Path(folder) / _UNFINISHED
    if leftover.exists():
        shutil.rmtree(leftover)
        write(f"{folder}: an export was cut off here. What it had written is removed.")


def export_folder(model, processor, folder, recipe=None, result=None, pictures=None, adapter=None):
    """Writes a Hub repo that loads anywhere with `trust_remote_code=True`.

    Everything is written aside first and then moved, `config.json` last: a folder without it is no model, so that no
    load ever takes a half-written folder for a whole one.

    Args:
        model: a head of the family. processor: CrossModalProcessor.
        recipe, result: what `train` was given and returned, for the card.
        pictures: {file name: what draws it into a path}, which the card shows.
        adapter: folder that `save_adapter` wrote; becomes `adapter/`.
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
            (aside / "recipe.yaml").write_text(recipe_text(recipe))
        for name, draw in (pictures or {}).items():
            draw(aside / name)
        arguments = [processor.argument_of(name) for name in processor.modality_names]
        model_card(model, recipe, result, arguments, list(pictures or ())).save(aside / "README.md")
        shutil.copyfile(LICENSE, aside / "LICENSE")
        if adapter is not None:
            shutil.rmtree(folder / "adapter", ignore_errors=True)
            os.replace(adapter, aside / "adapter")
        (folder / "config.json").unlink(missing_ok=True)
        for path in sorted(aside.iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def complete_folder(model, processor, folder, write=print):
    """Adds what a folder that `save_pretrained` wrote lacks of a whole repo: processor and code, a card without results, the license."""
    folder = Path(folder)
    present = {path.name for path in folder.iterdir()}
    if not {"modeling_crossmodal.py", "processing_crossmodal.py", "processor_config.json"} <= present:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    if "README.md" not in present:
        write(f"{folder}: it had no card. One without results was written.")
        arguments = [processor.argument_of(name) for name in processor.modality_names]
        model_card(model, arguments=arguments).save(folder / "README.md")
    if "LICENSE" not in present:
        shutil.copyfile(LICENSE, folder / "LICENSE")


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
    "train_rows",
    "broken_samples",
)


def recipe_text(recipe):
    """The recipe as published: without the paths of this machine."""
    values = {key: value for key, value in asdict(recipe).items() if value not in (None, {}, "")}
    if isinstance(values.get("token_cache"), str):
        values["token_cache"] = True
    return yaml.safe_dump(without_paths(values), sort_keys=False)
