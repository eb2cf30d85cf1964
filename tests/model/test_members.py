"""Members in a guided folder: adapters that share a model, references, bundles, round trips."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from builders.tiny import save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm import GuidedConfig, GuidedForCausalLM, compose
from genarm.engine import Engine, EngineOptions, Request
from genarm.errors import (
    ConfigError,
    DataError,
    GenarmError,
    MemberError,
    UnsupportedError,
    VocabularyError,
    WeightsError,
)
from genarm.model.references import open_files
from genarm.sampling import Sampling

IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])


@pytest.fixture
def members(tmp_path: Path) -> dict[str, Path]:
    """A base, a full reward, two adapters on the base, a smaller model and two adapters on it."""
    base, small = tiny_model(seed=0), tiny_model("qwen2", seed=5, hidden=16)
    paths = {
        "base": save_member(base, tmp_path / "base"),
        "full": save_member(tiny_model("gpt2", seed=3), tmp_path / "full"),
        "small": save_member(small, tmp_path / "small"),
    }
    for name, model, on, seed in (
        ("on-base-1", base, "base", 1),
        ("on-base-2", base, "base", 2),
        ("on-small-1", small, "small", 3),
        ("on-small-2", small, "small", 4),
    ):
        paths[name] = tiny_lora(model, tmp_path / name, seed=seed, base_path=str(paths[on]))
    return paths


def merged(model: Path, adapter: Path) -> PreTrainedModel:
    """peft's own word for what an adapter does: merge it and run the result as a full model."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload().eval()


def by_hand(base: PreTrainedModel, rewards: list[tuple[PreTrainedModel, float]]) -> torch.Tensor:
    total = base(IDS).logits.log_softmax(-1)
    for reward, weight in rewards:
        total = total + weight * reward(IDS).logits.log_softmax(-1)
    return total.log_softmax(-1)


def write_all(members: dict[str, Path], output: Path, **options: Any) -> Path:
    names = ("full", "on-base-1", "on-base-2", "on-small-1", "on-small-2")
    weights = dict(zip(names, (0.5, 1.0, -0.5, 0.25, 2.0), strict=True))
    compose(members["base"], {name: members[name] for name in names}, output, weights=weights, **options)
    return output


def test_every_kind_of_member_in_one_model(members: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_all(members, tmp_path / "guided"))
    assert isinstance(model, GuidedForCausalLM)
    base = AutoModelForCausalLM.from_pretrained(members["base"])
    assert torch.equal(model.base(IDS).logits, base(IDS).logits)  # a loaded adapter does not run on its own
    rewards = [
        (AutoModelForCausalLM.from_pretrained(members["full"]), 0.5),
        (merged(members["base"], members["on-base-1"]), 1.0),
        (merged(members["base"], members["on-base-2"]), -0.5),
        (merged(members["small"], members["on-small-1"]), 0.25),
        (merged(members["small"], members["on-small-2"]), 2.0),
    ]
    expected = by_hand(base, rewards)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    off = dict.fromkeys(model.reward_names, 0.0)
    assert torch.equal(model(IDS, reward_weights=off).logits, base(IDS).logits.log_softmax(-1))
    assert torch.equal(
        model.generate(IDS, reward_weights=off, do_sample=False, max_new_tokens=8),
        base.generate(IDS, do_sample=False, max_new_tokens=8),
    )
    # outside of a forward the base is its plain self, whatever ran last
    model(IDS)
    assert torch.equal(model.base(IDS).logits, base(IDS).logits)


def test_adapters_share_their_models_memory(members: dict[str, Path], tmp_path: Path) -> None:
    model = GuidedForCausalLM.from_pretrained(write_all(members, tmp_path / "guided"))
    assert len(model.models) == 3
    sizes = {
        name: sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(members[name]).parameters())
        for name in ("base", "full", "small")
    }
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert model.num_parameters() == sum(sizes.values()) + adapters
    assert not any(p.requires_grad for p in model.parameters())


