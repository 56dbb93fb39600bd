"""Presets of models, recipes of training and Accelerate's configs of launching it, by name."""

import difflib
import json
from pathlib import Path

import yaml


_HERE = Path(__file__).parent


def _find(kind, suffix, name):
    """The file of a preset or recipe. Raises ValueError naming what there is, nearest match first."""
    path = _HERE / kind / f"{name}{suffix}"
    names = [p.stem for p in sorted((_HERE / kind).glob(f"*{suffix}"))]
    if path.stem not in names:
        names.sort(key=lambda n: -difflib.SequenceMatcher(None, str(name), n).ratio())
        raise ValueError(f"{name!r} is not among the {kind} of this package. There are: {', '.join(names)}.")
    return path


def load_preset(name):
    """Arguments of `CrossModalConfig` of a named size, as a dict."""
    return json.loads(_find("models", ".json", name).read_text())


def preset_names():
    """Names of the presets, smallest first."""
    return sorted(
        (path.stem for path in (_HERE / "models").glob("*.json")), key=lambda n: load_preset(n)["hidden_size"]
    )


def accelerate_config(name):
    """The file of an Accelerate config by name: `ddp`, `fsdp2`, `deepspeed_zero2` or `deepspeed_zero3`."""
    return _find("accelerate", ".yaml", name)


def load_recipe(name):
    """A training recipe by name, or by the path of a YAML file, as a dict."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = _find("training", ".yaml", name)
    elif not path.is_file():
        raise ValueError(f"the recipe file {str(path)!r} does not exist. Give a YAML file, or the name of a recipe.")
    recipe = yaml.safe_load(path.read_text())
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {str(path)!r} holds {type(recipe).__name__}. Expected a YAML mapping.")
    return recipe
