"""Commands that look into a model or measure it: `crossmodal explain | ablate | benchmark | robustness | demo`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .console import JSON, MODEL, arrays, load_model, note, print_json, print_table, quiet


app = typer.Typer()


@app.command()
def explain(
    model: MODEL,
    image: Annotated[str | None, typer.Option(help="Path of an image.")] = None,
    text: Annotated[str | None, typer.Option(help="The question.")] = None,
    array: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE.npy for sound (`audio`, at the model's sampling rate) or a modality of features."
        ),
    ] = None,
    word: Annotated[list[str] | None, typer.Option(help="Word with a panel of its own; may be given again.")] = None,
    output: Annotated[str, typer.Option(help="Picture to write.")] = "explanation.png",
    dataset: Annotated[
        str | None,
        typer.Option(help="Instead of one input: rows for a deletion test (Hub id, folder, file, drawn:...)."),
    ] = None,
    split: Annotated[str, typer.Option(help="Name of the split.")] = "validation",
    limit: Annotated[int, typer.Option(min=1, help="Rows of the deletion test.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows, and of what is removed at random.")] = 0,
    as_json: JSON = False,
):
    """Draw where an answer came from; or, with --dataset, test whether what was attended to mattered."""
    inputs = {"images": image, "text": text, **arrays(array, "--array")}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if (dataset is None) == (not inputs):
        raise ValueError(
            "nothing to explain, or two things. Pass --image FILE, --text '...', --array NAME=FILE.npy, or else --dataset."
        )
    quiet()
    loaded, processor = load_model(model)
    for name in loaded.config.modality_names:
        if loaded.config.modality_settings[name]["type"] == "audio":
            for key in {name, processor.argument_of(name)} & inputs.keys():
                inputs[key] = {"array": inputs[key], "sampling_rate": processor.feature_extractor.sampling_rate}
    if dataset is None:
        from .explain import explain as run
        from .pictures import explanation_picture

        record = run(loaded, processor, **inputs)
        explanation_picture(record, output, word)
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in record["modality_weights"].items())
        note(f"{record['answers'][0][0]} ({record['answers'][0][1]:.2f}); weights: {weights}; picture: {output}")
        if as_json:
            print_json({key: record[key] for key in ("answers", "modality_weights", "gates")})
        return
    from .evaluate import samples_of, task_of
    from .explain import deletion_test
    from .loading import load_rows, some_of

    rows = some_of(load_rows(dataset, split, limit), limit, seed)
    samples = samples_of(loaded, rows, task_of(loaded, rows.column_names))
    names = loaded.config.modality_names
    tables = {}
    for name in names:
        try:
            tables[name] = deletion_test(loaded, processor, samples, name, seed=seed)
        except ValueError as error:
            # What one modality does not allow, another may.
            note(f"{name}: {error}")
    if not tables:
        raise ValueError("no modality of this model can be tested by deletion; the lines above say why.")
    rows = {
        f"{name}, {row['fraction']:.0%} removed": {key: row[key] for key in row if key != "fraction"}
        for name, table in tables.items()
        for row in table
    }
    print_table("Drop of the answer's probability: most attended first, and at random", rows)
    if as_json:
        print_json(tables)


@app.command()
def ablate(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe or path of a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, from the recipe's seed on.")] = 3,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="One of the variants, or key=value of the config; may be given again. All, if left out: the recipe's own, if it names some."
        ),
    ] = None,
    missing: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Also score with each modality missing in this part of the rows."),
    ] = None,
    as_json: JSON = False,
):
    """Train a recipe with one part changed at a time, over seeds, and say what each part is worth."""
    from .recipes import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    quiet()
    from .ablate import ablate as run
    from .ablate import as_markdown
    from .tasks import TASKS

    table = run(loaded, variant, seeds, missing_rate=missing, write=note)
    print(as_markdown(table, TASKS[loaded.task].main_metric, missing, TASKS[loaded.task].percent))
    note(f"table, runs and plot: {loaded.output_dir}/ablation.md, .csv, .png")
    if as_json:
        print_json(table)


@app.command()
def benchmark(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the recipe of --cached or --train")
    ] = None,
    cached: Annotated[
        str | None, typer.Option(help="A recipe: its training from raw inputs and from cached tokens instead.")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="A recipe: its accuracy, and that of peers that learn as long from the same rows."),
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Attention kernels over 1k to 64k tokens instead of whole models.")
    ] = False,
    retrieval: Annotated[
        bool,
        typer.Option(
            "--retrieval", help="Ranking a pair, the nearest of many vectors, and the memory of the contrast."
        ),
    ] = False,
    generation: Annotated[
        bool, typer.Option("--generation", help="Writing, beside BLIP and VisionEncoderDecoder of the same size.")
    ] = False,
    views: Annotated[
        bool, typer.Option("--views", help="MMViT and one view of it, beside AST, at equal FLOP.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="With --generation: also static caches, and compiled decoders.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="With --retrieval: rank by this model; --dataset and --split tell how well it does."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="With --model: Hub id, folder or file.")] = None,
    split: Annotated[str, typer.Option(help="Name of its split.")] = "validation",
    size: Annotated[str, typer.Option(help="Of the models: tiny or base.")] = "tiny",
    rounds: Annotated[int, typer.Option(min=1, help="Of measuring everything in turn.")] = 7,
    as_json: JSON = False,
):
    """Measure speed: beside transformers' LXMERT, ViLT and BridgeTower of the same size, or the attention kernels."""
    from . import benchmark as bench

    if size not in bench.SIZES:
        raise ValueError(f"--size {size} is unknown. Expected one of {sorted(bench.SIZES)}.")
    if (model or dataset) and not (retrieval and model):
        raise ValueError("--model and --dataset belong to --retrieval. Pass --retrieval --model MODEL [--dataset D].")
    if overrides and not (cached or train):
        raise ValueError(f"{overrides[0]!r} belongs to a recipe. Name one with --cached RECIPE or --train RECIPE.")
    from .recipes import Recipe

    quiet()
    if train:
        table = bench.equal_training_time(Recipe.load(train, overrides or []), write=note)
        print_table(f"{train}: trained as long as each other", {row.pop("model"): row for row in map(dict, table)})
        if as_json:
            print_json(table)
        return
    if cached:
        found = bench.cached_training(Recipe.load(cached, overrides or []), rounds=rounds)
        note(
            f"training, samples per second: {found['raw']:.1f} from raw inputs, {found['cached']:.1f} from cached tokens, "
            f"{found['ratio']:.1f} times as many; logits differ by {found['logits_difference']:.1e}; computed once in "
            f"{found['fill_seconds']:.0f} s."
        )
        if as_json:
            print_json(found)
        return
    if generation:
        _benchmark_generation(size, rounds, compiled, as_json)
        return
    if views:
        _benchmark_views(rounds, as_json)
        return
    if retrieval:
        _benchmark_retrieval(model, dataset, split, size, rounds, as_json)
        return
    if kernels:
        table, errors = bench.kernels(write=note), bench.feature_errors()
        found = bench.growth_and_crossover(table)
        rows = {}
        for row in table:
            cells = rows.setdefault(f"{row['tokens']:,} tokens", {})
            cells[f"{row['kernel']} s"] = row["seconds"]
            cells[f"{row['kernel']} MiB"] = "" if row["mib"] is None else f"{row['mib']:.0f}"
        print_table("One forward, one head of width 64", rows)
        for name, values in found.items():
            crossover = values["crossover"]
            where = (
                ""
                if name == "exact"
                else f"; faster than exact from {crossover:,} tokens"
                if crossover
                else "; never faster"
            )
            note(f"{name}: time grows with the power {values['exponent']:.2f} of the length{where}")
        clips = bench.fusion_over_time(rounds=rounds)
        rows = {row["kernel"]: {key: row[key] for key in row if key != "kernel"} for row in clips}
        print_table(
            "A fusion layer of 4,096 frames and 4,096 steps of sound, width 128, window of 32 on each side", rows
        )
        whole = errors.pop("exact output")
        parts = ", ".join(f"{error:.4f} with {count}" for count, error in errors.items())
        note(f"linear, error against the softmax it approximates (of size {whole:.3f}), by random features: {parts}")
        if as_json:
            print_json({"kernels": table, "growth": found, "errors": errors, "clips": clips})
        return
    table = bench.compare(size, rounds, write=note)
    for mode, scenario in dict.fromkeys((row["mode"], row["scenario"]) for row in table):
        chosen = [row for row in table if (row["mode"], row["scenario"]) == (mode, scenario)]
        columns = ("samples_per_second", "ours_over_this", "gflop_per_sample", "part_of_peak", "parameters")
        print_table(f"{mode}, {scenario}", {row["model"]: {key: row[key] for key in columns} for row in chosen})
    logits, gradients = bench.grouping_is_exact(size)
    note(
        f"32 questions that share 8 images, against an image each: logits differ by {logits:.1e}, gradients by {gradients:.1e}"
    )
    shares = {}
    for title, images, words in (("batch 32", 32, 32), ("32 questions, 8 images", 8, 12)):
        shares[title] = bench.where_time_goes(size, images=images, words=words)
        note(f"{title}: " + ", ".join(f"{name} {part:.0%}" for name, part in shares[title].items()))
    if as_json:
        print_json({"models": table, "grouping": [logits, gradients], "time": shares})


