"""MMViT: several views of an image or a spectrogram, each on its own grid, through the stages of a multiscale transformer that look at
each other where a stage begins.

What is known of the paper (arXiv 2305.00104): several views of the input, stages of growing width and shrinking resolution that the
views go through side by side, one cross-attention block in each stage. Patches, depths, widths and the gate are choices made here; the
layers are MViTv2's (Li et al. 2022, arXiv 2112.01526).

Letters: B batch, C channels, H W height and width of the input (bands and frames of a spectrogram), h w grid of a view, D width of a
stage, n heads, d head width.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import math
from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.swin.modeling_swin import SwinDropPath

from .attention_crossmodal import FeedForward, MultiHeadAttention
from .eeg_crossmodal import EEGConfig
from .fusion_crossmodal import StaticGate


@strict
class MMViTConfig(PreTrainedConfig):
    """Encoder of images (B,C,H,W), or of spectrograms (B,F,T).

    Args:
        num_channels: 3 of images. 1 of spectrograms: the encoder is then of type `"audio"` and reads `input_features` (for grey
            images say `"type": "vision"` in the entry).
        image_size: [height, width], or [bands, frames], that the tables of relative positions are made for. Others are read too:
            what is farther apart than the tables reach counts as the farthest (Shaw et al. 2018, arXiv 1803.02155).
        patch_size, patch_stride: of the first convolution of each view, a number or [height, width]; sizes are odd. One view is MViTv2.
        embed_dim, num_heads: of the first stage; both double from stage to stage, while height and width halve.
        depths: layers of each stage.
        key_value_stride: by which keys and values of the first stage are pooled; it halves from stage to stage, down to 1.
        mlp_ratio: of the width of the feed-forward layers to that of the stage.
        drop_path_rate: of the last layer; it grows from 0 at the first (Huang et al. 2016, arXiv 1603.09382).
        cross_view_gate: a of tanh(a), by which what a view sees of the others counts, at the start: 0 begins as views that are alone,
            1 suits training from nothing.
    """

    model_type = "crossmodal_mmvit"

    num_channels: int = 3
    image_size: list[int] | tuple[int, ...] = (224, 224)
    patch_size: list | tuple = (7, 15)
    patch_stride: list | tuple = (4, 8)
    embed_dim: int = 96
    num_heads: int = 1
    depths: list[int] | tuple[int, ...] = (1, 2, 11, 2)
    key_value_stride: int = 4
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    drop_path_rate: float | int = 0.1
    cross_view_gate: float | int = 0.0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    @property
    def level_sizes(self):
        """Width of every level: the patches, then each stage."""
        return [self.embed_dim, *(self.embed_dim * 2**stage for stage in range(len(self.depths)))]

    def validate_architecture(self):
        if not self.patch_size or len(self.patch_size) != len(self.patch_stride):
            raise ValueError(
                f"patch_size={self.patch_size} and patch_stride={self.patch_stride}. Expected one of each for every view, at least one."
            )
        sides = [side for size in self.patch_size for side in _pair(size)]
        if not all(side > 0 and side % 2 for side in sides):
            raise ValueError(
                f"patch_size={self.patch_size}. Expected odd numbers, or pairs of them: the convolution is centred on its patch."
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not divisible by num_heads={self.num_heads}. Change one of them."
            )
        counts = {
            "patch_stride": [side for stride in self.patch_stride for side in _pair(stride)],
            "image_size": self.image_size,
            "depths": self.depths,
            "key_value_stride": [self.key_value_stride],
            "num_channels": [self.num_channels],
        }
        for key, values in counts.items():
            if not values or min(values) < 1 or (key == "image_size" and len(values) != 2):
                raise ValueError(
                    f"{key}={getattr(self, key)}. Expected {'two ' if key == 'image_size' else ''}whole numbers of at least 1."
                )


# `@strict` would wrap a ValueError into one of its own that is none.
MMViTConfig.validate = EEGConfig.validate
MMViTConfig.register_for_auto_class()


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


@dataclass
class _Stage:
    """A stage at its own width, as the blocks of the family read a config."""

    config: MMViTConfig
    number: int
    attention_kernel: str = "exact"
    attention_dropout: float = 0.0

    @property
    def hidden_size(self):
        return self.config.embed_dim * 2**self.number

    @property
    def intermediate_size(self):
        return int(self.hidden_size * self.config.mlp_ratio)

    @property
    def num_attention_heads(self):
        return self.config.num_heads * 2**self.number

    @property
    def key_value_stride(self):
        return max(1, self.config.key_value_stride // 2**self.number)

    @property
    def hidden_act(self):
        return self.config.hidden_act

    @property
    def _attn_implementation(self):
        return self.config._attn_implementation


def _zero_padding(maps, mask):
    """maps (B,h,w,D) with zeros in the columns that are padding, as beyond their edge; mask (B,w) bool or None."""
    return maps if mask is None else maps.masked_fill(~mask[:, None, :, None], 0.0)


def _strided(mask, stride):
    """The mask of every `stride`-th column: a pooled column is real if the one at its centre is. mask (B,w) or None."""
    return None if mask is None else mask[:, ::stride]


def _on_grid(mask, maps):
    """mask (B,w) of columns to that of tokens (B,h*w), or None; maps (B,h,w,D)."""
    return None if mask is None else mask[:, None].expand(-1, maps.shape[1], -1).flatten(1)


class HeadwiseConv2d(nn.Conv2d):
    """A depthwise convolution of d channels on maps (B,n*d,h,w) of n heads, which share its kernels."""

    def forward(self, maps):
        heads, channels = maps.shape[1] // self.out_channels, maps.shape[1]
        weight = self.weight.repeat(heads, 1, 1, 1)
        return nn.functional.conv2d(maps, weight, self.bias, self.stride, self.padding, groups=channels)


class ConvolutionPooling(nn.Module):
    """P: LN of a depthwise 3x3 convolution on the channels of a head, shared by all heads."""

    def __init__(self, head_dim, stride, eps):
        super().__init__()
        self.conv = HeadwiseConv2d(head_dim, head_dim, 3, stride=stride, padding=1, groups=head_dim, bias=False)
        self.norm = nn.LayerNorm(head_dim, eps=eps)

    def forward(self, maps):
        """maps (B,h,w,n*d), 0 where they are padding. Returns (B,h',w',n,d)."""
        # Channels of all heads lie side by side: nothing is copied on the way.
        pooled = self.conv(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(pooled.unflatten(3, (-1, self.conv.out_channels)))


class RelativePositions(nn.Module):
    """R of one axis: a vector for every distance of a query and a key along it, in cells of the finer of their grids."""

    def __init__(self, length, head_dim, query_stride, key_stride):
        """length: cells of the grid that queries and keys are pooled from, by their strides."""
        super().__init__()
        self.unit = math.gcd(query_stride, key_stride)
        self.query_stride, self.key_stride = query_stride, key_stride
        self.farthest = -(-length // self.unit) - 1
        self.table = nn.Embedding(2 * self.farthest + 1, head_dim)

    def forward(self, queries, keys):
        """(queries, keys, d) of so many queries and keys."""
        places = torch.arange(max(queries, keys), device=self.table.weight.device)
        distance = self.query_stride * places[:queries, None] - self.key_stride * places[:keys]
        distance = distance // self.unit
        return self.table(distance.clamp(-self.farthest, self.farthest) + self.farthest)


def attention_written_out(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention with what `attention_mask` (B,n,Tq,Tk) adds to its scores. Returns (B,Tq,n,d) and the weights."""
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class PoolingAttention(nn.Module):
    """Z = (softmax(Q K^T / sqrt(d) + E) V + Q) W_O, with Q, K and V pooled after their projection, and
    E(i,j) = Q_i R^h[h(i) - h(j)] + Q_i R^w[w(i) - w(j)].

    The tables of height and width are apart, so that a grid may be of any shape.
    """

    is_causal = False

    def __init__(self, config, input_size, stage, grid, query_stride):
        super().__init__()
        self.config, self.num_heads = config, stage.num_attention_heads
        head_dim = stage.hidden_size // self.num_heads
        self.scaling = head_dim**-0.5
        self.strides = (query_stride, stage.key_value_stride)
        self.qkv_proj = nn.Linear(input_size, 3 * stage.hidden_size, bias=config.qkv_bias)
        self.poolings = nn.ModuleList(
            [
                ConvolutionPooling(head_dim, stride, config.layer_norm_eps)
                for stride in (query_stride, stage.key_value_stride, stage.key_value_stride)
            ]
        )
        self.rows, self.columns = (RelativePositions(length, head_dim, *self.strides) for length in grid)
        self.o_proj = nn.Linear(stage.hidden_size, stage.hidden_size)

    def bias(self, query, key, mask=None):
        """E (B,n,Tq,Tk) of query (B,h,w,n,d) and key (B,h',w',n,d); mask (B,w') bool or None."""
        (height, width), (rows, columns) = query.shape[1:3], key.shape[1:3]
        by_row = torch.einsum("byxnd,yrd->bnyxr", query, self.rows(height, rows))
        by_column = torch.einsum("byxnd,xcd->bnyxc", query, self.columns(width, columns))
        if mask is not None:
            # Half of the least number: what is added to it must not become infinite.
            least = torch.finfo(by_column.dtype).min / 2
            by_column = by_column.masked_fill(~mask[:, None, None, None], least)
        return (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)

    def forward(self, maps, mask=None):
        """maps (B,h,w,input_size), mask (B,w) bool or None. Returns (B,h',w',D)."""
        parts = _zero_padding(self.qkv_proj(maps), mask).chunk(3, dim=-1)
        query, key, value = (pool(part) for pool, part in zip(self.poolings, parts, strict=True))
        bias = self.bias(query, key, _strided(mask, self.strides[1]))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attention_written_out)
        # (B,h,w,n,d) to (B,n,T,d)
        states = (part.flatten(1, 2).transpose(1, 2) for part in (query, key, value))
        update, _ = attend(self, *states, attention_mask=bias, scaling=self.scaling)
        return self.o_proj((update.unflatten(1, query.shape[1:3]) + query).flatten(3))


