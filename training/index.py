"""An index of what a retrieval model knows of many inputs: embeddings to find candidates, tokens to rank them.

On disk a folder per modality, of parts that are whole once `index.json` names them:

    index.json                      the model it is of, the dataset, if it is of one, and every part with its sizes
    <modality>/<n>.embeddings.npy   (N,E) float32, length 1
    <modality>/<n>.tokens.npy       (sum of all T, L * D) float16, the L levels side by side, read where they lie
    <modality>/<n>.offsets.npy      (N + 1,)
    <modality>/<n>.items.jsonl      what to show of each: {"key": hash of the input, ...}

Letters: N inputs, Q queries, E projection_dim, T tokens, L levels, D hidden_size.
"""

import bisect
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .checkpoints import write_whole
from .datasets import RowDataset
from .retrieval import _PAIRS, encode_batch, features_from, inputs_of
from .token_cache import input_key, update_with_weights


_PART = 1024
# Of a hit, or of an item in its file.
_OWN_NAMES = {"key", "score", "similarity"}
# Of a product with all vectors; more would only take memory.
_QUERIES_AT_ONCE = 256


# Of a config: where a model lies, who wrote it, and what only a loss or an order depends on.
_NOT_OF_FEATURES = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "use_cache",
    "id2label",
    "label2id",
    "rank_weight",
    "query_bank_size",
    "query_bank_weight",
    "matching_hardness",
    "contrastive_weight",
    "matching_weight",
    "alignment_weight",
    "cross_weight",
)


def model_key(model, processor):
    """Hash of the weights and of what else features depend on: the same for a model in memory, in its folder, and in a copy of it."""
    settings = [model.config.to_diff_dict()]
    settings += [
        part.to_dict()
        for part in (getattr(processor, "image_processor", None), getattr(processor, "feature_extractor", None))
        if part is not None
    ]
    digest = hashlib.sha256(json.dumps(_of_features(settings), sort_keys=True, default=str).encode())
    update_with_weights(digest, model, but="query_bank.")
    return digest.hexdigest()[:32]


def _of_features(value):
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if key not in _NOT_OF_FEATURES and not key.endswith("_class")}
        return {key: _of_features(part) for key, part in kept.items()}
    return [_of_features(part) for part in value] if isinstance(value, (list, tuple)) else value


def listing_of(folder):
    """What an index says of itself: `source`, where its model is loaded from, and `dataset` and `split`, of which it is, or None.

    Raises:
        ValueError: if the folder holds no index.
    """
    listing = Path(folder) / "index.json"
    if not listing.exists():
        raise ValueError(
            f"{str(folder)!r} holds no index. Build one with `crossmodal index MODEL --dataset D --output {folder}`."
        )
    return json.loads(listing.read_text())


def index_rows(index, rows, progress=True):
    """Adds every image and text of a dataset, each with the texts and the row that it came with.

    index: CrossModalIndex. rows: of a schema of the task "retrieval". Returns {modality: how many were new}.
    """
    samples, added = RowDataset(rows, "retrieval"), {}
    first, _ = inputs_of(samples.targets)
    texts = {}
    for target in samples.targets:
        # Sounds and images that belong together by class have no text.
        own = texts.setdefault(str(target["id"]), [])
        own += [text for kind, text in target["keys"] if kind == "text"]
    for name in index.model.config.modality_names[:2]:
        argument = index.processor.argument_of(name)
        column = _Column(
            samples, argument, first if name == index.model.config.modality_names[0] else range(len(samples))
        )
        items = [
            {"row": samples.places[row][0], "texts": texts[str(samples.targets[row]["id"])][:5]}
            | ({"text": column[place]} if argument == "text" else {})
            for place, row in enumerate(column.rows)
        ]
        added[name] = index.add(name, column, items, progress=progress)
    return added


class _Column(Sequence):
    """One input of some rows, decoded when it is read."""

    def __init__(self, samples, argument, rows):
        self.samples, self.argument, self.rows = samples, argument, list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.samples.input_of(self.rows[place], self.argument)


