"""CrossModalProcessor: raw images, text, sound, frames and features, any of them missing, to one batch of tensors.

Letters: B batch, T steps, M modalities, H W pixels.
Shipped to the Hub beside the weights: imports only torch, transformers, numpy and sibling files.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import logging

from .chat_crossmodal import CHAT_TEMPLATE, check_conversation, is_conversation, render, without_oldest
from .feature_extraction_eeg_crossmodal import EEGFeatureExtractor

# Not called here: what a file imports is saved with it, and a folder with model and processor runs in `pipeline`.
from .pipeline_crossmodal import CrossModalPipeline  # noqa: F401
from .reading_crossmodal import (
    FRAME_SAMPLINGS,
    evenly,
    read_image,
    read_numbers,
    read_sound,
    read_video,
    read_wave,
    resample,
)
from .reading_points_crossmodal import point_values, read_points


logger = logging.get_logger(__name__)

# The argument of `__call__` for the first modality of a type, as in other processors of transformers.
_ARGUMENTS = {"vision": "images", "text": "text", "audio": "audio", "video": "videos"}
_SUB_PROCESSORS = {
    "vision": "image_processor",
    "video": "image_processor",
    "text": "tokenizer",
    "audio": "feature_extractor",
}
# From here on a tokenizer's `model_max_length` says that it has none.
_NO_LIMIT = 1_000_000
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "xmod", "data2vec-text")
_LOADERS = {
    "image_processor": AutoImageProcessor,
    "tokenizer": AutoTokenizer,
    "feature_extractor": AutoFeatureExtractor,
}


class _NoTokenizer:
    """What a processor without text has for a tokenizer: Trainer asks every processor's for ids of special tokens."""

    eos_token_id = bos_token_id = pad_token_id = None

    def __bool__(self):
        return False


