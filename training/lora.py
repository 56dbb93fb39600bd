"""LoRA by tower: which layers of a model low-rank updates reach, what is trained in full beside them, and the folder of an adapter.

(Hu et al. 2021, arXiv 2106.09685; by peft.)
"""

import tempfile
from pathlib import Path

from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

from ..modeling.adapters_crossmodal import BASE_KEY, adapted_layers, base_weights, fingerprint
from ..modeling.attention_crossmodal import MultiHeadAttention
from ..modeling.configuration_crossmodal import nearest_first
from .trainer import component_of


# Parts of the fusion that are small, and are always trained in full.
_SMALL = {"gate", "weighting"}
# Of the words that are written: large, and shared by two modules.
_WORDS = ("embed_tokens", "lm_head")


def lora_config(model, preset, r=8, alpha=16, dropout=0.0, fresh=None):
    """What peft needs to adapt a model of the family.

    Args:
        model: a head of the family, alone (not under peft).
        preset: a modality name (its encoder), `fusion`, `decoder` (of a model that writes), `all` (all of these), or `all-linear`. All but
            the last reach the attention of a tower; `all-linear`, and a tower without attention, every linear layer.
        r, alpha, dropout: rank, scale and dropout of the updates.
        fresh: whether fusion and head start from nothing (`from_encoders`): they are then trained in full, which no low-rank update of
            random weights can stand for. False: they were trained before. None: true, but for the presets `fusion` and `decoder`.

    Returns:
        LoraConfig. Gates, missing-modality tokens, modality types and weights, latents, norms, heads, temperatures and loss weights are
        always trained in full and saved with the adapter.

    Raises:
        ValueError: for an unknown preset, one that reaches no linear layer, and an encoder that is frozen.
    """
    linear, names = _linear_layers(model), model.config.modality_names
    parts = ["fusion", *(["decoder"] if "decoder" in linear else [])]
    known = [*names, *parts, "all", "all-linear"]
    if preset not in known:
        raise ValueError(
            f"lora={preset!r} is no preset of this model. Expected one of {nearest_first(preset, known)}."
        )
    if fresh is None:
        fresh = preset not in parts
    if fresh and preset in parts:
        raise ValueError(
            f"lora={preset!r} adapts a {preset} that was trained, and this one starts from nothing, which low-rank updates cannot make up "
            f"for. Start from a trained model (model.checkpoint in a recipe), or choose one of {[*names, 'all', 'all-linear']}, beside "
            "which it is trained in full."
        )
    towers = [*names, *([] if fresh else parts)] if preset.startswith("all") else [preset]
    targets = [path for tower in towers for path in _reached(linear.get(tower, {}), preset)]
    if not targets:
        raise ValueError(
            f"lora={preset!r} finds no linear layer in {towers}: low-rank updates are for these (a convolutional encoder has none). Train "
            "it in full or freeze it, and choose another preset."
        )
    frozen = sorted({component_of(path) for path in targets} & set(model.config.frozen_modalities))
    if frozen:
        raise ValueError(f"lora={preset!r} adapts {frozen}, which the model keeps frozen. Call model.unfreeze first.")
    left = set() if fresh else {*_WORDS, *(path for tower in parts for path in linear.get(tower, {}))}
    saved = [
        path
        for path, module in model.named_modules()
        if path not in targets
        and path not in left
        and _owns_weights(module)
        # Of an adapted encoder only what changes by itself.
        and (_tower_of(path) not in names or (_tower_of(path) in towers and _has_statistics(module)))
    ]
    tied = set(_WORDS) <= set(saved) and model.lm_head.weight is model.embed_tokens.weight
    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, modules_to_save=saved, ensure_weight_tying=tied
    )  # fmt: skip


def _linear_layers(model):
    """{tower: {path: whether it is of an attention}} of the linear layers that low-rank updates may reach."""
    found = {}
    owners = dict(model.named_modules())
    for path, module in owners.items():
        parts, tower = path.split("."), _tower_of(path)
        if not isinstance(module, (nn.Linear, Conv1D)) or tower == "head" or _SMALL & set(parts):
            continue
        # Poolers and the like, on which no token depends.
        if tower in model.config.modality_names and tower not in model.config.frozen_modalities:
            if not module.weight.requires_grad:
                continue
        own = isinstance(owners[path.rpartition(".")[0]], MultiHeadAttention)
        found.setdefault(tower, {})[path] = own or any("att" in part for part in parts[:-1])
    return found


def _reached(layers, preset):
    """Paths of a tower's linear layers that a preset adapts."""
    attention = [path for path, is_attention in layers.items() if is_attention]
    return list(layers) if preset == "all-linear" or not attention else attention


