"""The plug-in as vLLM finds it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm.config import ModelConfig
from vllm.plugins import load_general_plugins

from builders.guided_vllm import folder, members
from builders.tiny import tiny_lora
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


def test_what_vllm_compiled_for_another_shape_is_not_used_again(tmp_path: Path) -> None:
    """vLLM names what it compiles by a digest of the configuration; members may change behind the same names."""
    load_general_plugins()
    places = members(tmp_path)
    guided = folder(tmp_path, places, {"helpful": "lora"})
    digests = []
    for rank in (4, 2):
        shutil.rmtree(places["lora"])
        tiny_lora(load(places["base"]), places["lora"], seed=3, base_path=str(places["base"]), rank=rank)
        digests += [ModelConfig(str(guided), max_model_len=128, dtype="float32").compute_hash() for _ in range(2)]
    assert digests[0] == digests[1] != digests[2] == digests[3]


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_other_models_do_not_notice() -> None:
    """Loading the plug-in costs no import of torch or of the plug-in's own model."""
    program = "import genarm.vllm, sys; print([m for m in sys.modules if m in ('torch', 'vllm', 'transformers')])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert run.stdout.strip() == "[]"
