"""The command line: `crossmodal train | evaluate | predict | explain | ablate | benchmark | robustness | demo`.

Bad input ends with one line on standard error and exit code 2; a fault of ours with its traceback and exit code 1.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, evaluate and use CrossModal models.",
)

_MODEL = Annotated[str, typer.Argument(help="Folder or Hub id of a model.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (e.g. vqa_easy) or path of a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. dataset=data/easy_vqa seed=1")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard an earlier run in output_dir.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Train with so many seeds, each into its own folder.")] = 1,
    as_json: _JSON = False,
):
    """Train a recipe into a whole Hub folder; a run that was cut off goes on where it was. With --seeds, mean and deviation."""
    from .recipes import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    _quiet()
    from .train import train as run

    if seeds > 1:
        from .seeds import seeds_table, train_seeds

        found = train_seeds(loaded, seeds, fresh=fresh, write=_note)
        _print_table(f"{loaded.name}: {loaded.eval_split}, {found['eval_rows']:,} rows", seeds_table(loaded, found))
        _note(f"the models are in {loaded.output_dir}/seed-*")
        if as_json:
            _print_json(
                {key: value for key, value in found.items() if key != "runs"} | {"output_dir": loaded.output_dir}
            )
        return
    result = run(loaded, fresh=fresh, write=_note)
    from .tasks import TASKS

    task = TASKS[loaded.task]
    table = task.table_beside(task.table("this model", result["metrics"]), result)
    _print_table(f"{loaded.name}: {loaded.eval_split}, {result['eval_rows']:,} rows", table)
    since = " since it was resumed" if result["resumed"] else ""
    _note(f"{result['minutes']:.1f} minutes{since}; the model is in {loaded.output_dir}")
    if as_json:
        keys = (
            "metrics",
            "majority",
            "baselines",
            "parameters",
            "trainable_parameters",
            "minutes",
            "seed",
            "epochs",
            "eval_rows",
        )
        _print_json({key: result[key] for key in keys} | {"output_dir": loaded.output_dir})


@app.command(name="cross-validate")
def cross_validate(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for train")] = None,
    protocol: Annotated[
        str, typer.Option(help="leave_one_subject_out, held_out_recordings or random_segments (leaky).")
    ] = "leave_one_subject_out",
    folds: Annotated[int, typer.Option(min=2, help="How many, where it is not by subject.")] = 5,
    permute_labels: Annotated[
        bool, typer.Option("--permute-labels", help="The control: labels dealt anew among the recordings.")
    ] = False,
    as_json: _JSON = False,
):
    """Train a recipe on folds of its data, and score each on what was held out together."""
    from .recipes import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    _quiet()
    from .protocols import cross_validate as run
    from .protocols import protocol_table

    summary = run(loaded, protocol, folds, permute_labels, write=_note)
    _print_table(*protocol_table(loaded, summary))
    if as_json:
        _print_json({key: value for key, value in summary.items() if key != "folds"})


@app.command()
def evaluate(
    model: _MODEL,
    dataset: Annotated[str, typer.Option(help="Hub id, folder or file.")],
    split: Annotated[str, typer.Option(help="Name of the split.")] = "validation",
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    unknown_answers_wrong: Annotated[
        bool, typer.Option("--unknown-answers-wrong", help="Score answers outside the vocabulary as wrong.")
    ] = False,
    rerank: Annotated[
        int | None, typer.Option(min=0, help="Retrieval: candidates ranked by cross-attention (default 32; 0: none).")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Retrieval: also rank all candidates so.")] = False,
    fold_size: Annotated[
        int | None, typer.Option(min=1, help="Retrieval: mean over folds of so many (1000: COCO 1K).")
    ] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Writing: beams of the search (default 1).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many rows.")] = None,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Dialogue: show the model the last question alone.")
    ] = False,
    as_json: _JSON = False,
):
    """Score a model on a split of a dataset."""
    _quiet()
    from .datasets import load_rows, some_of
    from .evaluate import evaluate as run
    from .evaluate import task_of

    loaded, processor = _load(model)
    rows = some_of(load_rows(dataset, split, limit), limit, seed=0)
    options = {"rerank": rerank, "full": full or None, "fold_size": fold_size, "num_beams": num_beams}
    options |= {"history": False} if no_history else {}
    options = {name: value for name, value in options.items() if value is not None}
    metrics = run(loaded, processor, rows, split, batch_size, unknown_answers_wrong, **options)
    table = task_of(loaded, rows.column_names).table("this model", metrics)
    _print_table(f"{Path(model).name} on {Path(dataset).name}, {split}", table)
    if as_json:
        _print_json(metrics)


@app.command()
def predict(
    model: _MODEL,
    image: Annotated[str | None, typer.Option(help="Path or URL of an image.")] = None,
    text: Annotated[str | None, typer.Option(help="The question; of a captioner, the beginning of its text.")] = None,
    audio: Annotated[str | None, typer.Option(help="Path of a sound file.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=FILE", help="Another modality, from a .npy file.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of answers or labels.")] = 5,
    num_beams: Annotated[int, typer.Option(min=1, help="Writing: beams of the search.")] = 1,
    as_json: _JSON = False,
):
    """Answer a question about an image, write about it, or classify what is given; any modality may be left out."""
    if image is None and text is None and audio is None and not inputs:
        raise ValueError("nothing to predict from. Pass --image FILE, --text '...', --audio FILE, or several.")
    _quiet()
    loaded, processor = _load(model)
    if type(loaded).__name__ == "CrossModalForCaptioning":
        if audio or inputs:
            raise ValueError("a model that writes is given --image and --text here; use its `generate` for others.")
        from .chat import written_about

        written = written_about(loaded, processor, image, text, num_beams=num_beams)
        if as_json:
            _print_json({"generated_text": written})
        else:
            print(written)
        return
    from ..processing import pipeline_crossmodal

    pipelines = {"CrossModalForVQA": "VQA", "CrossModalForSequenceClassification": "Classification"}
    if type(loaded).__name__ not in pipelines:
        raise ValueError(
            f"{model!r} holds a {type(loaded).__name__}, which `predict` does not serve. Use `crossmodal search` for retrieval."
        )
    pipe = getattr(pipeline_crossmodal, f"CrossModal{pipelines[type(loaded).__name__]}Pipeline")
    sample = {"image": image, "text": text, "audio": audio}
    sample = {key: value for key, value in sample.items() if value is not None} | _arrays(inputs or ())
    found = pipe(model=loaded.eval(), processor=processor)(sample, top_k=top_k, return_modality_weights=True)
    if as_json:
        _print_json(found)
        return
    number = loaded.config.problem_type == "regression"
    for item in found.get("answers") or found["labels"]:
        score = f"{item['score']:7.3f}" if number else f"{item['score']:7.2%}"
        print(f"{score}  {item.get('answer') or item['label']}")
    print("weights  " + "  ".join(f"{name} {weight:.2f}" for name, weight in found["modality_weights"].items()))


def _arrays(given):
    """{modality: array} of `NAME=FILE.npy`."""
    import numpy as np

    found = {}
    for item in given:
        name, _, path = item.partition("=")
        try:
            found[name] = np.load(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"--input {item}: {error}. Expected NAME=FILE with an array that numpy saved.") from error
    return found


@app.command()
def chat(
    model: _MODEL,
    image: Annotated[list[str] | None, typer.Option(help="Path or URL of an image; may be given again.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Words of an answer at most.")] = None,
):
    """Talk with a model about images. A line is a question; /image FILE shows another image, /new begins anew, /exit ends."""
    _quiet()
    from .chat import Conversation

    loaded, processor = _load(model, "CrossModalForCaptioning")
    talk = Conversation(loaded, processor, image or ())
    options = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    shown = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if shown else "").strip()
        except EOFError:
            break
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        try:
            if command == "/new":
                talk = Conversation(loaded, processor, image or ())
            elif command == "/image":
                talk.show(rest.strip())
            elif line:
                for piece in talk.ask(line, **options):
                    print(piece, end="", flush=True)
                print(flush=True)
        except ValueError as error:
            # What was said so far is worth more than the end of the process.
            print(f"crossmodal: {_one_line(error)}", file=sys.stderr)


@app.command()
def index(
    model: _MODEL,
    dataset: Annotated[str, typer.Option(help="Hub id, folder or file of images with texts.")],
    output: Annotated[str, typer.Option(help="Folder of the index.")],
    split: Annotated[str, typer.Option(help="Name of the split.")] = "train",
    as_json: _JSON = False,
):
    """Index the images and texts of a dataset; a build that was cut off goes on where it was."""
    _quiet()
    from .datasets import load_rows
    from .index import CrossModalIndex, index_rows

    loaded, processor = _load(model, "CrossModalForRetrieval")
    rows = load_rows(dataset, split)
    built = CrossModalIndex(output, loaded, processor, source=model)
    added = index_rows(built, rows)
    for name, size in built.sizes.items():
        _note(f"{name}: {size:,} in the index, {added.get(name, 0):,} of them new.")
    if as_json:
        _print_json({"sizes": built.sizes, "added": added})


@app.command()
def search(
    folder: Annotated[str, typer.Argument(help="Folder of an index.")],
    text: Annotated[str | None, typer.Option(help="Query by text.")] = None,
    image: Annotated[str | None, typer.Option(help="Query by an image file.")] = None,
    model: Annotated[str | None, typer.Option(help="Where its model is; else where it was when it was built.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of hits.")] = 10,
    rerank: Annotated[int, typer.Option(min=0, help="Candidates that cross-attention ranks again.")] = 32,
    output: Annotated[str | None, typer.Option(help="Picture of the hits to write; needs --dataset.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset of the index, for the picture.")] = None,
    split: Annotated[str, typer.Option(help="Its split.")] = "train",
    as_json: _JSON = False,
):
    """Search an index by text or by an image."""
    if (text is None) == (image is None):
        raise ValueError("a query needs --text '...' or --image FILE, one of the two.")
    if output is not None and dataset is None:
        raise ValueError("--output draws the images of the dataset that was indexed. Give it with --dataset.")
    _quiet()
    from .index import CrossModalIndex, source_of

    source = model or source_of(folder)
    if source is None:
        raise ValueError(f"the index {folder!r} does not say where its model is. Give it with --model.")
    loaded, processor = _load(source, "CrossModalForRetrieval")
    found = CrossModalIndex(folder, loaded, processor)
    from ..processing.reading_crossmodal import read_image

    query = {"text": text} if image is None else {"images": read_image(image)}
    hits = found.search(top_k=top_k, rerank=rerank, **query)
    if output is not None:
        from .datasets import RowDataset, load_rows
        from .pictures import search_grid

        samples = RowDataset(load_rows(dataset, split), "retrieval")
        place = {row: n for n, (row, _) in reversed(list(enumerate(samples.places)))}
        images = [samples.input_of(place[hit["row"]], "images") for hit in hits]
        search_grid(text or f"images and texts like {Path(image).name}", hits, images, output)
        _note(f"picture: {output}")
    if as_json:
        _print_json(hits)
        return
    for hit in hits:
        print(
            f"{hit['score']:8.3f}  {hit['similarity']:6.3f}  row {hit['row']}  {hit.get('text') or ' | '.join(hit['texts'])}"
        )


@app.command()
def explain(
    model: _MODEL,
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
    as_json: _JSON = False,
):
    """Draw where an answer came from; or, with --dataset, test whether what was attended to mattered."""
    inputs = {"images": image, "text": text, **_arrays(array)}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if (dataset is None) == (not inputs):
        raise ValueError(
            "nothing to explain, or two things. Pass --image FILE, --text '...', --array NAME=FILE.npy, or else --dataset."
        )
    _quiet()
    loaded, processor = _load(model)
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
        _note(f"{record['answers'][0][0]} ({record['answers'][0][1]:.2f}); weights: {weights}; picture: {output}")
        if as_json:
            _print_json({key: record[key] for key in ("answers", "modality_weights", "gates")})
        return
    from .datasets import load_rows, some_of
    from .evaluate import samples_of, task_of
    from .explain import deletion_test

    rows = some_of(load_rows(dataset, split, limit), limit, seed)
    samples = samples_of(loaded, rows, task_of(loaded, rows.column_names))
    names = loaded.config.modality_names
    tables = {}
    for name in names:
        try:
            tables[name] = deletion_test(loaded, processor, samples, name, seed=seed)
        except ValueError as error:
            # What one modality does not allow, another may.
            _note(f"{name}: {error}")
    if not tables:
        raise ValueError("no modality of this model can be tested by deletion; the lines above say why.")
    rows = {
        f"{name}, {row['fraction']:.0%} removed": {key: row[key] for key in row if key != "fraction"}
        for name, table in tables.items()
        for row in table
    }
    _print_table("Drop of the answer's probability: most attended first, and at random", rows)
    if as_json:
        _print_json(tables)


def _arrays(given):
    """`NAME=FILE.npy` options to {name: array}."""
    import numpy as np

    found = {}
    for item in given or ():
        name, separator, file = item.partition("=")
        if not separator or not Path(file).is_file():
            raise ValueError(f"--array {item}: expected NAME=FILE.npy, with a file that exists.")
        found[name] = np.load(file, allow_pickle=False)
    return found


@app.command()
def ablate(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe or path of a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the recipe")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, from the recipe's seed on.")] = 3,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="One of the variants, or key=value of the config; may be given again. All, if left out."),
    ] = None,
    missing: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Also score with each modality missing in this part of the rows."),
    ] = None,
    as_json: _JSON = False,
):
    """Train a recipe with one part changed at a time, over seeds, and say what each part is worth."""
    from .recipes import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    _quiet()
    from .ablate import ablate as run
    from .ablate import as_markdown
    from .tasks import TASKS

    table = run(loaded, variant, seeds, missing_rate=missing)
    print(as_markdown(table, TASKS[loaded.task].main_metric, missing, TASKS[loaded.task].percent))
    _note(f"table, runs and plot: {loaded.output_dir}/ablation.md, .csv, .png")
    if as_json:
        _print_json(table)


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
    as_json: _JSON = False,
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

    _quiet()
    if train:
        table = bench.equal_training_time(Recipe.load(train, overrides or []), write=_note)
        _print_table(f"{train}: trained as long as each other", {row.pop("model"): row for row in map(dict, table)})
        if as_json:
            _print_json(table)
        return
    if cached:
        found = bench.cached_training(Recipe.load(cached, overrides or []), rounds=rounds)
        _note(
            f"training, samples per second: {found['raw']:.1f} from raw inputs, {found['cached']:.1f} from cached tokens, "
            f"{found['ratio']:.1f} times as many; logits differ by {found['logits_difference']:.1e}; computed once in "
            f"{found['fill_seconds']:.0f} s."
        )
        if as_json:
            _print_json(found)
        return
    if generation:
        _benchmark_generation(size, rounds, compiled, as_json)
        return
    if retrieval:
        _benchmark_retrieval(model, dataset, split, size, rounds, as_json)
        return
    if kernels:
        table, errors = bench.kernels(write=_note), bench.feature_errors()
        found = bench.growth_and_crossover(table)
        rows = {}
        for row in table:
            cells = rows.setdefault(f"{row['tokens']:,} tokens", {})
            cells[f"{row['kernel']} s"] = row["seconds"]
            cells[f"{row['kernel']} MiB"] = "" if row["mib"] is None else f"{row['mib']:.0f}"
        _print_table("One forward, one head of width 64", rows)
        for name, values in found.items():
            crossover = values["crossover"]
            where = (
                ""
                if name == "exact"
                else f"; faster than exact from {crossover:,} tokens"
                if crossover
                else "; never faster"
            )
            _note(f"{name}: time grows with the power {values['exponent']:.2f} of the length{where}")
        whole = errors.pop("exact output")
        parts = ", ".join(f"{error:.4f} with {count}" for count, error in errors.items())
        _note(f"linear, error against the softmax it approximates (of size {whole:.3f}), by random features: {parts}")
        if as_json:
            _print_json({"kernels": table, "growth": found, "errors": errors})
        return
    table = bench.compare(size, rounds, write=_note)
    for mode, scenario in dict.fromkeys((row["mode"], row["scenario"]) for row in table):
        chosen = [row for row in table if (row["mode"], row["scenario"]) == (mode, scenario)]
        columns = ("samples_per_second", "ours_over_this", "gflop_per_sample", "part_of_peak", "parameters")
        _print_table(f"{mode}, {scenario}", {row["model"]: {key: row[key] for key in columns} for row in chosen})
    logits, gradients = bench.grouping_is_exact(size)
    _note(
        f"32 questions that share 8 images, against an image each: logits differ by {logits:.1e}, gradients by {gradients:.1e}"
    )
    shares = {}
    for title, images, words in (("batch 32", 32, 32), ("32 questions, 8 images", 8, 12)):
        shares[title] = bench.where_time_goes(size, images=images, words=words)
        _note(f"{title}: " + ", ".join(f"{name} {part:.0%}" for name, part in shares[title].items()))
    if as_json:
        _print_json({"models": table, "grouping": [logits, gradients], "time": shares})


def _benchmark_generation(size, rounds, compiled, as_json):
    from . import benchmark_generation as bench

    table = bench.compare(size, rounds, compiled=compiled, write=_note)
    for mode, search, batch in dict.fromkeys((row["mode"], row["search"], row["batch"]) for row in table):
        chosen = [row for row in table if (row["mode"], row["search"], row["batch"]) == (mode, search, batch)]
        columns = ("words_per_second", "ours_over_this", "parameters")
        _print_table(
            f"{mode}, {search}, batch {batch}", {row["model"]: {key: row[key] for key in columns} for row in chosen}
        )
    for row in table:
        if row["why"] and row["batch"] == 1:
            _note(f"{row['model']} does not take a {row['mode']}: {row['why']}")
    shares = bench.where_time_goes(size, rounds=rounds)
    _note("greedy, batch 1: " + ", ".join(f"{name} {part:.0%}" for name, part in shares.items()) + " of the time")
    if as_json:
        _print_json({"models": table, "time": shares})


def _benchmark_retrieval(model, dataset, split, size, rounds, as_json):
    from . import benchmark_retrieval as bench
    from .benchmark import SIZES

    loaded, scores = None, {}
    if model:
        loaded, processor = _load(model, "CrossModalForRetrieval")
        if dataset:
            from .evaluate import evaluate as score

            metrics = score(loaded, processor, dataset, split)
            scores = {key: metrics[key] for key in metrics if key.endswith("_r1")}
    shape = bench.shape_of(loaded) if loaded else SIZES[size]
    costs = bench.ranking_cost(loaded or bench.model_of(shape), shape, rounds)
    if scores:
        costs[0] |= {key: value for key, value in scores.items() if key.count("_") == 1 or "contrastive_mean" in key}
    title = f"Ranking a pair at width {shape.width}, encoders of depth {shape.depth}, {shape.fusion} fusion layers"
    _print_table(title, {row["model"]: {key: row[key] for key in row if key != "model"} for row in costs})
    nearest = bench.nearest_cost(rounds=rounds)
    _print_table("Exact top 10 of 100,000 vectors of width 256", {f"{row['queries']} queries": row for row in nearest})
    memory = bench.contrast_memory()
    _print_table(
        "Contrast of a batch with itself, forward and backward, whole and in tiles of 1,024",
        {f"{row['rows']:,} rows": row for row in memory},
    )
    if as_json:
        _print_json({"ranking": costs, "nearest": nearest, "contrast": memory})


@app.command()
def robustness(
    model: _MODEL,
    dataset: Annotated[str, typer.Option(help="Hub id, folder or file.")],
    split: Annotated[str, typer.Option(help="Name of the split.")] = "validation",
    seed: Annotated[int, typer.Option(min=0, help="Of what is taken away or made noisy.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    output: Annotated[
        str | None, typer.Option(help="Folder for table, plot and card; the model's, if it is one.")
    ] = None,
    as_json: _JSON = False,
):
    """Score a model with each modality missing or noisy, and write it into its card."""
    _quiet()
    from .datasets import load_rows
    from .evaluate import task_of
    from .robustness import add_to_folder
    from .robustness import robustness as run

    folder = Path(output or model)
    if not output and not folder.is_dir():
        raise ValueError(f"{model!r} is no folder here. Pass --output FOLDER for the table, the plot and the card.")
    loaded, processor = _load(model)
    data = load_rows(dataset, split)
    task = task_of(loaded, data.column_names)
    table = run(loaded, processor, data, split, seed, batch_size, limit, write=_note)
    rows = {}
    for row in table:
        name = "clean" if row["modality"] is None else f"{row['modality']}, {row['kind']} {row['level']:g}"
        rows[name] = {key: value for key, value in row.items() if key in task.metrics}
    _print_table(f"{Path(model).name} on {Path(dataset).name}, {split}", rows)
    folder.mkdir(parents=True, exist_ok=True)
    count = f"the first {limit:,} shuffled rows" if limit else "all rows"
    add_to_folder(folder, table, task.main_metric, f"`{Path(dataset).name}`, {split}, {count}")
    _note(f"table, plot and card: {folder}")
    if as_json:
        _print_json(table)


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder to write.")] = "outputs/demo",
    images: Annotated[int, typer.Option(min=16, help="Images of the training world.")] = 3600,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: _JSON = False,
):
    """Train the tiny preset on a drawn world beside its baselines, and show what it learnt."""
    _quiet()
    from .demo import demo as run

    started = time.time()
    table = run(output, images, epochs, seed, write=_note)
    _print_table("Test accuracy by kind of question", table)
    _note(f"{(time.time() - started) / 60:.1f} minutes in all. Folder: {output}   picture: {output}/answers.png")
    if as_json:
        _print_json(table)


def _load(source, wanted=None):
    """A head of the family (`wanted`, or any) and its processor, from a folder or the Hub."""
    from transformers import AutoConfig

    import crossmodal

    from ..processing.processing_crossmodal import CrossModalProcessor

    path = Path(source)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{source!r} is no model: it has no config.json. Give the folder of a finished model.")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"the model {source!r} is neither a folder here nor a repo that the Hub hands out. Correct the name."
        ) from error
    head = (getattr(config, "architectures", None) or ["?"])[0]
    if config.model_type != "crossmodal" or head not in crossmodal.HEADS:
        raise ValueError(
            f"{source!r} holds a {head} of type {config.model_type!r}. Expected a head of the CrossModal family."
        )
    if wanted is not None and head != wanted:
        raise ValueError(f"{source!r} holds a {head}. Expected a {wanted}.")
    model = getattr(crossmodal, head).from_pretrained(source)
    return model, CrossModalProcessor.from_pretrained(source)


def _print_table(title, rows):
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        # Spaces, where a long name may break.
        table.add_column(name.replace("_", " "), justify="right")
    for label, row in rows.items():
        table.add_row(label, *(_cell(row.get(name, "")) for name in names))
    # Where nobody says how wide it is (a file, a pipe), names are worth more than a short line.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _cell(value):
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str("" if value is None else value)


def _print_json(value):
    print(json.dumps(value), flush=True)


def _note(line):
    # Beside a progress bar, a plain print would tear it.
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def _quiet():
    """Silences what libraries say of themselves; errors still come through."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def _one_line(error):
    """The message of an error in one line, also when it comes out of a worker process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Original Traceback") for line in lines):
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    return " ".join(lines) or type(error).__name__


def main():
    """Entry point of `crossmodal`."""
    try:
        app()
    except KeyboardInterrupt:
        print("crossmodal: interrupted.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        _fail(error)
    except Exception as error:
        # The writer of weights has an error class of its own for a full disk.
        if "No space left on device" not in str(error):
            raise
        _fail(error)


def _fail(error):
    print(f"crossmodal: {_one_line(error)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
