"""Damaged and hostile members: each is refused in words, or means what transformers and peft say it means.

Each case damages one file of a good folder: a base, an adapter on it, a full ARM, and the guided folder of these.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from builders.tiny import save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm import GuidedConfig, GuidedForCausalLM
from genarm.cli.main import main
from genarm.errors import GenarmError

IDS = torch.tensor([[7, 8, 9, 10]])
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    base = tiny_model(seed=0, hidden=16, layers=1)
    save_member(base, root / "base")
    save_member(tiny_model("gpt2", seed=3, hidden=16, layers=1), root / "full")
    tiny_lora(base, root / "arm", seed=1, base_path="../base")
    rewards = [{"name": "arm", "adapter": "../arm"}, {"name": "full", "model": "../full", "weight": -0.5}]
    config = GuidedConfig(base={"model": "../base"}, rewards=rewards, vocab_size=46)
    config.save_pretrained(root / "guided")
    base.generation_config.save_pretrained(root / "guided")
    tiny_tokenizer().save_pretrained(root / "guided")
    return root


def what_it_means(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the folder and of its base, by transformers and peft alone."""
    base, full = (AutoModelForCausalLM.from_pretrained(root / name) for name in ("base", "full"))
    plain = base(IDS).logits.log_softmax(-1)
    record = json.loads((root / "guided" / "config.json").read_text())
    arm, other = ([reward.get("weight", 1.0) for reward in record["rewards"]] + [0.0, 0.0])[:2]
    adapted = PeftModel.from_pretrained(base, root / "arm").eval()
    total = plain + arm * adapted(IDS).logits.log_softmax(-1) + other * full(IDS).logits.log_softmax(-1)
    return total.log_softmax(-1), plain


# --- damage -----------------------------------------------------------------------------------------------------------


class Boom:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def as_bytes(change: Callable[[bytes], bytes]) -> Damage:
    def damage(file: Path) -> None:
        file.write_bytes(change(file.read_bytes()))

    return damage


def written(text: str) -> Damage:
    return as_bytes(lambda _: text.encode())


