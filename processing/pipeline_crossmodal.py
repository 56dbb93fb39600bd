"""Pipelines of the family, one per task. They run from a Hub folder: `pipeline(model=folder, trust_remote_code=True)`.

Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

from collections.abc import Sized

from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator


class CrossModalPipeline(Pipeline):
    """Samples are batched by the processor itself, which knows what a row may lack and pads to the longest."""

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    # Usual names of inputs to the arguments of the processor.
    _aliases = {"image": "images", "question": "text", "sound": "audio", "video": "videos"}

    def preprocess(self, sample, **parameters):
        return self._collate([sample])

    def _keep(self, sample, **parameters):
        return sample

    def _collate(self, samples):
        samples = [{self._aliases.get(key, key): value for key, value in sample.items()} for sample in samples]
        keys = dict.fromkeys(key for sample in samples for key in sample)
        return self.processor(**{key: [sample.get(key) for sample in samples] for key in keys})

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        if isinstance(inputs, Sized):
            dataset = PipelineDataset(inputs, self._keep, preprocess_params)
        else:
            dataset = PipelineIterator(inputs, self._keep, preprocess_params)
        loader = DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=self._collate)
        batches = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(batches, self.postprocess, postprocess_params)


class CrossModalVQAPipeline(CrossModalPipeline):
    """Questions about images (or whatever else the model reads) to answers with scores.

    Example:
        >>> pipe = pipeline(model=folder, trust_remote_code=True)
        >>> pipe(image, "what color is the circle?", top_k=2)
        [{'score': 0.98, 'answer': 'red'}, {'score': 0.01, 'answer': 'blue'}]
    """

    def _sanitize_parameters(self, top_k=None, return_modality_weights=None, **kwargs):
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)[0]!r} is no parameter of this pipeline. Expected top_k, return_modality_weights, "
                "batch_size or num_workers."
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}. Expected at least 1.")
        given = {"top_k": top_k, "return_modality_weights": return_modality_weights}
        return {}, {}, {key: value for key, value in given.items() if value is not None}

    def __call__(self, image=None, question=None, **kwargs):
        """Answers one question or many.

        Args:
            image: an image in any form the processor reads, a list of them, or whole samples: a dict such as
                `{"image": ..., "question": ...}` (keys may be any modality of the model), a list or a generator of such
                dicts, or a dataset.
            question: a string, or a list. A single image beside many questions is used for all, and the other way round.
            top_k: number of answers (default 5).
            return_modality_weights: also return how much each modality counted.
            batch_size: rows per forward.

        Returns:
            A list of `{"score", "answer"}`, best first, or for many samples a list of such lists; with
            `return_modality_weights` each is `{"answers": [...], "modality_weights": {modality: weight}}`.
        """
        if question is None and not _is_image(image):
            return super().__call__(image, **kwargs)
        many = {"image": isinstance(image, list | tuple), "question": isinstance(question, list | tuple)}
        if not any(many.values()):
            return super().__call__({"image": image, "question": question}, **kwargs)
        count = len(image) if many["image"] else len(question)
        images = list(image) if many["image"] else [image] * count
        questions = list(question) if many["question"] else [question] * count
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images and {len(questions)} questions were given. Give as many of each.")
        return super().__call__(
            [{"image": i, "question": q} for i, q in zip(images, questions, strict=True)], **kwargs
        )

    def _forward(self, batch):
        output = self.model(**batch)
        return {"logits": output.logits, "modality_weights": output.modality_weights}

    def postprocess(self, output, top_k=5, return_modality_weights=False):
        config = self.model.config
        logits = output["logits"][0].float()
        scores = logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(-1)
        best = scores.topk(min(top_k, len(scores)))
        answers = [
            {"score": score, "answer": config.id2label[index]}
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        if not return_modality_weights:
            return answers
        weights = output["modality_weights"][0].float().tolist()
        return {"answers": answers, "modality_weights": dict(zip(config.modality_names, weights, strict=True))}


def _is_image(value):
    """Whether a lone first argument is an image, and not a sample, a batch of samples or a stream of them."""
    if isinstance(value, str | bytes) or hasattr(value, "convert"):
        return True
    items = value if isinstance(value, list | tuple) else []
    return bool(items) and _is_image(items[0])
