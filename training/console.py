"""What the commands of the command line share: options, loading, tables, notes, and how an error is said in one line."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer


MODEL = Annotated[str, typer.Argument(help="Folder or Hub id of a model.")]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]


def arrays(given, option):
    """{name: array} of what an option was given as `NAME=FILE.npy`."""
    import numpy as np

    found = {}
    for item in given or ():
        name, _, path = item.partition("=")
        try:
            found[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{option} {item}: {error}. Expected NAME=FILE.npy, an array that numpy saved."
            ) from error
    return found


def load_config(source, wanted=None):
    """The config of a head of the family (`wanted`, or any), from a folder or the Hub, or of the base of an adapter that lies there."""
    from transformers import AutoConfig

    import crossmodal

    from .hub import hub_errors

    path, base = Path(source), source
    if path.exists() and not (path / "config.json").is_file():
        if not (path / "adapter_config.json").is_file():
            raise ValueError(f"{source!r} is no model: it has no config.json. Give the folder of a finished model.")
        base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    try:
        with hub_errors(base):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"the model {base!r} is neither a folder here nor a repo that the Hub hands out. Correct the name."
        ) from error
    head = (getattr(config, "architectures", None) or ["?"])[0]
    if config.model_type != "crossmodal" or head not in crossmodal.HEADS:
        raise ValueError(
            f"{source!r} holds a {head} of type {config.model_type!r}. Expected a head of the CrossModal family."
        )
    if wanted is not None and head != wanted:
        raise ValueError(f"{source!r} holds a {head}. Expected a {wanted}.")
    return config


def load_model(source, wanted=None, **options):
    """A head of the family (`wanted`, or any) and its processor, from a folder or the Hub; options: of `from_pretrained`."""
    import crossmodal

    from ..processing.processing_crossmodal import CrossModalProcessor

    config = load_config(source, wanted)
    model = getattr(crossmodal, config.architectures[0]).from_pretrained(source, **options)
    # An adapter alone has no processor of its own.
    alone = not Path(source, "config.json").exists() and Path(source, "adapter_config.json").exists()
    return model, CrossModalProcessor.from_pretrained(config._name_or_path if alone else source)


def print_table(title, rows):
    """Prints {label: {name: value}}, a row for each label; where that is too wide, a row for each name: no number is cut."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    # Where nobody says how wide it is (a file, a pipe), names are worth more than a short line.
    width = Console().width if sys.stdout.isatty() else 120
    # Spaces, where a long name may break.
    names = {name: name.replace("_", " ") for row in rows.values() for name in row}
    lines = [["", *names.values()]]
    lines += [[label, *(_cell(row.get(name, "")) for name in names)] for label, row in rows.items()]
    if _width(lines) > width:
        turned = [list(column) for column in zip(*lines, strict=True)]
        lines = min(turned, lines, key=_width)
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for place, (name, least) in enumerate(zip(lines[0], _least_widths(lines), strict=True)):
        table.add_column(name, justify="right" if place else "left", min_width=least)
    for line in lines[1:]:
        table.add_row(*line)
    # Where that is too wide as well, a terminal breaks the lines.
    Console(width=max(width, _width(lines))).print(table, crop=False)


def _least_widths(lines):
    """Of each column: what heads it may break at spaces, what stands in it may not."""
    return [max(map(len, [*heading.split(), *cells]), default=0) for heading, *cells in zip(*lines, strict=True)]


def _width(lines):
    """Of the narrowest table that cuts nothing: a space on each side of a column, and one before the first."""
    return 1 + sum(2 + least for least in _least_widths(lines))


def _cell(value):
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str("" if value is None else value)


def print_json(value):
    print(json.dumps(value), flush=True)


def note(line):
    # Beside a progress bar, a plain print would tear it.
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def quiet():
    """Silences what libraries say of themselves; errors still come through."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def one_line(error):
    """The message of an error in one line, also when it comes out of a worker process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Original Traceback") for line in lines):
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    return " ".join(lines) or type(error).__name__
