"""A recipe to a model and its processor: encoders resolved, a tokenizer trained where the recipe asks for one."""

from collections import Counter

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    FEATURE_EXTRACTOR_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
    WhisperFeatureExtractor,
)
from transformers.models.auto.feature_extraction_auto import feature_extractor_class_from_name

import crossmodal

from ..configs import load_preset
from ..modeling.composing_crossmodal import _tower_config, _wanted_tower
from ..modeling.configuration_crossmodal import _as_config
from ..modeling.mmvit_crossmodal import MMViTConfig, MMViTEncoder
from ..processing.chat_crossmodal import CHAT_TEMPLATE, is_conversation, render
from ..processing.processing_crossmodal import CrossModalProcessor
from .console import load_config, load_model, one_line
from .recipes import nearest
from .tasks import TASKS


def train_tokenizer(texts, vocab_size=2000):
    """A lower-casing WordPiece tokenizer with BERT's special tokens, made of texts. For worlds small enough.

    Its vocabulary is every character, and the most frequent whole words; rarer ones are spelt. The trainers of `tokenizers`
    decide ties by the order of a hash map, so that the same seed would not give the same model twice.

    Raises:
        ValueError: if vocab_size has no room for the characters.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({character for word in counts for character in word})
    pieces = special + characters + [f"##{character}" for character in characters]
    if len(pieces) > vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for the {len(pieces)} characters of these texts. Give more."
        )
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = list(dict.fromkeys(pieces + words))[:vocab_size]
    tokenizer = Tokenizer(models.WordPiece({token: n for n, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _texts(datasets):
    """All different texts of datasets, those that are to be written too."""
    columns = [map(_plain, dataset.raw_column("text")) for dataset in datasets]
    columns += [[t["text"] for t in d.targets if isinstance(t, dict) and "references" in t] for d in datasets]
    return [text for text in dict.fromkeys(text for column in columns for text in column) if text]


def _plain(text):
    """The text of a conversation, others as they are."""
    return render(text) if is_conversation(text) else text


def encoders_and_config(recipe):
    """({modality: {"model": Hub id, folder or config as a dict, ...}}, fields of CrossModalConfig) of a recipe."""
    encoders, config = recipe.model.get("encoders"), dict(recipe.model.get("config") or {})
    if recipe.model.get("checkpoint"):
        settings = load_config(recipe.model["checkpoint"]).modality_settings
        return {name: {"model": None, **own} for name, own in settings.items()}, config
    if recipe.model.get("preset"):
        preset = load_preset(recipe.model["preset"])
        encoders, config = preset.pop("modalities"), preset | config
    entries = {}
    for name, value in encoders.items():
        entry = dict(value) if isinstance(value, dict) else {"model": value}
        if "model_type" in entry:
            entry = {"model": entry}
        elif "config" in entry:
            entry["model"] = entry.pop("config")
        entries[name] = entry
    return entries, config


def said_of(config, names):
    """Fields of a config for some of its modalities: what they say by the names of others falls away."""
    config = dict(config)
    for key in ("modality_dropout", "modality_prior"):
        if isinstance(config.get(key), dict):
            config[key] = {name: value for name, value in config[key].items() if name in names}
    if config.get("fusion_queries"):
        config["fusion_queries"] = [name for name in config["fusion_queries"] if name in names] or None
    if config.get("first_query") not in (None, "2d", "3d", *names):
        config["first_query"] = None
    return config


def build(recipe, task, datasets):
    """(model, processor) of a recipe. `task` says the labels; a tokenizer may be trained on the texts of `datasets`."""
    encoders, options = encoders_and_config(recipe)
    if recipe.model.get("checkpoint"):
        return _trained(recipe, task, options, datasets)
    wanted, own = options.get("problem_type"), task.answers.get("problem_type")
    if wanted and own and wanted != own:
        raise ValueError(
            f"model.config.problem_type={wanted!r}, and the labels of task {recipe.task!r} are of {own!r}. Leave it out, or give "
            "labels that fit: one string a row, a list of strings, or a number (task 'regression')."
        )
    options |= task.answers
    if task.answers:
        options["label2id"] = task.label2id
    if options.get("class_weights") == "balanced":
        options["class_weights"] = task.class_weights(datasets[0].targets)
    sources = {name: entry["model"] for name, entry in encoders.items() if isinstance(entry["model"], str)}
    tokenizer = _tokenizer(recipe, sources, datasets)
    for name, entry in encoders.items():
        if isinstance(entry["model"], dict):
            made = _as_config(name, entry["model"])
            if hasattr(made, "vocab_size") and tokenizer is not None:
                made.vocab_size, made.pad_token_id = len(tokenizer), tokenizer.pad_token_id
            entry["model"] = made
        if "image_weights" in entry:
            entry["model"] = _from_image_weights(name, entry.pop("image_weights"), entry["model"])
    if task.writes:
        options["decoder"] = _decoder(recipe, tokenizer)
    model = getattr(crossmodal, task.model_class).from_encoders(
        freeze=tuple(recipe.model.get("freeze") or ()), **encoders, **options
    )
    processor = _processor(recipe, model.config, sources, tokenizer)
    if recipe.task == "dialogue":
        processor.chat_template = CHAT_TEMPLATE
    return model, processor


# What stands in for encoders of which nothing is on this machine, by what they read. That of others is refused nothing for its axes.
_STAND_INS = {"vision": "vit", "video": "vit", "text": "bert"}


def config_of(recipe):
    """The CrossModalConfig that `build` would give a recipe's model, but for what rows say. It needs no weights and no network: for
    encoders that are not on this machine (`unknown_encoders`) others stand in.

    Raises:
        ValueError: for what the config or the model of the task refuses.
    """
    encoders, options = encoders_and_config(recipe)
    model_class = getattr(crossmodal, TASKS[recipe.task].model_class)
    # One for each label, of which rows say how many there are.
    options = {key: value for key, value in options.items() if key not in ("class_weights", "thresholds")}
    for key in options.keys() - model_class.config_fields():
        near = nearest(key, model_class.config_fields())[:3]
        raise ValueError(f"model.config.{key} is no field of CrossModalConfig. Nearest: {near}.")
    decoder = recipe.model.get("decoder")
    if isinstance(decoder, dict):
        options["decoder_config"] = decoder
    modalities = {}
    for name, entry in encoders.items():
        entry = {key: value for key, value in entry.items() if key != "image_weights"}
        source = entry.pop("model")
        full = source if isinstance(source, dict) else _config_here(source)
        if full is None:
            # Deeper than any level that a recipe could name.
            full = {"model_type": _STAND_INS.get(_wanted_tower(name, entry), "wav2vec2"), "num_hidden_layers": 48}
        entry["config"] = _as_config(name, full) if isinstance(full, dict) else _tower_config(name, full, entry)
        modalities[name] = entry
    options = {**model_class.default_fields(modalities), **options}
    try:
        config = crossmodal.CrossModalConfig(
            modalities=modalities, frozen_modalities=list(recipe.model.get("freeze") or ()), **options
        )
    except (StrictDataclassError, TypeError) as error:
        # A value of another type than its field has.
        raise ValueError(one_line(error)) from error
    model_class.check_config(config)
    return config


def unknown_encoders(recipe):
    """Names of the modalities whose encoder has no config on this machine."""
    sources = {name: entry["model"] for name, entry in encoders_and_config(recipe)[0].items()}
    return [name for name, given in sources.items() if not isinstance(given, dict) and _config_here(given) is None]


def _config_here(source):
    """The config of a Hub id or folder, if it is on this machine, or None."""
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return None


def _from_image_weights(name, folder, config):
    """The encoder of a config with the weights of the first `crossmodal_mmvit` of the model in a folder."""
    where = f"model.encoders.{name}.image_weights={folder!r}"
    if getattr(config, "model_type", None) != MMViTConfig.model_type:
        raise ValueError(f"{where} is for an encoder of model_type {MMViTConfig.model_type!r}.")
    try:
        model = AutoModel.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} holds no model ({one_line(error)}). Train one on images first.") from error
    found = [module for module in model.modules() if isinstance(module, MMViTEncoder)]
    if not found:
        raise ValueError(f"{where} holds a model without an encoder of model_type {MMViTConfig.model_type!r}.")
    return MMViTEncoder.from_image_weights(found[0], config)


def _trained(recipe, task, options, datasets):
    """(model, processor) of `model.checkpoint`, with the labels of the task."""
    source, class_weights = recipe.model["checkpoint"], options.pop("class_weights", None)
    model, processor = load_model(source, task.model_class, **options)
    if model._hf_peft_config_loaded:
        raise ValueError(
            f"model.checkpoint={source!r} holds an adapter. Give the merged model: the folder in which it lies."
        )
    if task.answers:
        model.resize_answers(**task.answers)
    if class_weights == "balanced":
        class_weights = task.class_weights(datasets[0].targets)
    model.config.class_weights = class_weights
    model.freeze(*recipe.model.get("freeze") or ())
    return model, processor


def _decoder(recipe, tokenizer):
    """What `from_encoders` takes for a decoder: a causal model's name, or a config with the tokenizer's words."""
    given = recipe.model.get("decoder") or {}
    if isinstance(given, str):
        return given
    if tokenizer is None:
        raise ValueError("a recipe that writes needs processor.tokenizer: a Hub id or folder, or `train`.")
    ids = {
        "bos_token_id": _first_of(tokenizer.bos_token_id, tokenizer.cls_token_id),
        "eos_token_id": _first_of(tokenizer.eos_token_id, tokenizer.sep_token_id),
        "pad_token_id": _first_of(tokenizer.pad_token_id, tokenizer.eos_token_id),
    }
    return crossmodal.TextDecoderConfig(**{"vocab_size": len(tokenizer)} | ids | given)


def _first_of(*values):
    """The first that is not None, or None."""
    return next((value for value in values if value is not None), None)


def _tokenizer(recipe, sources, datasets):
    source = recipe.processor.get("tokenizer") or sources.get("text")
    if source is None and isinstance(recipe.model.get("decoder"), str):
        source = recipe.model["decoder"]
    if source == "train":
        return train_tokenizer(_texts(datasets), recipe.processor.get("vocab_size", 2000))
    return AutoTokenizer.from_pretrained(source) if source else None


def _processor(recipe, config, sources, tokenizer):
    image_processor = None
    size = recipe.processor.get("image_size")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image_processor = ViTImageProcessorPil(size={"height": height, "width": width})
    elif (name := _first_of_type(config, "vision", "video")) in sources:
        image_processor = AutoImageProcessor.from_pretrained(sources[name])
    writing, decoder = None, recipe.model.get("decoder")
    if isinstance(decoder, str):
        writing = AutoTokenizer.from_pretrained(decoder)
        if tokenizer.get_vocab() == writing.get_vocab():
            writing = None
    return CrossModalProcessor.from_config(
        config,
        image_processor=image_processor,
        tokenizer=tokenizer,
        decoder_tokenizer=writing,
        feature_extractor=_feature_extractor(recipe, config, sources),
        options={
            name: recipe.processor["eeg"]
            for name in config.modality_names
            if config.modality_settings[name]["type"] == "eeg" and recipe.processor.get("eeg")
        },
    )


def _first_of_type(config, *types):
    """Name of the first modality of one of these types, or None."""
    return next((n for n in config.modality_names if config.modality_settings[n]["type"] in types), None)


def _feature_extractor(recipe, config, sources):
    """Of the first audio modality: its source's own, or that of its encoder's type with `processor.audio` of the recipe."""
    name = _first_of_type(config, "audio")
    if name is None:
        return None
    if name in sources:
        return AutoFeatureExtractor.from_pretrained(sources[name])
    options = dict(recipe.processor.get("audio") or {})
    # Spectrograms (F,T) of log-mel bands are what encoders without an extractor of their own read.
    extractor = FEATURE_EXTRACTOR_MAPPING.get(type(getattr(config, f"{name}_config")), WhisperFeatureExtractor)
    wanted = options.pop("feature_extractor_type", None)
    if wanted is not None:
        extractor = feature_extractor_class_from_name(wanted)
        if extractor is None:
            raise ValueError(
                f"processor.audio.feature_extractor_type={wanted!r} is no feature extractor of transformers. Expected its class, "
                "for example WhisperFeatureExtractor."
            )
    return extractor(**options)
