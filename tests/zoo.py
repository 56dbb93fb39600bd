"""Tiny encoders of every supported type with an input for each: (config, key, values)."""

import torch
from transformers import CONFIG_MAPPING


_COLUMN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {**_COLUMN, "vocab_size": 60, "max_position_embeddings": 40}
_IDS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}

# Two views, whose gate is open.
_VIEWS = {
    "patch_size": [7, 15],
    "patch_stride": [4, 8],
    "embed_dim": 8,
    "depths": [1, 1],
    "drop_path_rate": 0.0,
    "cross_view_gate": 1.0,
}

_VISION = {
    "vit": {**_COLUMN, "image_size": 64, "patch_size": 16},
    "dinov2": {**_COLUMN, "image_size": 64, "patch_size": 16},
    "clip_vision_model": {**_COLUMN, "image_size": 64, "patch_size": 16},
    "siglip_vision_model": {**_COLUMN, "image_size": 64, "patch_size": 16},
    "swin": {
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1, 2],
        "num_heads": [2, 2, 4],
        "window_size": 4,
    },
    "convnext": {"hidden_sizes": [8, 16, 32], "depths": [1, 1, 1], "num_stages": 3},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1], "layer_type": "basic"},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "crossmodal_mmvit": {"image_size": [64, 64], **_VIEWS},
}
_TEXTS = {
    "bert": _TEXT,
    "roberta": _TEXT,
    "distilbert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "vocab_size": 60,
        "max_position_embeddings": 40,
    },
    "modernbert": {**_TEXT, **_IDS},
    "mpnet": _TEXT,
}
_AUDIO = {
    "audio-spectrogram-transformer": ({**_COLUMN, "num_mel_bins": 32, "max_length": 64}, "input_values", (64, 32)),
    "whisper": (
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "max_source_positions": 50, "num_mel_bins": 20,
         "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        "input_features",
        (20, 100),
    ),
    "wav2vec2": (
        {**_COLUMN, "conv_dim": [16] * 3, "conv_stride": [5, 4, 2], "conv_kernel": [10, 8, 4],
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 3,
         "mask_time_prob": 0.0},
        "input_values",
        (4000,),
    ),
    "crossmodal_mmvit_sound": ({"num_channels": 1, "image_size": [20, 96], **_VIEWS}, "input_features", (20, 96)),
}  # fmt: skip

MODEL_TYPES = [*_VISION, *_TEXTS, *_AUDIO, "crossmodal_features"]


def tiny_encoder(model_type, batch_size=2):
    """(entry for `modalities`, modality type, batch of inputs) for a type of encoder."""
    generator = torch.Generator().manual_seed(0)
    if model_type == "crossmodal_features":
        entry = {"model_type": model_type, "feature_size": 6, "hidden_size": 16, "intermediate_size": 32}
        return entry, "features", {"values": torch.randn(batch_size, 9, 6, generator=generator)}
    if model_type == "crossmodal_points":
        entry = {
            "model_type": model_type,
            "feature_size": 6,
            "hidden_size": 12,
            "cell_sizes": [0.3, 0.6],
            "extent": 1.0,
        }
        return entry, "points", {"values": torch.rand(batch_size, 12, 6, generator=generator) * 2 - 1}
    if model_type in _VISION:
        kind, arguments = "vision", _VISION[model_type]
        batch = {"pixel_values": torch.randn(batch_size, 3, 64, 64, generator=generator)}
    elif model_type in _TEXTS:
        kind, arguments = "text", _TEXTS[model_type]
        batch = {"input_ids": torch.randint(5, 50, (batch_size, 7), generator=generator)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    else:
        kind = "audio"
        arguments, key, shape = _AUDIO[model_type]
        batch = {key: torch.randn(batch_size, *shape, generator=generator)}
    return CONFIG_MAPPING[model_type.removesuffix("_sound")](**arguments), kind, batch


# Fusion of the tiny models.
TINY = {"hidden_size": 16, "num_attention_heads": 2, "num_fusion_layers": 2, "intermediate_size": 32}
# Encoder of each modality of the tiny models, in an order that is not alphabetical. `photo` has batch norm.
_ENCODER_OF = {
    "vision": "vit",
    "text": "bert",
    "eeg": "crossmodal_features",
    "photo": "resnet",
    "points": "crossmodal_points",
}


def tiny_config(*names, **overrides):
    """A tiny CrossModalConfig with the modalities named (any of vision, text, eeg, photo, points)."""
    from crossmodal import CrossModalConfig

    modalities = {name: tiny_encoder(_ENCODER_OF[name])[0] for name in names or ("vision", "text")}
    return CrossModalConfig(modalities=modalities, **{**TINY, "num_labels": 5, **overrides})


def tiny_batch(config, batch_size=4, seed=0):
    """Inputs of every modality of a tiny config, under the keys of its forward; masks leave out the last two."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for name in config.modality_names:
        values, mask = config.input_keys(name)
        kind = config.modality_settings[name]["type"]
        if kind == "vision":
            batch[values] = torch.randn(batch_size, 3, 64, 64, generator=generator)
        elif kind == "text":
            batch[values] = torch.randint(5, 50, (batch_size, 7), generator=generator)
        elif kind == "points":
            batch[values] = torch.rand(batch_size, 12, 6, generator=generator) * 2 - 1
        else:
            batch[values] = torch.randn(batch_size, 9, 6, generator=generator)
        if mask:
            batch[mask] = torch.ones(batch[values].shape[:2], dtype=torch.long)
            batch[mask][::2, -2:] = 0
    return batch


def with_and_without_groups(monkeypatch, run):
    """What `run()` returns where rows that are alike are fused apart, however little that saves, and where all are fused at once."""
    from crossmodal.modeling import grouping_crossmodal, modeling_crossmodal

    groups, alike_rows = [], modeling_crossmodal.alike_rows

    def counted(*args):
        groups.append(alike_rows(*args))
        return groups[-1]

    with monkeypatch.context() as patch:
        patch.setattr(grouping_crossmodal, "_GROUP_COST", {"cpu": 1})
        patch.setattr(modeling_crossmodal, "alike_rows", counted)
        apart = run()
        assert groups and all(found is not None and len(found) > 1 for found in groups)
        patch.setattr(modeling_crossmodal, "alike_rows", lambda *_: None)
        return apart, run()
