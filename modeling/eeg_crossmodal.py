"""The encoder of EEG: band features of every channel, fused by mutual cross-attention, read by a 3D convolution.

Letters: B batch, T seconds, C channels, K frequency bands, S segments, D hidden_size.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization


EEG_FEATURES = ("mutual", "both", "de", "psd")


@strict
class EEGConfig(PreTrainedConfig):
    """Encoder of `eeg_values (B, T, C, K, 2)`: differential entropy and power spectral density by second, channel and band.

    Args:
        num_channels, num_bands: of the features.
        features: `"mutual"` (MCA, Zhao and Gu, MICCAI 2024), `"both"` side by side, or `"de"` or `"psd"` alone.
        segment_seconds: that become one token.
        conv_channels: of the two blocks of the convolution.
        hidden_size: of the tokens.
    """

    model_type = "crossmodal_eeg"

    num_channels: int = 32
    num_bands: int = 5
    features: str = "mutual"
    segment_seconds: int = 3
    conv_channels: list[int] | tuple[int, ...] = (32, 64)
    hidden_size: int = 64
    num_hidden_layers: int = 0

    def validate_architecture(self):
        if self.features not in EEG_FEATURES:
            raise ValueError(f"features={self.features!r} is unknown. Expected one of {list(EEG_FEATURES)}.")
        if min(_pooled_shape(self)) < 1:
            raise ValueError(
                f"num_channels={self.num_channels}, num_bands={self.num_bands}, segment_seconds={self.segment_seconds}: nothing is "
                "left after two poolings by 2. Expected at least 4 channels, or more seconds."
            )


def _validate(config):
    for validator in config.__class_validators__:
        validator(config)


# `@strict` would wrap a ValueError into one of its own that is none.
EEGConfig.validate = _validate
EEGConfig.register_for_auto_class()


def mutual_cross_attention(one, other):
    """softmax(X Y^T / sqrt(T)) Y + softmax(Y X^T / sqrt(T)) X: channels look at channels, in both directions, nothing is learned.

    one, other (...,C,T). Returns (...,C,T).
    """
    scale = 1 / math.sqrt(one.shape[-1])
    there = (one @ other.transpose(-1, -2) * scale).softmax(-1) @ other
    back = (other @ one.transpose(-1, -2) * scale).softmax(-1) @ one
    return there + back


def _pooled_shape(config):
    """(channels, bands, seconds) behind both poolings of the convolution."""
    first = (
        config.num_channels // 2,
        (config.num_bands + 2 - 2) // 2 + 1,
        (config.segment_seconds + 2 - 2) // 2 + 1,
    )
    return tuple(size // 2 for size in first)


class EEGEncoder(PreTrainedModel):
    """MCA's steps: F of mutual cross-attention per band, min-max over channels and bands of every second, segments of a few seconds, each
    read by a 3D convolution over channels, bands and seconds.

    Keeps the contract of `ENCODERS`. The convolution is that of the authors (no activation between paired layers).
    """

    config: EEGConfig
    main_input_name = "values"

    def __init__(self, config):
        super().__init__(config)
        first, second = config.conv_channels
        inputs = 2 if config.features == "both" else 1
        self.convolutions = nn.ModuleList(
            [
                nn.Conv3d(before, after, 3, padding=1)
                for before, after in ((inputs, first), (first, first), (first, second), (second, second))
            ]
        )
        self.pools = nn.ModuleList([nn.MaxPool3d(2, padding=(0, 1, 1)), nn.MaxPool3d(2)])
        self.projection = nn.Linear(second * math.prod(_pooled_shape(config)), config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv3d):
            initialization.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            initialization.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            initialization.xavier_uniform_(module.weight)
            initialization.zeros_(module.bias)

    def fused(self, values, mask=None):
        """values (B,T,C,K,2), mask (B,T) bool or None: to (B,inputs,C,K,T), each second from 0 to 1."""
        if mask is not None:
            values = values.masked_fill(~mask[:, :, None, None, None], 0.0)
        # (2,B,K,C,T)
        entropy, power = values.permute(4, 0, 3, 2, 1)
        streams = {
            "mutual": lambda: [mutual_cross_attention(entropy, power)],
            "both": lambda: [entropy, power],
            "de": lambda: [entropy],
            "psd": lambda: [power],
        }[self.config.features]()
        whole = torch.stack(streams, dim=1).transpose(2, 3)
        low, high = whole.amin(dim=(2, 3), keepdim=True), whole.amax(dim=(2, 3), keepdim=True)
        return (whole - low) / (high - low).clamp(min=1e-6)

    def forward(self, values, mask=None):
        """values (B,T,C,K,2), mask (B,T) bool or None. Returns [(B,S,D)] and the mask of segments (B,S) or None."""
        config = self.config
        expected = (config.num_channels, config.num_bands, 2)
        if values.dim() != 5 or tuple(values.shape[2:]) != expected:
            raise ValueError(
                f"eeg values of shape {tuple(values.shape)} were given. Expected (batch, seconds, {', '.join(map(str, expected))}): "
                "num_channels and num_bands of the encoder's config, entropy and power."
            )
        whole = self.fused(values.to(self.projection.weight.dtype), mask)
        length = config.segment_seconds
        whole = nn.functional.pad(whole, (0, -whole.shape[-1] % length))
        # (B,inputs,C,K,S,length) to (B S,inputs,C,K,length)
        segments = whole.unflatten(-1, (-1, length)).permute(0, 4, 1, 2, 3, 5)
        hidden = segments.flatten(0, 1)
        for block, pool in enumerate(self.pools):
            hidden = self.convolutions[2 * block + 1](self.convolutions[2 * block](hidden))
            hidden = nn.functional.relu(pool(hidden))
        tokens = self.projection(hidden.flatten(1)).unflatten(0, segments.shape[:2])
        if mask is not None:
            mask = nn.functional.pad(mask, (0, -mask.shape[1] % length)).unflatten(1, (-1, length)).any(-1)
        return [tokens], mask
