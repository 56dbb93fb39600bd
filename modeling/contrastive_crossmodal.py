"""Losses that compare rows with each other: contrast, matching, alignment of tokens. Pure functions, each with its equation
and source; and the gathering of embeddings that they need over several processes.

Which rows are positives of each other is said by labels (N,K): two rows are, if they agree in any column (the same image,
the same text). Letters: N queries, M keys, B batch, P projection_dim, D hidden_size, T S tokens, K columns of labels.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
import torch.distributed as dist
from torch import nn


def positives_of(query_labels, key_labels):
    """query_labels (N,K) and key_labels (M,K) long. Returns (N,M) bool: which keys are positives of which query."""
    return (query_labels[:, None] == key_labels[None]).any(dim=-1)


def similarities_of(queries, keys):
    """Inner products (N,M) of queries (N,P) and keys (M,P), at least in float32, under autocast too: at a scale of 100 a cosine in
    bfloat16 is wrong by up to 0.4 in the logits."""
    precise = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        return queries.to(precise) @ keys.to(precise).T


class _InfoNCE(torch.autograd.Function):
    """`info_nce`, a tile of similarities at a time: they are computed again in the backward."""

    @staticmethod
    def forward(ctx, queries, keys, scale, query_labels, key_labels, chunk):
        count = len(queries)
        normalisers = queries.new_full((count,), -torch.inf, dtype=torch.float32)
        positive_sums = queries.new_zeros(count, dtype=torch.float32)
        positive_counts = torch.zeros_like(positive_sums)
        for rows, columns in _tiles(count, len(keys), chunk):
            scores = scale * similarities_of(queries[rows].float(), keys[columns].float())
            positive = positives_of(query_labels[rows], key_labels[columns])
            normalisers[rows] = torch.logaddexp(normalisers[rows], scores.logsumexp(dim=1))
            positive_sums[rows] += (scores * positive).sum(dim=1)
            positive_counts[rows] += positive.sum(dim=1)
        ctx.save_for_backward(queries, keys, scale, query_labels, key_labels, normalisers, positive_counts)
        ctx.chunk = chunk
        losses = normalisers - positive_sums / positive_counts.clamp(min=1)
        counted = (positive_counts > 0).sum()
        ctx.mark_non_differentiable(counted)
        return losses.masked_fill(positive_counts == 0, 0.0).sum(), counted

    @staticmethod
    def backward(ctx, gradient, _):
        queries, keys, scale, query_labels, key_labels, normalisers, positive_counts = ctx.saved_tensors
        to_queries, to_keys = (torch.zeros_like(vectors, dtype=torch.float32) for vectors in (queries, keys))
        to_scale = torch.zeros_like(scale, dtype=torch.float32)
        for rows, columns in _tiles(len(queries), len(keys), ctx.chunk):
            similarities = similarities_of(queries[rows].float(), keys[columns].float())
            counts = positive_counts[rows, None]
            wanted = positives_of(query_labels[rows], key_labels[columns]) / counts.clamp(min=1)
            difference = (scale * similarities - normalisers[rows, None]).exp() - wanted
            difference = difference.masked_fill(counts == 0, 0.0) * gradient
            to_queries[rows] += scale * (difference @ keys[columns].float())
            to_keys[columns] += scale * (difference.T @ queries[rows].float())
            to_scale += (difference * similarities).sum()
        return to_queries.to(queries.dtype), to_keys.to(keys.dtype), to_scale.to(scale.dtype), None, None, None


def _tiles(rows, columns, chunk):
    for row in range(0, rows, chunk):
        for column in range(0, columns, chunk):
            yield slice(row, row + chunk), slice(column, column + chunk)


def info_nce(queries, keys, scale, query_labels, key_labels, chunk_size=None):
    """Contrast of each query with all keys, several of which may be its positives (supervised contrast, Khosla et al. 2020,
    arXiv 2004.11362, `L_out`; with one positive InfoNCE, van den Oord et al. 2018, arXiv 1807.03748).

        L = - sum_i sum_j y_ij log softmax_j(scale q_i . k_j),   y_ij = 1[j is a positive of i] / number of them

    Args:
        queries (N,P), keys (M,P): of length 1. scale: scalar tensor, 1 / temperature.
        query_labels (N,K), key_labels (M,K): see the top of the file. A query without a positive counts for nothing.
        chunk_size: rows and columns of a tile of similarities; memory then grows with its square and not with N M. None: whole.

    Returns:
        the sum over queries, and how many had a positive.
    """
    if chunk_size is None:
        return contrast(scale * similarities_of(queries, keys), positives_of(query_labels, key_labels))
    return _InfoNCE.apply(queries, keys, scale, query_labels, key_labels, chunk_size)


def contrast(scores, positive):
    """`info_nce` of scores (N,M) that are there already, positive (N,M) bool. Returns the sum over rows, and how many had a
    positive."""
    counts = positive.sum(dim=1)
    losses = -(scores.float().log_softmax(dim=1) * positive).sum(dim=1) / counts.clamp(min=1)
    return losses.sum(), (counts > 0).sum()


def sigmoid_contrast(queries, keys, scale, bias, query_labels, key_labels):
    """Every pair by itself, positive or not (SigLIP, Zhai et al. 2023, arXiv 2303.15343).

        L = - sum_i sum_j log sigmoid(z_ij (scale q_i . k_j + bias)),   z_ij = 1 for positives, else -1

    Arguments as `info_nce`. Returns the sum over queries, and how many there are.
    """
    signs = 2.0 * positives_of(query_labels, key_labels) - 1.0
    return -nn.functional.logsigmoid(signs * (scale * similarities_of(queries, keys) + bias)).sum(), torch.tensor(
        len(queries), device=queries.device
    )


def hardest_triplets(scores, positive, own, margin):
    """Triplet loss with the hardest negative of the batch (VSE++, Faghri et al. 2018, arXiv 1707.05612; used by MMCA).

        L = sum_i [margin - s_i,own(i) + max_{j negative} s_ij]_+

    scores (N,M), positive (N,M) bool; own (N,) long: the column of each row's own pair, -1 where it has none. Returns the sum over
    rows, and how many have a pair of their own and a negative.
    """
    counted = (own >= 0) & ~positive.all(dim=1)
    hardest = scores.masked_fill(positive, torch.finfo(scores.dtype).min).amax(dim=1)
    losses = margin - scores.gather(1, own.clamp(min=0)[:, None]).squeeze(1) + hardest
    return losses.clamp(min=0).masked_fill(~counted, 0.0).sum(), counted.sum()


def draw_negatives(scores, positive, count=1, generator=None):
    """Negatives of each row, hard ones more often: drawn in proportion to softmax(scores) (ALBEF, Li et al. 2021,
    arXiv 2107.07651; the small constant after X-VLM, arXiv 2111.08276), several without repetition (the largest of weights over
    exponential noise: Gumbel top-k, Kool et al. 2019, arXiv 1903.06059).

    The softmax is over positives too, as published: a row whose positives lead by more than the constant has negatives drawn by chance,
    one that is undecided those that rival.

    scores (N,M), positive (N,M) bool. Returns indices (N,C), C = count or at most M, and which of them are negatives (N,C) bool: a
    row may have fewer, or none.
    """
    with torch.no_grad():
        weights = (scores.float().softmax(dim=1) + 1e-5).masked_fill(positive, 0.0)
        noise = torch.empty_like(weights).exponential_(generator=generator)
        drawn = (weights / noise).topk(min(count, weights.shape[1]), dim=1).indices
        return drawn, weights.gather(1, drawn) > 0


def ranking_loss(own, others, there):
    """The own pair before all others that were drawn for it (localised contrast of rankers: Gao et al. 2021, arXiv 2101.08751).

        L_i = - log( e^{s_i} / (e^{s_i} + sum_k e^{s_ik}) )

    own s_i (N,), others s_ik (N,C), there (N,C) bool. Returns the mean over rows that have another.
    """
    every = torch.cat([own[:, None], others.masked_fill(~there, -torch.inf)], dim=1).float()
    counted = there.any(dim=1)
    losses = (every.logsumexp(dim=1) - every[:, 0]).masked_fill(~counted, 0.0)
    return losses.sum() / counted.sum().clamp(min=1)


def matching_loss(logits, matched):
    """Does the pair belong together: binary cross entropy, mean over pairs. logits (N,), matched (N,) bool."""
    if not len(logits):
        return logits.sum()
    return nn.functional.binary_cross_entropy_with_logits(logits.float(), matched.float())


def recovered_tokens(query, key, value, tokens, token_mask=None, key_mask=None):
    """How well the tokens of each row are recovered from what they see in every other row, s_ij of token alignment.

        o_w^{i<-j} = softmax_s(q_w^i . k_s^j / sqrt(D)) v^j,   s_ij = mean over words w of i of cos(t_w^i, o_w^{i<-j})

    After SCAN (Lee et al. 2018, arXiv 1803.08024) and GLoRIA (Huang et al. 2021): what a token finds in its own partner should
    be closer to it than what it finds in others.

    query and tokens (B,T,D); key and value (M,S,D); masks (B,T) and (M,S) bool or None. Returns s (B,M).
    """
    scores = torch.einsum("btd,msd->bmts", query, key) * query.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[None, :, None], torch.finfo(scores.dtype).min)
    seen = torch.einsum("bmts,msd->bmtd", scores.softmax(dim=-1), value)
    cosines = nn.functional.cosine_similarity(tokens[:, None], seen, dim=-1)
    if token_mask is None:
        return cosines.mean(dim=-1)
    weights = token_mask[:, None].to(cosines.dtype)
    return (cosines * weights).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1)


def late_interaction(queries, keys, query_mask=None, key_mask=None):
    """Mean over tokens of the best match in the other row (FILIP, Yao et al. 2021, arXiv 2111.07783).

        s_ij = mean over tokens w of i of max_s (q_w^i . k_s^j)

    queries (B,T,P), keys (M,S,P) of length 1; masks (B,T), (M,S) bool or None. Returns (B,M).
    """
    scores = torch.einsum("btp,msp->bmts", queries, keys)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[None, :, None], torch.finfo(scores.dtype).min)
    best = scores.amax(dim=-1)
    if query_mask is None:
        return best.mean(dim=-1)
    weights = query_mask[:, None].to(best.dtype)
    return (best * weights).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1)


def cross_attention_penalty(tokens, others, mask=None, other_mask=None):
    """The research note's own loss on cross attention, as it stands there, with what shows its collapse.

        A = softmax(F G^T / sqrt(D)) G,   L = (1/B) sum_b ||(F + A) - F||_F^2 = (1/B) sum_b ||A||_F^2

    Its minimum is where cross attention says nothing, and shrinking all features lowers it for free: off unless
    `cross_weight` asks for it.

    tokens F (B,T,D), others G (B,S,D), masks (B,T) and (B,S) bool or None. Returns the loss, and {"norm": mean length of A's
    rows, "entropy": of the attention, as part of that of a uniform one, "pooled_norm": length of F's mean}.
    """
    scores = tokens @ others.transpose(1, 2) * tokens.shape[-1] ** -0.5
    if other_mask is not None:
        scores = scores.masked_fill(~other_mask[:, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    seen = weights @ others
    real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
    lengths = seen.square().sum(dim=-1) * real
    with torch.no_grad():
        entropy = -(weights * weights.clamp(min=1e-12).log()).sum(dim=-1)
        keys = torch.full_like(entropy, others.shape[1]) if other_mask is None else other_mask.sum(dim=1)[:, None]
        part = entropy / keys.to(entropy.dtype).clamp(min=2).log()
        count = real.sum().clamp(min=1)
        pooled = (tokens * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True).clamp(min=1)
        shown = {
            "norm": lengths.clamp(min=0).sqrt().sum() / count,
            "entropy": (part * real).sum() / count,
            "pooled_norm": pooled.norm(dim=-1).mean(),
        }
    return lengths.sum(dim=1).mean(), shown


def combine_losses(losses, weights, log_variances=None):
    """Sum of weighted losses; with log variances s each is worth what it is certain of (Kendall et al. 2018, arXiv
    1705.07115): sum_k w_k (e^{-s_k} L_k + s_k).

    losses {name: scalar}, weights {name: number}, log_variances {name: scalar} or None. A weight of 0 leaves a loss out.
    """
    total = 0.0
    for name, loss in losses.items():
        if not weights[name]:
            continue
        if log_variances is not None:
            loss = torch.exp(-log_variances[name]) * loss + log_variances[name]
        total = total + weights[name] * loss
    return total


class _Gather(torch.autograd.Function):
    """Rows of all processes, in the order of ranks. Every process's loss sends its gradient to the rows' owner."""

    @staticmethod
    def forward(ctx, rows):
        sizes = _sizes(rows)
        ctx.sizes = sizes
        padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = sum(ctx.sizes[: dist.get_rank()])
        return gradient[start : start + ctx.sizes[dist.get_rank()]]


def _sizes(rows):
    """Number of rows on each rank."""
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    return [int(size) for size in sizes]


def is_distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(rows):
    """rows (B,...) of this process to those of all processes, with gradient."""
    return _Gather.apply(rows)


def mean_of_means(sums, counts, shared=False):
    """Mean of the means of those losses in which any row counts, from their sums (scalars) over rows and how many counted (numbers).

    shared: over the rows of all processes, to what gives it when processes are averaged, as DDP does with gradients.
    """
    sums = torch.stack(sums)
    counts = torch.stack([torch.as_tensor(count, device=sums.device, dtype=torch.float32) for count in counts])
    if shared:
        dist.all_reduce(counts)
        sums = sums * dist.get_world_size()
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
