"""Which part of a model helps: a recipe trained again and again with one key of its config changed, over seeds."""

import copy
import csv
import hashlib
import io
import json
import re
import shutil
import statistics
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import yaml
from tqdm import tqdm

from ..modeling.configuration_crossmodal import CrossModalConfig
from .building import config_of, encoders_and_config, said_of, unknown_encoders
from .checkpoints import write_whole
from .datasets import RowDataset
from .loading import contexts_of, load_rows, some_of
from .points import second_stage
from .processes import FolderTaken, alone_in, begin, is_main
from .recipes import nearest
from .robustness import CorruptedDataset
from .tasks import TASKS
from .token_cache import with_cached_tokens
from .train import other_run, train
from .warm_up import stage_of


# Name to what it changes of the model's config. The first is what the others are compared with. A row is a sweep point and
# no code: more of them come from the command line as `key=value`.
VARIANTS = {
    "full": {},
    "no cross-attention": {"gate": "closed"},
    "single level": {"fusion_levels": "single"},
    "uniform weights": {"modality_weighting": "uniform"},
    "concat": {"fusion_type": "concat"},
    "joint": {"fusion_type": "joint"},
    "interlaced": {"fusion_type": "interlaced"},
    "mutual": {"fusion_type": "mutual"},
    "bottleneck": {"fusion_type": "bottleneck"},
}

# Those that are run where they are asked for by name alone.
BASELINES = {
    # Of points: tags, and nothing but where their classes are.
    "class activation": {"class_token_weight": 0.0, "contrastive_weight": 0.0, "smoothness_weight": 0.0},
}


# Seconds until runs that other processes are at are looked at again.
_WAIT = 10


def variants_of(recipe, chosen=None, write=print):
    """{name: recipe} of an ablation, `full` first, all checked before any is trained.

    Args:
        recipe: Recipe. chosen: names of `recipe.variants`, `VARIANTS` and `BASELINES`, `key=value` of the model's config (several with
            spaces between), or `<modality> alone`, with one of these behind it or without; None takes the recipe's own, or where it has
            none all of `VARIANTS`, and each modality alone, that this recipe can have.
        write: takes a line for each of these that is left out, with the reason.

    Raises:
        ValueError: for a name that there is not, and for a variant by name, or of the recipe, that cannot be trained or is `full` again.
    """
    if recipe.model.get("checkpoint"):
        raise ValueError(
            f"model.checkpoint={recipe.model['checkpoint']!r} is trained as it is: variants would have other weights. Give model.encoders."
        )
    encoders, config = encoders_and_config(recipe)
    also = [key for name in chosen or () for key in re.findall(r"(\w+)=", name)]
    own = recipe.variants
    recipe = replace(recipe, variants={}, warm_up=[_as_in_full(stage, config, also) for stage in recipe.warm_up])
    alone = {f"{name} alone": name for name in encoders} if len(encoders) > 1 else {}
    known, by_default = VARIANTS | BASELINES, not (chosen or own)
    checked = _can_be_checked(recipe, write)
    found, models = {}, {}
    for name in dict.fromkeys(["full", *(chosen or own or [*VARIANTS, *alone])]):
        only = next((part for part in alone if name == part or name.startswith(f"{part} ")), "")
        rest = name.removeprefix(only).strip()
        if name in own or not rest or rest in known:
            change = known.get(rest, {})
        elif "=" in rest:
            change = _change_of(rest)
        else:
            raise ValueError(
                f"{name!r} is no variant. Expected some of {nearest(name, [*own, *known, *alone])}, or key=value of the config."
            )
        instead = ""
        try:
            if name in own:
                run = recipe.changed(own[name])
            else:
                run = _with(_with_only(recipe, encoders, config, alone[only]) if only else recipe, change)
            if checked and by_default and change.get("gate") == "closed" and (why := _refused(run)):
                run, instead = _with(recipe, VARIANTS["concat"]), f"{name!r} is fusion_type='concat' here: {why}"
            model = _identity(run) if checked else name
            same = next((other for other in (models if by_default else ["full"]) if models.get(other) == model), None)
            reason = None if same is None else f"it is {same!r} again"
        except ValueError as error:
            reason = str(error)
        if reason is None:
            found[name], models[name] = run, model
            if instead:
                write(instead)
        elif by_default:
            write(f"{name!r} is left out: {reason}")
        else:
            raise ValueError(f"the variant {name!r} cannot be trained: {reason}")
    return found


