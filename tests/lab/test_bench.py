"""`genarm bench decode` from start to end on tiny models, and each part against what it should say."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders.tiny import SHARED, save_member, tiny_model
from genarm.cli.main import build_parser, main
from genarm.engine import Engine, EngineOptions, Request
from genarm.lab.bench.agreement import Pair, arm_that_agrees, make_pair, overlap
from genarm.lab.bench.contestants import make_task, naive
from genarm.lab.bench.counting import acceptance, acceptance_options, count
from genarm.lab.bench.figures import (
    FULL,
    HEAD,
    LORA,
    NAIVE,
    TRANSFORMERS,
    TUNED,
    TWO_HEADS,
    TWO_LORAS,
    TWO_TUNED,
    TWO_WISHES,
    UNGUIDED,
    WISH,
    Figure,
    Target,
    at_streams,
    speculating,
    targets_for,
    time_over_unguided,
    timed_ratios,
)
from genarm.lab.bench.memory import tensor_bytes, weigh
from genarm.lab.bench.models import bytes_per_token, random_adapters, random_model, twin, weight_bytes, word_tokenizer
from genarm.lab.bench.report import command
from genarm.lab.bench.settings import DecodeSettings
from genarm.lab.bench.shapes import SHAPES
from genarm.lab.bench.timing import copy_bandwidth, per_token, spread, take_turns
from genarm.lab.machine import code_version
from genarm.model.modeling import GuidedForCausalLM
from genarm.sampling import Sampling

TINY = SHAPES["tiny"]


def tiny_pair(seed: int = 0, dtype: torch.dtype = torch.float32) -> Pair:
    return make_pair(TINY, dtype=dtype, device="cpu", seed=seed)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of the command with a real pair, as its output folder, standard output and standard error."""
    import contextlib
    import io

    root = tmp_path_factory.mktemp("bench")
    base, arm = (save_member(tiny_model(seed=i, layers=3 - 2 * i), root / f"m{i}") for i in range(2))
    (root / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    words = ["--base-shape", "tiny", "--dtype", "float32", "--device", "cpu", "--tokens", "24", "--rounds", "2"]
    words += ["--streams", "3", "--agreement", "0.9", "0.6", "--prompts", str(root / "prompts.jsonl")]
    words += ["--real", str(base), str(arm), "--output", str(root / "out")]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["bench", "decode", *words]) == 0
    return root / "out", out.getvalue(), err.getvalue()


def test_everything_is_measured_in_every_round(done: Any) -> None:
    folder, _, _ = done
    record = json.loads((folder / "decode.json").read_text(encoding="utf-8"))
    timed = record["timed"]
    contestants = {TRANSFORMERS, UNGUIDED, NAIVE, LORA, TWO_LORAS, FULL, speculating(0.6), speculating(0.9)}
    contestants |= {TUNED, TWO_TUNED, WISH, TWO_WISHES, HEAD, TWO_HEADS, at_streams(UNGUIDED, 3), at_streams(HEAD, 3)}
    assert set(timed["seconds"]) == contestants
    assert all(len(row) == 2 and min(row) > 0 for row in timed["seconds"].values())
    assert list(timed["tokens_per_second"]) == ["1", "3"]
    assert all(len(row) == 2 and min(row) > 0 for row in timed["tokens_per_second"].values())
    figures = {figure["name"]: figure for figure in record["figures"]}
    for i in range(2):
        expected = timed["seconds"][LORA][i] / timed["seconds"][UNGUIDED][i]
        assert figures[time_over_unguided(LORA)]["values"][i] == pytest.approx(expected)
    assert record["settings"]["agreement"] == [0.9, 0.6]
    assert record["machine"]["threads"] == torch.get_num_threads()


