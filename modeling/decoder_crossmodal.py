"""Text decoders over the fused tokens of all modalities, the rows of `DECODERS`: a transformer and a recurrent one.

Every decoder keeps one contract:

    forward(embeds, memory, memory_mask, mask, past, output_attentions) -> (hidden, self_attentions, cross_attentions)

    embeds        (B,T,D) of words, positions in them
    memory        (B,S,E) fused tokens, or None once `past` holds what the decoder made of them
    memory_mask   (B,S) bool, True for real tokens, or None if all are
    mask          (B,past+T) bool, True for real words, or None if all are
    past          EncoderDecoderCache, which is filled, or None
    hidden        (B,T,D)

Letters: B batch, T words, S tokens of memory, D width of the decoder, E width of the memory, h heads.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_crossmodal import Dropout, FeedForwardBlock
from .fusion_crossmodal import StaticGate
from .kernels_crossmodal import eager_attention_forward


class DecoderAttention(nn.Module):
    """Multi-head attention whose keys and values may have been made earlier."""

    # What is causal is said by the mask, or at the call.
    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states):
        """(B,T,D) to (B,h,T,d)."""
        return states.view(*states.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def attend(self, query, key, value, mask, causal, output_attentions):
        """query (B,h,T,d), key and value (B,h,S,d), mask (B,1,T|1,S) bool or None. Returns (B,T,D) and weights or None."""
        implementation = self.config._attn_implementation or "sdpa"
        if output_attentions:
            implementation = "eager"
        elif mask is not None and implementation not in ("eager", "sdpa"):
            # Flash kernels unpad, and flex kernels want their own masks: with a mask sdpa is the one that is right.
            implementation = "sdpa"
        if implementation == "eager" and causal:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
            causal = False
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, mask, scaling=self.scaling, dropout=dropout, is_causal=causal
        )
        output = self.out_proj(output.reshape(*output.shape[:2], -1))
        return output, weights if output_attentions else None


class CausalAttention(DecoderAttention):
    """Words look at themselves and at words before them; queries, keys and values in one product."""

    def __init__(self, config, layer):
        super().__init__(config)
        self.layer = layer
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden, mask, causal, past, output_attentions):
        query, key, value = map(self.split_heads, self.qkv_proj(hidden).chunk(3, dim=-1))
        if past is not None:
            key, value = past.self_attention_cache.update(key, value, self.layer)
        return self.attend(query, key, value, mask, causal, output_attentions)


class MemoryAttention(DecoderAttention):
    """Words look at the memory, whose keys and values are made once for all words."""

    def __init__(self, config, layer, memory_size):
        super().__init__(config)
        self.layer = layer
        self.query_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_value_proj = nn.Linear(memory_size, 2 * config.hidden_size)

    def forward(self, hidden, memory, mask, past, output_attentions):
        if past is not None and past.is_updated.get(self.layer):
            kept = past.cross_attention_cache.layers[self.layer]
            key, value = kept.keys, kept.values
        else:
            key, value = map(self.split_heads, self.key_value_proj(memory).chunk(2, dim=-1))
            if past is not None:
                key, value = past.cross_attention_cache.update(key, value, self.layer)
                past.is_updated[self.layer] = True
        query = self.split_heads(self.query_proj(hidden))
        return self.attend(query, key, value, mask, False, output_attentions)


class DecoderLayer(GradientCheckpointingLayer):
    """x + SelfAttn(LN x), x + g CrossAttn(LN x, memory), x + FFN(LN x); g = tanh(a), a = 0 at the start, if gated."""

    def __init__(self, config, layer, memory_size):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_norm = nn.LayerNorm(width, eps=eps)
        self.self_attention = CausalAttention(config, layer)
        self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention = MemoryAttention(config, layer, memory_size)
        self.gate = StaticGate(config) if config.gated_cross_attention else None
        self.mlp = FeedForwardBlock(config)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, hidden, memory, memory_mask, mask, causal, past=None, output_attentions=False):
        update, own = self.self_attention(self.self_norm(hidden), mask, causal, past, output_attentions)
        hidden = hidden + self.dropout(update)
        seen, cross = self.cross_attention(self.cross_norm(hidden), memory, memory_mask, past, output_attentions)
        if self.gate is not None:
            seen = self.gate(hidden, seen)
        return self.mlp(hidden + self.dropout(seen)), own, cross


class TransformerDecoder(nn.Module):
    """A causal transformer with learned positions, normalised before each block: GPT-2's, with cross-attention."""

    def __init__(self, config, memory_size):
        super().__init__()
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, layer, memory_size) for layer in range(config.num_hidden_layers)]
        )
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, embeds, memory, memory_mask, mask, past, output_attentions=False):
        start = past.get_seq_length() if past is not None else 0
        length = embeds.shape[1]
        static = past is not None and past.is_compileable
        places = self.embed_positions
        if mask is None and not static and start + length <= places.num_embeddings:
            own = None
            hidden = self.dropout(embeds + places.weight[start : start + length])
        else:
            own = torch.arange(length, device=embeds.device) + start
            positions = own[None] if mask is None else (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
            hidden = self.dropout(embeds + places(positions))
        # Without padding, and with all words there, "causal" says it; a single new word sees everything.
        causal = mask is None and not static and length > 1 and start == 0
        attention_mask = None
        if not causal and (mask is not None or static or length > 1):
            own = torch.arange(length, device=embeds.device) + start if own is None else own
            # Of a static cache the length is that of its room.
            total = past.get_max_length() if static else start + length
            attention_mask = (torch.arange(total, device=embeds.device) <= own[:, None])[None, None]
            if mask is not None:
                real = nn.functional.pad(mask, (0, total - mask.shape[1]))[:, None, None]
                # A word of padding sees itself: a softmax over nothing is no number.
                itself = torch.arange(total, device=embeds.device) == own[:, None]
                attention_mask = attention_mask & real | itself
        if memory_mask is not None:
            memory_mask = memory_mask[:, None, None]
        selves, crosses = (), ()
        for layer in self.layers:
            hidden, weights, seen = layer(hidden, memory, memory_mask, attention_mask, causal, past, output_attentions)
            selves, crosses = (*selves, weights), (*crosses, seen)
        return self.final_norm(hidden), selves, crosses


class RecurrentDecoder(nn.Module):
    """GRUs whose states look at the memory (Luong et al. 2015, arXiv 1508.04025): the recurrent variant of the research note.

    The first state is made of the mean of the memory. The states of all words are kept in the cache, where beam search
    reorders them; the last of them is what the next word goes on from.
    """

    def __init__(self, config, memory_size):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.initial = nn.ModuleList([nn.Linear(memory_size, width) for _ in range(config.num_hidden_layers)])
        self.cells = nn.ModuleList([nn.GRU(width, width, batch_first=True) for _ in range(config.num_hidden_layers)])
        self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention = MemoryAttention(config, 0, memory_size)
        self.mlp = FeedForwardBlock(config)
        self.final_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, embeds, memory, memory_mask, mask, past, output_attentions=False):
        # A number of its own: that of a static cache grows while the layers are filled.
        start = int(past.get_seq_length()) if past is not None else 0
        length = embeds.shape[1]
        hidden = self.dropout(embeds)
        padding = None if mask is None else (~mask[:, -length:]).sum(dim=1)
        if start == 0:
            weights = memory.new_ones(memory.shape[:2]) if memory_mask is None else memory_mask.to(memory.dtype)
            mean = (memory * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
            if padding is not None and padding.any():
                # Padding on the left would turn the state: words first, padding behind.
                places = torch.arange(length, device=embeds.device)
                forth = (places + padding[:, None]) % length
                back = (places - padding[:, None]) % length
                hidden = hidden.gather(1, forth[..., None].expand_as(hidden))
        for index, cell in enumerate(self.cells):
            if start == 0:
                state = torch.tanh(self.initial[index](mean))
            else:
                state = past.self_attention_cache.layers[index].keys[:, 0, start - 1]
            hidden, _ = cell(hidden, state[None].contiguous())
            kept = hidden
            if start == 0 and padding is not None and padding.any():
                kept = hidden.gather(1, back[..., None].expand_as(hidden))
            if past is not None:
                past.self_attention_cache.update(kept[:, None], kept[:, None, :, :0], index)
        hidden = self.dropout(kept)
        seen, weights = self.cross_attention(
            self.cross_norm(hidden),
            memory,
            None if memory_mask is None else memory_mask[:, None, None],
            past,
            output_attentions,
        )
        return self.final_norm(self.mlp(hidden + self.dropout(seen))), (), (weights,)


DECODERS = {"transformer": TransformerDecoder, "gru": RecurrentDecoder}


def _linear(state, source, target):
    """A `Conv1D` of GPT-2 (weights (in,out)) to a linear layer."""
    return {f"{target}.weight": state[f"{source}.weight"].T, f"{target}.bias": state[f"{source}.bias"]}


def _same(state, source, target):
    return {f"{target}.{key}": state[f"{source}.{key}"] for key in ("weight", "bias")}


def _from_gpt2(model):
    config = model.config
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "hidden_act": config.activation_function,
        "max_position_embeddings": config.n_positions,
        "layer_norm_eps": config.layer_norm_epsilon,
    }
    state = {key.removeprefix("transformer."): value for key, value in model.state_dict().items()}
    found = {"embed_tokens.weight": state["wte.weight"], "decoder.embed_positions.weight": state["wpe.weight"]}
    for index in range(config.n_layer):
        source, target = f"h.{index}", f"decoder.layers.{index}"
        found |= _same(state, f"{source}.ln_1", f"{target}.self_norm")
        found |= _linear(state, f"{source}.attn.c_attn", f"{target}.self_attention.qkv_proj")
        found |= _linear(state, f"{source}.attn.c_proj", f"{target}.self_attention.out_proj")
        found |= _same(state, f"{source}.ln_2", f"{target}.mlp.norm")
        found |= _linear(state, f"{source}.mlp.c_fc", f"{target}.mlp.feed_forward.fc1")
        found |= _linear(state, f"{source}.mlp.c_proj", f"{target}.mlp.feed_forward.fc2")
    return fields, found | _same(state, "ln_f", "decoder.final_norm")


# Pretrained causal models whose self-attention and embeddings a decoder can start from, by model type: a function from the
# model to fields of TextDecoderConfig and weights of the captioning head.
CAUSAL_MODELS = {"gpt2": _from_gpt2}
