"""Encoders: one modality in, tokens at several depths out.

Any transformers encoder is run through `encode_modality`; `ENCODERS` holds what transformers lacks.

Letters: B batch, T tokens, D_k width of level k, H W pixels, h w token grid.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import inspect
import math
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel

from .attention_crossmodal import FeedForwardBlock, SelfAttentionBlock
from .configuration_crossmodal import FeatureSequenceConfig
from .eeg_crossmodal import EEGConfig, EEGEncoder
from .kernels_crossmodal import initialise_kernel
from .mmvit_crossmodal import MMViTConfig, MMViTEncoder
from .points_crossmodal import PointEncoder, PointsConfig


@dataclass
class EncodedModality:
    """Tokens of one modality.

    levels: one (B,T,D_k) per tapped depth, all with the same T. mask (B,T) bool, True for real tokens, or None if
    all are. grid (h, w) if the last h*w tokens are an image's patches in rows, else None. positioned: whether
    the tokens already know where they are. frames: how many frames of a video follow one another in the tokens, each with as
    many, or None. views: how many images a row has, whose tokens follow one another. index (B',) long or None: the row of each
    row of the batch among these; present (B',) bool or None: the rows of the batch that have this modality.
    """

    levels: list
    mask: torch.Tensor | None = None
    grid: tuple | None = None
    positioned: bool = True
    frames: int | None = None
    views: int = 1
    index: torch.Tensor | None = None
    present: torch.Tensor | None = None

    def spread(self, values):
        """Values (U,...) of the distinct inputs to the rows of the batch (B,...), 0 for rows that lack the modality."""
        if self.index is not None:
            # Its backward is many times as fast as that of values[index], which sorts.
            values = values.index_select(0, self.index)
        if self.present is not None:
            present = self.present.view(-1, *[1] * (values.dim() - 1))
            # onnxruntime chooses among numbers only: it has no Where of bool.
            values = values & present if values.dtype == torch.bool else values.masked_fill(~present, 0)
        return values


def pack_tokens(encoded):
    """Levels of an EncodedModality side by side, as `<name>_tokens` of a forward takes them.

    (B,T,sum of D_k), or (B,h,w,sum of D_k) for a grid whose tokens do not know yet where they are, (B,V,h,w,...) of several
    views; of the frames of a video (B,F,T,sum of D_k) or (B,F,h,w,sum of D_k), and a mask of frames (B,F).
    """
    tokens, mask = torch.cat(encoded.levels, dim=-1), encoded.mask
    if encoded.frames is not None:
        tokens = tokens.unflatten(1, (encoded.frames, -1))
        mask = None if mask is None else mask.unflatten(1, (encoded.frames, -1))[..., 0]
    if not encoded.positioned and encoded.grid is not None:
        tokens = tokens.unflatten(-2, encoded.grid if encoded.views == 1 else (encoded.views, *encoded.grid))
    return tokens, mask


def unpack_tokens(name, tokens, mask, widths, by_frame=False):
    """The EncodedModality that `pack_tokens` packed. widths: of the tapped levels, mask (B,T), (B,F) of frames, or None."""
    axes = tokens.dim() - by_frame
    if axes not in (3, 4, 4 if by_frame else 5) or tokens.shape[-1] != sum(widths):
        frames = "frames, " if by_frame else ""
        raise ValueError(
            f"{name}_tokens has shape {tuple(tokens.shape)}. Expected (batch, {frames}tokens, {sum(widths)}) or (batch, {frames}height, "
            f"width, {sum(widths)}): the tapped levels of {name!r}, of widths {widths}, side by side, as `encode_tokens` returns them."
        )
    grid, frames = tuple(tokens.shape[-3:-1]) if axes > 3 else None, tokens.shape[1] if by_frame else None
    levels = list(tokens.flatten(1, -2).split(widths, dim=-1))
    mask = None if mask is None else mask.bool()
    if by_frame and mask is not None:
        mask = mask.repeat_interleave(levels[0].shape[1] // frames, dim=1)
    views = tokens.shape[1] if axes == 5 else 1
    return EncodedModality(levels, mask, grid, positioned=grid is None, frames=frames, views=views)


def sine_positions(positions, size, temperature=10000.0):
    """Sine and cosine of positions (T,) at `size/2` wavelengths (Vaswani et al. 2017). Returns (T,size)."""
    frequencies = torch.exp(
        torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) * (-math.log(temperature) / size)
    )
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# Of the whole height or width, at the shortest wavelength; the longest is `_GRID_TEMPERATURE` times as long.
_GRID_RADIANS = 20.0
_GRID_TEMPERATURE = 100.0


def grid_positions(height, width, size, device):
    """Sine positions of a grid, rows in the first half of the channels, columns in the second. Returns (h*w,size).

    Positions are parts of the whole, as in DETR (Carion et al. 2020, arXiv 2005.12872): a grid of 4 x 4 fills the same
    range as one of 32 x 32, where counting cells at a temperature of 10,000 leaves nearly every channel constant.
    """
    rows, columns = (
        sine_positions(
            (torch.arange(count, device=device) + 0.5) * (_GRID_RADIANS / count), size // 2, _GRID_TEMPERATURE
        )
        for count in (height, width)
    )
    rows = rows[:, None].expand(height, width, size // 2)
    columns = columns[None].expand(height, width, size // 2)
    return torch.cat([rows, columns], dim=-1).reshape(height * width, size)


class FeatureSequenceLayer(nn.Module):
    """A pre-norm transformer layer over (B,T,D)."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = SelfAttentionBlock(config)
        self.mlp = FeedForwardBlock(config)

    def forward(self, tokens, mask=None):
        return self.mlp(self.self_attn(tokens, mask)[0])


class FeatureSequenceEncoder(PreTrainedModel):
    """A transformer over a sequence of feature vectors, for any modality without an encoder of its own.

    Keeps the contract of `ENCODERS`: `forward(values, mask)` returns the levels, shallowest first, and the mask of
    their tokens.
    """

    config: FeatureSequenceConfig
    main_input_name = "values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.feature_size, eps=config.layer_norm_eps)
        self.embeddings = nn.Linear(config.feature_size, config.hidden_size)
        self.layers = nn.ModuleList([FeatureSequenceLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        initialise_kernel(module)

    def forward(self, values, mask=None):
        """values (B,T,...) with `feature_size` numbers a step, mask (B,T) bool or None."""
        values = values.flatten(2) if values.dim() > 3 else values
        if values.dim() != 3 or values.shape[-1] != self.config.feature_size:
            raise ValueError(
                f"feature values of shape {tuple(values.shape)} were given. Expected (batch, steps, ...) with "
                f"feature_size={self.config.feature_size} numbers a step. Correct the input or the encoder's config."
            )
        tokens = self.embeddings(self.norm(values.to(self.embeddings.weight.dtype)))
        if self.config.use_positions:
            positions = sine_positions(torch.arange(tokens.shape[1], device=tokens.device), tokens.shape[-1])
            tokens = tokens + positions.to(tokens.dtype)
        levels = [tokens]
        for layer in self.layers:
            levels.append(layer(levels[-1], mask))
        levels[-1] = self.final_norm(levels[-1])
        return levels, mask


class CustomEncoderConfig(PreTrainedConfig):
    """Stands for a module given to `from_encoders` that no shipped type can rebuild. Trains, but cannot be saved."""

    model_type = "crossmodal_custom"

    class_name: str = ""
    level_sizes: list[int] | None = None


# Encoders that transformers lacks: model_type to the class, built from its config.
# Contract: `forward(values, mask)` -> (levels, mask of their tokens), levels as (B,T,D_k) or (B,D_k,h,w), widths as
# `level_sizes` of the config (or of the module itself) says.
ENCODERS = {
    FeatureSequenceConfig.model_type: FeatureSequenceEncoder,
    EEGConfig.model_type: EEGEncoder,
    MMViTConfig.model_type: MMViTEncoder,
    PointsConfig.model_type: PointEncoder,
}


def build_encoder(config, name="encoder"):
    """A randomly initialised encoder of a config: a row of `ENCODERS`, or what AutoModel builds, without a pooler."""
    if config.model_type in ENCODERS:
        return ENCODERS[config.model_type](config)
    if config.model_type == CustomEncoderConfig.model_type:
        raise ValueError(
            f"modality {name!r} was composed from a module of class {config.class_name!r}, which no config can "
            f"rebuild. Pass the module itself to from_encoders, or give it a row in ENCODERS ({sorted(ENCODERS)})."
        )
    model_class = encoder_class(config)
    config._attn_implementation = supported_attention(config._attn_implementation, model_class)
    return model_class._from_config(config, **without_pooler(model_class))


def without_pooler(model_class):
    """Arguments that leave the pooler out: nobody reads it, and it would never get a gradient."""
    accepted = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}


def encoder_class(config):
    """The class that encodes one modality, where AutoModel's own would be an encoder-decoder."""
    if config.model_type == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder
    for auto_class in (AutoModelForTextEncoding, AutoModel):
        mapping = auto_class._model_mapping
        if getattr(config, "is_encoder_decoder", False) or auto_class is AutoModel:
            if type(config) in mapping:
                found = mapping[type(config)]
                return found[0] if isinstance(found, tuple) else found
    # A tower without an Auto entry of its own (SigLIP's text, CLAP's audio) stands beside its full model.
    beside = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    for found in vars(beside).values():
        if getattr(found, "config_class", None) is type(config) and found.__name__.endswith("Model"):
            return found
    raise ValueError(
        f"no encoder class is known for model_type={config.model_type!r}. Use a model that AutoModel loads, or add "
        "one to ENCODERS in encoders_crossmodal.py."
    )


def supported_attention(wanted, model_class):
    """The attention backend asked for, or "eager" where an encoder lacks it (convolutional ones have none)."""
    supports = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
    flag = supports.get(wanted, "_supports_flash_attn" if wanted and "flash" in wanted else None)
    return "eager" if flag and not getattr(model_class, flag, False) else wanted


# Parameters that never reach a level (their gradient would stay None for ever), and constants.
_UNTRAINED = {
    "clip_vision_model": ("post_layernorm",),
    "convnext": ("layernorm",),
    "convnextv2": ("layernorm",),
    "siglip_vision_model": ("head",),
    "dinov2": ("embeddings.mask_token",),
    "dinov2_with_registers": ("embeddings.mask_token",),
    "beit": ("embeddings.mask_token",),
    "swin": ("embeddings.mask_token",),
    "vit": ("embeddings.mask_token",),
    "whisper": ("embed_positions",),
}


def freeze_untrained(encoder):
    """Takes parameters that no token depends on (poolers, mask tokens) and constants out of training."""
    untrained = (*_UNTRAINED.get(encoder.config.model_type, ()), "pooler")
    for name, parameter in encoder.named_parameters():
        if any(f"{name}.".startswith(f"{part}.") for part in untrained):
            parameter.requires_grad_(False)


def keep_all_layers(encoder):
    """Switches LayerDrop off: a dropped layer leaves no state, and depths are tapped by position."""
    for holder in (getattr(encoder, "config", None), *encoder.modules()):
        for key in ("layerdrop", "encoder_layerdrop"):
            if getattr(holder, key, 0):
                setattr(holder, key, 0.0)


def has_batch_norm(encoder):
    """Whether rows of a batch see each other in training. Encoders of images that have one are convolutional throughout."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())


@contextmanager
def keeping_statistics(encoder):
    """Batch norms as in evaluation: what is encoded inside leaves no trace in them."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    yield
    for norm in norms:
        norm.train()


def blank_input(encoder, settings):
    """Zeros (1,...) in place of one input of an encoder, of a size that it takes; None of one whose config does not say.

    settings: of the modality.
    """
    config, kind = getattr(encoder, "config", None), settings["type"]
    if kind == "text":
        return torch.zeros(1, 1, dtype=torch.long)
    steps = 2 * settings.get("context", 0) + 1
    if kind == "features" and hasattr(config, "feature_size"):
        return torch.zeros(1, steps, config.feature_size)
    if kind == "eeg" and isinstance(config, EEGConfig):
        return torch.zeros(1, steps, config.num_channels, config.num_bands, 2)
    if kind in ("vision", "video") and isinstance(config, PreTrainedConfig):
        size = getattr(config, "image_size", None) or 64
        size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        frames = (getattr(config, "num_frames", 1),) if kind == "video" else ()
        return torch.zeros(1, *frames, getattr(config, "num_channels", 3), *size)
    if hasattr(config, "max_source_positions"):
        return torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
    if hasattr(config, "conv_stride"):
        # One token, and a few more samples than it is made of.
        return torch.zeros(1, 2 * math.prod(config.conv_stride) + math.prod(config.conv_kernel))
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        return torch.zeros(1, config.max_length, config.num_mel_bins)
    return None


def encode_modality(encoder, kind, values, mask, levels, frame_tokens=None):
    """Runs one encoder and taps it.

    Args:
        encoder: a transformers model, or a module that keeps the contract of `ENCODERS`.
        kind: "vision", "text", "audio", "video", "features", "eeg" or "points".
        values: what the encoder reads, (B,3,H,W), (B,T), (B,F,T), (B,samples), (B,frames,3,H,W) or (B,T,...); of several views of a
            scene (B,V,3,H,W), each of which is encoded by itself.
        mask: (B, positions of the input) or None.
        levels: indices of the depths to return.
        frame_tokens: of a video whose frames an encoder of images reads one by one, how many tokens are kept of each at most.

    Returns:
        EncodedModality with one (B,T,D_k) per level.
    """
    if kind == "vision" and values.dim() == 5:
        rows, views = values.shape[:2]
        encoded = encode_modality(encoder, kind, values.flatten(0, 1), None, levels)
        encoded.levels = [level.unflatten(0, (rows, views)).flatten(1, 2) for level in encoded.levels]
        encoded.views = views
        return encoded
    if mask is not None:
        mask = mask.bool()
    if frame_tokens is not None:
        return _encode_frames(encoder, values, mask, levels, frame_tokens)
    if mask is not None:
        # Whatever stands in padded positions must not matter, not even through group norms or convolutions.
        if kind == "text":
            values = values.masked_fill(~mask, encoder.config.pad_token_id or 0)
        elif getattr(encoder, "main_input_name", None) == "input_features" and values.shape[-1] == mask.shape[1]:
            # A spectrogram (B,F,T): silence is its lowest value, not 0.
            silence = values.masked_fill(~mask[:, None], torch.inf).amin(dim=(1, 2), keepdim=True)
            values = torch.where(mask[:, None], values, silence.nan_to_num(posinf=0.0))
        elif values.shape[: mask.dim()] == mask.shape:
            values = values.masked_fill(~mask.view(*mask.shape, *[1] * (values.dim() - mask.dim())), 0)
    if isinstance(encoder, PreTrainedModel) and encoder.config.model_type not in ENCODERS:
        states, mask = _run_transformers_encoder(encoder, kind, values, mask)
    else:
        states, mask = encoder(values, mask)
    tapped = [states[level] for level in levels]
    if tapped[-1].dim() == 4:
        grid = tuple(tapped[-1].shape[-2:])
        return EncodedModality([_grid_tokens(level, grid) for level in tapped], None, grid, positioned=False)
    return EncodedModality(tapped, mask, _patch_grid(encoder, kind, values, tapped[-1].shape[1]))


def _encode_frames(encoder, values, mask, levels, frame_tokens):
    """A video by an encoder of images: values (B,F,3,H,W), mask (B,F) bool or None. Returns an EncodedModality of F times as many
    tokens as are kept of a frame, in the order of time."""
    if values.dim() != 5:
        raise ValueError(
            f"frames of shape {tuple(values.shape)} were given. Expected (batch, frames, channels, height, width)."
        )
    rows, count = values.shape[:2]
    frames, real = values.flatten(0, 1), None
    if mask is not None:
        # Only real frames are encoded: batch norm never sees what is not there. Compiled, shapes are fixed, and it sees zeros.
        real = None if torch.compiler.is_compiling() else mask.flatten().nonzero().squeeze(1)
        frames = frames.masked_fill(~mask.view(-1, 1, 1, 1), 0) if real is None else frames[real]
    encoded = limit_tokens(encode_modality(encoder, "vision", frames, None, levels), frame_tokens)
    kept = encoded.levels
    if real is not None:
        kept = [level.new_zeros(rows * count, *level.shape[1:]).index_copy(0, real, level) for level in kept]
    kept = [level.unflatten(0, (rows, count)).flatten(1, 2) for level in kept]
    if mask is not None:
        mask = mask.repeat_interleave(kept[0].shape[1] // count, dim=1)
    return EncodedModality(kept, mask, encoded.grid, encoded.positioned, frames=count)


def _run_transformers_encoder(encoder, kind, values, mask):
    """All levels of a transformers encoder, and the mask of its tokens."""
    if kind == "vision" and has_batch_norm(encoder):
        if values.dim() != 4:
            raise ValueError(
                f"images of shape {tuple(values.shape)} were given. Expected (batch, channels, height, width)."
            )
        # Convolutions and poolings follow the layout of what comes in, and are faster where channels lie side by side.
        values = values.contiguous(memory_format=torch.channels_last)
    arguments = {encoder.main_input_name: values}
    accepted = inspect.signature(encoder.forward).parameters
    by_sample = hasattr(encoder, "_get_feature_vector_attention_mask")
    if mask is not None and "attention_mask" in accepted and (kind == "text" or by_sample):
        arguments["attention_mask"] = mask.long()
    if "interpolate_pos_encoding" in accepted and kind == "vision":
        arguments["interpolate_pos_encoding"] = _needs_interpolation(encoder.config, values)
    output = encoder(**arguments, output_hidden_states=True, return_dict=True)
    # Windowed pyramids (Swin) keep their grids apart from the flat sequences.
    states = list(getattr(output, "reshaped_hidden_states", None) or output.hidden_states)
    last = output.last_hidden_state
    if states[-1].dim() == 4 and last.dim() == 3:
        last = last.transpose(1, 2).reshape(states[-1].shape)
    if states[-1].shape == last.shape:
        states[-1] = last
    else:
        states.append(last)
    if kind == "audio" and mask is not None:
        mask = audio_token_mask(encoder, mask, last.shape[1])
    return states, mask if kind in ("text", "audio") else None


def _needs_interpolation(config, pixel_values):
    size = getattr(config, "image_size", None)
    if size is None:
        return False
    expected = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return tuple(pixel_values.shape[-2:]) != expected


def audio_token_mask(encoder, mask, num_tokens):
    """Mask of an audio encoder's tokens from the mask of its frames or samples. Returns (B,T) or None."""
    if getattr(encoder.config, "patch_size", None):
        # Patches of a spectrogram of fixed size (AST): silence is content, and each patch counts.
        return None
    if mask.shape[1] == num_tokens:
        return mask
    if hasattr(encoder, "_get_feature_vector_attention_mask"):
        return encoder._get_feature_vector_attention_mask(num_tokens, mask.long()).bool()
    # A token is real if the frame at its centre is.
    centres = ((torch.arange(num_tokens, device=mask.device) + 0.5) * mask.shape[1] / num_tokens).long()
    return mask[:, centres]


def _grid_tokens(level, grid):
    """(B,D,h,w) to tokens (B,h'w',D), averaged onto the grid (h', w') of the level that sets the token count."""
    if tuple(level.shape[-2:]) != tuple(grid):
        level = nn.functional.adaptive_avg_pool2d(level, tuple(grid))
    return level.flatten(2).transpose(1, 2)


def _patch_grid(encoder, kind, values, num_tokens):
    """Grid of a patch encoder's tokens, which follow its class and register tokens."""
    if kind == "vision" and isinstance(encoder, MMViTEncoder):
        return encoder.token_grid(*values.shape[-2:])
    patch = getattr(getattr(encoder, "config", None), "patch_size", None)
    if kind != "vision" or not isinstance(patch, int):
        return None
    grid = (values.shape[-2] // patch, values.shape[-1] // patch)
    return grid if grid[0] * grid[1] <= num_tokens else None


def limit_tokens(encoded, max_tokens):
    """Averages neighbouring tokens until at most `max_tokens` are left. Returns an EncodedModality."""
    num_tokens = encoded.levels[0].shape[1]
    # Where the length of an exported graph is free, what is short enough is averaged over single tokens.
    if statically_known_true(num_tokens <= max_tokens):
        return encoded
    if encoded.grid is not None and encoded.grid[0] * encoded.grid[1] == num_tokens:
        height, width = encoded.grid
        shrink = math.sqrt(max_tokens / num_tokens)
        grid = (max(1, int(height * shrink)), max(1, int(width * shrink)))
        levels = [_grid_tokens(level.transpose(1, 2).unflatten(2, (height, width)), grid) for level in encoded.levels]
        return EncodedModality(levels, None, grid, encoded.positioned)
    stride = -(-num_tokens // max_tokens)
    levels, mask = [], None
    real = encoded.mask
    if real is None:
        real = torch.ones(encoded.levels[0].shape[:2], dtype=torch.bool, device=encoded.levels[0].device)
    padding = -num_tokens % stride
    real = nn.functional.pad(real, (0, padding)).unflatten(1, (-1, stride))
    mask = real.any(2)
    for level in encoded.levels:
        level = nn.functional.pad(level, (0, 0, 0, padding)).unflatten(1, (-1, stride))
        weights = real.to(level.dtype)[..., None]
        levels.append((level * weights).sum(2) / weights.sum(2).clamp(min=1))
    return EncodedModality(levels, mask if encoded.mask is not None else None, None, encoded.positioned)
