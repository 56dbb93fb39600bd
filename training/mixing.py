"""Rows of a training batch mixed with each other or with noise: mixup, CutMix along time, SpecAugment. Options of a collator, off at
evaluation."""

import torch

from ..modeling.configuration_crossmodal import nearest_first


_TARGETS = ("labels", "unimodal_targets")
_DEFAULTS = {
    "mixup": 0.0,
    "time_cutmix": 0.0,
    "probability": 1.0,
    "time_masks": 0,
    "time_width": 0.1,
    "frequency_masks": 0,
    "frequency_width": 0.1,
    "noise": 0.0,
    "noise_probability": 0.3,
}


class MixingCollator:
    """A collator whose batches are mixed.

    Args:
        collator: SampleCollator that makes the batch.
        modalities: of the processor.
        num_labels, problem_type: of the labels: ids become probabilities (B,num_labels) where rows are mixed.
        mixup: x = l x_i + (1 - l) x_j of every modality and of the labels, l of a Beta(mixup, mixup) distribution (Zhang et al. 2018,
            arXiv 1710.09412); 0 leaves it out.
        time_cutmix: a stretch of time of a sound, or of a sequence of features, becomes that of another row, and as large a part of
            the label (Yun et al. 2019, arXiv 1905.04899, along time alone); the parameter of its Beta distribution.
        probability: of a batch to be mixed.
        time_masks, time_width, frequency_masks, frequency_width: SpecAugment (Park et al. 2019, arXiv 1904.08779): how many stretches
            of a spectrogram are covered by its mean, each at most this part of it.
        noise, noise_probability: white noise on each modality of each row (words are left as they are) with this probability, of a
            strength drawn between 0 and `noise` times the deviation of the modality's values: what weighs modalities learns which of
            them to rely upon.

    Rows are mixed with rows that have the same modalities. Where both are given, each batch is mixed by one of the two.

    Raises:
        ValueError: for text that is not yet tokens: words cannot be mixed. Freeze its encoder and keep its tokens (`token_cache`).
    """

    def __init__(self, collator, modalities, num_labels, problem_type, **options):
        for key in options:
            if key not in _DEFAULTS:
                raise ValueError(f"mixing.{key} is unknown. Expected any of {nearest_first(key, _DEFAULTS)}.")
        self.options = {**_DEFAULTS, **options}
        for key, value in self.options.items():
            whole = key.endswith("_masks")
            if isinstance(value, bool) or value < 0 or (whole and int(value) != value):
                raise ValueError(
                    f"mixing.{key}={value!r}. Expected a {'whole ' if whole else ''}number of at least 0."
                )
            if key in ("probability", "noise_probability", "time_width", "frequency_width") and value > 1:
                raise ValueError(f"mixing.{key}={value!r}. Expected a part, from 0 to 1.")
        self.collator, self.modalities = collator, modalities
        self.num_labels, self.problem_type = num_labels, problem_type
        # What several rows share could not be mixed.
        self.collator.deduplicate = False

    def __call__(self, samples):
        batch, options = self.collator(samples), self.options
        for key, mask_key in self._signals(batch, ("audio",)):
            batch[key] = self._spec_augment(batch[key], batch.get(mask_key))
        if options["noise"]:
            for key, _ in self._signals(batch, None):
                batch[key] = self._noisy(batch[key])
        kinds = [kind for kind in ("mixup", "time_cutmix") if options[kind]]
        labels = batch.get("labels")
        if not kinds or labels is None or torch.rand(()) >= options["probability"]:
            return batch
        targets = [batch[key] for key in _TARGETS if key in batch]
        if any(not values.is_floating_point() and (values < 0).any() for values in targets):
            return batch
        kind = kinds[int(torch.randint(len(kinds), ()))]
        share = torch.distributions.Beta(options[kind], options[kind]).sample().item()
        partner = self._partners(batch, len(labels))
        if kind == "mixup":
            return self._mixup(batch, partner, share)
        return self._cutmix(batch, partner, share)

    def _signals(self, batch, types):
        """(key, key of the mask) of what a batch has of modalities of some types, tokens too."""
        found = []
        for modality in self.modalities:
            name = modality["name"]
            if f"{name}_tokens" in batch:
                found += [(f"{name}_tokens", f"{name}_tokens_mask")] if types is None else []
            elif modality["values"] in batch and (types is None or modality["type"] in types):
                found.append((modality["values"], modality["mask"]))
        return found

    @staticmethod
    def _partners(batch, rows):
        """For each row (B,) another with the same modalities, or itself."""
        there = batch.get("modality_mask")
        patterns = torch.zeros(rows, 1) if there is None else there.float()
        partner = torch.arange(rows)
        for pattern in patterns.unique(dim=0):
            own = (patterns == pattern).all(dim=1).nonzero().squeeze(1)
            partner[own] = own[torch.randperm(len(own))]
        return partner

    def _mixup(self, batch, partner, share):
        for key, mask_key in self._signals(batch, None):
            values = batch[key]
            if not values.is_floating_point():
                raise ValueError(
                    f"mixing.mixup of {key!r}, which are words. Freeze its encoder and set token_cache, so that tokens are mixed, or "
                    "leave mixup out."
                )
            mask = batch.get(mask_key)
            if mask is not None and mask.shape == values.shape[: mask.dim()]:
                # Of a row that is longer, the end alone.
                values = values * mask.view(*mask.shape, *[1] * (values.dim() - mask.dim())).to(values.dtype)
            batch[key] = share * values + (1 - share) * values[partner]
            if mask is not None:
                batch[mask_key] = mask | mask[partner] if mask.dtype == torch.bool else mask.maximum(mask[partner])
        return self._with_labels(batch, partner, share)

    def _cutmix(self, batch, partner, share):
        signals = self._signals(batch, ("audio", "features"))
        if not signals:
            raise ValueError("mixing.time_cutmix needs sound or sequences of features, and no row has any.")
        kept = []
        for key, mask_key in signals:
            values, mask = batch[key], batch.get(mask_key)
            axis = _time_axis(values, mask)
            length = values.shape[axis]
            width = int(round((1 - share) * length))
            start = int(torch.randint(length - width + 1, ()))
            stretch = [slice(None)] * values.dim()
            stretch[axis] = slice(start, start + width)
            values = values.clone()
            values[tuple(stretch)] = values[partner][tuple(stretch)]
            batch[key] = values
            if mask is not None and mask.dim() == 2 and mask.shape[1] == length:
                mask = mask.clone()
                mask[:, start : start + width] = mask[partner][:, start : start + width]
                batch[mask_key] = mask
            kept.append(1 - width / length)
        # Whole steps of sequences of several lengths are not the same part of each.
        return self._with_labels(batch, partner, sum(kept) / len(kept))

    def _with_labels(self, batch, partner, share):
        for key in _TARGETS:
            if key in batch:
                labels = batch[key]
                if not labels.is_floating_point():
                    labels = torch.nn.functional.one_hot(labels, self.num_labels).float()
                batch[key] = share * labels + (1 - share) * labels[partner]
        return batch

    def _noisy(self, values):
        """Values (B,...) of which some rows have noise added. Words stay as they are."""
        if not values.is_floating_point():
            return values
        rows = (len(values), *[1] * (values.dim() - 1))
        strength = torch.rand(rows) * (torch.rand(rows) < self.options["noise_probability"])
        return values + torch.randn_like(values) * strength * self.options["noise"] * values.std()

    def _spec_augment(self, values, mask):
        """Spectrograms (B,F,T) or (B,T,F) with stretches of time and bands covered by the mean of each."""
        options = self.options
        if values.dim() != 3 or not (options["time_masks"] or options["frequency_masks"]):
            return values
        time = _time_axis(values, mask)
        values, mean = values.clone(), values.mean(dim=(1, 2), keepdim=True)
        for axis, kind in ((time, "time"), (3 - time, "frequency")):
            length = values.shape[axis]
            places = torch.arange(length).view(1, -1, 1) if axis == 1 else torch.arange(length).view(1, 1, -1)
            for _ in range(int(options[f"{kind}_masks"])):
                width = torch.rand(len(values), 1, 1) * options[f"{kind}_width"] * length
                start = torch.rand(len(values), 1, 1) * (length - width)
                covered = (places >= start) & (places < start + width)
                values = torch.where(covered, mean, values)
        return values


def _time_axis(values, mask):
    """Axis of time of waveforms (B,T), spectrograms (B,F,T) or (B,T,F), sequences (B,T,...): the one that the mask is of, else the
    longer one of a spectrogram."""
    if values.dim() == 2:
        return 1
    if mask is not None and mask.dim() == 2 and mask.shape[1] in values.shape[1:3]:
        return 1 if mask.shape[1] == values.shape[1] else 2
    return 1 if values.dim() > 3 or values.shape[1] >= values.shape[2] else 2
