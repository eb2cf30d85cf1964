"""Where the real chat model is, SmolLM2-135M-Instruct, and the marks of tests that use it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REAL = Path(os.environ.get("GENARM_REAL_MODEL", Path(__file__).resolve().parents[2] / ".real-model"))

USES_REAL = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (REAL / "config.json").is_file(),
        reason=f"no real model in {REAL}; scripts/real-model .real-model brings one",
    ),
]
