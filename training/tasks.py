"""Tasks: what a head learns from, and how it is scored. One row of `TASKS` per head."""

import hashlib
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .collator import SampleCollator
from .metrics.vqa_accuracy.vqa_scoring import normalize_answer, soft_targets, vqa_score


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
    # What `evaluate` takes beyond what all tasks take.
    evaluate_options = ()

    @staticmethod
    def table(name, metrics):
        """Rows of a table {name: {column: number}} that shows the metrics of a model."""
        return {name: metrics}

    def baselines(self, model, processor, training, evaluation, progress=True):
        """{name: metrics} of what needs no training, on the same rows."""
        return {}


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


class RetrievalTask(OpenTask):
    """Pairs of two modalities. A target is `{"id": of the first input, "keys": [what says which other rows are right too]}`."""

    model_class = "CrossModalForRetrieval"
    main_metric = "mean_r1"
    majority_name = "by chance"
    scores_whole = True
    evaluate_options = ("rerank", "full", "fold_size")

    def describe(self):
        return "pairs"

    @staticmethod
    def table(name, metrics):
        rows = {f"{name}, two stages": "", f"{name}, embeddings": "contrastive_", f"{name}, all pairs": "full_"}
        short = ("mean_r1", "_r1", "_r5", "_r10", "_medr", "_10way")
        table = {}
        for label, prefix in rows.items():
            own = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
            own = {k: v for k, v in own.items() if k.endswith(short) and k.count("_") == 1}
            if own:
                table[label] = own
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


