"""What callers pass to any model of transformers: a guided model at weight 0 answers as its plain base does."""

from __future__ import annotations

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from builders.tiny import save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm import GuidedConfig, GuidedForCausalLM
from genarm.errors import UnsupportedError, WeightsError
from genarm.lab.prefix import Prefix
from genarm.model.compose import compose

IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a guided folder on it whose reward has weight 0."""
    folder = tmp_path_factory.mktemp("models")
    base = save_member(tiny_model(seed=0), folder / "base")
    arm = save_member(tiny_model(seed=1), folder / "arm")
    compose(base, {"r": arm}, folder / "guided", weights={"r": 0.0})
    return folder


@pytest.fixture(scope="module")
def pair(root: Path) -> tuple[PreTrainedModel, GuidedForCausalLM]:
    models = [AutoModelForCausalLM.from_pretrained(root / name) for name in ("base", "guided")]
    for model in models:
        model.generation_config.eos_token_id = None
    return models[0], models[1]


def outcome(action: Any) -> Any:
    """What `action` returns, or the kind of its failure."""
    try:
        return action()
    except (ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:
        return type(error) if not isinstance(error, UnsupportedError) else TypeError


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"attn_implementation": "eager"},
        {"attn_implementation": {"": "eager"}},
        {"attn_implementation": "nonsense"},
        {"dtype": "bfloat16"},
        {"torch_dtype": torch.bfloat16},
        {"device_map": {"": "cpu"}},
        {"subfolder": "", "low_cpu_mem_usage": True, "weights_only": True, "tp_plan": None, "key_mapping": {}},
        {"use_safetensors": True, "offload_buffers": False, "from_tf": False, "disable_mmap": True, "mirror": "x"},
        {"use_cache": False},
        {"eos_token_id": 5},
        {"generation_config": GenerationConfig(eos_token_id=3, max_new_tokens=2)},
        {"output_loading_info": True},
        {"nonsense": 3},
        {"hidden_size": 16},
        {"variant": "fp16"},
        {"use_safetensors": False},
        {"trust_remote_code": True},
    ],
)
def test_loading_takes_what_a_plain_model_takes(root: Path, options: dict[str, Any]) -> None:
    def loaded(name: str) -> Any:
        found = AutoModelForCausalLM.from_pretrained(root / name, **options)
        model, info = found if isinstance(found, tuple) else (found, {})
        running = {member.model for member in getattr(model, "members", ())} | {model}
        return (
            {m.config._attn_implementation for m in running},
            {(m.dtype, m.config.dtype) for m in running},
            {m.device for m in running},
            (model.config.use_cache, model(IDS).past_key_values is None, model.config.eos_token_id),
            (
                torch.tensor(model.generation_config.eos_token_id).flatten().tolist(),
                model.generation_config.max_new_tokens,
            ),
            not any(info.values()),
            model.generate(IDS, do_sample=False, max_new_tokens=5).tolist(),
        )

    plain, guided = (outcome(lambda name=name: loaded(name)) for name in ("base", "guided"))
    if isinstance(plain, type):  # refused by both, whatever transformers' own way to say it is
        assert isinstance(guided, type)
    else:
        assert guided == plain


def test_settings_reach_the_members_by_every_way(root: Path, tmp_path: Path) -> None:
    def running(model: Any) -> set[tuple[str, torch.dtype]]:
        models = [model, *(member.model for member in model.members)]
        return {(m.config._attn_implementation, m.dtype) for m in models}

    folder = root / "guided"
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.bfloat16}
    config = AutoConfig.from_pretrained(folder, **options)
    for model in (
        GuidedForCausalLM.from_pretrained(folder, **options),
        GuidedForCausalLM.from_pretrained(folder, config=config),
        AutoModelForCausalLM.from_pretrained(folder, config=config),
        AutoModelForCausalLM.from_pretrained(root, subfolder="guided", **options),
    ):
        assert running(model) == {("eager", torch.bfloat16)}
    model = GuidedForCausalLM.from_pretrained(folder)
    assert running(model) == {("sdpa", torch.float32)}
    model.set_attn_implementation("eager")
    assert running(model) == {("eager", torch.float32)}
    eager = AutoModelForCausalLM.from_pretrained(root / "base", attn_implementation="eager")
    torch.testing.assert_close(model(IDS).logits, eager(IDS).logits.log_softmax(-1))
    config.save_pretrained(tmp_path)  # how a model happens to be run is no part of its folder
    assert AutoConfig.from_pretrained(tmp_path).dtype is None


def test_the_configuration_answers_with_the_base(root: Path, tmp_path: Path) -> None:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "use_cache")
    base, config = (AutoConfig.from_pretrained(root / name) for name in ("base", "guided"))
    assert [getattr(config, name) for name in names] == [getattr(base, name) for name in names]
    before = config.to_dict()
    model = GuidedForCausalLM.from_pretrained(root / "guided")
    model.config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    for config in (again, copy.deepcopy(model.config)):
        assert {**config.to_dict(), "_name_or_path": ""} == {**before, "_name_or_path": ""}
    assert not set(names) & set(before)
    memory = GuidedForCausalLM.from_members(tiny_model("gpt2"), {"r": tiny_model()})
    assert (memory.config.hidden_size, memory.config.num_hidden_layers) == (32, 2)
    empty = GuidedConfig()
    assert not any(hasattr(empty, name) for name in names)


def test_trust_remote_code_finds_the_installed_package(root: Path, tmp_path: Path) -> None:
    """In a process that never imported it, where files are loaded by scripts that know nothing of it."""
    code = (
        "import torch; from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(root / 'guided')!r}, trust_remote_code=True)\n"
        f"plain = A.from_pretrained({str(root / 'base')!r})\n"
        "ids = torch.tensor([[7, 8, 9]])\n"
        "assert torch.allclose(model(ids).logits, plain(ids).logits.log_softmax(-1), atol=1e-5)\n"
        f"model.save_pretrained({str(tmp_path / 'copy')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert sorted(p.name for p in (tmp_path / "copy").glob("*.py")) == ["genarm_model.py"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")) is GuidedForCausalLM


# --- forward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"cache_position": torch.arange(4)},
        {"token_type_ids": torch.zeros_like(IDS)},
        {"labels": IDS, "num_items_in_batch": 3},
        {"labels": IDS, "shift_labels": IDS},
        {"output_router_logits": False, "head_mask": None, "output_attentions": False, "return_dict": True},
        {"attention_mask": torch.ones(2, 1, 4, 4).tril().bool()},
        {"position_ids": torch.arange(4)[None]},
        {"tokenizer": tiny_tokenizer()},
    ],
)
def test_forward_takes_what_a_plain_model_takes(pair: Any, options: dict[str, Any]) -> None:
    plain, guided = (model(IDS, **options) for model in pair)
    torch.testing.assert_close(guided.logits, plain.logits.log_softmax(-1))
    if "labels" in options:
        torch.testing.assert_close(guided.loss, plain.loss)


def test_token_types_reach_the_members_that_have_them() -> None:
    base, arm = tiny_model("gpt2", seed=0), tiny_model("gpt2", seed=1)
    guided = GuidedForCausalLM.from_members(base, {"r": arm})
    types = torch.tensor([[6, 6, 7, 7], [6, 7, 7, 7]])
    logs = [model(IDS, token_type_ids=types).logits.log_softmax(-1) for model in (base, arm)]
    found = guided(IDS, token_type_ids=types).logits
    torch.testing.assert_close(found, (logs[0] + logs[1]).log_softmax(-1))
    options: dict[str, Any] = {"token_type_ids": types, "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    expected = base.generate(IDS, **options)
    assert torch.equal(guided.generate(IDS, reward_weights={"r": 0}, **options), expected)


def test_an_argument_that_nobody_takes_is_an_error(pair: Any) -> None:
    for name in ("reward_weight", "num_logits_to_keep"):
        with pytest.raises(UnsupportedError, match=f"{name!r}; leave it out"):
            pair[1](IDS, **{name: 1})
        for model in pair:
            with pytest.raises(ValueError, match="not used by the model"):
                model.generate(IDS, max_new_tokens=2, **{name: 1})
    with pytest.raises(UnsupportedError, match="router logits"):
        pair[1](IDS, output_router_logits=True)


def test_a_prefill_gives_the_output_layer_contiguous_states() -> None:
    """Of states that are no unbroken memory, torch copies a frozen output layer for every row."""
    model = GuidedForCausalLM.from_members(tiny_model(seed=0), {"r": tiny_model(seed=1)})
    seen: list[bool] = []
    for member in model.members:
        head = member.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    whole = model(IDS).logits
    for keep in (1, 2, torch.tensor([3])):
        kept = model(IDS, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, whole[:, -kept.shape[1] :])
    model.generate(IDS, max_new_tokens=2)
    prefix = Prefix(model.base)
    prefix.extend([[7, 8, 9], [10, 11, 12]])
    assert len(seen) > 10
    assert all(seen)


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer": tiny_tokenizer()},
        {"cache_position": torch.arange(4)},
        {"token_type_ids": torch.zeros_like(IDS)},
        {"return_dict": True},
        {"encoder_outputs": None, "head_mask": None, "cu_seq_lens_q": None, "output_router_logits": False},
        {"position_ids": torch.arange(4)[None].repeat(2, 1)},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static"},
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "num_beams": 2},
        {"guidance_scale": 1.5, "use_cache": False},
        {"use_model_defaults": True},
        {"seed": 3},
    ],
)
def test_generate_takes_what_a_plain_model_takes(pair: Any, options: dict[str, Any]) -> None:
    plain, guided = (
        outcome(lambda m=model: m.generate(IDS, do_sample=False, max_new_tokens=8, **options).tolist())
        for model in pair
    )
    assert guided == plain


def test_stop_strings_healing_and_the_pipelines_stop_sequence() -> None:
    letters = sorted(c for c in pre_tokenizers.ByteLevel.alphabet() if c.isascii() or c == "Ġ")
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>", bos_token="<s>")
    base, arm = (tiny_model(seed=seed, vocab_size=len(tokenizer)) for seed in (0, 1))
    base.generation_config.eos_token_id = None
    guided = GuidedForCausalLM.from_members(base, {"r": arm}, weights={"r": 0.0})
    ids = tokenizer("Once upon", return_tensors="pt").input_ids
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "tokenizer": tokenizer}
    whole = base.generate(ids, **options)
    stop = tokenizer.decode(whole[0, ids.shape[1] + 3 : ids.shape[1] + 5])
    for more in ({"stop_strings": [stop]}, {"token_healing": True}):
        plain, found = (model.generate(ids, **options, **more) for model in (base, guided))
        assert torch.equal(found, plain)
        assert plain.shape[1] < whole.shape[1] or "token_healing" in more
    writers = [pipeline("text-generation", model=model, tokenizer=tokenizer) for model in (base, guided)]
    for more in ({"stop_sequence": stop}, {"tokenizer_encode_kwargs": {"padding": True}}, {"prefix": "a"}):
        plain, found = (write(["Once", "upon"], do_sample=False, max_new_tokens=9, **more) for write in writers)
        assert found == plain


def test_what_a_guided_model_cannot_do_in_generate(pair: Any) -> None:
    guided = pair[1]
    for call in (
        lambda: guided.generate_batch([[7, 8]]),
        lambda: guided.init_continuous_batching(),
        lambda: guided.continuous_batching_context_manager(),
        lambda: guided.generate(IDS, cache_implementation="paged", max_new_tokens=2),
    ):
        with pytest.raises(UnsupportedError, match=r"continuous batching .* genarm\.engine"):
            call()
    with pytest.raises(UnsupportedError, match="leave early"):
        guided.generate(IDS[:1], assistant_early_exit=1, max_new_tokens=2)


def test_a_member_that_keeps_a_state_is_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=46, hidden_size=32, num_hidden_layers=2, state_size=8))
    for base, arm in ((mamba, tiny_model()), (tiny_model(), mamba)):
        with pytest.raises(UnsupportedError, match="MambaForCausalLM, which keeps no keys and values"):
            GuidedForCausalLM.from_members(base, {"r": arm})


# --- the weights of a call ------------------------------------------------------------------------------------------


NEGATIVE = torch.tensor([[0, 21, 22], [23, 24, 25]])
NEGATIVE_MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])


def guided_by_hand(model: Any, ids: torch.Tensor, negative: torch.Tensor, scale: float, **options: Any) -> torch.Tensor:
    """Classifier-free guidance without caches, one row."""
    for _ in range(8):
        wanted, unwanted = (model(x, use_cache=False, **options).logits[:, -1] for x in (ids, negative))
        following = (scale * (wanted - unwanted) + unwanted).argmax(-1, keepdim=True)
        ids, negative = torch.cat([ids, following], dim=1), torch.cat([negative, following], dim=1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_negative_prompts_keep_the_weights_of_the_call(use_cache: bool, beams: int) -> None:
    """At weights other than the folder's own, a row each, against two forwards by hand."""
    model = GuidedForCausalLM.from_members(tiny_model(seed=0), {"a": tiny_model(seed=1), "b": tiny_model(seed=2)})
    model.generation_config.eos_token_id = None
    weights = torch.tensor([[0.0, 2.0], [1.5, -0.5]])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "guidance_scale": 1.5, "use_cache": use_cache}
    if beams > 1:  # rows of several beams are alike: as many copies of one prompt are searched for one beam
        options["num_return_sequences"] = beams
        options |= {"do_sample": True, "temperature": 1e-4}
    found = model.generate(
        IDS,
        reward_weights=weights,
        negative_prompt_ids=NEGATIVE.repeat_interleave(beams, dim=0),
        negative_prompt_attention_mask=NEGATIVE_MASK.repeat_interleave(beams, dim=0),
        **options,
    )
    for i, row in enumerate(found):
        mine = slice(i // beams, i // beams + 1)
        negative = NEGATIVE[mine, 1:] if i // beams == 0 else NEGATIVE[mine]
        expected = guided_by_hand(model, IDS[mine], negative, 1.5, reward_weights=weights[mine])
        assert torch.equal(row, expected[0])


def test_weights_of_a_call_end_with_it_and_an_own_forward_has_its_own(pair: Any) -> None:
    guided = pair[1]
    outside = guided(IDS).logits
    guided.generate(IDS, reward_weights={"r": 2}, max_new_tokens=2)
    assert torch.equal(guided(IDS).logits, outside)
    with pytest.raises(WeightsError):
        guided.generate(IDS, reward_weights={"other": 2}, max_new_tokens=2)
    assert torch.equal(guided(IDS).logits, outside)
    other = GuidedForCausalLM.from_members(pair[0], {"r": tiny_model(seed=1)}, weights={"r": 1.0})
    expected = other(IDS).logits
    seen: list[torch.Tensor] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.extend([guided(IDS).logits, guided(IDS, reward_weights={"r": 0}).logits, other(IDS).logits])
        return scores

    guided.generate(IDS, reward_weights={"r": 1}, max_new_tokens=1, logits_processor=[look])
    for found, right in zip(seen, (expected, outside, expected), strict=True):
        torch.testing.assert_close(found, right)


# --- threads --------------------------------------------------------------------------------------------------------


def test_threads_share_models_adapters_and_a_base(tmp_path: Path) -> None:
    """Two guided models on one base with three adapters, and the base itself, each from a thread of its own."""
    from peft import PeftModel

    base = tiny_model(seed=0)
    for i in range(3):
        tiny_lora(base, tmp_path / f"a{i}", seed=i, base_path="base")
    peft = PeftModel.from_pretrained(base, tmp_path / "a0", adapter_name="a0")
    arms = {"a": peft, "b": PeftModel.from_pretrained(base, tmp_path / "a1", adapter_name="a1")}
    first = GuidedForCausalLM.from_members(base, arms, weights={"a": 1.0, "b": -0.5})
    third = PeftModel.from_pretrained(base, tmp_path / "a2", adapter_name="a2")
    second = GuidedForCausalLM.from_members(base, {"c": third})
    for model in (base, first, second):
        model.generation_config.eos_token_id = None

    def reply(i: int) -> list[list[int]]:
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
        if i % 4 == 3:
            return base.generate(IDS + i % 3, **options).tolist()  # type: ignore[no-any-return]
        if i % 4 == 2:
            return second.generate(IDS + i % 3, **options, reward_weights={"c": 0.5 + i}).tolist()  # type: ignore[no-any-return]
        weights = {"a": i % 4, "b": 1 - i % 3}
        more = {"guidance_scale": 1.3} if i % 3 == 0 else {}
        return first.generate(IDS + i % 3, reward_weights=weights, **options, **more).tolist()  # type: ignore[no-any-return]

    alone = [reply(i) for i in range(16)]
    assert len({str(r) for r in alone}) > 8
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(reply, range(16)))
    finally:
        sys.setswitchinterval(before)
    assert together == alone


def test_a_failed_forward_frees_the_model_for_other_threads() -> None:
    model = GuidedForCausalLM.from_members(tiny_model(seed=0), {"r": tiny_model(seed=1)})
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: model(IDS).logits.shape).result(timeout=60) == (2, 4, 46)