def test_bundle_can_be_moved(members: dict[str, Path], tmp_path: Path) -> None:
    expected = GuidedForCausalLM.from_pretrained(write_all(members, tmp_path / "guided"))(IDS).logits
    write_all(members, tmp_path / "bundle", bundle=True)
    for path in members.values():
        shutil.rmtree(path)
    moved = (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    assert not list(moved.rglob("*.bin"))
    assert torch.equal(GuidedForCausalLM.from_pretrained(moved)(IDS).logits, expected)
    assert AutoTokenizer.from_pretrained(moved)("w1 w2").input_ids == tiny_tokenizer()("w1 w2").input_ids


@pytest.mark.parametrize("bundle", [False, True])
def test_round_trip(members: dict[str, Path], tmp_path: Path, bundle: bool) -> None:
    model = GuidedForCausalLM.from_pretrained(write_all(members, tmp_path / "guided", bundle=bundle))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "members").exists() == bundle
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    records = [{**m.config.to_dict(), "_name_or_path": None} for m in (again, model)]
    assert records[0] == records[1]
    model.save_pretrained(tmp_path / "guided")  # onto itself
    assert torch.equal(GuidedForCausalLM.from_pretrained(tmp_path / "guided")(IDS).logits, model(IDS).logits)


def test_round_trip_of_members_from_memory(members: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(members["base"])
    small = AutoModelForCausalLM.from_pretrained(members["small"])
    on_base = PeftModel.from_pretrained(base, members["on-base-1"], adapter_name="one")
    on_small = PeftModel.from_pretrained(small, members["on-small-1"])
    rewards = {"kind": on_base, "brief": on_small, "full": AutoModelForCausalLM.from_pretrained(members["full"])}
    model = GuidedForCausalLM.from_members(base, rewards, weights={"brief": 0.5})
    assert len(model.models) == 3
    model.save_pretrained(tmp_path / "guided")
    again = GuidedForCausalLM.from_pretrained(tmp_path / "guided")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    expected = by_hand(
        AutoModelForCausalLM.from_pretrained(members["base"]),
        [
            (merged(members["base"], members["on-base-1"]), 1.0),
            (merged(members["small"], members["on-small-1"]), 0.5),
            (AutoModelForCausalLM.from_pretrained(members["full"]), 1.0),
        ],
    )
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_push_to_hub(members: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be uploaded; the hub itself cannot be reached from a test."""
    from huggingface_hub import HfApi, RepoUrl

    uploads: list[tuple[str, list[str]]] = []

    def upload(self: HfApi, *, repo_id: str, folder_path: str, **options: Any) -> str:
        files = sorted(str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file())
        uploads.append((repo_id, files))
        return "commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: RepoUrl(f"https://huggingface.co/me/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    referring = GuidedForCausalLM.from_pretrained(write_all(members, tmp_path / "guided"))
    with pytest.raises(UnsupportedError, match="nobody else can read; compose it with --bundle"):
        referring.push_to_hub("mine")
    bundled = GuidedForCausalLM.from_pretrained(write_all(members, tmp_path / "bundle", bundle=True))
    assert bundled.push_to_hub("mine") == "commit"
    bundled.save_pretrained(tmp_path / "saved", push_to_hub=True, private=True)
    assert [repo for repo, _ in uploads] == ["me/mine", "me/saved"]
    wanted = {"config.json", "members/base/model.safetensors", "members/on-base-1/adapter_model.safetensors"}
    assert all(wanted <= set(files) for _, files in uploads)


def test_relative_references(members: dict[str, Path], tmp_path: Path) -> None:
    """A hand-written config.json may name members relative to the folder."""
    folder = tmp_path / "guided"
    folder.mkdir()
    GuidedConfig(base={"model": "../base"}, rewards=[{"name": "r", "adapter": "../on-base-1"}]).save_pretrained(folder)
    expected = by_hand(
        AutoModelForCausalLM.from_pretrained(members["base"]), [(merged(members["base"], members["on-base-1"]), 1.0)]
    )
    model = GuidedForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    # saved elsewhere, they lead to the same place, and nothing is written beside the new folder
    model.save_pretrained(tmp_path / "deep" / "down" / "again")
    assert [p.name for p in (tmp_path / "deep" / "down").iterdir()] == ["again"]
    again = GuidedForCausalLM.from_pretrained(tmp_path / "deep" / "down" / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(UnsupportedError, match="nobody else can read"):
        model.push_to_hub("mine")


def test_one_adapter_name_for_two_rewards_is_refused(members: dict[str, Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(members["base"])
    both = [PeftModel.from_pretrained(base, members[name]) for name in ("on-base-1", "on-base-2")]
    with pytest.raises(MemberError, match="'kind' and 'brief' are both the adapter 'default' on one model"):
        GuidedForCausalLM.from_members(base, dict(zip(("kind", "brief"), both, strict=True)))


def test_dtype_for_all_and_for_one(members: dict[str, Path], tmp_path: Path) -> None:
    settings = {"full": {"dtype": "float32"}}
    compose(members["base"], {"full": members["full"]}, tmp_path / "guided", settings=settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "guided", dtype=torch.bfloat16)
    assert model.base.dtype == torch.bfloat16
    assert model.members[1].model.dtype == torch.float32
    assert model(IDS).logits.dtype == torch.float32


def test_quantisation_reaches_the_member(tmp_path: Path) -> None:
    """A base in bitsandbytes' 4-bit format carries an adapter, as QLoRA users have it."""
    pytest.importorskip("bitsandbytes")
    base = tiny_model(seed=0, hidden=128, intermediate_size=128, spread=0.06)
    path = save_member(base, tmp_path / "base")
    arm = tiny_lora(base, tmp_path / "arm", seed=1, base_path=str(path))
    settings = {"base": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}}
    compose(path, {"r": arm}, tmp_path / "guided", settings=settings)
    model = GuidedForCausalLM.from_pretrained(tmp_path / "guided")
    assert model.base.is_loaded_in_4bit
    exact = by_hand(AutoModelForCausalLM.from_pretrained(path), [(merged(path, arm), 1.0)])
    distance = (model(IDS).logits.exp() - exact.exp()).abs().sum(-1).mean() / 2
    assert distance < 0.15  # total variation; a wrong or missing adapter gives several times as much
    unguided = by_hand(AutoModelForCausalLM.from_pretrained(path), [])
    assert (unguided.exp() - exact.exp()).abs().sum(-1).mean() / 2 > 2 * distance


def test_deep_copies_and_devices_are_independent(members: dict[str, Path], tmp_path: Path) -> None:
    model = GuidedForCausalLM.from_pretrained(write_all(members, tmp_path / "guided"))
    twin = copy.deepcopy(model)
    twin.base.get_input_embeddings().weight.data.zero_()
    assert not torch.equal(twin(IDS).logits, model(IDS).logits)
    assert model.to(torch.bfloat16).base.dtype == torch.bfloat16


def test_token_rewards(members: dict[str, Path], tmp_path: Path) -> None:
    rewards = {"full": members["full"], "one": members["on-base-1"]}
    compose(members["base"], rewards, tmp_path / "guided", weights={"full": 0.0, "one": 2.0})
    model, tokenizer = GuidedForCausalLM.from_pretrained(tmp_path / "guided"), tiny_tokenizer()
    prompt = [{"role": "user", "content": "w1 w2"}]
    scores = model.token_rewards(prompt, "w3 w4 w5")
    assert [t.strip() for t in scores.tokens] == ["w3", "w4", "w5", "<end>"]
    ids = torch.tensor([tokenizer("<user> w1 w2 <end> <assistant> w3 w4 w5 <end>").input_ids])
    assert ids[0, -4:].tolist() == list(scores.token_ids)
    parts = {
        "base": AutoModelForCausalLM.from_pretrained(members["base"]),
        "full": AutoModelForCausalLM.from_pretrained(members["full"]),
        "one": merged(members["base"], members["on-base-1"]),
    }
    log_probs = {name: part(ids).logits.log_softmax(-1)[0, -5:-1] for name, part in parts.items()}
    rows = torch.arange(4)
    for name, values in (("base", scores.base), *scores.rewards.items()):
        expected = log_probs[name][rows, ids[0, -4:]]
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-5, rtol=1e-5)
    guided = (log_probs["base"] + 2 * log_probs["one"]).log_softmax(-1)[rows, ids[0, -4:]]
    torch.testing.assert_close(torch.tensor(scores.guided), guided, atol=1e-5, rtol=1e-5)
    assert scores.contributions["one"] == tuple(2 * v for v in scores.rewards["one"])
    assert scores.totals["one"] == pytest.approx(sum(scores.rewards["one"]))
    json.dumps(scores.to_dict())


