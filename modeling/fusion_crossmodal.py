"""Fusion operators, gates, pooling and modality weights: tokens of every modality in, one representation out.

Every operator is a row of `FUSIONS` and keeps one contract:

    forward(levels, masks, spread, output_attentions) -> (tokens, attentions)

    levels      {modality: [tokens (U_m,T_m,D) for fusion layer 0, 1, ...]}, at width D with type and position in them
    spread      {modality: function from (U_m,...) to (B,...)} for modalities of which several rows share an input
    masks       {modality: (B,T_m) bool, True for real tokens, or None if all are}; an absent row has no True
    tokens      {modality: (B,T_m,D)}
    attentions  per layer {"m<-n": weights (B,h,T_m,T_n)}: how tokens of m attended to tokens of n

Letters: B batch, U_m distinct inputs of modality m, T_m tokens of it, D hidden_size, M modalities, h heads.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_crossmodal import FeedForwardBlock, MultiHeadAttention, SelfAttentionBlock


def masked_mean(tokens, mask):
    """Mean over real tokens. tokens (B,T,D), mask (B,T) or None. Returns (B,D); a row with no token gives 0."""
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class ContentGate(nn.Module):
    """G(x) c = c + W_o (W_x x * W_c c): what was seen, changed by how it agrees with what looks.

    The product is low-rank bilinear pooling (Kim et al. 2017, arXiv 1610.04325), here as a residual of attention. A
    sigmoid gate can only scale what was seen, and leaves "is what I see what the word says?" to the feed-forward layer.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.stream_proj = nn.Linear(width, width)
        self.update_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, stream, update):
        """stream and update (B,T,D). Returns the gated update (B,T,D)."""
        return update + self.out_proj(self.stream_proj(stream) * self.update_proj(update))


