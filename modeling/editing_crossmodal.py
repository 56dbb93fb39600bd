"""Another set of modalities for a trained model: what fits of its weights is kept, by name, and what was done is reported.

Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import copy
from dataclasses import dataclass, field

import torch

from .composing_crossmodal import load_encoder


# Tensors with one row (or column) per modality, in the order of the config: the axis, by the end of the name.
BY_MODALITY = {
    "modality_types.weight": 0,
    "missing_tokens.weight": 0,
    "weighting.bias.weight": 0,
    "weighting.task_bias.weight": 1,
}
# Lists of modules with one item per modality, likewise.
_LISTS = ("auxiliary.norms", "auxiliary.classifiers", "classifier.evidence")


@dataclass
class EditReport:
    """What became of the weights: names of tensors, with `[modality]` behind those that have a row for each.

    loaded: kept from the model before. new: begun anew, or those of an encoder that was given. left: of the model before, without a place
    in the new one.
    """

    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self):
        return "\n".join(f"{key}: {_grouped(getattr(self, key))}" for key in ("loaded", "new", "left"))


def _grouped(names):
    """Numbers of tensors by the part of the model that they are of."""
    counts = {}
    for name in names:
        part = ".".join(name.split(".")[: 3 if ".encoders." in name else 2])
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} ({count})" for part, count in counts.items()) or "nothing"


def edit_modalities(model, add=None, drop=(), swap=None, **overrides):
    """See `CrossModalPreTrainedModel.with_modalities`."""
    add, swap = dict(add or {}), dict(swap or {})
    drop = [drop] if isinstance(drop, str) else list(drop)
    _check(model, add, drop, swap)
    before, names = model.config, [*(n for n in model.config.modality_names if n not in drop), *add]
    entries, encoders, given = {}, {}, {**add, **swap}
    for name in names:
        if name in given:
            value = given[name]
            entry = dict(value) if isinstance(value, dict) and "model" in value else {"model": value}
            encoders[name], entry["config"] = load_encoder(name, entry.pop("model"), entry)
        else:
            entry = {**before.modality_settings[name], "config": copy.deepcopy(getattr(before, f"{name}_config"))}
            encoders[name] = copy.deepcopy(model._base.encoders[name])
        entries[name] = entry
    new = type(model)._from_config(_config(before, entries, given, overrides), encoders=encoders, dtype=model.dtype)
    new = new.to(device=model.device, dtype=model.dtype)
    report = _take_over(model, new, _anew(before, new.config, given, swap))
    return new.train(model.training), report


def _check(model, add, drop, swap):
    if getattr(model, "_hf_peft_config_loaded", False) or any(
        ".base_layer." in name for name, _ in model.named_parameters()
    ):
        raise ValueError(
            "an adapter is loaded into this model. Merge it first: its layers have other names than the model's."
        )
    model._known([*drop, *swap])
    both = sorted(({*drop} & {*swap}) | ({*add} & {*drop}))
    if both:
        raise ValueError(f"{both[0]!r} is named twice in add, drop and swap. Name each modality once.")
    taken = [name for name in add if name in model.config.modality_names]
    if taken:
        raise ValueError(
            f"add: {taken[0]!r} is a modality of this model already. Use swap={{{taken[0]!r}: ...}} for another encoder."
        )
    if not add and len(drop) == len(model.config.modality_names):
        raise ValueError(f"drop={drop} leaves no modality. Keep one of {model.config.modality_names}.")


def _config(before, entries, given, overrides):
    """The config of the new model: what is said by the names of modalities that are gone falls away."""
    values = before.to_dict()
    for key in (
        "modality_names",
        "modality_settings",
        "auto_map",
        "custom_pipelines",
        *(f"{n}_config" for n in before.modality_names),
    ):
        values.pop(key, None)
    for key in ("modality_dropout", "modality_prior"):
        if isinstance(values.get(key), dict):
            values[key] = {name: value for name, value in values[key].items() if name in entries}
    if before.fusion_queries:
        values["fusion_queries"] = [name for name in before.fusion_queries if name in entries]
    # Else a new first modality would turn the roles of all layers.
    first = before.first_query or before.modality_names[0]
    values["first_query"] = first if before.fusion_type == "interlaced" and first in entries else None
    # A new encoder is trained until it is frozen.
    values["frozen_modalities"] = [name for name in before.frozen_modalities if name in entries and name not in given]
    attention = {f"{name}_config": entry["config"]._attn_implementation for name, entry in entries.items()}
    if before.decoder_config is not None:
        attention["decoder_config"] = before.decoder_config._attn_implementation
    attention[""] = before._attn_implementation
    return type(before).from_dict(
        {**values, **overrides, "modalities": entries}, attn_implementation={key: way for key, way in attention.items() if way is not None}
    )  # fmt: skip


def _anew(before, after, given, swap):
    """Pairs of neighbouring parts of names, of the modules that are not taken over: encoders that were given, and what reads one of
    another type, size or depths than the one before."""
    pairs = {("encoders", name) for name in given}
    for name in swap:
        # What another encoder makes of its inputs lies elsewhere.
        pairs.add(("query_bank", f"{name}_embeddings"))
        old, new = getattr(before, f"{name}_config"), getattr(after, f"{name}_config")
        alike = old.model_type == new.model_type and before.level_sizes_of(name) == after.level_sizes_of(name)
        if not alike or before.levels_of(name) != after.levels_of(name):
            pairs |= {("projections", name), ("shortcuts", name), (name, "shortcut")}
    return pairs


@torch.no_grad()
def _take_over(old, new, anew):
    """Copies into `new` what `old` has for it. Returns an EditReport."""
    report, sources, taken = EditReport(), old.state_dict(), set()
    before, after = old.config.modality_names, new.config.modality_names
    for name, value in new.state_dict().items():
        axis = _axis_of(name)
        if axis is not None and name in sources:
            taken.add(name)
            source, target = sources[name].movedim(axis, 0), value.movedim(axis, 0)
            for index, modality in enumerate(after):
                if modality in before:
                    target[index] = source[before.index(modality)]
                (report.loaded if modality in before else report.new).append(f"{name}[{modality}]")
            report.left += [f"{name}[{modality}]" for modality in before if modality not in after]
            continue
        source, parts = _same_modality(name, after, before), name.split(".")
        fits = source in sources and sources[source].shape == value.shape
        if fits and anew.isdisjoint(zip(parts, parts[1:], strict=False)):
            value.copy_(sources[source])
            taken.add(source)
            report.loaded.append(name)
        else:
            report.new.append(name)
    report.left += [name for name in sources if name not in taken]
    return report


def _axis_of(name):
    return next((axis for end, axis in BY_MODALITY.items() if name == end or name.endswith(f".{end}")), None)


def _same_modality(name, after, before):
    """The old name of a tensor: items of lists by modality may have moved. None for those of a new modality."""
    for start in _LISTS:
        if name.startswith(f"{start}."):
            index, _, rest = name.removeprefix(f"{start}.").partition(".")
            modality = after[int(index)]
            return f"{start}.{before.index(modality)}.{rest}" if modality in before else None
    return name