def _tower_of(path):
    return "decoder" if path.startswith("decoder.") else component_of(path)


def _owns_weights(module):
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _has_statistics(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def add_lora(model, preset, bits=None, fresh=None, **options):
    """A model under peft. Encoders that the preset does not reach are frozen, and stay in eval mode.

    Args:
        bits: 4 keeps the adapted layers in 4 bits while they are trained (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): `model` then
            stays as it is beside a copy. None: as they are.
        preset, fresh, options: see `lora_config`.
    """
    if bits not in (None, 4):
        raise ValueError(f"lora.bits={bits!r}. Expected 4, or None.")
    model.unfreeze(*model.config.modality_names)
    config = lora_config(model, preset, fresh=fresh, **options)
    adapted = {component_of(path) for path in config.target_modules}
    model.freeze(*(name for name in model.config.modality_names if name not in adapted))
    return get_peft_model(model if bits is None else _in_four_bits(model, config), config)


def _in_four_bits(model, config):
    """A copy of a model whose adapted layers hold 4 bits a weight."""
    if not is_bitsandbytes_available():
        raise ValueError(
            "lora.bits=4 needs bitsandbytes, which is not installed here. Run `pip install bitsandbytes`, or leave `bits` out."
        )
    others = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and path not in config.target_modules
    ]
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=others,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        copy = type(model).from_pretrained(folder, quantization_config=quantisation)
    for module in copy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else the first evaluation on a CPU packs weights in a way that has no gradient.
            module.support_avx512bf16_for_cpu = False
    return copy


def describe(model):
    """One line on what of a model under peft is trained, and what that takes."""
    config = model.active_peft_config
    low = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(v.numel() * v.element_size() for v in get_peft_model_state_dict(model).values())
    layers = adapted_layers(model.get_base_model())
    towers = sorted({_tower_of(path) for path in layers})
    return (
        f"LoRA of rank {config.r} on {len(layers)} layers of {', '.join(towers)}: {low:,} parameters, and "
        f"{trained - low:,} in full; an adapter of {size / 2**20:.1f} MiB, gradients and moments of {trained * 12 / 2**20:.1f} MiB."
    )


def merged(model, base=None):
    """The model of the family with the adapter of `model` (under peft, which is used up) in its weights.

    base: of an adapter that was trained in 4 bits, the model with its whole weights.
    """
    if base is not None:
        config, state = model.active_peft_config, get_peft_model_state_dict(model)
        model = get_peft_model(base, config)
        set_peft_model_state_dict(model, state)
    return model.merge_and_unload()


def unloaded(model):
    """The model of the family as it was before peft (of `model`, which is used up)."""
    # peft's own `unload` leaves in place what an active adapter trained in full.
    for name in list(model.peft_config):
        model.delete_adapter(name)
    return model.unload()


def save_adapter(model, folder, hub_base=None, processor=None, base=None):
    """Writes the adapter of a model under peft, so that `AutoModelFor...from_pretrained(folder)` loads it.

    Args:
        hub_base: Hub id of the model that it adapts; the folder then holds the adapter alone. None: that model lies in the folder, too,
            which so loads wherever it is.
        processor: of pipelines. base: as for `merged`.
    """
    folder, config = Path(folder), model.active_peft_config
    whole = model.get_base_model() if base is None else base
    # Where a base lay on this machine has no place in what will be published.
    config.base_model_name_or_path = hub_base or ""
    model.save_pretrained(folder)
    (folder / "README.md").write_text(_card(config, type(whole).__name__, hub_base))
    kept, weights = base_weights(whole), folder / "adapter_model.safetensors"
    mark = fingerprint(kept, adapted_layers(model.get_base_model()))
    save_file(load_file(weights), weights, metadata={"format": "pt", BASE_KEY: mark})
    if hub_base is None:
        whole.save_pretrained(folder, state_dict=kept)
    if processor is not None:
        processor.save_pretrained(folder)


def _card(config, head, hub_base):
    """The card of an adapter: peft's own would tell where its base lay."""
    tags = ["crossmodal", "lora", *([] if hub_base is None else [f"base_model:adapter:{hub_base}"])]
    data = ModelCardData(library_name="peft", base_model=hub_base, tags=tags)
    base = "beside it in this folder" if hub_base is None else hub_base
    loads = "`AutoModelFor...from_pretrained(folder, trust_remote_code=True)` loads both."
    return f"---\n{data.to_yaml()}\n---\n\nA LoRA adapter of rank {config.r} for the {head} {base}. {loads}\n"
