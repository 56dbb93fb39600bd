"""Configuration of the CrossModal family: which encoders, tapped at which depths, fused how.

Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import difflib
from dataclasses import field, fields
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .eeg_crossmodal import EEGConfig
from .mmvit_crossmodal import MMViTConfig
from .points_crossmodal import PointsConfig


# Every Auto class of the family, so that any folder loads through any of them: a save writes only the key of the
# class that is saved, and `AutoModel.from_pretrained` on the folder of a head would fail without the rest.
_AUTO_MAP = {
    "AutoConfig": "configuration_crossmodal.CrossModalConfig",
    "AutoModel": "modeling_crossmodal.CrossModalModel",
    "AutoModelForVisualQuestionAnswering": "classification_crossmodal.CrossModalForVQA",
    "AutoModelForSequenceClassification": "classification_crossmodal.CrossModalForSequenceClassification",
    "AutoModelForZeroShotImageClassification": "retrieval_crossmodal.CrossModalForRetrieval",
    "AutoModelForImageTextToText": "captioning_crossmodal.CrossModalForCaptioning",
    "AutoModelForSemanticSegmentation": "segmentation_crossmodal.CrossModalForPointSegmentation",
    "AutoProcessor": "processing_crossmodal.CrossModalProcessor",
}

FUSION_LEVELS = ("multi", "single")
MODALITY_WEIGHTINGS = ("adaptive", "uniform", "uncertainty")
BOTTLENECKS = ("exchange", "resample")
GATES = ("content", "static", "none", "closed")
POOLINGS = ("attention", "mean", "first")
CONTRASTIVE_LOSSES = ("info_nce", "sigmoid", "triplet")
MATCHINGS = ("classifier", "cosine", "ranking")
ALIGNMENTS = ("recovery", "late_interaction")
LOSS_WEIGHTINGS = ("fixed", "learned")
REGRESSION_LOSSES = ("squared", "absolute")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
POINT_PROJECTIONS = ("none", "add", "only")
VIEW_TOKENS = ("mean", "grid")
SUPERVISIONS = ("tags", "full")
ENTRY_KEYS = (
    "config",
    "levels",
    "max_tokens",
    "type",
    "input",
    "hidden_sizes",
    "context",
    "window",
    "views",
    "num_frames",
    "frame_sampling",
    "frame_tokens",
)
FRAME_SAMPLINGS = ("uniform", "window")

# What each type of encoder is given: its values and, where it has one, the mask of its real positions.
TYPE_INPUTS = {
    "vision": ("pixel_values", None),
    "text": ("input_ids", "attention_mask"),
    "audio": ("input_values", "audio_attention_mask"),
    "video": ("pixel_values_videos", None),
    "features": ("values", "mask"),
    "eeg": ("values", "mask"),
    "points": ("values", "mask"),
}
# Types whose keys always begin with the name of the modality: arrays of numbers have no name of their own.
NAMED_TYPES = ("features", "eeg", "points")
# Configs of the encoders of this family to the type of signal that each reads.
_OWN_TYPES = {"crossmodal_features": "features", "crossmodal_eeg": "eeg", "crossmodal_points": "points"}
# Video encoders whose own forward calls the frames `pixel_values`, as image encoders do.
_VIDEO_MODEL_TYPES = ("videomae", "vivit", "timesformer", "vjepa2")


def nearest_first(given, allowed):
    """The allowed values, the ones that look most like `given` first."""
    return sorted(map(str, allowed), key=lambda value: -difflib.SequenceMatcher(None, str(given), value).ratio())


def _mobilenet_v2_sizes(config):
    from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import apply_depth_multiplier

    channels = [24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320]
    last = 1280
    if not config.finegrained_output or config.depth_multiplier >= 1.0:
        last = apply_depth_multiplier(config, last)
    return [apply_depth_multiplier(config, c) for c in channels] + [last]


# Width at each depth of encoders whose width changes with depth. Others are columns of one `hidden_size`.
_PYRAMIDS = {
    "convnext": lambda c: [c.hidden_sizes[0], *c.hidden_sizes],
    "convnextv2": lambda c: [c.hidden_sizes[0], *c.hidden_sizes],
    "regnet": lambda c: [c.embedding_size, *c.hidden_sizes],
    "resnet": lambda c: [c.embedding_size, *c.hidden_sizes],
    "swin": lambda c: [c.embed_dim * 2 ** min(i, len(c.depths) - 1) for i in range(len(c.depths) + 1)],
    "swinv2": lambda c: [c.embed_dim * 2 ** min(i, len(c.depths) - 1) for i in range(len(c.depths) + 1)],
    "mobilenet_v2": _mobilenet_v2_sizes,
    MMViTConfig.model_type: lambda c: c.level_sizes,
}


def level_sizes(config):
    """Width of every level an encoder offers, shallowest first.

    Level `k` is `hidden_states[k]` of the encoder; the last one is its `last_hidden_state` (after the final norm).
    Level 0 holds the embeddings. Returns `None` for an encoder whose widths cannot be read off its config.
    """
    if config.model_type in _PYRAMIDS:
        return _PYRAMIDS[config.model_type](config)
    width, depth = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if isinstance(width, int) and isinstance(depth, int):
        return [width] * (depth + 1)
    return None


def _encoder_type_and_input(name, config):
    """What kind of signal an encoder reads and under which key, from its model class."""
    if config.model_type in _OWN_TYPES:
        return _OWN_TYPES[config.model_type], "values"
    if config.model_type == MMViTConfig.model_type:
        return ("audio", "input_features") if config.num_channels == 1 else ("vision", "pixel_values")
    if config.model_type in _VIDEO_MODEL_TYPES:
        return "video", "pixel_values_videos"
    from .encoders_crossmodal import encoder_class

    main_input = encoder_class(config).main_input_name
    if main_input in ("input_values", "input_features"):
        return "audio", main_input
    for kind, (key, _) in TYPE_INPUTS.items():
        if main_input == key:
            return kind, key
    raise ValueError(
        f"modality {name!r}: an encoder of model_type={config.model_type!r} does not say what it reads "
        f"(main input {main_input!r}). Give it in the entry: {name}={{'config': ..., 'type': one of "
        f"{sorted(TYPE_INPUTS)}}}."
    )


def _as_config(name, value):
    """An encoder config from a config, or from its JSON with `model_type`."""
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict) or "model_type" not in value:
        raise ValueError(
            f"modality {name!r}: expected a transformers config or its dict with 'model_type', got {value!r:.120}. "
            "To compose from Hub ids, folders or models use CrossModalForX.from_encoders(...)."
        )
    options = {key: item for key, item in value.items() if key != "model_type"}
    model_type = value["model_type"]
    for own in (FeatureSequenceConfig, EEGConfig, MMViTConfig, PointsConfig):
        if model_type == own.model_type:
            return own(**options)
    if model_type not in CONFIG_MAPPING:
        near = nearest_first(model_type, CONFIG_MAPPING.keys())[:3]
        raise ValueError(
            f"modality {name!r}: model_type={model_type!r} is not known to transformers. Nearest: {near}. "
            f"Correct it, or use {FeatureSequenceConfig.model_type!r} for a sequence of feature vectors."
        )
    return CONFIG_MAPPING[model_type](**options)


def _normalise_level(name, level, count):
    index = level + count if level < 0 else level
    if not 0 <= index < count:
        raise ValueError(
            f"modality {name!r}: levels has {level}, which its encoder does not have. Allowed: 0 to {count - 1} "
            f"(or {-count} to -1, counted from the end); 0 is the embeddings. Correct `levels`."
        )
    return index


def _validate_kernel(config):
    """Fields of `attention_kernel`, which both configs have."""
    from .kernels_crossmodal import KERNELS

    kernel = config.attention_kernel
    if kernel not in KERNELS:
        raise ValueError(f"attention_kernel={kernel!r} is unknown. Expected one of {nearest_first(kernel, KERNELS)}.")
    least = {"attention_window": 0, "attention_global_tokens": 0, "num_random_features": 1, "num_latents": 1}
    for key, value in least.items():
        given = getattr(config, key)
        if given is not None and given < value:
            raise ValueError(f"{key}={given}. Expected at least {value}.")
    if kernel == "linear" and config.attention_dropout:
        raise ValueError(
            f"attention_kernel='linear' forms no attention weights, so attention_dropout={config.attention_dropout} cannot "
            "act. Set attention_dropout=0.0 (hidden_dropout works), or choose another kernel."
        )


@strict
class FeatureSequenceConfig(PreTrainedConfig):
    """Encoder of a sequence of feature vectors: a transformer over `x_values (B, T, ...)`.

    Args:
        feature_size: numbers per step (trailing axes are flattened).
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the transformer.
            `num_hidden_layers=0` gives projected features alone.
        use_positions: adds sine positions; off for a set without order.
        attention_kernel, attention_window, attention_global_tokens, num_random_features, num_latents: as in
            `CrossModalConfig`, for the attention within this encoder.
    """

    model_type = "crossmodal_features"

    feature_size: int = 64
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 256
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_positions: bool = True
    attention_kernel: str = "exact"
    attention_window: int = 64
    attention_global_tokens: int = 0
    num_random_features: int | None = None
    num_latents: int = 16

    def validate_architecture(self):
        _validate_kernel(self)
        if self.attention_kernel == "window" and not self.use_positions:
            raise ValueError(
                "attention_kernel='window' needs steps in order, and use_positions=False says that they have none. Choose "
                "'exact', 'linear' or 'latents'."
            )


@strict
class TextDecoderConfig(PreTrainedConfig):
    """Decoder of `CrossModalForCaptioning`: text, word by word, from the fused tokens of all modalities.

    Args:
        decoder_type: row of `DECODERS` in decoder_crossmodal.py: `"transformer"`, or `"gru"` (recurrent, as in the research
            note; `num_hidden_layers` GRUs, and `num_attention_heads` of the attention on the memory).
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, max_position_embeddings: the
            decoder; its width need not be that of the fusion.
        gated_cross_attention: cross-attention through tanh of a learned number, 0 at the start: a decoder whose weights come
            from a pretrained causal model then begins as that model.
        bos_token_id, eos_token_id, pad_token_id: a text begins with the first and ends with the second.
        label_smoothing: of the cross entropy. loss_chunk_size: words whose scores of all the vocabulary are in memory at once
            in training (None: all).
    """

    model_type = "crossmodal_text_decoder"

    decoder_type: str = "transformer"
    vocab_size: int = 30522
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 128
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    gated_cross_attention: bool = False
    bos_token_id: int = 101
    eos_token_id: int | list[int] = 102
    pad_token_id: int = 0
    label_smoothing: float | int = 0.0
    loss_chunk_size: int | None = None
    tie_word_embeddings: bool = True

    def validate_architecture(self):
        from .decoder_crossmodal import DECODERS

        if self.decoder_type not in DECODERS:
            near = nearest_first(self.decoder_type, DECODERS)
            raise ValueError(f"decoder_type={self.decoder_type!r} is unknown. Expected one of {near}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"decoder: hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}. "
                "Change one of them."
            )
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"decoder: loss_chunk_size={self.loss_chunk_size}. Expected at least 1, or None.")


class _SubConfigs:
    """`sub_configs` as transformers reads it: empty on the class, one row per encoder (and decoder) on an instance."""

    def __get__(self, instance, owner):
        if instance is None:
            return {}
        attributes = vars(instance)
        names = [f"{name}_config" for name in attributes.get("modality_names") or ()]
        names += ["decoder_config"] if attributes.get("decoder_config") is not None else []
        return {name: type(attributes[name]) for name in names if name in attributes}


@strict
class CrossModalConfig(PreTrainedConfig):
    """Configuration of every CrossModal model.

    Args:
        modalities: modality name to its entry: an encoder's transformers config (or its dict with `model_type`), or
            a dict `{"config": ..., "levels": [...], "max_tokens": n, "type": ..., "hidden_sizes": [...]}`. Sugar of
            the constructor: stored as `modality_names`, `<name>_config` and `modality_settings`, because JSON is
            written with sorted keys and would lose the order. `levels` are indices into the encoder's hidden
            states (negative from the end). `max_tokens` pools longer token sequences, and truncates text in the
            processor. With `"type": "video"` an encoder of images reads the frames of a video one by one, of each of which
            `frame_tokens` (1) are kept; `num_frames` are taken of a clip, at even distances (`frame_sampling="uniform"`) or
            one after another from its middle (`"window"`).
        hidden_size, num_attention_heads, num_fusion_layers, intermediate_size: the fusion transformer.
        fusion_type: operator, a row of `FUSIONS` in fusion_crossmodal.py.
        fusion_levels: `"multi"` bridges each fusion layer to its own depth of the encoders, `"single"` only the last
            depth to the first layer (of explicit `levels` too: an ablation is one key).
        fusion_queries: modalities whose tokens the fusion layers of `cross` update (for example `["text"]`: the question
            looks at the image, and the image stays as its encoder left it, at less cost). None: all.
        first_query: modality that looks in the first layer of `interlaced`; None: the first one. Beside points also `"3d"`, the points
            themselves, and `"2d"`, what they are seen in.
        bottleneck, num_latents: of the `bottleneck` operator: `"exchange"` (MBT: latents beside the tokens of every
            modality) or `"resample"` (Perceiver: linear in the number of tokens), and how many latents.
        modality_weighting: `"adaptive"` (learned softmax over the modalities present), `"uncertainty"` (softmax of the
            precision that each modality's own prediction is worth; needs `auxiliary_loss_weight`) or `"uniform"`.
        modality_prior: by name, what the weight of a modality is multiplied by (1 where it is not named) before weights are made
            to sum to 1: how far each can be trusted, where the training rows do not tell.
        task_names: of a model that serves several tasks: the weights then depend on `task_ids` of the forward.
        modality_dropout: in training, the probability that a row loses a modality (never its last one): a number for all,
            or a dict by name.
        missing_tokens: a learned token stands in for a modality that a row lacks, for the others to look at.
        auxiliary_loss_weight: of the losses of one classifier per modality, each on what it knows alone.
        unimodal_evidence: classification heads also see what these classifiers say of the row: a late fusion that is learned beside
            that of features, and which the losses of the head leave the classifiers out of.
        attention_kernel: what computes attention in the fusion (KERNELS of kernels_crossmodal.py): `"exact"`; for long inputs
            `"window"` (each token sees those near its place along a common axis, `attention_window` on each side, and the
            first `attention_global_tokens`), `"linear"` (`num_random_features` positive random features, None: d ln d for
            heads of width d) or `"latents"` (`num_latents` learned ones per head; give it 16 or more).
        gate: what adapts cross attention: `"content"` (bilinear in the stream and what it saw), `"static"` (tanh of a
            learned number per stream, 0 at the start), `"none"`, or `"closed"` (no cross attention at all, for ablations of `cross` and
            `interlaced`; others meet where no gate is).
        pooling: tokens of one modality to one vector: `"attention"`, `"mean"` or `"first"`.
        frozen_modalities: encoders that take no gradient and stay in eval mode.
        classifier_hidden_size: hidden width of classification heads (`None`: twice `hidden_size`).
        classifier_dropout: dropout in the heads.
        label_smoothing: of the cross entropy of classification heads.
        class_weights: one for each label, of the loss of classification heads (of several labels: how often what holds counts
            against what does not); None: all alike.
        thresholds: of several labels, the probability from which on each holds (None: 0.5).
        regression_loss: `"squared"` or `"absolute"`.
        projection_dim: width of the embeddings of `CrossModalForRetrieval`.
        num_unimodal_layers: transformer layers of each modality by itself, of which its embedding is made and on which the
            cross-attention of retrieval stands.
        pooled_features: in classification, the vector of each modality also sees mean and maximum of its encoder's own tokens,
            by one linear layer: on few rows what a linear probe finds is most of what there is.
        pooled_shortcut: in retrieval, embeddings also see mean and maximum of the encoder's own tokens.
        contrastive_loss: `"info_nce"`, `"sigmoid"` (SigLIP) or `"triplet"` (hardest negatives, with `triplet_margin`).
        contrastive_chunk_size: rows of a tile of similarities of `info_nce` (None: all at once).
        logit_scale_init_value: logarithm of the first 1 / temperature.
        matching: how cross-attention scores a pair: `"classifier"` (does it belong together) or `"cosine"` (of the fused
            vectors of both, added to that of the embeddings with the weight `matching_alpha`, with triplets: MMCA), or
            `"ranking"` (what it adds to the similarity of the embeddings, learnt so that a pair comes before
            `matching_negatives` others that look alike).
        matching_hardness: negatives are drawn by how alike embeddings say that they are, and by chance once a row's own pair is far
            ahead of them (1); or less so, down to by chance alone (0).
        rank_weight: of what cross-attention says, beside the embeddings, when candidates are ranked.
        query_bank_size: embeddings of so many training rows are kept of each modality, and when candidates are ranked, what an input
            is like to all of them is taken from its scores, times `query_bank_weight`: some inputs are near to everything.
        alignment: how tokens of two rows are compared: `"recovery"` (each from what it sees in the other row: SCAN, GLoRIA) or
            `"late_interaction"` (each with its nearest: FILIP).
        contrastive_weight, matching_weight, alignment_weight, cross_weight: of the four losses of retrieval; 0 leaves one
            out. `cross_weight` is that of the research note's own loss, which collapses (see `cross_attention_penalty`).
        loss_weighting: `"fixed"`, or `"learned"`: by the uncertainty of each loss.
        decoder_config: TextDecoderConfig of `CrossModalForCaptioning`, or its fields.
        detach_global, detach_local: keep the contrast, or the cross-attention, from training what both stand on.
        supervision: of `CrossModalForPointSegmentation`: `"tags"`, the classes that are somewhere in a scene, or `"full"`, a label of
            every point that has one.
        voxel_size: edge of the supervoxels of a grid, in units of the coordinates, where none are given.
        view_tokens: each view of a scene is one token, its mean (`"mean"`), or one for each patch (`"grid"`).
        point_projection: what points take of the image at the places where they are seen: `"none"`, image features beside their own
            (`"add"`), or those alone (`"only"`: points are labelled in 2D).
        class_token_weight, smoothness_weight: of these losses of points; `contrastive_weight` is that of their contrast of classes, and
            `present_classes_only` keeps classes out of it that a scene does not have.
        activation_power: of the mean over supervoxels in the loss of class activation: 1 is MIT's; larger ones let the best places of a
            class count more, so that classes of a scene need not be of one size.
        pseudo_label_threshold: least activation of a supervoxel that becomes a pseudo-label.

    Raises:
        ValueError: for a near miss of a known key, and for combinations that cannot work, naming key, value,
            what is allowed and the fix.

    Example:
        >>> config = CrossModalConfig(modalities={"vision": ViTConfig(), "text": BertConfig()}, hidden_size=256)
    """

    model_type = "crossmodal"
    attribute_map = {"num_hidden_layers": "num_fusion_layers"}
    sub_configs = _SubConfigs()
    # What Trainer leaves out of predictions: only logits are gathered over an evaluation.
    keys_to_ignore_at_inference = [
        "modality_weights",
        "pooler_output",
        "modality_tokens",
        "token_grids",
        "auxiliary_logits",
        "auxiliary_losses",
        "cross_attentions",
        "logits_per_image",
        "logits_per_text",
        "image_embeds",
        "text_embeds",
        "match_logits",
        "losses",
        "scene_logits",
        "segments",
        "class_scores",
    ]

    modality_names: list[str] | None = None
    modality_settings: dict[str, dict] = field(default_factory=dict)
    hidden_size: int = 256
    num_attention_heads: int = 4
    num_fusion_layers: int = 2
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    fusion_type: str = "cross"
    fusion_levels: str = "multi"
    fusion_queries: list[str] | None = None
    first_query: str | None = None
    bottleneck: str = "exchange"
    num_latents: int = 4
    modality_weighting: str = "adaptive"
    modality_prior: dict | None = None
    task_names: list[str] | None = None
    modality_dropout: float | int | dict[str, float] = 0.0
    missing_tokens: bool = False
    auxiliary_loss_weight: float | int = 0.0
    unimodal_evidence: bool = False
    attention_kernel: str = "exact"
    attention_window: int = 64
    attention_global_tokens: int = 0
    num_random_features: int | None = None
    gate: str = "content"
    pooling: str = "attention"
    frozen_modalities: list[str] = field(default_factory=list)
    classifier_hidden_size: int | None = None
    classifier_dropout: float | int = 0.1
    label_smoothing: float | int = 0.0
    class_weights: list[float] | None = None
    thresholds: list[float] | None = None
    regression_loss: str = "squared"
    projection_dim: int = 256
    num_unimodal_layers: int = 0
    pooled_features: bool = False
    pooled_shortcut: bool = True
    contrastive_loss: str = "info_nce"
    contrastive_chunk_size: int | None = None
    triplet_margin: float | int = 0.2
    logit_scale_init_value: float | int = 2.6592
    matching: str = "classifier"
    matching_alpha: float | int = 0.1
    matching_hardness: float | int = 1.0
    rank_weight: float | int = 1.0
    query_bank_size: int = 0
    query_bank_weight: float | int = 0.5
    matching_negatives: int = 4
    alignment: str = "recovery"
    contrastive_weight: float | int = 1.0
    matching_weight: float | int = 1.0
    alignment_weight: float | int = 0.0
    cross_weight: float | int = 0.0
    loss_weighting: str = "fixed"
    detach_global: bool = False
    detach_local: bool = False
    supervision: str = "tags"
    voxel_size: float | int = 0.2
    view_tokens: str = "mean"
    point_projection: str = "none"
    class_token_weight: float | int = 1.0
    smoothness_weight: float | int = 1.0
    present_classes_only: bool = False
    activation_power: float | int = 1.0
    pseudo_label_threshold: float | int = 0.5
    decoder_config: dict | PreTrainedConfig | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if isinstance(self.decoder_config, dict):
            given = {key: value for key, value in self.decoder_config.items() if key != "model_type"}
            self.decoder_config = TextDecoderConfig(**given)
        # For transformers' generation, which reads the memory once and its own words step by step.
        self.is_encoder_decoder = self.decoder_config is not None
        kwargs.pop("is_encoder_decoder", None)
        auto_map = {**_AUTO_MAP, **(kwargs.pop("auto_map", None) or {})}
        modalities = kwargs.pop("modalities", None)
        stored = {
            name: kwargs.pop(f"{name}_config") for name in self.modality_names or () if f"{name}_config" in kwargs
        }
        self._reject_near_misses(kwargs, stored)
        if modalities is not None and stored:
            raise ValueError(
                f"modalities={list(modalities)} and {[f'{n}_config' for n in stored]} were both given. Give "
                "modalities alone."
            )
        if modalities is None and not self.modality_names:
            modalities = {"vision": CONFIG_MAPPING["vit"](), "text": CONFIG_MAPPING["bert"]()}
        self._set_modalities(stored if modalities is None else modalities)
        if self.first_query in ("3d", "2d"):
            types, in_space = self.modality_settings, self.first_query == "3d"
            wanted = [name for name in self.modality_names if (types[name]["type"] == "points") == in_space]
            self.first_query = wanted[0] if wanted else self.first_query
        # Without a choice for the whole, transformers would take from each encoder the one that it has.
        chosen = {
            f"{name}_config": getattr(self, f"{name}_config")._attn_implementation for name in self.modality_names
        }
        if self.decoder_config is not None:
            chosen["decoder_config"] = self.decoder_config._attn_implementation
        kwargs["attn_implementation"] = kwargs.get("attn_implementation") or chosen
        super().__post_init__(**kwargs)
        self.auto_map = auto_map
        if self.label2id is None and self.id2label is not None:
            self.label2id = {label: index for index, label in self.id2label.items()}

    def _set_modalities(self, modalities):
        """Spreads the mapping of modalities over `modality_names`, `<name>_config` and `modality_settings`."""
        names = list(self.modality_names or modalities)
        if not modalities or sorted(names) != sorted(modalities):
            raise ValueError(
                f"modality_names={names} but encoder configs are given for {list(modalities)}. Every modality needs "
                "one entry, e.g. modalities={'vision': ViTConfig(), 'text': BertConfig()}."
            )
        settings = {name: dict(values) for name, values in self.modality_settings.items()}
        for name in names:
            if not name.isidentifier() or hasattr(type(self), f"{name}_config") or name == "modality":
                raise ValueError(f"modality name {name!r} is not usable: give a Python identifier such as 'vision'.")
            entry = modalities[name]
            if isinstance(entry, dict) and "model_type" not in entry:
                unknown = [key for key in entry if key not in ENTRY_KEYS]
                if unknown or "config" not in entry:
                    raise ValueError(
                        f"modality {name!r}: its entry has keys {sorted(entry)}. Expected 'config' and any of "
                        f"{nearest_first(unknown[0], ENTRY_KEYS) if unknown else ENTRY_KEYS}."
                    )
                settings[name] = {**settings.get(name, {}), **{k: v for k, v in entry.items() if k != "config"}}
                entry = entry["config"]
            encoder = _as_config(name, entry)
            if Path(encoder._name_or_path).is_absolute() or Path(encoder._name_or_path).exists():
                # Where an encoder lay on this machine has no place in a config that will be published.
                encoder._name_or_path = ""
            setattr(self, f"{name}_config", encoder)
        self.modality_names = names
        self.modality_settings = {name: self._complete_settings(name, settings.get(name, {})) for name in names}

    def _complete_settings(self, name, settings):
        """Fills in what follows from the encoder's config: type, input key and the depths that are tapped."""
        encoder = getattr(self, f"{name}_config")
        settings = {key: value for key, value in settings.items() if value is not None}
        if "type" not in settings:
            settings["type"], settings["input"] = _encoder_type_and_input(name, encoder)
        if settings["type"] not in TYPE_INPUTS:
            raise ValueError(
                f"modality {name!r}: type={settings['type']!r} is unknown. Expected one of "
                f"{nearest_first(settings['type'], TYPE_INPUTS)}."
            )
        settings.setdefault("input", TYPE_INPUTS[settings["type"]][0])
        limit = settings.get("max_tokens")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(
                f"modality {name!r}: max_tokens={limit!r}. Expected a whole number of at least 1, or None."
            )
        context = settings.get("context", 0)
        if not isinstance(context, int) or context < 0 or (context and settings["type"] != "features"):
            raise ValueError(
                f"modality {name!r}: context={context!r} of type {settings['type']!r}. Expected a whole number of neighbours on each "
                "side, of a modality of type 'features'."
            )
        views = settings.get("views")
        if views is not None and (settings["type"] != "vision" or not isinstance(views, int) or views < 1 or limit):
            raise ValueError(
                f"modality {name!r}: views={views!r} of type {settings['type']!r}, max_tokens={limit!r}. Expected a whole number of images "
                "of a row, at least 1, of a modality of type 'vision' without max_tokens."
            )
        window = settings.get("window")
        if window is not None and (settings["type"] != "eeg" or len(window) != 2 or min(window) <= 0):
            raise ValueError(
                f"modality {name!r}: window={window!r} of type {settings['type']!r}. Expected [seconds, seconds from one to the next], "
                "above 0, of a modality of type 'eeg'."
            )
        self._complete_frames(name, settings)
        return settings

    def _complete_frames(self, name, settings):
        """What the settings of a modality say of the frames of a video; an encoder of images reads them one by one."""
        keys = ("num_frames", "frame_sampling", "frame_tokens")
        if settings["type"] != "video":
            if wrong := [key for key in keys if key in settings]:
                raise ValueError(
                    f"modality {name!r}: {wrong[0]}={settings[wrong[0]]!r} of type {settings['type']!r}. Only a modality of type 'video' "
                    "has frames: give its entry 'type': 'video'."
                )
            return
        encoder = getattr(self, f"{name}_config")
        reads = "video" if encoder.model_type == "crossmodal_custom" else _encoder_type_and_input(name, encoder)[0]
        if reads == "vision":
            settings.setdefault("frame_tokens", 1)
        elif reads != "video" or "frame_tokens" in settings:
            raise ValueError(
                f"modality {name!r} of type 'video': an encoder of type {encoder.model_type!r} reads {reads}, not images. Give an encoder "
                "of images, whose frame_tokens can be said, or one of videos."
            )
        for key in ("num_frames", "frame_tokens"):
            if key in settings and (not isinstance(settings[key], int) or settings[key] < 1):
                raise ValueError(
                    f"modality {name!r}: {key}={settings[key]!r}. Expected a whole number of at least 1, or None."
                )
        if settings.get("frame_sampling", "uniform") not in FRAME_SAMPLINGS:
            near = nearest_first(settings["frame_sampling"], FRAME_SAMPLINGS)
            raise ValueError(
                f"modality {name!r}: frame_sampling={settings['frame_sampling']!r} is unknown. Expected one of {near}."
            )
        if "frame_tokens" in settings and "max_tokens" in settings:
            raise ValueError(
                f"modality {name!r}: max_tokens={settings['max_tokens']} would mix frames. Say num_frames, and frame_tokens of each."
            )

    def levels_of(self, name):
        """Depths of encoder `name` that are bridged to fusion layers 0, 1, ... (indices into its levels)."""
        sizes = self.level_sizes_of(name)
        explicit = self.modality_settings[name].get("levels")
        if explicit is not None:
            levels = [_normalise_level(name, level, len(sizes)) for level in explicit]
            return levels[-1:] if self.fusion_levels == "single" else levels
        if self.fusion_levels == "single":
            return [len(sizes) - 1]
        deepest, count = len(sizes) - 1, self.num_fusion_layers
        if deepest < count and count > 1:
            # An encoder this shallow gives its embeddings too: what single words are is not seen twice after one layer.
            return [round(deepest * i / (count - 1)) for i in range(count)]
        return [max(1, round(deepest * (i + 1) / count)) if deepest else 0 for i in range(count)]

    def level_sizes_of(self, name):
        """Width of every level that encoder `name` offers."""
        encoder = getattr(self, f"{name}_config")
        sizes = self.modality_settings[name].get("hidden_sizes") or level_sizes(encoder)
        if sizes is None:
            raise ValueError(
                f"modality {name!r}: the widths of an encoder of model_type={encoder.model_type!r} cannot be read off "
                "its config. Give them in the entry: {'config': ..., 'hidden_sizes': [width of each hidden state]}."
            )
        return sizes

    def dropout_of(self, name):
        """Probability that a row of training loses modality `name`."""
        rates = self.modality_dropout
        return rates.get(name, 0.0) if isinstance(rates, dict) else rates

    def input_keys(self, name):
        """Keys under which a batch carries modality `name`: (values, mask or None).

        The first modality of a kind takes the bare key of its encoder (`pixel_values`), later ones and feature
        sequences are prefixed with the name (`left_pixel_values`, `eeg_values`, `eeg_mask`).
        """
        kind = self.modality_settings[name]["type"]
        values, mask = self.modality_settings[name]["input"], TYPE_INPUTS[kind][1]
        if "frame_tokens" in self.modality_settings[name]:
            mask = "video_attention_mask"
        first = next(n for n in self.modality_names if self.modality_settings[n]["input"] == values)
        prefix = "" if kind not in NAMED_TYPES and name == first else f"{name}_"
        return f"{prefix}{values}", mask and f"{prefix}{mask}"

    @classmethod
    def from_preset(cls, name, **overrides):
        """A named size of the family: `"tiny"`, `"small"` or `"base"` (the JSON files of configs/models).

        Raises:
            ValueError: for an unknown preset, naming the ones there are.
        """
        try:
            from crossmodal.configs import load_preset
        except ImportError as error:
            raise ImportError(
                "Presets are part of the installed package. Run `pip install crossmodal`, or write the config out."
            ) from error
        return cls(**{**load_preset(name), **overrides})

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        stored = [f"{name}_config" for name in config_dict.get("modality_names") or ()]
        cls._reject_near_misses({k: v for k, v in kwargs.items() if k not in config_dict}, stored)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _reject_near_misses(cls, given, also_known=()):
        """Unknown keys are kept, as transformers does, unless they look like a known one written wrong."""
        known = {f.name for f in fields(cls)} | set(also_known)
        known |= {"modalities", "num_labels", "num_hidden_layers", "output_attentions", "attn_implementation"}
        # Known to transformers' loaders and savers, and close to nothing of ours by accident only.
        tolerated = {"torch_dtype", "_attn_implementation", "_output_attentions", "_name_or_path", "name_or_path"}
        for key in given:
            if key in known or key in tolerated or key.startswith("_"):
                continue
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.8)
            if near:
                raise ValueError(
                    f"{key}={given[key]!r:.80} is not a key of CrossModalConfig. Did you mean {near[0]!r}? Nearest "
                    f"known keys: {near}. Correct the name, or remove it."
                )

    def validate_architecture(self):
        """Combinations of fields that cannot work. Called on construction, and by every model before it is built."""
        from .fusion_crossmodal import FUSIONS

        if self.fusion_type not in FUSIONS:
            raise ValueError(
                f"fusion_type={self.fusion_type!r} is unknown. Expected one of "
                f"{nearest_first(self.fusion_type, FUSIONS)}. Correct the config, or add the operator to FUSIONS in "
                "fusion_crossmodal.py."
            )
        for key, allowed in {
            "fusion_levels": FUSION_LEVELS,
            "modality_weighting": MODALITY_WEIGHTINGS,
            "gate": GATES,
            "bottleneck": BOTTLENECKS,
            "pooling": POOLINGS,
            "contrastive_loss": CONTRASTIVE_LOSSES,
            "matching": MATCHINGS,
            "alignment": ALIGNMENTS,
            "loss_weighting": LOSS_WEIGHTINGS,
            "regression_loss": REGRESSION_LOSSES,
            "supervision": SUPERVISIONS,
            "view_tokens": VIEW_TOKENS,
            "point_projection": POINT_PROJECTIONS,
        }.items():
            value = getattr(self, key)
            if value not in allowed:
                raise ValueError(f"{key}={value!r} is unknown. Expected one of {nearest_first(value, allowed)}.")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type={self.problem_type!r} is unknown. Expected one of {PROBLEM_TYPES}.")
        if self.gate == "closed" and not FUSIONS[self.fusion_type].closes:
            closing = [name for name, operator in FUSIONS.items() if operator.closes]
            raise ValueError(
                f"gate='closed' leaves the cross-attention of {closing} out, and fusion_type={self.fusion_type!r} has none that it could "
                "close. Choose one of these operators, or fusion_type='concat', where modalities do not meet, with another gate."
            )
        self._validate_classes()
        _validate_kernel(self)
        self._validate_axes()
        for key in (
            "hidden_size", "num_attention_heads", "num_fusion_layers", "intermediate_size", "matching_negatives",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}. Expected at least 1.")
        for key in ("matching_hardness", "query_bank_size", "query_bank_weight"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}. Expected 0 or more.")
        if self.contrastive_chunk_size is not None and (
            self.contrastive_chunk_size < 1 or self.contrastive_loss != "info_nce"
        ):
            raise ValueError(
                f"contrastive_chunk_size={self.contrastive_chunk_size} with contrastive_loss={self.contrastive_loss!r}. Expected at "
                "least 1, with 'info_nce', the only loss in tiles; or None."
            )
        if self.hidden_size % self.num_attention_heads:
            divisors = [h for h in range(1, self.hidden_size + 1) if self.hidden_size % h == 0]
            nearest = sorted(divisors, key=lambda h: abs(h - self.num_attention_heads))[:4]
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}. "
                f"Allowed numbers of heads for this width: {nearest} (nearest first), or change hidden_size."
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size}. Expected a multiple of 4: positions on a grid take a sine and a "
                "cosine of each axis."
            )
        for name in self.modality_names:
            levels = self.levels_of(name)
            if not 1 <= len(levels) <= self.num_fusion_layers:
                raise ValueError(
                    f"modality {name!r}: levels={levels} has {len(levels)} depths for "
                    f"num_fusion_layers={self.num_fusion_layers}. Give 1 to {self.num_fusion_layers}: the i-th depth "
                    "is bridged to the i-th fusion layer."
                )
        for key in ("frozen_modalities", "fusion_queries"):
            for name in getattr(self, key) or ():
                if name not in self.modality_names:
                    raise ValueError(
                        f"{key}={getattr(self, key)}: {name!r} is no modality of this model. Allowed: "
                        f"{nearest_first(name, self.modality_names)}."
                    )
        if self.first_query is not None and self.first_query not in self.modality_names:
            raise ValueError(
                f"first_query={self.first_query!r} is no modality of this model. Allowed: "
                f"{nearest_first(self.first_query, self.modality_names)}."
            )
        if self.fusion_type == "interlaced" and len(self.modality_names) < 2:
            raise ValueError(
                f"fusion_type='interlaced' alternates between modalities, and modality_names={self.modality_names} has "
                "one. Add a modality, or choose another operator: 'cross', 'joint', 'bottleneck' and 'concat' take one."
            )
        by_name = {
            "modality_dropout": self.modality_dropout if isinstance(self.modality_dropout, dict) else {},
            "modality_prior": self.modality_prior or {},
        }
        for key, values in by_name.items():
            for name in values:
                if name not in self.modality_names:
                    raise ValueError(
                        f"{key}={values}: {name!r} is no modality of this model. Allowed: "
                        f"{nearest_first(name, self.modality_names)}."
                    )
        if not all(value > 0 for value in by_name["modality_prior"].values()):
            raise ValueError(
                f"modality_prior={self.modality_prior}. Expected numbers above 0: a modality that is not to count is left out."
            )
        for name in self.modality_names:
            if not 0 <= self.dropout_of(name) < 1:
                raise ValueError(
                    f"modality_dropout={self.modality_dropout!r}. Expected probabilities from 0 to below 1."
                )
        if self.modality_weighting == "uncertainty" and not self.auxiliary_loss_weight:
            raise ValueError(
                "modality_weighting='uncertainty' is taught by the losses of each modality alone, and "
                "auxiliary_loss_weight=0. Give it a weight, for example 0.3, or choose 'adaptive'."
            )
        if self.unimodal_evidence and not self.auxiliary_loss_weight:
            raise ValueError(
                "unimodal_evidence=True is what classifiers of each modality alone say, and auxiliary_loss_weight=0 leaves them out. Give "
                "it a weight, for example 0.3."
            )
        if self.voxel_size <= 0 or self.activation_power < 1 or not 0 <= self.pseudo_label_threshold <= 1:
            raise ValueError(
                f"voxel_size={self.voxel_size}, activation_power={self.activation_power}, pseudo_label_threshold="
                f"{self.pseudo_label_threshold}. Expected a size above 0, a power of at least 1, and a threshold from 0 to 1."
            )
        if self.fusion_queries == []:
            raise ValueError("fusion_queries=[] leaves nothing to fuse. Name at least one modality, or give None.")

    def _validate_classes(self):
        """Whether what is said of each label fits their number."""
        for key, low, high in (("class_weights", 0, float("inf")), ("thresholds", 0, 1)):
            values = getattr(self, key)
            if values is not None and (
                len(values) != self.num_labels or not all(low <= value <= high for value in values)
            ):
                raise ValueError(
                    f"{key}={values}. Expected {self.num_labels} numbers from {low} to {high}, one for each label, or None."
                )

    def _validate_axes(self):
        """Whether the kernel fits the operator, and the axes of the modalities."""
        kernel, operator = self.attention_kernel, self.fusion_type
        if operator == "mutual" and kernel != "exact":
            raise ValueError(
                f"fusion_type='mutual' is exact attention without parameters, and attention_kernel={kernel!r}. Choose "
                "'exact', or another operator."
            )
        if kernel != "window":
            return
        if operator in ("joint", "bottleneck"):
            raise ValueError(
                f"attention_kernel='window' needs one axis that queries and keys share, and fusion_type={operator!r} puts "
                "tokens of several modalities, or latents, in one sequence. Choose 'cross' or 'interlaced', or the kernel "
                "'linear'."
            )
        for name in self.modality_names:
            kind = self.modality_settings[name]["type"]
            encoder = getattr(self, f"{name}_config")
            # Patches of a spectrogram (AST) are a grid too, and points lie in no order.
            grid = kind in ("vision", "points") or (kind == "audio" and getattr(encoder, "patch_size", None))
            if grid or not getattr(encoder, "use_positions", True):
                raise ValueError(
                    f"attention_kernel='window' needs tokens in order along an axis that all modalities share, and modality "
                    f"{name!r} (type {kind!r}) has none. Choose 'exact', 'linear' or 'latents'."
                )

    def get_text_config(self, decoder=None, encoder=None):
        # Generation makes its caches by the decoder's: a text encoder's must not pass for it.
        if self.decoder_config is not None and not encoder:
            return self.decoder_config
        texts = [name for name in self.modality_names if self.modality_settings[name]["type"] == "text"]
        return getattr(self, f"{texts[0]}_config") if texts and not decoder else self


def _validate(config):
    """Every `validate_*` check. `@strict` would wrap the ValueError into one of its own that is none."""
    for validator in config.__class_validators__:
        validator(config)


CrossModalConfig.validate = FeatureSequenceConfig.validate = TextDecoderConfig.validate = _validate
FeatureSequenceConfig.register_for_auto_class()
TextDecoderConfig.register_for_auto_class()
CrossModalConfig.register_for_auto_class()
