"""The attention of the family: one multi-head module for self and cross attention, on transformers' backends.

Letters: B batch, Tq query tokens, Tk key tokens, D hidden_size, h heads, d head width.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out. query (B,h,Tq,d), key and value (B,h,Tk,d), attention_mask (B,1,1|Tq,Tk) bool or None.

    Returns (B,Tq,h,d) and the weights (B,h,Tq,Tk) before dropout, which sum to 1 over keys.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    # Softmax in float32: bfloat16 rounds small weights of long sequences to zero.
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Scaled dot-product attention of a config's backend, without parameters of its own."""

    # Without this, transformers' sdpa path takes a mask of None for causal and cuts the keys to the query length.
    is_causal = False

    def __init__(self, config, num_heads):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = config.hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout

    def split_heads(self, tokens):
        """(B,T,D) to (B,h,T,d)."""
        return tokens.view(*tokens.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def attend(self, query, key, value, mask=None, output_attentions=False):
        """query (B,h,Tq,d), key and value (B,h,Tk,d); mask (B,Tk) bool, True for real keys, or None.

        A row without a single real key gives 0. Returns (B,Tq,D), and the weights (B,h,Tq,Tk) when asked, under any
        backend (they are then computed by the eager form), else None.
        """
        has_key = None
        if mask is not None:
            # A softmax over no key is NaN in some backends: such rows look everywhere, and are zeroed below.
            has_key = mask.any(dim=1)
            mask = mask | ~has_key[:, None]
        attend, attention_mask = self._backend(query, key, mask, output_attentions)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout)
        output = output.reshape(*output.shape[:2], -1)
        weights = weights if output_attentions else None
        if has_key is not None:
            output = output.masked_fill(~has_key[:, None, None], 0.0)
            weights = weights.masked_fill(~has_key[:, None, None, None], 0.0) if output_attentions else None
        return output, weights

    def _backend(self, query, key, mask, output_attentions):
        """The attention function of the config's backend, and the mask (B,Tk) in the form that it takes."""
        implementation = self.config._attn_implementation or "sdpa"
        if output_attentions:
            implementation = "eager"
        # Flash kernels of transformers unpad keys as if they were a tail of the queries: wrong for cross attention.
        elif mask is not None and "flash" in implementation:
            implementation = "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if mask is None:
            return attend, None
        if implementation == "flex_attention":
            query_states, key_states = (states.transpose(1, 2).flatten(2) for states in (query, key))
            return attend, create_bidirectional_mask(
                config=self.config, inputs_embeds=query_states, attention_mask=mask, encoder_hidden_states=key_states
            )
        return attend, mask[:, None, None, :]


class MultiHeadAttention(Attention):
    """Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762) of queries on keys of any length.

    Keys and values are projected by `project_key_value`, apart from the queries, so that one projection serves every
    query stream that looks at them.
    """

    def __init__(self, config, as_query=True, as_key=True):
        """as_query, as_key: False leaves out the projections of a role that this stream never takes."""
        super().__init__(config, config.num_attention_heads)
        width = config.hidden_size
        if as_query:
            self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        if as_key:
            self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)

    def project_key_value(self, tokens):
        """tokens (B,Tk,D) to keys and values, each (B,h,Tk,d)."""
        return self.split_heads(self.k_proj(tokens)), self.split_heads(self.v_proj(tokens))

    def forward(self, query, key_value, mask=None, output_attentions=False):
        """query (B,Tq,D); key_value: what `project_key_value` returned; mask (B,Tk) bool, True for real keys, or None.

        A row without a single real key gives 0. Returns (B,Tq,D), and the weights as `attend` does.
        """
        query_states = self.split_heads(self.q_proj(query))
        output, weights = self.attend(query_states, *key_value, mask, output_attentions)
        output = self.o_proj(output)
        if mask is not None:
            output = output.masked_fill(~mask.any(dim=1)[:, None, None], 0.0)
        return output, weights


class MutualAttention(Attention):
    """softmax(X Y^T / sqrt(D)) Y, with nothing learned (MCA, Zhao and Gu, MICCAI 2024)."""

    def __init__(self, config):
        super().__init__(config, num_heads=1)

    def forward(self, query, other, mask=None, output_attentions=False):
        """query (B,Tq,D), other (B,Tk,D), mask (B,Tk) bool or None. Returns (B,Tq,D) and the weights (B,1,Tq,Tk) or None."""
        query, other = self.split_heads(query), self.split_heads(other)
        return self.attend(query, other, other, mask, output_attentions)


class FeedForward(nn.Module):
    """Two layers with an activation between: D to intermediate_size to D."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, tokens):
        return self.fc2(self.activation(self.fc1(tokens)))


class SelfAttentionBlock(nn.Module):
    """x + SelfAttn(LN x), the first half of a pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = MultiHeadAttention(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, tokens, mask=None, output_attentions=False):
        """tokens (B,T,D), mask (B,T). Returns the new tokens, and the weights (B,h,T,T) when asked, else None."""
        normed = self.norm(tokens)
        update, weights = self.attention(normed, self.attention.project_key_value(normed), mask, output_attentions)
        return tokens + self.dropout(update), weights


class FeedForwardBlock(nn.Module):
    """x + FFN(LN x), the second half of a pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, tokens):
        return tokens + self.dropout(self.feed_forward(self.norm(tokens)))
