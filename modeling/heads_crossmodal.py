"""What stands on the fused representation, or beside it: the parts that the heads of the family share.

Letters: B batch, D hidden_size, M modalities, C classes.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
from torch import nn


class ClassificationHead(nn.Module):
    """LN, linear, GELU, dropout, linear: (B,D) to (B,num_labels), or (B,num_outputs).

    evidence: the hidden layer also sees what a classifier of each modality alone says, (B,M,C), at the start with weight 0.
    """

    def __init__(self, config, num_outputs=None, evidence=False):
        super().__init__()
        width = config.classifier_hidden_size or 2 * config.hidden_size
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, width)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(width, num_outputs or config.num_labels)
        if evidence:
            self.evidence = nn.ModuleList(
                [nn.Linear(config.num_labels, width, bias=False) for _ in config.modality_names]
            )
            for layer in self.evidence:
                layer.initial_values = {"weight": 0.0}

    def forward(self, pooled, evidence=None):
        hidden = self.dense(self.norm(pooled))
        if evidence is not None:
            hidden = hidden + sum(layer(part) for layer, part in zip(self.evidence, evidence.unbind(1), strict=True))
        return self.out_proj(self.dropout(self.activation(hidden)))


class AuxiliaryHeads(nn.Module):
    """One classifier per modality on what it knows alone: LN, linear.

    Their losses keep an encoder learning that the fusion could do without, and show what each modality can do by itself
    (Wang et al. 2020, arXiv 1905.12681).
    """

    def __init__(self, config):
        super().__init__()
        self.norms = nn.ModuleList(
            [nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in config.modality_names]
        )
        self.classifiers = nn.ModuleList(
            [nn.Linear(config.hidden_size, config.num_labels) for _ in config.modality_names]
        )

    def forward(self, unimodal):
        """unimodal (B,M,D). Returns logits (B,M,C)."""
        pairs = zip(self.norms, self.classifiers, unimodal.unbind(1), strict=True)
        return torch.stack([classify(norm(vector)) for norm, classify, vector in pairs], dim=1)