def _can_be_checked(recipe, write):
    """Whether it can be said beforehand what the variants of a recipe are refused for.

    Raises:
        ValueError: for a recipe that cannot be trained itself.
    """
    if (why := _refused(recipe)) is None:
        return True
    if not (unknown := unknown_encoders(recipe)):
        raise ValueError(why)
    write(f"variants are not checked beforehand, for the encoders of {unknown} are not on this machine: {why}")
    return False


def _refused(run):
    """Why a run cannot be trained, or None."""
    try:
        _identity(run)
    except ValueError as error:
        return str(error)


def _identity(run):
    """What two runs have alike that train the same model in the same way.

    Raises:
        ValueError: for a run whose model, or that of one of its stages, is refused.
    """
    config = config_of(run)
    for number, own in enumerate(run.warm_up, 1):
        try:
            config_of(stage_of(run, own))
        except ValueError as error:
            raise ValueError(f"stage {number} of warm_up: {error}") from error
    if run.pseudo_labels:
        config_of(second_stage(run))
    encoders, options = encoders_and_config(run)
    model = config.to_dict() | {key: options.get(key) for key in ("class_weights", "thresholds")}
    model["fusion_levels"] = {name: config.levels_of(name) for name in config.modality_names}
    if len(config.modality_names) == 1:
        # Nothing is looked at across, and its weight is 1.
        model["gate"] = None if config.fusion_type == "cross" else config.gate
        model["modality_weighting"] = {"adaptive": "uniform"}.get(config.modality_weighting, config.modality_weighting)
    rest = {key: run.model.get(key) or None for key in ("freeze", "decoder")}
    return model, encoders, rest, run.stated(leave_out=("model",))


def _with(run, change):
    """A run with other fields of its model's config."""
    model = copy.deepcopy(run.model)
    model["config"] = {**(model.get("config") or {}), **change}
    return replace(run, model=model)


def _change_of(name):
    """{key: value} of `key=value`, or of several with spaces between."""
    change = {}
    for item in re.split(r"\s+(?=\w+=)", name.strip()):
        key, _, value = item.partition("=")
        try:
            change[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"the variant {item!r} has a value that is no YAML. Expected for example {key}=0.5."
            ) from error
    return change


def _as_in_full(stage, config, also):
    """A stage that trains a model of its own, made independent of what the variants change: all start from the same.

    One that hands its fusion over has that of the variant, which another would not fit.
    """
    if not {"modalities", "config"} & stage.keys() or "fusion" in stage.get("keep", ()):
        return stage
    changed = {key for change in VARIANTS.values() for key in change} | set(also)
    known = {key for key in changed if key in config or hasattr(CrossModalConfig, key)}
    fixed = {key: config.get(key, getattr(CrossModalConfig, key, None)) for key in sorted(known)}
    return {**stage, "config": {**fixed, **stage.get("config", {})}}


def _with_only(recipe, encoders, config, name):
    """The recipe of one modality by itself; stages that hand over nothing of it fall away."""
    model = {"encoders": {name: encoders[name]}, "config": _config_of_one({"fusion_queries": None, **config}, name)}
    model["freeze"] = [frozen for frozen in recipe.model.get("freeze") or () if frozen == name]
    stages = []
    for stage in copy.deepcopy(recipe.warm_up):
        if "keep" in stage:
            stage["keep"] = [kept for kept in stage["keep"] if kept in (name, "fusion")]
        if "config" in stage:
            stage["config"] = _config_of_one(stage["config"], name)
        for key in ("modalities", "freeze"):
            if key in stage:
                stage[key] = [given for given in stage[key] if given == name]
        if stage.get("keep") != [] and stage.get("modalities") != []:
            stages.append(stage)
    rates = {key: rate for key, rate in recipe.learning_rates.items() if key in (name, "fusion", "head")}
    # What a training encoder makes of its inputs cannot be kept.
    cache = recipe.token_cache if model["freeze"] else None
    # Of low-rank updates that reach another modality nothing is left.
    lora = recipe.lora if recipe.lora and recipe.lora["preset"] in (name, "all", "all-linear") else None
    return replace(recipe, model=model, warm_up=stages, learning_rates=rates, token_cache=cache, lora=lora)


def _config_of_one(config, name):
    """Fields of a config for one modality by itself."""
    config = said_of(config, [name])
    config |= {key: None for key in ("fusion_queries", "first_query") if key in config}
    # There is nobody to look at: nothing to alternate between, and nothing to be seen in.
    config |= {"fusion_type": "concat"} if config.get("fusion_type") == "interlaced" else {}
    config |= {"point_projection": "none"} if "point_projection" in config else {}
    return config