def test_speculation_is_counted(done: Any) -> None:
    record = json.loads((done[0] / "decode.json").read_text(encoding="utf-8"))
    low, high = record["timed"]["speculated"]
    assert (low["wanted"], high["wanted"]) == (0.6, 0.9)
    for row in (low, high):
        assert row["made"] == pytest.approx(row["wanted"], abs=0.005)
        assert row["counts"]["tokens"] == 8 * 23
        assert row["counts"]["tokens"] - row["counts"]["base_passes"] == row["counts"]["accepted"]
    assert high["counts"]["base_passes"] < low["counts"]["base_passes"] < low["counts"]["tokens"]
    real = record["real"]
    assert real["prompts"] == 2
    assert real["control"]["base_passes"] == real["control"]["tokens"]
    assert (real["control"]["drafted"], real["control"]["accepted"]) == (0, 0)
    drafting = real["drafting"]
    assert 0 < drafting["base_passes"] <= drafting["tokens"] < drafting["drafted"]


def test_the_page_has_the_figures_and_what_they_were_measured_on(done: Any) -> None:
    folder, out, err = done
    page = (folder / "decode.md").read_text(encoding="utf-8")
    assert out == page
    assert "round 2 of 2" in err
    record = json.loads((folder / "decode.json").read_text(encoding="utf-8"))
    for figure in record["figures"]:
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {figure['name']} |"))
        assert f"| {figure['median']:.3f}" in line
        assert line.endswith({None: "| – |", True: "| yes |", False: "| no |"}[figure["met"]])
    for told in (record["date"], record["code"], record["machine"]["processor"], record["machine"]["torch"]):
        assert told in page
    assert f"`{record['command']}`" in page


def test_the_command_that_is_noted_measures_the_same(done: Any) -> None:
    record = json.loads((done[0] / "decode.json").read_text(encoding="utf-8"))
    program, *words = shlex.split(record["command"])
    assert program == "genarm"
    arguments = build_parser().parse_args(words)
    for name, value in record["settings"].items():
        given = getattr(arguments, name)
        assert (str(given) if isinstance(given, Path) else given) == value
    assert command(DecodeSettings()).startswith(
        "genarm bench decode --base-shape 200m --tokens 64 --rounds 7 --streams 1"
    )


