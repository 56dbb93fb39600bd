"""A recipe over several seeds: a whole model of each, and mean and deviation of what they reach."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

from .card import put_section
from .processes import is_main
from .tasks import TASKS
from .train import finished_result, train


def train_seeds(recipe, seeds, train_rows=None, eval_rows=None, fresh=False, write=print):
    """Trains a recipe with `seeds` seeds from its own on, each into `<output_dir>/seed-<n>`; finished ones are read.

    Returns:
        dict with `seeds`, `metrics` {name: mean}, `deviation` {name: sample deviation, 0 of one}, `majority`, `baselines` (means), and
        `runs`, the result of each; also written to `<output_dir>/seeds.json`.
    """
    runs = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        run = replace(recipe, seed=seed, output_dir=str(Path(recipe.output_dir) / f"seed-{seed}"))
        found = None if fresh else finished_result(run)
        if found is None:
            write(f"{recipe.name}, seed {seed}:")
            found = train(run, train_rows, eval_rows, fresh, write)
        else:
            write(f"{recipe.name}, seed {seed} was finished earlier.")
        runs.append({key: value for key, value in found.items() if key not in ("model", "processor", "log")})
    every = [run["metrics"] for run in runs]
    result = {
        "seeds": [run["seed"] for run in runs],
        "metrics": over(every, statistics.mean),
        "deviation": over(every, deviation),
        "majority": runs[0]["majority"],
        "baselines": {n: over([run["baselines"][n] for run in runs], statistics.mean) for n in runs[0]["baselines"]},
        "eval_rows": runs[0]["eval_rows"],
        "runs": runs,
    }
    if is_main():
        Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(recipe.output_dir) / "seeds.json").write_text(json.dumps(result, indent=2) + "\n")
        for seed in result["seeds"]:
            put_section(Path(recipe.output_dir) / f"seed-{seed}" / "README.md", _HEADING, _as_markdown(recipe, result))
    return result


_HEADING = "## Over seeds"


def _as_markdown(recipe, result):
    """Mean and deviation of every metric that a table has room for."""
    shown = TASKS[recipe.task].shown(result["metrics"])
    lines = ["| | mean | deviation |", "|---|---|---|"]
    lines += [
        f"| {name} | {value:.4f} | {result['deviation'][name]:.4f} |"
        for name, value in shown.items()
        if name != "loss"
    ]
    seeds = ", ".join(map(str, result["seeds"]))
    return f"The same recipe, trained anew with the seeds {seeds} (sample deviation):\n\n" + "\n".join(lines)


def seeds_table(recipe, result):
    """Rows of a table {name: {column: number}} of what `train_seeds` returned."""
    task, count = TASKS[recipe.task], len(result["seeds"])
    table = task.table(f"this model, mean of {count}", result["metrics"])
    table |= {f"{name}, deviation": row for name, row in task.table("this model", result["deviation"]).items()}
    return task.table_beside(table, result)


def deviation(values):
    """Of a sample; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def over(rows, combine):
    """{key: combined} of the keys that all rows have."""
    shared = [key for key in rows[0] if all(key in row for row in rows)]
    return {key: combine([row[key] for row in rows]) for key in shared}
