"""What views cost: spectrograms per second of MMViT, of one of its views, and of transformers' AudioSpectrogramTransformer, at equal FLOP."""

import bisect
import statistics
from functools import partial

import torch
from tqdm import tqdm

from .benchmark import flops_of, in_turn, without_dropout


# Bands of AST, and half its frames: 5 seconds.
SPECTROGRAM = (128, 512)
_OURS = "MMViT, two views"


def _ours(width, spectrogram, views=2):
    from crossmodal import MMViTConfig, MMViTEncoder

    config = MMViTConfig(
        num_channels=1, image_size=list(spectrogram), patch_size=[7, 15][:views], patch_stride=[4, 8][:views],
        embed_dim=width, depths=[1, 2, 5, 2], drop_path_rate=0.0,
    )  # fmt: skip
    return MMViTEncoder(config)


def _ast(width, spectrogram):
    """Patches of 16 at strides of 10, twelve layers, as in AST's own model; only the width is chosen."""
    from transformers import ASTConfig, ASTModel

    bands, frames = spectrogram
    config = ASTConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=4, num_mel_bins=bands, max_length=frames
    )
    return ASTModel(config)


# Name to (function of width and spectrogram, widths to choose from).
CONTENDERS = {
    _OURS: (_ours, None),
    "MViT, one view": (partial(_ours, views=1), range(1, 400)),
    "AST": (_ast, range(8, 1600, 4)),
}


def _input_of(name, values):
    """values (B,F,T) as a model takes them."""
    return {"input_values": values.transpose(1, 2)} if name == "AST" else {"values": values}


def _flops(name, make, width, spectrogram):
    """FLOP of a forward, counted without computing it."""
    with torch.device("meta"):
        return flops_of(make(width, spectrogram).eval(), _input_of(name, torch.empty(1, *spectrogram)))


def _nearest(name, make, widths, flops, spectrogram):
    """The width whose FLOP are nearest to `flops`."""
    place = bisect.bisect_left(widths, flops, key=lambda width: _flops(name, make, width, spectrogram))
    near = widths[max(0, place - 1) : place + 1]
    return min(near, key=lambda width: abs(_flops(name, make, width, spectrogram) - flops))


def compare(width=16, spectrogram=SPECTROGRAM, batches=(1, 4), rounds=7, device=None, write=print):
    """Spectrograms per second of the encoders, forward and in training (forward and backward).

    Args:
        width: of the first stage of MMViT; those of the others follow from equal FLOP. spectrogram: (bands, frames).
        batches: spectrograms at once. rounds: of measuring in turn.

    Returns:
        list of `{"mode", "batch", "model", "samples_per_second", "ours_over_this", "gflop_per_sample", "width",
        "parameters"}`, the ratio a median over rounds.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    values = torch.randn(max(batches), *spectrogram, generator=torch.Generator().manual_seed(0))
    wanted = _flops(_OURS, _ours, width, spectrogram)
    models, flops = {}, {}
    for name, (make, widths) in CONTENDERS.items():
        own = width if name == _OURS else _nearest(name, make, widths, wanted, spectrogram)
        flops[name] = _flops(name, make, own, spectrogram)
        models[name] = without_dropout(make(own, spectrogram).to(device))
    write(
        f"{device}, {torch.get_num_threads()} threads, spectrograms of {spectrogram[0]} bands and {spectrogram[1]} frames."
    )
    table = []
    for mode, batch in tqdm([(m, b) for m in ("forward", "training") for b in batches], desc="benchmark", leave=False):
        runs, inputs = {}, values[:batch].to(device)
        for name, model in models.items():
            run = _training if mode == "training" else _forward
            runs[name] = run(model.train(mode == "training"), _input_of(name, inputs))
        times = in_turn(runs, device, rounds)
        for name, seconds in times.items():
            config = models[name].config
            table.append(
                {
                    "mode": mode,
                    "batch": batch,
                    "model": name,
                    "samples_per_second": batch / statistics.median(seconds),
                    "ours_over_this": statistics.median(a / b for a, b in zip(seconds, times[_OURS], strict=True)),
                    "gflop_per_sample": flops[name] * (3 if mode == "training" else 1) / 1e9,
                    "width": getattr(config, "embed_dim", None) or config.hidden_size,
                    "parameters": sum(p.numel() for p in models[name].parameters()),
                }
            )
    return table


def _last(output):
    """Tokens of the deepest level."""
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0][-1]


def _forward(model, inputs):
    def run():
        with torch.inference_mode():
            return _last(model(**inputs))

    return run


def _training(model, inputs):
    def run():
        model.zero_grad()
        _last(model(**inputs)).square().mean().backward()

    return run
