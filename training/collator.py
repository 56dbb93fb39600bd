"""Samples to batches: the processor on the raw inputs, the task on the targets."""

import torch


class SampleCollator:
    """`[{"images": ..., "text": ..., "target": ...}, ...]` to the batch that the model takes, with `labels`.

    Args:
        processor: CrossModalProcessor.
        encode_targets: targets of a batch to the `labels` tensor, or to texts of which the processor makes it; None leaves the labels
            out.
        deduplicate: encode an image that several rows of a batch share once.
        row_ids: also say which rows of the dataset a batch holds, as `row_ids (B,)`. A model does not take them: see
            `CrossModalTrainer`.
        unimodal: also encode the labels of each modality alone where samples have them (`"unimodal_targets": {input: label}`); the
            label of the row stands for an input that is not named, none (-100) for one whose label is None.
    """

    def __init__(self, processor, encode_targets=None, deduplicate=True, row_ids=False, unimodal=True):
        self.processor = processor
        self.encode_targets = encode_targets
        self.deduplicate = deduplicate
        self.row_ids = row_ids
        self.unimodal = unimodal

    def __call__(self, samples):
        # A model may read fewer modalities than the rows have.
        inputs = {}
        for name in self.processor.modality_names:
            key = self.processor.argument_of(name)
            if any(f"{name}_tokens" in sample for sample in samples):
                # Rows that share an input share its tokens too.
                shared = {sample[f"{name}_key"]: sample[f"{name}_tokens"] for sample in samples}
                inputs[f"{name}_tokens"] = [shared[sample[f"{name}_key"]] for sample in samples]
            else:
                inputs[key] = [sample.get(key) for sample in samples]
        if self.processor.writes_on and all("text" in sample for sample in samples):
            inputs["text"] = [sample["text"] for sample in samples]
        labels = {}
        if self.encode_targets is not None:
            targets = self.encode_targets([sample["target"] for sample in samples])
            if torch.is_tensor(targets):
                labels["labels"] = targets
                if self.unimodal and all("unimodal_targets" in sample for sample in samples):
                    labels["unimodal_targets"] = self._unimodal_targets(samples)
            else:
                inputs["text_target"] = targets
        if self.row_ids and all("row" in sample for sample in samples):
            labels["row_ids"] = torch.tensor([sample["row"] for sample in samples])
        batch = dict(self.processor(**inputs, deduplicate=self.deduplicate))
        # Labels first: Trainer takes the length of the first tensor for the size of the batch.
        first = {"labels": batch.pop("labels")} if "labels" in batch else {}
        return first | labels | batch

    def _unimodal_targets(self, samples):
        """(B,M), or (B,M,A) of several labels."""
        arguments = [self.processor.argument_of(name) for name in self.processor.modality_names]
        columns = [[sample["unimodal_targets"].get(key, sample["target"]) for sample in samples] for key in arguments]
        return torch.stack([self.encode_targets(column) for column in columns], dim=1)
