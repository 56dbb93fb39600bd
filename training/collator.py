"""Samples to batches: the processor on the raw inputs, the task on the targets."""


class SampleCollator:
    """`[{"images": ..., "text": ..., "target": ...}, ...]` to the batch that the model takes, with `labels`.

    Args:
        processor: CrossModalProcessor.
        encode_targets: targets of a batch to the `labels` tensor; None leaves the labels out.
        deduplicate: encode an image that several rows of a batch share once.
    """

    def __init__(self, processor, encode_targets=None, deduplicate=True):
        self.processor = processor
        self.encode_targets = encode_targets
        self.deduplicate = deduplicate

    def __call__(self, samples):
        # A model may read fewer modalities than the rows have.
        keys = map(self.processor.argument_of, self.processor.modality_names)
        inputs = {key: [sample.get(key) for sample in samples] for key in keys}
        # Labels first: Trainer takes the length of the first tensor for the size of the batch.
        labels = {}
        if self.encode_targets is not None:
            labels = {"labels": self.encode_targets([sample["target"] for sample in samples])}
        return labels | dict(self.processor(**inputs, deduplicate=self.deduplicate))
