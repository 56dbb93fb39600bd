"""Checkpoints that are whole: what Trainer wrote is listed in what it writes last, and a kill or a full disk leaves none that is taken
for one."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint


_STATE = "trainer_state.json"
# What a run goes on from, in checkpoints that list nothing: of releases before this list, or of another Trainer.
_NEEDED = ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")


class CheckpointContents(TrainerCallback, ExportableState):
    """Lists the files of a checkpoint, with their sizes in bytes, in its `trainer_state.json`.

    `Trainer._save_checkpoint` asks callbacks for their state when everything else is written, writes that file, and removes older
    checkpoints after it.
    """

    folder = step = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.folder, self.trainer_state = Path(args.output_dir), state
        # The state of a checkpoint that listed nothing has no room for it.
        state.stateful_callbacks.setdefault(type(self).__name__, {})

    def state(self):
        files = {}
        if self.folder is not None:
            place = self.folder / f"checkpoint-{self.trainer_state.global_step}"
            found = (path for path in sorted(place.rglob("*")) if path.is_file() and path.name != _STATE)
            files = {path.relative_to(place).as_posix(): path.stat().st_size for path in found}
        return {"args": {}, "attributes": {"files": files}}


def is_whole(checkpoint):
    """Whether a checkpoint has all that was written into it, as it was written."""
    path = Path(checkpoint)
    try:
        callbacks = json.loads((path / _STATE).read_text()).get("stateful_callbacks") or {}
        files = callbacks.get(CheckpointContents.__name__, {}).get("attributes", {}).get("files")
        if files:
            return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False
    return all(any(path.glob(pattern)) for pattern in _NEEDED)


def last_whole_checkpoint(folder):
    """(path of the last whole checkpoint or None, names of later ones that are not, which are removed)."""
    folder, broken = Path(folder), []
    while folder.is_dir() and (name := get_last_checkpoint(str(folder))) is not None:
        path = Path(name)
        if is_whole(path):
            return path, broken
        shutil.rmtree(path)
        broken.append(path.name)
    return None, broken


def write_whole(path, text):
    """Writes a file aside and renames it: under its name it is never half-written, also where several processes write it."""
    aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.writing")
    aside.write_text(text)
    os.replace(aside, path)


def is_full(error):
    """Whether an error says that there was no room left on a disk. torch's writer of archives says only that it could not write."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return re.search(r"No space left|quota exceeded|inline_container|PytorchStreamWriter", str(error)) is not None


def full_disk(folder, name, error):
    """Removes the half of a checkpoint that found no room. Returns the OSError to raise, which says what is left."""
    shutil.rmtree(Path(folder) / name, ignore_errors=True)
    kept = get_last_checkpoint(str(folder))
    left = f"{Path(kept).name} is kept: make room and give the same command again" if kept else "none was saved before"
    return OSError(f"no room on the disk for {name} in {str(folder)!r}, whose half is removed; {left}. ({error})")
