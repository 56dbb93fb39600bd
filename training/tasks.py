"""Tasks: what a head learns from, and how it is scored. One row of `TASKS` per head."""

import hashlib
from collections import Counter

import numpy as np
import torch

from .classification import ClassificationTask, RegressionTask, SentimentTask
from .metrics.vqa_accuracy.vqa_scoring import normalize_answer, soft_targets, vqa_score
from .points import PointSegmentationTask
from .task import OpenTask, Task, predict_logits
from .writing import AnsweringTask, CaptioningTask, DialogueTask


class VQATask(Task):
    """Answers from a vocabulary. Targets are one answer, the answers of all annotators, or the score of each answer."""

    model_class = "CrossModalForVQA"
    majority_name = "most common answer"
    # What makes per cent of a metric.
    percent = 100
    metrics = ("accuracy", "vqa_accuracy")
    main_metric = "vqa_accuracy"

    def __init__(self, id2label, problem_type):
        self.id2label = {int(index): label for index, label in id2label.items()}
        self.label2id = {label: index for index, label in self.id2label.items()}
        self.soft = problem_type == "multi_label_classification"

    @classmethod
    def from_targets(cls, targets, min_answer_count=1):
        """The task of a training split: its vocabulary is every answer given at least `min_answer_count` times.

        Several annotators make soft targets; their answers are normalised as the official scorer does.
        """
        soft = any(not isinstance(target, str) for target in targets)
        if soft:
            counts = Counter(answer for target in targets for answer in _scores(target))
        else:
            counts = Counter(targets)
        labels = sorted(answer for answer, count in counts.items() if count >= min_answer_count)
        if len(labels) < 2:
            raise ValueError(
                f"{len(labels)} answers occur at least min_answer_count={min_answer_count} times in the training split. "
                "Expected at least 2: lower min_answer_count, or check the answer column."
            )
        return cls(dict(enumerate(labels)), "multi_label_classification" if soft else "single_label_classification")

    @classmethod
    def from_config(cls, config):
        """The task of a trained model."""
        return cls(config.id2label, config.problem_type)

    @property
    def answers(self):
        """What the model's config must say of this task."""
        return {
            "id2label": self.id2label,
            "problem_type": "multi_label_classification" if self.soft else "single_label_classification",
        }

    def encode_targets(self, targets):
        """Labels of a batch: (B,) ids, or (B,A) scores. An answer that is no class cannot be learnt and has no id."""
        if not self.soft:
            return torch.tensor([self.label2id.get(target, -100) for target in targets])
        labels = torch.zeros(len(targets), len(self.label2id))
        for row, target in zip(labels, targets, strict=True):
            for answer, score in _scores(target).items():
                if answer in self.label2id:
                    row[self.label2id[answer]] = score
        return labels

    def check_targets(self, targets, allow_unknown=False):
        """Refuses single answers outside the vocabulary, unless they may count as wrong."""
        if self.soft or allow_unknown:
            return
        for row, target in enumerate(targets):
            if isinstance(target, str) and target not in self.label2id:
                known = sorted(self.label2id)
                raise ValueError(
                    f"the answer {target!r} of row {row} is outside the model's {len(known)} answers "
                    f"({', '.join(known[:8])}{', ...' if len(known) > 8 else ''}). Use a dataset of this vocabulary, or "
                    "pass --unknown-answers-wrong to score such rows as wrong."
                )

    def describe(self):
        """What there is to learn, for a line of report."""
        return f"{len(self.id2label)} labels"

    def score_outputs(self, outputs, targets):
        """Metrics of what Trainer gathered over a dataset."""
        return self.score(outputs, targets)

    def evaluate(self, model, processor, samples, batch_size=128, progress=True):
        """Metrics of a model on a RowDataset, or one with cached tokens."""
        return self.score(predict_logits(model, processor, samples, batch_size, progress), samples.targets)

    def score(self, logits, targets):
        """Metrics in [0,1] of logits (N,A): `accuracy` (the answer, or the annotators' most common one) and VQA's own."""
        predictions = [self.id2label[index] for index in np.asarray(logits).argmax(-1).tolist()]
        return self.score_answers(predictions, targets)

    @staticmethod
    def score_answers(predictions, targets):
        exact, official = [], []
        for prediction, target in zip(predictions, targets, strict=True):
            if isinstance(target, dict):
                exact.append(target.get(prediction, 0.0) == max(target.values(), default=1.0))
                official.append(target.get(prediction, 0.0))
                continue
            annotators = target if isinstance(target, list) else [target]
            truth = Counter(map(normalize_answer, annotators)).most_common(1)[0][0]
            exact.append(normalize_answer(prediction) == truth)
            official.append(vqa_score(prediction, annotators))
        return {"accuracy": float(np.mean(exact)), "vqa_accuracy": float(np.mean(official))}

    def majority(self, train_targets, targets):
        """Score of the answer that is most common in training, whatever is asked."""
        counts = Counter(a for t in train_targets for a in ([t] if isinstance(t, str) else t))
        return self.score_answers([counts.most_common(1)[0][0]] * len(targets), targets)


