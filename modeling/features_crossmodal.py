"""What retrieval keeps of inputs, and rows that are compared with each other, of one process or of all.

Letters: B rows of a batch, U distinct inputs of a modality, T tokens, D hidden_size, E projection_dim, P rows that are taken.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from .contrastive_crossmodal import gather, mean_of_means
from .encoders_crossmodal import EncodedModality


@dataclass
class ModalityFeatures:
    """What retrieval keeps of one modality: all that is needed to compare its rows with any others, later or elsewhere.

    embeddings (U,E) of length 1; levels [(U,T,D) per depth], what the fusion reads; tokens (U,T,D), the last that the tower
    made of them; mask (U,T) bool or None; index (B,) long and present (B,) bool as in `EncodedModality`.
    """

    embeddings: torch.Tensor
    levels: list
    tokens: torch.Tensor
    mask: torch.Tensor | None = None
    index: torch.Tensor | None = None
    present: torch.Tensor | None = None

    def __len__(self):
        return len(self.embeddings) if self.index is None else len(self.index)

    def at(self, rows, present=None):
        """The features of `rows` (P,) of the batch, each distinct input kept once; present (P,) bool or None."""
        return replace(self, index=rows if self.index is None else self.index[rows], present=present)

    @property
    def level_of_tokens(self):
        """Which of the levels the tokens are, or None where they are none of them."""
        return next((depth for depth, level in enumerate(self.levels) if level is self.tokens), None)

    def tensors(self):
        """What of the features carries a gradient, each once."""
        own = [self.embeddings, *self.levels]
        return own if self.level_of_tokens is not None else [*own, self.tokens]

    def like(self, tensors, mask, index, present):
        """Features of other rows, made of what `tensors` gives of them."""
        embeddings, *levels = tensors
        depth = self.level_of_tokens
        tokens = levels.pop() if depth is None else levels[depth]
        return ModalityFeatures(embeddings, levels, tokens, mask, index, present)

    def explicit(self, count):
        """The same `count` rows with mask, index and present said."""
        device = self.embeddings.device
        mask = torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=device) if self.mask is None else self.mask
        index = torch.arange(count, device=device) if self.index is None else self.index
        present = torch.ones_like(index, dtype=torch.bool) if self.present is None else self.present
        return replace(self, mask=mask, index=index, present=present)

    def in_use(self):
        """The same rows, of the distinct inputs those alone that they take."""
        used, index = self.index.unique(return_inverse=True)
        return ModalityFeatures(
            self.embeddings[used],
            [level[used] for level in self.levels],
            None if self.tokens is None else self.tokens[used],
            None if self.mask is None else self.mask[used],
            index,
            self.present,
        )

    def spread(self, values):
        return EncodedModality([], index=self.index, present=self.present).spread(values)

    def alone(self, row):
        """The features of one row of the batch, without its padding."""
        row = row if self.index is None else self.index[row]
        real = slice(None) if self.mask is None else self.mask[row]
        tokens = None if self.tokens is None else self.tokens[row, real][None]
        return ModalityFeatures(self.embeddings[row][None], [level[row, real][None] for level in self.levels], tokens)

    @classmethod
    def together(cls, items):
        """Features of single rows (see `alone`) as those of one batch, padded. Their `tokens` are left out."""
        lengths = torch.tensor([item.levels[0].shape[1] for item in items])
        device = items[0].embeddings.device
        levels = [
            nn.utils.rnn.pad_sequence([level[0] for level in depth], batch_first=True)
            for depth in zip(*(item.levels for item in items), strict=True)
        ]
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
        embeddings = torch.cat([item.embeddings for item in items])
        return cls(embeddings, levels, None, None if mask.all() else mask)

    @classmethod
    def joined(cls, parts, counts):
        """Features of batches with `counts` rows each as those of all their rows; None is a batch without the modality."""
        parts = [item if item is None else item.explicit(count) for item, count in zip(parts, counts, strict=True)]
        there = [item for item in parts if item is not None]
        device, length = there[0].mask.device, max(item.mask.shape[1] for item in there)
        offset, index, present = 0, [], []
        for item, count in zip(parts, counts, strict=True):
            index.append(torch.zeros(count, dtype=torch.long, device=device) if item is None else item.index + offset)
            present.append(torch.zeros(count, dtype=torch.bool, device=device) if item is None else item.present)
            offset += 0 if item is None else len(item.embeddings)
        mask = torch.cat([nn.functional.pad(item.mask, (0, length - item.mask.shape[1])) for item in there])
        tensors = [
            torch.cat([_padded(values, length) for values in alike])
            for alike in zip(*(item.tensors() for item in there), strict=True)
        ]
        present = torch.cat(present)
        return there[0].like(
            tensors, None if mask.all() else mask, torch.cat(index), None if present.all() else present
        )


def _padded(values, length):
    """Tokens (U,T,D) to (U,length,D); vectors (U,E) as they are."""
    return values if values.dim() < 3 else nn.functional.pad(values, (0, 0, 0, length - values.shape[1]))


def _exchanged(tensors, shapes):
    """Tensors of all processes, in one exchange: those of the first in order, then those of the next, of the `shapes` they have there."""
    flat = gather(torch.cat([values.flatten() for values in tensors]))
    parts = flat.split([math.prod(shape) for shape in shapes])
    return iter([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])


@dataclass
class ComparedRows:
    """Rows that are compared with each other.

    features {modality: ModalityFeatures}, presence (B,M) bool, labels (B,K); mine: those of them (P,) of which this process computes
    the losses; shared: whether others have the rest.
    """

    features: dict
    presence: torch.Tensor
    labels: torch.Tensor
    mine: torch.Tensor
    shared: bool = False

    def of_all_processes(self, names):
        """The rows of all processes in the order of ranks, with gradient; the same call is made by each of them.

        Numbers travel in one exchange: processes that lack different modalities must agree on the order of their gradients.
        """
        count, device = len(self.presence), self.presence.device
        items = [self.features[name].explicit(count) for name in names]
        # Rows of each process, and distinct inputs and tokens of each of its modalities.
        sizes = [[count, *(size for item in items for size in item.mask.shape)]]
        sizes = gather(torch.tensor(sizes, device=device)).tolist()
        inputs = [(rows, *size) for rows, *own in sizes for size in zip(own[::2], own[1::2], strict=True)]
        vectors = _exchanged(
            [values.float() for item in items for values in item.tensors()],
            [
                (distinct, *(length,) * (values.dim() - 2), values.shape[-1])
                for (_, distinct, length), item in zip(inputs, items * len(sizes), strict=True)
                for values in item.tensors()
            ],
        )
        marks = _exchanged(
            [values.long() for item in items for values in (item.mask, item.index, item.present)],
            [shape for rows, *size in inputs for shape in (size, (rows,), (rows,))],
        )
        found = {name: [] for name in names}
        for _ in sizes:
            for name, item in zip(names, items, strict=True):
                tensors = [next(vectors).to(values.dtype) for values in item.tensors()]
                mask, index, present = (next(marks) for _ in range(3))
                found[name].append(item.like(tensors, mask.bool(), index, present.bool()))
        counts, rank = [rows for rows, *_ in sizes], torch.distributed.get_rank()
        features = {name: ModalityFeatures.joined(parts, counts) for name, parts in found.items()}
        mine = torch.arange(count, device=device) + sum(counts[:rank])
        return ComparedRows(features, gather(self.presence), gather(self.labels), mine, True)

    def mean(self, sums, counts):
        """Mean of the means of those losses that any row counts in, from their sums over rows of this process, and how many counted."""
        return mean_of_means(sums, counts, self.shared)
