"""The high level of fusion: tokens of each modality to one vector, and the weights of modalities.

Letters: B batch, T tokens, D hidden_size, M modalities.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
from torch import nn


def masked_mean(tokens, mask):
    """Mean over real tokens. tokens (B,T,D), mask (B,T) or None. Returns (B,D); a row with no token gives 0."""
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def masked_max(tokens, mask):
    """Largest value of each channel over real tokens, as `masked_mean`."""
    if mask is None:
        return tokens.amax(dim=1)
    largest = tokens.masked_fill(~mask[..., None], torch.finfo(tokens.dtype).min).amax(dim=1)
    return largest.masked_fill(~mask.any(dim=1)[:, None], 0.0)


class TokenPooling(nn.Module):
    """Tokens of one modality to one vector: attention pooling, mean, or the first token; of a modality whose steps are a row with
    its neighbours (`context` of its entry), the token of the row itself.

    Attention pooling is the reduction of MCAN (Yu et al. 2019, arXiv 1906.10770): softmax over tokens of a small MLP.
    """

    def __init__(self, config, name=None):
        super().__init__()
        self.own_place = config.modality_settings[name].get("context", 0) if name else 0
        self.kind = "own" if self.own_place else config.pooling
        if self.kind == "attention":
            self.score = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size // 2),
                nn.GELU(),
                nn.Linear(config.hidden_size // 2, 1),
            )

    def forward(self, tokens, mask=None):
        """tokens (B,T,D), mask (B,T) or None. Returns (B,D); a row with no token gives 0."""
        if self.kind == "mean":
            return masked_mean(tokens, mask)
        if self.kind == "own":
            pooled = tokens[:, self.own_place]
        elif self.kind == "first":
            # The first token that is real: with padding on the left that is not the first position.
            pooled = (
                tokens[:, 0]
                if mask is None
                else tokens[torch.arange(tokens.shape[0], device=tokens.device), mask.int().argmax(dim=1)]
            )
        else:
            scores = self.score(tokens).float()
            if mask is not None:
                scores = scores.masked_fill(~mask[..., None], torch.finfo(scores.dtype).min)
            weights = scores.softmax(dim=1).to(tokens.dtype)
            pooled = (weights * tokens).sum(dim=1)
        return pooled if mask is None else pooled.masked_fill(~mask.any(dim=1)[:, None], 0.0)


class StandardisedNorm(nn.LayerNorm):
    """LN((x - mu) / sigma), with mean and deviation of every feature over the training rows (`standardise`; 0 and 1 until then).

    Features of a frozen encoder differ in size by orders of magnitude, and LN alone leaves that as it is.
    """

    def __init__(self, size, eps):
        super().__init__(size, eps=eps)
        self.register_buffer("shift", torch.empty(size))
        self.register_buffer("scale", torch.empty(size))
        self.initial_values = {"shift": 0.0, "scale": 1.0}

    @torch.no_grad()
    def standardise(self, rows):
        """Takes mean and deviation of features (N,size). One that hardly varies keeps its size."""
        deviation = rows.std(dim=0, correction=0)
        self.shift.copy_(rows.mean(dim=0))
        self.scale.copy_(1 / torch.where(deviation < 1e-3, torch.ones_like(deviation), deviation))

    def forward(self, vectors):
        return super().forward((vectors - self.shift) * self.scale)


class PooledShortcut(nn.Module):
    """Mean and maximum of an encoder's own tokens at each tapped depth, past the fusion:
    W [LN(mean X^1), LN(max X^1), LN(mean X^2), ...], or with a hidden layer W_2 GELU(W_1 [...]).

    What a probe of the encoder finds needs no training of tokens to be found, and is not lost in their narrower width. Features of
    frozen encoders are standardised over the training rows (`StandardisedNorm`). Of a row with its neighbours (`context`) its own
    token counts, in place of mean and maximum.
    """

    def __init__(self, config, name, width, hidden_width=None):
        super().__init__()
        self.own_place = config.modality_settings[name].get("context", 0)
        sizes = config.level_sizes_of(name)
        widths = [sizes[level] for level in config.levels_of(name) for _ in range(1 if self.own_place else 2)]
        self.norms = nn.ModuleList([StandardisedNorm(size, config.layer_norm_eps) for size in widths])
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.in_proj = None if hidden_width is None else nn.Linear(sum(widths), hidden_width)
        self.out_proj = nn.Linear(hidden_width or sum(widths), width, bias=False)

    def pool(self, levels, mask):
        """levels [(U,T,D_k)] as the encoder gave them, mask (U,T) or None. Returns [(U,D_k)], of each level one or two."""
        levels = [level.to(self.out_proj.weight.dtype) for level in levels]
        if self.own_place:
            return [level[:, self.own_place] for level in levels]
        return [pool(level, mask) for level in levels for pool in (masked_mean, masked_max)]

    def forward(self, levels, mask):
        """Arguments of `pool`. Returns (U,width)."""
        pooled = [norm(vector) for norm, vector in zip(self.norms, self.pool(levels, mask), strict=True)]
        found = self.dropout(torch.cat(pooled, dim=-1))
        if self.in_proj is not None:
            found = self.dropout(nn.functional.gelu(self.in_proj(found)))
        return self.out_proj(found)


class ModalityWeighting(nn.Module):
    """One weight per modality and row, over the modalities present, given the task k where a model serves several.

    Adaptive:    w = softmax over present m of a_m,  a_m = v . tanh(W pool_m + U e_k) + b_m + b_km
    Uncertainty: w = softmax over present m of -s_m, s_m = a_m a log variance that auxiliary losses teach (see
                 `unimodal_losses`): precision weighting
    Uniform:     1 / (number present)

    With `modality_prior` p_m, all of them as if w_m p_m were made to sum to 1.
    """

    def __init__(self, config):
        super().__init__()
        self.prior = [(config.modality_prior or {}).get(name, 1.0) for name in config.modality_names]
        self.by_uncertainty = config.modality_weighting == "uncertainty"
        self.adaptive = config.modality_weighting == "adaptive" and len(config.modality_names) > 1
        if self.adaptive or self.by_uncertainty:
            self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
            self.score = nn.Linear(config.hidden_size, 1, bias=False)
            self.bias = nn.Embedding(len(config.modality_names), 1)
            # Equal weights at the start, whatever the pooled vectors are.
            self.score.initial_values = self.bias.initial_values = {"weight": 0.0}
            if config.task_names:
                self.task = nn.Embedding(len(config.task_names), config.hidden_size)
                self.task_bias = nn.Embedding(len(config.task_names), len(config.modality_names))
                self.task_bias.initial_values = {"weight": 0.0}

    def forward(self, pooled, presence, task_ids=None):
        """pooled (B,M,D), 0 for the absent, presence (B,M) bool, task_ids (B,) where the model has tasks.

        Returns weights (B,M), 0 for the absent, rows sum to 1; and log variances (B,M), or None.
        """
        prior = torch.tensor(self.prior, device=pooled.device)
        if not self.adaptive and not self.by_uncertainty:
            weights = (presence * prior).to(pooled.dtype)
            return weights / weights.sum(dim=1, keepdim=True).clamp(min=min(self.prior)), None
        hidden, bias = self.hidden(pooled), self.bias.weight.squeeze(-1)
        if task_ids is not None:
            hidden, bias = hidden + self.task(task_ids)[:, None], bias + self.task_bias(task_ids)
        scores = (self.score(torch.tanh(hidden)).squeeze(-1) + bias).float()
        log_variances = None
        if self.by_uncertainty:
            # e^-s scales a loss: beyond these bounds one row would drown the others.
            log_variances = scores.clamp(-4.0, 4.0)
            scores = -log_variances
        scores = (scores + prior.log()).masked_fill(~presence, torch.finfo(torch.float32).min)
        return scores.softmax(dim=1).masked_fill(~presence, 0.0).to(pooled.dtype), log_variances
