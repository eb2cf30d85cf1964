"""Two real processes on CPUs, as accelerate and torchrun start them: one result, one voice, the weights of one process.

With FSDP each process holds a half of the weights (see `fsdp_on_cpu`). DeepSpeed needs GPUs; its configuration is
checked as far as accelerate reads it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import genarm.lab.training  # noqa: F401 (so that what an ARM is compared with is among the kinds)
from builders.tiny import save_member, tiny_model
from builders.toy_training import run, write_toy
from genarm.errors import ConfigError, GenarmError
from genarm.training.config import TrainConfig, to_toml
from genarm.training.sharding import check_gathered, check_joined, check_launch, parameter_counts, sum_in_float32

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"

# accelerate's `--cpu` starts a single process unless MPI is there. Without it, processes that see no GPU use CPUs.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
PLAIN = [*ACCELERATE, "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
FSDP = [*ACCELERATE, "--config_file", str(RECIPES / "fsdp.yaml")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
GENARM = ["-m", "genarm"]
FSDP_ON_CPU = [str(Path(__file__).resolve().parents[1] / "builders" / "fsdp_on_cpu.py")]

# 32 pairs, 8 a step: 4 steps, a checkpoint after each. The first step has learning rate 0.
HALF: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-3, "eval_steps": 1}
LORA: dict[str, Any] = {"lora": True, "lora_dropout": 0.0, "learning_rate": 1e-2}


def _launch(
    launcher: list[str], program: list[str], config: TrainConfig, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    file = config.output.parent / f"{config.output.name}.toml"
    file.write_text(to_toml(config))
    port = ["--main_process_port" if "accelerate.commands.launch" in launcher else "--master-port", str(_free_port())]
    return subprocess.run(
        [*launcher, *port, *program, "train", "--config", str(file), *options],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_toy(tmp_path_factory.mktemp("two"), n=32)


def _assert_same(ours: Path, theirs: Path, *, atol: float = 2e-4, file: str = "model.safetensors") -> None:
    """Same weights, and the same figures on the way and at the end."""
    weights = [load_file(folder / file) for folder in (ours, theirs)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=atol, rtol=0)
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (ours, theirs)]
    losses = [[entry[name] for entry in log for name in ("loss", "eval_loss") if name in entry] for log in logs]
    assert len(losses[0]) == 9
    assert losses[1] == pytest.approx(losses[0], rel=max(1e-4, atol))


def test_two_processes(settings: dict[str, Any], tmp_path: Path) -> None:
    """8 pairs a step in one process, 4 and 4 in two: the same pairs, hence the same gradient."""
    config = TrainConfig(**{**settings, **HALF, "output": tmp_path / "two"})
    done = _launch(PLAIN, GENARM, config)
    assert done.returncode == 0, done.stderr
    one = run({**settings, **HALF}, output=tmp_path / "one", batch_size=8)

    assert done.stdout.count("pairs kept") == 1  # the main process alone speaks
    assert done.stdout.count("wrote ") == 1
    assert "accuracy" in done.stdout
    assert (tmp_path / "two" / "metrics.json").exists()
    _assert_same(tmp_path / "one", tmp_path / "two")
    theirs, start = (load_file(f / "model.safetensors") for f in (tmp_path / "two", Path(settings["model"])))
    assert max((theirs[name] - start[name]).abs().max() for name in start) > 2e-3

    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["steps"] == one.steps == 4
    assert metrics["eval_pairs"] == 60  # padding rows of the last batch are not counted twice
    assert metrics["eval_accuracy"] == pytest.approx(one.metrics["eval_accuracy"], abs=0.04)
    assert metrics["train_margin"] == pytest.approx(one.metrics["train_margin"], abs=0.05)


@pytest.mark.slow
def test_torchrun(settings: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(**{**settings, **HALF, **LORA, "output": tmp_path / "two"})
    done = _launch(TORCHRUN, GENARM, config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    run({**settings, **HALF, **LORA}, output=tmp_path / "one", batch_size=8)
    _assert_same(tmp_path / "one", tmp_path / "two", file="adapter_model.safetensors", atol=2e-3)


@pytest.mark.slow
def test_fsdp_killed_and_resumed(settings: dict[str, Any], tmp_path: Path) -> None:
    """A full ARM in halves, killed in its third step, continues to the weights of one process."""
    config = TrainConfig(**{**settings, **HALF, "output": tmp_path / "two"})
    died = _launch(FSDP, FSDP_ON_CPU, config, DIE_AT="genarm.training.trainer:ArmTrainer:training_step:3")
    assert died.returncode != 0
    assert f"exitcode: {-signal.SIGKILL}" in died.stderr
    _assert_in_halves(config.output / "checkpoints" / "checkpoint-2")

    done = _launch(FSDP, FSDP_ON_CPU, config, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from step 2" in done.stdout
    assert done.stdout.count("wrote ") == 1
    run({**settings, **HALF}, output=tmp_path / "one", batch_size=8)
    _assert_same(tmp_path / "one", tmp_path / "two")
    saved = json.loads((config.output / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]


def _assert_in_halves(checkpoint: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    tensors = FileSystemReader(checkpoint / "pytorch_model_fsdp_0").read_metadata().state_dict_metadata
    assert tensors
    for name, tensor in tensors.items():
        assert [chunk.sizes[0] for chunk in tensor.chunks] == [tensor.size[0] // 2] * 2, name


@pytest.mark.slow
def test_fsdp_lora(settings: dict[str, Any], tmp_path: Path) -> None:
    """Halves of frozen weights as well; what is written is a peft adapter that loads."""
    config = TrainConfig(**{**settings, **HALF, **LORA, "output": tmp_path / "two"})
    done = _launch(FSDP, FSDP_ON_CPU, config)
    assert done.returncode == 0, done.stderr
    run({**settings, **HALF, **LORA}, output=tmp_path / "one", batch_size=8)
    _assert_same(tmp_path / "one", tmp_path / "two", file="adapter_model.safetensors", atol=2e-3)
    from peft import AutoPeftModelForCausalLM

    loaded = AutoPeftModelForCausalLM.from_pretrained(config.output)
    saved = load_file(config.output / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 1e-3 for name, tensor in saved.items() if "lora_B" in name)
    assert len(saved) == sum("lora_" in name for name, _ in loaded.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "launch"),
    [
        pytest.param({}, {"fsdp_state_dict_type": "FULL_STATE_DICT"}, id="whole checkpoints"),
        pytest.param({"gradient_checkpointing": True}, {}, id="gradient checkpointing"),
        pytest.param({**LORA, "gradient_checkpointing": True}, {}, id="gradient checkpointing with LoRA"),
        pytest.param({"model": "tied"}, {}, id="tied embeddings"),
        pytest.param({"model": "tied", **LORA}, {}, id="tied embeddings with LoRA"),
        pytest.param({"model": "gpt2"}, {}, id="GPT-2"),
        pytest.param({"accumulation": 2, "batch_size": 2}, {}, id="accumulation"),
        pytest.param({"bf16": True}, {}, id="bf16"),
        pytest.param({"bf16": True, **LORA}, {}, id="bf16 with LoRA"),
        pytest.param({"early_stopping": 2}, {}, id="best weights"),
    ],
)
def test_fsdp_variants(
    changes: dict[str, Any], launch: dict[str, str], settings: dict[str, Any], tmp_path: Path
) -> None:
    if "model" in changes:
        save_member(_model(changes["model"]), tmp_path / "model")
        changes = {**changes, "model": str(tmp_path / "model")}
    settings = {**settings, **HALF, **changes}
    config = TrainConfig(**{**settings, "output": tmp_path / "two"})
    recipe = yaml.safe_load((RECIPES / "fsdp.yaml").read_text())
    recipe["fsdp_config"] |= launch
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(recipe))
    done = _launch([*ACCELERATE, "--config_file", str(tmp_path / "launch.yaml")], FSDP_ON_CPU, config)
    assert done.returncode == 0, done.stderr
    run(settings, output=tmp_path / "one", batch_size=2 * config.batch_size)
    lora, bf16 = config.lora, config.bf16
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    _assert_same(tmp_path / "one", tmp_path / "two", file=file, atol=(2e-2 if lora else 2e-3) if bf16 else 1e-3)
    assert {t.dtype for t in load_file(tmp_path / "two" / file).values()} == {torch.float32}


def _model(kind: str) -> PreTrainedModel:
    if kind == "gpt2":
        return tiny_model("gpt2", spread=0.05, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = tiny_model(spread=0.05).config
    config.tie_word_embeddings = True
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA, {"early_stopping": 2}], ids=["full", "LoRA", "best weights"])
def test_fsdp_killed_while_the_result_is_written(
    changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**settings, **HALF, **changes}
    config = TrainConfig(**{**settings, "output": tmp_path / "two"})
    died = _launch(FSDP, FSDP_ON_CPU, config, DIE_AT="genarm.training.output:RunFolder:publish:1")
    assert died.returncode != 0
    assert not (config.output / "metrics.json").exists()
    done = _launch(FSDP, FSDP_ON_CPU, config, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from step 4" in done.stdout
    run(settings, output=tmp_path / "one", batch_size=8)
    file = "adapter_model.safetensors" if config.lora else "model.safetensors"
    _assert_same(tmp_path / "one", tmp_path / "two", file=file, atol=2e-3)


def test_weights_that_would_not_be_split_are_refused(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**settings)
    check_launch(config)
    check_joined(PartialState())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_launch(config)
    with pytest.raises(ConfigError, match="asks for FSDP, and accelerate splits weights only over GPUs"):
        check_joined(PartialState())
    for change, why in {
        ("kind", "dpo"): "is for ARMs by the paper's loss, and the settings say --kind dpo",
        ("loss", "reference"): "and the settings say --loss reference",
        ("load_in_4bit", True): "4-bit weights are not split",
    }.items():
        with pytest.raises(ConfigError, match=why):
            check_launch(TrainConfig(**{**settings, "lora": True, change[0]: change[1]}))
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(ConfigError, match="spoils dropout and LoRA; set it to false and give --gradient-checkpointing"):
        check_launch(config)


def test_a_result_without_weights_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(GenarmError, match="were not gathered"):
        check_gathered(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    check_gathered(tmp_path)


def test_deepspeed_that_is_not_installed_is_refused(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    if find_spec("deepspeed"):
        check_launch(TrainConfig(**settings))
    else:
        with pytest.raises(ConfigError, match="not installed: pip install deepspeed, or use FSDP"):
            check_launch(TrainConfig(**settings))


def test_the_deepspeed_recipe_is_what_accelerate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file through accelerate's launcher to the configuration that DeepSpeed would get."""
    from accelerate.commands import launch
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    words = ["--config_file", str(RECIPES / "deepspeed-zero3.yaml"), "--main_process_port", "0", *GENARM, "train"]
    arguments, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    assert arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    read = plugin.deepspeed_config
    assert plugin.zero3_init_flag
    assert (read["zero_optimization"]["stage"], read["bf16"]) == (3, {"enabled": True})
    assert read["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert {read[name] for name in (*automatic, "gradient_clipping")} == {"auto"}


@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="transformers reads DeepSpeed's settings only with deepspeed"
)
def test_the_trainer_fills_in_what_deepspeed_leaves_to_it(tmp_path: Path) -> None:
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    read = HfTrainerDeepSpeedConfig({**dict.fromkeys(names, "auto"), "zero_optimization": {"stage": 3}})
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2)
    read.trainer_config_process(arguments)
    assert [read.config[name] for name in names] == [8 * arguments.world_size, 4, 2, 1.0]
    assert not read.mismatches


def test_fsdp_sums_gradients_in_float32() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    half = torch.bfloat16
    plugin = SimpleNamespace(mixed_precision_policy=MixedPrecisionPolicy(half, half, half))
    state = SimpleNamespace(fsdp_plugin=plugin)
    sum_in_float32(SimpleNamespace(is_fsdp_enabled=True, accelerator=SimpleNamespace(state=state)))  # type: ignore[arg-type]
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(half, torch.float32, half)


def test_parameters_that_deepspeed_took_apart_are_counted() -> None:
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    model.weight.ds_numel = 24  # type: ignore[assignment]  # of all processes
    assert parameter_counts(model) == (24, 28)
