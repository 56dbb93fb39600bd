"""Commands that send a model somewhere: `crossmodal publish`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import JSON, load_model, note, print_json, quiet


app = typer.Typer()


@app.command()
def publish(
    model: Annotated[str, typer.Argument(help="Folder of a model.")],
    repo_id: Annotated[str, typer.Argument(help="Repo on the Hub: name, or owner/name; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repo private, if it is made.")] = False,
    as_json: JSON = False,
):
    """Upload a model's folder to the Hub, with code, processor and card; one that was cut off goes on where it was."""
    if not Path(model).is_dir():
        raise ValueError(f"{model!r} is no folder here. Give the folder of a finished model.")
    quiet()
    from .hub import publish as run
    from .publish import complete_folder

    if (Path(model) / "config.json").is_file():
        complete_folder(*load_model(model), model, write=note)
    found = run(model, repo_id, private=private or None)
    note(f"published: {found['url']}")
    if as_json:
        print_json(found)
