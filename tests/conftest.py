"""Shared by all tests: no network, one thread, tests that repeat themselves."""

import os
import sys
from pathlib import Path


# Before transformers is imported: a misspelt folder must not be looked up on the Hub, five times over.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from crossmodal.training.allocator import keep_freed_memory  # noqa: E402
from hypothesis import settings  # noqa: E402
from transformers.utils import logging  # noqa: E402


keep_freed_memory()
torch.set_num_threads(1)
logging.disable_progress_bar()
settings.register_profile("few", max_examples=12, deadline=None, derandomize=True)
settings.load_profile("few")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def shared_encoders():
    """The folder of real encoders beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "encoders"
    if not folder.is_dir():
        pytest.skip("needs ../shared/encoders beside the checkout")
    return folder