class MMViTLayer(GradientCheckpointingLayer):
    """Y = Skip(X) + DropPath(Attention(LN X)), then Y + DropPath(MLP(LN Y)).

    The first layer of a later stage has queries of stride 2 and doubles the width inside attention; Skip is then a max pooling of the
    projected LN X.
    """

    def __init__(self, config, stage, grid, begins, drop_path):
        """grid: (h, w) of what comes in at `image_size`. begins: whether width and resolution change here."""
        super().__init__()
        input_size = stage.hidden_size // 2 if begins else stage.hidden_size
        self.norm = nn.LayerNorm(input_size, eps=config.layer_norm_eps)
        self.attention = PoolingAttention(config, input_size, stage, grid, query_stride=2 if begins else 1)
        self.skip_proj = nn.Linear(input_size, stage.hidden_size) if begins else None
        self.mlp_norm = nn.LayerNorm(stage.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(stage)
        self.drop_path = SwinDropPath(drop_path)

    def skip(self, normed, mask):
        """Max pooling of stride 2 of the projection of (B,h,w,D/2), as (B,h',w',D)."""
        maps = self.skip_proj(normed)
        if mask is not None:
            maps = maps.masked_fill(~mask[:, None, :, None], torch.finfo(maps.dtype).min)
        pooled = nn.functional.max_pool2d(maps.permute(0, 3, 1, 2), 3, stride=2, padding=1).permute(0, 2, 3, 1)
        return _zero_padding(pooled, _strided(mask, 2))

    def forward(self, maps, mask=None):
        """maps (B,h,w,D), mask (B,w) bool or None. Returns the new maps."""
        normed = self.norm(maps)
        update = self.attention(normed, mask)
        maps = maps if self.skip_proj is None else self.skip(normed, mask)
        maps = maps + self.drop_path(update)
        return maps + self.drop_path(self.mlp(self.mlp_norm(maps)))


class CrossViewBlock(nn.Module):
    """X_i + tanh(a_i) MHA(LN X_i, keys and values P(X_j) of all other views j): how views look at each other."""

    def __init__(self, config, stage, width):
        """stage: whose beginning it is. width: of the maps that come in, which is that of the stage before."""
        super().__init__()
        views = range(len(config.patch_size))
        self.poolings = nn.ModuleList(
            [ConvolutionPooling(width.hidden_size, stage.key_value_stride, config.layer_norm_eps) for _ in views]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width.hidden_size, eps=config.layer_norm_eps) for _ in views])
        self.attentions = nn.ModuleList([MultiHeadAttention(width) for _ in views])
        self.gates = nn.ModuleList([StaticGate(config) for _ in views])
        self.stride = stage.key_value_stride

    def forward(self, streams):
        """streams: (maps (B,h,w,D), mask (B,w) bool or None) of each view. Returns the same."""
        seen = []
        for pool, (maps, mask) in zip(self.poolings, streams, strict=True):
            pooled = pool(_zero_padding(maps, mask)).flatten(3)
            seen.append((pooled.flatten(1, 2), _on_grid(_strided(mask, self.stride), pooled)))
        looked = []
        for view, (maps, mask) in enumerate(streams):
            others = [item for place, item in enumerate(seen) if place != view]
            keys = torch.cat([tokens for tokens, _ in others], dim=1)
            key_mask = None if mask is None else torch.cat([real for _, real in others], dim=1)
            attention, query = self.attentions[view], self.norms[view](maps).flatten(1, 2)
            update, _ = attention(query, attention.project_key_value(keys), key_mask)
            looked.append((maps + self.gates[view](query, update).view_as(maps), mask))
        return looked


