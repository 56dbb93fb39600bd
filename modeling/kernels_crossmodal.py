"""Kernels of attention, the rows of `KERNELS`: how queries, keys and values become an output. `attention_kernel` chooses.

Every kernel keeps one contract:

    forward(query, key, value, mask, query_mask, output_attentions) -> (output, weights)

    query        (B,h,Tq,d), key and value (B,h,Tk,d)
    mask         (B,Tk) bool, True for real keys, at least one in each row; or None if all are real
    query_mask   (B,Tq) bool or None; what is computed for a query that is padding does not matter
    output       (B,Tq,h,d)
    weights      (B,h,Tq,Tk) when asked, under any kernel, else None; to ask costs what exact attention costs

Letters: B batch, h heads, d head width, Tq queries, Tk keys.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
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


# Tokens that a kernel for long inputs takes at a time.
_CHUNK = 4096


class ExactKernel(nn.Module):
    """softmax(Q K^T / sqrt(d)) V, by the backend that the config names (transformers' attention interface)."""

    # Without this, transformers' sdpa path takes a mask of None for causal and cuts the keys to the query length.
    is_causal = False

    def __init__(self, config, num_heads):
        super().__init__()
        self.config = config
        self.scaling = (config.hidden_size // num_heads) ** -0.5
        self.attention_dropout = config.attention_dropout

    @property
    def dropout(self):
        return self.attention_dropout if self.training else 0.0

    def forward(self, query, key, value, mask=None, query_mask=None, output_attentions=False):
        attend, attention_mask = self._backend(query, key, mask, output_attentions)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=self.dropout)
        return output, weights if output_attentions else None

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


class WindowKernel(ExactKernel):
    """Exact attention of each query on the keys near its own place, and on the first few keys: O(Tq w) time and memory.

    Query i of n looks at the keys j of m with |j - c(i)| <= w, c(i) = floor((i + 1/2) m / n): both lengths cover the same
    stretch, such as seconds of sound and of video (for m = n this is the sliding window of Longformer, arXiv 2004.05150).
    n and m count up to the last real token of a row, so that padding at the end moves nobody. `attention_window` is w,
    `attention_global_tokens` how many keys at the front everybody sees. With masks the sizes of blocks depend on the data:
    torch.compile breaks the graph there, and an exported graph computes all scores and masks them.
    """

    def __init__(self, config, num_heads):
        super().__init__(config, num_heads)
        self.window = config.attention_window
        self.global_tokens = config.attention_global_tokens

    def forward(self, query, key, value, mask=None, query_mask=None, output_attentions=False):
        num_queries, num_keys = query.shape[2], key.shape[2]
        query_ends, key_ends = _ends(query_mask, query), _ends(mask, key)
        # Padding at the end stands where the last real query stands, so that it asks for no keys of its own.
        places = torch.arange(num_queries, device=query.device).minimum(query_ends[:, None] - 1)
        # (1 or B, Tq); whole numbers, so that no rounding depends on the length.
        centres = ((2 * places + 1) * key_ends[:, None]).div(2 * query_ends[:, None], rounding_mode="floor")
        # A graph cannot let sizes of blocks depend on the data: there the window is a mask.
        as_mask = output_attentions or torch.compiler.is_exporting()
        if not as_mask:
            whole = mask is None and query_mask is None
            size, span = self._block(centres, num_queries, num_keys, query.shape[3], whole)
        if as_mask or span >= num_keys:
            allowed = self._allowed(torch.arange(num_keys, device=key.device), centres[..., None], key_ends)
            if mask is not None:
                allowed = allowed & mask[:, None]
            return self._attend(query, key, value, allowed[:, None], output_attentions)
        return self._in_blocks(query, key, value, mask, centres, key_ends, size, span), None

    def _block(self, centres, num_queries, num_keys, width, whole):
        """Queries of a block, and the keys that any of them may see: the pair that costs least.

        whole: no row has padding; what a block spans then follows from the lengths alone, and no device has to be asked.
        """
        sizes = [2**power for power in range(10) if 2**power < 2 * num_queries]
        if whole:
            spreads = [math.ceil((size - 1) * num_keys / num_queries) for size in sizes]
        else:
            ends = [
                centres[:, [min(start + size, num_queries) - 1 for start in range(0, num_queries, size)]]
                for size in sizes
            ]
            spreads = torch.stack([(end - centres[:, ::size]).max() for size, end in zip(sizes, ends, strict=True)])
            spreads = spreads.tolist()
        spans = [spread + 1 + 2 * self.window for spread in spreads]
        costs = [-(-num_queries // size) * span * (size + width) for size, span in zip(sizes, spans, strict=True)]
        best = costs.index(min(costs))
        return min(sizes[best], num_queries), spans[best]

    def _allowed(self, keys, centres, ends):
        """Which of `keys` (positions) a query at `centres` sees; both broadcast, ends (1 or B,)."""
        ends = ends.view(-1, *[1] * (centres.dim() - 1))
        near = ((keys - centres).abs() <= self.window) | ((keys >= 0) & (keys < self.global_tokens))
        return near & (keys >= 0) & (keys < ends)

    def _attend(self, query, key, value, allowed, output_attentions=False):
        """allowed (B or 1,1,Tq,Tk). A query without a key gives 0."""
        has_key = allowed.any(dim=-1)
        allowed = allowed | ~has_key[..., None]
        attend = eager_attention_forward if output_attentions else ALL_ATTENTION_FUNCTIONS["sdpa"]
        allowed = allowed.expand(query.shape[0], *allowed.shape[1:])
        output, weights = attend(self, query, key, value, allowed, scaling=self.scaling, dropout=self.dropout)
        output = output.masked_fill(~has_key.transpose(1, 2)[..., None], 0.0)
        return output, weights.masked_fill(~has_key[..., None], 0.0) if output_attentions else None

    def _in_blocks(self, query, key, value, mask, centres, ends, size, span):
        rows, heads, num_queries, width = query.shape
        blocks = -(-num_queries // size)
        padding = blocks * size - num_queries
        query = nn.functional.pad(query, (0, 0, 0, padding)).view(rows, heads, blocks, size, width)
        centres = torch.cat([centres, centres[:, -1:].expand(-1, padding)], dim=1).view(-1, blocks, size)
        # Some blocks at a time: what they gather stays in the cache of the processor.
        together = max(1, _CHUNK // span)
        outputs = [
            self._some_blocks(queries, key, value, mask, places, ends, span)
            for queries, places in zip(query.split(together, dim=2), centres.split(together, dim=1), strict=True)
        ]
        return torch.cat(outputs, dim=1)[:, :num_queries]

    def _some_blocks(self, query, key, value, mask, centres, ends, span):
        """query (B,h,blocks,size,d), centres (1 or B,blocks,size). Returns (B,blocks*size,h,d)."""
        rows, heads, blocks, size, width = query.shape
        num_keys, device = key.shape[2], key.device
        keys = centres[..., :1] - self.window + torch.arange(span, device=device)  # (1 or B, blocks, span)
        # Those at the front that everybody sees come apart, and are not counted twice.
        front = torch.arange(min(self.global_tokens, num_keys), device=device)
        inside = keys.clamp(0, num_keys - 1)
        allowed = self._allowed(keys[:, :, None], centres[..., None], ends) & (keys >= self.global_tokens)[:, :, None]
        if mask is not None:
            real = mask.gather(1, inside.expand(rows, -1, -1).flatten(1)).view(rows, blocks, 1, span)
            allowed = allowed & real
        if len(front):
            seen = (front < ends[:, None]) if mask is None else mask[:, : len(front)]
            seen = seen[:, None, None].expand(len(allowed), blocks, size, len(front))
            allowed = torch.cat([seen, allowed], dim=-1)
        states = []
        for state in (key, value):
            if len(inside) == 1:
                near = state.index_select(2, inside.flatten())
            else:
                near = state.gather(2, inside.view(rows, 1, -1, 1).expand(-1, heads, -1, width))
            near = near.view(rows, heads, blocks, span, width)
            if len(front):
                shared = state[:, :, None, : len(front)].expand(-1, -1, blocks, -1, -1)
                near = torch.cat([shared, near], dim=3)
            states.append(near.transpose(1, 2).flatten(0, 1))
        allowed = allowed.expand(rows, *allowed.shape[1:]).flatten(0, 1)[:, None]
        output, _ = self._attend(query.transpose(1, 2).flatten(0, 1), *states, allowed)
        return output.view(rows, blocks * size, heads, width)


def _ends(mask, tokens):
    """Number of positions up to the last real one: (B,), at least 1; or (1,) where all are real."""
    length = tokens.shape[2]
    if mask is None:
        return torch.tensor([length], device=tokens.device)
    places = torch.arange(1, length + 1, device=mask.device)
    return (mask * places).amax(dim=1).clamp(min=1)


def _parts(states):
    """states (B,h,T,d), a few thousand tokens at a time: their features stay in the cache of the processor."""
    # How many parts there are would fix the length of an exported graph.
    return [states] if torch.compiler.is_exporting() else states.split(_CHUNK, dim=2)


class LinearKernel(nn.Module):
    """Attention by positive random features (FAVOR+, Choromanski et al. 2021, arXiv 2009.14794): O((Tq + Tk) m d).

        out_i = f(q_i)^T (sum_j f(k_j) v_j^T) / f(q_i)^T sum_j f(k_j),   f(x) = exp(W x - |x|^2 / 2) / sqrt(m)

    approximates softmax(t cos(Q, K)) V: queries and keys are brought to the length sqrt(t), with a learned temperature
    0 < t < 2 per head, because the error grows with exp(|q + k|^2) and falls only with 1 / sqrt(m). The rows of W are
    orthogonal in blocks of d; training draws them anew each time, evaluation keeps those of the checkpoint.
    """

    max_temperature = 2.0

    def __init__(self, config, num_heads):
        super().__init__()
        width = config.hidden_size // num_heads
        count = config.num_random_features or max(1, round(width * math.log(width)))
        self.temperature = nn.Parameter(torch.zeros(num_heads))
        self.register_buffer("features", torch.empty(count, width))

    @torch.no_grad()
    def draw_features(self):
        """W (m,d): rows of standard normal vectors, each d of them made orthogonal, their lengths kept."""
        count, width = self.features.shape
        device = self.features.device
        blocks = torch.randn(-(-count // width), width, width, device=device, dtype=torch.float32)
        rotations, triangles = torch.linalg.qr(blocks)
        # The signs that LAPACK chooses lean to one side; with R's diagonal made positive all directions are alike.
        rotations = rotations * triangles.diagonal(dim1=1, dim2=2).sign()[:, None]
        rows = rotations.transpose(1, 2).flatten(0, 1)[:count]
        return rows * torch.randn(count, width, device=device, dtype=torch.float32).norm(dim=1, keepdim=True)

    def forward(self, query, key, value, mask=None, query_mask=None, output_attentions=False):
        # float32, whatever autocast says: features are exponentials.
        with torch.autocast(query.device.type, enabled=False):
            features = self.draw_features() if self.training else self.features.float()
            # The sum over keys is the last column.
            content = nn.functional.pad(value.float(), (0, 1), value=1.0)
            if mask is not None:
                content = content * mask[:, None, :, None]
            summary = sum(
                self._key_features(keys, features).transpose(2, 3) @ part
                for keys, part in zip(_parts(key), _parts(content), strict=True)
            )
            output = torch.cat([self._query_features(queries, features) @ summary for queries in _parts(query)], dim=2)
            output, total = output[..., :-1], output[..., -1:]
            weights = None
            if output_attentions:
                weights = self._query_features(query, features) @ self._key_features(key, features).transpose(2, 3)
                weights = weights / total if mask is None else weights * mask[:, None, None] / total
                weights = weights.to(value.dtype)
        return (output / total).to(value.dtype).transpose(1, 2).contiguous(), weights

    def _projected(self, states, features):
        """W x of queries or keys at their length; |x|^2 / 2 is the same for all and cancels."""
        length = (self.max_temperature * self.temperature.float().sigmoid()).sqrt()[None, :, None, None]
        return (length * nn.functional.normalize(states.float(), dim=-1)) @ features.T

    def _key_features(self, key, features):
        # No exponent is above sqrt(2) |w|: nothing overflows.
        return self._projected(key, features).exp()

    def _query_features(self, query, features):
        projected = self._projected(query, features)
        return (projected - projected.amax(dim=-1, keepdim=True).detach()).exp()


class LatentsKernel(ExactKernel):
    """Learned latents look at the keys, and queries at what they found: O((Tq + Tk) L d).

        K' = A K, V' = A V,  A = softmax(I K^T / sqrt(d));   out = softmax(Q K'^T / sqrt(d)) V'

    Induced attention (Set Transformer, Lee et al. 2019, arXiv 1810.00825) inside each head. `num_latents` is L.
    """

    def __init__(self, config, num_heads):
        super().__init__(config, num_heads)
        self.latents = nn.Parameter(torch.empty(num_heads, config.num_latents, config.hidden_size // num_heads))

    def forward(self, query, key, value, mask=None, query_mask=None, output_attentions=False):
        latents = self.latents.to(key.dtype).expand(key.shape[0], -1, -1, -1)
        allowed = None if mask is None else mask[:, None, None, :]
        keys, collecting = eager_attention_forward(self, latents, key, key, allowed, self.scaling)
        values = collecting @ value
        output, reading = eager_attention_forward(
            self, query, keys.transpose(1, 2), values, None, self.scaling, self.dropout
        )
        return output, reading @ collecting if output_attentions else None


KERNELS = {"exact": ExactKernel, "window": WindowKernel, "linear": LinearKernel, "latents": LatentsKernel}


def initialise_kernel(module):
    """First values of what a kernel owns; called by the `_init_weights` of models."""
    if isinstance(module, LinearKernel):
        init.zeros_(module.temperature)
        init.copy_(module.features, module.draw_features())
    elif isinstance(module, LatentsKernel):
        # Of the size of keys, so that latents look at different ones from the start.
        init.normal_(module.latents, std=1.0)
