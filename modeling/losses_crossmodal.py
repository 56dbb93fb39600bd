"""Losses of the family: pure functions, each with its equation and source.

Letters: B batch, C classes.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
from torch import nn

from .pooling_crossmodal import masked_mean


def row_counts(labels, problem_type, class_weights=None):
    """How much each row counts in a mean of `row_losses`: (B,)."""
    if problem_type in ("regression", "absolute"):
        return (~labels.isnan().view(len(labels), -1).any(-1)).float()
    if problem_type == "multi_label_classification":
        return labels.new_ones(len(labels), dtype=torch.float32)
    if labels.is_floating_point():
        return torch.ones_like(labels[:, 0]) if class_weights is None else labels.float() @ class_weights
    counted = (labels != -100).float()
    return counted if class_weights is None else class_weights[labels.clamp(min=0)] * counted


def row_losses(logits, labels, problem_type, label_smoothing=0.0, class_weights=None):
    """Loss of every row alone, and how much each row counts: their mean is losses.sum() / counts.sum().

    One label: cross entropy, -sum_c v_c p_c log softmax(logits)_c with weights v of the classes and p one for the label (B,), or
        the probabilities (B,C) that mixing rows makes of labels. A row counts as its label does, one labelled -100 not.
    Several: binary cross entropy with scores (B,C) in [0,1], summed over classes, as bottom-up attention (Anderson et al. 2018,
        arXiv 1707.07998) and BridgeTower train VQA v2; weights are of what holds against what does not.
    Real numbers (B,) or (B,C): mean of squares, or for "absolute" of absolute differences (see `regression_loss` of the config). A
        row with NaN does not count.

    logits (B,C), class_weights (C,) or None. Returns (B,) and (B,).
    """
    logits, counts = logits.float(), row_counts(labels, problem_type, class_weights)
    if problem_type in ("regression", "absolute"):
        labels = labels.view(logits.shape).float()
        apart = logits - torch.where(counts[:, None] > 0, labels, logits.detach())
        return (apart.abs() if problem_type == "absolute" else apart.square()).mean(-1), counts
    if problem_type == "multi_label_classification":
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, labels.float(), pos_weight=class_weights, reduction="none"
        )
        return losses.sum(-1), counts
    labels = labels.float() if labels.is_floating_point() else labels
    losses = nn.functional.cross_entropy(
        logits, labels, weight=class_weights, label_smoothing=label_smoothing, reduction="none"
    )
    return losses, counts


def mean_loss(losses, counts):
    """Mean (a scalar) of losses (B,) that count differently (B,); of rows of which none counts 0, not NaN."""
    return losses.sum() / counts.sum().clamp(min=torch.finfo(counts.dtype).tiny)


def unimodal_losses(
    logits, labels, presence, log_variances=None, problem_type="single_label_classification", targets=None, **options
):
    """Loss of each modality's own classifier, mean over the rows that have the modality.

    L_m = mean_b CE(logits_bm, label_b); with log variances s, L_m = mean_b [e^{-s_bm} CE(...) + s_bm / 2] (Kendall and
    Gal 2017, arXiv 1703.04977): a modality that errs on a row is better off to say that it is uncertain there.

    logits (B,M,C), labels as in `row_losses`, presence (B,M) bool, log_variances (B,M) or None, targets (B,M,...): labels of each
    modality alone, or None: those of the row; options: of `row_losses`. Returns (M,), 0 for a modality that no row has.
    """
    losses = []
    for index in range(logits.shape[1]):
        own = labels if targets is None else targets[:, index]
        values, counts = row_losses(logits[:, index], own, problem_type, **options)
        if log_variances is not None:
            values = torch.exp(-log_variances[:, index]) * values + log_variances[:, index] / 2 * (counts > 0)
        counts = counts * presence[:, index]
        losses.append(mean_loss(values.masked_fill(~presence[:, index], 0.0), counts))
    return torch.stack(losses)


def text_counts(labels, weights=None):
    """How much each row counts in a mean of `text_losses`: (B,)."""
    words = (labels != -100).sum(-1).float()
    return words if weights is None else torch.ones_like(words)


def text_losses(logits, labels, label_smoothing=0.0, weights=None):
    """Cross entropy of the words that each row is to write, and how much the row counts: their mean is losses.sum() / counts.sum().

    Without weights a row counts as many times as it has words. With weights w of rows, such as the scores of their answers, it
    is sum_b w_b (sum over words of b) / B (ALBEF, Li et al. 2021, arXiv 2107.07651).

    logits (B,T,V) and labels (B,T) with -100 for what does not count, weights (B,) or None. Returns (B,) and (B,).
    """
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=-100,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    losses = losses.view(labels.shape).sum(-1)
    return losses if weights is None else losses * weights, text_counts(labels, weights)


def soft_margin_loss(logits, tags, rows=None):
    """Multi-label soft margin: mean over classes of -[y log s(z) + (1 - y) log s(-z)], mean over rows.

    logits (B,C), tags (B,C) of 0 and 1, rows (B,) bool: those that count, or None. Returns a scalar, 0 where none counts.
    """
    losses = nn.functional.multilabel_soft_margin_loss(logits.float(), tags.float(), reduction="none")
    return losses.mean() if rows is None else mean_loss(losses * rows, rows.float())


def activation_loss_3d(activations, tags, mask=None, power=1.0):
    """Class activation of supervoxels from tags of their scene: BCE((mean_s p_s^r)^(1/r), y), p_s = softmax_c(a_s): what no tag says
    must be nowhere, what a tag says somewhere.

    With r = 1 it is MIT's (Yang et al. 2023, arXiv 2310.12817), by which all classes of a scene strive for parts of the same size; the
    larger r, the more the best places alone count (the maximum, in the limit), and the size of a class is its own.

    activations (B,S,C), tags (B,C), mask (B,S) bool or None, power r. Returns a scalar.
    """
    # Kept off 0, where the root has no finite slope.
    probabilities = activations.float().softmax(dim=-1).clamp(min=1e-6)
    parts = masked_mean(probabilities**power, mask) ** (1 / power)
    return nn.functional.binary_cross_entropy(parts.clamp(1e-6, 1 - 1e-6), tags.float())


def activation_loss_2d(activations, tags, mask=None, rows=None):
    """Class activation of views: the soft margin of mean_n a_n (MIT). activations (B,T,C), mask (B,T) bool or None, rows (B,) bool: those
    that have views, or None. Returns a scalar."""
    return soft_margin_loss(masked_mean(activations.float(), mask), tags, rows)


def class_contrast_loss(scores, tags=None, rows=None):
    """Each class token of one modality is to attend to that of the same class of the other, more than to the others (MIT's N-pair loss):

        L = (1 / layers) sum_l 1/2 [CE(A^l, I) + CE(A^lT, I)],   A^l the raw scores of class on class tokens, mean over heads

    scores (L,B,C,C); tags (B,C): only the classes that a row has take part, or None: all; rows (B,) bool: those that have both
    modalities, or None. Returns a scalar, 0 where there is nothing to compare.
    """
    count = scores.shape[-1]
    taking_part = scores.new_ones(scores.shape[1:3], dtype=torch.bool) if tags is None else tags.bool()
    if rows is not None:
        taking_part = taking_part & rows[:, None]
    masked = scores.float().masked_fill(~taking_part[None, :, None], -1e4)
    back = scores.float().transpose(-1, -2).masked_fill(~taking_part[None, :, None], -1e4)
    own = torch.arange(count, device=scores.device).expand(scores.shape[:-1])
    losses = sum(
        nn.functional.cross_entropy(part.flatten(0, 2), own.flatten(), reduction="none").view(own.shape)
        for part in (masked, back)
    )
    return mean_loss(losses.mean(dim=0)[taking_part] / 2, taking_part[taking_part].float())


def smoothness_loss(features, means, mask=None):
    """Points of a supervoxel are alike: the mean square of f_i - v_s(i) (MIT). features and means of each point's supervoxel (B,N,D),
    mask (B,N) bool or None. Returns a scalar."""
    apart = (features - means).float().square().mean(dim=-1)
    return apart.mean() if mask is None else mean_loss(apart * mask, mask.float())


def point_loss(logits, labels, class_weights=None):
    """Cross entropy of points, mean over those that have a label: logits (B,N,C), labels (B,N) long, -100 for none, class_weights (C,)
    or None. Returns a scalar, 0 where no point has a label."""
    losses, counts = row_losses(
        logits.flatten(0, 1), labels.flatten(), "single_label_classification", class_weights=class_weights
    )
    return mean_loss(losses, counts)
