"""Settings for every test."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch
from hypothesis import settings

# The same commit passes or fails every time; `--hypothesis-profile search` draws new cases.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("repeatable")

# The models here are so small that a second thread costs more than it brings, and on a busy machine very much more.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and of the commands that tests run

# What a shell runs in the background ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_stays() -> None:
    """Each training collects garbage, which takes half a second where all that was imported is looked through."""
    gc.collect()
    gc.freeze()