class CrossModalProcessor(ProcessorMixin):
    """One call from raw inputs of any modalities to the batch that a CrossModal model takes.

    Args:
        image_processor, tokenizer, feature_extractor: any subset; a modality needs the one of its type.
        decoder_tokenizer: of what is written, where it has other words than the text that is read.
        chat_template: for dialogue (Jinja, as everywhere in transformers); conversations are rendered with the one of
            chat_crossmodal.py if there is none.
        modalities: per modality, in the order of the model's `modality_names`, a dict with `name`, `type`, `values` and
            `mask` (keys of the batch), `max_tokens`, `num_frames` and `frame_sampling` of video, `context` of features, `views` of
            images, `feature_size` of points, and `options` (arguments of its sub-processor, where
            two modalities of a type differ). `from_config` writes them.
        writer: of a model that writes text, a dict with `bos_token_id`, `eos_token_id` and `max_tokens` (None: no limit).

    Example:
        >>> processor = CrossModalProcessor.from_encoders(model.config, vision="google/vit-base-patch16-224", text="...")
        >>> batch = processor(images=[image, None], text=["what is this?", "what is that?"])
        >>> batch["modality_mask"]
        tensor([[ True,  True], [False,  True]])
    """

    image_processor = None
    tokenizer = _NoTokenizer()
    feature_extractor = None

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        feature_extractor=None,
        decoder_tokenizer=None,
        chat_template=None,
        modalities=None,
        writer=None,
    ):
        given = {"image_processor": image_processor, "tokenizer": tokenizer, "feature_extractor": feature_extractor}
        given["decoder_tokenizer"] = decoder_tokenizer
        given = {name: value for name, value in given.items() if value is not None}
        # Sub-processors are found by the signature of `__init__`; only those that are there can be saved.
        self.get_attributes = partial(list, tuple(given))
        super().__init__(**given, chat_template=chat_template)
        # Folders tell by it that there is such a tokenizer to load.
        self.writer = {**writer, "own_tokenizer": decoder_tokenizer is not None} if writer else None
        if writer and tokenizer is None and decoder_tokenizer is None:
            raise ValueError("a model that writes text needs a tokenizer, which is None. Pass tokenizer=....")
        self.modalities = modalities or _default_modalities(given)
        for modality in self.modalities:
            needed = _SUB_PROCESSORS.get(modality["type"])
            if needed and needed not in given:
                raise ValueError(
                    f"modality {modality['name']!r} of type {modality['type']!r} needs {needed}, which is None. Pass "
                    f"{needed}=... (for example from {_LOADERS[needed].__name__}.from_pretrained)."
                )

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # A sub-processor that was None when saved must stay None: transformers would look for its files.
        types = {modality["type"] for modality in (processor_dict or {}).get("modalities") or ()}
        needed = {_SUB_PROCESSORS.get(kind) for kind in types}
        writer = (processor_dict or {}).get("writer") or {}
        needed |= {"decoder_tokenizer" if writer.get("own_tokenizer") else "tokenizer"} if writer else set()
        full = [*_LOADERS, "decoder_tokenizer"]
        present = [
            name
            for name in full
            if name in (processor_dict or {})
            or (name == "tokenizer" and (not types or name in needed))
            or (name == "decoder_tokenizer" and name in needed)
        ]
        narrowed = type(cls.__name__, (cls,), {"get_attributes": classmethod(lambda c: present)})
        found = super(CrossModalProcessor, narrowed)._get_arguments_from_pretrained(
            pretrained_model_name_or_path, processor_dict, **kwargs
        )
        found = dict(zip(present, found, strict=True))
        return [found.get(name) for name in full]

    @classmethod
    def from_config(
        cls,
        config,
        image_processor=None,
        tokenizer=None,
        feature_extractor=None,
        decoder_tokenizer=None,
        options=None,
    ):
        """The processor of a model's config.

        Args:
            config: CrossModalConfig.
            options: {modality: arguments of its sub-processor}.
        """
        modalities = []
        for name in config.modality_names:
            values, mask = config.input_keys(name)
            settings = config.modality_settings[name]
            modality = {"name": name, "type": settings["type"], "values": values, "mask": mask}
            if settings.get("max_tokens") is not None:
                modality["max_tokens"] = settings["max_tokens"]
            elif settings["type"] == "text" and getattr(tokenizer, "model_max_length", 0) >= _NO_LIMIT:
                # A tokenizer that was made here knows no limit; the encoder has one.
                positions = _positions_of(getattr(config, f"{name}_config"))
                modality |= {} if positions is None else {"max_tokens": positions}
            if settings["type"] == "video":
                frames = settings.get("num_frames") or getattr(getattr(config, f"{name}_config"), "num_frames", None)
                modality |= {"num_frames": frames} if frames else {}
            modality |= {key: settings[key] for key in ("context", "views", "frame_sampling") if settings.get(key)}
            if settings["type"] == "points":
                modality["feature_size"] = getattr(config, f"{name}_config").feature_size
            if (options or {}).get(name):
                modality["options"] = dict(options[name])
            modalities.append(modality)
        decoder, writer = getattr(config, "decoder_config", None), None
        if decoder is not None:
            limit = decoder.max_position_embeddings if decoder.decoder_type == "transformer" else None
            writer = {"bos_token_id": decoder.bos_token_id, "eos_token_id": decoder.eos_token_id, "max_tokens": limit}
            words = tokenizer if decoder_tokenizer is None else decoder_tokenizer
            if words is not None and len(words) > decoder.vocab_size:
                raise ValueError(
                    f"the tokenizer has {len(words)} words and the decoder vocab_size={decoder.vocab_size}. Give the "
                    "tokenizer that the decoder writes with, or a decoder with as many words."
                )
        return cls(
            image_processor, tokenizer, feature_extractor, decoder_tokenizer, modalities=modalities, writer=writer
        )

    @classmethod
    def from_encoders(cls, config, options=None, decoder=None, **named):
        """The processor of a model composed by `from_encoders`, from the same Hub ids or folders, by modality name.

        Args:
            config: `model.config`.
            named: modality name to a Hub id, a folder, or a ready image processor, tokenizer or feature extractor. The
                first modality of a type brings the sub-processor of that type.
            options: {modality: arguments of its sub-processor} where later ones differ.
            decoder: Hub id, folder or tokenizer of what writes; where a text modality has the same words, both share it.
        """
        found = {}
        for name in config.modality_names:
            attribute = _SUB_PROCESSORS.get(config.modality_settings[name]["type"])
            source = named.get(name)
            if attribute is None or source is None or attribute in found:
                continue
            found[attribute] = (
                _LOADERS[attribute].from_pretrained(source) if isinstance(source, str | Path) else source
            )
        if decoder is not None:
            own = AutoTokenizer.from_pretrained(decoder) if isinstance(decoder, str | Path) else decoder
            other = "tokenizer" in found and found["tokenizer"].get_vocab() != own.get_vocab()
            found["decoder_tokenizer" if other else "tokenizer"] = own
        return cls.from_config(config, **found, options=options)

    @property
    def modality_names(self):
        """Names of the modalities, in the order of the columns of `modality_mask`."""
        return [modality["name"] for modality in self.modalities]

    @property
    def writing_tokenizer(self):
        """The tokenizer of what is written."""
        return getattr(self, "decoder_tokenizer", None) or self.tokenizer

    def written(self, words, batch):
        """Texts that `generate` wrote: words (B,T) as it gave them for a batch of this processor, without what they go on from."""
        begun = batch["input_ids"].shape[1] if self.writes_on and "input_ids" in batch else 1
        return [text.strip() for text in self.batch_decode(words[:, begun:], skip_special_tokens=True)]

    def batch_decode(self, *args, **kwargs):
        """Texts of words that the model wrote, as the tokenizer's own."""
        return self.writing_tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        """The text of words that the model wrote, as the tokenizer's own."""
        return self.writing_tokenizer.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs):
        """What the stock pipeline asks for."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def writes_on(self):
        """Whether text is what the model goes on with: it writes, and no modality is text."""
        return bool(self.writer) and not any(modality["type"] == "text" for modality in self.modalities)

    @property
    def model_input_names(self):
        keys = [key for modality in self.modalities for key in (modality["values"], modality["mask"]) if key]
        return [*keys, "modality_mask"]

    def argument_of(self, name):
        """The argument of `__call__` that feeds modality `name`: `images`, `text`, `audio`, `videos`, or the name."""
        kind = next(modality["type"] for modality in self.modalities if modality["name"] == name)
        first = next(modality["name"] for modality in self.modalities if modality["type"] == kind)
        return _ARGUMENTS.get(kind, name) if first == name else name

    def __call__(
        self,
        images=None,
        text=None,
        audio=None,
        videos=None,
        sampling_rate=None,
        deduplicate=False,
        return_tensors="pt",
        text_target=None,
        padding=True,
        return_offsets_mapping=False,
        return_text_replacement_offsets=False,
        **named,
    ):
        """Raw inputs to a batch.

        Each modality is one item or a list of items, one per row, `None` where a row lacks it; a single item beside lists
        is used for every row.

        Args:
            images: PIL images, paths, URLs, bytes, arrays (H,W,3) or (3,H,W), tensors; or, where the modality says how many `views`
                a row has, a list of them for each row, of which so many are taken at even distances.
            text: strings, or conversations (lists of `{"role", "content"}`), whose oldest turns are left out where they are too
                long. Where no modality is text and the model writes text: what it is to go on with ("": it begins).
            audio: waveforms (samples,) from -1 to 1 or of 16- or 32-bit whole numbers, dicts with `array` and `sampling_rate`, or paths or
                bytes of sound files. Whatever their rate is, they are resampled to that of the feature extractor.
            videos: lists of frames, each an image, or paths of video files, of which the `num_frames` that the modality says are
                read, at even distances or from the middle. Where an encoder of images reads the frames, rows may have different
                numbers; else they must have the same.
            sampling_rate: in Hz, of the waveforms.
            deduplicate: give an image object that several rows share once, with `<key>_index (B,)` saying which row uses
                which: the model then encodes it once.
            text_target: strings that the model is to write, to `labels (B,T)`, -100 behind their end. Where `text` is what it
                goes on with, `decoder_input_ids` hold both, and the labels of `text` are -100.
            padding, return_text_replacement_offsets: for callers that ask; batches are always padded.
            return_offsets_mapping: also give `offset_mapping` (B,T,2), where in the text each word begins and ends.
            named: further modalities by name; points in any form that `read_points` takes (dicts of `coordinates`, `colors`, `features`,
                `uv`, `segments`, arrays (N,F), `.ply` and `.npz` files); EEG as dicts of `array` (channels, samples) in microvolts and
                `sampling_rate`; and feature sequences (T,...) as arrays, tensors, lists of them, or dicts of `array` and `mask` (T,),
                which says what steps are real. Also `<name>_tokens`: tokens (T,W) or (h,w,W) of a frozen encoder
                (`model.base_model.encode_tokens`), a list with one array per row, in place of the raw inputs of that modality.

        Returns:
            BatchFeature with the model's input keys, and `modality_mask (B,M)` bool if a row lacks a modality that
            others have. A modality that no row has is left out.

        Raises:
            ValueError: naming the row and what to do, for anything that cannot be read.
        """
        prompts, offsets = None, None
        text = self._as_text(text)
        views = any(modality.get("views") for modality in self.modalities)
        if not views and isinstance(images, list | tuple) and any(isinstance(item, list | tuple) for item in images):
            images, videos = self._of_conversations(images, videos)
        if self.writes_on:
            prompts, text = text, None
        tokens = {name: f"{name}_tokens" for name in self.modality_names if named.get(f"{name}_tokens") is not None}
        given = {"images": images, "text": text, "audio": audio, "videos": videos, **named}
        columns = self._columns({key: value for key, value in given.items() if value is not None}, tokens)
        count = len(next(iter(columns.values())))
        present = np.array(
            [[item is not None for item in columns.get(n, [None] * count)] for n in self.modality_names]
        )
        empty = np.flatnonzero(~present.any(axis=0))
        if len(empty):
            raise ValueError(f"row {empty[0]} has no modality at all. Give at least one of {self.modality_names}.")
        data = {}
        for modality, has in zip(self.modalities, present, strict=True):
            if has.any():
                rows = np.flatnonzero(has)
                items = [columns[modality["name"]][row] for row in rows]
                index, shown = None, rows
                values = tokens.get(modality["name"], modality["values"])
                if deduplicate and (modality["type"] in ("vision", "video") or modality["name"] in tokens):
                    places = {}
                    index = torch.tensor([places.setdefault(id(item), len(places)) for item in items])
                    firsts = [int((index == place).nonzero()[0]) for place in places.values()]
                    items, shown = [items[first] for first in firsts], rows[firsts]
                if modality["name"] in tokens:
                    made = _pad_tokens(modality["name"], items, shown)
                elif modality["type"] == "audio":
                    made = self._process_audio_rows(modality, items, shown, sampling_rate)
                elif modality["type"] == "text":
                    made, offsets = self._process_text_rows(modality, items, shown, return_offsets_mapping)
                else:
                    made = getattr(self, f"_process_{modality['type']}_rows")(modality, items, shown)
                if index is None or len(shown) == len(rows):
                    made = {key: _spread(values, rows, count) for key, values in made.items()}
                else:
                    made[f"{values}_index"] = _spread(index, rows, count)
                data |= made
        partly = present.any(axis=1) & ~present.all(axis=1)
        self._check_views(columns, data)
        if partly.any():
            data["modality_mask"] = torch.from_numpy(present.T.copy())
        if prompts is not None:
            prompts = [prompts] * count if isinstance(prompts, str) else list(prompts)
            if len(prompts) != count:
                raise ValueError(
                    f"{len(prompts)} texts to go on with for {count} rows. Give one for each, or one for all."
                )
        if prompts is not None and text_target is None:
            data |= self._prompts(prompts)
            if return_offsets_mapping:
                offsets = self._offsets_of_prompts(prompts, data["input_ids"].shape[1])
        elif text_target is not None:
            data |= self._targets(text_target, count, prompts)
        if offsets is not None:
            data["offset_mapping"] = offsets
        return BatchFeature(data, tensor_type=return_tensors)

    def _columns(self, given, tokens):
        """Arguments of `__call__` to {modality: one item per row}. tokens {modality: argument that holds its tokens}."""
        arguments = {self.argument_of(name): name for name in self.modality_names}
        names = arguments | {name: name for name in self.modality_names}
        names |= {argument: name for name, argument in tokens.items()}
        columns, single = {}, {}
        for key, value in given.items():
            if key not in names:
                raise ValueError(f"{key}=... is no input of this processor. Expected any of {sorted(arguments)}.")
            name = names[key]
            if name in tokens and key != tokens[name]:
                continue
            modality = next(modality for modality in self.modalities if modality["name"] == name)
            kind = "views" if modality.get("views") else modality["type"]
            rows = list(value) if name in tokens else _as_rows(kind, value)
            if rows is None:
                single[name] = value
            else:
                columns[name] = rows
        if not columns and not single:
            raise ValueError(f"no input was given. Pass at least one of {sorted(arguments)}.")
        counts = {name: len(rows) for name, rows in columns.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"modalities have different numbers of rows: {counts}. Give None where a row lacks one.")
        count = next(iter(counts.values()), 1)
        if count == 0:
            raise ValueError("an empty list was given. Expected at least one row.")
        return columns | {name: [value] * count for name, value in single.items()}

    def apply_chat_template(self, conversation, chat_template=None, add_generation_prompt=False, **kwargs):
        """transformers' own, with `CHAT_TEMPLATE` where the processor has none. Where a conversation is too long for the model, its
        oldest turns are left out; the images in them stay.

        Raises:
            ValueError: for a chat without a user turn, and messages of another form.
        """
        several = len(conversation) > 0 and not isinstance(conversation[0], dict)
        chats = [getattr(chat, "messages", chat) for chat in (conversation if several else [conversation])]
        template = self._template(chat_template)
        fitting = [self._fitting(chat, template, add_generation_prompt) for chat in chats]
        return super().apply_chat_template(
            fitting if several else fitting[0],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **kwargs,
        )

    def _template(self, chosen=None):
        """A chat template by name or text, the processor's own, or `CHAT_TEMPLATE`."""
        return CHAT_TEMPLATE if chosen is None and self.chat_template is None else self._resolve_chat_template(chosen)

    def _fitting(self, messages, template, add_generation_prompt):
        """A conversation without as many of its oldest turns as are too many for the model."""
        check_conversation(messages)
        if self.writes_on:
            read, limit = self.writing_tokenizer, self.writer["max_tokens"]
            # Room for what is to be written, and the beginning.
            limit = limit and limit - 1 - min(limit // 4, 64)
        else:
            texts = [modality for modality in self.modalities if modality["type"] == "text"]
            if not texts:
                raise ValueError(f"this processor reads no text: its modalities are {self.modality_names}.")
            read, limit = self.tokenizer, self._limit_of(texts[0])
        while limit is not None:
            text = render(messages, template, add_generation_prompt)
            if len(read(text, add_special_tokens=not self.writes_on)["input_ids"]) <= limit:
                break
            shorter = without_oldest(messages)
            if shorter is None:
                break
            logger.warning_once(
                f"a chat is longer than the {limit} words that the model takes: its oldest turns are left out. This is said once."
            )
            messages = shorter
        return messages

    def _as_text(self, text):
        """Conversations among texts, rendered; whether an answer is to follow is told by who speaks last."""
        if is_conversation(text):
            template, asked = self._template(), text[-1].get("role") == "user"
            return render(self._fitting(text, template, asked), template, asked)
        if isinstance(text, list | tuple):
            return [self._as_text(item) if is_conversation(item) else item for item in text]
        return text

    def _of_conversations(self, images, videos):
        """Images of rows that may have several: one each for a modality of images, frames for one of video."""
        rows = [list(row) if isinstance(row, list | tuple) else [row] for row in images]
        types = [modality["type"] for modality in self.modalities]
        if "vision" not in types and "video" in types:
            return None, [row or None for row in rows]
        for number, row in enumerate(rows):
            if len(row) > 1:
                raise ValueError(
                    f"row {number} has {len(row)} images, and this model takes one per row. Use a model with a modality of type "
                    "'video', which takes several, or ask about one image."
                )
        return [row[0] if row else None for row in rows], videos

    def _prompts(self, texts):
        """Beginnings of texts, padded on the left: `input_ids` and `attention_mask` (B,T)."""
        words = self.writing_tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([self.writer["bos_token_id"], *ids]) for ids in words]
        ids = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self.writing_tokenizer.pad_token_id or 0, padding_side="left"
        )
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    def _offsets_of_prompts(self, texts, length):
        """Where the words of `_prompts` lie in their texts, (0, 0) for those that are in none."""
        read = self.writing_tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        offsets = read["offset_mapping"]
        return [[(0, 0)] * (length - len(own)) + list(own) for own in offsets]

    def _targets(self, texts, count, prompts=None):
        """What is to be written, with its end: labels (B,T), -100 behind it; behind prompts, what the decoder reads too."""
        if not self.writer:
            raise ValueError("text_target=... is for models that write text, and this processor's does not.")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if len(texts) != count:
            raise ValueError(f"{len(texts)} targets for {count} rows. Give one for each.")
        end, limit = self.writer["eos_token_id"], self.writer["max_tokens"]
        end = end[0] if isinstance(end, list) else end
        words = self.writing_tokenizer(texts, add_special_tokens=False)["input_ids"]
        if limit is not None and any(len(ids) >= limit for ids in words):
            logger.warning_once(
                f"some targets are longer than the decoder's {limit} words, and are cut there. This is said once."
            )
            words = [ids[: limit - 1] for ids in words]
        rows = [torch.tensor([*ids, end]) for ids in words]
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        if prompts is None:
            return {"labels": labels}
        begun = self.writing_tokenizer(prompts, add_special_tokens=False)["input_ids"]
        for row, (before, own) in enumerate(zip(begun, words, strict=True)):
            if limit is not None and len(before) + len(own) + 1 > limit:
                raise ValueError(
                    f"row {row}: a text of {len(before)} words to go on with and {len(own)} to write, and the decoder has "
                    f"{limit} positions. Shorten it, or take a decoder with more (max_position_embeddings)."
                )
        pad = self.writing_tokenizer.pad_token_id or 0
        read = [
            torch.tensor([self.writer["bos_token_id"], *before, *own])
            for before, own in zip(begun, words, strict=True)
        ]
        rows = [torch.cat([torch.full((len(before),), -100), row]) for before, row in zip(begun, rows, strict=True)]
        return {
            "labels": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100),
            "decoder_input_ids": torch.nn.utils.rnn.pad_sequence(read, batch_first=True, padding_value=pad),
        }

    def _process_text_rows(self, modality, items, rows, return_offsets_mapping=False):
        for row, item in zip(rows, items, strict=True):
            if not isinstance(item, str) or not item.strip():
                raise ValueError(
                    f"text of row {row} ({modality['name']!r}) is {item!r}. Expected a string with at least one word, "
                    "or None for a row without text."
                )
        limit = self._limit_of(modality)
        encoded = self.tokenizer(
            items,
            padding=True,
            truncation=limit is not None,
            max_length=limit,
            return_tensors="pt",
            return_offsets_mapping=return_offsets_mapping,
            **modality.get("options", {}),
        )
        if limit is not None and encoded["input_ids"].shape[1] >= limit:
            if any(part.overflowing for part in encoded.encodings or ()):
                logger.warning_once(
                    f"some {modality['name']!r} is longer than the limit of {limit} tokens, and is cut there. This is said once."
                )
        offsets = encoded["offset_mapping"].tolist() if return_offsets_mapping else None
        return {modality["values"]: encoded["input_ids"], modality["mask"]: encoded["attention_mask"]}, offsets

    def _limit_of(self, modality):
        """The most tokens of a text modality, or None."""
        limit = modality.get("max_tokens")
        if limit is None and self.tokenizer.model_max_length < _NO_LIMIT:
            limit = self.tokenizer.model_max_length
        return limit

    def _process_vision_rows(self, modality, items, rows):
        if modality.get("views"):
            views = [item if isinstance(item, list | tuple) else [item] for item in items]
            if not all(views):
                raise ValueError(
                    f"row {rows[[len(own) for own in views].index(0)]} has a list of no image. Give None for a row without."
                )
            modality, count = modality | {"views": None}, modality["views"]
            flat = [own[place] for own in views for place in evenly(len(own), count)]
            pixels = self._process_vision_rows(modality, flat, np.repeat(rows, count))[modality["values"]]
            return {modality["values"]: pixels.unflatten(0, (len(views), count))}
        images = [read_image(item, f"image of row {row}") for row, item in zip(rows, items, strict=True)]
        pixels = self.image_processor(images, return_tensors="pt", **modality.get("options", {}))["pixel_values"]
        return {modality["values"]: pixels}

    def _process_video_rows(self, modality, items, rows):
        """Frames of every row, `num_frames` of the modality where it says so, padded where it has a mask of frames."""
        wanted, places = modality.get("num_frames"), FRAME_SAMPLINGS[modality.get("frame_sampling", "uniform")]
        items = [
            item if isinstance(item, list | tuple) else read_video(item, f"video of row {row}", wanted, places)
            for row, item in zip(rows, items, strict=True)
        ]
        if wanted:
            items = [[item[place] for place in places(len(item), wanted)] if len(item) else item for item in items]
        counts = [len(item) for item in items]
        if min(counts) == 0:
            raise ValueError(
                f"the video of row {rows[counts.index(0)]} ({modality['name']!r}) has no frame. Expected at least 1, or None for a row "
                "without it."
            )
        if len(set(counts)) > 1 and not modality["mask"]:
            raise ValueError(
                f"{modality['name']!r} has {counts} frames per row. Expected the same number in every row: sample frames uniformly "
                "first, or give the processor `num_frames` of this modality."
            )
        frames = [
            read_image(frame, f"frame {index} of row {row}")
            for row, item in zip(rows, items, strict=True)
            for index, frame in enumerate(item)
        ]
        pixels = self.image_processor(frames, return_tensors="pt", **modality.get("options", {}))["pixel_values"]
        made = {modality["values"]: torch.nn.utils.rnn.pad_sequence(pixels.split(counts), batch_first=True)}
        if len(set(counts)) > 1:
            made[modality["mask"]] = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        return made

    def _process_audio_rows(self, modality, items, rows, sampling_rate):
        waves, expected = [], self.feature_extractor.sampling_rate
        for row, item in zip(rows, items, strict=True):
            rate = sampling_rate
            if isinstance(item, str | Path | bytes) or (isinstance(item, dict) and "array" not in item):
                item = read_sound(item, f"audio of row {row}")
            if isinstance(item, dict):
                rate = item.get("sampling_rate", rate)
                item = item.get("array")
            wave = None if item is None else read_wave(item, f"the samples of row {row} ({modality['name']!r})")
            if wave is None or wave.ndim != 1 or wave.size == 0 or not np.isfinite(wave).all():
                given = "nothing" if wave is None else f"shape {wave.shape}" if wave.size else "an empty clip"
                given = "NaN or infinity" if wave is not None and wave.ndim == 1 and wave.size else given
                raise ValueError(
                    f"audio of row {row} ({modality['name']!r}) is not readable (got {given}). Expected one finite "
                    "channel of samples, as an array or {'array': ..., 'sampling_rate': ...}."
                )
            if rate is None:
                raise ValueError(
                    f"the sampling rate of the audio of row {row} is not known. Pass sampling_rate=... in Hz, or "
                    "{'array': ..., 'sampling_rate': ...}."
                )
            waves.append(resample(wave, rate, expected))
        # Whisper takes its fixed window whatever the clip; others are padded to the longest clip.
        padding = {} if getattr(self.feature_extractor, "chunk_length", None) else {"padding": True}
        extracted = self.feature_extractor(
            waves,
            sampling_rate=expected,
            return_tensors="pt",
            return_attention_mask=True,
            **padding,
            **modality.get("options", {}),
        )
        key = next(k for k in ("input_values", "input_features") if k in extracted)
        made = {modality["values"]: extracted[key]}
        if "attention_mask" in extracted:
            # Under its own name: beside text, `attention_mask` would be taken for that of the words.
            made[modality["mask"]] = extracted["attention_mask"]
        return made

    def _process_features_rows(self, modality, items, rows):
        sequences, masks = [], []
        for row, item in zip(rows, items, strict=True):
            there, where = None, f"features of row {row} ({modality['name']!r})"
            if isinstance(item, dict):
                if item.get("array") is None:
                    raise ValueError(f"{where} have {sorted(item)}. Expected 'array', and maybe 'mask'.")
                item, there = item["array"], item.get("mask")
            sequence = torch.from_numpy(read_numbers(item, where))
            if (
                sequence.dim() < 2
                or sequence.numel() == 0
                or (sequences and sequence.shape[1:] != sequences[0].shape[1:])
            ):
                raise ValueError(
                    f"{where} have shape {tuple(sequence.shape)}. Expected "
                    f"(steps, ...) with at least one step{' and the size of row 0' if sequences else ''}."
                )
            steps = 2 * modality.get("context", 0) + 1
            if steps > 1 and len(sequence) == 1:
                # By itself, without what stands beside it.
                sequence, there = _in_the_middle(sequence, steps)
            elif steps > 1 and len(sequence) != steps:
                raise ValueError(
                    f"{where} have {len(sequence)} steps. This model takes a row with "
                    f"{steps // 2} neighbours on each side: {steps} steps and a mask of those that there are, or one step alone."
                )
            if not torch.isfinite(sequence).all():
                raise ValueError(
                    f"{where} contain NaN or infinity. Replace them, or give None for a row without this modality."
                )
            there = np.ones(len(sequence)) if there is None else there
            there = torch.from_numpy(read_numbers(there, f"the mask of {where}")).bool()
            if there.shape != (len(sequence),) or not there.any():
                raise ValueError(
                    f"{where} have {len(sequence)} steps and a mask of shape "
                    f"{tuple(there.shape)} with {int(there.sum())} real ones. Expected one for each step, at least one real."
                )
            sequences.append(sequence)
            masks.append(there)
        mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
        values = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        return {modality["values"]: values, modality["mask"]: mask}

    def _process_points_rows(self, modality, items, rows):
        name, pad = modality["name"], torch.nn.utils.rnn.pad_sequence
        read = [
            read_points(item, f"the points of row {row} ({name!r})") for row, item in zip(rows, items, strict=True)
        ]
        values = [
            torch.from_numpy(point_values(points, modality["feature_size"], f"the points of row {row} ({name!r})"))
            for row, points in zip(rows, read, strict=True)
        ]
        lengths = torch.tensor([len(own) for own in values])
        made = {
            modality["values"]: pad(values, batch_first=True),
            modality["mask"]: torch.arange(int(lengths.max())) < lengths[:, None],
        }
        for key, padding in (("uv", -1.0), ("segments", -1)):
            there = [key in points for points in read]
            if key == "segments" and any(there) and not all(there):
                raise ValueError(
                    f"some rows of {name!r} have segments, and row {rows[there.index(False)]} has none. Give all, or none."
                )
            if any(there):
                own = [torch.from_numpy(self._part_of(points, key, read, modality)) for points in read]
                made[f"{name}_{key}"] = pad(own, batch_first=True, padding_value=padding)
        return made

    def _part_of(self, points, key, read, modality):
        """uv or segments of a row; where it has no uv, as it is without images, those of points that nothing sees."""
        if key == "segments":
            return points[key]
        shapes = {other[key].shape[1:] for other in read if key in other}
        if len(shapes) > 1:
            raise ValueError(
                f"uv of {modality['name']!r} are of {sorted(shape[0] for shape in shapes)} views. Expected as many in every row."
            )
        return points.get(key, np.full((len(points["coordinates"]), *shapes.pop()), -1.0, dtype=np.float32))

    def _check_views(self, columns, data):
        """Refuses images that see no point, where it is said what they see."""
        vision = next((modality["name"] for modality in self.modalities if modality["type"] == "vision"), None)
        for modality in self.modalities:
            uv = data.get(f"{modality['name']}_uv") if modality["type"] == "points" else None
            if uv is None:
                continue
            if columns.get(vision) and getattr(self.image_processor, "do_center_crop", False):
                raise ValueError(
                    "uv say where whole images see points, and this image processor crops them (do_center_crop). Set it to False, and a "
                    "size of height and width."
                )
            seen = ((uv >= 0) & (uv <= 1)).all(dim=-1).flatten(1).any(dim=1)
            for row, image in enumerate(columns.get(vision, [])):
                if image is not None and not seen[row]:
                    raise ValueError(
                        f"the image of row {row} has no point in view: no uv of {modality['name']!r} lies within 0 and 1 (parts of the width "
                        "and the height of the image, not pixels). Correct uv, or give None for that image."
                    )

    def _process_eeg_rows(self, modality, items, rows):
        extract, features = EEGFeatureExtractor(**modality.get("options", {})), []
        for row, item in zip(rows, items, strict=True):
            where = f"the signal of row {row} ({modality['name']!r})"
            given = item if isinstance(item, dict) else {"array": item}
            features.append(torch.from_numpy(extract(given["array"], given.get("sampling_rate"), where)))
            if features[-1].shape[1] != features[0].shape[1]:
                raise ValueError(
                    f"{where} has {features[-1].shape[1]} channels, and that of row {rows[0]} {features[0].shape[1]}."
                )
        lengths = torch.tensor([len(item) for item in features])
        return {
            modality["values"]: torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
            modality["mask"]: torch.arange(int(lengths.max())) < lengths[:, None],
        }


