"""What is drawn at random while batches are made, by seeds that come with the batch: a run that goes on after it was cut off, with
workers that started afresh, draws what it would have drawn."""

import hashlib
import random
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .datasets import read_samples


@contextmanager
def seeded(*parts):
    """The generators of Python, numpy and torch (of the CPU) seeded by `parts`, and afterwards as they were before."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "big"))
    torch.default_generator.manual_seed(int.from_bytes(digest, "big", signed=True))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


class SeededSampler(Sampler):
    """The order of another sampler, with a seed for each place in it.

    Args:
        sampler: of indices. Where it draws from torch's own generator, that is seeded too.
        seed: with the epoch (`set_epoch`), of all that is drawn.

    Yields:
        (parts of a seed, index, index before it), as `Batches` takes them.
    """

    def __init__(self, sampler, seed):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        with seeded(self.seed, self.epoch):
            order = list(self.sampler)
        return (((self.seed, self.epoch, place), index, order[place - 1]) for place, index in enumerate(order))


class Batches(Dataset):
    """Whole batches of a dataset: its samples, and what a collator makes of them, under the seed of the first of them.

    Args:
        dataset: of samples. Those that it cannot read may be left out (see `read_samples`); which, is then in the batch as
            `broken_samples`, a list of (which, why). Where that leaves nothing, the sample before the batch is taken once more: all ranks
            must make as many steps.
        collate: samples to a batch.
    """

    def __init__(self, dataset, collate):
        self.dataset, self.collate = dataset, collate

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, drawn):
        # A sampler of somebody else's gives indices alone: what is drawn then follows from no seed of the place.
        drawn = [item if isinstance(item, tuple) else (None, item, None) for item in drawn]
        seed, _, spare = drawn[0]
        with nullcontext() if seed is None else seeded(*seed):
            samples, broken = read_samples(self.dataset, [item for _, item, _ in drawn])
            if not samples and spare is not None:
                samples = read_samples(self.dataset, [spare])[0]
            if not samples:
                raise ValueError(
                    f"nothing is left of a batch of {len(drawn)}, nor the sample before it: {broken[0]} Give larger batches, or remove "
                    "what is broken."
                )
            batch = self.collate(samples)
        if broken:
            batch["broken_samples"] = [(error.where, str(error)) for error in broken]
        return batch


def as_it_is(batch):
    """The collator of `Batches`."""
    return batch
