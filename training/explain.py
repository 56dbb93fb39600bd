"""Why a model answered so: attention across modalities, gates, weights; and whether what it attended to mattered.

Letters: B batch, T_m tokens of modality m, h heads.
"""

from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..modeling.encoders_crossmodal import audio_token_mask
from .collator import SampleCollator


def attention_across(model, output):
    """Attention within and between modalities, mean over layers and heads.

    What modalities see of each other through shared latents is the product of the two maps.

    Args:
        output: of a forward with `output_attentions=True`.

    Returns:
        {"m<-n": (B,T_m,T_n)} float32, with m = n where the operator attends within a modality; empty where nothing is
        attended to, as in `concat`.
    """
    layers = output.cross_attentions or ()
    found = {}
    for index, layer in enumerate(layers):
        for pair, weights in _through_latents(layer, layers[index - 1] if index else {}, model.config).items():
            found.setdefault(pair, []).append(weights.float().mean(dim=1))
    return {pair: torch.stack(weights).mean(dim=0) for pair, weights in found.items()}


def _through_latents(layer, before, config):
    """The maps of a layer, with those to and from latents multiplied into one between modalities."""
    if config.fusion_type != "bottleneck":
        return layer
    # Tokens read what latents collected in the same layer, or (exchange) in the one before.
    collected = layer if config.bottleneck == "resample" else before
    names = [name for name in config.modality_names if f"{name}<-latents" in layer]
    direct = {pair: weights for pair, weights in layer.items() if "latents" not in pair}
    return direct | {
        f"{name}<-{other}": layer[f"{name}<-latents"] @ collected[f"latents<-{other}"]
        for name in names
        for other in names
        if other != name and f"latents<-{other}" in collected
    }


def relevance(model, batch, name, maps):
    """How much each token of a modality was attended to by the others, or by its own where no other looks at it.

    Args:
        batch: that the model took. name: of a modality. maps: of `attention_across`.

    Returns:
        (B,T_n), or None where nothing attends to it.
    """
    names = [n for n in model.config.modality_names if n != name and f"{n}<-{name}" in maps]
    if not names and f"{name}<-{name}" not in maps:
        return None
    total = 0
    for other in names or [name]:
        weights = maps[f"{other}<-{name}"]
        # Rows of padding show nothing.
        asking = token_mask(model, batch, other, weights.shape[1], weights.device)
        total = total + (weights * asking[..., None]).sum(dim=1) / asking.sum(dim=1, keepdim=True).clamp(min=1)
    return total


def token_mask(model, batch, name, length, device):
    """(B, length) bool: real tokens of a modality, as far as the mask of the batch tells."""
    key = model.config.input_keys(name)[1]
    mask = batch.get(key) if key else None
    rows = len(next(iter(batch.values())))
    if mask is not None and model.config.modality_settings[name]["type"] == "audio":
        mask = audio_token_mask(model.base_model.encoders[name], mask.bool(), length)
    if mask is None or mask.shape[1] != length:
        return torch.ones(rows, length, dtype=torch.bool, device=device)
    return mask.bool()


def rows_of_steps(model, batch, name, length):
    """(rows, steps) of the patches of a spectrogram, the last rows * steps of `length` tokens, a row after the other; None for a modality
    whose tokens are steps themselves, or no patches of sound."""
    encoder, values = model.base_model.encoders[name], batch.get(model.config.input_keys(name)[0])
    config = getattr(encoder, "config", None)
    if model.config.modality_settings[name]["type"] != "audio" or values is None:
        return None
    if hasattr(encoder, "token_grid"):
        # Views lie behind one another.
        steps = encoder.token_grid(*values.shape[-2:])[1]
        return length // steps, steps
    if not isinstance(getattr(config, "patch_size", None), int):
        return None
    bands = (values.shape[2] - config.patch_size) // config.frequency_stride + 1
    return bands, (values.shape[1] - config.patch_size) // config.time_stride + 1


def removable(model, processor, batch, name, length, grid, device):
    """(B, length) bool: tokens that can be taken from the input one by one: patches, words, steps; not special tokens."""
    found = token_mask(model, batch, name, length, device).clone()
    key = model.config.input_keys(name)[0]
    if grid is not None:
        found[:, : length - grid[0] * grid[1]] = False
    if model.config.modality_settings[name]["type"] == "text":
        # An unknown word is a word.
        ids = set(processor.tokenizer.all_special_ids) - {processor.tokenizer.unk_token_id}
        special = torch.tensor(sorted(ids), device=device)
        found &= ~torch.isin(batch[key], special)
    return found