def _default_modalities(given):
    """Modalities of a processor that no config described: one per sub-processor, under its usual name."""
    keys = {
        "image_processor": {"name": "vision", "type": "vision", "values": "pixel_values", "mask": None},
        "tokenizer": {"name": "text", "type": "text", "values": "input_ids", "mask": "attention_mask"},
    }
    if "feature_extractor" in given:
        values = given["feature_extractor"].model_input_names[0]
        keys["feature_extractor"] = {
            "name": "audio", "type": "audio", "values": values, "mask": "audio_attention_mask"
        }  # fmt: skip
    return [keys[name] for name in given]


def _positions_of(config):
    """Longest text that a text encoder of this config takes, or None."""
    count = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its kin number positions from behind the padding token on.
    offset = config.pad_token_id + 1 if count is not None and config.model_type in _OFFSET_POSITIONS else 0
    return None if count is None else count - offset


def _as_rows(kind, value):
    """The items of a batch, or None if `value` is a single item."""
    if kind == "video":
        nested = isinstance(value, list | tuple) and len(value) > 0
        rows = nested and (
            value[0] is None or isinstance(value[0], list | tuple | str | bytes | Path) or _axes(value[0]) == 4
        )
        return list(value) if rows else None
    if kind == "views":
        nested = isinstance(value, list | tuple) and any(
            item is None or isinstance(item, list | tuple) for item in value
        )
        return list(value) if nested else None
    if kind == "audio" and isinstance(value, list | tuple):
        return None if len(value) and isinstance(value[0], int | float) else list(value)
    if isinstance(value, list | tuple):
        return list(value)
    single_axes = {"vision": 3, "audio": 1, "features": 2, "eeg": 2, "points": 2}.get(kind, 0)
    return list(value) if _axes(value) > single_axes else None


