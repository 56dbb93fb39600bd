"""What the tasks share: what a head learns from, and how it is scored."""

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from .collator import SampleCollator


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


class Task:
    """What all tasks share, until they say otherwise."""

    # Whether rows are compared with one another, or answered in turn, which Trainer's own loop does not.
    scores_whole = False
    # Whether the model writes text.
    writes = False
    # Of the main metric, by which the best checkpoint is chosen.
    greater_is_better = True
    # Whether a baseline reads what pretrained encoders make of rows, before they are trained.
    reads_features = False
    # What `evaluate` takes beyond what all tasks take.
    evaluate_options = ()

    @staticmethod
    def shown(metrics):
        """Those metrics that a table has room for."""
        return metrics

    @classmethod
    def table(cls, name, metrics):
        """Rows of a table {name: {column: number}} that shows the metrics of a model."""
        return {name: cls.shown(metrics)}

    @classmethod
    def table_beside(cls, rows, result):
        """Rows of a table, and what a result says of baselines and of knowing nothing below them."""
        rows = rows | {name: cls.shown(metrics) for name, metrics in (result.get("baselines") or {}).items()}
        return rows | {cls.majority_name: cls.shown(result["majority"])}

    def pictures(self, outputs, targets):
        """{file name: what draws it into a path} of outputs on the evaluation rows."""
        return {}

    def baselines(self, model, processor, training, evaluation, progress=True):
        """{name: metrics} of what needs no training, on the same rows."""
        return {}


class OpenTask(Task):
    """What tasks without a vocabulary of answers share."""

    # The field gives its metrics in per cent already, or as they are.
    percent = 1
    answers = {}

    @classmethod
    def from_targets(cls, targets, min_answer_count=1):
        return cls()

    @classmethod
    def from_config(cls, config):
        return cls()

    def check_targets(self, targets, allow_unknown=False):
        """Any will do."""


def frozen_features(model, processor, samples, name, batch_size=64, progress=True):
    """(N,W) means over the tokens of the deepest tapped level of one encoder, of a dataset of raw samples or cached tokens;
    zeros for rows that lack the modality."""
    argument, rows = processor.argument_of(name), []
    values, mask = model.config.input_keys(name)
    for start in tqdm(
        range(0, len(samples), batch_size), desc=f"features of {name}", disable=not progress, leave=False
    ):
        batch = [samples[index] for index in range(start, min(start + batch_size, len(samples)))]
        if f"{name}_tokens" in batch[0]:
            tokens = [sample[f"{name}_tokens"] for sample in batch]
        else:
            own = [sample[argument] for sample in batch if sample[argument] is not None]
            read = dict(processor(**{argument: own}).to(model.device)) if own else {}
            made = iter(_unpadded(*model.base_model.encode_tokens(name, read[values], read.get(mask))) if own else ())
            tokens = [None if sample[argument] is None else next(made) for sample in batch]
        rows += [
            None if item is None else torch.as_tensor(np.asarray(item)).flatten(0, -2).float().mean(0)
            for item in tokens
        ]
    width = next(len(row) for row in rows if row is not None)
    return torch.stack([torch.zeros(width) if row is None else row for row in rows])


def _unpadded(tokens, mask):
    return [row if mask is None else row[mask[n]] for n, row in enumerate(tokens.cpu())]
