"""`CrossModalForCaptioning`: text written word by word from the fused tokens of all modalities.

Letters: B batch, T words, S tokens of memory, D width of the decoder, V vocabulary, C candidates, M modalities.
Shipped to the Hub beside the weights: imports only torch, transformers and sibling files.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_crossmodal import TextDecoderConfig
from .decoder_crossmodal import CAUSAL_MODELS, DECODERS
from .losses_crossmodal import mean_loss, text_counts, text_losses
from .modeling_crossmodal import CrossModalModel, CrossModalPreTrainedModel


@dataclass
class FusedMemory(ModelOutput):
    """What a decoder reads, the `encoder_outputs` of generation.

    last_hidden_state (B,1+S,D): the pooled vector of all modalities, and their fused tokens; attention_mask (B,1+S) bool,
    or None where all of them are real; modality_weights (B,M).
    """

    last_hidden_state: torch.FloatTensor | None = None
    attention_mask: torch.BoolTensor | None = None
    modality_weights: torch.FloatTensor | None = None


@dataclass
class CrossModalCaptioningOutput(ModelOutput):
    """Output of `CrossModalForCaptioning`.

    loss: scalar. logits (B,T,V), or None in training with `loss_chunk_size`. past_key_values: EncoderDecoderCache.
    encoder_last_hidden_state (B,S,D), modality_weights (B,M). decoder_attentions and cross_attentions: per layer of the decoder
    (B,h,T,T) and (B,h,T,S), on request.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    modality_weights: torch.FloatTensor | None = None
    decoder_attentions: tuple | None = None
    cross_attentions: tuple | None = None