def ablate(recipe, chosen=None, seeds=3, train_rows=None, eval_rows=None, missing_rate=None, write=print):
    """Trains every variant of a recipe over seeds; runs that were finished earlier are read, and those that another process is at
    come last: several processes that are given one sweep share it.

    Args:
        recipe: Recipe, whose `output_dir` takes the results, and whose `seed` is the first one.
        chosen: see `variants_of`. seeds: how many.
        train_rows, eval_rows: instead of `recipe.dataset`.
        missing_rate: also score every run with each modality missing in this part of the evaluation rows.
        write: takes a line for each variant that is left out.

    Returns:
        list of dicts `{"variant", "runs", "mean", "deviation", "difference", "difference_deviation", "parameters"}` of the
        task's main metric; differences are to `full`, seed by seed. With `missing_rate` also `missing`, {modality: dict of
        "mean" and "loss", the mean drop against the same run's score on whole rows, with its "deviation"}.
    """
    metric, folder = TASKS[recipe.task].main_metric, Path(recipe.output_dir)
    variants = variants_of(recipe, chosen, write if is_main() else lambda line: None)
    plan = [(name, seed) for seed in range(recipe.seed, recipe.seed + seeds) for name in variants]
    results, rows = {}, {"train_rows": train_rows, "eval_rows": eval_rows}
    left, taken = deque(plan), 0
    with tqdm(total=len(plan), desc="ablation", unit="run") as bar:
        while left:
            name, seed = left.popleft()
            bar.set_postfix_str(f"{name}, seed {seed}")
            run = replace(
                variants[name],
                seed=seed,
                name=name,
                output_dir=str(folder / _slug(name) / f"seed-{seed}"),
                compare=[],
                token_cache=str(folder / "tokens")
                if variants[name].token_cache is True
                else variants[name].token_cache,
                training={**variants[name].training, "disable_tqdm": True, "save_total_limit": 1},
            )
            try:
                results[name, seed] = _run_once(run, rows, folder / "warm_up", missing_rate)
            except FolderTaken:
                left.append((name, seed))
                taken += 1
                if taken >= len(left):
                    bar.set_postfix_str("waiting for other processes")
                    time.sleep(_WAIT)
                continue
            taken = 0
            bar.update()
            bar.write(f"{name}, seed {seed}: {metric} {results[name, seed]['metrics'][metric]:.4f}")
    results = {each: results[each] for each in plan}
    table = summarise(results, list(variants), range(recipe.seed, recipe.seed + seeds), metric)
    if is_main():
        _write_reports(folder, recipe, results, table, metric, missing_rate)
    return table


def train_variant(run, folder, name, train_rows, eval_rows):
    """Result of one variant, kept in `folder`."""
    place = Path(folder) / _slug(name)
    run = replace(run, name=name, output_dir=str(place), compare=[], training={**run.training, "disable_tqdm": True})
    return _run_once(run, {"train_rows": train_rows, "eval_rows": eval_rows}, None, None)


def _run_once(run, rows, shared, missing_rate):
    """Result of one run, from its file if it was finished with this very recipe.

    Raises:
        FolderTaken: where another process is at it.
    """
    begin(cpu=bool(run.training.get("use_cpu")))
    with alone_in(run.output_dir):
        return _run_alone(run, rows, shared, missing_rate)


def _run_alone(run, rows, shared, missing_rate):
    folder = Path(run.output_dir)
    known = run.stated(leave_out=("output_dir", "name", "token_cache", "compare"))
    if missing_rate is not None:
        known["missing_rate"] = missing_rate
    stamp = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = folder / "result.json"
    if file.exists():
        found = json.loads(file.read_text())
        if found["recipe"] == stamp:
            return found
    # The folders of a sweep are its own: what another recipe left there makes room, whether it was finished or cut off.
    fresh = not (folder / "checkpoints" / "recipe.json").exists() or bool(other_run(run))
    result = train(run, **rows, fresh=fresh, write=lambda line: None, export=False, warm_up_folder=shared)
    kept = (
        "metrics",
        "majority",
        "baselines",
        "parameters",
        "trainable_parameters",
        "minutes",
        "seed",
        "epochs",
        "eval_rows",
        "chosen_on",
    )
    found = {key: result[key] for key in kept} | {"recipe": stamp}
    if missing_rate is not None:
        found["missing"] = _score_with_missing(run, result, rows["eval_rows"], missing_rate)
    if is_main():
        write_whole(file, json.dumps(found, indent=1))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found


