"""Adapters (peft) on models of the family: whether one was made for the model that it is loaded into.

Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

import hashlib

import torch
from transformers.utils import cached_file


try:
    from safetensors import safe_open
except ImportError:
    safe_open = None

# Key of the metadata of an adapter's weights: the fingerprint of the layers that it changes, as they were.
BASE_KEY = "crossmodal_base"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Of an update A (r,in) and B (out,r): the axis that is the layer's.
_SIDES = {"A.weight": -1, "B.weight": 0}


def adapted_layers(model):
    """Paths of the layers that peft has given low-rank updates."""
    return [path.removesuffix(".lora_A") for path, _ in model.named_modules() if path.endswith(".lora_A")]


def base_weights(model):
    """{name: tensor} of a model, named as if peft had never touched it."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


@torch.no_grad()
def fingerprint(weights, layers):
    """Hash of the weights of `layers` (paths). weights: as `base_weights` returns them.

    Rounded to bfloat16, so that a base loaded in that type is the same base.
    """
    digest = hashlib.sha256()
    for layer in sorted(layers):
        value = weights[f"{layer}.weight"].to(torch.bfloat16).cpu().contiguous()
        digest.update(layer.encode() + value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def check_adapter(model, source, **download):
    """Refuses an adapter that was made for another model than this one.

    Args:
        model: of the family, with adapters or without. source: folder or Hub id of an adapter.
        download: of `cached_file` (token, revision, ...).

    Raises:
        ValueError: naming the first layer that does not fit, or that the base was trained otherwise.
    """
    path = cached_file(source, _WEIGHTS, _raise_exceptions_for_missing_entries=False, **download)
    if path is None or safe_open is None:
        return
    weights, layers = base_weights(model), set()
    with safe_open(path, framework="pt") as file:
        shapes = {key.removeprefix(_PREFIX): tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        mark = (file.metadata() or {}).get(BASE_KEY)
    # Weights of four bits are packed: their shapes and values tell nothing.
    packed = getattr(model, "is_quantized", False)
    for key, shape in shapes.items():
        layer, _, update = key.partition(".lora_")
        name = f"{layer}.weight" if update else key
        if update and update not in _SIDES:
            continue
        if update:
            layers.add(layer)
        if name not in weights:
            raise ValueError(_another_base(source, model, f"{key} has no layer here"))
        expected = tuple(weights[name].shape)
        fits = shape[_SIDES[update]] in expected if update else shape == expected
        if not fits and not (packed and update):
            raise ValueError(
                _another_base(source, model, f"{key} has shape {shape}, for a weight that has {expected} here")
            )
    # float16 rounds otherwise than bfloat16, by which the mark was made.
    known = mark is not None and not packed and model.dtype in (torch.float32, torch.bfloat16)
    if known and mark != fingerprint(weights, layers):
        why = "the layers that it changes have other weights here than those it was trained on"
        raise ValueError(_another_base(source, model, why))


def _another_base(source, model, why):
    return (
        f"the adapter {str(source)!r} was made for another base than this {type(model).__name__} "
        f"({model.name_or_path or 'composed here'}): {why}. Load it onto the model that it was trained on."
    )
