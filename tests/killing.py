"""Other runs: one that is at work in a folder, and `crossmodal train` killed at random moments, which `python killing.py RECIPE
FOLDER KILLS SEED` prints what came of as JSON.

Everything is imported once; each attempt is a child process of its own, which SIGKILL ends like any other.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from crossmodal.training.checkpoints import is_whole
from crossmodal.training.cli import main
from crossmodal.training.train import train  # noqa: F401 (so that no child has to import it)
from safetensors.torch import load_file


torch.set_num_threads(1)


@contextmanager
def at_work_in(folder):
    """A process that holds a folder as a run does."""
    held = f"from crossmodal.training.processes import alone_in\nwith alone_in({str(folder)!r}): print('in', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"in\n"
            yield process
        finally:
            process.kill()


def start(recipe, output, log):
    """The process id of a child that trains."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.argv = ["crossmodal", "train", str(recipe), f"output_dir={output}"]
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        os._exit(code)


def ended(child, seconds, is_time=lambda: False):
    """Whether a child ends by itself within some seconds, and before `is_time`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not is_time():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"the child ended with {status}"
            return True
        time.sleep(0.0005)
    return False


def is_writing(output):
    """Whether a checkpoint, a stage or the model is being written at this moment."""
    checkpoints = output.rglob("checkpoint-*")
    places = [*output.glob(".unfinished"), *output.rglob("writing")]
    return bool(places) or any(path.is_dir() and not (path / "trainer_state.json").exists() for path in checkpoints)


def writes_after(moment, output):
    return time.monotonic() > moment and is_writing(output)


def check_checkpoints(output):
    """How many checkpoints are not whole; those that are taken for whole must load."""
    broken = 0
    for path in output.rglob("checkpoint-*"):
        if not is_whole(path):
            broken += 1
            continue
        load_file(path / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(path / name, weights_only=False)
    return broken


def run(recipe, folder, kills, seed):
    draw, started = random.Random(seed), time.monotonic()
    child = start(recipe, folder / "whole", folder / "whole.log")
    assert ended(child, 600)
    seconds = time.monotonic() - started
    wanted = (folder / "whole" / "model.safetensors").read_bytes()
    found = {"kills": 0, "runs": 0, "equal": 0, "half_written": 0, "seconds_of_a_run": round(seconds, 1)}
    while found["kills"] < kills or found["runs"] == 0:
        output = folder / f"run-{found['runs']}"
        while True:
            child = start(recipe, output, folder / "killed.log")
            # The last run gets as many kills as are left, and then its time.
            spared, aimed = found["kills"] >= kills, draw.random() < 0.5
            began, from_now = time.monotonic(), draw.uniform(0.05, 0.95) * seconds
            if spared or not aimed:
                over = ended(child, 600 if spared else from_now)
            else:
                over = ended(child, 600, partial(writes_after, began + from_now, output))
            if over:
                # The machine may be less busy by now: later kills come sooner.
                seconds = min(seconds, time.monotonic() - began)
                break
            if aimed:
                time.sleep(draw.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found["kills"] += 1
            found["half_written"] += check_checkpoints(output)
        found["runs"] += 1
        found["equal"] += (output / "model.safetensors").read_bytes() == wanted
    return found | {"seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    recipe, folder, kills, seed = sys.argv[1:]
    print(json.dumps(run(Path(recipe), Path(folder), int(kills), int(seed))))
