"""Contrast over batches that do not fit: the gradient of the whole batch, with the activations of a part of it in memory.

Letters: B batch, U distinct inputs, T tokens, D hidden_size.
"""

from contextlib import nullcontext

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from ..modeling.features_crossmodal import ModalityFeatures


def backward_in_parts(model, batch, rows_at_once, backward=None, context=None, scale=1.0):
    """Loss and gradient of `CrossModalForRetrieval` on a whole batch, encoded `rows_at_once` rows at a time.

    After GradCache (Gao et al. 2021, arXiv 2101.06983), for tokens too: (1) every part is encoded without a graph; (2) the
    loss of the whole batch, over all processes, gives the gradient of embeddings and tokens, and of what stands on them;
    (3) every part is encoded again, with the same random numbers, and sends that gradient on to the encoders.

    Args:
        model: CrossModalForRetrieval, alone or under peft. batch: inputs of its forward, with labels or without.
        backward: function of a loss; None: its own `backward`. context: function that gives the context of a forward
            (autocast). scale: of the loss and its gradient.

    Returns:
        the output of the model for the whole batch, without a graph.
    """
    context = context or nullcontext
    send = backward or (lambda loss: loss.backward())
    head = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = dict(batch)
    labels, modality_mask = inputs.pop("labels", None), inputs.pop("modality_mask", None)
    collected = head.crossmodal._collect_inputs(inputs)
    sizes = set(head.crossmodal._numbers_of_rows(collected).values())
    if len(sizes) != 1:
        raise ValueError(f"gradient caching needs as many rows of every modality. Got {sizes}.")
    parts = torch.arange(sizes.pop()).split(rows_at_once)
    kept, states, presence = [], [], []
    with torch.no_grad():
        for rows in parts:
            states.append((torch.get_rng_state(), *get_device_states(*_on_device(collected))))
            with context():
                found, there = head._features_of(*_part(collected, modality_mask, rows))
            kept.append(found)
            presence.append(there)
    leaves = [{name: _as_leaves(item) for name, item in found.items()} for found in kept]
    with context():
        whole, there = _joined(leaves, [len(rows) for rows in parts]), torch.cat(presence)
        output = head._output(whole, there, labels)
    send(scale * output.loss)
    for rows, state, found in zip(parts, states, leaves, strict=True):
        torch.set_rng_state(state[0])
        set_device_states(*state[1:])
        with context():
            again, _ = head._features_of(*_part(collected, modality_mask, rows))
            surrogate = sum(
                (made * cached.grad).sum()
                for name, item in again.items()
                for made, cached in zip(item.tensors(), found[name].tensors(), strict=True)
                if cached.grad is not None and made.requires_grad
            )
        if torch.is_tensor(surrogate):
            # What `send` does to a loss (the scale of half precision) is in the gradients that it sends on.
            surrogate.backward()
    for key, value in output.items():
        output[key] = _detached(value)
    return output


def _part(collected, modality_mask, rows):
    """What `_collect_inputs` returned, of some rows; of inputs that rows share those that are used."""
    part = {}
    for name, (values, mask, index, encoded) in collected.items():
        used, inverse = rows, None
        if index is not None:
            used, inverse = index[rows.to(index.device)].unique(return_inverse=True)
        used = used.to(values.device)
        part[name] = (values[used], None if mask is None else mask[used], inverse, encoded)
    return part, None if modality_mask is None else modality_mask[rows.to(modality_mask.device)]


def _joined(found, counts):
    """{modality: ModalityFeatures} of parts with `counts` rows to those of all rows."""
    names = dict.fromkeys(name for part in found for name in part)
    return {name: ModalityFeatures.joined([part.get(name) for part in found], counts) for name in names}


def _as_leaves(item):
    tensors = [values.detach().requires_grad_() for values in item.tensors()]
    return item.like(tensors, item.mask, item.index, item.present)


def _on_device(collected):
    """Tensors that say on which devices the forward draws random numbers."""
    return [item[0] for item in collected.values()]


def _detached(value):
    if isinstance(value, dict):
        return {key: _detached(own) for key, own in value.items()}
    return value.detach() if torch.is_tensor(value) else value