def test_a_member_without_numbers_is_named() -> None:
    """Its weights are all finite, and what it computes with them is not."""
    broken = tiny_model(seed=1)
    for name, parameter in broken.named_parameters():
        if name.endswith(("up_proj.weight", "down_proj.weight")):
            parameter.data.mul_(1e20)
    model = GuidedForCausalLM.from_members(tiny_model(seed=0), {"r": broken, "good": tiny_model(seed=2)})
    with pytest.raises(MemberError, match="'r' gives NaN instead of log-probabilities"):
        model.token_rewards("w1", "w2", tokenizer=tiny_tokenizer())
    sound = GuidedForCausalLM.from_members(tiny_model(seed=0), {"good": tiny_model(seed=2)})
    with pytest.raises(WeightsError, match="overflows with these reward weights"):
        sound.token_rewards("w1", "w2", tokenizer=tiny_tokenizer(), reward_weights={"good": 3e38})


def test_the_names_of_rewards_are_the_users(members: dict[str, Path], tmp_path: Path) -> None:
    """Names of peft's attributes, of modules, and of what the engine and a bundle have beside the rewards."""
    names = ("model", "draft", "keys", "weight", "default", "layers", "small-model", "small")
    adapters = ["on-base-1", "on-base-2"] * 3
    rewards = {name: members[adapter] for name, adapter in zip(names, adapters, strict=False)}
    rewards |= {"small-model": members["full"], "small": members["on-small-1"]}
    weights = {name: 0.1 * (i + 1) for i, name in enumerate(names)}
    compose(members["base"], rewards, tmp_path / "guided", weights=weights, bundle=True)
    model = GuidedForCausalLM.from_pretrained(tmp_path / "guided")
    parts = {
        name: AutoModelForCausalLM.from_pretrained(members["full"])
        if name == "small-model"
        else merged(members["small" if name == "small" else "base"], path)
        for name, path in rewards.items()
    }
    expected = by_hand(
        AutoModelForCausalLM.from_pretrained(members["base"]), [(parts[name], weights[name]) for name in rewards]
    )
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    draft = AutoModelForCausalLM.from_pretrained(members["small"])
    with Engine(
        model, tiny_tokenizer(), EngineOptions(streams=1), draft=draft, draft_tokenizer=tiny_tokenizer()
    ) as engine:
        [reply] = engine.generate(
            [Request(prompt=IDS[0].tolist(), sampling=Sampling(max_new_tokens=6), ignore_eos=True)]
        )
    assert {*reply.tokens[0].rewards} == {*names}
    ids = [*IDS[0].tolist(), *(token.id for token in reply.tokens)]
    log_probs = model(torch.tensor([ids])).logits[0, len(IDS[0]) - 1 : -1]
    for token, row in zip(reply.tokens, log_probs, strict=True):
        assert token.log_prob == pytest.approx(row[token.id].item(), abs=1e-4)