class CrossModalForCaptioning(CrossModalPreTrainedModel, GenerationMixin):
    """Writes text about any modalities: captions, free answers (with the question as text modality), turns of a dialogue.

    Generation is transformers' own. A model without a text modality takes `input_ids` for the beginning of the text that it
    is to go on with; with one they are that modality, and the beginning is `decoder_input_ids`.
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config, encoders=None):
        super().__init__(config)
        if config.decoder_config is None:
            raise ValueError(
                "CrossModalForCaptioning has a decoder, and decoder_config is None. Give one, for example "
                "decoder_config=TextDecoderConfig(vocab_size=len(tokenizer))."
            )
        decoder = config.decoder_config
        self.crossmodal = CrossModalModel(config, encoders)
        self.main_input_name = self.crossmodal.main_input_name
        self.embed_tokens = nn.Embedding(decoder.vocab_size, decoder.hidden_size, padding_idx=decoder.pad_token_id)
        self.decoder = DECODERS[decoder.decoder_type](decoder, config.hidden_size)
        self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
        self.reads_text = any(settings["type"] == "text" for settings in config.modality_settings.values())
        self.post_init()
        self._apply_freezing()
        if self.generation_config is not None:
            self.generation_config.update(
                bos_token_id=decoder.bos_token_id,
                eos_token_id=decoder.eos_token_id,
                pad_token_id=decoder.pad_token_id,
                decoder_start_token_id=decoder.bos_token_id,
            )

    @classmethod
    def from_encoders(cls, *, decoder=None, freeze=(), **named):
        """As for every model of the family, and a decoder.

        Args:
            decoder: TextDecoderConfig or its fields as a dict, for one that starts anew; or a pretrained causal model (Hub id,
                folder or `PreTrainedModel`, of a type in `CAUSAL_MODELS`), whose self-attention and embeddings it takes over:
                its cross-attention is new, and gated.
        """
        state = {}
        if isinstance(decoder, str | Path | PreTrainedModel):
            model = decoder
            if not isinstance(decoder, PreTrainedModel):
                model = AutoModelForCausalLM.from_pretrained(decoder)
            if model.config.model_type not in CAUSAL_MODELS:
                raise ValueError(
                    f"decoder: a {type(model).__name__} of model_type={model.config.model_type!r}. Weights are taken over from "
                    f"{sorted(CAUSAL_MODELS)}. Give one of these, or a TextDecoderConfig for a decoder that starts anew."
                )
            fields, state = CAUSAL_MODELS[model.config.model_type](model)
            tokens = {
                key: getattr(model.config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            }
            if tokens["pad_token_id"] is None:
                tokens["pad_token_id"] = tokens["eos_token_id"]
            decoder = TextDecoderConfig(**fields, **tokens, gated_cross_attention=True)
        model = super().from_encoders(freeze=freeze, decoder_config=decoder, **named)
        missing, unexpected = model.load_state_dict(state, strict=False)
        if state and (
            unexpected
            or not all("cross" in n or "gate" in n or n.startswith(("crossmodal.", "lm_head")) for n in missing)
        ):
            raise RuntimeError(f"weights of the decoder do not fit: {unexpected}, {missing[:3]}")
        return model

    def get_input_embeddings(self):
        """The embeddings of the words that are written."""
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_encoder(self, modality=None):
        """The fusion model, or the encoder of one modality."""
        return self.crossmodal if modality not in self.config.modality_names else self.crossmodal.encoders[modality]

    def get_decoder(self):
        return self.decoder

    def set_attn_implementation(self, attn_implementation, **kwargs):
        """transformers' own; by name `decoder_config` for the decoder, which is no model of its own that it would find."""
        super().set_attn_implementation(attn_implementation, **kwargs)
        decoder, chosen = self.config.decoder_config, self.config._attn_implementation
        if isinstance(attn_implementation, dict):
            chosen = attn_implementation.get("decoder_config", decoder._attn_implementation)
        decoder._attn_implementation = chosen

    def encode(self, modality_mask=None, task_ids=None, **inputs):
        """FusedMemory of the inputs of a `CrossModalModel`."""
        fused = self.crossmodal(**inputs, modality_mask=modality_mask, task_ids=task_ids, return_dict=True)
        # The whole first, weighted by modality; then its parts.
        memory = torch.cat([fused.pooler_output[:, None], fused.last_hidden_state], dim=1)
        mask = nn.functional.pad(fused.attention_mask, (1, 0), value=True)
        return FusedMemory(memory, mask, fused.modality_weights)

    @can_return_tuple
    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        labels=None,
        target_weights=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        decoder_inputs_embeds=None,
        encoder_outputs=None,
        past_key_values=None,
        use_cache=None,
        modality_mask=None,
        task_ids=None,
        output_attentions=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **named_inputs,
    ):
        """The inputs of `CrossModalModel`, and of the decoder.

        Args:
            labels: (B,T) words to write, their end included, -100 for what does not count. The decoder reads them one step
                late unless `decoder_input_ids` are given.
            target_weights: (B,) what each row counts, such as the score of an answer.
            decoder_input_ids: (B,T) words so far, or decoder_inputs_embeds (B,T,D); decoder_attention_mask (B,T), 1 for real
                ones: padding may stand on the left.
            encoder_outputs: FusedMemory of an earlier call, instead of the inputs.
            past_key_values: EncoderDecoderCache of the words before. use_cache: return one.
            logits_to_keep: scores of so many last words only; 0: of all.
            num_items_in_batch: the number of words to write in all accumulation steps and processes (with target_weights the sum
                of `count_items`); the loss is then the part of these rows in the mean over all. None: their own mean.

        Returns:
            CrossModalCaptioningOutput.
        """
        if not self.reads_text and input_ids is not None:
            # As in other captioning models: there is no other text than the one that is written.
            if decoder_input_ids is None:
                decoder_input_ids, decoder_attention_mask = input_ids, attention_mask
            input_ids = attention_mask = None
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if encoder_outputs is None:
            inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
            inputs = {key: value for key, value in inputs.items() if value is not None} | named_inputs
            encoder_outputs = self.encode(modality_mask, task_ids, **inputs)
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = FusedMemory(*encoder_outputs)
        config = self.config.decoder_config
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                start = encoder_outputs.last_hidden_state.new_full((len(encoder_outputs[0]), 1), config.bos_token_id)
                decoder_input_ids = start.long()
            else:
                decoder_input_ids = self.shift_right(labels)
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.embed_tokens(decoder_input_ids)
        self._check_length(decoder_inputs_embeds.shape[1], past_key_values)
        if past_key_values is None and use_cache:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = None if decoder_attention_mask is None else decoder_attention_mask.bool()
        if mask is not None and not torch.compiler.is_compiling() and mask.all():
            mask = None
        memory_mask = encoder_outputs.attention_mask
        if memory_mask is not None and memory_mask.device.type == "cpu" and not torch.compiler.is_compiling():
            # Attention without a mask is cheaper. On a GPU to look would make every word wait.
            memory_mask = None if memory_mask.all() else memory_mask
        hidden, selves, crosses = self.decoder(
            decoder_inputs_embeds,
            encoder_outputs.last_hidden_state,
            memory_mask,
            mask,
            past_key_values,
            bool(output_attentions),
        )
        loss, logits = None, None
        if labels is not None and config.loss_chunk_size is not None and self.training:
            loss = self._loss_in_chunks(hidden, labels, target_weights)
        else:
            kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
            logits = self.lm_head(kept)
            if labels is not None:
                loss = mean_loss(*self.row_losses(logits, labels, target_weights))
        if loss is not None and num_items_in_batch is not None:
            loss = loss * self._share_of_step(num_items_in_batch, labels, target_weights=target_weights)[0]
        return CrossModalCaptioningOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            modality_weights=encoder_outputs.modality_weights,
            decoder_attentions=selves if output_attentions else None,
            cross_attentions=crosses if output_attentions else None,
        )

    def shift_right(self, labels):
        """What the decoder reads when it is to write labels (B,T): the start, and all of them but the last."""
        config = self.config.decoder_config
        start = labels.new_full((len(labels), 1), config.bos_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], dim=1)

    def _check_length(self, length, past):
        """A text longer than the decoder's positions, before an index out of range says it."""
        config = self.config.decoder_config
        if config.decoder_type != "transformer" or torch.compiler.is_compiling():
            return
        if past is not None:
            length = length + past.get_seq_length()
        if length > config.max_position_embeddings:
            raise ValueError(
                f"a text of {int(length)} words, and the decoder has max_position_embeddings={config.max_position_embeddings}. "
                "Shorten the prompt, or generate less (max_new_tokens)."
            )

    def _loss_in_chunks(self, hidden, labels, target_weights):
        """Mean of `text_losses` without the scores of all words at once: they are computed again in the backward."""
        config = self.config.decoder_config
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        weights = None if target_weights is None else target_weights[:, None].expand_as(labels).flatten()
        size, total = config.loss_chunk_size, 0.0
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            total = total + checkpoint(
                self._loss_of,
                flat[part],
                targets[part],
                None if weights is None else weights[part],
                use_reentrant=False,
            )
        return total / text_counts(labels, target_weights).sum().clamp(min=1)

    def _loss_of(self, hidden, labels, weights):
        """Sum over words, each as a row of its own. hidden (N,D), labels (N,), weights (N,) or None."""
        return self.row_losses(self.lm_head(hidden)[:, None], labels[:, None], weights)[0].sum()

    def row_losses(self, logits, labels, target_weights=None, **batch):
        """Loss of each row (B,), and how much it counts (B,), of logits and the inputs of a forward."""
        return text_losses(logits, labels, self.config.decoder_config.label_smoothing, target_weights)

    def count_items(self, labels, target_weights=None, **batch):
        """How much the rows of a batch, the inputs of a forward, count in a mean over several batches: (1,)."""
        return text_counts(labels, target_weights).sum().view(1)

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """transformers' `generate`, on the inputs of a forward: what the modalities say is fused once, before the first word.

        Of a model without a text modality `input_ids` and `attention_mask` are the beginning of the text, of others
        `decoder_input_ids` and `decoder_attention_mask`.

        Raises:
            ValueError: if nothing is given to write about, and for a prompt that leaves no room for a word.
        """
        if inputs is not None:
            kwargs[self.main_input_name] = inputs
        if not self.reads_text:
            for name in ("input_ids", "attention_mask"):
                value = kwargs.pop(name, None)
                if value is not None:
                    kwargs.setdefault(f"decoder_{name}", value)
        if kwargs.get("encoder_outputs") is None:
            known = [*self.crossmodal._input_names, "modality_mask", "task_ids"]
            given = {name: kwargs.pop(name) for name in known if name in kwargs}
            given = {name: value for name, value in given.items() if value is not None}
            if not any(name in self.crossmodal._input_names for name in given):
                raise ValueError(
                    f"nothing to write about: no input of {self.config.modality_names} was given. Expected any of "
                    f"{[self.config.input_keys(name)[0] for name in self.config.modality_names]}, or encoder_outputs."
                )
            with torch.no_grad():
                memory = self.encode(**given)
            if memory.attention_mask.all():
                # Attention without a mask is cheaper, at every word.
                memory = FusedMemory(**{**memory, "attention_mask": None})
            kwargs["encoder_outputs"] = memory
        start = kwargs.get("decoder_input_ids", kwargs.get("decoder_inputs_embeds"))
        if start is not None:
            self._check_length(start.shape[1] + 1, None)
        return super().generate(generation_config=generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        use_cache=None,
        decoder_inputs_embeds=None,
        **kwargs,
    ):
        """What the next forward reads: the words that the cache does not hold yet."""
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        # A part of the words has another stride at every word, for each of which torch.compile would compile anew.
        given = {"decoder_input_ids": input_ids[:, past:].clone(memory_format=torch.contiguous_format)}
        if decoder_inputs_embeds is not None and past == 0:
            given = {"decoder_inputs_embeds": decoder_inputs_embeds}
        return given | {
            "past_key_values": past_key_values,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def _reorder_cache(self, past_key_values, beam_idx):
        """Of beam search. All beams of a row read the same memory, whose keys and values stay as they are."""
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values

    @torch.no_grad()
    def rank_answers(self, candidates, top_k=128, batch_size=256, **inputs):
        """Given answers by their likelihood: by the first word of each, then the best of them by all of theirs (ALBEF, Li et
        al. 2021, arXiv 2107.07651).

        Args:
            candidates: (C,T) words of each answer, its end included, -100 behind it. top_k: ranked by the whole.
            batch_size: answers that the decoder reads at once. inputs: of a forward, or `encoder_outputs`.

        Returns:
            indices (B,k) into the candidates, best first, and their log-likelihoods (B,k).
        """
        memory = inputs.pop("encoder_outputs", None) or self.encode(**inputs)
        candidates = candidates.to(memory.last_hidden_state.device)
        first = self(encoder_outputs=memory).logits[:, 0].log_softmax(dim=-1)
        k = min(top_k, len(candidates))
        chosen = first[:, candidates[:, 0]].topk(k, dim=1).indices
        rows = torch.arange(len(chosen), device=chosen.device).repeat_interleave(k)
        scores = []
        for row, answer in zip(rows.split(batch_size), chosen.flatten().split(batch_size), strict=True):
            own = FusedMemory(memory.last_hidden_state[row], memory.attention_mask[row])
            labels = candidates[answer]
            logits = self(encoder_outputs=own, decoder_input_ids=self.shift_right(labels)).logits
            found = logits.log_softmax(dim=-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(-1)
            scores.append(found.masked_fill(labels == -100, 0.0).sum(dim=1))
        scores, order = torch.cat(scores).view(chosen.shape).sort(dim=1, descending=True)
        return chosen.gather(1, order), scores


CrossModalForCaptioning.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["CrossModalForCaptioning", "TextDecoderConfig"]