def _in_the_middle(step, count):
    """One step (1,...) amid `count`, and the mask of it (count,)."""
    whole, mask = step.new_zeros(count, *step.shape[1:]), torch.zeros(count, dtype=torch.bool)
    whole[count // 2], mask[count // 2] = step[0], True
    return whole, mask


def _axes(value):
    """Axes of an array, 0 of anything else."""
    return getattr(value, "ndim", 0)


def _pad_tokens(name, items, rows):
    """Tokens of several rows as one batch: `<name>_tokens`, and `<name>_tokens_mask` if their numbers differ."""
    items = [
        torch.as_tensor(item if hasattr(item, "dtype") else read_numbers(item, f"{name}_tokens of row {row}"))
        for row, item in zip(rows, items, strict=True)
    ]
    for row, item in zip(rows, items, strict=True):
        if item.dim() not in (2, 3, 4) or item.shape[-1] != items[0].shape[-1] or item.dim() != items[0].dim():
            raise ValueError(
                f"{name}_tokens of row {row} has shape {tuple(item.shape)}. Expected (tokens, width) or (height, width of the "
                "grid, width), of videos by frame, as `encode_tokens` gives them, alike in every row."
            )
    if len({item.shape for item in items}) == 1:
        return {f"{name}_tokens": torch.stack(items)}
    padded = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)
    lengths = torch.tensor([len(item) for item in items])
    return {f"{name}_tokens": padded, f"{name}_tokens_mask": torch.arange(padded.shape[1]) < lengths[:, None]}


def _spread(values, rows, count):
    """Values of the present rows at their places in a batch of `count`, zeros elsewhere."""
    if len(rows) == count:
        return values
    whole = values.new_zeros(count, *values.shape[1:])
    whole[torch.from_numpy(rows)] = values
    return whole


CrossModalProcessor.register_for_auto_class()
