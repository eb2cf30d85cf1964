"""The plug-in as vLLM finds it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from vllm.config import ModelConfig
from vllm.plugins import load_general_plugins

from builders.guided_vllm import folder, members
from builders.tiny import tiny_lora
from genarm.errors import UnsupportedError
from genarm.vllm import VERSIONS, check_version, register, vllm_version
from genarm.vllm.config import ServedConfig
from genarm.vllm.interface import missing


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


def test_all_that_is_touched_is_there() -> None:
    assert missing() == []


def test_a_later_version_is_taken_with_a_warning_while_nothing_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guided = folder(tmp_path, members(tmp_path), {"helpful": "lora"})
    monkeypatch.setattr("genarm.vllm.VERSIONS", ("0.1", "0.2"))
    try:
        register()
        with pytest.warns(UserWarning, match=r"newer than those that guided models were tried with"):
            config = AutoConfig.from_pretrained(guided)
        assert isinstance(config, ServedConfig)
        assert config.trunks
        monkeypatch.setattr("genarm.vllm.interface.missing", lambda: ["vllm.gone", "vllm.lost"])
        with pytest.raises(UnsupportedError, match=r"which has no vllm.gone and 1 more .* install vllm==0.2.\*"):
            AutoConfig.from_pretrained(guided)
    finally:
        monkeypatch.undo()
        register()


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
