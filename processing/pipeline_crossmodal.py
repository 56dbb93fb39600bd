"""Pipelines of the family, one per task. They run from a Hub folder: `pipeline(model=folder, trust_remote_code=True)`.

Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

from collections.abc import Sized

import torch
from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .reading_points_crossmodal import draw_from_above, read_points, write_labelled_ply


class CrossModalPipeline(Pipeline):
    """Samples are batched by the processor itself, which knows what a row may lack and pads to the longest."""

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    # Usual names of inputs to the arguments of the processor.
    _aliases = {"image": "images", "question": "text", "sound": "audio", "video": "videos"}

    def save_pretrained(self, save_directory, **kwargs):
        """Saves the processor too, which transformers' own leaves out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def push_to_hub(self, repo_id, **kwargs):
        """Pushes processor and model, each as its own `push_to_hub` does: a repo that `pipeline(model=repo_id)` loads."""
        self.processor.push_to_hub(repo_id, **kwargs)
        return self.model.push_to_hub(repo_id, **kwargs)

    def _by_name(self, inputs, kwargs):
        """(one sample or many, what is left of kwargs), where one sample may be given by the names of its inputs."""
        names = {self.processor.argument_of(name) for name in self.processor.modality_names}
        names |= {*self.processor.modality_names, *self._aliases}
        sample = {key: kwargs[key] for key in kwargs if key in names}
        if sample and inputs is not None:
            raise ValueError(f"samples and {sorted(sample)} were both given. Give one dict, or inputs by name.")
        return sample if inputs is None else inputs, {key: kwargs[key] for key in kwargs if key not in names}

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


class CrossModalScoringPipeline(CrossModalPipeline):
    """What the pipelines share whose models score labels or answers."""

    def _sanitize_parameters(self, top_k=None, return_modality_weights=None, **kwargs):
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)[0]!r} is no parameter of this pipeline. Expected top_k, return_modality_weights, "
                "batch_size or num_workers, and inputs of the model."
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}. Expected at least 1.")
        given = {"top_k": top_k, "return_modality_weights": return_modality_weights}
        return {}, {}, {key: value for key, value in given.items() if value is not None}

    def _forward(self, batch):
        output = self.model(**batch)
        return {"logits": output.logits, "modality_weights": output.modality_weights}

    def _with_weights(self, key, found, output, return_modality_weights):
        """What was found, under `key` beside the weights of modalities if those are wanted."""
        if not return_modality_weights:
            return found
        weights = output["modality_weights"][0].float().tolist()
        return {key: found, "modality_weights": dict(zip(self.model.config.modality_names, weights, strict=True))}


