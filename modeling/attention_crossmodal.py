"""The attention of the family: one multi-head module for self and cross attention, and the blocks made of it.

Letters: B batch, Tq query tokens, Tk key tokens, D hidden_size, h heads, d head width.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .kernels_crossmodal import KERNELS


class Dropout(nn.Dropout):
    """`nn.Dropout`, several times as fast on a processor, where drawing one number after another is a fifth of a step of training.

    Four numbers of 16 bits come from each of the generator's: p counts in steps of 2^-16, and what is kept is scaled by what p is then.
    """

    def forward(self, tokens):
        if not self.training or not 0 < self.p < 1 or tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(tokens)
        gone, count = min(round(self.p * 2**16), 2**16 - 1), tokens.numel()
        draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = draws[:count].view(tokens.shape) >= gone - 2**15
        return tokens * kept.to(tokens.dtype).mul_(2**16 / (2**16 - gone))


class Attention(nn.Module):
    """Multi-head attention by a kernel of `KERNELS`, without projections."""

    def __init__(self, config, num_heads, kernel):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = config.hidden_size // num_heads
        if kernel is not None:
            self.kernel = KERNELS[kernel](config, num_heads)

    def split_heads(self, tokens):
        """(B,T,D) to (B,h,T,d)."""
        return tokens.view(*tokens.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def attend(self, query, key, value, mask=None, output_attentions=False, query_mask=None):
        """query (B,h,Tq,d), key and value (B,h,Tk,d); mask (B,Tk) and query_mask (B,Tq) bool, True for real tokens, or None.

        A row without a single real key gives 0. Returns (B,Tq,D), and the weights (B,h,Tq,Tk) when asked, else None.
        """
        has_key = None
        if mask is not None:
            # A softmax over no key is NaN in some backends: such rows look everywhere, and are zeroed below.
            has_key = mask.any(dim=1)
            mask = mask | ~has_key[:, None]
        output, weights = self.kernel(query, key, value, mask, query_mask, output_attentions)
        output = output.reshape(*output.shape[:2], -1)
        if has_key is not None:
            output = output.masked_fill(~has_key[:, None, None], 0.0)
            weights = weights.masked_fill(~has_key[:, None, None, None], 0.0) if output_attentions else None
        return output, weights


class MultiHeadAttention(Attention):
    """Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762) of queries on keys of any length.

    Keys and values are projected by `project_key_value`, apart from the queries, so that one projection serves every
    query stream that looks at them.
    """

    def __init__(self, config, as_query=True, as_key=True):
        """as_query, as_key: False leaves out the projections of a role that this stream never takes."""
        super().__init__(config, config.num_attention_heads, config.attention_kernel if as_query else None)
        width = config.hidden_size
        if as_query:
            self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        if as_key:
            self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)

    def project_key_value(self, tokens, spread=None):
        """tokens (B,Tk,D), or (U,Tk,D) of which `spread` makes (B,Tk,D), to keys and values, each (B,h,Tk,d)."""
        key, value = self.k_proj(tokens), self.v_proj(tokens)
        if spread is not None:
            key, value = spread(key), spread(value)
        return self.split_heads(key), self.split_heads(value)

    def forward(self, query, key_value, mask=None, output_attentions=False, query_mask=None, spread=None):
        """query (B,Tq,D), or (U,Tq,D) of which `spread` makes (B,Tq,D); key_value: what `project_key_value` returned; mask
        (B,Tk) bool, True for real keys, or None; query_mask (B,Tq) likewise.

        A row without a single real key gives 0. Returns (B,Tq,D), and the weights as `attend` does.
        """
        query = self.q_proj(query)
        query_states = self.split_heads(query if spread is None else spread(query))
        output, weights = self.attend(query_states, *key_value, mask, output_attentions, query_mask)
        output = self.o_proj(output)
        if mask is not None:
            output = output.masked_fill(~mask.any(dim=1)[:, None, None], 0.0)
        return output, weights


class MutualAttention(Attention):
    """softmax(X Y^T / sqrt(D)) Y, with nothing learned (MCA, Zhao and Gu, MICCAI 2024)."""

    def __init__(self, config):
        super().__init__(config, num_heads=1, kernel="exact")

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
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, tokens, mask=None, output_attentions=False):
        """tokens (B,T,D), mask (B,T). Returns the new tokens, and the weights (B,h,T,T) when asked, else None."""
        normed = self.norm(tokens)
        key_value = self.attention.project_key_value(normed)
        update, weights = self.attention(normed, key_value, mask, output_attentions, query_mask=mask)
        return tokens + self.dropout(update), weights


class FeedForwardBlock(nn.Module):
    """x + FFN(LN x), the second half of a pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, tokens):
        return tokens + self.dropout(self.feed_forward(self.norm(tokens)))