def header(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Change what a safetensors file says of its tensors."""

    def damage(file: Path) -> None:
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        record = json.loads(data[8 : 8 + length])
        change(record)
        text = json.dumps(record).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Change the tensors of a file; the first in order of names is `first` of it."""

    def damage(file: Path) -> None:
        found = load_file(file)
        change(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file, metadata={"format": "pt"})

    return damage


def first(found: dict[str, Any]) -> str:
    return min(name for name in found if name != "__metadata__")


def fill(value: float) -> Damage:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[first(found)].view(-1)[-1] = value

    return tensors(change)


def replaced(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(lambda found: found.update({first(found): change(found[first(found)])}))


def pickled(file: Path) -> None:
    """Nothing but a pickle, under its usual name and under that of the safetensors file."""
    bomb = pickle.dumps(Boom(file.parent.parent / "mark"))
    name = "adapter_model.bin" if file.stem.startswith("adapter") else "pytorch_model.bin"
    file.with_name(name).write_bytes(bomb)
    file.unlink()


def disguised(file: Path) -> None:
    file.write_bytes(pickle.dumps(Boom(file.parent.parent / "mark")))


def fields(**values: Any) -> Damage:
    def damage(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return damage


def sharded(file: Path) -> None:
    """An index that names a shard which is not there."""
    names = list(load_file(file))
    shards = {name: f"model-0000{1 + (i == 0)}-of-00002.safetensors" for i, name in enumerate(names)}
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    file.rename(file.with_name("model-00001-of-00002.safetensors"))


WEIGHTS: dict[str, Damage] = {
    "half": as_bytes(lambda data: data[: len(data) // 2]),
    "one byte less": as_bytes(lambda data: data[:-1]),
    "four bytes": as_bytes(lambda data: data[:4]),
    "empty": as_bytes(lambda data: b""),
    "noise": as_bytes(lambda data: bytes(range(256)) * 8),
    "a longer header": as_bytes(lambda data: struct.pack("<Q", 1 << 40) + data[8:]),
    "a shorter header": as_bytes(lambda data: struct.pack("<Q", 20) + data[8:]),
    "a header that is no JSON": as_bytes(lambda data: data[:9] + b"}" + data[10:]),
    "offsets beyond the end": header(lambda h: h[first(h)].update(data_offsets=[0, 1 << 40])),
    "offsets backwards": header(lambda h: h[first(h)].update(data_offsets=[64, 0])),
    "another shape in the header": header(lambda h: h[first(h)].update(shape=[3, 5])),
    "a flat shape in the header": header(
        lambda h: h[first(h)].update(shape=[torch.Size(h[first(h)]["shape"]).numel()])
    ),
    "a negative shape": header(lambda h: h[first(h)].update(shape=[-4, -8])),
    "another dtype in the header": header(lambda h: h[first(h)].update(dtype="F16")),
    "integers in the header": header(lambda h: h[first(h)].update(dtype="I32")),
    "an unknown dtype": header(lambda h: h[first(h)].update(dtype="X9")),
    "a tensor less": tensors(lambda t: t.pop(first(t))),
    "a tensor more": tensors(lambda t: t.update({"odd.weight": torch.ones(2)})),
    "a layer more": tensors(lambda t: t.update({n.replace(".0.", ".1."): v.clone() for n, v in [*t.items()]})),
    "another name": tensors(lambda t: t.update({f"x.{first(t)}": t.pop(first(t))})),
    "no tensors": tensors(lambda t: t.clear()),
    "transposed": replaced(lambda t: t.t() if t.dim() == 2 else t[:-1]),
    "a row less": replaced(lambda t: t[:-1]),
    "NaN": fill(torch.nan),
    "infinity": fill(-torch.inf),
    "beyond half precision": replaced(lambda t: (t * 1e6).half()),
    "bfloat16": replaced(lambda t: t.bfloat16()),
    "integer values": replaced(lambda t: t.int()),
    "pickled": pickled,
    "a pickle under its name": disguised,
    "gone": lambda file: file.unlink(),
}
TEXTS = {
    "broken": '{"a": ',
    "empty": "",
    "a list": "[1]",
    "null": "null",
    "a text": '"x"',
    "no settings": "{}",
    "deep": "[" * 100_000,
}
CONFIGS: dict[str, Damage] = {
    **{name: written(text) for name, text in TEXTS.items()},
    "bytes": as_bytes(lambda data: b"\xff\xfe\x00\x01"),
    "gone": lambda file: file.unlink(),
}
MODEL_FIELDS: list[dict[str, Any]] = [
    *({"num_hidden_layers": n} for n in (2, 0, -1, "1", 1.5, None)),
    *({"n_layer": n} for n in (2, 0, "1")),
    *({"hidden_size": n} for n in (32, "16", 0, [16])),
    *({"vocab_size": n} for n in (40, 60, "46", -1)),
    *({"model_type": n} for n in ("nonsense", 5, None, "guided")),
    *({"torch_dtype": n} for n in ("float16", "float7", 16)),
    {"tie_word_embeddings": True},
    {"architectures": 5},
    {"quantization_config": {"quant_method": "nothing"}},
    {"quantization_config": 5},
    {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}, "model_type": "evil"},
]
ADAPTER_FIELDS: list[dict[str, Any]] = [
    *({"r": n} for n in (2, 0, -4, "4", None, 4.5)),
    *({"lora_alpha": n} for n in (4, -8, 0, "8", None, float("nan"), 1e308 * 10)),
    *({"target_modules": n} for n in (5, [], ["q_proj"], ["nothing"], "(", ".*q_proj", None, [5])),
    *({"peft_type": n} for n in ("IA3", "NOTHING", None, 5)),
    *({"rank_pattern": n} for n in ({"q_proj": 2}, {"(": 4}, 5, None)),
    *({"alpha_pattern": n} for n in ({"q_proj": 2}, {"q_proj": "2"}, 5)),
    *({"init_lora_weights": n} for n in ("pissa", "pissa_niter_2", "olora", "corda", "loftq", "lora_ga", "x", 5)),
    *({"init_lora_weights": n} for n in (False, "gaussian", "eva", "orthogonal")),
    *({"bias": n} for n in ("all", "lora_only", 5)),
    *({name: True} for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "use_qalora")),
    {"layers_to_transform": [0]},
    {"layers_to_transform": [1]},
    {"exclude_modules": ["q_proj"]},
    {"lora_dropout": 0.5},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [3]},
    {"target_parameters": ["mlp.gate_proj.weight"]},
    {"layer_replication": [[0, 1], [0, 1]]},
    {"alora_invocation_tokens": [3]},
    {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"]}},
    {"monteclora_config": {"num_samples": 2}},
    {"kasa_config": {"beta": 1e-4}},
    {"velora_config": {"num_groups": 2}},
    {"arrow_config": {"top_k": 1}},
    {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    {"ensure_weight_tying": True},
    {"a_setting_of_the_future": 1},
    {"a_setting_of_the_future": None},
    {"base_model_name_or_path": 5},
    {"base_model_name_or_path": "/somewhere/else"},
]
GUIDED_FIELDS: list[dict[str, Any]] = [
    *({"base": value} for value in (5, None, {}, {"model": 5}, {"model": "../nothing"}, {"model": "../arm"})),
    *({"base": {"model": "../base", **more}} for more in ({"dtype": 5}, {"device_map": []}, {"revision": 5}, {"x": 1})),
    *({"base": {"model": "../base", "quantization_config": value}} for value in (5, {"quant_method": "nothing"})),
    *({"rewards": value} for value in (5, "arm", {"a": 1}, [5], [None], [{}], [[]])),
    *(
        {"rewards": [{"name": "arm", "adapter": "../arm", **more}]}
        for more in (
            *({"weight": value} for value in ("1", None, True, float("nan"), 10**400, [1])),
            *({"name": value} for value in (5, None, "", "../../x", "base", "guided", "a b")),
            *(
                {"adapter": value}
                for value in (5, "", "../full", "../base", "../guided", "../nothing", "../arm/../arm")
            ),
            *({"model": value} for value in ("../arm", "../guided", "../full")),
            {"description": {"a": 1}},
        )
    ),
]
GENERATION_FIELDS: list[dict[str, Any]] = [
    *({"eos_token_id": value} for value in ("x", [1, "x"], 1.5, {}, True)),
    *({"temperature": value} for value in ("hot", [1], True)),
    {"max_new_tokens": "5"},
    {"max_length": "x"},
    {"repetition_penalty": {}},
]


def named(damages: dict[str, Damage], *files: str) -> list[Any]:
    """Cases; those of the full ARM, which is loaded as the base is, are left to the slow tests."""
    return [
        pytest.param(
            file,
            damage,
            id=f"{file}: {name}".replace("/", " "),
            marks=[pytest.mark.slow] if file.startswith("full/") else [],
        )
        for file in files
        for name, damage in damages.items()
    ]


def set_to(values: list[dict[str, Any]]) -> dict[str, Damage]:
    return {f"{str(value)[1:60]}": fields(**value) for value in values}


CASES = [
    *named(WEIGHTS, "base/model.safetensors", "full/model.safetensors", "arm/adapter_model.safetensors"),
    *named({"a shard is missing": sharded}, "base/model.safetensors"),
    *named(CONFIGS, "base/config.json", "arm/adapter_config.json", "guided/config.json"),
    *named(CONFIGS, "guided/generation_config.json", "base/tokenizer.json", "base/tokenizer_config.json"),
    *named(set_to(MODEL_FIELDS), "base/config.json", "full/config.json"),
    *named(set_to(ADAPTER_FIELDS), "arm/adapter_config.json"),
    *named(set_to(GUIDED_FIELDS), "guided/config.json"),
    *named(set_to(GENERATION_FIELDS), "guided/generation_config.json"),
]


@pytest.mark.parametrize(("file", "damage"), CASES)
@torch.no_grad()
def test_a_damaged_member_is_refused_or_means_what_its_files_say(
    good: Path, tmp_path: Path, file: str, damage: Damage
) -> None:
    root = tmp_path / "root"
    shutil.copytree(good, root)
    damage(root / file)
    message = ""
    try:
        model: Any = GuidedForCausalLM.from_pretrained(root / "guided")
    except GenarmError as error:
        message = str(error).strip()
        assert 0 < len(message) < 1500
    if not message:
        expected, plain = what_it_means(root)
        assert expected.isfinite().all()
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        unguided = model(IDS, reward_weights=dict.fromkeys(model.reward_names, 0.0)).logits
        assert torch.equal(unguided, plain)
    assert not (root / "mark").exists()


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("base/model.safetensors", WEIGHTS["a tensor less"], r"tensors lm_head.weight are missing"),
        (
            "base/model.safetensors",
            WEIGHTS["a row less"],
            r"lm_head.weight is \[45, 16\] in the file and \[46, 16\] in",
        ),
        (
            "base/model.safetensors",
            WEIGHTS["a layer more"],
            r"model.layers.1.* and \d+ more have no place in a",
        ),
        ("base/model.safetensors", WEIGHTS["NaN"], r"'base' at .* holds NaN or infinity in lm_head.weight"),
        ("arm/adapter_model.safetensors", WEIGHTS["half"], r"cannot read adapter_model.safetensors of .*arm"),
        ("arm/adapter_model.safetensors", WEIGHTS["a tensor less"], r"1 of its tensors are missing \(base_model.model"),
        ("arm/adapter_model.safetensors", WEIGHTS["pickled"], r"only a pickled .bin file"),
        ("arm/adapter_config.json", fields(init_lora_weights="pissa"), r"belongs to a base whose weights peft changed"),
        ("arm/adapter_config.json", fields(tomorrow=1), r"setting tomorrow=1, which the installed peft does not know"),
        (
            "base/config.json",
            fields(hidden_size=2**17, intermediate_size=2**19),
            r"a LlamaConfig of [\d,]{15,} parameters",
        ),
        (
            "base/config.json",
            written('{"model_type": "qwen2"}'),
            r"a Qwen2Config of [\d,]{10,} parameters, and the files",
        ),
        ("guided/generation_config.json", written("{"), r"cannot read generation_config.json of"),
        ("guided/config.json", fields(rewards=5), r"rewards is 5; it must be a list of rewards"),
        ("base/tokenizer.json", WEIGHTS["half"], r"cannot load the tokenizer of"),
    ],
    ids=lambda value: "" if callable(value) else str(value)[:40],
)
def test_messages_name_what_is_wrong(good: Path, tmp_path: Path, file: str, damage: Damage, message: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(good, root)
    damage(root / file)
    with pytest.raises(GenarmError, match=message):
        GuidedForCausalLM.from_pretrained(root / "guided")


def test_the_command_line_says_it_in_one_line(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    shutil.copytree(good, root)
    generate = ["generate", str(root / "guided"), "--prompt", "w1", "--max-new-tokens", "2"]
    assert main(generate) == 0
    base, arm = root / "base" / "model.safetensors", root / "arm" / "adapter_config.json"
    taken = tmp_path / "file"
    taken.touch()
    compose_ = ["compose", "--base", str(root / "base"), "--reward", f"arm={root / 'arm'}", "--adapter-model"]
    compose_ += [f"arm={root / 'base'}", "--output"]
    for damage, command, words in (
        (lambda: None, [*compose_, str(taken / "below" / "out")], "cannot"),
        (lambda: WEIGHTS["half"](base), generate, "cannot load 'base'"),
        (lambda: written("{")(arm), [*compose_, str(root / "out")], "adapter_config.json"),
    ):
        damage()
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert words in said[0]
