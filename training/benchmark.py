"""Speed, measured side by side: models of this family and of transformers in turn in one process; kernels over lengths.

Absolute times of a machine drift within minutes, so whatever is compared runs in turn, and ratios are medians over rounds.
"""

import ctypes
import itertools
import math
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PreTrainedModel

from .peers import PEERS, PUBLISHED_WORDS, Size, accuracy_of, train_for


# Of all contenders: with 64 (49) patches and up to 32 words.
SIZES = {
    "tiny": Size(width=256, heads=4, depth=4, fusion=2, image=(128, 128), patch=16),
    "base": Size(width=768, heads=12, depth=12, fusion=6, image=(224, 224), patch=32),
}
_WORDS, _REAL_WORDS = 32, 12


def _ours(size, **overrides):
    from transformers import BertConfig, ViTConfig

    from crossmodal import CrossModalConfig, CrossModalForVQA

    vision = ViTConfig(image_size=size.image, patch_size=size.patch, num_hidden_layers=size.depth, **size.layers)
    text = BertConfig(vocab_size=size.vocabulary, num_hidden_layers=size.depth, **size.layers)
    config = CrossModalConfig(
        modalities={"vision": vision, "text": text},
        num_fusion_layers=size.fusion,
        num_labels=size.answers,
        **size.layers,
        **{"fusion_queries": ["text"]} | overrides,
    )
    return CrossModalForVQA(config)


def contenders(size):
    """{name: model} with random weights, of one width, depth, number of patches and words."""
    size = SIZES[size]
    ours = {
        "CrossModalForVQA": _ours(size),
        "CrossModalForVQA, eager": _ours(size),
        "CrossModalForVQA, both streams": _ours(size, fusion_queries=None),
    }
    # As peers without another way run: what the fused kernel is worth.
    ours["CrossModalForVQA, eager"].set_attn_implementation("eager")
    return ours | {name: peer(size) for name, peer in PEERS.items()}


def _batch(name, size, questions, images, words, device, generator, padded=False):
    """The inputs of a contender: `questions` over `images`, each with `words` words. Peers take an image for each question, and
    where `padded` as many words as were published."""
    size = SIZES[size]
    length = PUBLISHED_WORDS.get(name, words) if padded else words
    ids = torch.randint(5, size.vocabulary, (questions, length), generator=generator)
    pixels = torch.randn(images, 3, *size.image, generator=generator)
    index = torch.arange(questions) * images // questions
    batch = {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": (torch.arange(length) < words).long().expand(questions, -1),
    }
    if name not in PEERS and images < questions:
        batch["pixel_values_index"] = index
    else:
        batch["pixel_values"] = pixels[index]
    return {key: value.to(device) for key, value in batch.items()}


def _logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def _synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_call(model, batch):
    """A function without arguments that runs a forward and returns the logits."""

    def run():
        with torch.inference_mode():
            return _logits(model(**batch))

    return run


