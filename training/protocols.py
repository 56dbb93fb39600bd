"""Cross-validation by name: what is held out together decides what a score means.

A random split of windows puts windows of one recording on both sides, and a model then knows the recording, not the label.
"""

import copy
import json
import random
import statistics
from dataclasses import replace
from pathlib import Path

from .building import encoders_and_config
from .loading import cut_recordings, load_rows
from .schemas import DATASETS, find_adapter
from .seeds import deviation, over
from .tasks import TASKS
from .train import train


def _by_subject(rows, adapter, folds, seed):
    if adapter.subject is None:
        raise ValueError("protocol 'leave_one_subject_out' needs rows of subjects; this dataset names none.")
    return [adapter.subject(row) for row in rows]


def _by_recording(rows, adapter, folds, seed):
    if adapter.recording is None:
        raise ValueError("protocol 'held_out_recordings' needs rows that are parts of recordings; these are not.")
    # Recordings of a label are dealt in turn, so that every fold has each label; where rows have numbers, all of them are.
    labels, dealt = {}, {}
    for row in rows:
        target = adapter.target(row)
        labels.setdefault(adapter.recording(row), target if isinstance(target, str) else "")
    names = sorted(labels, key=str)
    random.Random(seed).shuffle(names)
    for label in sorted(set(labels.values())):
        for place, name in enumerate(name for name in names if labels[name] == label):
            dealt[name] = place % folds
    return [dealt[adapter.recording(row)] for row in rows]


def _by_row(rows, adapter, folds, seed):
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [order[row] % folds for row in range(len(rows))]


# Name to (rows without signals, adapter, number of folds, seed) -> the fold of every row.
PROTOCOLS = {
    "leave_one_subject_out": _by_subject,
    "held_out_recordings": _by_recording,
    "random_segments": _by_row,
}
LEAKY = ("random_segments",)


def cross_validate(recipe, protocol, folds=5, permute_labels=False, rows=None, write=print):
    """Trains a recipe once for every fold of a protocol, each scored on what was held out; nothing is chosen on it.

    Args:
        recipe: Recipe of a classification. Its training split is cut into folds; the evaluation split is not looked at.
        protocol: row of `PROTOCOLS`. folds: how many, but for subjects.
        permute_labels: the control: labels dealt anew among the recordings, which then say nothing of what is heard. What is reached
            beyond the majority rate is leakage.
        rows: instead of `recipe.dataset`. write: takes each line of report.

    Returns:
        dict with `protocol`, `leaky`, `permuted`, `folds` [{"held_out", "metrics", "majority"}], and `metrics`, `deviation` (sample, over
        folds), `majority`, `baselines` of means; also written to `<output_dir>/<protocol>.json`.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} is unknown. Expected one of {list(PROTOCOLS)}.")
    entries = encoders_and_config(recipe)[0]
    rows = cut_recordings(load_rows(recipe.dataset, recipe.train_split) if rows is None else rows, entries)
    adapter = DATASETS[find_adapter(rows.column_names, recipe.task)]
    plain = list(rows.remove_columns(adapter.files))
    of = PROTOCOLS[protocol](plain, adapter, folds, recipe.seed)
    if permute_labels:
        rows = _permuted(rows, plain, adapter, recipe.seed)
    output, found = Path(recipe.output_dir), []
    name = f"{protocol}{'-permuted' if permute_labels else ''}"
    training = {**recipe.training, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    for fold in sorted(set(of), key=str):
        held = [row for row, place in enumerate(of) if place == fold]
        kept = [row for row, place in enumerate(of) if place != fold]
        run = replace(recipe, holdout=0.0, training=training, output_dir=str(output / name / f"fold-{fold}"))
        result = train(run, rows.select(kept), rows.select(held), fresh=True, write=lambda line: None, export=False)
        score = result["metrics"][TASKS[recipe.task].main_metric]
        write(f"{name}, held out {fold}: {TASKS[recipe.task].main_metric} {score:.4f} of {len(held):,} rows")
        found.append(
            {"held_out": fold, "rows": len(held)}
            | {key: copy.deepcopy(result[key]) for key in ("metrics", "majority", "baselines")}
        )
    summary = {
        "protocol": protocol,
        "leaky": protocol in LEAKY,
        "permuted": permute_labels,
        "folds": found,
        "metrics": over([fold["metrics"] for fold in found], statistics.mean),
        "deviation": over([fold["metrics"] for fold in found], deviation),
        "majority": over([fold["majority"] for fold in found], statistics.mean),
        "baselines": {
            key: over([fold["baselines"][key] for fold in found], statistics.mean) for key in found[0]["baselines"]
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def protocol_table(recipe, summary):
    """(title, rows of a table) of what `cross_validate` returned."""
    task, count = TASKS[recipe.task], len(summary["folds"])
    marks = [f"{count} folds"]
    marks += ["LEAKY: windows of one recording on both sides"] if summary["leaky"] else []
    marks += ["labels permuted: a control"] if summary["permuted"] else []
    table = task.table("this model, mean of folds", summary["metrics"])
    table |= {f"{name}, deviation": row for name, row in task.table("this model", summary["deviation"]).items()}
    return f"{recipe.name}, {summary['protocol']} ({'; '.join(marks)})", task.table_beside(table, summary)


def _permuted(rows, plain, adapter, seed):
    """Rows whose labels are dealt anew among recordings (or rows, where there are none)."""
    column = adapter.columns[-1]
    parts = [adapter.recording(row) if adapter.recording else number for number, row in enumerate(plain)]
    labels = {}
    for part, row in zip(parts, plain, strict=True):
        labels.setdefault(part, row[column])
    dealt = list(labels.values())
    random.Random(seed).shuffle(dealt)
    dealt = dict(zip(labels, dealt, strict=True))
    return rows.remove_columns(column).add_column(column, [dealt[part] for part in parts])
