"""The notebook for newcomers runs, on the real model, with a few tokens of everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from builders.real import REAL, USES_REAL

pytestmark = USES_REAL

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "first-hour.ipynb"


def test_the_first_hour(tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    program = tmp_path / "first_hour.py"
    program.write_text("\n\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    environment = {**os.environ, "GENARM_MODEL": str(REAL), "GENARM_SMALL": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(program)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("cheerful") >= 4
    assert (tmp_path / "first-hour" / "guided" / "config.json").exists()
