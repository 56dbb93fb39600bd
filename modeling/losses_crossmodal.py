"""Losses of the family: pure functions, each with its equation and source.

Letters: B batch, C classes.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
from torch import nn


def soft_target_loss(logits, targets):
    """Binary cross entropy of every answer, summed over answers, mean over the batch.

    L = (1/B) sum_b sum_c BCE(sigmoid(logits_bc), targets_bc): `BCEWithLogits` times the number of answers, as
    bottom-up attention (Anderson et al. 2018, arXiv 1707.07998) and BridgeTower train VQA v2.

    logits (B,C), targets (B,C) in [0,1]. Returns a scalar.
    """
    return nn.functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype)) * logits.shape[-1]


def row_losses(logits, labels, label_smoothing=0.0, regression=False):
    """Loss of every row alone: cross entropy for labels (B,), summed binary cross entropy for scores (B,C), mean squared
    error for real numbers (B,) or (B,C) of a regression.

    logits (B,C). Returns losses (B,), 0 for rows labelled -100, and which rows count (B,) bool.
    """
    everyone = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if regression:
        return (logits - labels.view(logits.shape).to(logits.dtype)).square().mean(-1), everyone
    if labels.is_floating_point():
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        return losses.sum(-1), everyone
    losses = nn.functional.cross_entropy(
        logits, labels, ignore_index=-100, label_smoothing=label_smoothing, reduction="none"
    )
    return losses, labels != -100


def unimodal_losses(logits, labels, presence, log_variances=None, label_smoothing=0.0, regression=False):
    """Loss of each modality's own classifier, mean over the rows that have the modality.

    L_m = mean_b CE(logits_bm, label_b); with log variances s, L_m = mean_b [e^{-s_bm} CE(...) + s_bm / 2] (Kendall and
    Gal 2017, arXiv 1703.04977): a modality that errs on a row is better off to say that it is uncertain there.

    logits (B,M,C), labels (B,) or (B,C), presence (B,M) bool, log_variances (B,M) or None. Returns (M,), 0 for a modality
    that no row has.
    """
    losses = []
    for index in range(logits.shape[1]):
        values, counted = row_losses(logits[:, index], labels, label_smoothing, regression)
        if log_variances is not None:
            values = torch.exp(-log_variances[:, index]) * values + log_variances[:, index] / 2
        counted = counted & presence[:, index]
        losses.append(values.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1))
    return torch.stack(losses)


def class_loss(logits, labels, label_smoothing=0.0):
    """Cross entropy over classes. logits (B,C), labels (B,) with -100 for rows that do not count.

    A batch in which no row counts gives 0, not NaN.
    """
    counted = (labels != -100).sum().clamp(min=1)
    total = nn.functional.cross_entropy(
        logits, labels, ignore_index=-100, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / counted


def text_loss(logits, labels, label_smoothing=0.0, weights=None, reduction="mean"):
    """Cross entropy of words that are to be written.

    Without weights the mean over words. With weights w of rows, such as the scores of their answers, sum_b w_b (sum over words
    of b) / B (ALBEF, Li et al. 2021, arXiv 2107.07651).

    logits (B,T,V) and labels (B,T) with -100 for what does not count, weights (B,) or None; with reduction="sum" also flat:
    (N,V), (N,), (N,). Returns a scalar.
    """
    losses = nn.functional.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=-100,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view(labels.shape)
    if weights is not None:
        losses = losses * (weights if weights.dim() == losses.dim() else weights[:, None])
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (len(labels) if weights is not None else (labels != -100).sum().clamp(min=1))
