"""Tokens of frozen encoders, computed once and read from memory-mapped files afterwards.

An entry is found by what it depends on: the content of the input, and the encoder with its weights, the depths that are
tapped and the processor (together the name of the folder). Whatever of these changes, misses. A modality with `context` is
encoded each time: its tokens depend on the rows beside as well, and on which of their places are empty.
"""

import copy
import hashlib
import json
import os
import random
import tempfile
from pathlib import Path, PurePath

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from torch.utils.data import Dataset
from tqdm import tqdm

from ..processing.chat_crossmodal import is_conversation
from ..processing.processing_crossmodal import _SUB_PROCESSORS
from .processes import main_first


# Inputs of one file: large enough for few files, small enough to lose little when a run is cut off.
_CHUNK = 512


def content_key(value):
    """Hash of a raw input: text, encoded or decoded image, array, or a dict of them."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()[:32]


def input_key(value, kind):
    """`content_key` of an input of a modality of type `kind`: what is no text may be given as the path of its file."""
    return content_key(value if kind == "text" else _as_file(value))


def _as_file(value):
    if isinstance(value, str | PurePath):
        return {"path": value}
    if isinstance(value, list | tuple) and len(value) and isinstance(value[0], str | PurePath):
        # Frames of a video.
        return [{"path": frame} for frame in value]
    return value


def _update(digest, value):
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path") is not None:
            if os.path.isfile(value["path"]):
                _update_with_file(digest, value["path"])
                return
            # A URL, or a file that is not there: whoever reads it says so.
            value = str(value["path"])
        elif value.get("bytes") is not None:
            value = value["bytes"]
    if isinstance(value, str):
        digest.update(b"text" + value.encode())
    elif isinstance(value, bytes):
        digest.update(b"file" + value)
    elif isinstance(value, list) and value and isinstance(value[0], dict) and {"bytes", "path"} & set(value[0]):
        # Frames of a video.
        digest.update(f"list{len(value)}".encode())
        for item in value:
            _update(digest, item)
    elif is_conversation(value):
        digest.update(b"chat" + json.dumps(value, sort_keys=True).encode())
    elif isinstance(value, dict):
        for key in sorted(value):
            digest.update(key.encode())
            _update(digest, value[key])
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):
        value = _with_colors(value)
        digest.update(f"image{value.mode}{value.size}".encode() + value.tobytes())
    else:
        # Frames of a video may be images.
        array = np.ascontiguousarray([_with_colors(item) for item in value] if isinstance(value, list) else value)
        digest.update(f"array{array.dtype}{array.shape}".encode() + array.tobytes())


def _with_colors(value):
    """An image with a palette as the model sees it: its pixels are only numbers of colours. All else as it is."""
    return value.convert("RGB") if getattr(value, "mode", None) in ("P", "PA") else value


def _update_with_file(digest, path):
    digest.update(b"file")
    # A video may be larger than the memory that is left.
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)


def _hash_of_encoder(model, processor, name):
    """Hash of all that the tokens of a modality depend on, but its inputs."""
    encoder, config = model.base_model.encoders[name], model.config
    digest = hashlib.sha256()
    settings = next(entry for entry in processor.modalities if entry["name"] == name)
    part = getattr(processor, _SUB_PROCESSORS.get(settings["type"], ""), None)
    made_by = part.to_json_string() if hasattr(part, "to_json_string") else ""
    if hasattr(part, "backend_tokenizer"):
        # Padding and truncation are those of its last call.
        rules = json.loads(part.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        made_by = json.dumps(rules, sort_keys=True) + repr(part)
    known = (type(encoder).__name__, config.levels_of(name), config.modality_settings[name], settings, made_by)
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    digest.update(getattr(config, f"{name}_config").to_json_string(use_diff=False).encode())
    update_with_weights(digest, encoder)
    return digest.hexdigest()[:32]


def update_with_weights(digest, module, but=None):
    """Adds the names, types, shapes and values of a module's weights to a hash, of all `but` those whose names begin so."""
    for key, value in module.state_dict().items():
        if but is not None and key.startswith(but):
            continue
        digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


