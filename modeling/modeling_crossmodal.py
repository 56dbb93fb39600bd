"""The base of every CrossModal model: encoders of any modality, fused by cross-modal attention.

`CrossModalModel.forward` reads as encode, project, fuse. Heads, in files of their own, turn its output into logits and a loss.

Letters: B batch, T_m tokens of modality m, D hidden_size, M modalities.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple, logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .adapters_crossmodal import check_adapter
from .attention_crossmodal import Dropout
from .card_crossmodal import UNFILLED, plain_card
from .composing_crossmodal import load_encoder
from .configuration_crossmodal import CrossModalConfig, nearest_first
from .contrastive_crossmodal import is_distributed
from .editing_crossmodal import edit_modalities
from .encoders_crossmodal import (
    ENCODERS,
    CustomEncoderConfig,
    blank_input,
    build_encoder,
    encode_modality,
    freeze_untrained,
    grid_positions,
    has_batch_norm,
    keep_all_layers,
    keeping_statistics,
    limit_tokens,
    pack_tokens,
    sine_positions,
    supported_attention,
    unpack_tokens,
)
from .fusion_crossmodal import FUSIONS, StaticGate
from .grouping_crossmodal import alike_rows, of_rows
from .kernels_crossmodal import initialise_kernel
from .pooling_crossmodal import ModalityWeighting, PooledShortcut, TokenPooling, masked_mean


logger = logging.get_logger(__name__)

# Handed down by transformers, Trainer and accelerate to any forward.
_PASSTHROUGH = {"num_items_in_batch", "return_dict", "output_hidden_states", "use_cache", "token_type_ids"}


@dataclass
class CrossModalOutput(ModelOutput):
    """Output of the base model.

    last_hidden_state: fused tokens of all modalities present, in the order of the config (B, sum of T_m, D).
    attention_mask: their mask (B, sum of T_m) bool, True for real tokens.
    pooler_output: the weighted representation (B,D).
    modality_weights: (B,M), 0 for the absent, rows sum to 1.
    modality_embeddings: (B,M,D), one pooled vector per modality, 0 for the absent.
    unimodal_embeddings: (B,M,D), the same before any fusion, where `auxiliary_loss_weight` asks for it.
    modality_log_variances: (B,M), with `modality_weighting="uncertainty"`.
    presence: (B,M) bool, the modalities that each row had (after modality dropout).
    modality_tokens: {modality: (B,T_m,D)}, with output_hidden_states=True.
    token_grids: {modality: (h, w)} for modalities whose last h*w tokens are patches in rows.
    cross_attentions: per fusion layer {"m<-n": (B,heads,T_m,T_n)}, with output_attentions=True.
    """

    last_hidden_state: torch.FloatTensor | None = None
    attention_mask: torch.BoolTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    modality_weights: torch.FloatTensor | None = None
    modality_embeddings: torch.FloatTensor | None = None
    unimodal_embeddings: torch.FloatTensor | None = None
    modality_log_variances: torch.FloatTensor | None = None
    presence: torch.BoolTensor | None = None
    modality_tokens: dict[str, torch.FloatTensor] | None = None
    token_grids: dict[str, tuple[int, int]] | None = None
    cross_attentions: tuple[dict[str, torch.FloatTensor], ...] | None = None


class ModalityProjection(nn.Module):
    """Levels of one encoder at the fusion width: P^l X^l + type [+ positions on a grid] [+ position in time of a frame]."""

    def __init__(self, config, name):
        super().__init__()
        sizes = config.level_sizes_of(name)
        widths = [sizes[level] for level in config.levels_of(name)]
        # Depths of an encoder differ in scale by orders of magnitude: each is normalised before it is projected.
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=config.layer_norm_eps) for width in widths])
        self.projections = nn.ModuleList([nn.Linear(width, config.hidden_size) for width in widths])
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, encoded, modality_type):
        """encoded: EncodedModality, modality_type (D,). Returns a list of (B,T,D), one per level."""
        shift, (width, device) = modality_type, (modality_type.shape[-1], modality_type.device)
        if encoded.grid is not None and not encoded.positioned:
            shift = shift + grid_positions(*encoded.grid, width, device).to(shift.dtype).repeat(encoded.views, 1)
        if encoded.frames is not None:
            times = sine_positions(torch.arange(encoded.frames, device=device), width).to(shift.dtype)
            tokens = encoded.levels[0].shape[1] // encoded.frames
            shift = (times[:, None] + shift.expand(tokens, width)).flatten(0, 1)
        return [
            self.dropout(project(norm(level.to(norm.weight.dtype))) + shift)
            for norm, project, level in zip(self.norms, self.projections, encoded.levels, strict=True)
        ]


class CrossModalPreTrainedModel(PreTrainedModel):
    """Loading, saving, composing and freezing, for every model of the family."""

    config: CrossModalConfig
    base_model_prefix = "crossmodal"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text", "audio", "video")
    supports_gradient_checkpointing = True
    # Whether the loss is a mean over what `num_items_in_batch` counts. Else Trainer divides by accumulation steps and ranks.
    accepts_loss_kwargs = False
    _no_split_modules = [
        "CrossFusionLayer",
        "JointFusionLayer",
        "ExchangeLayer",
        "ResampleLayer",
        "FeatureSequenceLayer",
        "DecoderLayer",
        "InterlacedDecoderLayer",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config, *args, **kwargs):
        # `from_pretrained(hidden_size=33)` sets attributes one by one: only here is the whole known.
        config.validate()
        super().__init__(config, *args, **kwargs)

    def post_init(self):
        super().post_init()
        # With those of the encoders. Accelerate stops at a name of which a model has no module.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @torch.no_grad()
    def _init_weights(self, module):
        # Leaves only: for remote code transformers never calls this on a module without parameters of its own.
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.GRU):
            for name, values in module.named_parameters():
                init.zeros_(values) if "bias" in name else init.xavier_uniform_(values)
        elif isinstance(module, StaticGate):
            init.zeros_(module.weight)
        initialise_kernel(module)
        for name, value in getattr(module, "initial_values", {}).items():
            init.constant_(getattr(module, name), value)

    def _share_of_step(self, num_items_in_batch, labels, **batch):
        """The part that a batch is of its training step, of which a loss is a mean: over all rows of its accumulation steps and
        processes, and not over their means.

        num_items_in_batch: the sum of `count_items` over the step, as `CrossModalTrainer` gives it, or transformers' own scalar,
        the number of labels that are not -100. Returns (1,), or (1+M,) as `count_items`.
        """
        given = torch.as_tensor(num_items_in_batch, device=labels.device)
        own = self.count_items(labels, **batch) if given.dim() == 1 else (labels != -100).sum().view(1)
        return own / given.float().view(-1).clamp(min=torch.finfo(torch.float32).tiny)

    @property
    def _base(self):
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self):
        """The word embeddings of the first text encoder."""
        for name in self.config.modality_names:
            if self.config.modality_settings[name]["type"] == "text":
                return self._base.encoders[name].get_input_embeddings()
        # What transformers' own models raise here, and its callers (resizing, peft, checkpointing) catch.
        raise NotImplementedError(f"None of the modalities {self.config.modality_names} is text.")

    def set_input_embeddings(self, value):
        for name in self.config.modality_names:
            if self.config.modality_settings[name]["type"] == "text":
                self._base.encoders[name].set_input_embeddings(value)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **kwargs):
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True loses the gradients of streams, which travel between layers in dicts. Pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, the default."
            )
        given = (
            {} if gradient_checkpointing_func is None else {"gradient_checkpointing_func": gradient_checkpointing_func}
        )
        super()._set_gradient_checkpointing(enable=enable, **given, **kwargs)

    def freeze(self, *names):
        """Takes encoders out of training, by modality name; they stay in eval mode. Saved with the config."""
        self._set_frozen({*self.config.frozen_modalities, *self._known(names)})

    def unfreeze(self, *names):
        """Puts encoders back into training, by modality name."""
        self._set_frozen({*self.config.frozen_modalities} - set(self._known(names)))

    def _known(self, names):
        for name in names:
            if name not in self.config.modality_names:
                near = nearest_first(name, self.config.modality_names)
                raise ValueError(f"{name!r} is no modality of this model. Allowed: {near}.")
        return names

    def _set_frozen(self, frozen):
        self.config.frozen_modalities = [name for name in self.config.modality_names if name in frozen]
        self._apply_freezing()

    def _apply_freezing(self):
        """Takes out of training what the config says, and what no loss reaches."""
        self._base._apply_freezing()

    def set_attn_implementation(self, attn_implementation, **kwargs):
        if isinstance(attn_implementation, str):
            wanted = {"": attn_implementation}
            for name in self.config.modality_names:
                encoder = self._base.encoders[name]
                if isinstance(encoder, PreTrainedModel):
                    wanted[f"{name}_config"] = supported_attention(attn_implementation, type(encoder))
            attn_implementation = wanted
        return super().set_attn_implementation(attn_implementation, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        for name in self.config.modality_names:
            encoder_config = getattr(self.config, f"{name}_config")
            if encoder_config.model_type == CustomEncoderConfig.model_type:
                raise ValueError(
                    f"modality {name!r} was composed from a module of class {encoder_config.class_name!r}, which no "
                    f"process without that class could load. Shipped types: {sorted(ENCODERS)} and every transformers "
                    "encoder. Add the class to ENCODERS in encoders_crossmodal.py with a config of its own, or "
                    "save `model.state_dict()` for your own use."
                )
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        card = Path(working_dir) / "README.md"
        if UNFILLED in card.read_text(encoding="utf-8"):
            card.write_text(plain_card(self, repo_id), encoding="utf-8")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading replaces parameters by new ones, all of which require a gradient. With an adapter peft has the say.
        if not model._hf_peft_config_loaded:
            model._apply_freezing()
        return loaded

    def load_adapter(self, peft_model_id=None, *args, adapter_kwargs=None, **kwargs):
        """transformers' own, for an adapter that was made for this model.

        Raises:
            ValueError: if it was made for another one.
        """
        if peft_model_id is not None:
            known = ("token", "revision", "cache_dir", "local_files_only", "subfolder")
            given = {**getattr(kwargs.get("load_config"), "download_kwargs", {}), **(adapter_kwargs or {}), **kwargs}
            download = {key: value for key, value in given.items() if key in known and value is not None}
            check_adapter(self, peft_model_id, **download)
        return super().load_adapter(peft_model_id, *args, adapter_kwargs=adapter_kwargs, **kwargs)

    @staticmethod
    def config_fields():
        """Arguments of `from_encoders` that are no modality."""
        return {*CrossModalConfig.__dataclass_fields__, "num_labels", "num_hidden_layers", "attn_implementation"}

    def with_modalities(self, add=None, drop=(), swap=None, **overrides):
        """This model with other modalities or encoders, and every weight that still fits. The model itself stays as it is.

        Weights are found by the names of modalities, also those in rows by modality. A modality that is added, or whose encoder is
        swapped for one of another type or size, begins anew where it meets the fusion: train it (`freeze` the rest to train it alone).

        Args:
            add: {new modality: its encoder}. swap: {modality: another encoder}. Encoders as in `from_encoders`.
            drop: modalities to leave out.
            overrides: fields of the config that change with them, such as `fusion_type` where one modality is left.

        Returns:
            the new model, and an EditReport of the weights that were loaded, are new, and were left behind. It needs a processor of its
            own: `CrossModalProcessor.from_encoders(model.config, ...)`.

            The outputs are those of this model on rows that lack what was dropped or added, but with `missing_tokens` (what is missing
            has a token) and with `fusion_type="interlaced"` (whose layers are dealt out among the modalities).

        Raises:
            ValueError: for a name that is no modality, or is one already, and for what the config or the head cannot be without.

        Example:
            >>> model, report = model.with_modalities(add={"audio": "openai/whisper-tiny"}, drop=["eeg"])
            >>> print(report)
        """
        return edit_modalities(self, add, drop, swap, **overrides)

    @staticmethod
    def check_config(config):
        """Raises ValueError for a whole config that this head does not serve; nothing is built."""

    @staticmethod
    def default_fields(modalities):
        """Fields of `CrossModalConfig` of which this head has defaults of its own, given the names of its modalities."""
        return {}

    @classmethod
    def from_encoders(cls, *, freeze=(), **named):
        """Composes a model from any encoders, by modality name.

        Args:
            freeze: names of encoders to keep as they are (eval mode, no gradient).
            named: modality name to a Hub id, a local folder, a transformers config (random weights), a
                `PreTrainedModel`, a module that keeps the contract of `ENCODERS` (with `level_sizes`), or a dict
                `{"model": any of these, "levels": [...], "max_tokens": n, "type": ...}`; and fields of
                `CrossModalConfig` to override. Of a model with several towers (CLIP, SigLIP, CLAP, Whisper) the one
                that fits the name or the "type" is taken.

        Returns:
            A model with the encoders' weights and fresh fusion and head.

        Example:
            >>> model = CrossModalForVQA.from_encoders(
            ...     vision="google/vit-base-patch16-224", text="bert-base-uncased", freeze=("vision",), num_labels=3129
            ... )
        """
        overrides, encoders = {}, {}
        for name, value in named.items():
            (overrides if name in cls.config_fields() else encoders)[name] = value
        CrossModalConfig._reject_near_misses(encoders, also_known=["freeze"])
        if not encoders:
            raise ValueError(
                "from_encoders was given no encoder. Name at least one, e.g. vision='google/vit-base-patch16-224'."
            )
        # One dtype for all: checkpoints of encoders come in several.
        options = {"dtype": overrides.pop("dtype", None) or torch.get_default_dtype()}
        if overrides.get("attn_implementation") is not None:
            options["attn_implementation"] = overrides.pop("attn_implementation")
        modalities, modules = {}, {}
        for name, value in encoders.items():
            entry = dict(value) if isinstance(value, dict) and "model" in value else {"model": value}
            modules[name], entry["config"] = load_encoder(name, entry.pop("model"), entry)
            modalities[name] = entry
        overrides = {**cls.default_fields(modalities), **overrides}
        config = CrossModalConfig(modalities=modalities, frozen_modalities=list(freeze), **overrides)
        model = cls._from_config(config, encoders=modules, **options)
        return model.to(config.dtype)


class CrossModalModel(CrossModalPreTrainedModel):
    """Encoders and their fusion, without a head.

    Args:
        config: CrossModalConfig.
        encoders: {modality: module} to use instead of building them from the config.
        fuses: False leaves out what `fuse` is made of, for a head whose own tokens take part in the fusion: `encode` and `project` are
            there alone.
    """

    def __init__(self, config, encoders=None, fuses=True):
        super().__init__(config)
        given = encoders or {}
        self.encoders = nn.ModuleDict()
        for name in config.modality_names:
            encoder = given.get(name)
            if encoder is None:
                encoder = build_encoder(getattr(config, f"{name}_config"), name)
            else:
                if isinstance(encoder, PreTrainedModel):
                    wanted = encoder.config._attn_implementation
                    encoder.config._attn_implementation = supported_attention(wanted, type(encoder))
                for module in encoder.modules():
                    # Weights that were handed in are trained ones: `post_init` must leave them alone.
                    module._is_hf_initialized = True
            keep_all_layers(encoder)
            if isinstance(encoder, PreTrainedModel):
                # The first forward would do it under a lock, which torch.compile cannot trace.
                maybe_install_capturing_hooks(encoder)
            self.encoders[name] = encoder
        self.modality_types = nn.Embedding(len(config.modality_names), config.hidden_size)
        self.projections = nn.ModuleDict({name: ModalityProjection(config, name) for name in config.modality_names})
        self.fuses = fuses
        if fuses:
            self.fusion = FUSIONS[config.fusion_type](config)
            self.poolings = nn.ModuleDict({name: TokenPooling(config, name) for name in config.modality_names})
            if config.pooled_features:
                self.shortcuts = nn.ModuleDict(
                    {name: PooledShortcut(config, name, config.hidden_size) for name in config.modality_names}
                )
        self.weighting = ModalityWeighting(config)
        if fuses:
            if config.missing_tokens:
                self.missing_tokens = nn.Embedding(len(config.modality_names), config.hidden_size)
            self.outputs = nn.ModuleDict(
                {name: nn.Linear(config.hidden_size, config.hidden_size) for name in config.modality_names}
            )
        self._input_names = {}
        for index, name in enumerate(config.modality_names):
            values, mask = config.input_keys(name)
            own_values = f"{name}_{config.modality_settings[name]['input']}"
            self._input_names |= {values: (name, 0), own_values: (name, 0)}
            self._input_names |= {f"{values}_index": (name, 2), f"{own_values}_index": (name, 2)}
            if mask:
                self._input_names |= {mask: (name, 1), f"{name}_{mask}": (name, 1)}
            # What `encode_tokens` returned of a frozen encoder, in place of its inputs.
            self._input_names |= {f"{name}_tokens": (name, 3), f"{name}_tokens_mask": (name, 4)}
            self._input_names |= {f"{name}_tokens_index": (name, 2)}
            if index == 0:
                self.main_input_name = values
        self.post_init()
        self._apply_freezing()

    def _apply_freezing(self):
        for name, encoder in self.encoders.items():
            frozen = name in self.config.frozen_modalities
            for parameter in encoder.parameters():
                # Weights of four bits are whole numbers.
                parameter.requires_grad_(not frozen and parameter.is_floating_point())
            if isinstance(encoder, PreTrainedModel):
                freeze_untrained(encoder)
            if frozen:
                encoder.eval()

    def train(self, mode=True):
        super().train(mode)
        for name in self.config.frozen_modalities:
            self.encoders[name].eval()
        return self

    def _collect_inputs(self, inputs):
        """Sorts forward's arguments by modality: {name: (values, mask, index, encoded)} in the order of the config.

        Where tokens were given, encoded is true, and values and mask are theirs.
        """
        given = {}
        for key, value in inputs.items():
            if key not in self._input_names:
                if key in _PASSTHROUGH:
                    continue
                near = nearest_first(key, self._input_names)
                raise TypeError(f"{type(self).__name__} got an input {key!r}. Expected any of {near}.")
            if value is not None:
                name, position = self._input_names[key]
                given.setdefault(name, [None] * 5)[position] = value
        collected = {}
        for name in self.config.modality_names:
            values, mask, index, tokens, tokens_mask = given.get(name, [None] * 5)
            if tokens is not None:
                if self.training and name not in self.config.frozen_modalities:
                    raise ValueError(
                        f"{name}_tokens was given in training, and {name!r} is not frozen: its encoder would learn nothing. "
                        f"Give its inputs, or call model.freeze({name!r})."
                    )
                collected[name] = (tokens, tokens_mask, index, True)
            elif values is not None:
                collected[name] = (values, mask, index, False)
        if not collected:
            raise ValueError(
                f"No modality was given. Pass at least one of {[self.config.input_keys(n)[0] for n in self.encoders]}."
            )
        return collected

    @staticmethod
    def _numbers_of_rows(collected):
        """{modality: rows} of what `_collect_inputs` returned."""
        # Not len(): that is a plain number, and would fix the size of the batch in an exported graph.
        return {
            name: (values if index is None else index).shape[0] for name, (values, _, index, _) in collected.items()
        }

    def presence_of(self, inputs, modality_mask=None):
        """(B,M) bool: the modalities that each row has, of the inputs of a forward and `modality_mask`; before modality dropout."""
        given = {key: value for key, value in inputs.items() if value is not None}
        return self._presence(self._collect_inputs(given), modality_mask)

    def _presence(self, collected, modality_mask):
        names = self.config.modality_names
        values, _, rows, _ = next(iter(collected.values()))
        presence = torch.tensor([name in collected for name in names], device=values.device)
        presence = presence.expand((values if rows is None else rows).shape[0], len(names))
        if modality_mask is None:
            return presence
        if modality_mask.shape != presence.shape:
            raise ValueError(
                f"modality_mask has shape {tuple(modality_mask.shape)}. Expected {tuple(presence.shape)}: rows by "
                f"modalities {names}."
            )
        return presence & modality_mask.bool()

    def _check_numbers_of_rows(self, collected):
        sizes = self._numbers_of_rows(collected)
        if not all_alike(sizes.values()):
            raise ValueError(f"Modalities have different batch sizes: {sizes}. Give one row each, and modality_mask.")

    def encode(self, inputs, modality_mask=None):
        """Raw batches to tokens at the tapped depths.

        inputs {modality: (values, mask or None, index or None, whether they are tokens)}, modality_mask (B,M) bool or None. Returns
        ({modality: EncodedModality} for what is present, presence (B,M) bool).
        """
        names, presence = self.config.modality_names, self._presence(inputs, modality_mask)
        if self.training and any(map(self.config.dropout_of, names)):
            presence = modality_mask = self._drop_modalities(presence)
        if self._runs_all_modalities():
            inputs, modality_mask = self._with_blanks(inputs, presence), presence
        if modality_mask is not None:
            if not torch.compiler.is_compiling() and not presence.any(dim=1).all():
                row = int((~presence.any(dim=1)).nonzero()[0])
                raise ValueError(f"row {row} of the batch has no modality at all. Give at least one of {names}.")
        encoded = {}
        for index, name in enumerate(names):
            if name in inputs:
                present = None if modality_mask is None else presence[:, index]
                result = self._encode_one(name, *inputs[name], present)
                if result is not None:
                    encoded[name] = result
        return encoded, presence

    def _runs_all_modalities(self):
        """Whether modules of a modality that no row of the batch has are run all the same, on a blank that counts for nothing: in
        training over several processes, each of which waits for the others in the same modules (FSDP) and for a gradient of the
        same parameters (DDP), while their batches may lack different modalities."""
        return self.training and is_distributed()

    def _with_blanks(self, inputs, presence):
        """`encode`'s inputs, with a blank for each modality that is not there."""
        blanks = {}
        for name, settings in self.config.modality_settings.items():
            blank = None if name in inputs else blank_input(self.encoders[name], settings)
            if blank is not None:
                index = torch.zeros(len(presence), dtype=torch.long, device=presence.device)
                dtype = self.modality_types.weight.dtype if blank.is_floating_point() else None
                blanks[name] = (blank.to(presence.device, dtype), None, index, False)
        return inputs | blanks

    def _drop_modalities(self, presence):
        """Takes modalities from rows at random (ModDrop, Neverova et al. 2015, arXiv 1501.00102), never the last one.

        presence (B,M) bool. Returns the same with some True turned False.
        """
        rates = torch.tensor([self.config.dropout_of(name) for name in self.config.modality_names])
        draw = torch.rand(presence.shape, device=presence.device)
        # Of a row that would lose all that it has, the one with the highest draw stays.
        last = nn.functional.one_hot(draw.masked_fill(~presence, -1.0).argmax(dim=1), presence.shape[1]).bool()
        kept = presence & (draw >= rates.to(presence.device))
        return torch.where(kept.any(dim=1, keepdim=True), kept, presence & last)

    @torch.no_grad()
    def encode_tokens(self, name, values, mask=None):
        """What a frozen encoder makes of its inputs, to be computed once and given as `<name>_tokens` afterwards.

        Args:
            name: modality. values, mask: what its encoder reads, (B,...) and (B, positions) or None.

        Returns:
            tokens (B,T,W) or (B,h,w,W) with the tapped levels side by side, of videos by frame (B,F,T,W) or (B,F,h,w,W), and the mask
            of the second axis or None.
        """
        self._known([name])
        training = self.encoders[name].training
        self.encoders[name].eval()
        encoded = self._encode_one(name, values, mask, None, False, None)
        self.encoders[name].train(training)
        return pack_tokens(encoded)

    def _encode_one(self, name, values, mask, index, is_encoded, present):
        """One modality of a batch. Every distinct input is encoded once, and only if a row that has it needs it.

        values (U,...), mask (U, positions) or None, index (B,) long: the input of each row, or None if row i has input i;
        is_encoded: they are tokens; present (B,) bool or None. Returns an EncodedModality, or None if no row has this modality.
        """
        encoder, kind = self.encoders[name], self.config.modality_settings[name]["type"]
        blank = False
        if torch.compiler.is_compiling():
            # Fixed shapes: absent rows are encoded as zeros and taken out afterwards.
            if present is not None and index is None:
                if self.training and has_batch_norm(encoder):
                    raise ValueError(f"{name!r} has batch norm: absent rows cannot be compiled in training mode.")
                values = values.masked_fill(~present.view(-1, *[1] * (values.dim() - 1)), 0)
                if mask is not None:
                    # Of rows without a single real token some encoders make NaN.
                    mask = mask.bool() | ~present.view(-1, *[1] * (mask.dim() - 1))
        elif present is not None and not present.all():
            # It costs less, and batch norm never sees what is not there.
            rows = present.nonzero().squeeze(1)
            if len(rows):
                used, inverse = (rows if index is None else index[rows]).unique(return_inverse=True)
                values, mask = values[used], None if mask is None else mask[used]
                index = torch.zeros(len(present), dtype=torch.long, device=values.device).index_copy(0, rows, inverse)
            elif self._runs_all_modalities():
                blank, values, mask = True, torch.zeros_like(values[:1]), None
                index = torch.zeros_like(present, dtype=torch.long)
            else:
                return None
        else:
            present = None
        levels = self.config.levels_of(name)
        settings = self.config.modality_settings[name]
        frame_tokens = settings.get("frame_tokens")
        if is_encoded:
            sizes = self.config.level_sizes_of(name)
            widths = [sizes[level] for level in levels]
            encoded = unpack_tokens(name, values, mask, widths, by_frame=frame_tokens is not None)
        else:
            learns = torch.is_grad_enabled() and name not in self.config.frozen_modalities
            with torch.set_grad_enabled(learns), keeping_statistics(encoder) if blank else nullcontext():
                encoded = encode_modality(encoder, kind, values, mask, levels, frame_tokens)
            limit = settings.get("max_tokens")
            if limit is not None:
                encoded = limit_tokens(encoded, limit)
        encoded.index, encoded.present = index, present
        return encoded

    def project(self, encoded):
        """Tokens of every modality at the fusion width, and their masks in the batch.

        Returns {modality: [(U,T_m,D) per level]}, one row per distinct input (see `EncodedModality.spread`), and
        {modality: (B,T_m) bool or None}.
        """
        types = dict(zip(self.config.modality_names, self.modality_types.weight, strict=True))
        levels, masks = {}, {}
        for name, item in encoded.items():
            levels[name], masks[name] = self.projections[name](item, types[name]), item.mask
            if item.mask is not None:
                masks[name] = item.spread(item.mask)
            elif item.present is not None:
                masks[name] = item.present[:, None].expand(-1, levels[name][0].shape[1])
        return levels, masks

    def _stand_in(self, levels, masks, presence, shared):
        """`fuse`'s arguments with one learned token in place of each modality that a row lacks, for others to look at."""
        types = dict(zip(self.config.modality_names, self.modality_types.weight, strict=True))
        levels, masks, shared = dict(levels), dict(masks), dict(shared)
        for index, name in enumerate(self.config.modality_names):
            token = self.missing_tokens.weight[index] + types[name]
            absent = ~presence[:, index]
            if name not in levels:
                depths = len(self.config.levels_of(name))
                levels[name] = [token.expand(presence.shape[0], 1, -1)] * depths
                masks[name] = None
            elif torch.compiler.is_compiling() or absent.any():
                own = shared.pop(name, None)
                depths = levels[name] if own is None else [own.spread(level) for level in levels[name]]
                first = torch.zeros(depths[0].shape[:2], dtype=torch.bool, device=absent.device)
                first[:, 0] = True
                place = first & absent[:, None]
                levels[name] = [torch.where(place[..., None], token.to(level.dtype), level) for level in depths]
                masks[name] = place | (~absent[:, None] if masks[name] is None else masks[name])
        return levels, masks, shared

    def fuse(
        self,
        levels,
        masks,
        presence,
        shared=None,
        output_attentions=False,
        task_ids=None,
        return_tokens=True,
        beside=None,
    ):
        """Cross-modal layers, pooling and modality weights.

        levels and masks as `project` gives them; shared {modality: EncodedModality} where several rows share an input; beside
        {modality: (B,D)}, of `pooled_features`, None without.
        Returns tokens {modality: (B,T_m,D)} if wanted, else None, modality embeddings (B,M,D), weights (B,M), log variances
        (B,M) or None, pooled (B,D), attentions.
        """
        shared = shared or {}
        fused_levels, fused_masks = levels, masks
        if self.config.missing_tokens:
            fused_levels, fused_masks, shared = self._stand_in(levels, masks, presence, shared)
        # Processes call each module equally often, a graph has one shape, and maps of all rows are of one size.
        whole = return_tokens or output_attentions or is_distributed() or torch.compiler.is_compiling()
        looking = self.config.fusion_queries or self.config.modality_names
        groups = None if whole else alike_rows(fused_levels, fused_masks, shared, looking)
        if groups is None:
            tokens, pooled, attentions, shared = self._fuse_and_pool(
                fused_levels, fused_masks, shared, list(levels), output_attentions
            )
        else:
            tokens, attentions = {}, ()
            pooled = self._pool_in_groups(groups, fused_levels, fused_masks, shared, levels)
        if self.config.missing_tokens:
            # A token that stands in is there for others to look at, and says nothing by itself.
            there = dict(zip(self.config.modality_names, presence.unbind(1), strict=True))
            pooled = {name: vector.masked_fill(~there[name][:, None], 0.0) for name, vector in pooled.items()}
        if beside is not None:
            pooled = {name: vector + beside[name] for name, vector in pooled.items()}
        embeddings = self._by_modality(pooled)
        weights, log_variances = self.weighting(embeddings, presence, task_ids)
        fused = 0
        for index, name in enumerate(self.config.modality_names):
            if name in levels:
                fused = fused + weights[:, index, None] * self.outputs[name](embeddings[:, index])
        if return_tokens:
            tokens = {n: shared[n].spread(stream) if n in shared else stream for n, stream in tokens.items()}
        return tokens if return_tokens else None, embeddings, weights, log_variances, fused, attentions

    def _fuse_and_pool(self, levels, masks, shared, names, output_attentions=False):
        """Tokens {modality: (B,T_m,D)} of `names`, or (U,T_m,D) of what is still shared, their pooled vectors {modality: (B,D)},
        attentions, and what is still shared."""
        tokens, attentions, shared = self.fusion(levels, masks, shared, output_attentions)
        tokens = {name: tokens[name] for name in names if name in tokens}
        # What rows share to the end is pooled once for all of them.
        pooled = {
            name: shared[name].spread(self.poolings[name](stream, shared[name].mask))
            if name in shared
            else self.poolings[name](stream, masks[name])
            for name, stream in tokens.items()
        }
        return tokens, pooled, attentions, shared

    def _pool_in_groups(self, groups, levels, masks, shared, names):
        """Pooled vectors {modality: (B,D)} of `names`, of rows that are fused in groups; 0 of those that lack the modality."""
        rows, pooled = sum(map(len, groups)), {}
        least = {name: pooling.own_place + 1 for name, pooling in self.poolings.items() if pooling.own_place}
        parts = [(group, *of_rows(group, levels, masks, shared, least)) for group in groups]
        found = [(group, self._fuse_and_pool(*own, names)[1]) for group, *own in parts if own[0]]
        for name in names:
            places = [group for group, own in found if name in own]
            if not places:
                pooled[name] = levels[name][0].new_zeros(rows, self.config.hidden_size)
                continue
            vectors = torch.cat([own[name] for _, own in found if name in own])
            pooled[name] = vectors.new_zeros(rows, vectors.shape[1]).index_copy(0, torch.cat(places), vectors)
        return pooled

    def _by_modality(self, vectors):
        """{modality: (B,D)} of those present to (B,M,D), 0 for the absent."""
        some = next(iter(vectors.values()))
        return torch.stack([vectors.get(name, torch.zeros_like(some)) for name in self.config.modality_names], dim=1)

    def pool_unimodal(self, levels, masks, shared, beside=None):
        """Mean of each modality's deepest projected tokens, before any fusion. Arguments of `fuse`; returns (B,M,D)."""
        pooled = {
            name: shared[name].spread(masked_mean(depths[-1], shared[name].mask))
            if name in shared
            else masked_mean(depths[-1], masks[name])
            for name, depths in levels.items()
        }
        return self._by_modality(
            pooled if beside is None else {name: vector + beside[name] for name, vector in pooled.items()}
        )

    def _check_task_ids(self, task_ids):
        names = self.config.task_names
        if (task_ids is None) == bool(names):
            given = "none were given" if task_ids is None else f"task_ids {tuple(task_ids.shape)} were given"
            raise ValueError(
                f"task_names={names} and {given}. Expected task_ids (B,) exactly where the config names tasks."
            )

    @can_return_tuple
    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        input_values=None,
        input_features=None,
        audio_attention_mask=None,
        pixel_values_videos=None,
        modality_mask=None,
        task_ids=None,
        output_attentions=None,
        output_hidden_states=None,
        return_tokens=True,
        **named_inputs,
    ):
        """Any subset of modalities, by the input keys of their encoders.

        Args:
            pixel_values: images (B,3,H,W) of the first vision modality; others are `<name>_pixel_values`.
            input_ids, attention_mask: text (B,T), and 1 for real tokens.
            input_values, input_features, audio_attention_mask: audio, as its encoder takes it.
            pixel_values_videos: (B,frames,3,H,W); with `video_attention_mask (B,frames)` where an encoder of images reads the frames.
            named_inputs: `<name>_values (B,T,...)` and `<name>_mask (B,T)` of feature sequences, and inputs of further
                modalities prefixed with their name. Any values may come with `<key>_index (B,)` long: which of the inputs each
                row uses, so that an image that many rows ask about is encoded once. `<name>_tokens`, with
                `<name>_tokens_mask`, take the place of the inputs of a frozen encoder (see `encode_tokens`).
            modality_mask: (B,M) bool, False where a row lacks a modality; columns in the order of
                `config.modality_names`. What stands in the inputs of such a row does not matter.
            task_ids: (B,) long, which of `config.task_names` each row is for.
            output_attentions: also return `cross_attentions`, under any attention backend.
            output_hidden_states: also return `modality_tokens`.
            return_tokens: False leaves out `last_hidden_state` and `attention_mask`, for heads that read the rest.

        Returns:
            CrossModalOutput.

        Raises:
            ValueError: if a row has no modality at all. TypeError: for an input that no modality reads.
        """
        inputs = {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "input_values": input_values,
            "input_features": input_features,
            "audio_attention_mask": audio_attention_mask,
            "pixel_values_videos": pixel_values_videos,
        }
        inputs = {key: value for key, value in inputs.items() if value is not None} | named_inputs
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not self.fuses:
            raise ValueError(
                "this base belongs to a head that fuses by itself. Call the head, or `encode` and `project`, or load the base alone with "
                "AutoModel.from_pretrained."
            )
        self._check_task_ids(task_ids)
        collected = self._collect_inputs(inputs)
        self._check_numbers_of_rows(collected)
        encoded, presence = self.encode(collected, modality_mask)
        levels, masks = self.project(encoded)
        shared = {name: item for name, item in encoded.items() if item.index is not None or item.present is not None}
        wanted, beside = return_tokens or bool(output_hidden_states), None
        if self.config.pooled_features:
            beside = {n: item.spread(self.shortcuts[n](item.levels, item.mask)) for n, item in encoded.items()}
        tokens, embeddings, weights, log_variances, pooled, attentions = self.fuse(
            levels, masks, presence, shared, bool(output_attentions), task_ids, wanted, beside
        )
        last_hidden_state, attention_mask = None, None
        if return_tokens:
            last_hidden_state = torch.cat(list(tokens.values()), dim=1)
            attention_mask = torch.cat([_full_mask(tokens[name], masks[name]) for name in tokens], dim=1)
        return CrossModalOutput(
            last_hidden_state=last_hidden_state,
            attention_mask=attention_mask,
            pooler_output=pooled,
            modality_weights=weights,
            modality_embeddings=embeddings,
            unimodal_embeddings=self.pool_unimodal(levels, masks, shared, beside)
            if self.config.auxiliary_loss_weight
            else None,
            modality_log_variances=log_variances,
            presence=presence,
            modality_tokens=tokens if output_hidden_states else None,
            token_grids={name: item.grid for name, item in encoded.items() if item.grid}
            if output_attentions
            else None,
            cross_attentions=attentions if output_attentions else None,
        )


def all_alike(sizes):
    """Whether sizes are one and the same; those of an exported graph have no hash."""
    first, *others = sizes
    return all(size == first for size in others)


def _full_mask(tokens, mask):
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask


def heads():
    """The classes that build on the base. `auto_map` names them, and transformers saves what a file imports."""
    from .captioning_crossmodal import CrossModalForCaptioning
    from .classification_crossmodal import CrossModalForSequenceClassification, CrossModalForVQA
    from .retrieval_crossmodal import CrossModalForRetrieval
    from .segmentation_crossmodal import CrossModalForPointSegmentation

    return (
        CrossModalForVQA,
        CrossModalForSequenceClassification,
        CrossModalForRetrieval,
        CrossModalForCaptioning,
        CrossModalForPointSegmentation,
    )


CrossModalModel.register_for_auto_class("AutoModel")

__all__ = ["CrossModalModel", "CrossModalPreTrainedModel"]
