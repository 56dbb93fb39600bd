"""Losses of the family: pure functions, each with its equation and source.

Letters: B batch, C classes.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
from torch import nn


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
    logits, labels, presence, log_variances=None, problem_type="single_label_classification", **options
):
    """Loss of each modality's own classifier, mean over the rows that have the modality.

    L_m = mean_b CE(logits_bm, label_b); with log variances s, L_m = mean_b [e^{-s_bm} CE(...) + s_bm / 2] (Kendall and
    Gal 2017, arXiv 1703.04977): a modality that errs on a row is better off to say that it is uncertain there.

    logits (B,M,C), labels as in `row_losses`, presence (B,M) bool, log_variances (B,M) or None; options: of `row_losses`. Returns
    (M,), 0 for a modality that no row has.
    """
    losses = []
    for index in range(logits.shape[1]):
        values, counts = row_losses(logits[:, index], labels, problem_type, **options)
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