class TokenCache:
    """Tokens of the frozen encoders of a model: `names`, without those `in_context`.

    Args:
        model: a model of the family with frozen encoders. processor: its processor.
        folder: of the files, for any number of encoders; None: `crossmodal/tokens` in the cache folder of Hugging Face.
        dtype: of the stored tokens, "float32" or "float16" (half the room, rounded).

    Raises:
        ValueError: if no encoder of the model is frozen.
    """

    def __init__(self, model, processor, folder=None, dtype="float32"):
        frozen, settings = list(model.config.frozen_modalities), model.config.modality_settings
        if not frozen:
            raise ValueError(
                "no encoder of this model is frozen: what a training encoder makes of its inputs changes with every step. "
                f"Freeze some of {model.config.modality_names}, or leave the cache of tokens out."
            )
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype={dtype!r} of the cache of tokens. Expected 'float32' or 'float16'.")
        self.in_context = [name for name in frozen if settings[name].get("context")]
        self.names = [name for name in frozen if name not in self.in_context]
        self.model, self.processor, self.dtype = model, processor, dtype
        root = Path(HF_HOME, "crossmodal", "tokens") if folder is None else Path(folder)
        self.stores = {
            name: _Store(root / f"{name}-{_hash_of_encoder(model, processor, name)}-{dtype}") for name in self.names
        }

    def fill(self, dataset, batch_size=64, progress=True):
        """Computes what is missing of a `RowDataset`, in every variant that its augmentation may draw.

        Returns:
            a `CachedDataset` over it, and the number of inputs that had to be computed.
        """
        keys, computed = {}, 0
        for name in self.names:
            argument, store = self.processor.argument_of(name), self.stores[name]
            kind = self.model.config.modality_settings[name]["type"]
            plain = [None if value is None else input_key(value, kind) for value in dataset.contents(argument)]
            count = len(dataset.variants_of(argument))
            keys[name] = [[key and _variant_key(key, variant) for key in plain] for variant in range(count)]
            missing = {
                key: (row, variant)
                for variant, column in enumerate(keys[name])
                for row, key in enumerate(column)
                if key is not None and key not in store
            }
            computed += len(missing)
            with tqdm(
                total=len(missing), desc=f"tokens of {name}", disable=not progress or not missing, leave=False
            ) as bar:
                for chunk in _batches(list(missing.items()), _CHUNK):
                    tokens = []
                    for batch in _batches(chunk, batch_size):
                        tokens += self._encode(
                            name, [dataset.input_of(row, argument, variant) for _, (row, variant) in batch]
                        )
                        bar.update(len(batch))
                    store.write([key for key, _ in chunk], tokens)
        return CachedDataset(dataset, self, keys), computed

    def _encode(self, name, items):
        """Tokens of raw inputs, one array (T,W) or (h,w,W) each."""
        values, mask = self.model.config.input_keys(name)
        batch = self.processor(**{self.processor.argument_of(name): items}).to(self.model.device)
        tokens, real = self.model.base_model.encode_tokens(name, batch[values], batch.get(mask) if mask else None)
        tokens = tokens.to(getattr(torch, self.dtype)).cpu()
        return [row.numpy() if real is None else row[real[index].cpu()].numpy() for index, row in enumerate(tokens)]


def _variant_key(key, variant):
    return f"{key}-{variant}" if variant else key


def _batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


class CachedDataset(Dataset):
    """A `RowDataset` whose samples hold `<name>_tokens` of frozen encoders in place of their raw inputs.

    keys {modality: [keys of all rows, per variant]}.
    """

    def __init__(self, dataset, cache, keys):
        self.dataset, self.stores, self.keys = dataset, cache.stores, keys
        self.cached = {cache.processor.argument_of(name): name for name in keys}
        self.targets, self.groups, self.places = dataset.targets, dataset.groups, dataset.places

    def __len__(self):
        return len(self.dataset)

    def lengths(self):
        return self.dataset.lengths()

    def unaugmented(self):
        """The same samples as they are."""
        plain = copy.copy(self)
        plain.dataset = self.dataset.unaugmented()
        plain.keys = {name: variants[:1] for name, variants in self.keys.items()}
        return plain

    def __getitem__(self, index):
        sample = self.dataset.sample(index, leave_out=self.cached)
        for name, keys in self.keys.items():
            key = random.choice(keys)[index]
            sample[f"{name}_tokens"] = None if key is None else self.stores[name].read(key)
            sample[f"{name}_key"] = key
        return sample


