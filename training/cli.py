"""The command line: `crossmodal train | evaluate | predict | index | search | chat` here, others in `cli_*.py`.

Bad input ends with one line on standard error and exit code 2; a fault of ours with its traceback and exit code 1.
"""

import os
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from . import cli_export, cli_hub, cli_scale, cli_study
from .allocator import keep_freed_memory
from .console import JSON, MODEL, arrays, load_model, note, one_line, print_json, print_table, quiet
from .processes import FailedElsewhere, is_main


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, evaluate and use CrossModal models.",
)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (e.g. vqa_easy) or path of a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. dataset=data/easy_vqa seed=1")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard an earlier run in output_dir.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Train with so many seeds, each into its own folder.")] = 1,
    as_json: JSON = False,
):
    """Train a recipe into a whole Hub folder; a run that was cut off goes on where it was. With --seeds, mean and deviation."""
    from .recipes import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    quiet()
    from .train import train as run

    if seeds > 1:
        from .seeds import seeds_table, train_seeds

        found = train_seeds(loaded, seeds, fresh=fresh, write=note)
        print_table(f"{loaded.name}: {loaded.eval_split}, {found['eval_rows']:,} rows", seeds_table(loaded, found))
        note(f"the models are in {loaded.output_dir}/seed-*")
        if as_json:
            print_json(
                {key: value for key, value in found.items() if key != "runs"} | {"output_dir": loaded.output_dir}
            )
        return
    result = run(loaded, fresh=fresh, write=note)
    from .tasks import TASKS

    task = TASKS[loaded.task]
    table = task.table_beside(task.table("this model", result["metrics"]), result)
    print_table(f"{loaded.name}: {loaded.eval_split}, {result['eval_rows']:,} rows", table)
    since = " since it was resumed" if result["resumed"] else ""
    note(f"{result['minutes']:.1f} minutes{since}; the model is in {loaded.output_dir}")
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
            "broken_samples",
        )
        print_json({key: result[key] for key in keys} | {"output_dir": loaded.output_dir})


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
    as_json: JSON = False,
):
    """Train a recipe on folds of its data, and score each on what was held out together."""
    from .recipes import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    quiet()
    from .protocols import cross_validate as run
    from .protocols import protocol_table

    summary = run(loaded, protocol, folds, permute_labels, write=note)
    print_table(*protocol_table(loaded, summary))
    if as_json:
        print_json({key: value for key, value in summary.items() if key != "folds"})


@app.command()
def evaluate(
    model: MODEL,
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
    by_image: Annotated[
        bool,
        typer.Option("--by-image", help="Retrieval: a caption is right for its own image alone (COCO, Flickr30K)."),
    ] = False,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Writing: beams of the search (default: what the model was saved with).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many rows.")] = None,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Dialogue: show the model the last question alone.")
    ] = False,
    as_json: JSON = False,
):
    """Score a model on a split of a dataset."""
    quiet()
    from .evaluate import evaluate as run
    from .evaluate import task_of
    from .loading import load_rows, some_of

    loaded, processor = load_model(model)
    rows = some_of(load_rows(dataset, split, limit), limit, seed=0)
    options = {
        "rerank": rerank,
        "full": full or None,
        "fold_size": fold_size,
        "by_image": by_image or None,
        "num_beams": num_beams,
    }
    options |= {"history": False} if no_history else {}
    options = {name: value for name, value in options.items() if value is not None}
    metrics = run(loaded, processor, rows, split, batch_size, unknown_answers_wrong, **options)
    table = task_of(loaded, rows.column_names).table("this model", metrics)
    print_table(f"{Path(model).name} on {Path(dataset).name}, {split}", table)
    if as_json:
        print_json(metrics)


@app.command()
def predict(
    model: MODEL,
    image: Annotated[str | None, typer.Option(help="Path or URL of an image.")] = None,
    text: Annotated[str | None, typer.Option(help="The question; of a captioner, the beginning of its text.")] = None,
    audio: Annotated[str | None, typer.Option(help="Path of a sound file.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=FILE", help="Another modality, from a .npy file.")
    ] = None,
    points: Annotated[str | None, typer.Option(help="Path of a .ply, .npz or .npy file of points to label.")] = None,
    output: Annotated[str | None, typer.Option(help="Points: coloured .ply file to write.")] = None,
    picture: Annotated[str | None, typer.Option(help="Points: picture from above to draw.")] = None,
    up: Annotated[str, typer.Option(help="Points: axis that points up in the picture, such as z or -y.")] = "z",
    top_k: Annotated[int, typer.Option(min=1, help="Number of answers or labels.")] = 5,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Writing: beams of the search (default: what the model was saved with).")
    ] = None,
    as_json: JSON = False,
):
    """Answer a question about an image, write about it, classify what is given, or label points; any modality may be left out."""
    if image is None and text is None and audio is None and points is None and not inputs:
        raise ValueError(
            "nothing to predict from. Pass --image FILE, --text '...', --audio FILE, --points FILE, or several."
        )
    quiet()
    loaded, processor = load_model(model)
    if type(loaded).__name__ == "CrossModalForPointSegmentation":
        from .labelling import label_points

        label_points(loaded, processor, points, image, output, picture, up, as_json)
        return
    if type(loaded).__name__ == "CrossModalForCaptioning":
        if audio or inputs:
            raise ValueError("a model that writes is given --image and --text here; use its `generate` for others.")
        from .chat import written_about

        options = {} if num_beams is None else {"num_beams": num_beams}
        written = written_about(loaded, processor, image, text, **options)
        if as_json:
            print_json({"generated_text": written})
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
    sample = {key: value for key, value in sample.items() if value is not None} | arrays(inputs, "--input")
    found = pipe(model=loaded.eval(), processor=processor)(sample, top_k=top_k, return_modality_weights=True)
    if as_json:
        print_json(found)
        return
    number = loaded.config.problem_type == "regression"
    for item in found.get("answers") or found["labels"]:
        score = f"{item['score']:7.3f}" if number else f"{item['score']:7.2%}"
        print(f"{score}  {item.get('answer') or item['label']}")
    print("weights  " + "  ".join(f"{name} {weight:.2f}" for name, weight in found["modality_weights"].items()))


