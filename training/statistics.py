"""What a model takes from the training rows before it is trained: mean and deviation of the features of frozen encoders."""

import torch
from tqdm import tqdm

from ..modeling.pooling_crossmodal import PooledShortcut
from .collator import SampleCollator
from .datasets import read_samples


# Means and deviations of so many rows are those of all.
MOST_ROWS = 20_000


def standardised_shortcuts(model):
    """{modality: PooledShortcut} of the frozen encoders that a head looks at past the fusion."""
    shortcuts = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[0].rpartition(".")[2] if path.endswith(".shortcut") else path.rpartition(".")[2]
        if isinstance(module, PooledShortcut) and name in model.config.frozen_modalities:
            shortcuts[name] = module
    return shortcuts


@torch.no_grad()
def take_statistics(model, processor, dataset, batch_size=128, progress=True):
    """Standardises the pooled features of every frozen encoder that a model has a shortcut from, over the rows of a dataset.

    Returns the names of those modalities.
    """
    shortcuts = standardised_shortcuts(model)
    if not shortcuts:
        return []
    base, collate = model.base_model, SampleCollator(processor, deduplicate=False)
    was_training, found = model.training, {name: [] for name in shortcuts}
    model.eval()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(dataset), generator=generator)[:MOST_ROWS].tolist()
    for start in tqdm(
        range(0, len(rows), batch_size), desc="statistics of features", disable=not progress, leave=False
    ):
        batch = collate(read_samples(dataset, rows[start : start + batch_size])[0])
        mask = batch.pop("modality_mask", None)
        collected = base._collect_inputs({key: value.to(model.device) for key, value in batch.items()})
        encoded, _ = base.encode(collected, mask)
        for name, module in shortcuts.items():
            if name in encoded:
                found[name].append(module.pool(encoded[name].levels, encoded[name].mask))
    for name, module in shortcuts.items():
        for norm, parts in zip(module.norms, zip(*found[name], strict=True), strict=True):
            norm.standardise(torch.cat(parts))
    model.train(was_training)
    return [name for name in shortcuts if found[name]]