def test_a_guided_folder_as_base_is_taken_apart(members: dict[str, Path], tmp_path: Path) -> None:
    first = {"full": members["full"], "one": members["on-base-1"]}
    compose(members["base"], first, tmp_path / "first", weights={"one": 0.5}, bundle=True)
    more = {"two": members["on-base-2"], "small": members["on-small-1"]}
    with pytest.raises(ConfigError, match="has a reward 'one' already"):
        compose(tmp_path / "first", {"one": members["on-base-2"]}, tmp_path / "second")
    with pytest.raises(MemberError, match=r"'r' at .* is a guided folder, and a member is one plain model"):
        compose(members["base"], {"r": tmp_path / "first"}, tmp_path / "second")
    # An adapter says that it was trained on the model that the first folder has copied.
    settings = {"two": str(tmp_path / "first" / "members" / "base")}
    report = compose(
        tmp_path / "first", more, tmp_path / "second", weights={"full": -0.5, "two": 2.0}, adapter_models=settings
    )
    assert report.config.default_weights == {"full": -0.5, "one": 0.5, "two": 2.0, "small": 1.0}
    model = GuidedForCausalLM.from_pretrained(tmp_path / "second")
    assert len(model.models) == 3  # both adapters share the base
    expected = by_hand(
        AutoModelForCausalLM.from_pretrained(members["base"]),
        [
            (AutoModelForCausalLM.from_pretrained(members["full"]), -0.5),
            (merged(members["base"], members["on-base-1"]), 0.5),
            (merged(members["base"], members["on-base-2"]), 2.0),
            (merged(members["small"], members["on-small-1"]), 1.0),
        ],
    )
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_adapters_in_memory_keep_the_same_promise(members: dict[str, Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(members["base"])
    for options, message in (({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias='all'")):
        adapted = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], **options))
        with pytest.raises(MemberError, match=message):
            GuidedForCausalLM.from_members(base, {"r": adapted})
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), members["on-base-1"], adapter_name="one")
    adapted.load_adapter(members["on-base-2"], adapter_name="two")
    adapted.base_model.set_adapter(["one", "two"])
    with pytest.raises(MemberError, match="has the active adapters"):
        GuidedForCausalLM.from_members(base, {"r": adapted})
    adapted.base_model.set_adapter("one")
    adapted.merge_adapter(["two"])
    for base_of in (base, adapted.get_base_model()):
        with pytest.raises(MemberError, match="'two' is merged into the model that it is on"):
            GuidedForCausalLM.from_members(base_of, {"r": adapted})
    adapted.unmerge_adapter()
    GuidedForCausalLM.from_members(base, {"r": adapted})
    base.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(MemberError, match=r"NaN or infinity in lm_head\.weight"):
        GuidedForCausalLM.from_members(base, {})


