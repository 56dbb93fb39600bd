"""Models of transformers that this family is measured against: random weights, sizes like ours, one call for all.

Letters: B batch, T words, H W pixels.
"""

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .collator import SampleCollator


@dataclass(frozen=True)
class Size:
    """What all contenders share. depth: layers of each encoder; fusion: layers that fuse; image: (height, width)."""

    width: int
    heads: int
    depth: int
    fusion: int
    image: tuple[int, int]
    patch: int
    vocabulary: int = 5000
    answers: int = 1000

    @property
    def layers(self):
        return {"hidden_size": self.width, "num_attention_heads": self.heads, "intermediate_size": 4 * self.width}


class Vilt(nn.Module):
    """ViLT (Kim et al. 2021, arXiv 2102.03334): one transformer over patches and words, as deep as our longest path."""

    def __init__(self, size):
        super().__init__()
        from transformers import ViltConfig, ViltForQuestionAnswering

        config = ViltConfig(
            vocab_size=size.vocabulary,
            num_hidden_layers=size.depth + size.fusion,
            image_size=max(size.image),
            patch_size=size.patch,
            num_labels=size.answers,
            **size.layers,
        )
        self.model = ViltForQuestionAnswering(config)

    def forward(self, pixel_values, input_ids, attention_mask):
        """pixel_values (B,3,H,W), input_ids and attention_mask (B,T). Returns logits (B, answers)."""
        whole = torch.ones(len(pixel_values), *pixel_values.shape[2:], dtype=torch.long, device=pixel_values.device)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.model(**inputs, pixel_values=pixel_values, pixel_mask=whole).logits


class Lxmert(nn.Module):
    """LXMERT (Tan and Bansal 2019, arXiv 1908.07490): two streams that look at each other; its regions are our patches."""

    def __init__(self, size):
        super().__init__()
        from transformers import LxmertConfig, LxmertForQuestionAnswering

        config = LxmertConfig(
            vocab_size=size.vocabulary,
            l_layers=size.depth,
            r_layers=size.depth,
            x_layers=size.fusion,
            visual_feat_dim=3 * size.patch**2,
            num_qa_labels=size.answers,
            **size.layers,
        )
        self.model, self.patch = LxmertForQuestionAnswering(config), size.patch

    def forward(self, pixel_values, input_ids, attention_mask):
        """As `Vilt`."""
        patch = self.patch
        patches = pixel_values.unfold(2, patch, patch).unfold(3, patch, patch)
        rows, columns = patches.shape[2:4]
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        top, left = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
        boxes = torch.stack([left, top, left + 1 / columns, top + 1 / rows], dim=-1).flatten(0, 1).to(patches)
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            visual_feats=patches,
            visual_pos=boxes.expand(len(patches), -1, -1),
        ).question_answering_score


class BridgeTower(nn.Module):
    """BridgeTower (Xu et al. 2023, arXiv 2206.08657), with ViLT's head, for transformers has none for its answers."""

    def __init__(self, size):
        super().__init__()
        from transformers import BridgeTowerConfig, BridgeTowerModel

        text = {"vocab_size": size.vocabulary, "num_hidden_layers": size.depth, **size.layers}
        vision = {"hidden_size": size.width, "num_hidden_layers": size.depth, "patch_size": size.patch}
        vision["image_size"] = max(size.image)
        config = BridgeTowerConfig(
            num_hidden_layers=size.fusion, text_config=text, vision_config=vision, **size.layers
        )
        self.model, self.square = BridgeTowerModel(config), size.image[0] == size.image[1]
        width = 2 * size.width
        self.classifier = nn.Sequential(
            nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, size.answers)
        )

    def forward(self, pixel_values, input_ids, attention_mask):
        """As `Vilt`."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            interpolate_pos_encoding=not self.square,
        )
        return self.classifier(output.pooler_output)


class _Ranker(nn.Module):
    """A model of transformers that says of an image and a text read together whether they belong together."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_ids, attention_mask):
        """As `Vilt`; returns logits (B, 1 or 2)."""
        whole = torch.ones(len(pixel_values), *pixel_values.shape[2:], dtype=torch.long, device=pixel_values.device)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.model(**inputs, pixel_values=pixel_values, pixel_mask=whole).logits


def _vilt_ranker(size):
    from transformers import ViltForImageAndTextRetrieval

    return _Ranker(ViltForImageAndTextRetrieval(Vilt(size).model.config))


def _bridgetower_ranker(size):
    from transformers import BridgeTowerForImageAndTextRetrieval

    return _Ranker(BridgeTowerForImageAndTextRetrieval(BridgeTower(size).model.config))


RANKERS = {
    "BridgeTowerForImageAndTextRetrieval": _bridgetower_ranker,
    "ViltForImageAndTextRetrieval": _vilt_ranker,
}
PEERS = {"LxmertForQuestionAnswering": Lxmert, "ViltForQuestionAnswering": Vilt, "BridgeTower": BridgeTower}
# To how many words those who published them pad every question of VQA (their own code: `MAX_VQA_LENGTH`, `max_text_len`).
PUBLISHED_WORDS = {"LxmertForQuestionAnswering": 20, "ViltForQuestionAnswering": 40, "BridgeTower": 50}
_READ = ("pixel_values", "input_ids", "attention_mask")


def train_for(model, processor, labels, stages, minutes, batch_size=64, learning_rate=5e-4, seed=0, name="peer"):
    """Trains a peer for a given time: AdamW, 5 % of warm-up, then a cosine over the time that is left.

    Args:
        labels: answer to class. stages: [(dataset of samples with `target`, part of the time), ...], one after the other.

    Returns:
        number of steps.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)

    def encode(targets):
        return torch.tensor([labels[target] for target in targets])

    device = next(model.parameters()).device
    model.train()
    started, steps, ends = time.monotonic(), 0, 0.0
    with tqdm(desc=name, unit="step", leave=False) as bar:
        for dataset, part in stages:
            ends += part
            loader = DataLoader(dataset, batch_size, shuffle=True, collate_fn=SampleCollator(processor, encode, False))
            batches = iter(loader)
            while (done := (time.monotonic() - started) / (60 * minutes)) < ends:
                batch = next(batches, None)
                if batch is None:
                    batches = iter(loader)
                    continue
                rate = min(1.0, done / 0.05) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * rate
                batch = {key: value.to(device) for key, value in batch.items()}
                logits = model(*(batch[key] for key in _READ))
                loss = nn.functional.cross_entropy(logits, batch["labels"])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                steps += 1
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return steps


@torch.inference_mode()
def accuracy_of(model, processor, labels, dataset, allowed, batch_size=128):
    """Part of the samples of a dataset that a peer answers right, choosing among the answers in `allowed`."""
    model.eval()
    choices = sorted(allowed)
    columns = torch.tensor([labels[answer] for answer in choices])
    collate, right = SampleCollator(processor, deduplicate=False), []
    for samples in DataLoader(dataset, batch_size, collate_fn=list):
        batch = collate(samples)
        found = model(*(batch[key] for key in _READ))[:, columns].argmax(dim=1).tolist()
        right += [choices[index] == sample["target"] for index, sample in zip(found, samples, strict=True)]
    return statistics.mean(right)
