"""Tasks whose models write: captions, answers, turns of a dialogue."""

from collections import Counter
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .collator import SampleCollator
from .task import OpenTask, frozen_features


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
        texts, longest = (target["text"] for target in targets), 0
        while part := list(islice(texts, 1000)):
            ids = processor.writing_tokenizer(part, add_special_tokens=False)["input_ids"]
            longest = max(longest, *map(len, ids))
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