@app.command()
def chat(
    model: MODEL,
    image: Annotated[list[str] | None, typer.Option(help="Path or URL of an image; may be given again.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Words of an answer at most.")] = None,
):
    """Talk with a model about images. A line is a question; /image FILE shows another image, /new begins anew, /exit ends."""
    quiet()
    from .chat import Conversation

    loaded, processor = load_model(model, "CrossModalForCaptioning")
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
            print(f"crossmodal: {one_line(error)}", file=sys.stderr)


@app.command()
def index(
    model: MODEL,
    dataset: Annotated[str, typer.Option(help="Hub id, folder or file of images with texts.")],
    output: Annotated[str, typer.Option(help="Folder of the index.")],
    split: Annotated[str, typer.Option(help="Name of the split.")] = "train",
    as_json: JSON = False,
):
    """Index the images and texts of a dataset; a build that was cut off goes on where it was."""
    quiet()
    from .index import CrossModalIndex, index_rows
    from .loading import load_rows

    loaded, processor = load_model(model, "CrossModalForRetrieval")
    rows = load_rows(dataset, split)
    built = CrossModalIndex(output, loaded, processor, source=model, dataset=dataset, split=split)
    added = index_rows(built, rows)
    for name, size in built.sizes.items():
        note(f"{name}: {size:,} in the index, {added.get(name, 0):,} of them new.")
    if as_json:
        print_json({"sizes": built.sizes, "added": added})


@app.command()
def search(
    folder: Annotated[str, typer.Argument(help="Folder of an index.")],
    text: Annotated[str | None, typer.Option(help="Query by text.")] = None,
    image: Annotated[str | None, typer.Option(help="Query by an image file.")] = None,
    audio: Annotated[str | None, typer.Option(help="Query by a sound file.")] = None,
    video: Annotated[str | None, typer.Option(help="Query by a video file.")] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=FILE", help="Query by another modality, from a .npy file."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where its model is; else where it was when it was built.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of hits.")] = 10,
    rerank: Annotated[int, typer.Option(min=0, help="Candidates that cross-attention ranks again.")] = 32,
    output: Annotated[str | None, typer.Option(help="Picture of the hits to write.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="The dataset of the index, for the picture; else what it was built of.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Its split; else that, or train.")] = None,
    as_json: JSON = False,
):
    """Search an index by an input of one modality."""
    query = {"text": text, "images": image, "audio": audio, "videos": video}
    query = {key: value for key, value in query.items() if value is not None}
    if len(query) + len(inputs or ()) != 1:
        raise ValueError(
            "a query is one of --text '...', --image FILE, --audio FILE, --video FILE and --input NAME=FILE. Give exactly one."
        )
    quiet()
    from .index import CrossModalIndex, listing_of

    dataset = dataset or listing_of(folder).get("dataset")
    if output is not None and dataset is None:
        raise ValueError("--output draws the images of the dataset that was indexed. Give it with --dataset.")
    found = CrossModalIndex.load(folder, model)
    hits = found.search(top_k=top_k, rerank=rerank, **query, **arrays(inputs, "--input"))
    if output is not None:
        from .datasets import RowDataset
        from .loading import load_rows
        from .pictures import search_grid

        samples = RowDataset(load_rows(dataset, split or found.split or "train"), "retrieval")
        place = {row: n for n, (row, _) in reversed(list(enumerate(samples.places)))}
        if not all(hit.get("row") in place for hit in hits):
            raise ValueError(
                f"hits are of rows that {dataset!r} does not have. Give the dataset of the index with --dataset and --split."
            )
        images = [samples.picture_of(place[hit["row"]]) for hit in hits]
        search_grid(text or f"what fits {Path((inputs or list(query.values()))[0]).name}", hits, images, output)
        note(f"picture: {output}")
    if as_json:
        print_json(hits)
        return
    for hit in hits:
        kept = {key: value for key, value in hit.items() if key not in ("score", "similarity", "row", "texts", "text")}
        said = hit.get("text") or " | ".join(hit.get("texts") or map(str, kept.values()))
        row = f"row {hit['row']}  " if "row" in hit else ""
        print(f"{hit['score']:8.3f}  {hit['similarity']:6.3f}  {row}{said}".rstrip())


app.add_typer(cli_hub.app)
app.add_typer(cli_export.app)
app.add_typer(cli_study.app)
app.add_typer(cli_scale.app)


def main():
    """Entry point of `crossmodal`."""
    keep_freed_memory()
    try:
        with nullcontext() if is_main() else _silence():
            app()
    except KeyboardInterrupt:
        print("crossmodal: interrupted.", file=sys.stderr)
        sys.exit(130)
    except FailedElsewhere:
        # Launchers end all processes as soon as one ends: the main one is to have said why by then.
        time.sleep(3)
        sys.exit(2)
    except (ValueError, OSError) as error:
        _fail(error)
    except Exception as error:
        # The writer of weights has an error class of its own for a full disk.
        if "No space left on device" not in str(error):
            raise
        _fail(error)


@contextmanager
def _silence():
    """Of several processes only the main one prints; errors of others come through."""
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def _fail(error):
    where = "" if is_main() else f" (process {os.environ['RANK']})"
    print(f"crossmodal{where}: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
