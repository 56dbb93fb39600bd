"""Models as graphs that run without their code: `torch.export` and ONNX, in float32 and int8, checked against the model itself.

One graph per modality of a model that embeds, one of a head that classifies. The number of rows, and of words, steps or samples,
stays free; images keep the size that the processor gives them.

Letters: B batch, E projection_dim, A answers, M modalities.
"""

import io
import json
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jinja2 import Template
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..model_cards import card_template
from .collator import SampleCollator
from .evaluate import samples_of, task_of


SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
# Largest difference from the model itself that a float32 graph may show, in parts of the largest number of the output.
TOLERANCE = 1e-4
_CONFIG = "export_config.json"


class Classify(nn.Module):
    """A head that classifies, as one graph: a dict of inputs to logits (B,A) and modality weights (B,M)."""

    outputs = ("logits", "modality_weights")

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        found = self.model(**inputs)
        return found.logits, found.modality_weights

    def of(self, model):
        """The same of another model."""
        return Classify(model)


class Embed(nn.Module):
    """One modality of a model that embeds: a dict of its inputs to embeddings (B,E) of length 1."""

    outputs = ("embeddings",)

    def __init__(self, model, modality):
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, inputs):
        return (self.model.get_modality_features(self.modality, **inputs),)

    def of(self, model):
        return Embed(model, self.modality)


@dataclass
class Graph:
    """What becomes one file: `module` takes a dict of inputs and returns a tuple of tensors; `example` is such a dict."""

    name: str
    module: nn.Module
    example: dict

    def inputs(self, batch):
        """What this graph reads of a batch of the processor: a modality that no row has as zeros, and a `modality_mask` that is
        left out because nothing is missing as ones."""
        rows = len(next(iter(batch.values())))
        found = {}
        for key, like in self.example.items():
            value = batch.get(key)
            if value is None:
                value = like.new_zeros(rows, *like.shape[1:])
                value = value | True if key == "modality_mask" else value
            found[key] = value
        return found


def graphs_of(model, batch, absences=True):
    """The graphs of a head, in float32 on the CPU.

    Args:
        model: of the family, which this puts into eval mode.
        batch: an input of all modalities, at least two rows; sequences of at least two steps.
        absences: classifiers read a `modality_mask` too; without it all modalities are there in every row.

    Raises:
        ValueError: for a head that no graph holds.
    """
    model = model.float().cpu().eval()
    config, head = model.config, type(model).__name__
    if head == "CrossModalForCaptioning":
        raise ValueError(
            f"{head} writes word by word, in a loop whose length depends on what it writes: no graph holds its `generate`. "
            "Serve it with transformers; heads that embed or classify can be exported."
        )
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    if head == "CrossModalForRetrieval":
        found = []
        for name in config.modality_names:
            own = {key: batch[key] for key in config.input_keys(name) if key in batch}
            found.append(Graph(name, Embed(model, name), own))
        return found
    if not hasattr(model, "classifier"):
        raise ValueError(f"{head} neither embeds nor classifies. Export one of its heads.")
    rows, several = len(next(iter(batch.values()))), len(config.modality_names) > 1
    example = {key: value for key, value in batch.items() if key != "modality_mask"}
    if absences and several:
        example["modality_mask"] = torch.ones(rows, len(config.modality_names), dtype=torch.bool)
    if config.task_names:
        example["task_ids"] = torch.arange(rows) % len(config.task_names)
    return [Graph("model", Classify(model), example)]


def free_axes(model, keys):
    """{input: {axis: its name}} of the sizes that a graph leaves free: rows, words, steps of features and seconds of EEG, samples of
    sound."""
    free = {key: {0: "batch"} for key in keys}
    for name in model.config.modality_names:
        kind = model.config.modality_settings[name]["type"]
        steps = kind == "features" and not model.config.modality_settings[name].get("context")
        # Encoders that say how many tokens a sound makes take any; the others have a window of fixed size.
        samples = kind == "audio" and hasattr(model.base_model.encoders[name], "_get_feature_vector_attention_mask")
        if kind in ("text", "eeg") or steps or samples:
            for key in model.config.input_keys(name):
                if key in free:
                    free[key][1] = f"{name}_length"
    return free


