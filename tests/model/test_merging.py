"""Merging: the plain model that transformers loads says what the guided model says, to rounding; or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from builders.families import tiny_family
from builders.tiny import VOCAB_SIZE, save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM, compose
from genarm.cli.main import main

IDS = torch.tensor([[7, 8, 9, 10, 3], [11, 12, 13, 14, 40]])


def tied(family: str) -> PreTrainedModel:
    """A tiny model whose output layer is its embedding."""
    config = tiny_model(family).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "llama, tied": lambda: tied("llama"),
    "gpt2, tied": lambda: tied("gpt2"),
    "qwen3, tied": lambda: tied("qwen3"),
}


def head_of(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def place(root: Path, name: str) -> Path:
    """A base, adapters everywhere and on its output layer, and a guided folder of them all."""
    base = MODELS[name]()
    save_member(base, root / "base")
    tiny_lora(base, root / "tuned", seed=1, base_path=str(root / "base"))
    for seed, head in enumerate(("one", "two"), start=2):
        tiny_lora(base, root / head, seed=seed, base_path=str(root / "base"), targets=[head_of(base)])
    compose(
        root / "base",
        {"one": root / "one"},
        root / "guided",
        tuned={"tuned": root / "tuned", "two": root / "two"},
        wishes={"calm": "Be calm."},
        weights={"one": 0, "two": 0, "tuned": 0, "calm": 0},
    )
    return root / "guided"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: place(tmp_path_factory.mktemp("merge"), name) for name in MODELS}


CASES = {
    "a tuned model": {"tuned": 1.0},
    "a head": {"one": 0.7},
    "a head, against": {"one": -0.4},
    "two heads, one a difference": {"one": 0.7, "two": 2.5},
    "a tuned head alone": {"two": 1.0},
}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(("llama, tied", case) for case in CASES),
        *((name, case) for name in MODELS for case in ("a tuned model", "two heads, one a difference")),
    ],
)
def test_the_merged_model_says_the_same(folders: dict[str, Path], tmp_path: Path, name: str, case: str) -> None:
    folder, weights = folders[name], CASES[case]
    given = ",".join(f"{reward}={weight}" for reward, weight in weights.items())
    assert main(["merge", str(folder), "--weights", given, "--output", str(tmp_path / "merged")]) == 0
    guided = GuidedForCausalLM.from_pretrained(folder)
    expected = guided(IDS, reward_weights=weights).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == type(MODELS[name]()).__name__
    found = merged(IDS).logits.log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, guided.base(IDS).logits.log_softmax(-1), atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    said = merged.generate(IDS, do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert said.tolist() == guided.generate(IDS, do_sample=False, max_new_tokens=8, reward_weights=weights).tolist()
    # What began tied is untied where the output layer has changed, and only there.
    still = "tied" in name and case == "a tuned model"
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings is still


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("tuned=0.5", "0.5·log π_base +0.5·log π_tuned adds up what 2 networks with different hidden states say"),
        ("tuned=1,one=0.5", "0.5·log π_one +1·log π_tuned adds up"),
        ("calm=1", "'calm' is a wish, which reads a prompt of its own"),
        ("one=0", "all weights are 0"),
        ("nothing=1", "no reward is named 'nothing'"),
    ],
)
def test_what_cannot_be_merged(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str, message: str
) -> None:
    assert main(["merge", str(folders["llama"]), "--weights", weights, "--output", str(tmp_path / "no")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_the_weights_of_half_a_difference_are_another_model(folders: dict[str, Path]) -> None:
    """Why W + w·ΔW is not offered: it is far from the guided model at w = 0.5, and the same at w = 1."""
    folder = folders["llama"]
    guided = GuidedForCausalLM.from_pretrained(folder)
    apart = {}
    for w in (0.5, 1.0):
        model = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
        adapted = PeftModel.from_pretrained(model, folder.parent / "tuned")
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] *= w
        with torch.no_grad():
            found = adapted.merge_and_unload()(IDS).logits.log_softmax(-1)
        apart[w] = float((found - guided(IDS, reward_weights={"tuned": w}).logits).abs().max())
    assert apart[1.0] < 1e-4
    assert apart[0.5] > 0.1


def test_other_members_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_member(tiny_model(vocab_size=VOCAB_SIZE + 1), tmp_path / "base", tiny_tokenizer(("<tool>",)))
    save_member(tiny_model(seed=1), tmp_path / "other")
    compose(tmp_path / "base", {"arm": tmp_path / "other"}, tmp_path / "full")
    compose(tmp_path / "base", {}, tmp_path / "tuned", tuned={"t": tmp_path / "other"})
    capped = tiny_family("gemma2")
    save_member(capped, tmp_path / "capped", tiny_tokenizer(words=[f"w{i}" for i in range(90)]))
    tiny_lora(capped, tmp_path / "head", seed=1, base_path=str(tmp_path / "capped"), targets=["lm_head"])
    compose(tmp_path / "capped", {"head": tmp_path / "head"}, tmp_path / "of-capped")
    for name, message in (
        ("full", "adds up what 2 networks"),
        ("tuned", "'t' does not have exactly the base's token ids"),
        ("of-capped", "does more to its logits than its output layer (a cap, say)"),
        ("base", "is a plain model already"),
    ):
        assert main(["merge", str(tmp_path / name), "--output", str(tmp_path / "merged")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "merged").exists()


def test_dora_and_bfloat16_and_a_full_tuned_model(tmp_path: Path) -> None:
    base = save_member(tiny_model(seed=0).to(torch.bfloat16), tmp_path / "base")
    adapted = get_peft_model(tiny_model(seed=0), LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "dora")
    save_member(tiny_model("qwen2", seed=1), tmp_path / "full")
    places: dict[str, Any] = {"dora": str(base)}
    tuned = {"dora": tmp_path / "dora", "full": tmp_path / "full"}
    compose(base, {}, tmp_path / "guided", tuned=tuned, adapter_models=places, weights={"dora": 0, "full": 0})
    for name, dtype in (("dora", "float32"), ("dora", "bfloat16"), ("full", "float32")):
        output = tmp_path / f"{name}-{dtype}"
        code = main(
            ["merge", str(tmp_path / "guided"), "--weights", f"{name}=1", "--dtype", dtype, "--output", str(output)]
        )
        assert code == 0
        merged = AutoModelForCausalLM.from_pretrained(output)
        assert str(merged.dtype) == f"torch.{dtype}"
        guided = GuidedForCausalLM.from_pretrained(tmp_path / "guided", dtype=dtype)
        expected = guided(IDS, reward_weights={name: 1.0}).logits
        found = merged(IDS).logits.float().log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-5 if dtype == "float32" else 0.3, rtol=1e-5)
    assert merged.config.model_type == "qwen2"
    assert merged.config.vocab_size == VOCAB_SIZE


def test_an_output_that_is_there(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["merge", str(folders["llama"]), "--weights", "one=1", "--output", str(tmp_path)]) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
