"""Losses of the family: pure functions, each with its equation and source.

Letters: B batch, C classes.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

from torch import nn


def soft_target_loss(logits, targets):
    """Binary cross entropy of every answer, summed over answers, mean over the batch.

    L = (1/B) sum_b sum_c BCE(sigmoid(logits_bc), targets_bc): `BCEWithLogits` times the number of answers, as
    bottom-up attention (Anderson et al. 2018, arXiv 1707.07998) and BridgeTower train VQA v2.

    logits (B,C), targets (B,C) in [0,1]. Returns a scalar.
    """
    return nn.functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype)) * logits.shape[-1]


def class_loss(logits, labels, label_smoothing=0.0):
    """Cross entropy over classes. logits (B,C), labels (B,) with -100 for rows that do not count.

    A batch in which no row counts gives 0, not NaN.
    """
    counted = (labels != -100).sum().clamp(min=1)
    total = nn.functional.cross_entropy(
        logits, labels, ignore_index=-100, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / counted
