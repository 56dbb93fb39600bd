"""Rows of a batch in groups that are alike: fused apart, a group costs nothing for a modality that none of its rows has, nor for
what is padding in all of them.

Letters: B rows of a batch, P rows of a group, U distinct inputs of a modality, T_m tokens of it, D hidden_size, M modalities.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

from dataclasses import replace

import torch


# What a group costs beside its tokens, in tokens (of a processor: calls of small matrix products are cheap there, and costly to a GPU).
_GROUP_COST = {"cpu": 128}
_GROUP_COST_ELSEWHERE = 4096
# In how many groups of like length rows with the same modalities are tried, and what must be saved for it.
_PARTS, _WORTH_IT = (1, 2, 4), 0.85
# What a token costs that is only looked at (keys and values of it are projected), in tokens that look.
_LOOKED_AT = 0.2


def alike_rows(levels, masks, shared, looking):
    """Groups of rows [(P_1,), (P_2,), ...] with the same modalities and like lengths, or None where they save too little.

    levels, masks and shared: arguments of a fusion operator (see `fusion_crossmodal`); looking: modalities whose tokens are computed
    row by row even where rows share an input.
    """
    if all(mask is None for mask in masks.values()):
        return None
    device = next(iter(levels.values()))[0].device
    each = _GROUP_COST.get(device.type, _GROUP_COST_ELSEWHERE)
    rows = next(len(mask) for mask in masks.values() if mask is not None)
    lengths = {name: depths[0].shape[1] for name, depths in levels.items()}
    # Modalities whose tokens are computed once for all rows that share them.
    once = {
        name
        for name, depths in levels.items()
        if name not in looking and name in shared and shared[name].index is not None and len(depths[0]) < rows
    }
    whole = sum(
        length * (_LOOKED_AT * len(levels[name][0]) if name in once else rows) for name, length in lengths.items()
    )
    # To ask a GPU for numbers waits for all that it was told before.
    if whole < each / (1 - _WORTH_IT):
        return None
    inputs = {name: shared[name].index.cpu() for name in once}
    ends = torch.stack([_ends(masks[name], rows, length) for name, length in lengths.items()], dim=1)
    held = ((ends > 0) * 2 ** torch.arange(len(lengths))).sum(dim=1)
    order = ends.sum(dim=1).argsort()
    order = order[held[order].argsort(stable=True)]
    by_modalities = order.split(held.unique(return_counts=True)[1].tolist())

    def cost(group):
        longest = ends[group].amax(dim=0).tolist()
        return each + sum(
            length * (_LOOKED_AT * len(inputs[name][group].unique()) if name in once else len(group))
            for name, length in zip(levels, longest, strict=True)
        )

    tried = [[part for group in by_modalities for part in group.chunk(parts)] for parts in _PARTS]
    costs = [sum(map(cost, groups)) for groups in tried]
    best = costs.index(min(costs))
    if len(tried[best]) < 2 or costs[best] > _WORTH_IT * (whole + each):
        return None
    return [group.to(device) for group in tried[best]]


def _ends(mask, rows, length):
    """Number of tokens up to the last real one of each row, 0 of a row without any: (B,) on the CPU. mask (B,T) or None."""
    if mask is None:
        return torch.full((rows,), length)
    return (mask * torch.arange(1, length + 1, device=mask.device)).amax(dim=1).cpu()


def of_rows(group, levels, masks, shared, least):
    """The arguments of a fusion operator for the rows of one of `alike_rows`: modalities that they have, tokens up to their last
    real one, and of what rows share the distinct inputs that they take.

    least: {modality: how many tokens are kept, real or not}, of those whose pooling looks at a certain place.
    """
    own_levels, own_masks, own_shared = {}, {}, {}
    for name, depths in levels.items():
        mask, item = masks[name], shared.get(name)
        length = depths[0].shape[1]
        if mask is not None:
            mask = mask.index_select(0, group)
            length = int(_ends(mask, len(group), length).max())
            if not length:
                continue
            length = max(length, least.get(name, 0))
            mask = mask[:, :length]
            mask = None if mask.all() else mask
        own_masks[name] = mask
        inputs = group if item is None or item.index is None else item.index[group]
        if item is not None:
            distinct, index = inputs.unique(return_inverse=True)
            if len(distinct) < len(group):
                inputs = distinct
                own = None if item.mask is None else item.mask[distinct, :length]
                own_shared[name] = replace(item, levels=[], mask=own, index=index, present=None)
        own_levels[name] = [tokens[:, :length].index_select(0, inputs) for tokens in depths]
    return own_levels, own_masks, own_shared