class CrossModalVQAPipeline(CrossModalScoringPipeline):
    """Questions about images (or whatever else the model reads) to answers with scores.

    Example:
        >>> pipe = pipeline(model=folder, trust_remote_code=True)
        >>> pipe(image, "what color is the circle?", top_k=2)
        [{'score': 0.98, 'answer': 'red'}, {'score': 0.01, 'answer': 'blue'}]
    """

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

    def postprocess(self, output, top_k=5, return_modality_weights=False):
        config = self.model.config
        logits = output["logits"][0].float()
        scores = logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(-1)
        best = scores.topk(min(top_k, len(scores)))
        answers = [
            {"score": score, "answer": config.id2label[index]}
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return self._with_weights("answers", answers, output, return_modality_weights)


class CrossModalClassificationPipeline(CrossModalScoringPipeline):
    """Samples of any modalities to their label, labels, or number.

    Example:
        >>> pipe = pipeline("crossmodal-classification", model=folder, trust_remote_code=True)
        >>> pipe({"text": "what a day", "image": image})
        [{'label': 'positive', 'score': 0.91}]
        >>> pipe([{"text": "what a day"}, {"audio": {"array": wave, "sampling_rate": 16000}}])
    """

    def __call__(self, inputs=None, **kwargs):
        """Classifies one sample or many.

        Args:
            inputs: a dict of raw inputs, `{"text": ..., "image": ..., "audio": ...}` with any subset of the modalities of the
                model (by name, or by the argument of its processor); a list, generator or dataset of such dicts; or nothing, and
                the inputs of one sample by name: `pipe(text="...", image=...)`.
            top_k: how many labels (default 1; where several may hold, those that reach `config.thresholds`).
            return_modality_weights: also return how much each modality counted.
            batch_size: samples per forward.

        Returns:
            A list of `{"label", "score"}`, best first: probabilities, or the number itself of a regression. For many samples a list of
            such lists; with `return_modality_weights` each is `{"labels": [...], "modality_weights": {modality: weight}}`.
        """
        inputs, kwargs = self._by_name(inputs, kwargs)
        return super().__call__(inputs, **kwargs)

    def postprocess(self, output, top_k=None, return_modality_weights=False):
        config = self.model.config
        scores = output["logits"][0].float()
        order = scores.argsort(descending=True)
        if config.problem_type == "regression":
            order = torch.arange(len(scores))
        elif config.problem_type == "multi_label_classification":
            scores = scores.sigmoid()
            if top_k is None:
                least = torch.tensor(config.thresholds or [0.5] * len(scores))
                order = order[(scores >= least)[order]]
        else:
            scores, top_k = scores.softmax(-1), top_k or 1
        labels = [{"label": config.id2label[i], "score": scores[i].item()} for i in order[:top_k].tolist()]
        return self._with_weights("labels", labels, output, return_modality_weights)


class CrossModalRetrievalPipeline(CrossModalPipeline):
    """Candidates of one modality, ranked for a query of another by embeddings and cross-attention.

    Example:
        >>> pipe = pipeline(model=folder, trust_remote_code=True)
        >>> pipe(image=image, candidates=["a red shirt", "blue shoes"])
        [{'score': 7.1, 'similarity': 0.61, 'index': 0, 'candidate': 'a red shirt'}, ...]
        >>> pipe(text="a red shirt", candidates=[image, other], top_k=1)
    """

    def _sanitize_parameters(self, **kwargs):
        return {}, {}, {}

    def __call__(self, candidates=None, top_k=None, batch_size=64, **query):
        """Ranks candidates for one query or several.

        Args:
            candidates: a list; or `{argument: list}` with the argument of the processor, where the model has more than two
                modalities. They are encoded once for all queries.
            top_k: how many to return (None: all). batch_size: inputs and pairs per forward.
            query: one modality, as `image=`, `text=`, `audio=`, ...: a value, or a list of several queries.

        Returns:
            a list of `{"score", "similarity", "index", "candidate"}`, best first; for several queries a list of them.

        Raises:
            ValueError: for no candidate, and for a query that is not of exactly one modality of the model.
        """
        names = {self.processor.argument_of(name): name for name in self.model.config.modality_names}
        given = {self._aliases.get(key, key): value for key, value in query.items() if value is not None}
        if len(given) != 1 or next(iter(given)) not in names:
            raise ValueError(f"a query by {sorted(given) or 'nothing'}. Expected exactly one of {sorted(names)}.")
        argument, values = next(iter(given.items()))
        if not isinstance(candidates, dict):
            candidates = {next(key for key in names if key != argument): candidates}
        offered, values_offered = next(iter(candidates.items()))
        offered = self._aliases.get(offered, offered)
        if isinstance(values_offered, str) or not (values_offered is None or hasattr(values_offered, "__iter__")):
            raise ValueError(
                f"candidates of {offered!r}: one {type(values_offered).__name__}. Expected a list of them."
            )
        values_offered = [] if values_offered is None else list(values_offered)
        if offered not in names or offered == argument or not values_offered:
            raise ValueError(
                f"candidates of {offered!r}: {len(values_offered)}. Expected at least one, of any of "
                f"{sorted(set(names) - {argument})}."
            )
        many = isinstance(values, list | tuple)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}. Expected at least 1.")
        with self.device_placement(), torch.inference_mode():
            asked = self._features(argument, list(values) if many else [values], batch_size)
            store = self._features(offered, values_offered, batch_size)
            hits = [
                self._hits(names[argument], one, names[offered], store, values_offered, top_k, batch_size)
                for one in asked
            ]
        return hits if many else hits[0]

    def _forward(self, batch):
        return self.model(**batch, return_loss=False)

    def postprocess(self, output):
        return output.modality_embeds

    def _features(self, argument, values, batch_size):
        """ModalityFeatures of each value by itself, without padding."""
        name = next(n for n in self.model.config.modality_names if self.processor.argument_of(n) == argument)
        found = []
        for start in range(0, len(values), batch_size):
            batch = self.processor(**{argument: values[start : start + batch_size]}).to(self.device)
            features = self.model.features(dict(batch))[0][name]
            rows = torch.arange(len(features), device=self.device)
            found += [features.alone(row) for row in rows]
        return found

    def _hits(self, name, query, other, store, values, top_k, batch_size):
        scores, similarities = [], []
        for start in range(0, len(store), batch_size):
            part = store[start : start + batch_size]
            candidates = type(query).together(part)
            rows = torch.zeros(len(part), dtype=torch.long, device=self.device)
            pairs = {name: query.at(rows), other: candidates}
            pairs = {key: pairs[key] for key in self.model.config.modality_names if key in pairs}
            scores.append(self.model.rank(pairs).float().cpu())
            similarities.append(self.model.similarity(pairs).float().cpu())
        scores, similarities = torch.cat(scores), torch.cat(similarities)
        best = scores.argsort(descending=True)[:top_k].tolist()
        return [
            {"score": scores[i].item(), "similarity": similarities[i].item(), "index": i, "candidate": values[i]}
            for i in best
        ]