def training_call(model, batch):
    """A function without arguments that makes a step of training: forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    device = batch["input_ids"].device

    with torch.no_grad():
        target = torch.rand(_logits(model(**batch)).shape, device=device)

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
            # The weights of the one before are in the caches still.
            run()
            _synchronise(device)
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


def without_dropout(model):
    """The model with every dropout at 0: defaults differ by class, and would be compared instead."""
    for module in model.modules():
        for name in ("attention_dropout", "dropout", "p"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model


def _backend(model):
    return next(
        module for module in model.modules() if isinstance(module, PreTrainedModel)
    ).config._attn_implementation


def flops_of(model, batch, training=False):
    """FLOP of a forward, or of forward and backward, counted on attention written out. A backward is not always twice a forward: streams
    that do not reach the logits have none (half of LXMERT's last layer), nor have inputs. In BridgeTower's vision tower, which torch's
    own module runs, the counter does not see the products of queries, keys and values: 1 to 2 % at these lengths."""
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [module.config._attn_implementation for module in inner]
    for module in inner:
        module.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            output = model(**batch)
            if training:
                _logits(output).float().sum().backward()
    finally:
        for module, implementation in zip(inner, before, strict=True):
            module.set_attn_implementation(implementation or "sdpa")
        model.zero_grad()
    return counter.get_total_flops()


# What is measured: name, questions, images, words, and whether peers pad them to one length, as they were published, where the
# family's processor pads to the longest of a batch.
SCENARIOS = [
    ("batch 1", 1, 1, _WORDS, False),
    ("batch 8", 8, 8, _WORDS, False),
    ("batch 32", 32, 32, _WORDS, False),
    ("batch 32, 12 words", 32, 32, _REAL_WORDS, False),
    ("32 questions, 8 images", 32, 8, _REAL_WORDS, False),
    ("the same, padded by peers", 32, 8, _REAL_WORDS, True),
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
    models = {name: without_dropout(model.to(device)) for name, model in contenders(size).items()}
    backends = ", ".join(f"{name}: {_backend(model)}" for name, model in models.items())
    peak = matmul_peak(device)
    write(f"{device}, {torch.get_num_threads()} threads, matrix products reach {peak / 1e9:.0f} GFLOP/s in float32.")
    write(f"No dropout anywhere; attention as each takes it: {backends}.")
    table = []
    modes = ["forward", *(["training"] if training else [])]
    for mode, (scenario, questions, images, words, padded) in tqdm(
        list(itertools.product(modes, SCENARIOS)), desc="benchmark", leave=False
    ):
        runs, flops = {}, {}
        for name, model in models.items():
            batch = _batch(name, size, questions, images, words, device, generator, padded)
            model.train(mode == "training")
            runs[name] = (training_call if mode == "training" else forward_call)(model, batch)
            flops[name] = flops_of(model, batch, mode == "training")
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
    run = forward_call(model, batch)
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
    """Training on raw inputs and on cached tokens of the frozen encoders, in turn, over some rows of a recipe; in one process,
    in float32 and without augmentation.

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
    from .datasets import RowDataset
    from .loading import load_rows, some_of
    from .tasks import TASKS, predict_logits
    from .token_cache import with_cached_tokens

    if not recipe.model.get("freeze"):
        raise ValueError(
            "model.freeze names no encoder, so there are no tokens to cache. Freeze one, for example [vision]."
        )
    dataset = RowDataset(some_of(load_rows(recipe.dataset, recipe.train_split), rows, recipe.seed), recipe.task)
    task = TASKS[recipe.task].from_targets(dataset.targets)
    model, processor = build(recipe, task, [dataset])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
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


# Part of their time that peers spend on the drawn statements of a recipe's stages, before its own rows.
_STAGES_PART = 0.6


def equal_training_time(recipe, peers=tuple(PEERS), patch=16, depth=2, write=print):
    """Accuracy of a recipe's model, and of peers that learn as long from the same rows, with the speed of each.

    Peers take the stages of `warm_up` that train the whole model, then the recipe's own rows; nothing is chosen for them on
    the way, as their schedule ends with the time.

    Args:
        recipe: Recipe of a `vqa` with one answer a row. peers: names of `PEERS`.
        patch, depth: of the peers; width, heads and layers that fuse are the recipe's.

    Returns:
        list of `{"model", "accuracy", "minutes", "steps", "parameters", "samples_per_second", "ours_over_this"}`, the speed of
        forwards of 32 rows from pixels.
    """
    from transformers import ViTImageProcessorPil

    from ..processing.processing_crossmodal import CrossModalProcessor
    from .collator import SampleCollator
    from .datasets import RowDataset
    from .loading import load_rows, some_of
    from .train import train

    ours = train(recipe, export=False, write=write)
    if ours["resumed"]:
        raise ValueError(
            f"output_dir={recipe.output_dir!r} holds an earlier run, whose minutes are not known. Choose a fresh output_dir."
        )
    config, minutes = ours["model"].config, ours["minutes"]
    stages = [stage for stage in recipe.warm_up if "modalities" not in stage and "config" not in stage]
    sources = [
        (s["dataset"], s.get("train_split", recipe.train_split), s.get("rows"), s.get("augment")) for s in stages
    ]
    sources.append((recipe.dataset, recipe.train_split, recipe.max_train_rows, recipe.augment))
    data = [
        RowDataset(some_of(load_rows(source, split, limit), limit, recipe.seed), recipe.task, augment)
        for source, split, limit, augment in sources
    ]
    parts = [_STAGES_PART / len(stages)] * len(stages) + [1 - _STAGES_PART * bool(stages)]
    rows = some_of(load_rows(recipe.dataset, recipe.eval_split), recipe.max_eval_rows, recipe.seed)
    samples = RowDataset(rows, recipe.task)
    labels = {answer: index for index, answer in enumerate(sorted({t for d in (*data, samples) for t in d.targets}))}
    # Whole patches: sides are rounded up.
    height, width = (-(-side // patch) * patch for side in _image_size(ours["processor"]))
    processor = CrossModalProcessor.from_config(
        config, ViTImageProcessorPil(size={"height": height, "width": width}), ours["processor"].tokenizer
    )
    size = Size(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        depth=depth,
        fusion=config.num_fusion_layers,
        image=(height, width),
        patch=patch,
        vocabulary=len(processor.tokenizer),
        answers=len(labels),
    )
    device = ours["model"].device
    table = [{"model": "CrossModalForVQA", "accuracy": ours["metrics"]["accuracy"], "minutes": minutes, "steps": None}]
    models, processors = {"CrossModalForVQA": ours["model"].eval()}, {"CrossModalForVQA": ours["processor"]}
    for name in peers:
        models[name], processors[name] = PEERS[name](size).to(device), processor
        steps = train_for(
            models[name],
            processor,
            labels,
            list(zip(data, parts, strict=True)),
            minutes,
            recipe.training.get("per_device_train_batch_size", 64),
            float(recipe.training.get("learning_rate", 5e-4)),
            recipe.seed,
            name,
        )
        accuracy = accuracy_of(models[name], processor, labels, samples, set(data[-1].targets))
        table.append({"model": name, "accuracy": accuracy, "minutes": minutes, "steps": steps})
        write(f"{name}: {accuracy:.4f} after {steps:,} steps.")
    runs = {}
    for name, model in models.items():
        batch = SampleCollator(processors[name], deduplicate=False)([samples[i] for i in range(min(32, len(samples)))])
        runs[name] = forward_call(model.eval(), {key: value.to(device) for key, value in batch.items()})
    times = in_turn(runs, device, rounds=21)
    for row in table:
        seconds = times[row["model"]]
        ratios = [other / own for other, own in zip(seconds, times["CrossModalForVQA"], strict=True)]
        row["parameters"] = sum(p.numel() for p in models[row["model"]].parameters())
        row["samples_per_second"] = min(32, len(samples)) / statistics.median(seconds)
        row["ours_over_this"] = statistics.median(ratios)
    return table


def _image_size(processor):
    size = dict(processor.image_processor.size)
    return size["height"], size["width"]


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

            memory = peak_memory(run, device)
            times = in_turn({name: run}, device, rounds=3, seconds=0.2)[name]
            table.append({"kernel": name, "tokens": tokens, "seconds": statistics.median(times), "mib": memory})
        write(f"{tokens:,} tokens measured.")
    return table


def fusion_over_time(frames=4096, steps=4096, window=32, width=128, heads=4, rounds=3, device=None):
    """Time and peak memory of one fusion layer in which sound and frames of a clip look at each other: all at all, or each at those
    near its own time.

    Args:
        frames, steps: of the video and of the sound. window: what is seen on each side. width, heads: of the layer.

    Returns:
        list of `{"kernel", "forward_seconds", "forward_mib", "training_seconds", "training_mib"}`, for exact attention and for a
        window; training is a forward and its backward.
    """
    from crossmodal import CrossModalConfig

    from ..modeling.fusion_crossmodal import CrossFusionLayer

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    features = {"model_type": "crossmodal_features", "hidden_size": 32, "num_hidden_layers": 0}
    lengths, runs, table = {"video": frames, "sound": steps}, {}, {}
    for kernel in ("exact", "window"):
        config = CrossModalConfig(
            modalities={name: {"config": dict(features)} for name in lengths},
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=2 * width,
            attention_kernel=kernel,
            attention_window=window,
        )
        config._attn_implementation = "sdpa"
        layer = CrossFusionLayer(config).to(device).eval()
        tokens = {name: torch.randn(1, length, width, device=device) for name, length in lengths.items()}
        masks = dict.fromkeys(lengths)

        @torch.inference_mode()
        def forward(layer=layer, tokens=tokens, masks=masks):
            return layer(tokens, masks)

        def training(layer=layer, tokens=tokens, masks=masks):
            layer.zero_grad()
            sum(stream.square().mean() for stream in layer(tokens, masks)[0].values()).backward()

        table[kernel] = {"kernel": kernel}
        for name, run in (("forward", forward), ("training", training)):
            table[kernel][f"{name}_mib"] = peak_memory(run, device)
            runs[f"{kernel} {name}"] = run
    for name, times in in_turn(runs, device, rounds=rounds, seconds=0.2).items():
        kernel, mode = name.split()
        table[kernel][f"{mode}_seconds"] = statistics.median(times)
    return list(table.values())


def growth_and_crossover(table):
    """{kernel: {"exponent": of time over the longer half of the lengths, "crossover": tokens from which on it beats exact}}."""
    found = {}
    exact = {row["tokens"]: row["seconds"] for row in table if row["kernel"] == "exact"}
    for name in dict.fromkeys(row["kernel"] for row in table):
        rows = [row for row in table if row["kernel"] == name]
        later = rows[len(rows) // 2 :] if len(rows) > 3 else rows
        x = [math.log(row["tokens"]) for row in later]
        y = [math.log(row["seconds"]) for row in later]
        slope = statistics.linear_regression(x, y).slope if len(later) > 1 else None
        crossover = None
        for row in reversed([row for row in rows if name != "exact" and row["tokens"] in exact]):
            if row["seconds"] >= exact[row["tokens"]]:
                break
            crossover = row["tokens"]
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


def peak_memory(run, device):
    """MiB that a call holds at its peak above what was held before, or None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        run()  # what is loaded once is not counted
        # Freed pages that the allocator keeps would hide what a call takes.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew (proc(5))
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))