def without(model, batch, name, chosen, grid):
    """The batch with tokens of a modality taken away: patches painted in the mean color, words and steps masked.

    Args:
        chosen: (B,T_n) bool. grid: (h,w) of patches, the last h*w tokens, or None.

    Raises:
        ValueError: for inputs whose parts cannot be told apart, such as spectrograms.
    """
    config = model.config
    kind = config.modality_settings[name]["type"]
    values_key, mask_key = config.input_keys(name)
    values = batch[values_key]
    if kind == "vision" and grid is not None:
        cells = chosen[:, -grid[0] * grid[1] :].view(-1, 1, *grid).float()
        cells = torch.nn.functional.interpolate(cells, size=values.shape[-2:], mode="nearest").bool()
        return {**batch, values_key: torch.where(cells, values.mean(dim=(2, 3), keepdim=True), values)}
    if mask_key and kind in ("text", "features") and chosen.shape[1] == values.shape[1]:
        return {**batch, mask_key: token_mask(model, batch, name, chosen.shape[1], chosen.device) & ~chosen}
    if kind == "audio" and values.dim() == 2:
        parts = torch.nn.functional.interpolate(chosen[:, None].float(), size=values.shape[1], mode="nearest")[:, 0]
        return {**batch, values_key: values * (1 - parts)}
    raise ValueError(
        f"modality {name!r} (type {kind!r}, inputs {tuple(values.shape)}): its tokens are no parts of the input that could be "
        "removed one by one. Expected images with a grid of patches, text, feature sequences, or waveforms."
    )


