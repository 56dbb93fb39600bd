"""Speed, measured side by side: models of this family and of transformers in turn in one process; kernels over lengths.

Absolute times of a machine drift within minutes, so whatever is compared runs in turn, and ratios are medians over rounds.
"""

import itertools
import math
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


# Of all contenders: as large as `tiny` of systems that fuse, with 64 patches and up to 32 words.
SIZES = {
    "tiny": {"width": 256, "heads": 4, "depth": 4, "fusion": 2, "image": 128, "patch": 16},
    "base": {"width": 768, "heads": 12, "depth": 12, "fusion": 6, "image": 224, "patch": 32},
}
_WORDS, _REAL_WORDS, _ANSWERS, _VOCABULARY = 32, 12, 1000, 5000


def _ours(size, **overrides):
    from transformers import BertConfig, ViTConfig

    from crossmodal import CrossModalConfig, CrossModalForVQA

    column = {"hidden_size": size["width"], "num_hidden_layers": size["depth"], "num_attention_heads": size["heads"]}
    column |= {"intermediate_size": 4 * size["width"]}
    config = CrossModalConfig(
        modalities={
            "vision": ViTConfig(image_size=size["image"], patch_size=size["patch"], **column),
            "text": BertConfig(vocab_size=_VOCABULARY, **column),
        },
        hidden_size=size["width"],
        num_attention_heads=size["heads"],
        num_fusion_layers=size["fusion"],
        intermediate_size=4 * size["width"],
        num_labels=_ANSWERS,
        **{"fusion_queries": ["text"]} | overrides,
    )
    return CrossModalForVQA(config)


def _vilt(size):
    from transformers import ViltConfig, ViltForQuestionAnswering

    return ViltForQuestionAnswering(
        ViltConfig(
            vocab_size=_VOCABULARY,
            hidden_size=size["width"],
            num_hidden_layers=size["depth"] + size["fusion"],
            num_attention_heads=size["heads"],
            intermediate_size=4 * size["width"],
            image_size=size["image"],
            patch_size=size["patch"],
            num_labels=_ANSWERS,
        )
    )


def _lxmert(size):
    from transformers import LxmertConfig, LxmertForQuestionAnswering

    return LxmertForQuestionAnswering(
        LxmertConfig(
            vocab_size=_VOCABULARY,
            hidden_size=size["width"],
            num_attention_heads=size["heads"],
            intermediate_size=4 * size["width"],
            l_layers=size["depth"],
            r_layers=size["depth"],
            x_layers=size["fusion"],
            # It reads features of regions: as many numbers as a patch has.
            visual_feat_dim=3 * size["patch"] ** 2,
            num_qa_labels=_ANSWERS,
        )
    )


class _BridgeTowerForQuestionAnswering(nn.Module):
    """transformers' BridgeTower with ViLT's head, for it has none for answers."""

    def __init__(self, size):
        super().__init__()
        from transformers import BridgeTowerConfig, BridgeTowerModel

        width = size["width"]
        config = BridgeTowerConfig(
            hidden_size=width,
            num_hidden_layers=size["fusion"],
            num_attention_heads=size["heads"],
            intermediate_size=4 * width,
            text_config={
                "vocab_size": _VOCABULARY,
                "hidden_size": width,
                "num_hidden_layers": size["depth"],
                "num_attention_heads": size["heads"],
                "intermediate_size": 4 * width,
            },
            vision_config={
                "hidden_size": width,
                "num_hidden_layers": size["depth"],
                "image_size": size["image"],
                "patch_size": size["patch"],
            },
        )
        self.config = config
        self.model = BridgeTowerModel(config)
        self.classifier = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, _ANSWERS)
        )

    def forward(self, **inputs):
        return self.classifier(self.model(**inputs).pooler_output)


def contenders(size):
    """{name: model} with random weights, of one width, depth, number of patches and words."""
    size = SIZES[size]
    made = {
        "CrossModalForVQA": _ours(size),
        "CrossModalForVQA, both streams": _ours(size, fusion_queries=None),
        "LxmertForQuestionAnswering": _lxmert(size),
        "ViltForQuestionAnswering": _vilt(size),
        "BridgeTower": _BridgeTowerForQuestionAnswering(size),
    }
    return made


