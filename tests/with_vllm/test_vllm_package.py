"""The plug-in as vLLM finds it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

from guided import folder, members

from genarm.vllm import VERSIONS, check_version, register, vllm_version


def test_vllm_finds_the_plug_in() -> None:
    (point,) = entry_points(group="vllm.general_plugins", name="genarm")
    assert point.load() is register


def test_the_version_in_use_is_supported() -> None:
    assert str(vllm_version()).startswith(VERSIONS)
    check_version()


def test_another_version_gives_one_clear_line(tmp_path: Path) -> None:
    guided = folder(tmp_path, members(tmp_path), {"helpful": "lora"})
    program = f"""
import genarm.vllm
genarm.vllm.VERSIONS = ("0.98", "0.99")
from vllm import LLM
try:
    LLM({str(guided)!r})
except Exception as error:
    print("REFUSED", str(error).splitlines()[-2 if "pydantic" in str(error) else -1])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("REFUSED")]
    assert "guides models inside vLLM 0.98 and 0.99; vLLM " in line, run.stdout
    assert "install vllm==0.99.*" in line


def test_other_models_do_not_notice() -> None:
    """Loading the plug-in costs no import of torch or of the plug-in's own model."""
    program = "import genarm.vllm, sys; print([m for m in sys.modules if m in ('torch', 'vllm', 'transformers')])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert run.stdout.strip() == "[]"
