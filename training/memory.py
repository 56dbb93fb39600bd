"""What a training step takes of the memory of a device, planned: the model runs on tensors without content, of any size.

What is kept for the backward is not a formula but a count, of every tensor that autograd saves (torch.autograd.graph.saved_tensors_hooks),
so that any encoder and any fusion can be planned. Bytes per parameter are those of Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054).

Letters: B rows of a device, N devices, P parameters.
"""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, ViTConfig
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configs import load_preset
from ..modeling.classification_crossmodal import CrossModalForVQA
from ..modeling.configuration_crossmodal import CrossModalConfig
from ..modeling.encoders_crossmodal import blank_input


PRESETS = ("tiny", "small", "base", "large")
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
# Bytes of a trained parameter: float32 weights and gradients, and both moments of Adam.
WEIGHT, GRADIENT, MOMENTS, HALF = 4, 4, 8, 2


def config_of(preset, num_labels=3129):
    """The config of a preset, or of `large`: ViT-L/16 and BERT-large, and six fusion layers of their width. Answers are those of VQA v2."""
    if preset != "large":
        return CrossModalConfig(**load_preset(preset), num_labels=num_labels)
    return CrossModalConfig(
        modalities={"vision": ViTConfig(**_LARGE), "text": BertConfig(**_LARGE)}, num_fusion_layers=6, num_labels=num_labels,
        **{key: _LARGE[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size")},
    )  # fmt: skip


@dataclass
class Plan:
    """Bytes of one device in a training step, without the workspace of the libraries.

    parameters, trained: numbers of them. activations: of B rows, what is kept for the backward; with checkpointing the inputs of layers,
    and what one layer keeps while it is computed again. casts: copies of weights in bfloat16 that autocast keeps. layer, rest:
    parameters of the largest unit that FSDP gathers, and of all that is in none.
    """

    parameters: int
    trained: int
    activations: int
    casts: int
    layer: int
    rest: int

    def of_device(self, devices=1):
        """{strategy: bytes} on each of N devices.

        DDP: all of it, and the gradients once more in the buckets that are exchanged. ZeRO-2: weights in bfloat16, and a part of the
        gradients, of float32 weights and of moments. FSDP2 and ZeRO-3: a part of everything, and gathered in bfloat16 what is in no
        unit, a unit and the next one, with the gradients of one.
        """
        buckets = GRADIENT * self.trained if devices > 1 else 0
        replicated = WEIGHT * self.parameters + (GRADIENT + MOMENTS) * self.trained
        spread = HALF * self.parameters + (HALF + WEIGHT + MOMENTS) * self.trained / devices
        gathered = HALF * (2 * self.rest + 3 * self.layer)
        return {
            "DDP": replicated + buckets + self.casts + self.activations,
            "ZeRO-2": int(spread) + self.activations,
            "FSDP2, ZeRO-3": int(replicated / devices) + gathered + self.activations,
        }


def plan(config, rows=32, text_tokens=32, bf16=True, checkpointing=False):
    """Plan of `CrossModalForVQA`. Images are of the size that the config of their encoder says.

    Args:
        config: CrossModalConfig. rows: of one device. text_tokens: words of each text.
        bf16: autocast. checkpointing: activation checkpointing.

    Raises:
        ValueError: for a modality whose config does not say how large its inputs are.
    """
    with FakeTensorMode(), no_init_weights():
        model = CrossModalForVQA(config).train()
        one, two = (_kept(model, _blanks(model, count, text_tokens), bf16, checkpointing) for count in (1, 2))
    units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    return Plan(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        activations=rows * (two - one),
        # What does not grow with rows.
        casts=2 * one - two,
        layer=max((sum(p.numel() for p in unit.parameters()) for unit in units), default=0),
        rest=sum(p.numel() for p in model.parameters() if id(p) not in inside),
    )


def _blanks(model, rows, text_tokens):
    """Inputs of a forward for so many rows."""
    batch = {}
    for name, settings in model.config.modality_settings.items():
        blank = blank_input(model.crossmodal.encoders[name], settings)
        if blank is None:
            raise ValueError(
                f"the config of modality {name!r} does not say how large its inputs are, and they cannot be planned."
            )
        shape = (text_tokens,) if settings["type"] == "text" else blank.shape[1:]
        batch[model.config.input_keys(name)[0]] = blank.new_zeros(rows, *shape)
    return batch


def _kept(model, batch, bf16, checkpointing):
    """Bytes that a forward keeps for its backward."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    # Of each layer that checkpointing computes again, and of all else under None. Tensors are held, or their place in memory is reused.
    kept, inside, hooks = {None: {}}, [None], []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept.setdefault(inside[-1], {})[storage._cdata] = tensor
        return tensor

    def enter(module, arguments, named):
        for value in tree_leaves((arguments, named)):
            if torch.is_tensor(value) and torch.is_grad_enabled():
                note(value)
        inside.append(module)

    def leave(module, arguments, output):
        inside.pop()

    for module in model.modules() if checkpointing else ():
        if isinstance(module, GradientCheckpointingLayer):
            hooks += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    saved = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(**batch)
    for hook in hooks:
        hook.remove()
    outside = kept.pop(None)
    again = [sum(_bytes(t) for key, t in own.items() if key not in outside) for own in kept.values()]
    return sum(map(_bytes, outside.values())) + max(again, default=0)


def _bytes(tensor):
    return tensor.untyped_storage().nbytes()