def _benchmark_generation(size, rounds, compiled, as_json):
    from . import benchmark_generation as bench

    table = bench.compare(size, rounds, compiled=compiled, write=note)
    for mode, search, batch in dict.fromkeys((row["mode"], row["search"], row["batch"]) for row in table):
        chosen = [row for row in table if (row["mode"], row["search"], row["batch"]) == (mode, search, batch)]
        columns = ("words_per_second", "ours_over_this", "parameters")
        print_table(
            f"{mode}, {search}, batch {batch}", {row["model"]: {key: row[key] for key in columns} for row in chosen}
        )
    for row in table:
        if row["why"] and row["batch"] == 1:
            note(f"{row['model']} does not take a {row['mode']}: {row['why']}")
    shares = bench.where_time_goes(size, rounds=rounds)
    note("greedy, batch 1: " + ", ".join(f"{name} {part:.0%}" for name, part in shares.items()) + " of the time")
    if as_json:
        print_json({"models": table, "time": shares})


def _benchmark_views(rounds, as_json):
    from . import benchmark_views as bench

    table = bench.compare(rounds=rounds, write=note)
    for mode, batch in dict.fromkeys((row["mode"], row["batch"]) for row in table):
        chosen = [row for row in table if (row["mode"], row["batch"]) == (mode, batch)]
        columns = ("samples_per_second", "ours_over_this", "gflop_per_sample", "width", "parameters")
        print_table(f"{mode}, batch {batch}", {row["model"]: {key: row[key] for key in columns} for row in chosen})
    if as_json:
        print_json(table)


