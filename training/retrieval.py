"""Ranks of candidates and what is made of them, exactly and without a matrix of all pairs; two-stage evaluation.

Letters: Q queries, C candidates, E projection_dim, k candidates that are ranked again.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..modeling.features_crossmodal import ModalityFeatures
from .collator import SampleCollator
from .datasets import read_samples


# Queries whose scores are in memory at once, and pairs that cross-attention reads at once.
_CHUNK, _PAIRS = 1024, 1024
# Candidates of N-way matching: a right one and others.
_WAYS = 10


def direction_names(config):
    """The two modalities that are compared: (name, name) in the model, and (letter, letter) in the names of metrics, `i` and
    `t` for image and text, else the modality names."""
    names = config.modality_names[:2]
    kinds = [config.modality_settings[name]["type"] for name in names]
    letters = [{"vision": "i", "text": "t"}.get(kind, name) for kind, name in zip(kinds, names, strict=True)]
    return names, letters if sorted(letters) == ["i", "t"] else names


def ranks_of(scores, positive):
    """Places of positives among candidates, ties decided against them.

    scores (Q,C), positive (Q,C) bool. Returns the place of the best positive (Q,) from 1 on, average precision (Q,), and the
    chance that a positive comes before 9 random negatives (Q,), 10-way matching in expectation. 0 and NaN for a query without
    a positive. Of equal scores, negatives come first.
    """
    order = scores.masked_fill(positive, -torch.inf).sort(dim=1, descending=True).values
    own = scores.masked_fill(~positive, -torch.inf)
    best, count = own.amax(dim=1), positive.sum(dim=1)
    # How many negatives are at least as good: the list is sorted downwards, searchsorted wants it upwards.
    above = torch.searchsorted(-order, -best[:, None], right=True).squeeze(1)
    # Positives themselves stand at -inf in the list, and below every finite score.
    places = torch.where(count > 0, above + 1, 0)
    precision, matching = torch.full((2, len(scores)), torch.nan).unbind()
    for row in (count > 0).nonzero().squeeze(1).tolist():
        mine = scores[row, positive[row]].sort(descending=True).values
        nth, before = torch.arange(1, len(mine) + 1), torch.searchsorted(-order[row], -mine, right=True)
        precision[row] = (nth / (nth + before)).mean()
        negatives = scores.shape[1] - len(mine)
        if negatives >= _WAYS - 1:
            # Draws without any of those before: C(negatives - before, 9) / C(negatives, 9).
            drawn = torch.arange(_WAYS - 1)
            left = (negatives - before[:, None] - drawn).clamp(min=0)
            matching[row] = (left / (negatives - drawn)).prod(dim=1).mean()
    return places, precision, matching


def metrics_of(places, precisions, matching):
    """{"r1", "r5", "r10", "map", "10way" in per cent, "medr"} of queries that have a positive, from `ranks_of`."""
    there = places > 0
    places = places[there].float()
    if not len(places):
        raise ValueError("no query has a positive candidate: there is nothing to find.")
    found = {f"r{k}": 100 * (places <= k).float().mean().item() for k in (1, 5, 10)}
    found |= {"medr": statistics.median(places.tolist()), "map": 100 * precisions[there].mean().item()}
    # Where there are so many negatives at all.
    return found if matching[there].isnan().any() else found | {"10way": 100 * matching[there].mean().item()}


def score_directions(score: Callable, right, sizes, letters, folds=None):
    """Metrics in both directions.

    Args:
        score: (indices of queries, indices of candidates, whether the second modality asks) to scores (Q,C), higher is nearer.
        right: RightPairs. sizes: how many there are of the first and of the second. letters: of the metrics' names.
        folds: list of (indices of the first, indices of the second) to average over; None: all against all.

    Returns:
        {"i2t_r1", ..., "t2i_map"}.
    """
    found = []
    for first, second in folds or [(torch.arange(sizes[0]), torch.arange(sizes[1]))]:
        metrics = {}
        for swap, queries, candidates in ((False, first, second), (True, second, first)):
            found_ranks = []
            for part in queries.split(_CHUNK):
                positive = right(candidates, part).T if swap else right(part, candidates)
                found_ranks.append(ranks_of(score(part, candidates, swap).float(), positive))
            name = "2".join(letters[::-1] if swap else letters)
            metrics |= {
                f"{name}_{k}": v for k, v in metrics_of(*map(torch.cat, zip(*found_ranks, strict=True))).items()
            }
        found.append(metrics)
    return {key: statistics.mean(metrics[key] for metrics in found) for key in found[0]}


@dataclass
class FeatureStore:
    """What a model keeps of N inputs of one modality, on the CPU or in files, without padding.

    embeddings (N,E); tokens (sum of all T, L * D), the L levels side by side; offsets (N + 1,): where the tokens of each
    input begin; absent (N,) bool: inputs that there are not, in whose place stands another, or None.
    """

    embeddings: torch.Tensor
    tokens: torch.Tensor
    offsets: torch.Tensor
    levels: int
    absent: torch.Tensor | None = None

    def __len__(self):
        return len(self.embeddings)

    @classmethod
    def of(cls, parts, levels):
        """parts: (embeddings (n,E), [tokens (T,L*D)] of each input) of one batch after another."""
        embeddings, tokens = zip(*parts, strict=True)
        tokens = [one for some in tokens for one in some]
        lengths = torch.tensor([0, *map(len, tokens)])
        return cls(torch.cat(embeddings), torch.cat(tokens), lengths.cumsum(0), levels)

    def features(self, rows, model):
        """ModalityFeatures of `rows` (P,), each distinct one once, as a model takes them."""
        return features_from(self.embeddings, self._tokens_of, self.levels, rows, model)

    def _tokens_of(self, row):
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]


def features_from(embeddings, tokens_of, levels, rows, model):
    """ModalityFeatures of `rows` (P,) on the device of a model, each distinct one once.

    embeddings (N,E); tokens_of: function from a row to its tokens (T,L*D), of L levels.
    """
    used, index = rows.unique(return_inverse=True)
    tokens = [tokens_of(row) for row in used.tolist()]
    lengths = torch.tensor([len(one) for one in tokens])
    padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(model.device, model.dtype)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to(model.device)
    whole = (lengths == lengths[0]).all()
    depths = list(padded.chunk(levels, dim=-1))
    return ModalityFeatures(
        embeddings[used].to(model.device), depths, None, None if whole else mask, index.to(model.device)
    )


@torch.inference_mode()
def features_of(model, processor, samples, name, rows=None, batch_size=64, dtype=torch.float32, progress=True):
    """FeatureStore of one modality of a dataset of samples, of `rows` (indices) or all, in that order."""
    model.eval()
    absent, stand_ins = [], []
    own = partial(_input_of, processor, name)

    def collate(items):
        items = [own(item) for item in items]
        absent.extend(not item for item in items)
        if not all(items) and not stand_ins:
            stand_ins.extend([item for item in items if item][:1] or [next(filter(None, map(own, data)), None)])
            if stand_ins == [None]:
                raise ValueError(f"no row has a {name!r}. Evaluate rows that have both modalities.")
        return collator([item or stand_ins[0] for item in items])

    collator = SampleCollator(processor, deduplicate=False)
    data = samples if rows is None else Subset(samples, rows)
    parts, levels = [], 1
    for batch in tqdm(
        DataLoader(data, batch_size, collate_fn=collate), desc=f"features of {name}", disable=not progress, leave=False
    ):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        *part, levels = encode_batch(model, name, batch, dtype)
        parts.append(part)
    store = FeatureStore.of(parts, levels)
    store.absent = torch.tensor(absent) if any(absent) else None
    return store


def _input_of(processor, name, item):
    """What a sample has of one modality, raw or as cached tokens: {} of one that lacks it."""
    keys = (processor.argument_of(name), f"{name}_tokens", f"{name}_key")
    return {key: item[key] for key in keys if item.get(key) is not None}


def encode_batch(model, name, batch, dtype=torch.float32):
    """Embeddings (n,E), [tokens (T,L*D) of each] and L of the inputs of one modality, on the CPU and without padding."""
    found = model.features(batch)[0][name]
    tokens = torch.cat(found.levels, dim=-1).to(dtype).cpu()
    real = [row if found.mask is None else row[found.mask[i].cpu()] for i, row in enumerate(tokens)]
    return found.embeddings.float().cpu(), real, len(found.levels)


@torch.inference_mode()
def rank_pairs(model, stores, rows):
    """Scores (P,) of pairs by embeddings and cross-attention. stores {modality: FeatureStore}, rows {modality: (P,)}."""
    scores = []
    for chunk in zip(*(part.split(_PAIRS) for part in rows.values()), strict=True):
        features = {name: stores[name].features(part, model) for name, part in zip(rows, chunk, strict=True)}
        scores.append(model.rank(features).float().cpu())
    return torch.cat(scores)


def evaluate_two_stages(
    model, processor, samples, rerank=32, full=False, fold_size=None, by_image=False, progress=True
):
    """Retrieval between the first two modalities of a model: by embeddings alone, with the best ranked again by
    cross-attention, and by cross-attention over all pairs.

    Args:
        samples: RowDataset of the task "retrieval". rerank: how many candidates of each query are ranked again; 0: none.
        full: also score all pairs. fold_size: average over folds of so many inputs of the first modality (1000: the "1K"
            protocol of COCO), each with what is right for it of the second.
        by_image: right is what came with the same image, alone, as COCO and Flickr30K are scored: of two images with the same caption
            each has its own. Else both are right for it.

    An input that a row lacks asks nothing, and is no candidate.

    A model whose embeddings were not trained (`contrastive_weight=0`) has every candidate ranked by cross-attention, and one
    whose cross-attention was not (`matching_weight=0`) none.

    Returns:
        metrics (see `score_directions`) of the two stages together; with `contrastive_` before them of the embeddings alone, with
        `corrected_` of those less how near each candidate is to everything (`query_bank_size`), with `full_` of all pairs.
    """
    names, letters = direction_names(model.config)
    targets = samples.targets
    if by_image:
        targets = [target | {"keys": [key for key in target["keys"] if key[0] == "image"]} for target in targets]
        if not all(target["keys"] for target in targets):
            raise ValueError("by_image=True, and the rows belong together by class, not by image. Leave it out.")
    first, right = inputs_of(targets)
    if not model.config.matching_weight:
        rerank, full = 0, False
    elif not model.config.contrastive_weight and rerank:
        rerank = len(samples)
    stores = {
        name: features_of(model, processor, samples, name, rows, progress=progress)
        for name, rows in zip(names, (first, None), strict=True)
    }
    sizes = [len(stores[name]) for name in names]
    right = right.without(*(stores[name].absent for name in names))
    folds = None
    if fold_size is not None:
        if not 0 < fold_size <= sizes[0]:
            raise ValueError(f"fold_size={fold_size}, and the split has {sizes[0]} inputs. Give 1 to {sizes[0]}.")
        parts = [part for part in torch.arange(sizes[0]).split(fold_size) if len(part) == fold_size]
        folds = [(part, right.own(part)) for part in parts]

    def near(queries, candidates, swap):
        asked, offered = (stores[name] for name in (names[::-1] if swap else names))
        scores = asked.embeddings[queries] @ offered.embeddings[candidates].T
        return scores if offered.absent is None else scores.masked_fill(offered.absent[candidates], -torch.inf)

    def pairs(queries, candidates, swap):
        """queries (N,) with candidates (N,)."""
        rows = dict(zip(names[::-1] if swap else names, (queries, candidates), strict=True))
        bar.update(len(queries))
        return rank_pairs(model, stores, {name: rows[name] for name in names})

    def again(queries, candidates, swap):
        scores = near(queries, candidates, swap)
        best = scores.topk(min(rerank, len(candidates)), dim=1).indices
        ranked = pairs(queries.repeat_interleave(best.shape[1]), candidates[best.flatten()], swap).view(best.shape)
        # What is not there stays last. Cosines lie in [-1, 1]: what is not ranked again keeps its order below.
        below = scores - 2.0 + ranked.amin(dim=1, keepdim=True).clamp(max=0.0)
        return below.scatter(1, best, torch.where(scores.gather(1, best).isinf(), -torch.inf, ranked))

    def all_pairs(queries, candidates, swap):
        every = pairs(queries.repeat_interleave(len(candidates)), candidates.repeat(len(queries)), swap)
        every = every.view(len(queries), len(candidates))
        return every.masked_fill(near(queries, candidates, swap).isinf(), -torch.inf)

    @torch.no_grad()
    def corrected(queries, candidates, swap):
        scale, other = model.logit_scale().cpu(), names[::-1] if swap else names
        embeddings = stores[other[1]].embeddings[candidates].to(model.device)
        nearness = model.query_bank.nearness(embeddings, other[0], model.logit_scale()).cpu()
        return scale * near(queries, candidates, swap) - model.config.query_bank_weight * nearness

    stages = {"contrastive_": near}
    if model.config.query_bank_size and model.config.contrastive_weight:
        stages["corrected_"] = corrected
    stages |= ({"": again} if rerank else {}) | ({"full_": all_pairs} if full else {})
    found, (forth, back) = {}, ("2".join(letters), "2".join(letters[::-1]))
    with tqdm(desc="rank again", unit="pair", disable=not progress or not (rerank or full), leave=False) as bar:
        for prefix, score in stages.items():
            metrics = score_directions(score, right, sizes, letters, folds)
            found |= {f"{prefix}{key}": value for key, value in metrics.items()}
            found[f"{prefix}mean_r1"] = (found[f"{prefix}{forth}_r1"] + found[f"{prefix}{back}_r1"]) / 2
    if not rerank:
        # By what `rank` orders candidates, where nothing else was trained.
        own = "corrected_" if not model.config.matching_weight and "corrected_" in stages else "contrastive_"
        found |= {key.removeprefix(own): value for key, value in found.items() if key.startswith(own)}
    return found


@torch.inference_mode()
def fill_query_bank(model, processor, samples, batch_size=64):
    """Puts the embeddings of rows of the training split into the `query_bank` of a trained model: as many, drawn at random, as it holds.

    Args:
        samples: RowDataset of the task "retrieval", without augmentation. A row that lacks a modality counts for the others, one that
            cannot be read for none, where the dataset may leave such rows out. A modality that no row has is near to nothing.

    Returns:
        how many rows were taken: 0 of a model without a bank, or whose embeddings were not trained.
    """
    if not (model.config.query_bank_size and model.config.contrastive_weight):
        return 0
    generator, was_training = torch.Generator().manual_seed(0), model.training
    model.eval()
    rows = torch.randperm(len(samples), generator=generator)[: model.config.query_bank_size].tolist()
    collator, taken = SampleCollator(processor, deduplicate=False), 0
    found = {name: [] for name in model.config.modality_names}
    for start in range(0, len(rows), batch_size):
        items = read_samples(samples, rows[start : start + batch_size])[0]
        taken += len(items)
        for name, embeddings in found.items():
            if own := list(filter(None, (_input_of(processor, name, item) for item in items))):
                batch = {key: value.to(model.device) for key, value in collator(own).items()}
                embeddings.append(model.features(batch)[0][name].embeddings)
    model.query_bank.fill({name: torch.cat(embeddings) for name, embeddings in found.items() if embeddings})
    model.train(was_training)
    return taken


def score_embeddings(first, second, targets):
    """Metrics of embeddings (N,E) of the samples of a dataset, without names: `mean_r1`, and `1to2_r1` and so on."""
    rows, right = inputs_of(targets)
    one, other = torch.as_tensor(first)[rows], torch.as_tensor(second)

    def near(queries, candidates, swap):
        return other[queries] @ one[candidates].T if swap else one[queries] @ other[candidates].T

    found = score_directions(near, right, (len(one), len(other)), ("1", "2"))
    return {"mean_r1": (found["122_r1"] + found["221_r1"]) / 2} | found


def inputs_of(targets):
    """Samples that hold each distinct input of the first modality once, and the RightPairs between those inputs and the
    samples. targets: `{"id": of the first input, "keys": what says which pairs are right}` of every sample."""
    first, keys = {}, {}
    for row, target in enumerate(targets):
        own = row if target["id"] is None else target["id"]
        first.setdefault(own, row)
        keys.setdefault(own, set()).update(target["keys"])
    return list(first.values()), RightPairs([keys[own] for own in first], [set(target["keys"]) for target in targets])


class RightPairs:
    """Which inputs of the second modality are right for which of the first.

    first_keys [set of keys of each input], second_keys [set]: right are those that share one.
    """

    def __init__(self, first_keys, second_keys):
        self.first_keys, self.second_keys = first_keys, second_keys

    def __call__(self, rows, columns):
        """(R,), (C,) indices. Returns (R,C) bool."""
        places = {}
        for place, column in enumerate(columns.tolist()):
            for key in self.second_keys[column]:
                places.setdefault(key, []).append(place)
        right = torch.zeros(len(rows), len(columns), dtype=torch.bool)
        for place, row in enumerate(rows.tolist()):
            for key in self.first_keys[row]:
                right[place, places.get(key, [])] = True
        return right

    def without(self, first, second):
        """The same, but that nothing is right for, or as, what is absent: (N,) bool of the first and of the second, or None."""
        if first is None and second is None:
            return self
        keys = [
            own
            if absent is None
            else [set() if gone else keys for keys, gone in zip(own, absent.tolist(), strict=True)]
            for own, absent in ((self.first_keys, first), (self.second_keys, second))
        ]
        return RightPairs(*keys)

    def own(self, rows):
        """Indices of all of the second that are right for any of `rows`."""
        keys = set().union(*(self.first_keys[row] for row in rows.tolist()))
        return torch.tensor([i for i, own in enumerate(self.second_keys) if own & keys])
