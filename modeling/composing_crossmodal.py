"""Encoders with their weights, from whatever `from_encoders` was given: Hub ids, folders, configs, models, modules.

Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

from pathlib import Path

from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .encoders_crossmodal import ENCODERS, CustomEncoderConfig, encoder_class, without_pooler


def load_encoder(name, source, entry):
    """An encoder with its weights, and its config, from whatever `from_encoders` was given. Module None: build it."""
    if isinstance(source, PreTrainedConfig):
        return None, _tower_config(name, source, entry)
    if isinstance(source, PreTrainedModel):
        return _tower_of(name, source, entry)
    if isinstance(source, nn.Module):
        sizes = entry.get("hidden_sizes") or getattr(source, "level_sizes", None)
        if sizes is None:
            raise ValueError(
                f"modality {name!r}: a module of class {type(source).__name__} was given. Expected an attribute "
                "`level_sizes` (width of every level it returns) and forward(values, mask) -> (levels, mask)."
            )
        entry.setdefault("type", "features")
        entry["hidden_sizes"] = list(sizes)
        return source, CustomEncoderConfig(class_name=type(source).__name__, level_sizes=list(sizes))
    if not isinstance(source, (str, Path)):
        raise ValueError(
            f"modality {name!r}: got {type(source).__name__}. Expected a Hub id, a folder, a transformers config, a "
            "PreTrainedModel, or a module that keeps the contract of ENCODERS."
        )
    try:
        full = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"modality {name!r}: {str(source)!r} is neither a folder with a model nor a model that the Hub hands out "
            f"here ({type(error).__name__}: {str(error).splitlines()[0]}). Correct the name, or give a config."
        ) from error
    config = _tower_config(name, full, entry)
    if getattr(config, "is_encoder_decoder", False):
        # The weights of an encoder have another prefix than its class expects: only the whole loads them.
        return _tower_of(name, AutoModel.from_pretrained(source), entry)
    model_class = ENCODERS.get(config.model_type) or encoder_class(config)
    model, report = model_class.from_pretrained(
        source, config=config, output_loading_info=True, **without_pooler(model_class)
    )
    if 2 * len(report["missing_keys"]) > len(model.state_dict()):
        raise ValueError(
            f"modality {name!r}: {str(source)!r} holds no weights for a {model_class.__name__} (missing: "
            f"{sorted(report['missing_keys'])[:3]}, ...). Give the folder of a model with this encoder, or its config "
            "for random weights."
        )
    return _tower_of(name, model, entry)


def _wanted_tower(name, entry):
    kind = entry.get("type") or name
    return {"image": "vision", "images": "vision", "question": "text", "sound": "audio"}.get(kind, kind)


def _tower_config(name, config, entry):
    """The config of the tower that fits the modality, where a model has several."""
    tower = getattr(config, f"{_wanted_tower(name, entry)}_config", None)
    if tower is not None:
        return tower
    towers = [key for key in config.sub_configs if key.endswith("_config")]
    if {"vision_config", "text_config"} & set(towers):
        raise ValueError(
            f"modality {name!r}: a model of type {config.model_type!r} has towers {sorted(towers)}. Say which: "
            f"{name}={{'model': ..., 'type': 'vision' or 'text' or 'audio'}}."
        )
    return config


def _tower_of(name, model, entry):
    """The tower of a loaded model that fits the modality, and its config."""
    config = _tower_config(name, model.config, entry)
    if config is not model.config:
        model = getattr(model, f"{_wanted_tower(name, entry)}_model")
    elif getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    elif model.base_model is not model:
        # A head on top (for example a classifier) is left behind.
        model = model.base_model
    return model, model.config