class CrossModalPointSegmentationPipeline(CrossModalPipeline):
    """Points, with images of them or without, to a label for each.

    Example:
        >>> pipe = pipeline(model=folder, trust_remote_code=True)
        >>> found = pipe(points="room.ply", image="room.jpg", output="labelled.ply", picture="from_above.png")
        >>> found["labels"][:2], found["scene"]
        (['floor', 'chair'], {'floor': 0.99, 'chair': 0.95, 'table': 0.02})
    """

    def _sanitize_parameters(self, tags=None, **kwargs):
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)[0]!r} is no parameter of this pipeline. Expected tags, output, picture, up, batch_size or num_workers, "
                "and inputs of the model."
            )
        return {}, {} if tags is None else {"tags": tags}, {}

    def __call__(self, inputs=None, output=None, picture=None, up="z", **kwargs):
        """Labels the points of one scene or many.

        Args:
            inputs: a dict `{"points": ..., "image": ...}` (points in any form of the processor: `.ply` and `.npz` files, arrays, dicts), a
                list, generator or dataset of such dicts; or nothing, and the inputs of one scene by name.
            output: of one scene, a `.ply` file to write, with the points in the colours of their labels.
            picture: of one scene, a picture to draw, seen from above, with a legend. up: the axis that points up, such as "z" or "-y".
            tags: names of the classes that are known to be in the scene: no point gets another.
            batch_size: scenes per forward.

        Returns:
            a dict of `labels`, a list of N names; `label_ids (N,)`; `scores (N,)`, the probability of each; `scene`, {class: the probability
            that the scene has it at all}; `modality_weights`. For many scenes a list of them.

        Raises:
            ValueError: for points that cannot be read, and tags that are no classes.
        """
        inputs, kwargs = self._by_name(inputs, kwargs)
        found = super().__call__(inputs, **kwargs)
        if output is None and picture is None:
            return found
        if not isinstance(found, dict):
            raise ValueError(
                "output and picture are of one scene, and several were given. Call the pipeline for each."
            )
        name = next(modality["name"] for modality in self.processor.modalities if modality["type"] == "points")
        drawn = read_points(inputs[name])["coordinates"], found["label_ids"], list(self.model.config.id2label.values())
        if output is not None:
            write_labelled_ply(output, *drawn)
        if picture is not None:
            draw_from_above(picture, *drawn, up)
        return found

    def _forward(self, batch, tags=None):
        if tags is not None:
            batch["scene_tags"] = self._known(tags).expand(len(batch[self.model.main_input_name]), -1)
        found = self.model(**batch)
        return {key: found[key] for key in ("logits", "scene_logits", "segments", "modality_weights")}

    def _known(self, tags):
        """(1,C) of the classes named."""
        labels = list(self.model.config.id2label.values())
        for tag in tags:
            if tag not in labels:
                raise ValueError(f"the tag {tag!r} is no class of this model. Expected some of {labels}.")
        return torch.tensor([[float(label in tags) for label in labels]], device=self.device)

    def postprocess(self, output):
        config = self.model.config
        real = output["segments"][0] >= 0
        scores, best = output["logits"][0][real].float().softmax(dim=-1).max(dim=-1)
        scene = output["scene_logits"][0].float().sigmoid().tolist()
        weights = output["modality_weights"][0].float().tolist()
        return {
            "labels": [config.id2label[index] for index in best.tolist()],
            "label_ids": best.cpu().numpy(),
            "scores": scores.cpu().numpy(),
            "scene": dict(zip(config.id2label.values(), scene, strict=True)),
            "modality_weights": dict(zip(config.modality_names, weights, strict=True)),
        }


def _is_image(value):
    """Whether a lone first argument is an image, and not a sample, a batch of samples or a stream of them."""
    if isinstance(value, str | bytes) or hasattr(value, "convert"):
        return True
    items = value if isinstance(value, list | tuple) else []
    return bool(items) and _is_image(items[0])
