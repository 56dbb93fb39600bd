"""What retrieval costs: ranking a pair from cached tokens, the nearest of many vectors, and the memory of the contrast.

Letters: Q queries, C candidates, N rows of a batch, E projection_dim, T tokens.
"""

import statistics

import torch
from torch import nn
from tqdm import tqdm

from ..modeling.contrastive_crossmodal import info_nce
from .benchmark import in_turn, peak_memory, without_dropout
from .index import has_faiss, nearest_by_faiss, nearest_by_product
from .peers import RANKERS, Size
from .retrieval import FeatureStore, rank_pairs


# Queries, and candidates of each, as a search ranks them again; words of a query.
_QUERIES, _CANDIDATES, _POOL, _WORDS = 32, 32, 256, 12


def shape_of(model):
    """Size of a retrieval model for its peers: its width, heads, fusion layers and the depth of its text encoder, with 49
    patches as its image encoder gives."""
    config = model.config
    name = model._first_of("text", config.modality_names)
    return Size(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        depth=getattr(config, f"{name}_config").num_hidden_layers,
        fusion=config.num_fusion_layers,
        image=(224, 224),
        patch=32,
    )


def model_of(size):
    """`CrossModalForRetrieval` with random weights."""
    from transformers import BertConfig, ViTConfig

    from crossmodal import CrossModalConfig, CrossModalForRetrieval

    vision = ViTConfig(image_size=size.image, patch_size=size.patch, num_hidden_layers=size.depth, **size.layers)
    text = BertConfig(vocab_size=size.vocabulary, num_hidden_layers=size.depth, **size.layers)
    config = CrossModalConfig(
        modalities={"vision": vision, "text": text},
        num_fusion_layers=size.fusion,
        fusion_queries=["text"],
        **size.layers,
    )
    return CrossModalForRetrieval(config)


def ranking_cost(model, size, rounds=7, device=None):
    """Milliseconds to rank one candidate of a query.

    This family's model reads cached tokens: 32 queries of 12 words rank 32 candidates each, drawn from 256. Its peers read
    every pair of image and text whole, 32 at once.

    Args:
        model: CrossModalForRetrieval with a vision and a text modality. size: Size of the peers.

    Returns:
        list of `{"model", "ms_per_pair", "ours_times_cheaper", "parameters"}`, the ratio a median over rounds in turn.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    generator = torch.Generator().manual_seed(0)
    model = model.to(device).eval()
    patches = (size.image[0] // size.patch) * (size.image[1] // size.patch)
    drawn = {"vision": (_POOL, patches), "text": (_QUERIES, _WORDS)}
    stores = {name: _random_store(model, name, *drawn[name], generator) for name in model.config.modality_names}
    candidates = torch.stack([torch.randperm(_POOL, generator=generator)[:_CANDIDATES] for _ in range(_QUERIES)])
    pairs = {"text": torch.arange(_QUERIES).repeat_interleave(_CANDIDATES), "vision": candidates.flatten()}
    pairs = {name: pairs[name] for name in stores}
    models, runs = {"CrossModalForRetrieval": model}, {}
    runs["CrossModalForRetrieval"] = lambda: rank_pairs(model, stores, pairs)
    count = {"CrossModalForRetrieval": _QUERIES * _CANDIDATES}
    ids = torch.randint(5, size.vocabulary, (_QUERIES, _WORDS), generator=generator).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["pixel_values"] = torch.randn(_QUERIES, 3, *size.image, generator=generator).to(device)
    for name, peer in RANKERS.items():
        models[name] = without_dropout(peer(size).to(device)).eval()
        runs[name], count[name] = _scores(models[name], batch), _QUERIES
    times = in_turn(runs, device, rounds)
    own = [seconds / count["CrossModalForRetrieval"] for seconds in times["CrossModalForRetrieval"]]
    return [
        {
            "model": name,
            "ms_per_pair": 1000 * statistics.median(seconds) / count[name],
            "ours_times_cheaper": statistics.median(
                other / count[name] / ours for other, ours in zip(seconds, own, strict=True)
            ),
            "parameters": sum(p.numel() for p in models[name].parameters()),
        }
        for name, seconds in times.items()
    ]


def _random_store(model, name, count, length, generator):
    """FeatureStore of `count` inputs with `length` tokens each. What they hold does not change the cost."""
    levels = len(model.config.levels_of(name))
    embeddings = torch.randn(count, model.config.projection_dim, generator=generator)
    tokens = torch.randn(count * length, levels * model.config.hidden_size, generator=generator)
    offsets = torch.arange(count + 1) * length
    return FeatureStore(nn.functional.normalize(embeddings, dim=-1), tokens, offsets, levels)


def _scores(model, batch):
    @torch.inference_mode()
    def run():
        return model(**batch)

    return run


def nearest_cost(count=100_000, width=256, queries=(1, 16, 128), top_k=10, rounds=7):
    """Milliseconds for the exact `top_k` of `count` vectors on the CPU: as a matrix product and by FAISS's flat index, in turn.

    Returns:
        list of `{"queries", "product_ms", "faiss_ms", "product_over_faiss"}`; without FAISS the last two are None.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)
    table = []
    for number in queries:
        asked = nn.functional.normalize(torch.randn(number, width, generator=generator), dim=-1)
        runs = {"product": lambda asked=asked: nearest_by_product(asked, vectors, top_k)}
        if has_faiss():
            faiss = nearest_by_faiss(vectors)
            runs["faiss"] = lambda asked=asked, faiss=faiss: faiss(asked, top_k)
        times = in_turn(runs, torch.device("cpu"), rounds)
        row = {"queries": number, "product_ms": 1000 * statistics.median(times["product"])}
        row |= {"faiss_ms": None, "product_over_faiss": None}
        if "faiss" in times:
            row["faiss_ms"] = 1000 * statistics.median(times["faiss"])
            ratios = [one / other for one, other in zip(times["product"], times["faiss"], strict=True)]
            row["product_over_faiss"] = statistics.median(ratios)
        table.append(row)
    return table


def contrast_memory(sizes=(1024, 2048, 4096, 8192, 16384), width=256, chunk_size=1024, device=None):
    """Peak memory and seconds of the contrast of a batch with itself, forward and backward, over its size.

    Returns:
        list of `{"rows", "whole_mib", "chunked_mib", "whole_seconds", "chunked_seconds", "difference"}`, the last the largest
        difference of gradients relative to the largest gradient; mib is None where the system does not tell.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    table = []
    for rows in tqdm(sizes, desc="contrast", leave=False):
        vectors = nn.functional.normalize(torch.randn(2, rows, width, device=device), dim=-1)
        labels = torch.arange(rows, device=device)[:, None]
        gradients, row = {}, {"rows": rows}
        for name, chunk in (("whole", None), ("chunked", chunk_size)):
            queries, keys = (part.clone().requires_grad_() for part in vectors)
            scale = torch.tensor(20.0, device=device, requires_grad=True)

            def run(queries=queries, keys=keys, scale=scale, labels=labels, chunk=chunk):
                queries.grad = keys.grad = None
                total, counted = info_nce(queries, keys, scale, labels, labels, chunk)
                (total / counted).backward()

            row[f"{name}_mib"] = peak_memory(run, device)
            row[f"{name}_seconds"] = statistics.median(in_turn({name: run}, device, rounds=3)[name])
            gradients[name] = torch.cat([queries.grad, keys.grad])
        largest = gradients["whole"].abs().max()
        row["difference"] = ((gradients["whole"] - gradients["chunked"]).abs().max() / largest).item()
        table.append(row)
    return table