class RetrievalTask(OpenTask):
    """Pairs of two modalities. A target is `{"id": of the first input, "keys": [what says which other rows are right too]}`."""

    model_class = "CrossModalForRetrieval"
    main_metric = "mean_r1"
    majority_name = "by chance"
    scores_whole = True
    evaluate_options = ("rerank", "full", "fold_size", "by_image")

    def describe(self):
        return "pairs"

    @staticmethod
    def table(name, metrics):
        rows = {
            "two stages": "",
            "embeddings": "contrastive_",
            "embeddings corrected": "corrected_",
            "all pairs": "full_",
        }
        short = ("mean_r1", "_r1", "_r5", "_r10", "_medr", "_10way")
        table = {}
        for label, prefix in rows.items():
            own = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
            own = {k: v for k, v in own.items() if k.endswith(short) and k.count("_") == 1}
            if own:
                table[f"{name}, {label}"] = own
        return table

    def score_outputs(self, outputs, targets):
        """Of the embeddings alone: outputs {modality: (N,E)}, a row for every sample."""
        from .retrieval import score_embeddings

        return score_embeddings(*list(outputs.values())[:2], targets)

    def evaluate(self, model, processor, samples, batch_size=128, progress=True, **options):
        """Of the two stages together; with `contrastive_` before them, of the embeddings alone. options: see
        `evaluate_two_stages`."""
        from .retrieval import evaluate_two_stages

        return evaluate_two_stages(model, processor, samples, progress=progress, **options)

    @staticmethod
    def majority(train_targets, targets):
        """Of candidates in any order, expected."""
        from .retrieval import inputs_of

        first, right = inputs_of(targets)
        every = torch.arange(len(targets))
        pairs = sum(int(right(rows, every).sum()) for rows in torch.arange(len(first)).split(1024))
        return {"mean_r1": 100 * pairs / (len(first) * len(targets))}

    def encode_targets(self, targets):
        """(B,K) whole numbers: rows are positives of each other where they agree in any column."""
        return torch.tensor([[_hash(key) for key in target["keys"]] for target in targets])


def _hash(key):
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big", signed=True)


def _scores(target):
    """{answer: score in [0,1]} of a target of any form."""
    return target if isinstance(target, dict) else soft_targets([target] if isinstance(target, str) else target)


def name_of(task):
    """The row of `TASKS` that a task is of."""
    return next(name for name, kind in TASKS.items() if type(task) is kind)


TASKS = {
    "vqa": VQATask,
    "classification": ClassificationTask,
    "regression": RegressionTask,
    "sentiment": SentimentTask,
    "retrieval": RetrievalTask,
    "captioning": CaptioningTask,
    "answering": AnsweringTask,
    "dialogue": DialogueTask,
    "point_segmentation": PointSegmentationTask,
}
