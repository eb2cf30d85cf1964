"""Settings for every test."""

from __future__ import annotations

import os

import torch

# The models here are so small that a second thread costs more than it brings, and on a busy machine very much more.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and of the commands that tests run
