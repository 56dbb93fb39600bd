"""A trained model on a split of a dataset."""

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from .collator import SampleCollator
from .datasets import RowDataset, load_rows
from .tasks import TASKS, name_of


def task_of(model):
    """The task that a head serves."""
    for task in TASKS.values():
        if task.model_class == type(model).__name__:
            return task.from_config(model.config)
    raise ValueError(f"{type(model).__name__} has no task to evaluate. Heads that have: {list(TASKS)}.")


@torch.inference_mode()
def predict_logits(model, processor, samples, batch_size=128, progress=True):
    """Logits (N,A) of a dataset of samples, in order, on the model's device. Leaves the model in eval mode."""
    model.eval()
    loader = DataLoader(samples, batch_size, collate_fn=SampleCollator(processor))
    logits = []
    for batch in tqdm(loader, desc="evaluate", disable=not progress, leave=False):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        logits.append(model(**batch).logits.float().cpu())
    return torch.cat(logits)


def evaluate(model, processor, dataset, split, batch_size=128, unknown_answers_wrong=False, progress=True):
    """Metrics of a model on a split, by name. `dataset` is a Hub id, folder, file, or rows."""
    task = task_of(model)
    rows = load_rows(dataset, split) if isinstance(dataset, str) else dataset
    samples = RowDataset(rows, name_of(task))
    task.check_targets(samples.targets, unknown_answers_wrong)
    return task.score(predict_logits(model, processor, samples, batch_size, progress), samples.targets)