def _benchmark_retrieval(model, dataset, split, size, rounds, as_json):
    from . import benchmark_retrieval as bench
    from .benchmark import SIZES

    loaded, scores = None, {}
    if model:
        loaded, processor = load_model(model, "CrossModalForRetrieval")
        if dataset:
            from .evaluate import evaluate as score

            metrics = score(loaded, processor, dataset, split)
            scores = {key: metrics[key] for key in metrics if key.endswith("_r1")}
    shape = bench.shape_of(loaded) if loaded else SIZES[size]
    costs = bench.ranking_cost(loaded or bench.model_of(shape), shape, rounds)
    if scores:
        costs[0] |= {key: value for key, value in scores.items() if key.count("_") == 1 or "contrastive_mean" in key}
    title = f"Ranking a pair at width {shape.width}, encoders of depth {shape.depth}, {shape.fusion} fusion layers"
    print_table(title, {row["model"]: {key: row[key] for key in row if key != "model"} for row in costs})
    nearest = bench.nearest_cost(rounds=rounds)
    print_table("Exact top 10 of 100,000 vectors of width 256", {f"{row['queries']} queries": row for row in nearest})
    memory = bench.contrast_memory()
    print_table(
        "Contrast of a batch with itself, forward and backward, whole and in tiles of 1,024",
        {f"{row['rows']:,} rows": row for row in memory},
    )
    if as_json:
        print_json({"ranking": costs, "nearest": nearest, "contrast": memory})


@app.command()
def robustness(
    model: MODEL,
    dataset: Annotated[str, typer.Option(help="Hub id, folder or file.")],
    split: Annotated[str, typer.Option(help="Name of the split.")] = "validation",
    seed: Annotated[int, typer.Option(min=0, help="Of what is taken away or made noisy.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    output: Annotated[
        str | None, typer.Option(help="Folder for table, plot and card; the model's, if it is one.")
    ] = None,
    as_json: JSON = False,
):
    """Score a model with each modality missing or noisy, and write it into its card."""
    quiet()
    from .evaluate import task_of
    from .loading import load_rows
    from .robustness import add_to_folder
    from .robustness import robustness as run

    folder = Path(output or model)
    if not output and not folder.is_dir():
        raise ValueError(f"{model!r} is no folder here. Pass --output FOLDER for the table, the plot and the card.")
    loaded, processor = load_model(model)
    data = load_rows(dataset, split)
    task = task_of(loaded, data.column_names)
    table = run(loaded, processor, data, split, seed, batch_size, limit, write=note)
    rows = {}
    for row in table:
        name = "clean" if row["modality"] is None else f"{row['modality']}, {row['kind']} {row['level']:g}"
        rows[name] = {key: value for key, value in row.items() if key in task.metrics}
    print_table(f"{Path(model).name} on {Path(dataset).name}, {split}", rows)
    folder.mkdir(parents=True, exist_ok=True)
    count = f"the first {limit:,} shuffled rows" if limit else "all rows"
    add_to_folder(folder, table, task.main_metric, f"`{Path(dataset).name}`, {split}, {count}")
    note(f"table, plot and card: {folder}")
    if as_json:
        print_json(table)


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder to write.")] = "outputs/demo",
    images: Annotated[int, typer.Option(min=16, help="Images of the training world.")] = 3600,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: JSON = False,
):
    """Train the tiny preset on a drawn world beside its baselines, and show what it learnt."""
    quiet()
    from .demo import demo as run

    started = time.time()
    table = run(output, images, epochs, seed, write=note)
    print_table("Test accuracy by kind of question", table)
    note(f"{(time.time() - started) / 60:.1f} minutes in all. Folder: {output}   picture: {output}/answers.png")
    if as_json:
        print_json(table)