def deletion_test(
    model, processor, samples, name, fractions=(0.1, 0.2, 0.3, 0.5), draws=5, seed=0, batch_size=32, progress=True
):
    """Does it hurt more to remove what was attended to than what was not (Petsiuk et al. 2018, arXiv 1806.07421)?

    Args:
        model: a head that classifies. samples: dataset of samples, arguments of the processor, each with every modality.
        name: of the modality to remove tokens of. fractions: of its removable tokens, at least one.
        draws: random removals that are averaged.

    Returns:
        list of `{"fraction", "drop", "drop_random", "error", "changed", "changed_random"}`: mean drop of the probability of the
        answer given on the whole input, the same for random removal, the standard error of their difference over rows, and
        part of the answers that changed.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(samples, batch_size, collate_fn=SampleCollator(processor, deduplicate=False))
    # By fraction: (2, rows of a batch) of what attention says, and of the mean over random draws.
    drops, changed = {fraction: [] for fraction in fractions}, {fraction: [] for fraction in fractions}
    for batch in tqdm(loader, desc=f"deletion of {name}", disable=not progress, leave=False):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        if "modality_mask" in batch or model.config.input_keys(name)[0] not in batch:
            raise ValueError(
                f"some rows lack a modality, so there is nothing of {name!r} to remove. Give rows with all."
            )
        with torch.no_grad():
            output = model(**batch, output_attentions=True)
        score = relevance(model, batch, name, attention_across(model, output))
        if score is None:
            raise ValueError(
                f"nothing attends to {name!r} in this model (fusion_type={model.config.fusion_type!r}, gate="
                f"{model.config.gate!r}, fusion_queries={model.config.fusion_queries}): there is nothing to test."
            )
        grid = (output.token_grids or {}).get(name)
        free = removable(model, processor, batch, name, score.shape[1], grid, score.device)
        before = probabilities(model, output.logits)
        answer = before.argmax(dim=1)
        orders = [score, *(torch.rand(free.shape, generator=generator).to(free.device) for _ in range(draws))]
        for fraction in fractions:
            count = (fraction * free.sum(dim=1)).round().clamp(min=1)
            found = []
            for order in orders:
                # Best first, what cannot be removed last.
                ranks = order.float().masked_fill(~free, -1.0).argsort(dim=1, descending=True).argsort(dim=1)
                chosen = free & (ranks < count[:, None])
                with torch.no_grad():
                    after = probabilities(model, model(**without(model, batch, name, chosen, grid)).logits)
                drop = (before - after).gather(1, answer[:, None])[:, 0]
                found.append(torch.stack([drop, (after.argmax(dim=1) != answer).float()]).cpu())
            by_attention, by_chance = found[0], torch.stack(found[1:]).mean(dim=0)
            drops[fraction].append(torch.stack([by_attention[0], by_chance[0]]))
            changed[fraction].append(torch.stack([by_attention[1], by_chance[1]]))
    table = []
    for fraction in fractions:
        dropped, flipped = torch.cat(drops[fraction], dim=1), torch.cat(changed[fraction], dim=1)
        rows = dropped.shape[1]
        error = (dropped[0] - dropped[1]).std().item() / rows**0.5 if rows > 1 else 0.0
        names = ("drop", "drop_random", "changed", "changed_random")
        means = [*dropped.mean(dim=1).tolist(), *flipped.mean(dim=1).tolist()]
        table.append({"fraction": fraction, **dict(zip(names, means, strict=True)), "error": error})
    return table


def probabilities(model, logits):
    """Probabilities of a classification head, by its kind of loss."""
    if model.config.problem_type == "regression":
        raise ValueError("problem_type='regression' has no probability that could drop. Expected a head with classes.")
    logits = logits.float()
    return logits.sigmoid() if model.config.problem_type == "multi_label_classification" else logits.softmax(dim=-1)


def explain(model, processor, top_k=3, **inputs):
    """Everything there is to show of one answer.

    Args:
        model: a head that classifies. inputs: one item per modality, as the processor takes them (`images=`, `text=`, ...).

    Returns:
        dict with `answers` [(label, score)], `modality_weights` {name: weight}, `attention` {"m<-n": (T_m,T_n) array},
        `gates` [per layer {"m<-n": part}], `words` {name: [(word, places of its tokens)] of a text, else None}, `grids` {name: (h,w)},
        `rows_of_steps` {name: see there, or None},
        `token_weights` {name: (T_n,)} (how much each token was attended to) and `inputs`.

    Raises:
        ValueError: for a model that chooses no answer.
    """
    if not any(parent.__name__ == "CrossModalClassifier" for parent in type(model).__mro__):
        raise ValueError(
            f"{type(model).__name__} chooses no answer whose origin could be shown. Expected CrossModalForVQA or "
            "CrossModalForSequenceClassification; other heads give maps with output_attentions=True."
        )
    model.eval()
    batch = processor(**inputs)
    batch = {key: value.to(model.device) for key, value in batch.items()}
    with _updates(model) as updates:
        with torch.no_grad():
            output = model(**batch, output_attentions=True, output_hidden_states=True)
    scores = probabilities(model, output.logits)[0]
    order = scores.argsort(descending=True)[:top_k].tolist()
    maps = attention_across(model, output)
    present = [name for name in model.config.modality_names if name in output.modality_tokens]
    weights = {name: relevance(model, batch, name, maps) for name in present}
    given = {name: inputs.get(processor.argument_of(name), inputs.get(name)) for name in present}
    return {
        "inputs": given,
        "types": {name: model.config.modality_settings[name]["type"] for name in present},
        "answers": [(model.config.id2label[index], float(scores[index])) for index in order],
        "modality_weights": dict(
            zip(model.config.modality_names, output.modality_weights[0].float().tolist(), strict=True)
        ),
        "attention": {pair: value[0].float().cpu().numpy() for pair, value in maps.items()},
        "gates": updates,
        "words": {
            name: _words(processor, model, name, given.get(name), output.modality_tokens[name].shape[1])
            for name in present
        },
        "grids": dict(output.token_grids or {}),
        "rows_of_steps": {
            name: rows_of_steps(model, batch, name, output.modality_tokens[name].shape[1]) for name in present
        },
        "token_weights": {name: found[0].cpu().numpy() for name, found in weights.items() if found is not None},
    }


def _words(processor, model, name, text, length):
    """[(word, places of its tokens)] of a text whose first `length` tokens the model saw; None for what is no text."""
    if model.config.modality_settings[name]["type"] != "text":
        return None
    limit = next(modality.get("max_tokens") for modality in processor.modalities if modality["name"] == name)
    encoded = processor.tokenizer(text, truncation=limit is not None, max_length=limit)
    if not encoded.is_fast:
        special, ids = set(processor.tokenizer.all_special_ids), encoded["input_ids"][:length]
        return [(processor.tokenizer.decode([i]), [place]) for place, i in enumerate(ids) if i not in special]
    places = {}
    for place, word in enumerate(encoded.word_ids()[:length]):
        if word is not None:
            places.setdefault(word, []).append(place)
    return [(text[slice(*encoded.word_to_chars(word))], found) for word, found in places.items()]


@contextmanager
def _updates(model):
    """Collects, per fusion layer, the size of each gated update beside the stream that it is added to.

    Yields a list that the forward fills with {"m<-n": mean over tokens of |update| / |stream|}; it stays empty for
    operators whose streams do not look at each other through gates.
    """
    collected, handles = [], []

    def watch(layer):
        found, streams = {}, {}

        def after_self(name):
            return lambda module, given, result: streams.__setitem__(name, result[0])

        def after_gate(name):
            def keep(module, given, result):
                size = result.norm(dim=-1) / streams[name].norm(dim=-1).clamp(min=1e-6)
                found.setdefault(name, []).append(size.mean().item())

            return keep

        for name, gate in layer.gate.items():
            handles.append(layer.self_attn[name].register_forward_hook(after_self(name)))
            handles.append(gate.register_forward_hook(after_gate(name)))

        def finish(module, given, result):
            pairs = [pair for pair in result[1] if "<-" in pair and len(set(pair.split("<-"))) == 2]
            sizes = iter([size for name in result[0] for size in found.get(name, [])])
            collected.append(dict(zip(pairs, sizes, strict=True)))

        handles.append(layer.register_forward_hook(finish))

    for layer in model.base_model.fusion.layers:
        if hasattr(layer, "gate") and hasattr(layer, "self_attn"):
            watch(layer)
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