class StaticGate(nn.Module):
    """g = tanh(a), a = 0 at the start, so that the stream begins as if alone (Flamingo, arXiv 2204.14198)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, stream, update):
        return torch.tanh(self.weight) * update


class OpenGate(nn.Module):
    """g = 1."""

    def __init__(self, config):
        super().__init__()

    def forward(self, stream, update):
        return update


GATE_CLASSES = {"content": ContentGate, "static": StaticGate, "none": OpenGate}


class CrossFusionLayer(GradientCheckpointingLayer):
    """One layer of adaptive cross-modal attention over any number of modalities.

        S_m = Z_m + SelfAttn(Z_m)
        c_m = sum over present n != m of G_m(CrossAttn(S_m, S_n))    (`gate`)
        Z_m = FFN(S_m + c_m)

    With `fusion_queries`, only those modalities are updated so; the others stay as their encoders left them, and are
    looked at. A question that looks at an image this way costs less than two streams that look at each other.

    Each modality owns its query, key, value and output projections: keys and values of a modality are projected once
    for all streams that look at it, and parameters grow with M, not with its square.
    """

    def __init__(self, config):
        super().__init__()
        names, queries = config.modality_names, config.fusion_queries or config.modality_names
        # Weights of a role that a modality never takes would never get a gradient.
        looking = queries if len(names) > 1 else []
        looked_at = [name for name in names if any(other != name for other in looking)]
        self.self_attn = nn.ModuleDict({name: SelfAttentionBlock(config) for name in queries})
        self.mlp = nn.ModuleDict({name: FeedForwardBlock(config) for name in queries})
        self.cross_norm = nn.ModuleDict(
            {
                name: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
                for name in names
                if name in looking or name in looked_at
            }
        )
        self.cross_attn = nn.ModuleDict(
            {name: MultiHeadAttention(config, name in looking, name in looked_at) for name in self.cross_norm}
        )
        self.gate = nn.ModuleDict({name: GATE_CLASSES[config.gate](config) for name in looking})
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.looked_at = looked_at

    def forward(self, tokens, masks, output_attentions=False, spread=None):
        """tokens {m: (B,T_m,D)}, or (U_m,T_m,D) for m in spread; masks {m: (B,T_m) or None}.

        Returns the new tokens and {"m<-n": weights}.
        """
        attentions, streams = {}, dict(tokens)
        for name in tokens:
            if name in self.self_attn:
                streams[name], attentions[f"{name}<-{name}"] = self.self_attn[name](
                    tokens[name], masks[name], output_attentions
                )
        updated = dict(streams)
        if len(streams) > 1:
            normed = {
                name: self.cross_norm[name](stream) for name, stream in streams.items() if name in self.cross_norm
            }
            key_values = {
                name: self.cross_attn[name].project_key_value(normed[name])
                for name in streams
                if name in self.looked_at
            }
            # Keys and values of an input that many rows look at are projected once.
            for name in key_values.keys() & (spread or {}).keys():
                key_values[name] = tuple(map(spread[name], key_values[name]))
            for name in streams:
                for other, key_value in key_values.items():
                    if other == name or name not in self.gate:
                        continue
                    seen, attentions[f"{name}<-{other}"] = self.cross_attn[name](
                        normed[name], key_value, masks[other], output_attentions
                    )
                    gated = self.gate[name](normed[name], seen)
                    if masks[other] is not None:
                        # Nothing seen changes nothing, whatever the biases of a gate say.
                        gated = gated.masked_fill(~masks[other].any(dim=1)[:, None, None], 0.0)
                    updated[name] = updated[name] + self.dropout(gated)
        for name in streams:
            if name in self.mlp:
                updated[name] = self.mlp[name](updated[name])
        return updated, attentions


class FusionOperator(nn.Module):
    """Bridges encoder depths to fusion layers, and runs the layers: Z_m^l = Layer(LN(Z_m^{l-1} + X_m^l))."""

    layer_class = None

    @staticmethod
    def independent(config):
        """Modalities whose streams depend on their own input alone: computed once for all rows that share it."""
        return []

    def __init__(self, config):
        super().__init__()
        self.shared = set(self.independent(config))
        width, eps = config.hidden_size, config.layer_norm_eps
        self.bridges = nn.ModuleDict(
            {
                name: nn.ModuleList([nn.LayerNorm(width, eps=eps) for _ in config.levels_of(name)])
                for name in config.modality_names
            }
        )
        self.layers = nn.ModuleList([self.layer_class(config) for _ in range(config.num_fusion_layers)])
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width, eps=eps) for name in config.modality_names})

    def bridge(self, index, tokens, levels):
        """Adds the encoder depth of fusion layer `index` to the streams, where there is one."""
        bridged = {}
        for name, depths in levels.items():
            if index >= len(depths):
                bridged[name] = tokens[name]
            else:
                stream = depths[index] if index == 0 else tokens[name] + depths[index]
                bridged[name] = self.bridges[name][index](stream)
        return bridged

    def forward(self, levels, masks, spread=None, output_attentions=False):
        spread = spread or {}
        shared = {name: function for name, function in spread.items() if name in self.shared}
        levels = {
            name: list(map(spread[name], depths)) if name in spread and name not in shared else depths
            for name, depths in levels.items()
        }
        tokens, attentions = {}, []
        for index, layer in enumerate(self.layers):
            tokens, weights = layer(self.bridge(index, tokens, levels), masks, output_attentions, shared)
            attentions.append(weights)
        tokens = {name: self.norms[name](stream) for name, stream in tokens.items()}
        return {n: shared[n](stream) if n in shared else stream for n, stream in tokens.items()}, tuple(attentions)


class CrossFusion(FusionOperator):
    """Adaptive cross-modal attention, every modality looking at every other in each layer."""

    layer_class = CrossFusionLayer

    @staticmethod
    def independent(config):
        return [name for name in config.modality_names if name not in (config.fusion_queries or config.modality_names)]


class ConcatFusion(FusionOperator):
    """Late fusion, the baseline of every claim: depths are added up, and modalities meet only in the head."""

    class layer_class(nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, tokens, masks, output_attentions=False, spread=None):
            return tokens, {}

    @staticmethod
    def independent(config):
        return config.modality_names


FUSIONS = {"cross": CrossFusion, "concat": ConcatFusion}


class TokenPooling(nn.Module):
    """Tokens of one modality to one vector: attention pooling, mean, or the first token.

    Attention pooling is the reduction of MCAN (Yu et al. 2019, arXiv 1906.10770): softmax over tokens of a small MLP.
    """

    def __init__(self, config):
        super().__init__()
        self.kind = config.pooling
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
        if self.kind == "first":
            # The first token that is real: with padding on the left that is not the first position.
            pooled = (
                tokens[:, 0]
                if mask is None
                else tokens[torch.arange(len(tokens), device=tokens.device), mask.int().argmax(dim=1)]
            )
        else:
            scores = self.score(tokens).float()
            if mask is not None:
                scores = scores.masked_fill(~mask[..., None], torch.finfo(scores.dtype).min)
            weights = scores.softmax(dim=1).to(tokens.dtype)
            pooled = (weights * tokens).sum(dim=1)
        return pooled if mask is None else pooled.masked_fill(~mask.any(dim=1)[:, None], 0.0)


class ModalityWeighting(nn.Module):
    """One weight per modality and row, over the modalities present.

    Adaptive: w = softmax over present m of (v . tanh(W pool_m) + b_m). Uniform: 1 / (number present).
    """

    def __init__(self, config):
        super().__init__()
        self.adaptive = config.modality_weighting == "adaptive" and len(config.modality_names) > 1
        if self.adaptive:
            self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
            self.score = nn.Linear(config.hidden_size, 1, bias=False)
            self.bias = nn.Embedding(len(config.modality_names), 1)
            # Equal weights at the start, whatever the pooled vectors are.
            self.score.initial_values = self.bias.initial_values = {"weight": 0.0}

    def forward(self, pooled, presence):
        """pooled (B,M,D), 0 for the absent, presence (B,M) bool. Returns (B,M), 0 for the absent, rows sum to 1."""
        if not self.adaptive:
            weights = presence.to(pooled.dtype)
            return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        scores = self.score(torch.tanh(self.hidden(pooled))).squeeze(-1) + self.bias.weight.squeeze(-1)
        scores = scores.float().masked_fill(~presence, torch.finfo(torch.float32).min)
        return scores.softmax(dim=1).masked_fill(~presence, 0.0).to(pooled.dtype)
