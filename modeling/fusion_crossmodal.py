"""Fusion operators and gates, the mid level of fusion: tokens of every modality in, tokens that know of each other out.

Every operator is a row of `FUSIONS` and keeps one contract:

    forward(levels, masks, shared, output_attentions) -> (tokens, attentions, still_shared)

    levels        {modality: [tokens (U_m,T_m,D) for fusion layer 0, 1, ...]}, at width D with type and position in them
    masks         {modality: (B,T_m) bool, True for real tokens, or None if all are}; an absent row has no True
    shared        {modality: EncodedModality} of which several rows share an input: its `mask` (U_m,T_m) or None, and its
                  `spread` from (U_m,...) to (B,...)
    tokens        {modality: (B,T_m,D)}, or (U_m,T_m,D) of those in `still_shared`
    still_shared  the part of `shared` whose modalities met no other: what rows share of them is still shared
    attentions    per layer {"m<-n": weights (B,h,T_m,T_n)}: how tokens of m attended to tokens of n

Letters: B batch, U_m distinct inputs of modality m, T_m tokens of it, D hidden_size, M modalities, h heads.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_crossmodal import Dropout, FeedForwardBlock, MultiHeadAttention, MutualAttention, SelfAttentionBlock


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

    def forward(self, stream, update, spread=None):
        """stream (B,T,D), or (U,T,D) of which `spread` makes (B,T,D), and update (B,T,D). Returns the gated update (B,T,D)."""
        stream = self.stream_proj(stream)
        if spread is not None:
            stream = spread(stream)
        return update + self.out_proj(stream * self.update_proj(update))


class StaticGate(nn.Module):
    """g = tanh(a), a = 0 at the start, so that the stream begins as if alone (Flamingo, arXiv 2204.14198)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, stream, update, spread=None):
        return torch.tanh(self.weight) * update


class OpenGate(nn.Module):
    """g = 1."""

    def __init__(self, config):
        super().__init__()

    def forward(self, stream, update, spread=None):
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

    def __init__(self, config, queries=None):
        """queries: modalities that this layer updates; None: those of the config."""
        super().__init__()
        names, queries = config.modality_names, queries or config.fusion_queries or config.modality_names
        # Weights of a role that a modality never takes would never get a gradient.
        looking = queries if len(names) > 1 and config.gate != "closed" else []
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
        self.dropout = Dropout(config.hidden_dropout)
        self.looked_at = looked_at

    def meets(self, name):
        """Whether this layer lets a modality look at another."""
        return name in self.gate

    def forward(self, tokens, masks, output_attentions=False, shared=None):
        """tokens {m: (B,T_m,D)}, or (U_m,T_m,D) for m in shared; masks {m: (B,T_m) or None}.

        What rows share is computed once, up to the point where it meets what they do not share. Returns the new tokens, in
        rows of the batch where a modality looked at another, and {"m<-n": weights}.
        """
        attentions, streams, shared = {}, dict(tokens), shared or {}
        spread = {name: item.spread for name, item in shared.items()}
        for name in tokens:
            if name in self.self_attn:
                mask = shared[name].mask if name in shared else masks[name]
                streams[name], weights = self.self_attn[name](tokens[name], mask, output_attentions)
                if output_attentions:
                    weights = spread[name](weights) if name in shared else weights
                    attentions[f"{name}<-{name}"] = weights
        updated = dict(streams)
        if len(streams) > 1:
            normed = {
                name: self.cross_norm[name](stream) for name, stream in streams.items() if name in self.cross_norm
            }
            # Keys and values of an input that many rows look at are projected once.
            key_values = {
                name: self.cross_attn[name].project_key_value(normed[name], spread.get(name))
                for name in streams
                if name in self.looked_at
            }
            for name in streams:
                if name in shared and self.meets(name):
                    updated[name] = spread[name](updated[name])
                for other, key_value in key_values.items():
                    if other == name or not self.meets(name):
                        continue
                    seen, attentions[f"{name}<-{other}"] = self.cross_attn[name](
                        normed[name], key_value, masks[other], output_attentions, masks[name], spread.get(name)
                    )
                    gated = self.gate[name](normed[name], seen, spread.get(name))
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
    # Whether `gate="closed"` takes the cross-attention out of it.
    closes = False

    def __init__(self, config):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.bridges = nn.ModuleDict(
            {
                name: nn.ModuleList([nn.LayerNorm(width, eps=eps) for _ in config.levels_of(name)])
                for name in config.modality_names
            }
        )
        self.layers = nn.ModuleList(self.build_layers(config))
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width, eps=eps) for name in config.modality_names})

    def build_layers(self, config):
        return [self.layer_class(config) for _ in range(config.num_fusion_layers)]

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

    def forward(self, levels, masks, shared=None, output_attentions=False):
        shared = shared or {}
        # A modality by itself depends on its own input alone, whatever the operator.
        alone = len(levels) == 1 and all(mask is None for mask in masks.values())
        tokens, attentions, still_shared = self.run_layers(levels, masks, output_attentions, {} if alone else shared)
        still_shared = shared if alone else still_shared
        return {name: self.norms[name](stream) for name, stream in tokens.items()}, tuple(attentions), still_shared

    def run_layers(self, levels, masks, output_attentions, shared):
        """As `forward`, without its last norms. Here for layers in which every modality meets every other at once."""
        levels = _spread(levels, shared, shared)
        tokens, attentions = {}, []
        for index, layer in enumerate(self.layers):
            tokens, weights = layer(self.bridge(index, tokens, levels), masks, output_attentions)
            attentions.append(weights)
        return tokens, attentions, {}


