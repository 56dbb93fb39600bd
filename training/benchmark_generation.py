"""What writing costs: new words per second of `generate`, beside transformers' captioning models of the same size."""

import statistics

import torch
from tqdm import tqdm

from .benchmark import SIZES, in_turn, without_dropout


_NEW_WORDS = 25
# Name, arguments of `generate`.
SEARCHES = {"greedy": {"num_beams": 1}, "beam 4": {"num_beams": 4}}
BOS, EOS, PAD = 1, 2, 0


def _ours(size):
    from transformers import ViTConfig

    from crossmodal import CrossModalConfig, CrossModalForCaptioning, TextDecoderConfig

    vision = ViTConfig(image_size=size.image, patch_size=size.patch, num_hidden_layers=size.depth, **size.layers)
    decoder = TextDecoderConfig(
        vocab_size=size.vocabulary, num_hidden_layers=size.depth, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        max_position_embeddings=64, **size.layers,
    )  # fmt: skip
    return CrossModalForCaptioning(
        CrossModalConfig(modalities={"vision": vision}, num_fusion_layers=1, decoder_config=decoder, **size.layers)
    )


def _blip(size):
    """BLIP (Li et al. 2022, arXiv 2201.12086), its image encoder as deep as our encoder and fusion."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = dict(
        vocab_size=size.vocabulary, num_hidden_layers=size.depth, encoder_hidden_size=size.width,
        bos_token_id=BOS, eos_token_id=EOS, sep_token_id=EOS, pad_token_id=PAD, max_position_embeddings=64, **size.layers,
    )  # fmt: skip
    vision = dict(image_size=size.image[0], patch_size=size.patch, num_hidden_layers=size.depth + 1, **size.layers)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


def _encoder_decoder(size, decoder):
    from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    vision = ViTConfig(image_size=size.image, patch_size=size.patch, num_hidden_layers=size.depth + 1, **size.layers)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, decoder))
    tokens = {"decoder_start_token_id": BOS, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    model.generation_config.update(**tokens)
    return model


def _bert(size):
    from transformers import BertConfig

    return _encoder_decoder(
        size,
        BertConfig(
            vocab_size=size.vocabulary, num_hidden_layers=size.depth, is_decoder=True, add_cross_attention=True,
            max_position_embeddings=64, **size.layers,
        ),
    )  # fmt: skip


def _gpt2(size):
    from transformers import GPT2Config

    return _encoder_decoder(
        size,
        GPT2Config(
            vocab_size=size.vocabulary, n_embd=size.width, n_layer=size.depth, n_head=size.heads, n_positions=64,
            add_cross_attention=True, bos_token_id=BOS, eos_token_id=EOS,
        ),
    )  # fmt: skip


CONTENDERS = {
    "CrossModalForCaptioning": _ours,
    "BLIP": _blip,
    "VisionEncoderDecoder, BERT": _bert,
    "VisionEncoderDecoder, GPT-2": _gpt2,
}


def compare(size="tiny", rounds=7, batches=(1, 8), compiled=False, device=None, write=print):
    """New words per second of `generate`, 25 words from an image each, whatever is written.

    Args:
        size: row of `SIZES`. rounds: of measuring in turn. batches: images at once.
        compiled: also greedy search with a static cache, and with that and a compiled forward, where a model takes it.

    Returns:
        list of `{"mode", "search", "batch", "model", "words_per_second", "ours_over_this", "parameters"}`, the ratio a median over
        rounds; numbers are None where a model does not take a mode, which `why` says.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape, generator = SIZES[size], torch.Generator().manual_seed(0)
    models = {name: without_dropout(make(shape)).to(device).eval() for name, make in CONTENDERS.items()}
    write(f"{device}, {torch.get_num_threads()} threads; {_NEW_WORDS} new words, each from {_patches(shape)} patches.")
    plan = [("dynamic cache", search, batch) for search in SEARCHES for batch in batches]
    if compiled:
        plan += [(mode, "greedy", batch) for mode in ("static cache", "static cache, compiled") for batch in batches]
    table, refused = [], {}
    for mode, search, batch in tqdm(plan, desc="benchmark", leave=False):
        pixels = torch.randn(batch, 3, *shape.image, generator=generator).to(device)
        options = {"min_new_tokens": _NEW_WORDS, "max_new_tokens": _NEW_WORDS, "do_sample": False, **SEARCHES[search]}
        if mode != "dynamic cache":
            options["cache_implementation"] = "static"
        runs, failed = {}, {}
        for name, model in models.items():
            if name in refused:
                # Compiled, what fails with a static cache ends the whole process.
                failed[name] = refused[name]
                continue
            if mode == "static cache, compiled":
                # What runs at every word: the encoder has run before, by itself.
                model.forward = torch.compile(type(model).forward, dynamic=False).__get__(model)
            run = _writes(model, pixels, options)
            try:
                run()
                runs[name] = run
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
                refused[name] = failed[name]
        times = in_turn(runs, device, rounds)
        for name, model in models.items():
            if mode == "static cache, compiled" and name not in refused:
                del model.forward
            row = {"mode": mode, "search": search, "batch": batch, "model": name}
            row |= {"words_per_second": None, "ours_over_this": None, "why": failed.get(name)}
            if name in times:
                row["words_per_second"] = batch * _NEW_WORDS / statistics.median(times[name])
                if "CrossModalForCaptioning" in times:
                    ours = times["CrossModalForCaptioning"]
                    row["ours_over_this"] = statistics.median(a / b for a, b in zip(times[name], ours, strict=True))
            table.append(row | {"parameters": sum(p.numel() for p in model.parameters())})
    return table


def _patches(shape):
    return (shape.image[0] // shape.patch) * (shape.image[1] // shape.patch)


def _writes(model, pixels, options):
    def run():
        with torch.inference_mode():
            return model.generate(pixel_values=pixels, **options)

    return run


def where_time_goes(size="tiny", batch=1, rounds=5, device=None):
    """Parts of the time of greedy writing: {"encode": once, "forward": of the words, "generate": everything around them}."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape = SIZES[size]
    model = without_dropout(_ours(shape)).to(device).eval()
    pixels = torch.randn(batch, 3, *shape.image, device=device)
    options = {"min_new_tokens": _NEW_WORDS, "max_new_tokens": _NEW_WORDS, "do_sample": False}

    @torch.inference_mode()
    def encode():
        return model.encode(pixel_values=pixels)

    @torch.inference_mode()
    def words():
        memory = encode()
        ids, past = torch.full((batch, 1), BOS, device=device), None
        for _ in range(_NEW_WORDS):
            output = model(encoder_outputs=memory, decoder_input_ids=ids, past_key_values=past, use_cache=True)
            ids, past = output.logits[:, -1:].argmax(dim=-1), output.past_key_values

    times = in_turn({"encode": encode, "words": words, "whole": _writes(model, pixels, options)}, device, rounds)
    encoded, lean, whole = (statistics.median(times[name]) for name in ("encode", "words", "whole"))
    return {"encode": encoded / whole, "forward": (lean - encoded) / whole, "generate": (whole - lean) / whole}