def to_torch(graph, path):
    """Writes a graph as an `ExportedProgram`: `torch.export.load(path).module()(inputs)`."""
    free = free_axes(graph.module.model, graph.example)
    free = {key: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for key, axes in free.items()}
    with _clear(graph), torch.no_grad():
        program = torch.export.export(graph.module, (graph.example,), dynamic_shapes=(free,), strict=False)
    for node in program.graph.nodes:
        # Paths of the machine that exports.
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path)


def to_onnx(graph, path):
    """Writes a graph as ONNX, with the names of inputs and outputs."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    free = free_axes(graph.module.model, graph.example)
    with _clear(graph), torch.no_grad():
        program = torch.onnx.export(
            graph.module,
            kwargs={"inputs": graph.example},
            dynamic_shapes={"inputs": free},
            input_names=list(graph.example),
            output_names=list(graph.module.outputs),
            dynamo=True,
            verbose=False,
        )
    # Stack traces of every node: half of a small file, and paths of the machine that exports.
    ClearMetadataAndDocStringPass()(program.model)
    program.save(path)


def to_int8(path, target):
    """Writes an ONNX graph with weights of matrix products and word embeddings in int8, and activations rounded as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logger = logging.getLogger()
    level = logger.level
    # It says of every graph that it could be preprocessed.
    logger.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            path,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Processors without VNNI add products of two 8-bit numbers up in 16 bits, which overflow: weights of 7 bits do not.
            reduce_range=True,
        )
    finally:
        logger.setLevel(level)


@contextmanager
def _clear(graph):
    """Errors of an export as one that names the graph and the cause; warnings that concern developers of exporters left out."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        cause = error.__cause__ or error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise ValueError(
            f"the graph {graph.name!r} cannot be exported: {type(cause).__name__}: {' '.join(lines[:2])[:400]} Often an "
            "encoder, such as a custom one, decides by the values of its inputs; its forward has to do without."
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def run_eager(module):
    """inputs to a tuple of tensors, by a module itself."""

    def run(inputs):
        with torch.inference_mode():
            return module(inputs)

    return run


def run_torch(path):
    """inputs to a tuple of tensors, by a file of `to_torch`."""
    return run_eager(torch.export.load(path).module())


def run_onnx(path):
    """inputs to a tuple of tensors, by onnxruntime on the CPU with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs):
        given = {key: value.numpy() for key, value in inputs.items()}
        return tuple(map(torch.from_numpy, session.run(None, given)))

    return run


def difference(run, graph, inputs):
    """Largest difference of a graph's outputs from the model's own, in parts of the largest number of each output."""
    wanted, found = run_eager(graph.module)(inputs), run(inputs)
    parts = []
    for own, other in zip(wanted, found, strict=True):
        if own.shape != other.shape or not torch.isfinite(other).all():
            return float("inf")
        parts.append(((own - other).abs().max() / own.abs().max().clamp(min=1e-6)).item())
    return max(parts)