def _score_with_missing(run, result, eval_rows, rate):
    """{modality: main metric} of a finished run, with that modality missing in a part of the evaluation rows."""
    model, processor = result["model"], result["processor"]
    arguments = {name: processor.argument_of(name) for name in processor.modality_names}
    if len(arguments) == 1:
        return {}
    rows = load_rows(run.dataset, run.eval_split) if eval_rows is None else eval_rows
    contexts = contexts_of(model.config.modality_settings)
    whole = RowDataset(some_of(rows, run.max_eval_rows, run.seed), run.task, contexts=contexts)
    samples = with_cached_tokens(run, model, processor, {"evaluation": whole}, lambda line: None)["evaluation"]
    task, found = TASKS[run.task].from_config(model.config), {}
    for name, argument in arguments.items():
        if argument not in whole.adapter.inputs:
            continue
        data = CorruptedDataset(samples, name, arguments, None, rate)
        scores = task.evaluate(model, processor, data, progress=False)
        found[name] = scores[task.main_metric]
    return found


def summarise(results, variants, seeds, metric):
    """Rows of the table: mean and sample deviation of each variant, and of its difference to `full`, seed by seed."""
    table = []
    for name in variants:
        scores = [results[name, seed]["metrics"][metric] for seed in seeds]
        paired = [results[name, seed]["metrics"][metric] - results["full", seed]["metrics"][metric] for seed in seeds]
        table.append(
            {
                "variant": name,
                "runs": len(scores),
                "mean": statistics.mean(scores),
                "deviation": statistics.stdev(scores) if len(scores) > 1 else 0.0,
                "difference": statistics.mean(paired),
                "difference_deviation": statistics.stdev(paired) if len(paired) > 1 else 0.0,
                "parameters": results[name, seeds[0]]["parameters"],
            }
        )
        missing = [results[name, seed].get("missing") or {} for seed in seeds]
        if missing[0]:
            table[-1]["missing"] = {}
        for modality in missing[0]:
            lost = [score - found[modality] for score, found in zip(scores, missing, strict=True)]
            table[-1]["missing"][modality] = {
                "mean": statistics.mean(found[modality] for found in missing),
                "loss": statistics.mean(lost),
                "deviation": statistics.stdev(lost) if len(lost) > 1 else 0.0,
            }
    return table


def as_markdown(table, metric, missing_rate=None, percent=100):
    """The table of `ablate` as Markdown, in per cent; `percent` makes them of the metric."""
    lines = [f"| variant | {metric} (%) | against full, paired | runs | parameters |", "|---|---|---|---|---|"]
    for row in table:
        paired = f"{percent * row['difference']:+.2f} ± {percent * row['difference_deviation']:.2f}"
        lines.append(
            f"| {row['variant']} | {percent * row['mean']:.2f} ± {percent * row['deviation']:.2f} | "
            f"{'' if row['variant'] == 'full' else paired} | {row['runs']} | {row['parameters']:,} |"
        )
    missing = [(row["variant"], name, of) for row in table for name, of in row.get("missing", {}).items()]
    if missing:
        lines += [
            "",
            f"| variant | missing in {missing_rate:.0%} of rows | {metric} (%) | points lost |",
            "|---|---|---|---|",
        ]
    for variant, name, of in missing:
        lost = f"{percent * of['loss']:.2f} ± {percent * of['deviation']:.2f}"
        lines.append(f"| {variant} | {name} | {percent * of['mean']:.2f} | {lost} |")
    return "\n".join(lines)


def _write_reports(folder, recipe, results, table, metric, missing_rate):
    """`ablation.md`, `ablation.csv` (every run) and `ablation.png`, each whole: several processes may end a sweep at the same time."""
    from .plots import ablation_plot

    first, percent = next(iter(results.values())), TASKS[recipe.task].percent
    write_whole(
        folder / "ablation.md",
        f"# {recipe.name}: {Path(recipe.dataset).name}, {recipe.eval_split}, {first['eval_rows']:,} rows\n\n"
        f"{as_markdown(table, metric, missing_rate, percent)}\n\nMean and sample deviation over seeds. Most common answer: "
        f"{percent * first['majority'][metric]:.2f} %.\n",
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["variant", "seed", *first["metrics"], "minutes", "epochs", "parameters", "trainable_parameters"]
        + [f"{metric}, {name} missing" for name in first.get("missing", ())]
    )
    for (name, seed), result in results.items():
        numbers = [result[key] for key in ("minutes", "epochs", "parameters", "trainable_parameters")]
        missing = [(result.get("missing") or {}).get(modality, "") for modality in first.get("missing", ())]
        writer.writerow([name, seed, *result["metrics"].values(), *numbers, *missing])
    write_whole(folder / "ablation.csv", text.getvalue())
    ablation_plot(table, results, metric, first["majority"][metric], folder / "ablation.png", percent)


def _slug(name):
    return "".join(c if c.isalnum() else "-" for c in name)