class CrossModalIndex:
    """Inputs of one or more modalities, searched by any other.

    Args:
        folder: of the index; made if it is not there, continued if it is one of this model.
        model: CrossModalForRetrieval. processor: its processor.
        source: where the model is loaded from (folder or Hub id), kept in the index for `load`.
        use_faiss: find candidates by FAISS's flat index instead of a matrix product, which is faster for several queries at once
            (`crossmodal benchmark --retrieval`); both are exact.
        dataset, split: of what it is, kept in the index for pictures of hits.

    Raises:
        ValueError: for an index of another model, and one of which a file is missing or cut off.

    Example:
        >>> index = CrossModalIndex("shop", model, processor)
        >>> index.add("vision", images, [{"title": title} for title in titles])
        >>> index.search(text="a red shirt", top_k=5)
        [{"score": 9.1, "similarity": 0.43, "title": "..."}, ...]
    """

    def __init__(self, folder, model, processor, source=None, use_faiss=False, dataset=None, split=None):
        if use_faiss and not has_faiss():
            raise ValueError("use_faiss=True, and FAISS is not installed. Install it with `pip install faiss-cpu`.")
        self.folder, self.model, self.processor, self.source = Path(folder), model.eval(), processor, source
        self.dataset, self.split = dataset, split
        self.stores = {name: _Store(self.folder / name, use_faiss) for name in model.config.modality_names}
        self._key = model_key(model, processor)
        listing = self.folder / "index.json"
        if listing.exists():
            try:
                found = json.loads(listing.read_text())
                made_by, parts = found["model"], found["parts"]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{str(listing)!r} is no listing of an index. Build the index anew.") from error
            if made_by != self._key:
                raise ValueError(
                    f"the index {str(folder)!r} is of another model, or of this one before it was trained further. Build it "
                    "anew with this model, or search it with its own."
                )
            self.source = self.source or found.get("source")
            if dataset is None:
                self.dataset, self.split = found.get("dataset"), found.get("split")
            for name, own in parts.items():
                self.stores[name].open(own)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{str(folder)!r} holds files and is no index. Choose an empty folder.")

    @classmethod
    def build(cls, folder, model, processor, rows, progress=True, **options):
        """An index of every image and text of rows (of a schema of the task "retrieval"); one that was cut off goes on. options: as of
        the class."""
        index = cls(folder, model, processor, **options)
        index_rows(index, rows, progress)
        return index

    @classmethod
    def load(cls, folder, source=None, use_faiss=False):
        """An index with its model and processor, from `source` (folder or Hub id), or from where they were when it was built."""
        from .console import load_model

        source = source or listing_of(folder).get("source")
        if source is None:
            raise ValueError(f"the index {str(folder)!r} does not say where its model is. Say its source.")
        return cls(folder, *load_model(source, "CrossModalForRetrieval"), source=source, use_faiss=use_faiss)

    def save(self, folder):
        """Writes a copy of the index to another folder, whole or not at all: what is added is in its own at once."""
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{str(folder)!r} is there already. Choose an empty folder.")
        self._list()
        aside = folder.with_name(f"{folder.name}.writing")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(self.folder, aside)
        os.replace(aside, folder)

    def __len__(self):
        return sum(len(store) for store in self.stores.values())

    @property
    def sizes(self):
        """{modality: how many inputs}, of modalities that it holds."""
        return {name: len(store) for name, store in self.stores.items() if len(store)}

    @torch.inference_mode()
    def add(self, modality, inputs, items=None, batch_size=64, progress=False):
        """Adds inputs of a modality; those that are there already are left out.

        Args:
            modality: name. inputs: raw values as the processor takes them; None is left out. items: dict of what to keep beside
                each, without the names `key`, `score` and `similarity`.

        Returns:
            how many were new. A build that is cut off keeps the parts that were whole: add the same inputs again.
        """
        self.model.crossmodal._known([modality])
        store, argument = self.stores[modality], self.processor.argument_of(modality)
        kind = self.model.config.modality_settings[modality]["type"]
        items = [{} for _ in inputs] if items is None else items
        if len(items) != len(inputs):
            raise ValueError(f"{len(items)} items for {len(inputs)} inputs. Give one for each, or none.")
        if taken := sorted(_OWN_NAMES & {name for item in items for name in item}):
            raise ValueError(f"items have {taken}, which hits say by themselves. Give them other names.")
        self.model.eval()
        # A build that is cut off in its first part is an index too.
        self._list()
        new, seen = [], set()
        for place in range(len(inputs)):
            if inputs[place] is None:
                continue
            key = input_key(inputs[place], kind)
            if key not in store and key not in seen:
                seen.add(key)
                new.append((place, key))
        with tqdm(total=len(new), desc=f"index of {modality}", disable=not progress, leave=False) as bar:
            for start in range(0, len(new), _PART):
                part, chunk = [], new[start : start + _PART]
                for first in range(0, len(chunk), batch_size):
                    places = chunk[first : first + batch_size]
                    batch = self.processor(**{argument: [inputs[place] for place, _ in places]}).to(self.model.device)
                    part.append(encode_batch(self.model, modality, batch, torch.float16))
                    bar.update(len(places))
                store.write(part, [{"key": key, **items[place]} for place, key in chunk])
                self._list()
        return len(new)

    def _list(self):
        listing = {
            "source": self.source,
            "model": self._key,
            "dataset": self.dataset,
            "split": self.split,
            "parts": {name: store.parts for name, store in self.stores.items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "index.json", json.dumps(listing, indent=1))

    @torch.inference_mode()
    def search(self, top_k=10, rerank=32, target=None, **query):
        """The inputs that fit a query best.

        Args:
            query: one argument of the processor: `text="..."`, `images=image`, ...; a list for several queries at once.
            top_k: how many. rerank: how many of those that embeddings find are ranked by cross-attention (0: none).
            target: modality to search; None: the first that the index holds and the query is not of.

        Returns:
            a list of dicts, best first: `score` (by which they are ordered), `similarity` (of the embeddings) and the item; for
            a list of queries a list of them.

        Raises:
            ValueError: for an empty index, and for a query that nothing in the index can be compared with.
        """
        modality, values = self._modality_of(query)
        many = isinstance(values, list)
        values = values if many else [values]
        target = self._target(modality, target)
        store = self.stores[target]
        if top_k < 1 or rerank < 0:
            raise ValueError(f"top_k={top_k}, rerank={rerank}. Expected at least 1 and 0.")
        self.model.eval()
        batch = self.processor(**{self.processor.argument_of(modality): values}).to(self.model.device)
        found = self.model.features(batch)[0][modality]
        queries = found.spread(found.embeddings).float().cpu()
        config = self.model.config
        if rerank and not config.contrastive_weight:
            # Embeddings that were not trained find nothing.
            rerank = len(store)
        # Inputs of one modality have no cross-attention with each other.
        ranks = target != modality and (config.matching_weight or config.query_bank_size)
        rerank = min(rerank, len(store)) if ranks else 0
        similarities, rows = store.nearest(queries, min(max(top_k, rerank), len(store)))
        scores = similarities
        if rerank:
            ranked = torch.cat(
                [
                    self._ranked(found, modality, target, some, rows[some, :rerank])
                    for some in torch.arange(len(values)).split(max(1, _PAIRS // rerank))
                ]
            )
            # What was not ranked again keeps its order below.
            below = ranked.amin(dim=1, keepdim=True).clamp(max=0.0) + similarities[:, rerank:] - 2.0
            scores = torch.cat([ranked, below], dim=1)
        order = scores.argsort(dim=1, descending=True)[:, :top_k]
        hits = [
            [
                {"score": float(scores[q, n]), "similarity": float(similarities[q, n]), **store.item(int(rows[q, n]))}
                for n in order[q].tolist()
            ]
            for q in range(len(values))
        ]
        return hits if many else hits[0]

    def _ranked(self, found, modality, target, some, candidates):
        """Scores (q,C) of some queries (q,), whose features are `found`, with candidates (q,C) of the index."""
        asked = some.repeat_interleave(candidates.shape[1]).to(self.model.device)
        features = {
            modality: found.at(asked),
            target: self.stores[target].features(candidates.flatten(), self.model),
        }
        ordered = {name: features[name] for name in self.model.config.modality_names if name in features}
        return self.model.rank(ordered).float().cpu().view(candidates.shape)

    def _modality_of(self, query):
        names = {self.processor.argument_of(name): name for name in self.model.config.modality_names}
        given = {key: value for key, value in query.items() if value is not None}
        if len(given) != 1 or next(iter(given)) not in names:
            raise ValueError(f"a query by {sorted(given) or 'nothing'}. Expected exactly one of {sorted(names)}.")
        key, value = next(iter(given.items()))
        return names[key], value

    def _target(self, modality, target):
        if not len(self):
            raise ValueError(f"the index {str(self.folder)!r} is empty. Add inputs to it first.")
        held = list(self.sizes)
        if target is None:
            target = next((name for name in held if name != modality), None)
        if target not in held:
            wanted = (
                f"modality {target!r}"
                if target
                else f"anything but {modality!r} to compare a query of {modality!r} with"
            )
            raise ValueError(f"the index {str(self.folder)!r} does not hold {wanted}. It holds {held}.")
        return target


class _Store:
    """Features of the inputs of one modality."""

    def __init__(self, folder, use_faiss=False):
        self.use_faiss = use_faiss
        self.folder, self.parts, self.keys, self.items = folder, [], set(), []
        self.starts, self._tokens, self._offsets, self._embeddings, self._faiss = [0], [], [], [], None

    def __len__(self):
        return self.starts[-1]

    def __contains__(self, key):
        return key in self.keys

    def _paths(self, name):
        return {
            kind: self.folder / f"{name}.{kind}"
            for kind in ("embeddings.npy", "tokens.npy", "offsets.npy", "items.jsonl")
        }

    def open(self, parts):
        for part in parts:
            for kind, path in self._paths(part["name"]).items():
                size = path.stat().st_size if path.exists() else None
                if size != part["bytes"][kind]:
                    raise ValueError(
                        f"{str(path)!r} of the index is {'missing' if size is None else 'cut off'}: {size} bytes of "
                        f"{part['bytes'][kind]}. Copy the index again, or build it anew."
                    )
            self._read(part)

    def _read(self, part):
        paths = self._paths(part["name"])
        self._embeddings.append(torch.from_numpy(np.load(paths["embeddings.npy"])))
        self._tokens.append(np.load(paths["tokens.npy"], mmap_mode="r"))
        self._offsets.append(np.load(paths["offsets.npy"]))
        own = [json.loads(line) for line in paths["items.jsonl"].read_text().splitlines()]
        self.items += own
        self.keys |= {item["key"] for item in own}
        self.starts.append(self.starts[-1] + len(own))
        self.parts.append(part)
        self._faiss = None

    def write(self, batches, items):
        self.folder.mkdir(parents=True, exist_ok=True)
        embeddings, tokens, levels = zip(*batches, strict=True)
        tokens = [one for some in tokens for one in some]
        arrays = {
            "embeddings.npy": torch.cat(embeddings).numpy(),
            "tokens.npy": torch.cat(tokens).numpy(),
            "offsets.npy": np.cumsum([0, *map(len, tokens)]),
        }
        name = f"{len(self.parts):05d}"
        paths = self._paths(name)
        for kind, array in arrays.items():
            np.save(paths[kind], array)
        paths["items.jsonl"].write_text("".join(json.dumps(item, default=str) + "\n" for item in items))
        sizes = {kind: path.stat().st_size for kind, path in paths.items()}
        self._read({"name": name, "count": len(items), "levels": levels[0], "bytes": sizes})

    @property
    def embeddings(self):
        """(N,E)."""
        if len(self._embeddings) > 1:
            self._embeddings = [torch.cat(self._embeddings)]
        return self._embeddings[0]

    def item(self, row):
        return {key: value for key, value in self.items[row].items() if key != "key"}

    def nearest(self, queries, k):
        """Similarities and rows, each (Q,k), best first; exact."""
        if self.use_faiss:
            if self._faiss is None:
                self._faiss = nearest_by_faiss(self.embeddings)
            return self._faiss(queries, k)
        return nearest_by_product(queries, self.embeddings, k)

    def features(self, rows, model):
        """ModalityFeatures of `rows` (P,), each distinct one once, on the device of a model."""
        return features_from(self.embeddings, self._tokens_of, self.parts[0]["levels"], rows, model)

    def _tokens_of(self, row):
        part = bisect.bisect_right(self.starts, row) - 1
        first, last = self._offsets[part][row - self.starts[part] :][:2]
        return torch.from_numpy(np.array(self._tokens[part][first:last]))


def nearest_by_product(queries, vectors, k):
    """Inner products and rows, each (Q,k), best first, of queries (Q,E) and vectors (N,E)."""
    found = [_products(part, vectors).topk(k, dim=1) for part in queries.split(_QUERIES_AT_ONCE)]
    return torch.cat([scores for scores, _ in found]), torch.cat([rows for _, rows in found])


def _products(queries, vectors):
    """queries (Q,E) by vectors (N,E): (Q,N)."""
    if 0 < len(queries) < 4 and vectors.device.type == "cpu" and vectors.dtype == queries.dtype == torch.float32:
        # For so few the time is that of reading the vectors, of which NumPy's product of a matrix and a vector takes half.
        return torch.stack([torch.from_numpy(vectors.numpy() @ query) for query in queries.numpy()])
    return queries @ vectors.T


def has_faiss():
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def nearest_by_faiss(vectors):
    """A function from queries (Q,E) and k to what `nearest_by_product` gives, by FAISS's flat index of vectors (N,E)."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.numpy())

    def nearest(queries, k):
        scores, rows = index.search(queries.numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(rows)

    return nearest
