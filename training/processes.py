"""Several processes that train together (torchrun, accelerate launch): who writes, and whether all were started alike."""

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path


try:
    import fcntl
except ImportError:
    # Windows: nothing keeps runs apart there.
    fcntl = None


class FailedElsewhere(ValueError):
    """What stops this process was said by the main one."""


class FolderTaken(ValueError):
    """A folder that another run is at work in."""


def is_main():
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def _several():
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def begin(cpu=False, **said):
    """Joins the processes that were started together, and stops all of them where they were given other things to do.

    cpu: use no accelerator. said: name to what every process must have been given alike, plain values or dicts of them.

    Raises:
        ValueError: naming what differs. In processes but the main one `FailedElsewhere`.
    """
    if not _several():
        return
    # Imported where it is used: the command line asks who prints before it has loaded anything.
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=cpu)
    every = gather_object([json.dumps(_flat(said), sort_keys=True, default=str)])
    own, first = json.loads(every[0]), every[0]
    for rank, other in enumerate(every):
        if other != first:
            other = json.loads(other)
            key = next(key for key in sorted(own.keys() | other.keys()) if own.get(key) != other.get(key))
            raise (ValueError if is_main() else FailedElsewhere)(
                f"process {rank} was started with {key} = {other.get(key)!r}, and process 0 with {own.get(key)!r}. Start all processes "
                "with the same command, recipe and code."
            )


def _flat(values, prefix=""):
    """{"a.b": value} of nested dicts."""
    found = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def on_main(function):
    """What a function returns in the main process, in all of them, which wait for it.

    Raises:
        ValueError, OSError: as the function does. In processes but the main one `FailedElsewhere`.
    """
    if not _several():
        return function()
    from accelerate.utils import broadcast_object_list

    found, error = [None, False], None
    if is_main():
        try:
            found = [function(), False]
        except (ValueError, OSError) as raised:
            found, error = [None, True], raised
    found, failed = broadcast_object_list(found)
    if failed:
        raise error or FailedElsewhere("process 0 could not go on, and has said why.")
    return found


def main_first():
    """A context that the main process leaves before others enter it: for what it computes, and they then find."""
    from accelerate import PartialState

    return PartialState().main_process_first() if _several() else nullcontext()


# Folders that this process holds. A second handle of a record lock, once closed, would give the first away.
_HELD = set()


@contextmanager
def alone_in(folder):
    """Keeps other runs of this machine out of a folder until the context ends, or the process, however it does.

    The processes of one run may all be in it. So may a context within a context.

    Raises:
        FolderTaken: in every process of the run, where another run is in it.
    """
    folder, file, path = Path(folder).resolve(), None, None

    def take():
        nonlocal file, path
        path, file = _lock_file(folder)
        try:
            # A record lock: workers that outlive a killed run do not have it, as they would have one of `flock`.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return False
        except OSError:
            # A file system without locks.
            return True
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            # The run before has removed it in between.
            file.close()
            return take()
        return True

    if fcntl is None or folder in _HELD:
        yield
        return
    if not on_main(take):
        raise FolderTaken(
            f"another run is at work in {str(folder)!r}. Wait until it has ended, stop it, or choose another folder."
        )
    _HELD.add(folder)
    try:
        yield
    finally:
        _HELD.discard(folder)
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


def _lock_file(folder):
    """Path and open file of what says that a folder is taken: beside it, or, where nothing may be written there, among temporary files."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.with_name(f".{folder.name}.lock")
        return path, open(path, "a")
    except OSError:
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:24]
        path = Path(tempfile.gettempdir()) / f"crossmodal-{os.getuid()}-{name}.lock"
        return path, open(path, "a")
