"""A model's folder to the Hub: everything that it needs to run and nothing else, by uploads that go on where they were cut off."""

from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from .card import addressed, pinned_revision
from .leaks import find_leaks


_SUFFIXES = (".safetensors", ".json", ".py", ".md", ".yaml", ".txt", ".jinja", ".model", ".png")
# Written while a run goes on, for this machine: they hold its paths.
_LEFT_OUT = ("trainer_state.json", "recipe.json")
_CARD = "README.md"
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.bin"]


def repo_files(folder):
    """Names of the files in a model's folder that make its repo: no pickle, no checkpoint, no log. Of folders in it, those of a tokenizer."""
    folder = Path(folder)
    inside = [path.parent for path in folder.glob("*/tokenizer_config.json")]
    places = [folder, *(path for path in inside if not (path / "config.json").exists())]
    files = [path for place in places for path in place.iterdir() if path.is_file()]
    files = [path for path in files if path.name == "LICENSE" or path.suffix in _SUFFIXES]
    return sorted(path.relative_to(folder).as_posix() for path in files if path.name not in _LEFT_OUT)


def publish(folder, repo_id, private=None, token=None, revision=None, message="Weights, code and processor"):
    """Uploads a model's folder, as `export_folder` writes it, so that `pipeline(model=repo_id, trust_remote_code=True)` runs from it.

    Files that are there already are not sent again, also those that an upload sent before it was cut off. The card comes last, in a
    commit of its own that pins the one before: no commit can hold its own hash. Where nothing has changed, nothing is committed.

    Args:
        folder: of the model. repo_id: `name` or `owner/name`, made if there is none. private: of a repo that is made.
        token: of the Hub; None takes HF_TOKEN or that of `hf auth login`. revision: branch, made if there is none.
        message: of the commit of weights and code.

    Returns:
        dict with `repo_id`, `revision` (hash that the card pins) and `url` of it.

    Raises:
        ValueError: before anything is sent, for a folder that is not whole or says what must not be published; and for what the Hub
            refuses, or a connection that broke.
    """
    folder = Path(folder)
    files = repo_files(folder)
    _check_whole(folder, files)
    leaks = find_leaks(folder, files, repo_id)
    if leaks:
        more = f", and {len(leaks) - 1} more" if len(leaks) > 1 else ""
        name, line, what = leaks[0]
        raise ValueError(
            f"{folder / name}, line {line}, holds {what}{more}. Nothing was published: take it out, or say it in other words."
        )
    api = HfApi(token=token)
    with hub_errors(repo_id):
        api.whoami()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.repo_info(repo_id, revision=revision).sha
        names = [name for name in files if name != _CARD]
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=names,
            # Weights of before, in other shards, would be loaded all the same.
            delete_patterns=_WEIGHTS,
            revision=revision,
            commit_message=message,
        )
        pinned = commit.oid
        if pinned == before:
            # Only the card has moved on since the commit that it pins.
            pinned = _pinned_there(api, repo_id, before) or pinned
        card = addressed((folder / _CARD).read_text(encoding="utf-8"), repo_id, pinned)
        api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=card.encode(),
            path_in_repo=_CARD,
            revision=revision,
            commit_message=f"Card, for {pinned[:7]}",
        )
    return {"repo_id": repo_id, "revision": pinned, "url": f"{api.endpoint}/{repo_id}/tree/{pinned}"}


def _check_whole(folder, files):
    adapter = "adapter_config.json" in files
    needed = ["adapter_config.json" if adapter else "config.json", _CARD]
    needed += [] if adapter else ["processor_config.json", "modeling_crossmodal.py", "processing_crossmodal.py"]
    missing = [name for name in needed if name not in files]
    missing += [] if any(name.endswith(".safetensors") for name in files) else ["*.safetensors"]
    if missing:
        seeds = sorted(path.parent.name for path in folder.glob("seed-*/config.json"))
        raise ValueError(
            f"the folder {str(folder)!r} lacks {', '.join(missing)}. "
            + (
                f"It holds a model of every seed: publish one of them, for example {str(folder / seeds[0])!r}."
                if seeds
                else "Give the folder of a finished run, or write one with `export_folder(model, processor, folder)` of "
                "crossmodal.training.publish."
            )
        )


def _pinned_there(api, repo_id, revision):
    """The revision that the card in a repo pins, or None."""
    if not api.file_exists(repo_id, _CARD, revision=revision):
        return None
    return pinned_revision(Path(api.hf_hub_download(repo_id, _CARD, revision=revision)).read_text(encoding="utf-8"))


@contextmanager
def hub_errors(repo_id):
    """What goes wrong between here and the Hub, as a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        if (said := _in_words(error, repo_id)) is None:
            raise
        raise ValueError(said) from error
    except (HTTPError, RuntimeError) as error:
        cause = error.__cause__ or error
        said = _in_words(cause, repo_id) or (
            f"the connection to the Hub broke ({type(cause).__name__}: {cause}). The same command goes on where it was: what has "
            f"arrived in {repo_id!r} is not sent again."
        )
        raise ValueError(said) from error


def _in_words(error, repo_id):
    """One line about what the Hub refused, looked for in an error and what it came from; None if it is no such thing."""
    while error is not None and not isinstance(error, HfHubHTTPError | LocalTokenNotFoundError | OfflineModeIsEnabled):
        error = error.__cause__ or error.__context__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and this needs the Hub. Unset it."
    if isinstance(error, LocalTokenNotFoundError):
        return "the Hub wants a token, and there is none. Log in with `hf auth login`, or set HF_TOKEN."
    if error is None:
        return None
    status, message = error.response.status_code, error.response.headers.get("X-Error-Message") or error.server_message
    if status == 401 and "Invalid credentials" in (message or str(error)):
        return "the Hub does not take this token: it is wrong or no longer valid. Correct HF_TOKEN, or log in with `hf auth login`."
    if status == 403:
        return (
            f"the token may not write to {repo_id!r} ({message}). Use one with the role `write`, of someone who may."
        )
    if status in (401, 404):
        return (
            f"{repo_id!r} is no repo that the Hub hands out: there is none of that name, or it is private. Correct the name, or log "
            "in with `hf auth login`."
        )
    return f"the Hub refused {repo_id!r} with status {status}: {message or error}"