class View(nn.Module):
    """One view on its own grid: patches, and the layers of every stage, without what it sees of the others. By itself an MViTv2."""

    def __init__(self, config, number):
        super().__init__()
        size, self.stride = _pair(config.patch_size[number]), _pair(config.patch_stride[number])
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.embed_dim, size, stride=self.stride, padding=[side // 2 for side in size]
        )
        grid = [-(-side // stride) for side, stride in zip(config.image_size, self.stride, strict=True)]
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            layers = nn.ModuleList()
            for layer in range(depth):
                begins = stage > 0 and layer == 0
                layers.append(MMViTLayer(config, _Stage(config, stage), grid, begins, rates.pop(0)))
                grid = [-(-side // 2) for side in grid] if begins else grid
            self.stages.append(layers)
        self.norm = nn.LayerNorm(config.level_sizes[-1], eps=config.layer_norm_eps)

    def embed(self, values, mask):
        """values (B,C,H,W), mask (B,W) bool or None, to a stream: (B,h,w,D) and the mask of its columns (B,w) or None."""
        return self.patch_embeddings(values).permute(0, 2, 3, 1), _strided(mask, self.stride[1])

    def through(self, stage, maps, mask):
        """A stream behind the layers of a stage."""
        for layer in self.stages[stage]:
            maps, mask = layer(maps, mask), _strided(mask, layer.attention.strides[0])
        return maps, mask


def _averaged(maps, mask, stride):
    """maps (B,h,w,D), mask (B,w) bool or None: means over the real cells of squares of `stride`, as tokens (B,h'*w',D)."""
    if stride > 1:
        maps = _zero_padding(maps, mask).permute(0, 3, 1, 2)
        maps = nn.functional.avg_pool2d(maps, stride, ceil_mode=True).permute(0, 2, 3, 1)
        if mask is not None:
            part = nn.functional.avg_pool1d(mask[:, None].to(maps.dtype), stride, ceil_mode=True)
            maps = maps / part[:, 0, :, None].clamp(min=1 / stride)[:, None]
    return maps.flatten(1, 2)


class MMViTEncoder(PreTrainedModel):
    """Views side by side through all stages; keeps the contract of `ENCODERS`.

    Level 0 holds the patches, level k what stage k makes of them, the last behind a LayerNorm. The tokens of a level are those of all
    views one behind the other, each averaged onto the grid that this view has in the last stage; the first view comes last, where the
    family looks for the patches of an image.
    """

    config: MMViTConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MMViTLayer", "CrossViewBlock"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        if config.num_channels == 1:
            self.main_input_name = "input_features"
        self.views = nn.ModuleList([View(config, number) for number in range(len(config.patch_size))])
        self.crossings = nn.ModuleList()
        for stage in range(len(config.depths) if len(self.views) > 1 else 0):
            self.crossings.append(CrossViewBlock(config, _Stage(config, stage), _Stage(config, max(0, stage - 1))))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            initialization.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            initialization.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            initialization.trunc_normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, StaticGate):
            initialization.constant_(module.weight, self.config.cross_view_gate)
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)

    def token_grid(self, height, width):
        """Grid (h, w) of the first view in the last stage, for inputs of a size."""
        grid = [-(-side // stride) for side, stride in zip((height, width), self.views[0].stride, strict=True)]
        for _ in self.config.depths[1:]:
            grid = [-(-side // 2) for side in grid]
        return tuple(grid)

    def streams(self, values, mask=None):
        """values (B,C,H,W), mask (B,W) bool or None. Returns for every level the stream of each view: (maps (B,h,w,D), mask (B,w) or
        None)."""
        if mask is not None:
            values = values.masked_fill(~mask[:, None, None], 0.0)
        levels = [[view.embed(values, mask) for view in self.views]]
        for stage in range(len(self.config.depths)):
            streams = self.crossings[stage](levels[-1]) if self.crossings else levels[-1]
            levels.append([view.through(stage, *stream) for view, stream in zip(self.views, streams, strict=True)])
        levels[-1] = [(view.norm(maps), real) for view, (maps, real) in zip(self.views, levels[-1], strict=True)]
        return levels

    def forward(self, values, mask=None):
        """values (B,C,H,W), or (B,F,T) of one channel; mask (B,T) bool of the columns that are real, or None.

        Returns the levels (B,T',D_k), and the mask of their tokens (B,T') or None.
        """
        config = self.config
        if config.num_channels == 1 and values.dim() == 3:
            values = values[:, None]
        if values.dim() != 4 or values.shape[1] != config.num_channels:
            expected = "(batch, bands, frames)" if config.num_channels == 1 else "(batch, channels, height, width)"
            raise ValueError(
                f"values of shape {tuple(values.shape)} were given. Expected {expected} with num_channels={config.num_channels}. "
                "Correct the input or the encoder's config."
            )
        values = values.to(self.views[0].patch_embeddings.weight.dtype)
        levels = self.streams(values, None if mask is None else mask.bool())
        if mask is not None:
            mask = torch.cat([_on_grid(real, maps) for maps, real in levels[-1][::-1]], dim=1)
        # Patches have the grid of the first stage.
        strides = [2 ** (len(levels) - 1 - max(1, number)) for number in range(len(levels))]
        tokens = [
            torch.cat([_averaged(*stream, stride) for stream in level[::-1]], dim=1)
            for level, stride in zip(levels, strides, strict=True)
        ]
        return tokens, mask

    @classmethod
    def from_image_weights(cls, source, config):
        """An encoder of `config` with the weights of another that was trained on other channels and another size, as AST takes over
        an image model (Gong et al. 2021, arXiv 2104.01778).

        Patch kernels are summed over the colours; tables of relative positions are cut around their middle where the new ones are
        shorter, and interpolated where they are longer.

        Args:
            source: MMViTEncoder, of images. config: MMViTConfig of the same views and stages.

        Raises:
            ValueError: for encoders that differ in more than channels and size.
        """
        alike = ("patch_size", "patch_stride", "embed_dim", "num_heads", "depths", "key_value_stride", "mlp_ratio")
        for key in (*alike, "qkv_bias"):
            one, other = (_plain(getattr(each, key)) for each in (source.config, config))
            if one != other:
                raise ValueError(
                    f"the image encoder has {key}={one}, and this one {other}. Expected encoders that differ in num_channels and "
                    "image_size alone. Give both the same."
                )
        if config.num_channels not in (1, source.config.num_channels):
            raise ValueError(
                f"num_channels={config.num_channels} cannot be made of {source.config.num_channels}. Expected 1, or as many."
            )
        model = cls(config)
        weights = source.state_dict()
        with torch.no_grad():
            for name, target in model.state_dict().items():
                target.copy_(_adapted(weights[name], target.shape))
        return model


def _plain(value):
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _adapted(weight, shape):
    """A weight of an image encoder in the shape that the new one has."""
    if weight.shape == shape:
        return weight
    if weight.dim() == 4:
        return weight.sum(dim=1, keepdim=True)
    length = shape[0]
    if length < len(weight):
        start = (len(weight) - length) // 2
        return weight[start : start + length]
    return nn.functional.interpolate(weight.T[None], size=length, mode="linear", align_corners=True)[0].T
