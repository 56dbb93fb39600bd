"""The task of labelling points: what is learnt, how it is scored, and the second stage, on labels that the first one is sure of."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .collator import SampleCollator
from .plots import confusion_plot
from .task import Task


class PointSegmentationTask(Task):
    """A class for every point. A target is `{"labels": (N,) long, -1 where the truth is not known, "classes": names}`.

    Where a model learns from tags alone, the tags of a scene are the classes among its labels, and it sees no more of them.
    """

    model_class = "CrossModalForPointSegmentation"
    majority_name = "most common class"
    percent = 100
    metrics = ("miou", "point_accuracy")
    main_metric = "miou"

    def __init__(self, id2label):
        # JSON sorts numbers as words: 0, 1, 10, 2.
        self.id2label = dict(sorted((int(i), label) for i, label in id2label.items()))
        self.label2id = {label: index for index, label in self.id2label.items()}

    @classmethod
    def from_targets(cls, targets, min_answer_count=1):
        """The classes of a schema, whether the training split has all of them or not."""
        return cls(dict(enumerate(targets[0]["classes"])))

    @classmethod
    def from_config(cls, config):
        """The task of a trained model."""
        return cls(config.id2label)

    @property
    def answers(self):
        """What the model's config must say of this task."""
        return {"id2label": self.id2label}

    def describe(self):
        return f"{len(self.id2label)} classes of points"

    @staticmethod
    def shown(metrics):
        """Without the loss, which is another one at each stage."""
        return {key: value for key, value in metrics.items() if key != "loss"}

    def class_weights(self, targets):
        """Weights of the classes by which all count alike: N / (C count)."""
        counts = self._counts(targets).clip(min=1)
        return (counts.sum() / (len(counts) * counts)).tolist()

    def _counts(self, targets):
        return sum(np.bincount(ids[ids >= 0], minlength=len(self.id2label)) for ids in map(self.ids_of, targets))

    def ids_of(self, target):
        """Labels (N,) of a target as classes of this task, -1 for none."""
        own = np.array([self.label2id.get(name, -1) for name in target["classes"]] + [-1])
        return own[target["labels"]]

    def encode_targets(self, targets):
        """(B,N) long, -100 for what has no label, and for padding."""
        rows = [torch.from_numpy(self.ids_of(target)) for target in targets]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return padded.masked_fill(padded < 0, -100)

    def check_targets(self, targets, allow_unknown=False):
        """Refuses classes that the model does not know, unless their points may count as wrong."""
        unknown = [] if allow_unknown else [name for name in targets[0]["classes"] if name not in self.label2id]
        if unknown:
            raise ValueError(
                f"the dataset has the class {unknown[0]!r}, which is none of {list(self.label2id)}. Use a dataset of these classes, or pass "
                "--unknown-answers-wrong to score such points as wrong."
            )
        if not any((target["labels"] >= 0).any() for target in targets):
            raise ValueError("no point of these rows has a label: there is nothing to measure on.")

    def score_outputs(self, outputs, targets):
        """Metrics of logits (R,N,C) that Trainer gathered over a dataset, longer rows padding others."""
        return self.score([row.argmax(-1) for row in outputs], targets)

    @torch.inference_mode()
    def evaluate(self, model, processor, samples, batch_size=8, progress=True):
        """Metrics of a model on a RowDataset, or one with cached tokens."""
        model.eval()
        found = []
        loader = DataLoader(samples, min(batch_size, 8), collate_fn=SampleCollator(processor))
        for batch in tqdm(loader, desc="evaluate", disable=not progress, leave=False):
            batch = {key: value.to(model.device) for key, value in batch.items()}
            found += list(model(**batch).logits.argmax(dim=-1).cpu().numpy())
        return self.score(found, samples.targets)

    def confusion(self, predictions, targets):
        """Points by true and chosen class (C,C), of one matrix for the whole dataset; points without a truth are left out.

        predictions: ids (N,) of each row, or longer, with padding at the end.
        """
        count = len(self.id2label)
        matrix = np.zeros((count, count), dtype=np.int64)
        for chosen, target in zip(predictions, targets, strict=True):
            truth = self.ids_of(target)
            known = truth >= 0
            pairs = truth[known] * count + np.asarray(chosen)[: len(truth)][known]
            matrix += np.bincount(pairs, minlength=count * count).reshape(count, count)
        return matrix

    def score(self, predictions, targets):
        """`miou`, the mean of `iou_<class>`, right / (right + missed + wrongly taken for it) over all points of the dataset, of the classes
        that the truth has (as ScanNet and S3DIS are scored); `point_accuracy`."""
        matrix = self.confusion(predictions, targets)
        right, true, chosen = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
        ious = right / np.maximum(true + chosen - right, 1)
        there = true > 0
        found = {"miou": float(ious[there].mean()), "point_accuracy": float(right.sum() / true.sum())}
        return found | {f"iou_{self.id2label[index]}": float(ious[index]) for index in np.flatnonzero(there)}

    def majority(self, train_targets, targets):
        """Of the class that most points of training have, everywhere."""
        common = int(self._counts(train_targets).argmax())
        return self.score([np.full(len(target["labels"]), common) for target in targets], targets)

    def pictures(self, outputs, targets):
        matrix = self.confusion([row.argmax(-1) for row in outputs], targets)
        return {"confusion.png": partial(confusion_plot, matrix, list(self.id2label.values()))}


class Relabelled(Dataset):
    """A dataset of scenes with other labels of points. labels: (N,) long of each row, -1 for none."""

    def __init__(self, dataset, labels, classes):
        self.dataset, self.groups = dataset, dataset.groups
        self.targets = [{"labels": own, "classes": classes} for own in labels]

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index] | {"target": self.targets[index]}


@torch.no_grad()
def pseudo_labelled(model, processor, task, dataset, batch_size=8):
    """A training dataset with the labels that a model trained on its tags is sure of (see `pseudo_labels` of the head)."""
    model.eval()
    labels, classes = [], tuple(task.id2label.values())
    for batch in DataLoader(dataset, batch_size, collate_fn=SampleCollator(processor, task.encode_targets)):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        mask = batch[f"{model.points}_mask"].bool()
        found = model.pseudo_labels(**batch)
        labels += [own[real].clamp(min=-1).cpu().numpy() for own, real in zip(found, mask, strict=True)]
    return Relabelled(dataset, labels, classes)


def second_stage(recipe):
    """The recipe of the second stage: a new model, on labels of points, with what `pseudo_labels` of the recipe changes."""
    own = recipe.pseudo_labels
    config = {**(recipe.model.get("config") or {}), **own.get("config", {}), "supervision": "full"}
    training = {**recipe.training, **own.get("training", {})}
    return replace(recipe, model={**recipe.model, "config": config}, training=training, pseudo_labels={})


def labels_table(dataset, truth, task):
    """How right pseudo-labels are, as a line of report. truth: the dataset with its own labels."""
    counts = Counter()
    for own, target in zip(dataset.targets, truth.targets, strict=True):
        real = task.ids_of(target)
        given = own["labels"] >= 0
        counts["given"] += int(given.sum())
        counts["points"] += len(real)
        counts["known"] += int((given & (real >= 0)).sum())
        counts["right"] += int((given & (real >= 0) & (own["labels"] == real)).sum())
    right = f", {counts['right'] / counts['known']:.1%} of those with a truth are right" if counts["known"] else ""
    return f"pseudo-labels: {counts['given'] / counts['points']:.1%} of the points of training{right}."
