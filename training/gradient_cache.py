"""Contrast over batches that do not fit: the gradient of the whole batch, with the activations of a part of it in memory.

Letters: B batch, U distinct inputs, T tokens, D hidden_size.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..modeling.retrieval_crossmodal import ModalityFeatures


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
        whole, there = _merge(leaves, [len(rows) for rows in parts]), torch.cat(presence)
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
            send(surrogate)
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


def _as_leaves(item):
    embeddings = item.embeddings.detach().requires_grad_()
    levels = [level.detach().requires_grad_() for level in item.levels]
    same = [level for level, own in zip(levels, item.levels, strict=True) if own is item.tokens]
    tokens = same[0] if same else item.tokens.detach().requires_grad_()
    return ModalityFeatures(embeddings, levels, tokens, item.mask, item.index, item.present)


def _merge(found, counts):
    """{modality: ModalityFeatures} of parts with `counts` rows to those of all rows."""
    merged = {}
    for name in dict.fromkeys(name for part in found for name in part):
        items = [part.get(name) for part in found]
        length = max(item.tokens.shape[1] for item in items if item is not None)
        there = [item for item in items if item is not None]
        offset, index, present, masks = 0, [], [], []
        for item, count in zip(items, counts, strict=True):
            device = there[0].embeddings.device
            if item is None:
                index.append(torch.zeros(count, dtype=torch.long, device=device))
                present.append(torch.zeros(count, dtype=torch.bool, device=device))
                continue
            own = torch.arange(count, device=device) if item.index is None else item.index
            index.append(own + offset)
            present.append(torch.ones_like(own, dtype=torch.bool) if item.present is None else item.present)
            mask = item.mask
            if mask is None:
                mask = torch.ones(item.tokens.shape[:2], dtype=torch.bool, device=device)
            masks.append(nn.functional.pad(mask, (0, length - mask.shape[1])))
            offset += len(item.embeddings)
        present, mask = torch.cat(present), torch.cat(masks)
        levels = [
            torch.cat([_padded(item.levels[depth], length) for item in there]) for depth in range(len(there[0].levels))
        ]
        merged[name] = ModalityFeatures(
            torch.cat([item.embeddings for item in there]),
            levels,
            torch.cat([_padded(item.tokens, length) for item in there]),
            None if mask.all() else mask,
            torch.cat(index),
            None if present.all() else present,
        )
    return merged


def _padded(tokens, length):
    return nn.functional.pad(tokens, (0, 0, 0, length - tokens.shape[1]))


def _on_device(collected):
    """Tensors that say on which devices the forward draws random numbers."""
    return [item[0] for item in collected.values()]


def _detached(value):
    if isinstance(value, dict):
        return {key: _detached(own) for key, own in value.items()}
    return value.detach() if torch.is_tensor(value) else value