class CaptioningTask(OpenTask):
    """Texts to write. A target is `{"text": what is learnt, "references": [all that are right]}`."""

    model_class = "CrossModalForCaptioning"
    majority_name = "most common text"
    writes = True
    evaluate_options = ("num_beams", "max_new_tokens", "meteor")
    metrics = ("exact_match", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider_d")
    main_metric = "cider_d"
    processor = None

    def describe(self):
        return "texts to write"

    def begin(self, model, processor, targets):
        """Before training: how long texts become is what generation stops at by itself."""
        self.processor = processor
        longest = max(
            map(len, processor.writing_tokenizer([t["text"] for t in targets], add_special_tokens=False)["input_ids"])
        )
        limit = processor.writer["max_tokens"]
        model.generation_config.max_new_tokens = min(longest + 1, limit - 1) if limit else longest + 1

    def encode_targets(self, targets):
        """Texts, of which the processor makes labels."""
        return [target["text"] for target in targets]

    def decode(self, words):
        """Texts of generated words (N,T), -100 where batches of other lengths were put together."""
        words = np.where(np.asarray(words) < 0, self.processor.writing_tokenizer.pad_token_id or 0, words)
        return [text.strip() for text in self.processor.batch_decode(words, skip_special_tokens=True)]

    def score_outputs(self, outputs, targets):
        return self.score(self.decode(outputs), targets)

    @torch.inference_mode()
    def evaluate(self, model, processor, samples, batch_size=128, progress=True, meteor=None, **options):
        """Metrics of what a model writes about each row, once however many texts it has. meteor: score it too (None: where Java
        is). options: of `generate`."""
        self.processor = processor
        rows = [index for index, (_, item) in enumerate(samples.places) if not item]
        loader = DataLoader(Subset(samples, rows), batch_size, collate_fn=list)
        texts = []
        for batch in tqdm(loader, desc="write", disable=not progress, leave=False):
            texts += self.write(model, batch, **options)
        return self.score(texts, [samples.targets[row] for row in rows], meteor)

    @torch.inference_mode()
    def write(self, model, samples, **options):
        """What a model writes about samples. options: of `generate`."""
        batch = SampleCollator(self.processor)(samples)
        batch = {key: value.to(model.device) for key, value in batch.items()}
        return self.processor.written(model.eval().generate(**batch, **options), batch)

    def score(self, texts, targets, meteor=False):
        """`exact_match` (of any reference, as the tokenizer writes it), and the metrics of captions where pycocoevalcap is there."""
        references = [target["references"] for target in targets]
        plain = [{self._as_written(text) for text in own} for own in references]
        found = {"exact_match": float(np.mean([text in own for text, own in zip(texts, plain, strict=True)]))}
        try:
            metric = _captions_metric()
        except ImportError:
            return found
        scores = metric.compute(predictions=texts, references=references, meteor=meteor)
        return found | scores

    def _as_written(self, text):
        """A reference as the tokenizer gives it back: lower case and without double spaces, say."""
        ids = self.processor.writing_tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.processor.decode(ids, skip_special_tokens=True).strip()

    def majority(self, train_targets, targets):
        """Of the text that is most common in training, whatever is shown."""
        common = Counter(target["text"] for target in train_targets).most_common(1)[0][0]
        return self.score([self._as_written(common)] * len(targets), targets)

    @torch.inference_mode()
    def baselines(self, model, processor, training, evaluation, progress=True):
        """The text of the most similar training row (cosine of the mean token of a frozen encoder), if there is such an encoder and
        nothing else to read."""
        frozen = [name for name in model.config.modality_names if name in model.config.frozen_modalities]
        if len(frozen) != len(model.config.modality_names) or len(frozen) > 1:
            return {}
        known, asked = (
            torch.nn.functional.normalize(
                frozen_features(model, processor, samples, frozen[0], progress=progress), dim=-1
            )
            for samples in (training, evaluation)
        )
        nearest = torch.cat([(part @ known.T).argmax(dim=1) for part in asked.split(1024)]).tolist()
        texts = [self._as_written(training.targets[row]["text"]) for row in nearest]
        return {"nearest training row": self.score(texts, evaluation.targets)}


class AnsweringTask(CaptioningTask):
    """Answers written freely: the question is a text modality."""

    main_metric = "exact_match"
    percent = 100
    majority_name = "most common answer"

    def evaluate(self, *args, meteor=False, **options):
        return super().evaluate(*args, meteor=meteor, **options)


class DialogueTask(AnsweringTask):
    """What an assistant says in turn about a picture."""

    evaluate_options = ("num_beams", "max_new_tokens", "history")
    metrics = ("exact_match", "first_turns", "later_turns")
    scores_whole = True

    @torch.inference_mode()
    def evaluate(self, model, processor, samples, batch_size=128, progress=True, history=True, **options):
        """`exact_match` of all turns, of the first and of the later ones, each of which a model answers after what it said itself
        before. history: False shows it the last question alone."""
        self.processor = processor
        turns = {}
        for index, (row, _) in enumerate(samples.places):
            turns.setdefault(row, []).append(index)
        said, texts = {row: [] for row in turns}, [None] * len(samples)
        for number in tqdm(range(max(map(len, turns.values()))), desc="turns", disable=not progress, leave=False):
            now = [(row, own[number]) for row, own in turns.items() if len(own) > number]
            for start in range(0, len(now), batch_size):
                part = now[start : start + batch_size]
                batch = []
                for row, index in part:
                    sample = dict(samples[index])
                    if sample["text"] is not None:
                        sample["text"] = _with_own(sample["text"], said[row]) if history else sample["text"][-1:]
                    batch.append(sample)
                for (row, index), text in zip(part, self.write(model, batch, **options), strict=True):
                    said[row].append(text)
                    texts[index] = text
        right = self._right(texts, samples.targets)
        first = np.isin(np.arange(len(samples)), [own[0] for own in turns.values()])
        found = {"exact_match": float(right.mean()), "first_turns": float(right[first].mean())}
        return found | ({"later_turns": float(right[~first].mean())} if not first.all() else {})

    def score(self, texts, targets):
        """Of single turns, each after the true ones before it."""
        return {"exact_match": float(self._right(texts, targets).mean())}

    def _right(self, texts, targets):
        """(N,) bool: which texts are what was to be said."""
        return np.array([t == self._as_written(target["text"]) for t, target in zip(texts, targets, strict=True)])


def _with_own(messages, said):
    """A dialogue in which the assistant has said what it said."""
    answers = iter(said)
    return [
        message | {"content": next(answers)} if message["role"] == "assistant" else message for message in messages
    ]


@lru_cache(maxsize=1)
def _captions_metric():
    import evaluate

    return evaluate.load(str(Path(__file__).parent / "metrics" / "captions"))


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
    "retrieval": RetrievalTask,
    "captioning": CaptioningTask,
    "answering": AnsweringTask,
    "dialogue": DialogueTask,
}
