"""What no published file may say: tokens, paths and the user of the machine that the model was trained on."""

import getpass
import json
import os
import re
import tempfile
from pathlib import Path

from huggingface_hub import get_token


_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY")
_PATH = re.compile(r"(?<![\w:/.~<-])/[\w.+-]+(?:/[\w.+-]+)+")
# Where every machine has the same.
_SYSTEM = ("bin", "dev", "etc", "lib", "proc", "sys", "usr")
# Accounts whose name says nothing about anyone.
_NOBODY = ("admin", "app", "docker", "jovyan", "nobody", "root", "runner", "ubuntu", "user")
# Files whose words are those of a language: a user may be called like one of them. Code is that of the package.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")


def find_leaks(folder, files, repo_id=""):
    """What must not be published.

    Args:
        folder: of a model. files: names in it. repo_id: where they go; its owner is no secret.

    Returns:
        list of (file, number of the line, what it is in words: a token is never repeated).
    """
    folder = Path(folder)
    secrets, paths, user = _secrets(), _paths_of(folder), _user(repo_id)
    found = []
    for name in files:
        labels = _labels(folder / name)
        for number, line in enumerate(_text(folder / name).split("\n"), 1):
            if _TOKEN.search(line) or any(secret in line for secret in secrets):
                found.append((name, number, "a token"))
            if path := next((path for path in paths if _says(path, line)), None) or _path_here(line):
                found.append((name, number, f"the path {path}"))
            says_words = Path(name).name not in _VOCABULARIES and Path(name).suffix not in (".py", ".png")
            if user and says_words and user not in labels and re.search(rf"\b{re.escape(user)}\b", line):
                found.append((name, number, f"the user name {user}"))
    return found


def _says(path, line):
    # Cheap first: most lines say nothing of the kind.
    return path in line and re.search(rf"(?<![\w.-]){re.escape(path)}(?![\w-])", line) is not None


def _text(path):
    """What a file says: of weights their header, of pictures every byte."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            return file.read(int.from_bytes(file.read(8), "little")).decode("utf-8", "replace")
        return file.read().decode("latin-1" if path.suffix == ".png" else "utf-8", "replace")


def _secrets():
    """Values of the environment that are secret by their name, and the token of `hf auth login`."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    return {value for value in {*values, get_token()} if value and len(value) >= 8}


def _paths_of(folder):
    """Folders of this machine that a file might name, and every absolute path in the recipe that was run, longest first."""
    places = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), folder.resolve(), Path(__file__).parents[1]}
    stamp = folder / "checkpoints" / "recipe.json"
    stated = _PATH.findall(stamp.read_text()) if stamp.is_file() else []
    return sorted({*(str(place) for place in places if len(place.parts) > 1), *stated}, key=len, reverse=True)


def _path_here(line):
    """The first path in a line that this machine has, or has the folder of."""
    for text in _PATH.findall(line):
        path = Path(text)
        if path.parts[1] not in _SYSTEM and (path.exists() or (len(path.parts) > 2 and path.parent.exists())):
            return text
    return None


def _user(repo_id):
    """Name of the user of this machine, where it says who that is and is not the name the repo is published under."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        return None
    return None if len(name) < 3 or name in _NOBODY or name == repo_id.split("/")[0] else name


def _labels(path):
    """Labels of a config: words of the data."""
    if path.name != "config.json":
        return ()
    return {str(label) for label in (json.loads(path.read_text()).get("id2label") or {}).values()}
