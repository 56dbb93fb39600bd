"""Memory that tensors have freed is kept, where nobody has said otherwise."""

import os
import subprocess
import sys

import pytest
from crossmodal.training.allocator import keep_freed_memory


CODE = """
import resource, sys, torch
from crossmodal.training.allocator import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else False
def step():
    return torch.ones(12 * 2**20)  # 48 MiB
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what, **environment):
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, what],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said, number = done.stdout.split()
    return said == "True", int(number)


def test_steps_after_the_first_touch_no_new_page():
    if not keep_freed_memory() and not any(key.startswith("MALLOC_") for key in os.environ):
        pytest.skip("needs glibc")
    kept, few = faults("keep")
    assert kept and few < 200
    # Pages of 4 KiB, or fewer where the kernel has huge ones.
    plain, many = faults("leave")
    assert not plain and many > few


def test_what_the_environment_says_of_the_allocator_stands():
    assert faults("keep", MALLOC_ARENA_MAX="2")[0] is False
