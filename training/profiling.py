"""What a preset costs on this machine: parameters, size, time and memory of a forward and of a training step, by batch size."""

import statistics
import time

import psutil
import torch
from tqdm import tqdm

from .benchmark import forward_call, peak_memory, training_call


# Gradients and AdamW's two moments lie beside the weights; a step frees and makes gradients, and never holds them twice.
_TRAINED_COPIES = 4
_IMAGE_SIDE = 64
# Seconds of a call, above which larger batches are left out.
_LONGEST = 120
UNITS = {"MiB": 1, "GiB": 1024}


def mebibytes(text):
    """An amount such as "8GiB" or "512MiB", in MiB.

    Raises:
        ValueError: for anything else.
    """
    for unit, size in UNITS.items():
        number = text.strip().removesuffix(unit).strip()
        if text.strip().endswith(unit) and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return float(number) * size
    raise ValueError(f"{text!r} is no amount of memory. Expected a number with MiB or GiB, such as 8GiB.")


def profile(preset, batch_sizes=(1, 8, 32), memory=None, words=32, rounds=3, device=None, write=print):
    """Time and peak memory of `CrossModalForVQA` of a preset with random weights, on images and questions.

    Args:
        preset: name. batch_sizes: rows, in ascending order; those that would not fit, or take minutes, are left out.
        memory: MiB of the machine that the largest batch is asked for, or None.
        words: of each question. rounds: of timing.

    Returns:
        dict with `parameters`, `weights_mib` (the size of the file), `held_mib` (by the process before it had a model), `rows`: list of
        `{"batch", "forward_ms", "samples_per_second", "forward_mib", "step_ms", "step_mib"}`, None of what was left out, and, with
        memory, `largest_forward` and `largest_step`: the batch that fits by a line through the rows, None where there is none. Memory
        of a row is what the model takes in all: weights, in training gradients and the state of AdamW, and the peak above.
    """
    from crossmodal import CrossModalConfig, CrossModalForVQA

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    held = _held(device)
    config = CrossModalConfig.from_preset(preset)
    model = CrossModalForVQA(config).to(device)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values()) / 2**20
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 2**20
    static = {"forward": weights, "step": weights + (_TRAINED_COPIES - 1) * trained}
    rows = []
    for size in tqdm(batch_sizes, desc=preset, leave=False):
        row = {"batch": size} | dict.fromkeys(f"{kind}_{what}" for kind in static for what in ("ms", "mib"))
        for kind in static:
            why = _too_much(kind, size, rows, static[kind], device)
            if why:
                write(f"{preset}, {kind} of batch {size} is left out: {why}.")
                continue
            batch = _batch(config, size, words, device)
            call = forward_call(model.eval(), batch) if kind == "forward" else training_call(model.train(), batch)
            # Gradients and moments are made once.
            call()
            above = peak_memory(call, device)
            row[f"{kind}_mib"] = None if above is None else static[kind] + above
            row[f"{kind}_ms"] = 1000 * statistics.median(_seconds(call, device) for _ in range(rounds))
            del call
            model.zero_grad()
        row["samples_per_second"] = row["forward_ms"] and 1000 * size / row["forward_ms"]
        rows.append(row)
    found = {
        "preset": preset,
        "device": str(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_mib": weights,
        "held_mib": held,
        "rows": rows,
    }
    if memory is not None:
        for kind in static:
            peaks = [(row["batch"], row[f"{kind}_mib"]) for row in rows]
            found[f"largest_{kind}"] = largest_batch(peaks, memory - held)
    return found


def _seconds(call, device):
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _too_much(kind, size, rows, static, device):
    """Why a batch is not measured, by what smaller ones took; None if nothing speaks against it."""
    known = [row for row in rows if row[f"{kind}_ms"] is not None]
    if not known:
        return None
    times = size / known[-1]["batch"]
    if rows and rows[-1] is not known[-1]:
        return "a smaller one was"
    seconds = times * known[-1][f"{kind}_ms"] / 1000
    if seconds > _LONGEST:
        return f"it would take {seconds:.0f} seconds"
    mib, free = known[-1][f"{kind}_mib"], _free(device)
    if mib is not None and static + times * (mib - static) > free:
        return f"it would take {static + times * (mib - static):,.0f} MiB, and {free:,.0f} are free"
    return None


def _held(device):
    """MiB that are taken before there is a model: by the process, or on a GPU by it and all others."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free - torch.cuda.memory_reserved(device)) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _free(device):
    return (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available) / 2**20


def largest_batch(peaks, memory):
    """Rows that fit into `memory` by a line through peaks [(rows, MiB)]; 0 if none does, None if there is no line."""
    peaks = [(rows, mib) for rows, mib in peaks if mib is not None]
    if len(peaks) < 2:
        return None
    line = statistics.linear_regression(*zip(*peaks, strict=True))
    return None if line.slope <= 0 else max(0, int((memory - line.intercept) / line.slope))


def _batch(config, size, words, device):
    """Random inputs of every modality of a preset: images of the encoder's own size, questions of `words` words."""
    generator, batch = torch.Generator().manual_seed(0), {}
    for name in config.modality_names:
        values, mask = config.input_keys(name)
        own = getattr(config, f"{name}_config")
        if config.modality_settings[name]["type"] == "text":
            batch[values] = torch.randint(5, own.vocab_size, (size, words), generator=generator)
            batch[mask] = torch.ones_like(batch[values])
        else:
            side = getattr(own, "image_size", _IMAGE_SIDE)
            batch[values] = torch.randn(size, 3, side, side, generator=generator)
    return {key: value.to(device) for key, value in batch.items()}