def _batch(name, size, questions, images, words, device, generator):
    """The inputs of a contender: `questions` over `images`, each with `words` words."""
    size = SIZES[size]
    ids = torch.randint(5, _VOCABULARY, (questions, words), generator=generator)
    pixels = torch.randn(images, 3, size["image"], size["image"], generator=generator)
    index = torch.arange(questions) * images // questions
    mask = torch.ones_like(ids)
    if name.startswith("CrossModal"):
        batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
        if images < questions:
            batch["pixel_values_index"] = index
    elif name.startswith("Lxmert"):
        patch = size["patch"]
        patches = (
            pixels.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        )
        boxes = torch.rand(images, patches.shape[1], 4, generator=generator)
        batch = {"input_ids": ids, "attention_mask": mask, "visual_feats": patches[index], "visual_pos": boxes[index]}
    else:
        whole = torch.ones(questions, *pixels.shape[2:], dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels[index], "pixel_mask": whole}
    return {key: value.to(device) for key, value in batch.items()}


def _logits(output):
    for name in ("logits", "question_answering_score"):
        if hasattr(output, name):
            return getattr(output, name)
    return output


def _synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forward(model, batch):
    def run():
        with torch.inference_mode():
            return _logits(model(**batch))

    return run


def _training(model, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    target = torch.rand(len(batch["input_ids"]), _ANSWERS, device=batch["input_ids"].device)

    def run():
        loss = nn.functional.binary_cross_entropy_with_logits(_logits(model(**batch)).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def in_turn(runs, device, rounds=7, seconds=0.3):
    """Seconds per call of each of {name: function}, [rounds] each, measured in turn."""
    repeats = {}
    for name, run in runs.items():
        run()
        _synchronise(device)
        started = time.perf_counter()
        run()
        _synchronise(device)
        repeats[name] = max(1, round(seconds / rounds / (time.perf_counter() - started)))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            _synchronise(device)
            times[name].append((time.perf_counter() - started) / repeats[name])
    return times


def matmul_peak(device, side=1536, rounds=7):
    """FLOP per second of a square matrix product in float32: what this machine reaches at best."""
    a, b = torch.randn(2, side, side, device=device).unbind()
    return 2 * side**3 / statistics.median(in_turn({"product": lambda: a @ b}, device, rounds)["product"])


def flops_of(model, batch):
    """FLOP of a forward, counted on attention written out, which the counter knows for every backend."""
    config = getattr(model, "config", None)
    before = config._attn_implementation
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            model(**batch)
    finally:
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(before or "sdpa")
    return counter.get_total_flops()


# What is measured: name, questions, images, words of ours and of the peers.
SCENARIOS = [
    ("batch 1", 1, 1, _WORDS, _WORDS),
    ("batch 8", 8, 8, _WORDS, _WORDS),
    ("batch 32", 32, 32, _WORDS, _WORDS),
    ("batch 32, 12 words", 32, 32, _REAL_WORDS, _REAL_WORDS),
    ("32 questions, 8 images", 32, 8, _REAL_WORDS, _REAL_WORDS),
    ("the same, peers pad to 32 words", 32, 8, _REAL_WORDS, _WORDS),
]


def compare(size="tiny", rounds=7, training=True, device=None, write=print):
    """Samples per second of `CrossModalForVQA` and of its peers.

    Args:
        size: row of `SIZES`. rounds: of measuring in turn. training: measure forward, backward and step too.

    Returns:
        list of `{"scenario", "mode", "model", "samples_per_second", "ours_over_this", "gflop_per_sample", "part_of_peak",
        "parameters"}`, the ratio a median over rounds.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    generator = torch.Generator().manual_seed(0)
    models = {name: model.to(device) for name, model in contenders(size).items()}
    peak = matmul_peak(device)
    write(f"{device}, {torch.get_num_threads()} threads, matrix products reach {peak / 1e9:.0f} GFLOP/s in float32.")
    table = []
    modes = ["forward", *(["training"] if training else [])]
    for mode, (scenario, questions, images, ours, theirs) in tqdm(
        list(itertools.product(modes, SCENARIOS)), desc="benchmark", leave=False
    ):
        runs, flops = {}, {}
        for name, model in models.items():
            words = ours if name.startswith("CrossModal") else theirs
            batch = _batch(name, size, questions, images, words, device, generator)
            model.train(mode == "training")
            runs[name] = (_training if mode == "training" else _forward)(model, batch)
            flops[name] = flops_of(model.eval(), batch) * (3 if mode == "training" else 1)
            model.train(mode == "training")
        times = in_turn(runs, device, rounds)
        for name, seconds in times.items():
            ratios = [other / own for other, own in zip(seconds, times["CrossModalForVQA"], strict=True)]
            middle = statistics.median(seconds)
            table.append(
                {
                    "scenario": scenario,
                    "mode": mode,
                    "model": name,
                    "samples_per_second": questions / middle,
                    "ours_over_this": statistics.median(ratios),
                    "gflop_per_sample": flops[name] / questions / 1e9,
                    "part_of_peak": flops[name] / middle / peak,
                    "parameters": sum(p.numel() for p in models[name].parameters()),
                }
            )
    return table


def grouping_is_exact(size="tiny", device="cpu"):
    """(largest difference of logits, relative difference of all gradients) between 32 questions that share 8 images
    and the same 32 with an image each."""
    generator = torch.Generator().manual_seed(0)
    device = torch.device(device)
    model = _ours(SIZES[size]).to(device).eval()
    shared = _batch("CrossModalForVQA", size, 32, 8, _REAL_WORDS, device, generator)
    apart = {key: value for key, value in shared.items() if key != "pixel_values_index"}
    apart["pixel_values"] = shared["pixel_values"][shared["pixel_values_index"]]
    logits, gradients = [], []
    for batch in (shared, apart):
        model.zero_grad()
        output = model(**batch).logits
        output.square().mean().backward()
        logits.append(output.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return (logits[0] - logits[1]).abs().max().item(), (
        (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    ).item()


def where_time_goes(size="tiny", questions=32, images=32, words=_WORDS, rounds=7, device=None):
    """Part of a forward that each component of `CrossModalForVQA` takes, by name; the parts sum to 1."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _ours(SIZES[size]).to(device).eval()
    batch = _batch("CrossModalForVQA", size, questions, images, words, device, torch.Generator().manual_seed(0))
    base = model.crossmodal
    parts = {f"encoder: {name}": encoder for name, encoder in base.encoders.items()}
    parts |= {f"projection: {name}": projection for name, projection in base.projections.items()}
    parts |= {"fusion": base.fusion, "head": model.classifier}
    spent, started, handles = dict.fromkeys(parts, 0.0), {}, []
    for name, module in parts.items():

        def begin(*_, name=name):
            _synchronise(device)
            started[name] = time.perf_counter()

        def end(*_, name=name):
            _synchronise(device)
            spent[name] += time.perf_counter() - started[name]

        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    run = _forward(model, batch)
    run()
    spent.update(dict.fromkeys(spent, 0.0))
    whole = time.perf_counter()
    for _ in range(rounds):
        run()
    whole = time.perf_counter() - whole
    for handle in handles:
        handle.remove()
    found = {name: seconds / whole for name, seconds in spent.items()}
    return found | {"the rest": 1 - sum(found.values())}


def cached_training(recipe, rows=256, rounds=3):
    """Training on raw inputs and on cached tokens of the frozen encoders, in turn, over the first rows of a recipe.

    Args:
        recipe: Recipe with frozen encoders.

    Returns:
        dict with `raw` and `cached` (samples per second of loading, forward, backward and step), `ratio` (median over rounds),
        `logits_difference` (largest, of the same rows in eval mode) and `fill_seconds` (computing the tokens once).
    """
    import tempfile
    from dataclasses import replace

    from torch.utils.data import DataLoader

    from .building import build
    from .collator import SampleCollator
    from .datasets import RowDataset, load_rows, some_of
    from .evaluate import predict_logits
    from .tasks import TASKS
    from .token_cache import with_cached_tokens

    if not recipe.model.get("freeze"):
        raise ValueError(
            "model.freeze names no encoder, so there are no tokens to cache. Freeze one, for example [vision]."
        )
    dataset = RowDataset(some_of(load_rows(recipe.dataset, recipe.train_split), rows, recipe.seed), recipe.task)
    task = TASKS[recipe.task].from_targets(dataset.targets)
    model, processor = build(recipe, task, [dataset])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    batch_size = recipe.training.get("per_device_train_batch_size", 32)
    with tempfile.TemporaryDirectory(prefix="crossmodal-cache-") as folder:
        started = time.perf_counter()
        kept = replace(recipe, token_cache=folder)
        cached = with_cached_tokens(kept, model, processor, {"rows": dataset}, lambda line: None)["rows"]
        fill_seconds = time.perf_counter() - started
        logits = [predict_logits(model, processor, data, batch_size, progress=False) for data in (dataset, cached)]

        def epoch(data):
            loader = DataLoader(data, batch_size, collate_fn=SampleCollator(processor, task.encode_targets))

            def run():
                model.train()
                for batch in loader:
                    loss = model(**{key: value.to(model.device) for key, value in batch.items()}).loss
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

            return run

        times = in_turn({"raw": epoch(dataset), "cached": epoch(cached)}, model.device, rounds)
    return {
        **{name: len(dataset) / statistics.median(seconds) for name, seconds in times.items()},
        "ratio": statistics.median(raw / own for raw, own in zip(times["raw"], times["cached"], strict=True)),
        "logits_difference": (logits[0] - logits[1]).abs().max().item(),
        "fill_seconds": fill_seconds,
    }


LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def kernels(lengths=LENGTHS, width=64, heads=1, device=None, longest_exact=None, write=print):
    """Time and peak memory of a forward of each attention kernel over the number of tokens, in one run.

    Args:
        lengths: numbers of queries and of keys. width: of all heads together. longest_exact: leaves exact attention out above.

    Returns:
        list of `{"kernel", "tokens", "seconds", "mib"}`; mib is the peak above what was held before, None where the system
        does not tell.
    """
    from crossmodal import FeatureSequenceConfig

    from ..modeling.kernels_crossmodal import KERNELS, initialise_kernel

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = FeatureSequenceConfig(
        hidden_size=width, num_attention_heads=heads, attention_window=128, num_latents=64, num_random_features=None
    )
    config._attn_implementation = "sdpa"
    made = {}
    for name, kernel in KERNELS.items():
        made[name] = kernel(config, heads).to(device).eval()
        with torch.no_grad():
            initialise_kernel(made[name])
    table = []
    for tokens in tqdm(lengths, desc="kernels", leave=False):
        states = torch.randn(3, 1, heads, tokens, width // heads, device=device).unbind()
        for name, kernel in made.items():
            if name == "exact" and longest_exact is not None and tokens > longest_exact:
                continue

            @torch.inference_mode()
            def run(kernel=kernel, states=states):
                return kernel(*states)

            memory = _peak_memory(run, device)
            times = in_turn({name: run}, device, rounds=3, seconds=0.2)[name]
            table.append({"kernel": name, "tokens": tokens, "seconds": statistics.median(times), "mib": memory})
        write(f"{tokens:,} tokens measured.")
    return table


def growth_and_crossover(table):
    """{kernel: {"exponent": of time over the longer half of the lengths, "crossover": tokens from which it beats exact}}."""
    found = {}
    exact = {row["tokens"]: row["seconds"] for row in table if row["kernel"] == "exact"}
    for name in dict.fromkeys(row["kernel"] for row in table):
        rows = [row for row in table if row["kernel"] == name]
        later = rows[len(rows) // 2 :] if len(rows) > 3 else rows
        x = [math.log(row["tokens"]) for row in later]
        y = [math.log(row["seconds"]) for row in later]
        slope = statistics.linear_regression(x, y).slope if len(later) > 1 else None
        faster = [row["tokens"] for row in rows if row["tokens"] in exact and row["seconds"] < exact[row["tokens"]]]
        crossover = min(faster, default=None) if name != "exact" else None
        found[name] = {"exponent": slope, "crossover": crossover}
    return found


def feature_errors(counts=(64, 256, 1024, 4096), keys=1024, width=64, draws=5):
    """Root mean square error of the `linear` kernel against the softmax that it approximates, by number of features.

    Unit queries and keys at temperature 1, values of root mean square 1; the exact output's own size comes with it.
    """
    from crossmodal import FeatureSequenceConfig

    from ..modeling.kernels_crossmodal import LinearKernel, initialise_kernel

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, keys, width).unbind()
    cosine = nn.functional.normalize(query, dim=-1) @ nn.functional.normalize(key, dim=-1).mT
    exact = cosine.softmax(dim=-1) @ value
    errors = {"exact output": exact.square().mean().sqrt().item()}
    for count in counts:
        config = FeatureSequenceConfig(hidden_size=width, num_attention_heads=1, num_random_features=count)
        found = []
        for _ in range(draws):
            kernel = LinearKernel(config, 1).eval()
            with torch.no_grad():
                initialise_kernel(kernel)
                found.append((kernel(query, key, value)[0].transpose(1, 2) - exact).square().mean())
        errors[count] = torch.stack(found).mean().sqrt().item()
    return errors


def _peak_memory(run, device):
    """MiB that a call holds at its peak above what was held before, or None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew (proc(5))
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1024
    except OSError:
        return None


def _status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))