def _spread(levels, shared, names):
    """levels, with those of the modalities `names` in rows of the batch."""
    return {
        name: list(map(shared[name].spread, depths)) if name in names else depths for name, depths in levels.items()
    }


class CrossFusion(FusionOperator):
    """Adaptive cross-modal attention, every modality looking at every other in each layer."""

    layer_class = CrossFusionLayer
    closes = True

    def run_layers(self, levels, masks, output_attentions, shared):
        """What rows share stays shared until the first layer in which it looks at another modality."""
        tokens, attentions = {}, []
        for index, layer in enumerate(self.layers):
            tokens, weights = layer(self.bridge(index, tokens, levels), masks, output_attentions, shared)
            attentions.append(weights)
            met = [name for name in shared if layer.meets(name) and len(levels) > 1]
            levels = _spread(levels, shared, met)
            shared = {name: item for name, item in shared.items() if name not in met}
        return tokens, attentions, shared


class ConcatFusion(FusionOperator):
    """Late fusion, the baseline of every claim: depths are added up, and modalities meet only in the head."""

    class layer_class(nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, tokens, masks, output_attentions=False):
            return tokens, {}

    def run_layers(self, levels, masks, output_attentions, shared):
        tokens, attentions, _ = super().run_layers(levels, masks, output_attentions, {})
        return tokens, attentions, shared


class InterlacedFusion(CrossFusion):
    """Roles alternate: each layer has one modality that looks, and the next layer another (MIT, arXiv 2310.12817).

    `first_query` looks in the first layer; the others follow, by name, and then it begins anew.
    """

    def build_layers(self, config):
        # By name: the order in which a config lists its modalities must not change a model.
        names = sorted(config.modality_names)
        first = names.index(config.first_query or config.modality_names[0])
        turns = [names[(first + index) % len(names)] for index in range(config.num_fusion_layers)]
        return [CrossFusionLayer(config, queries=[name]) for name in turns]