def example_rows(model, processor, count, seed=0):
    """Raw inputs of all modalities, {argument of the processor: one item per row}, drawn at random; sequences differ in length."""
    draw, rows = np.random.default_rng(seed), {}
    for modality in processor.modalities:
        name, config = modality["name"], getattr(model.config, f"{modality['name']}_config")
        lengths = [3 + (row + seed) % 5 for row in range(count)]
        if modality["type"] in ("vision", "video"):
            frames = (modality.get("num_frames") or 2) if modality["type"] == "video" else 1
            pixels = draw.integers(0, 256, (count, frames, 40, 40, 3), dtype=np.uint8)
            shown = [[Image.fromarray(frame) for frame in row] for row in pixels]
            rows[processor.argument_of(name)] = shown if modality["type"] == "video" else [row[0] for row in shown]
        elif modality["type"] == "text":
            words = processor.tokenizer
            ids = [draw.integers(len(words), size=length) for length in lengths]
            rows[processor.argument_of(name)] = [f"a {words.decode(row, skip_special_tokens=True)}" for row in ids]
        elif modality["type"] == "audio":
            rate = processor.feature_extractor.sampling_rate
            waves = [{"array": draw.normal(size=rate * length // 4), "sampling_rate": rate} for length in lengths]
            rows[processor.argument_of(name)] = waves
        elif modality["type"] == "eeg":
            signals = [draw.normal(size=(config.num_channels, 128 * (length + 2))) for length in lengths]
            rows[name] = [{"array": signal, "sampling_rate": 128} for signal in signals]
        else:
            context = modality.get("context", 0)
            steps = [2 * context + 1 if context else length for length in lengths]
            rows[name] = [draw.normal(size=(length, config.feature_size)).astype(np.float32) for length in steps]
    return rows


def check_batches(model, processor, absences=True):
    """Batches of other sizes than that of `example_rows`: one row, and several with each modality missing once."""
    names = processor.modality_names
    one, several = example_rows(model, processor, 1, seed=1), example_rows(model, processor, len(names) + 2, seed=2)
    if absences and len(names) > 1:
        for row, name in enumerate(names):
            several[processor.argument_of(name)][row] = None
    return [dict(processor(**rows)) for rows in (one, several)]


def export_model(model, processor, folder, form="onnx", int8=False, absences=True, write=print):
    """Writes the graphs of a head with the processor's files, `export_config.json` and a README on how to run them.

    All is written aside, compared with the model itself on rows of other sizes, and moved when it is whole.

    Args:
        model: a head of the family, put on the CPU in float32 and eval mode. folder: to write; an earlier export there is replaced.
        form: "onnx" or "torch". int8: ONNX: a second graph with int8 weights; torch: a checkpoint with int8 weights, in `int8`.
        absences: classifiers take `modality_mask`.

    Returns:
        {file: {"difference": from the model's own outputs, in parts of the largest number; "mib": size}}.

    Raises:
        ValueError: for what cannot be exported, a graph that says other than the model, and a folder with anything else in it.
    """
    if form not in SUFFIXES:
        raise ValueError(f"--format {form} is unknown. Expected one of {list(SUFFIXES)}.")
    if form == "onnx":
        _needs("onnx", "onnxruntime", "onnxscript")
    elif int8:
        _needs("torchao")
    folder = Path(folder)
    if folder.exists() and not (folder / _CONFIG).is_file() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} holds something else than an export. Choose a new folder.")
    graphs = graphs_of(model, dict(processor(**example_rows(model, processor, 3))), absences)
    batches = check_batches(model, processor, absences and len(graphs) == 1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as aside:
        whole, report, described = Path(aside) / "export", {}, {}
        whole.mkdir()
        for graph in graphs:
            file = f"{graph.name}{SUFFIXES[form]}"
            (to_onnx if form == "onnx" else to_torch)(graph, whole / file)
            write(f"{file}: written; it is compared with the model now.")
            report[file] = _checked(graph, file, whole / file, batches)
            described[graph.name] = _description(graph, file)
            if int8 and form == "onnx":
                small = f"{graph.name}_int8.onnx"
                to_int8(whole / file, whole / small)
                report[small] = _checked(graph, small, whole / small, batches, tolerance=None)
                described[graph.name]["int8"] = small
        if int8 and form == "torch":
            quantised = int8_model(model)
            quantised.save_pretrained(whole / "int8")
            processor.save_pretrained(whole / "int8")
            weights = sum(path.stat().st_size for path in (whole / "int8").glob("*.safetensors"))
            report["int8"] = {"difference": _int8_difference(quantised, graphs, batches), "mib": weights / 2**20}
        processor.save_pretrained(whole)
        config = {
            "head": type(model).__name__,
            "format": form,
            "graphs": described,
            "modality_names": model.config.modality_names,
            "differences": {file: row["difference"] for file, row in report.items()},
            "tolerance": TOLERANCE,
        }
        if len(graphs) == 1:
            keys = ("id2label", "problem_type", "thresholds", "task_names")
            config |= {key: getattr(model.config, key) for key in keys}
        (whole / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (whole / "README.md").write_text(_readme(model, processor, config, graphs))
        if folder.exists():
            shutil.rmtree(folder)
        whole.rename(folder)
    return report


def _needs(*packages):
    """Refuses, before any work, what packages that are not installed would do."""
    for package in packages:
        if find_spec(package) is None:
            extra = "int8" if package == "torchao" else "export"
            raise ValueError(f"{package} is not installed. Run `pip install 'crossmodal[{extra}]'`.")


def _checked(graph, file, path, batches, tolerance=TOLERANCE):
    run = run_onnx(path) if path.suffix == ".onnx" else run_torch(path)
    largest = max(difference(run, graph, graph.inputs(batch)) for batch in batches)
    if not largest <= (np.finfo(np.float32).max if tolerance is None else tolerance):
        raise ValueError(
            f"{file} gives other outputs than the model: they differ by {largest:.1e} of the largest number, and at most "
            f"{TOLERANCE:.0e} is rounding. Nothing was kept."
        )
    return {"difference": largest, "mib": path.stat().st_size / 2**20}


def _description(graph, file):
    free = free_axes(graph.module.model, graph.example)
    inputs = {
        key: {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [free[key].get(axis, size) for axis, size in enumerate(value.shape)],
        }
        for key, value in graph.example.items()
    }
    return {"file": file, "inputs": inputs, "outputs": list(graph.module.outputs)}


def int8_model(model):
    """A copy of a head whose linear layers have int8 weights, and round what they read to int8 as it comes, by transformers' own
    quantisation with torchao; in float32 otherwise."""
    _needs("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    with tempfile.TemporaryDirectory(prefix="crossmodal-int8-") as folder:
        model.save_pretrained(folder)
        wanted = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
        return type(model).from_pretrained(folder, quantization_config=wanted).eval()


def _int8_difference(quantised, graphs, batches):
    runs = [(graph, run_eager(graph.module.of(quantised))) for graph in graphs]
    return max(difference(run, graph, graph.inputs(batch)) for graph, run in runs for batch in batches)


def measure(model, processor, folder, rows, split, batch_size=32, rounds=3, progress=True):
    """What an export is worth beside the model: score on rows of a dataset, speed, size.

    Every contender reads the same batches, made before the clock starts, in turn, on as many threads as torch has.

    Args:
        folder: that `export_model` wrote. rows: `datasets.Dataset`. split: its name.

    Returns:
        list of {"model", metrics of the task, "samples_per_second", "mib"}, the model itself first.
    """
    folder = Path(folder)
    config = json.loads((folder / _CONFIG).read_text())
    task = task_of(model, rows.column_names)
    samples = samples_of(model, rows, task)
    task.check_targets(samples.targets)
    example = dict(processor(**example_rows(model, processor, 3)))
    classifies = len(config["graphs"]) == 1
    absences = not classifies or "modality_mask" in config["graphs"]["model"]["inputs"]
    graphs = graphs_of(model, example, absences)
    loader = DataLoader(samples, batch_size, collate_fn=SampleCollator(processor, deduplicate=False))
    batches = list(tqdm(loader, desc="read", disable=not progress, leave=False))
    if not absences and any("modality_mask" in batch for batch in batches):
        raise ValueError(
            "some rows lack a modality, and the graph was exported without modality_mask. Export it with."
        )
    form = "ONNX" if config["format"] == "onnx" else "torch.export"
    load = run_onnx if config["format"] == "onnx" else run_torch
    contenders = {"model, float32": ({g.name: run_eager(g.module) for g in graphs}, _mib(model))}
    for kind, key in ((f"{form}, float32", "file"), ("ONNX, int8", "int8")):
        files = {name: folder / entry[key] for name, entry in config["graphs"].items() if key in entry}
        if files:
            size = sum(path.stat().st_size for path in files.values()) / 2**20
            contenders[kind] = ({name: load(path) for name, path in files.items()}, size)
    if find_spec("torchao") is not None and any("int8" in name for name in config["differences"]):
        small = int8_model(model)
        contenders["model, int8"] = ({g.name: run_eager(g.module.of(small)) for g in graphs}, _mib(small))

    def passes(runs):
        outputs = {graph.name: [] for graph in graphs}
        for batch in batches:
            for graph in graphs:
                outputs[graph.name].append(runs[graph.name](graph.inputs(batch))[0].float())
        return {name: torch.cat(parts) for name, parts in outputs.items()}

    table, times = [], {name: [] for name in contenders}
    for name, (runs, mib) in contenders.items():
        found = passes(runs)
        scores = task.score_outputs(found["model"] if classifies else found, samples.targets)
        table.append({"model": name, **task.shown(scores), "mib": mib})
    # What was scored is warm.
    for _ in range(rounds):
        for name, (runs, _) in contenders.items():
            started = time.perf_counter()
            passes(runs)
            times[name].append(time.perf_counter() - started)
    for row in table:
        row["samples_per_second"] = len(samples) / statistics.median(times[row["model"]])
    return table


def _mib(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 2**20


# What a README shows as an input, by type of modality, where one file or line says it.
_SHOWN = {
    "vision": '["image.png"]',
    "text": '["what is this?"]',
    "audio": '["sound.wav"]',
    "video": '[["frame.png"] * {frames}]',
    "eeg": '[{{"array": np.zeros(({channels}, 1280)), "sampling_rate": 128}}]',
    "features": '[np.zeros(({steps}, {size}), dtype="float32")]',
}


def _readme(model, processor, config, graphs):
    """How to run an export, in Markdown, with code that does."""
    argument, shown = processor.argument_of, {}
    for modality in processor.modalities:
        own = getattr(model.config, f"{modality['name']}_config")
        shown[modality["name"]] = _SHOWN[modality["type"]].format(
            frames=modality.get("num_frames") or 2,
            channels=getattr(own, "num_channels", None),
            steps=2 * modality.get("context", 0) + 1 if modality.get("context") else 8,
            size=getattr(own, "feature_size", None),
        )
    onnx, lines = config["format"] == "onnx", []
    for graph in graphs:
        names = [graph.name] if len(graphs) > 1 else config["modality_names"]
        entry = config["graphs"][graph.name]
        lines.append(f"batch = processor({', '.join(f'{argument(name)}={shown[name]}' for name in names)})")
        keys = list(entry["inputs"])
        if "modality_mask" in keys:
            ones = f"np.ones((1, {len(names)}), bool)" if onnx else f"torch.ones(1, {len(names)}, dtype=torch.bool)"
            lines.append(f'batch.setdefault("modality_mask", {ones})')
        if "task_ids" in keys:
            lines.append(
                f'batch["task_ids"] = {"np" if onnx else "torch"}.zeros(1, dtype={"int" if onnx else "torch.long"})'
            )
        outputs = ", ".join(entry["outputs"]) + ("," if len(entry["outputs"]) == 1 else "")
        if onnx:
            lines.append(f'session = onnxruntime.InferenceSession(f"{{folder}}/{entry["file"]}")')
            lines.append(f"{outputs} = session.run(None, {{key: np.asarray(batch[key]) for key in {keys}}})")
        else:
            lines.append(f'graph = torch.export.load(f"{{folder}}/{entry["file"]}").module()')
            lines.append(f"{outputs} = graph({{key: batch[key] for key in {keys}}})")
    text = Template(card_template("export").read_text())
    absences = any("modality_mask" in graph.example for graph in graphs)
    return text.render(config=config, onnx=onnx, absences=absences, code="\n".join(lines)) + "\n"