def with_cached_tokens(recipe, model, processor, datasets, write):
    """The datasets {name: RowDataset} of a run, with tokens in place of the inputs of frozen encoders, if a recipe asks.

    A dataset that stands there twice is read once.
    """
    if not recipe.token_cache:
        return datasets
    own = Path(recipe.output_dir, "checkpoints", "tokens")
    done, cached = {}, {}
    with main_first():
        cache = TokenCache(model, processor, own if recipe.token_cache is True else recipe.token_cache)
        if cache.in_context:
            write(
                f"tokens of {', '.join(cache.in_context)} are not kept: with context they depend on the rows beside."
            )
        if not cache.names:
            return datasets
        for name, dataset in datasets.items():
            if id(dataset) not in done:
                done[id(dataset)], computed = cache.fill(dataset)
                write(
                    f"tokens of {', '.join(cache.names)}, {name} rows: {computed:,} inputs computed, the others known."
                )
            cached[name] = done[id(dataset)]
    return cached


def _name_of(listed):
    """Of a file of numbers {key: [offset, shape]}: shapes too, so that no listing is ever read against other numbers."""
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]


class _Store:
    """Arrays by key, in files of many: `<n>.tokens` holds the numbers, `<n>.json` says where each array lies.

    A file has its name only once it is whole, the numbers before their listing: a process that is killed while it writes
    leaves nothing that is taken for an entry. `<n>` is a hash of all keys and places, so that several processes may fill a
    folder at once. What was written when `<n>` was the first key is still read.
    """

    def __init__(self, folder):
        self.folder, self.places, self._maps = Path(folder), {}, {}
        for listing in sorted(self.folder.glob("*.json")):
            entry = json.loads(listing.read_text())
            numbers = listing.with_suffix(".tokens")
            if numbers.exists() and numbers.stat().st_size == entry["bytes"]:
                self._list(numbers, entry)

    def _list(self, numbers, entry):
        for key, (offset, shape) in entry["arrays"].items():
            self.places[key] = (numbers, entry["dtype"], offset, tuple(shape))

    def __contains__(self, key):
        return key in self.places

    def __len__(self):
        return len(self.places)

    def read(self, key):
        numbers, dtype, offset, shape = self.places[key]
        if numbers not in self._maps:
            self._maps[numbers] = np.memmap(numbers, dtype=dtype, mode="r")
        return np.array(self._maps[numbers][offset : offset + int(np.prod(shape))]).reshape(shape)

    def write(self, keys, arrays):
        self.folder.mkdir(parents=True, exist_ok=True)
        offsets = np.cumsum([0, *(array.size for array in arrays)]).tolist()
        listed = {key: [offset, array.shape] for key, offset, array in zip(keys, offsets, arrays, strict=False)}
        dtype = str(arrays[0].dtype)
        entry = {"dtype": dtype, "bytes": offsets[-1] * np.dtype(dtype).itemsize, "arrays": listed}
        numbers = self.folder / f"{_name_of(listed)}.tokens"
        self._write_whole(numbers, (array.tobytes() for array in arrays))
        self._write_whole(numbers.with_suffix(".json"), [json.dumps(entry).encode()])
        self._maps.pop(numbers, None)
        self._list(numbers, entry)

    def _write_whole(self, path, parts):
        handle, aside = tempfile.mkstemp(dir=self.folder, suffix=".writing")
        try:
            with os.fdopen(handle, "wb") as file:
                for part in parts:
                    file.write(part)
            os.replace(aside, path)
        finally:
            Path(aside).unlink(missing_ok=True)
