"""Commands about running a model elsewhere: `crossmodal export | profile`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import JSON, MODEL, load_model, note, print_json, print_table, quiet


app = typer.Typer()


@app.command()
def export(
    model: MODEL,
    output: Annotated[str, typer.Option(help="Folder to write; an earlier export there is replaced.")],
    form: Annotated[str, typer.Option("--format", help="onnx or torch (torch.export).")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Also with weights in int8.")] = False,
    all_present: Annotated[
        bool, typer.Option("--all-present", help="Graphs without modality_mask, for rows that lack nothing.")
    ] = False,
    dataset: Annotated[
        str | None, typer.Option(help="Hub id, folder or file: score, speed and size beside the model.")
    ] = None,
    split: Annotated[str, typer.Option(help="Name of its split.")] = "validation",
    limit: Annotated[int, typer.Option(min=1, help="Rows of it, drawn at random.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Of measuring speed in turn.")] = 3,
    as_json: JSON = False,
):
    """Write a model as graphs that run without its code, by onnxruntime or torch alone, and check them against it."""
    quiet()
    from .export import export_model, measure

    rows = None
    if dataset is not None:
        from .loading import load_rows, some_of

        rows = some_of(load_rows(dataset, split, limit), limit, seed=0)
    loaded, processor = load_model(model)
    report = export_model(loaded, processor, output, form, int8, not all_present, write=note)
    shown = {file: {"difference": f"{row['difference']:.1e}", "MiB": row["mib"]} for file, row in report.items()}
    print_table(f"{Path(model).name}: difference from the model, relative", shown)
    table = []
    if rows is not None:
        table = measure(loaded, processor, output, rows, split, batch_size, rounds)
        title = f"{Path(dataset).name}, {split}, {len(rows):,} rows, batches of {batch_size}"
        print_table(title, {row["model"]: {key: row[key] for key in row if key != "model"} for row in table})
    note(f"the graphs, the processor and a README are in {output}")
    if as_json:
        print_json({"files": report, "measured": table, "output": output})


@app.command()
def profile(
    presets: Annotated[list[str] | None, typer.Argument(help="Names of presets; all, if left out.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows; may be given again. 1, 8 and 32.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory to fill, such as 8GiB: also say the largest batch for it.")
    ] = None,
    words: Annotated[int, typer.Option(min=1, help="Of each question.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Of measuring time.")] = 3,
    as_json: JSON = False,
):
    """Measure what a preset costs on this machine: time and memory of a forward and of a training step, by batch size."""
    quiet()
    from ..configs import load_preset, preset_names
    from .profiling import mebibytes
    from .profiling import profile as run

    wanted = None if memory is None else mebibytes(memory)
    presets = presets or preset_names()
    for preset in presets:
        load_preset(preset)
    found = [run(preset, sorted(batch or (1, 8, 32)), wanted, words, rounds, write=note) for preset in presets]
    for item in found:
        title = (
            f"{item['preset']}: {item['parameters']:,} parameters, {item['weights_mib']:,.0f} MiB, {item['device']}"
        )
        rows = {f"batch {row['batch']}": _readable(row) for row in item["rows"]}
        print_table(title, rows)
        if wanted is not None:
            forward, step = (item[f"largest_{kind}"] for kind in ("forward", "step"))
            note(
                f"{item['preset']}: {memory} hold a batch of {_rows(forward)} in a forward, {_rows(step)} in training"
            )
    if as_json:
        print_json(found)


def _readable(row):
    names = {"forward_ms": "forward ms", "samples_per_second": "samples per second", "forward_mib": "forward MiB"}
    names |= {"step_ms": "training step ms", "step_mib": "training step MiB"}
    digits = {"samples_per_second": 1}
    return {name: "" if row[key] is None else f"{row[key]:,.{digits.get(key, 0)}f}" for key, name in names.items()}


def _rows(count):
    return "unknown size" if count is None else f"{count:,}"
