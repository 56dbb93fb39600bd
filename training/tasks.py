"""Tasks: what a head learns from, and how it is scored. One row of `TASKS` per head."""

from collections import Counter

import numpy as np
import torch

from .metrics.vqa_accuracy.vqa_scoring import normalize_answer, soft_targets, vqa_score


class VQATask:
    """Answers from a vocabulary. Targets are one answer, the answers of all annotators, or the score of each answer."""

    model_class = "CrossModalForVQA"
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


class ClassificationTask(VQATask):
    """Labels of rows: one of several, as strings."""

    model_class = "CrossModalForSequenceClassification"
    metrics = ("accuracy", "weighted_f1")
    main_metric = "accuracy"

    @staticmethod
    def score_answers(predictions, targets):
        """`accuracy`, and `weighted_f1`: F1 of each class, weighted by how often it is true."""
        from sklearn.metrics import f1_score

        right = [prediction == target for prediction, target in zip(predictions, targets, strict=True)]
        f1 = f1_score(list(targets), list(predictions), average="weighted", zero_division=0)
        return {"accuracy": float(np.mean(right)), "weighted_f1": float(f1)}


def _scores(target):
    """{answer: score in [0,1]} of a target of any form."""
    return target if isinstance(target, dict) else soft_targets([target] if isinstance(target, str) else target)


def name_of(task):
    """The row of `TASKS` that a task is of."""
    return next(name for name, kind in TASKS.items() if type(task) is kind)


TASKS = {"vqa": VQATask, "classification": ClassificationTask}