def test_an_adapter_that_began_as_pissa_is_saved_as_what_it_is(members: dict[str, Path], tmp_path: Path) -> None:
    """In memory its base is the one that peft made for it, and that one is saved."""
    base = AutoModelForCausalLM.from_pretrained(members["base"])
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    model = GuidedForCausalLM.from_members(base, {"r": adapted})
    model.save_pretrained(tmp_path / "guided")
    again = GuidedForCausalLM.from_pretrained(tmp_path / "guided")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_adapters_scaled_in_memory_or_on_tied_embeddings_are_saved_as_they_are(tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_model(seed=0).config)
    config.tie_word_embeddings = True
    base = AutoModelForCausalLM.from_config(config).eval()
    for number, options in enumerate(({"use_rslora": True}, {"alpha_pattern": {"lm_head": 3, "down_proj": 5}})):
        targets = ["q_proj", "down_proj", "lm_head", "embed_tokens"]
        adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=targets, **options))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        for name, module in adapted.named_modules():
            if name.endswith(("down_proj", "embed_tokens", "layers.0.self_attn.q_proj")):
                module.scale_layer(0.5)
        expected = by_hand(base, [(copy.deepcopy(adapted), 1.0)])
        model = GuidedForCausalLM.from_members(adapted.get_base_model(), {"r": adapted})
        model.save_pretrained(tmp_path / str(number))
        again = GuidedForCausalLM.from_pretrained(tmp_path / str(number))
        for each in (model, again):
            torch.testing.assert_close(each(IDS).logits, expected, atol=1e-5, rtol=1e-5)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_adapters_that_do_not_fit(members: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_lora(tiny_model(seed=0, hidden=64), tmp_path / "wide", seed=1, base_path=str(members["base"]))
    compose(members["base"], {"r": other}, tmp_path / "g1")
    with pytest.raises(MemberError, match="does not fit its model"):
        GuidedForCausalLM.from_pretrained(tmp_path / "g1")
    deep = tiny_lora(tiny_model(seed=0, layers=3), tmp_path / "deep", seed=1, base_path=str(members["base"]))
    compose(members["base"], {"r": deep}, tmp_path / "g2")
    with pytest.raises(MemberError, match=r"\d+ of its tensors have no place there"):
        GuidedForCausalLM.from_pretrained(tmp_path / "g2")


def test_adapters_of_other_kinds(members: dict[str, Path], tmp_path: Path) -> None:
    settings = members["on-base-1"] / "adapter_config.json"
    record = json.loads(settings.read_text())
    settings.write_text(json.dumps({**record, "modules_to_save": ["lm_head"]}))
    with pytest.raises(MemberError, match=r"has the setting modules_to_save=.*merge it"):
        compose(members["base"], {"r": members["on-base-1"]}, tmp_path / "guided")
    settings.write_text(json.dumps({**record, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(MemberError, match=r"which is not there any more; .*--adapter-model r=MODEL"):
        compose(members["base"], {"r": members["on-base-1"]}, tmp_path / "guided")
    report = compose(
        members["base"], {"r": members["on-base-1"]}, tmp_path / "guided", adapter_models={"r": str(members["base"])}
    )
    assert report.config.rewards == [{"name": "r", "weight": 1.0, "adapter": str(members["on-base-1"])}]


def test_a_mistyped_folder(members: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Said wherever it may be given, with the folder that is meant; the hub is asked for it all the same."""
    base, full = members["base"], members["full"]
    monkeypatch.chdir(base.parent)
    mistyped, meant = f"{base.name}x", rf"here \(did you mean '.*{base.name}'"
    for arguments in ((mistyped, {"r": full}), (str(base), {"r": mistyped}), (f"./{mistyped}", {"r": full})):
        with pytest.raises(MemberError, match=rf"there is no folder '.*{mistyped}' {meant}"):
            compose(*arguments, base.parent / "never")
    with pytest.raises(MemberError, match=r"there is no folder 'ORG/NAME' here, and as a hub id it fails"):
        compose("ORG/NAME", {"r": full}, base.parent / "never")
    for reference in (mistyped, f"./{mistyped}"):
        with pytest.raises(MemberError, match=f"did you mean '{base.name}'"):
            open_files(reference)


def test_compose_refuses(members: dict[str, Path], tmp_path: Path) -> None:
    base, full = members["base"], members["full"]
    swapped = save_member(
        tiny_model(seed=9), tmp_path / "swapped", tiny_tokenizer(words=[f"w{39 - i}" for i in range(40)])
    )
    cases: list[tuple[type[GenarmError], str, dict[str, Any]]] = [
        (MemberError, "there is no folder", {"base": "/no/such/model"}),
        (MemberError, "there is no folder", {"rewards": {"r": "./missing"}}),
        (MemberError, "is an adapter; merge it", {"base": members["on-base-1"]}),
        (ConfigError, "at least one reward", {"rewards": {}}),
        (ConfigError, "cannot be named 'base'", {"rewards": {"base": full}}),
        (ConfigError, "cannot be named 'a b'", {"rewards": {"a b": full}}),
        (GenarmError, "no reward is named 'x'", {"weights": {"x": 1.0}}),
        (GenarmError, "finite", {"weights": {"r": float("nan")}}),
        (ConfigError, "no member named 'x'", {"settings": {"x": {"dtype": "float16"}}}),
        (ConfigError, "dtype is 'float8'", {"settings": {"r": {"dtype": "float8"}}}),
        (ConfigError, "is a full model", {"adapter_models": {"r": str(base)}}),
        (VocabularyError, "different vocabularies", {"rewards": {"r": swapped}}),
    ]
    for kind, message, options in cases:
        arguments = {"base": base, "rewards": {"r": full}, "output": tmp_path / "out", **options}
        with pytest.raises(kind, match=message):
            compose(**arguments)
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    with pytest.raises(DataError, match="already exists and is not empty"):
        compose(base, {"r": full}, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("reward", ["full", "on-base-1", "on-small-1"])
def test_rewards_that_learned_on_other_prompts_are_named(reward: str, members: dict[str, Path], tmp_path: Path) -> None:
    def notes(output: str) -> str:
        return "\n".join(compose(members["base"], {"r": members[reward]}, tmp_path / output).notes)

    tokenizer = tiny_tokenizer()
    template = "{{ messages[0]['content'] }}{{ enable_thinking }}"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(members["base"])
    for model in ("full", "small"):
        tokenizer.save_pretrained(members[model])
    settings = members[reward] / "train_config.toml"
    assert notes("same") == ""
    settings.write_text("raw = false\nlora_rank = 8\n")
    assert notes("trained the same way") == ""
    settings.write_text('template_arg = ["enable_thinking=false", "depth=2"]\n')
    assert "--template-arg enable_thinking=false; give that" in notes("first argument")
    assert "--template-arg depth=2; give that" in notes("second argument")
    settings.write_text("raw = true\n")
    assert "trained on text without a chat template" in notes("raw")
    for number, foreign in enumerate((b"lr: 1e-4\n", b"\xff\xfe", b'template_arg = "depth=2"\n')):
        settings.write_bytes(foreign)
        assert notes(f"another tool's file {number}") == ""
    settings.unlink()
    tokenizer.chat_template = template + " "
    tokenizer.save_pretrained(members[reward])
    assert "another chat template" in notes("template")


def test_a_folder_that_lost_a_member(members: dict[str, Path], tmp_path: Path) -> None:
    compose(members["base"], {"r": members["full"]}, tmp_path / "guided")
    shutil.rmtree(members["full"])
    with pytest.raises(MemberError, match="does not exist; move it back"):
        GuidedForCausalLM.from_pretrained(tmp_path / "guided")


def test_a_member_that_changed_its_vocabulary_is_refused_at_load(members: dict[str, Path], tmp_path: Path) -> None:
    compose(members["base"], {"r": members["full"]}, tmp_path / "guided")
    tiny_tokenizer(words=[f"v{i}" for i in range(40)]).save_pretrained(members["full"])
    with pytest.raises(VocabularyError, match="'w0' against 'v0'"):
        GuidedForCausalLM.from_pretrained(tmp_path / "guided")


def test_pickled_weights_are_refused(members: dict[str, Path], tmp_path: Path) -> None:
    compose(members["base"], {"r": members["full"]}, tmp_path / "guided")
    state = AutoModelForCausalLM.from_pretrained(members["full"]).state_dict()
    (members["full"] / "model.safetensors").unlink()
    torch.save(state, members["full"] / "pytorch_model.bin")
    with pytest.raises(MemberError, match="cannot load 'r'"):
        GuidedForCausalLM.from_pretrained(tmp_path / "guided")


def test_other_wrong_uses(members: dict[str, Path], tmp_path: Path) -> None:
    guided = write_all(members, tmp_path / "guided")
    with pytest.raises(UnsupportedError, match="does not take 'state_dict'"):
        GuidedForCausalLM.from_pretrained(guided, state_dict={})
    with pytest.raises(UnsupportedError, match="does not take 'state_dict'"):
        GuidedForCausalLM.from_pretrained(guided).save_pretrained(tmp_path / "x", state_dict={"a": torch.zeros(1)})
    with pytest.raises(MemberError, match="not from a configuration alone"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(guided))
    with pytest.raises(ConfigError, match="two rewards are named 'a'"):
        GuidedConfig(base={"model": "b"}, rewards=[{"name": "a", "model": "m"}, {"name": "a", "model": "m"}])
    with pytest.raises(ConfigError, match="unknown key 'weigth'"):
        GuidedConfig(base={"model": "b"}, rewards=[{"name": "a", "model": "m", "weigth": 2}])


def test_the_auto_classes_know_a_guided_folder_whatever_is_imported_first(
    members: dict[str, Path], tmp_path: Path
) -> None:
    guided = write_all(members, tmp_path / "guided")
    for imports in (
        "import genarm; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import genarm",
        "import genarm; from transformers import Trainer, AutoModelForCausalLM",
        "import transformers, genarm; from transformers import AutoConfig, AutoTokenizer, AutoModelForCausalLM; "
        "AutoConfig.from_pretrained(F); AutoTokenizer.from_pretrained(F)",
    ):
        program = f"F = {str(guided)!r}; {imports}; print(type(AutoModelForCausalLM.from_pretrained(F)).__name__)"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.stdout.strip() == "GuidedForCausalLM", done.stderr
