"""Tasks whose rows have a label, several labels, or a number."""

from collections import Counter
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from .plots import confusion_plot, reliability_plot
from .task import Task, frozen_features, predict_logits


CALIBRATION_BINS = 15


class ClassificationTask(Task):
    """Labels of rows. A target is one label, or a list of all that hold."""

    model_class = "CrossModalForSequenceClassification"
    majority_name = "most common label"
    percent = 100
    metrics = ("accuracy", "weighted_f1", "macro_f1", "ece", "map")
    main_metric = "accuracy"
    reads_features = True

    def __init__(self, id2label, problem_type, thresholds=None):
        # JSON sorts numbers as words: 0, 1, 10, 2.
        self.id2label = dict(sorted((int(i), label) for i, label in id2label.items()))
        self.label2id = {label: index for index, label in self.id2label.items()}
        self.several = problem_type == "multi_label_classification"
        self.thresholds = thresholds

    @classmethod
    def from_targets(cls, targets, min_answer_count=1):
        """The task of a training split: its labels are those that occur at least `min_answer_count` times.

        Raises:
            ValueError: for targets that are no labels, or of which some rows have one and others a list.
        """
        kinds = {list if isinstance(target, list | tuple | set) else type(target) for target in targets}
        if not kinds <= {str} and kinds != {list}:
            names = sorted(kind.__name__ for kind in kinds)
            raise ValueError(
                f"labels are of type {' and '.join(names)}. Expected a string in every row, or a list of strings in every row; a "
                "number is learnt by task 'regression'."
            )
        several = kinds == {list}
        counts = Counter(label for target in targets for label in (target if several else [target]))
        labels = sorted(label for label, count in counts.items() if count >= min_answer_count)
        if len(labels) < 2:
            raise ValueError(
                f"{len(labels)} labels occur at least min_answer_count={min_answer_count} times in the training split. "
                "Expected at least 2: lower min_answer_count, or check the label column."
            )
        return cls(dict(enumerate(labels)), f"{'multi' if several else 'single'}_label_classification")

    @classmethod
    def from_config(cls, config):
        """The task of a trained model."""
        return cls(config.id2label, config.problem_type, config.thresholds)

    @property
    def answers(self):
        """What the model's config must say of this task."""
        return {
            "id2label": self.id2label,
            "problem_type": f"{'multi' if self.several else 'single'}_label_classification",
        }

    def describe(self):
        return f"{len(self.id2label)} labels"

    @staticmethod
    def shown(metrics):
        """Without F1 of single labels: cards show them apart."""
        return {key: value for key, value in metrics.items() if not key.startswith("f1_")}

    def pictures(self, outputs, targets):
        if self.several:
            return {}
        labels = list(self.id2label.values())
        return {
            "confusion.png": partial(confusion_plot, self.confusion(outputs, targets), labels),
            "reliability.png": partial(reliability_plot, *self.reliability(outputs, targets)),
        }

    def class_weights(self, targets):
        """Weights of the labels by which all count alike: N / (C count), or of several labels those that do not hold against those
        that do."""
        ids = self.encode_targets(targets)
        if self.several:
            held = ids.sum(0).clamp(min=1)
            return ((len(ids) - held).clamp(min=1) / held).tolist()
        counts = torch.bincount(ids[ids >= 0], minlength=len(self.id2label)).clamp(min=1)
        return (counts.sum() / (len(counts) * counts)).tolist()

    def encode_targets(self, targets):
        """(B,) ids, -100 for a label that is no class, or (B,A) of 0 and 1."""
        if not self.several:
            return torch.tensor([self.label2id.get(target, -100) for target in targets])
        labels = torch.zeros(len(targets), len(self.label2id))
        for row, target in zip(labels, targets, strict=True):
            row[[self.label2id[label] for label in target if label in self.label2id]] = 1.0
        return labels

    def check_targets(self, targets, allow_unknown=False):
        """Refuses labels that are no class, unless they may count as wrong."""
        if allow_unknown:
            return
        for row, target in enumerate(targets):
            unknown = [label for label in (target if self.several else [target]) if label not in self.label2id]
            if unknown:
                known = sorted(self.label2id)
                raise ValueError(
                    f"the label {unknown[0]!r} of row {row} is none of the {len(known)} that were seen in training "
                    f"({', '.join(known[:8])}{', ...' if len(known) > 8 else ''}). Use a dataset of these labels, or pass "
                    "--unknown-answers-wrong to score such rows as wrong."
                )

    def score_outputs(self, outputs, targets):
        """Metrics of what Trainer gathered over a dataset."""
        return self.score(outputs, targets)

    def evaluate(self, model, processor, samples, batch_size=128, progress=True):
        """Metrics of a model on a RowDataset, or one with cached tokens."""
        return self.score(predict_logits(model, processor, samples, batch_size, progress), samples.targets)

    def score(self, logits, targets):
        """Metrics in [0,1] of logits (N,A): `accuracy` (of several labels: all right), F1 of each label as `f1_<label>`,
        `weighted_f1` by how often a label is true, `macro_f1`; `ece` of one label (Guo et al. 2017, arXiv 1706.04599), `map`, the mean
        average precision, of several."""
        from sklearn.metrics import average_precision_score

        logits = torch.as_tensor(np.asarray(logits)).float()
        if not self.several:
            chosen = [self.id2label[index] for index in logits.argmax(-1).tolist()]
            found = self.score_labels(chosen, targets)
            sure, right, weight = self.reliability(logits, targets)
            return found | {"ece": float((weight * np.abs(sure - right)).sum())}
        truth, scores = self.encode_targets(targets).numpy(), logits.sigmoid().numpy()
        found = self._f1(truth, scores >= np.array(self.thresholds or [0.5] * truth.shape[1]))
        known = truth.any(axis=0)
        if known.any():
            found["map"] = float(average_precision_score(truth[:, known], scores[:, known], average="macro"))
        return found

    def score_labels(self, predictions, targets):
        """Of one label a row."""
        labels = sorted({*self.label2id, *targets})
        place = {label: index for index, label in enumerate(labels)}
        truth, chosen = (np.eye(len(labels))[[place[label] for label in given]] for given in (targets, predictions))
        return self._f1(truth, chosen, labels)

    def _f1(self, truth, chosen, labels=None):
        """Accuracy and F1 of truth and choices (N,A) of 0 and 1."""
        from sklearn.metrics import f1_score

        truth, chosen = truth.astype(bool), chosen.astype(bool)
        each = f1_score(truth, chosen, average=None, zero_division=0)
        held = truth.sum(axis=0)
        found = {
            "accuracy": float((truth == chosen).all(axis=1).mean()),
            "weighted_f1": float((each * held).sum() / max(1, held.sum())),
            "macro_f1": float(each[held > 0].mean()) if held.any() else 0.0,
        }
        names = labels or list(self.label2id)
        return found | {f"f1_{name}": float(value) for name, value, n in zip(names, each, held, strict=True) if n}

    def reliability(self, logits, targets):
        """How sure the model was, how often it was right, and the part of rows, of each of `CALIBRATION_BINS` bins (K,)."""
        probabilities = torch.as_tensor(np.asarray(logits)).float().softmax(-1)
        sure, chosen = (part.numpy() for part in probabilities.max(-1))
        right = np.array([self.id2label[index] == target for index, target in zip(chosen, targets, strict=True)])
        place = np.minimum((sure * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        counts = np.bincount(place, minlength=CALIBRATION_BINS)
        means = [
            np.bincount(place, values, minlength=CALIBRATION_BINS) / np.maximum(counts, 1) for values in (sure, right)
        ]
        return *means, counts / len(place)

    def confusion(self, logits, targets):
        """Rows by true and chosen label (A,A)."""
        counts = np.zeros((len(self.id2label),) * 2, dtype=int)
        truth = self.encode_targets(targets).numpy()
        for true, chosen in zip(truth, np.asarray(logits).argmax(-1), strict=True):
            if true >= 0:
                counts[true, chosen] += 1
        return counts

    def tune(self, logits, targets):
        """Thresholds of several labels by which the F1 of each is highest, on rows that nothing is reported of."""
        from sklearn.metrics import precision_recall_curve

        truth, scores = self.encode_targets(targets).numpy(), torch.as_tensor(np.asarray(logits)).float().sigmoid()
        self.thresholds = [0.5] * truth.shape[1]
        for label in np.flatnonzero(truth.any(axis=0)):
            precision, recall, cuts = precision_recall_curve(truth[:, label], scores[:, label].numpy())
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            self.thresholds[label] = float(cuts[f1[:-1].argmax()])
        return self.thresholds

    def majority(self, train_targets, targets):
        """Of the label that is most common in training, whatever is shown; of several, of those that hold more often than not."""
        if not self.several:
            return self.score_labels([Counter(train_targets).most_common(1)[0][0]] * len(targets), targets)
        common = self.encode_targets(train_targets).numpy().mean(axis=0) >= 0.5
        return self._f1(self.encode_targets(targets).numpy(), np.tile(common, (len(targets), 1)))

    def baselines(self, model, processor, training, evaluation, progress=True):
        """Logistic regression on the features of all modalities side by side (see `plain_features`), those that there are."""
        from sklearn.linear_model import LogisticRegressionCV
        from sklearn.multiclass import OneVsRestClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        sets = [_side_by_side(model, processor, samples, progress) for samples in (training, evaluation)]
        if sets[0] is None:
            return {}
        targets = self.encode_targets(training.targets).numpy()
        kept = slice(None) if self.several else targets >= 0
        learner = LogisticRegressionCV(
            Cs=[1e-4, 1e-3, 1e-2, 1e-1, 1.0],
            cv=3,
            max_iter=1000,
            l1_ratios=(0,),
            use_legacy_attributes=False,
            scoring="accuracy",
        )
        learner = OneVsRestClassifier(learner) if self.several else learner
        fitted = make_pipeline(StandardScaler(), learner).fit(sets[0][kept], targets[kept])
        scores = fitted.predict_proba(sets[1]).clip(1e-7, 1 - 1e-7)
        if self.several:
            return {_LINEAR: self.score(np.log(scores) - np.log1p(-scores), evaluation.targets)}
        logits = np.full((len(scores), len(self.id2label)), -20.0)
        logits[:, fitted.classes_] = np.log(scores)
        return {_LINEAR: self.score(logits, evaluation.targets)}


class RegressionTask(Task):
    """A number for every row."""

    model_class = "CrossModalForSequenceClassification"
    majority_name = "mean of training"
    # Errors are in the unit of the target.
    percent = 1
    metrics = ("mae", "rmse", "corr", "r2")
    main_metric = "mae"
    greater_is_better = False
    reads_features = True
    label2id = {"score": 0}
    answers = {"id2label": {0: "score"}, "problem_type": "regression"}

    @classmethod
    def from_targets(cls, targets, min_answer_count=1):
        cls._numbers(targets)
        return cls()

    @classmethod
    def from_config(cls, config):
        return cls()

    @staticmethod
    def _numbers(targets):
        for row, target in enumerate(targets):
            if isinstance(target, bool | str) or not np.isfinite(np.asarray(target, dtype=float)).all():
                raise ValueError(f"the target of row {row} is {target!r}. Expected a finite number in every row.")
        return np.asarray(targets, dtype=float)

    def describe(self):
        return "a number"

    def encode_targets(self, targets):
        """(B,) numbers."""
        return torch.tensor(self._numbers(targets), dtype=torch.float32)

    def check_targets(self, targets, allow_unknown=False):
        self._numbers(targets)

    def score_outputs(self, outputs, targets):
        return self.score(outputs, targets)

    def evaluate(self, model, processor, samples, batch_size=128, progress=True):
        return self.score(predict_logits(model, processor, samples, batch_size, progress), samples.targets)

    def score(self, logits, targets):
        """`mae`, `rmse`, Pearson's `corr` (0 where one does not vary), `r2`, of predictions (N,) or (N,1)."""
        found, truth = np.asarray(logits, dtype=float).reshape(-1), self._numbers(targets)
        apart, varies = found - truth, found.std() > 1e-9 and truth.std() > 1e-9
        return {
            "mae": float(np.abs(apart).mean()),
            "rmse": float(np.sqrt(np.square(apart).mean())),
            "corr": float(np.corrcoef(found, truth)[0, 1]) if varies else 0.0,
            "r2": float(1 - np.square(apart).mean() / truth.var()) if truth.std() > 1e-9 else 0.0,
        }

    def majority(self, train_targets, targets):
        """Of the mean of training, whatever is shown."""
        return self.score([float(np.nanmean(self._numbers(train_targets)))] * len(targets), targets)

    def baselines(self, model, processor, training, evaluation, progress=True):
        """Ridge regression on the features of all modalities side by side."""
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        sets = [_side_by_side(model, processor, samples, progress) for samples in (training, evaluation)]
        if sets[0] is None:
            return {}
        targets = self._numbers(training.targets)
        known = np.isfinite(targets)
        learner = make_pipeline(StandardScaler(), RidgeCV(alphas=(1.0, 10.0, 100.0, 1000.0)))
        fitted = learner.fit(sets[0][known], targets[known])
        return {"ridge regression on plain features": self.score(fitted.predict(sets[1]), evaluation.targets)}


class SentimentTask(RegressionTask):
    """Sentiment from -3 to 3, as CMU-MOSI and MOSEI have it, with the metrics of the field.

    A target is `{"score": a number, "label": whether it is 0 or more}`; of the few rows without a score (NaN) nothing is learnt, and
    the label alone is scored.
    """

    percent = 100
    metrics = ("accuracy", "weighted_f1", "acc2_nonneg", "acc2_negpos", "f1_negpos", "acc7", "mae", "corr")
    main_metric = "accuracy"

    @staticmethod
    def _numbers(targets):
        for row, target in enumerate(targets):
            if isinstance(target, dict) and not np.isfinite(target["score"]) and target["label"] is None:
                raise ValueError(
                    f"row {row} has neither a score (it is {target['score']!r}) nor a label. Leave it out, or give one."
                )
        return np.array([target["score"] if isinstance(target, dict) else target for target in targets], dtype=float)

    def score(self, logits, targets):
        """`acc2_nonneg`, 0 or more against less, on all rows, which is `accuracy` too, with its `weighted_f1`; `acc2_negpos`, above 0
        against below, where the truth is not 0, with `f1_negpos`; `acc7` of whole numbers in [-3,3]; `mae`; `corr`.

        As MulT's and MMSA's evaluations have them (Tsai et al. 2019, arXiv 1906.00295; Mao et al. 2022).
        """
        from sklearn.metrics import f1_score

        found, truth = np.asarray(logits, dtype=float).reshape(-1), self._numbers(targets)
        known = np.isfinite(truth)
        nonneg = np.array(
            [
                bool(t["label"]) if isinstance(t, dict) and t["label"] is not None else s >= 0
                for t, s in zip(targets, truth, strict=True)
            ]
        )
        scores = {
            "accuracy": float(((found >= 0) == nonneg).mean()),
            "weighted_f1": float(f1_score(nonneg, found >= 0, average="weighted", zero_division=0)),
        }
        found, truth = found[known], truth[known]
        if not len(truth):
            return scores
        plain, rows = super().score(found, truth), truth != 0
        scores |= {
            "acc2_nonneg": float(((found >= 0) == (truth >= 0)).mean()),
            "acc7": float((np.rint(found.clip(-3, 3)) == np.rint(truth.clip(-3, 3))).mean()),
            "mae": plain["mae"],
            "corr": plain["corr"],
        }
        if rows.any():
            signs = truth[rows] > 0, found[rows] > 0
            scores["acc2_negpos"] = float((signs[0] == signs[1]).mean())
            scores["f1_negpos"] = float(f1_score(*signs, average="weighted", zero_division=0))
        return scores


_LINEAR = "logistic regression on plain features"


def plain_features(model, processor, samples, name, batch_size=64, progress=True):
    """What a linear model is given of one modality: (N,W), zeros for rows that lack it, or None for a kind that has no such features.

    Of a frozen encoder the mean of its deepest tokens (so does `train` give pretrained ones that it trains). Else of feature sequences, sound and EEG mean and deviation over time of what
    the processor makes of them; with a context only the row's own place in it.
    """
    kind = model.config.modality_settings[name]["type"]
    if name in model.config.frozen_modalities:
        return frozen_features(model, processor, samples, name, batch_size, progress)
    if kind not in ("features", "audio", "eeg"):
        return None
    argument, rows = processor.argument_of(name), []
    values, mask = model.config.input_keys(name)
    for start in tqdm(
        range(0, len(samples), batch_size), desc=f"features of {name}", disable=not progress, leave=False
    ):
        own = [samples[index][argument] for index in range(start, min(start + batch_size, len(samples)))]
        there = [item for item in own if item is not None]
        read = dict(processor(**{argument: there})) if there else {}
        steps = iter(_steps(read[values], read.get(mask)) if there else ())
        rows += [None if item is None else next(steps) for item in own]
    context = model.config.modality_settings[name].get("context", 0)
    made = [None if row is None else _pooled(row, context) for row in rows]
    width = next(len(row) for row in made if row is not None)
    return torch.stack([torch.zeros(width) if row is None else row for row in made])


def _steps(values, mask):
    """(steps, mask of them) of every row: values (B,T,...), or spectrograms (B,F,T) where the mask is of the last axis."""
    if values.dim() == 2:
        # Waveforms: frames of a few milliseconds.
        values = values[:, : values.shape[1] // 64 * 64].unflatten(1, (-1, 64))
        mask = None if mask is None else mask[:, : values.shape[1] * 64 : 64]
    elif mask is not None and mask.shape[1] != values.shape[1] and mask.shape[1] == values.shape[-1]:
        values = values.transpose(1, 2)
    elif values.dim() == 3 and mask is None and values.shape[1] < values.shape[2]:
        values = values.transpose(1, 2)
    for number, row in enumerate(values.flatten(2)):
        yield row, None if mask is None else mask[number].bool()


def _pooled(row, context):
    steps, mask = row
    if context:
        return steps[context].float()
    steps = steps if mask is None else steps[mask]
    return torch.cat([steps.mean(0), steps.std(0, correction=0)]) if len(steps) > 1 else steps[0].float()


def _side_by_side(model, processor, samples, progress):
    """Plain features (N,W) of all modalities that have some, or None."""
    found = [
        plain_features(model, processor, samples, name, progress=progress) for name in model.config.modality_names
    ]
    found = [part for part in found if part is not None]
    return torch.cat(found, dim=1).numpy() if found else None