MISTAKES = {
    "tokens": (["--tokens", "3"], "--tokens is 3; it must be from 8"),
    "rounds": (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
    "streams": (["--streams", "1", "0"], "--streams has 0; each must be at least 1"),
    "agreement": (["--agreement", "1"], "--agreement has 1; each must be above 0 and below 1"),
    "little agreement": (["--agreement", "0.01"], "--agreement is 0.01; models of these shapes can have one between"),
    "seed": (["--seed", "-1"], "--seed is -1"),
    "device": (["--device", "gpu7"], "cannot use the device 'gpu7'"),
    "all devices": (["--device", "auto"], "--device is auto; everything is measured on one device"),
    "prompts alone": (["--prompts", "x.jsonl"], "--prompts are for a real pair"),
    "no such pair": (["--real", "/no/such", "/no/such"], "there is no folder '/no/such' here"),
    "output": (["--output", str(Path(__file__).parent)], "already exists and is not empty"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_one_line(case: str, capsys: Any) -> None:
    words, message = MISTAKES[case]
    assert main(["bench", "decode", "--base-shape", "tiny", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = (line for line in captured.err.splitlines() if "error" in line)
    assert line.startswith("genarm bench: error: ")
    assert message in line


def test_nothing_stays_where_a_run_fails(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    assert main(["bench", "decode", "--base-shape", "tiny", "--agreement", "0.01", "--output", str(output)]) == 2
    assert list(tmp_path.iterdir()) == []


# --- agreement --------------------------------------------------------------------------------------------------------


def exact_overlaps(pair: Pair, arm: torch.nn.Module, ids: list[int], weight: float) -> np.ndarray:
    """Σ_v min(p, q) after each token of `ids`, by hand: p ∝ b · a^w, q ∝ a^(1+w)."""
    with torch.no_grad():
        base_TV, arm_TV = (np.exp(m(torch.tensor([ids])).logits[0].double().numpy()) for m in (pair.base, arm))
    p_TV, q_TV = base_TV * arm_TV**weight, arm_TV ** (1 + weight)
    return np.minimum(p_TV / p_TV.sum(-1, keepdims=True), q_TV / q_TV.sum(-1, keepdims=True)).sum(-1)


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.95])
def test_a_pair_agrees_as_much_as_is_wanted(wanted: float) -> None:
    pair = tiny_pair(seed=3)
    arm, made = arm_that_agrees(pair, wanted)
    exact = exact_overlaps(pair, arm, pair.ids_T.tolist(), 1.0)
    assert made == pytest.approx(float(exact.mean()), abs=1e-4)
    assert made == pytest.approx(wanted, abs=1e-3)


def test_overlap_is_that_of_the_definition_at_other_weights() -> None:
    pair = tiny_pair()
    arm = arm_that_agrees(pair, 0.7)[0]
    ids = pair.ids_T.tolist()
    with torch.no_grad():
        base_TV, arm_TV = (model(torch.tensor([ids])).logits[0] for model in (pair.base, arm))
    for weight in (0.5, 2.0):
        found = overlap(base_TV, arm_TV, weight).numpy()
        np.testing.assert_allclose(found, exact_overlaps(pair, arm, ids, weight), atol=1e-4)


def test_without_a_turn_both_models_are_one_and_no_layer_is_idle() -> None:
    pair = tiny_pair()
    ids_BT = pair.ids_T[None]
    with torch.no_grad():
        base_TV, arm_TV = (m(ids_BT).logits[0].log_softmax(-1) for m in (pair.base, pair.arm))
        assert (base_TV - arm_TV).abs().max() < 0.1
        for layer in pair.base.model.layers:
            assert layer.mlp.down_proj.weight.abs().max() > 0
            assert layer.self_attn.o_proj.weight.abs().max() > 0
    guided = (base_TV + arm_TV).softmax(-1)
    entropy = float(-(guided * guided.log()).sum(-1).mean())
    assert 2 < entropy < 4.5


def test_the_engine_accepts_as_many_drafts_as_the_models_agree_on() -> None:
    """Against the agreement at the very places where the engine drafted."""
    pair = tiny_pair(seed=1)
    arm, _ = arm_that_agrees(pair, 0.7)
    task = make_task(prompts=24, prompt_tokens=8, tokens=40, vocabulary=256, seed=2)
    requests = [task.request(i, seed=i) for i in range(24)]
    model = GuidedForCausalLM.from_members(twin(pair.base), {"arm": twin(arm)})
    with Engine(model, word_tokenizer(256), acceptance_options(48)) as engine:
        seen = acceptance(engine, requests)
        replies = engine.generate(requests)
    exact = []
    for i, reply in enumerate(replies):
        ids = [*task.prompt(i), *reply.token_ids]
        exact.append(exact_overlaps(pair, arm, ids, 1.0)[8:-1].mean())
    assert seen.low - 0.02 < float(np.mean(exact)) < seen.high + 0.02
    assert seen.n > 400


def test_counts_are_those_of_the_replies() -> None:
    pair = tiny_pair(seed=1)
    arm, _ = arm_that_agrees(pair, 0.8)
    task = make_task(prompts=3, prompt_tokens=8, tokens=20, vocabulary=256, seed=0)
    requests = [task.request(i, seed=i) for i in range(3)]
    for speculate in (0, 3):
        model = GuidedForCausalLM.from_members(twin(pair.base), {"arm": twin(arm)})
        options = EngineOptions(streams=1, context=28, speculate=speculate, adapt=False)
        with Engine(model, word_tokenizer(256), options) as engine:
            counts = count(engine, requests)
        assert counts.tokens == 3 * 19
        assert counts.base_passes == 3 * 19 - counts.accepted  # each pass gives one token besides those accepted
        assert (counts.passes_per_token < 1) == bool(speculate)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_an_arm_has_an_eighth_of_its_base(name: str) -> None:
    shapes = SHAPES[name]
    assert shapes.arm.parameters / shapes.base.parameters == pytest.approx(1 / 8, rel=0.03)
    assert all(shape.hidden % (2 * shape.heads) == 0 for shape in (shapes.base, shapes.arm))


def test_parameters_are_those_of_the_model() -> None:
    assert 6.73e9 < SHAPES["7b"].base.parameters < 6.75e9
    for shape in (TINY.base, TINY.arm):
        model = random_model(shape, dtype=torch.float32, device="cpu", seed=0)
        assert sum(p.numel() for p in model.parameters()) == shape.parameters
        assert weight_bytes(model) == 4 * shape.parameters


def test_a_twin_shares_memory_but_no_modules() -> None:
    model = random_model(TINY.base, dtype=torch.float32, device="cpu", seed=0)
    ids_BT = torch.arange(20)[None]
    before = model(ids_BT).logits
    other = twin(model)
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(model.parameters(), other.parameters(), strict=True))
    adapters = random_adapters(other, ("one", "two"), seed=0)
    guided = GuidedForCausalLM.from_members(other, adapters)
    with Engine(guided, word_tokenizer(256), EngineOptions(context=64)) as engine:
        (token,) = engine.generate([Request(prompt=[1, 2], sampling=Sampling(max_new_tokens=1))])[0].tokens
        torch.testing.assert_close(model(ids_BT).logits, before, rtol=0, atol=0)
    assert len({token.base, *token.rewards.values()}) == 3
    assert model.config._attn_implementation == "sdpa"
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_naive_loop_samples_from_the_combination() -> None:
    """Against the exact distribution of a reply's second token, over many replies."""
    pair = tiny_pair()
    arm = arm_that_agrees(pair, 0.6)[0]
    seen: list[int] = []
    task = make_task(prompts=1, prompt_tokens=1, tokens=2, vocabulary=256, seed=0)

    class Watched:
        """The ARM, noting what it is fed after the prompt."""

        def __call__(self, ids_BT: torch.Tensor, **options: Any) -> Any:
            if options["past_key_values"].get_seq_length():
                seen.append(int(ids_BT))
            return arm(ids_BT, **options)

    run = naive(pair.base, Watched(), task, weight=2.0)  # type: ignore[arg-type]
    for number in range(400):
        assert run(number) > 0
    ids_BT = torch.tensor([task.prompt(0)])
    with torch.no_grad():
        base_V, arm_V = (model(ids_BT).logits[0, -1].double().log_softmax(-1) for model in (pair.base, arm))
    p_V = (base_V + 2 * arm_V).softmax(-1)
    best = p_V.topk(4).indices.tolist()
    share, mean = float(p_V[best].sum()), sum(token in best for token in seen) / len(seen)
    assert abs(mean - share) < 4 * math.sqrt(share * (1 - share) / len(seen))


def test_memory_is_that_of_base_and_adapters() -> None:
    base = TINY.base
    found = weigh(base, dtype=torch.float32, device="cpu", seed=0)
    assert found.base == 4 * base.parameters
    rank, attention, mlp = 8, 4 * 2 * base.hidden, 3 * (base.hidden + base.intermediate)
    adapters = 2 * base.layers * rank * (attention + mlp) * 4
    assert found.base + adapters <= found.engine < (found.base + adapters) * 1.05


def test_memory_counts_storages_once() -> None:
    before = tensor_bytes()
    whole = torch.ones(1000, dtype=torch.float64)
    views = [whole[i:] for i in range(5)]
    assert tensor_bytes() - before == 8000
    del whole
    assert tensor_bytes() - before == 8000
    views.clear()
    assert tensor_bytes() == before


def test_a_token_reads_weights_one_row_and_the_cache() -> None:
    shape = TINY.arm
    model = random_model(shape, dtype=torch.bfloat16, device="cpu", seed=0)
    numbers = shape.parameters - shape.vocabulary * shape.hidden + shape.hidden + 10 * 2 * shape.hidden * shape.layers
    assert bytes_per_token(model, 10) == 2 * numbers


# --- ratios -----------------------------------------------------------------------------------------------------------


def test_contestants_take_turns_and_warm_up() -> None:
    order: list[tuple[int, str]] = []

    def contestant(name: str) -> Any:
        def run(number: int) -> float:
            order.append((number, name))
            return 10.0 * number + ord(name)

        return run

    told: list[int] = []
    values = take_turns({name: contestant(name) for name in "abc"}, 3, told.append)
    assert ["".join(name for n, name in order if n == number) for number in range(4)] == ["abc", "bca", "cab", "abc"]
    assert values == {name: [10.0 * n + ord(name) for n in (1, 2, 3)] for name in "abc"}
    assert told == [0, 1, 2, 3]


def test_ratios_are_taken_round_by_round() -> None:
    seconds = {
        TRANSFORMERS: [4.0, 2.0, 9.0],
        UNGUIDED: [2.0, 1.0, 3.0],
        NAIVE: [6.0, 6.0, 6.0],
        LORA: [2.0, 1.5, 6.0],
        speculating(0.8): [1.0, 0.4, 1.8],
    }
    found = timed_ratios(seconds, {1: [10.0, 20.0, 5.0], 16: [60.0, 60.0, 60.0]})
    assert list(found.values()) == [
        [1.0, 1.5, 2.0],
        [0.5, 0.4, 0.6],
        [3.0, 4.0, 1.0],
        [6.0, 3.0, 12.0],
        [2.0, 2.0, 3.0],
    ]
    figure = Figure(name="x", values=found[time_over_unguided(LORA)], target=Target(limit=1.5, at_most=True))
    assert (figure.spread.median, figure.spread.low, figure.spread.high, figure.spread.n) == (1.5, 1.0, 2.0, 3)
    assert figure.met is True
    assert Figure(name="x", values=[1.6], target=figure.target).met is False
    assert Figure(name="x", values=[1.6], target=Target(limit=1.5, at_most=False)).met is True
    assert Figure(name="x", values=[1.6], target=None).met is None
    assert spread([3.0, 1.0, 2.0, 10.0]).median == 2.5


def test_time_per_token_leaves_the_first_token_out() -> None:
    assert per_token([5.0, 5.5, 6.0, 8.0]) == 1.0


def test_every_target_belongs_to_a_figure(done: Any) -> None:
    """A target under a name that no figure has would never be looked at."""
    heads = (HEAD, TWO_HEADS, at_streams(UNGUIDED, 16), at_streams(HEAD, 16))
    guided = (LORA, TWO_LORAS, TUNED, TWO_TUNED, *heads, WISH, TWO_WISHES, FULL, speculating(0.8))
    contestants = (TRANSFORMERS, UNGUIDED, NAIVE, *guided)
    seconds = {name: [1.0] for name in contestants}
    names = set(timed_ratios(seconds, {1: [1.0], 16: [1.0]}))
    names |= {figure["name"] for figure in json.loads((done[0] / "decode.json").read_text(encoding="utf-8"))["figures"]}
    cpu = targets_for(device="cpu", base_shape="200m", dtype="bfloat16")
    assert len(cpu) == 15
    assert set(cpu) <= names
    assert targets_for(device="cpu", base_shape="200m", dtype="float32") == targets_for(
        device="cuda", base_shape="tiny", dtype="bfloat16"
    )


def test_bandwidth_is_bytes_over_seconds() -> None:
    assert 1e8 < copy_bandwidth(torch.device("cpu"), size=2**22) < 1e13


def test_code_is_named() -> None:
    assert code_version().startswith("genarm 0.")


@pytest.mark.skipif(not (SHARED / "models" / "lm-small").is_dir(), reason="needs the real models of ../shared")
def test_a_real_pair_saves_most_forwards_of_its_base() -> None:
    from genarm.lab.bench.counting import count_real_pair

    where = (str(SHARED / "models" / "lm-medium"), str(SHARED / "models" / "lm-small"))
    found = count_real_pair(where, None, dtype="float32", device="cpu", tokens=32, seed=0)
    assert found.control.passes_per_token == 1
    assert 0.1 < found.drafting.passes_per_token < 0.6
    assert found.acceptance.low > 0.5