class JointFusionLayer(GradientCheckpointingLayer):
    """A transformer layer over the concatenation of all modalities: attention within and across at once."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = SelfAttentionBlock(config)
        self.mlp = FeedForwardBlock(config)

    def forward(self, tokens, masks, output_attentions=False):
        """As `CrossFusionLayer`. Weights of "m<-n" sum to 1 over all n together."""
        whole, weights = self.self_attn(
            torch.cat(list(tokens.values()), dim=1), _joined(tokens, masks), output_attentions
        )
        lengths = [stream.shape[1] for stream in tokens.values()]
        attentions = {}
        if output_attentions:
            for name, rows in zip(tokens, weights.split(lengths, dim=2), strict=True):
                blocks = zip(tokens, rows.split(lengths, dim=3), strict=True)
                attentions |= {f"{name}<-{other}": block for other, block in blocks}
        return dict(zip(tokens, self.mlp(whole).split(lengths, dim=1), strict=True)), attentions


class JointFusion(FusionOperator):
    """One transformer over all tokens (MMCA, Wei et al. CVPR 2020; there with regions and words)."""

    layer_class = JointFusionLayer


class MutualFusionLayer(nn.Module):
    """A_m = sum over present n != m of softmax(Z_m Z_n^T / sqrt(D)) Z_n, nothing learned, nothing kept of Z_m itself.

    With two modalities A_1 + A_2 is the fusion of MCA. A stream that has nobody to look at stays as it is.
    """

    def __init__(self, config):
        super().__init__()
        self.attention = MutualAttention(config)

    def forward(self, tokens, masks, output_attentions=False):
        """As `CrossFusionLayer`, with a single head."""
        updated, attentions = {}, {}
        for name, stream in tokens.items():
            found = torch.zeros(stream.shape[0], dtype=torch.bool, device=stream.device)
            update = torch.zeros_like(stream)
            for other in tokens:
                if other == name:
                    continue
                seen, attentions[f"{name}<-{other}"] = self.attention(
                    stream, tokens[other], masks[other], output_attentions
                )
                update = update + seen
                found = found | (True if masks[other] is None else masks[other].any(dim=1))
            updated[name] = torch.where(found[:, None, None], update, stream)
        return updated, attentions


class MutualFusion(FusionOperator):
    """Mutual cross-attention, two-way and without parameters (MCA, Zhao and Gu, MICCAI 2024)."""

    layer_class = MutualFusionLayer


class ExchangeLayer(GradientCheckpointingLayer):
    """Each modality has a transformer layer over its tokens and the latents; latents are then averaged over modalities.

    [Z_m; b_m] = Layer_m([Z_m; b]),  b = mean over present m of b_m   (MBT, arXiv 2107.00135)
    """

    def __init__(self, config):
        super().__init__()
        self.self_attn = nn.ModuleDict({name: SelfAttentionBlock(config) for name in config.modality_names})
        self.mlp = nn.ModuleDict({name: FeedForwardBlock(config) for name in config.modality_names})

    def forward(self, tokens, latents, masks, output_attentions=False):
        """tokens {m: (B,T_m,D)}, latents (B,L,D), masks {m: (B,T_m) or None}. Returns new tokens, latents, weights."""
        updated, attentions, total, count = {}, {}, 0, 0
        for name, stream in tokens.items():
            length, mask = stream.shape[1], masks[name]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(latents.shape[:2])], dim=1)
            whole, weights = self.self_attn[name](torch.cat([stream, latents], dim=1), mask, output_attentions)
            whole = self.mlp[name](whole)
            updated[name] = whole[:, :length]
            present = whole.new_ones(whole.shape[0]) if mask is None else masks[name].any(dim=1).to(whole.dtype)
            total = total + whole[:, length:] * present[:, None, None]
            count = count + present
            if output_attentions:
                attentions[f"{name}<-{name}"] = weights[:, :, :length, :length]
                attentions[f"{name}<-latents"] = weights[:, :, :length, length:]
                attentions[f"latents<-{name}"] = weights[:, :, length:, :length]
        return updated, total / count.clamp(min=1)[:, None, None], attentions


class ResampleLayer(GradientCheckpointingLayer):
    """Latents look at all tokens and at each other, and every token looks at the latents: linear in the tokens.

    b = FFN(b + CrossAttn(b, [Z_1; ...; Z_M; b]))   (the resampler of Flamingo, arXiv 2204.14198, after Perceiver)
    Z_m = FFN(Z_m + G_m(CrossAttn(Z_m, b)))         (the decoder of Perceiver IO, arXiv 2107.14795)
    """

    def __init__(self, config):
        super().__init__()
        width, eps, names = config.hidden_size, config.layer_norm_eps, config.modality_names
        self.latent_norm = nn.LayerNorm(width, eps=eps)
        self.token_norm = nn.ModuleDict({name: nn.LayerNorm(width, eps=eps) for name in names})
        self.collect = MultiHeadAttention(config)
        self.latent_mlp = FeedForwardBlock(config)
        self.read_norm = nn.LayerNorm(width, eps=eps)
        self.latent_key = MultiHeadAttention(config, as_query=False)
        self.read = nn.ModuleDict({name: MultiHeadAttention(config, as_key=False) for name in names})
        self.gate = nn.ModuleDict({name: GATE_CLASSES[config.gate](config) for name in names})
        self.mlp = nn.ModuleDict({name: FeedForwardBlock(config) for name in names})
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, tokens, latents, masks, output_attentions=False):
        """As `ExchangeLayer`."""
        normed = {name: self.token_norm[name](stream) for name, stream in tokens.items()}
        queries = self.latent_norm(latents)
        sources = {**normed, "latents": queries}
        key_value = self.collect.project_key_value(torch.cat(list(sources.values()), dim=1))
        mask = _joined(sources, {**masks, "latents": None})
        update, weights = self.collect(queries, key_value, mask, output_attentions)
        latents = self.latent_mlp(latents + self.dropout(update))
        attentions = {}
        if output_attentions:
            blocks = weights.split([source.shape[1] for source in sources.values()], dim=3)
            attentions |= {f"latents<-{name}": block for name, block in zip(sources, blocks, strict=True)}
        key_value = self.latent_key.project_key_value(self.read_norm(latents))
        updated = {}
        for name, stream in tokens.items():
            seen, attentions[f"{name}<-latents"] = self.read[name](normed[name], key_value, None, output_attentions)
            updated[name] = self.mlp[name](stream + self.dropout(self.gate[name](normed[name], seen)))
        return updated, latents, attentions


BOTTLENECK_CLASSES = {"exchange": ExchangeLayer, "resample": ResampleLayer}


class BottleneckFusion(FusionOperator):
    """Modalities meet only in a few shared latents, in the manner of MBT or of Perceiver (`bottleneck`)."""

    def __init__(self, config):
        super().__init__(config)
        self.latents = nn.Embedding(config.num_latents, config.hidden_size)

    def build_layers(self, config):
        return [BOTTLENECK_CLASSES[config.bottleneck](config) for _ in range(config.num_fusion_layers)]

    def run_layers(self, levels, masks, output_attentions, shared):
        levels = _spread(levels, shared, shared)
        tokens, attentions = {}, []
        rows = next(iter(levels.values()))[0].shape[0]
        latents = self.latents.weight.expand(rows, -1, -1)
        for index, layer in enumerate(self.layers):
            bridged = self.bridge(index, tokens, levels)
            tokens, latents, weights = layer(bridged, latents, masks, output_attentions)
            attentions.append(weights)
        return tokens, attentions, {}


def _joined(tokens, masks):
    """Mask (B, sum of T) of the concatenation of streams, or None if every token is real."""
    if all(masks[name] is None for name in tokens):
        return None
    whole = [
        stream.new_ones(stream.shape[:2], dtype=torch.bool) if masks[name] is None else masks[name]
        for name, stream in tokens.items()
    ]
    return torch.cat(whole, dim=1)


FUSIONS = {
    "cross": CrossFusion,
    "joint": JointFusion,
    "interlaced": InterlacedFusion,
    "mutual": MutualFusion,
    "bottleneck": BottleneckFusion,
    "concat": ConcatFusion,
}
