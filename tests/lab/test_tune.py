"""`genarm tune`: the regression against scipy and known weights, the rest against files and models asked by hand."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.optimize import minimize
from transformers import AutoModelForCausalLM

from builders.tiny import save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm.cli.main import main
from genarm.data.presets import read_presets
from genarm.errors import DataError
from genarm.lab.tune import regression
from genarm.lab.tune.regression import fit_pairs, maximise
from genarm.lab.tune.report import verdict
from genarm.lab.tune.sweep import _measured
from genarm.model.compose import compose
from genarm.model.config import GuidedConfig
from genarm.server.names import Names, rewards_of
from genarm.text.prompts import encode_pair

WISH = "w20 w21 w22"
JUDGE = """
def score(prompt, response):
    return response.split().count("w3") - response.split().count("w5") + len(response.split()) / 10

def sometimes(prompt, response):
    return score(prompt, response)
"""


# --- the regression -------------------------------------------------------------------------------------------------


def drawn(n: int, a: list[float], seed: int, scale: tuple[float, ...] = (3.0, 0.5, 12.0)) -> np.ndarray[Any, Any]:
    """Margins of n pairs, turned so that the chosen response is preferred with the probability that `a` says."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(size=(n, len(a))) * scale[: len(a)]
    chosen = rng.random(n) < 1 / (1 + np.exp(-margins @ np.array(a)))
    return np.where(chosen[:, None], margins, -margins)


@pytest.mark.parametrize("n", [1, 5, 20, 400])
def test_the_fit_is_what_scipy_finds_and_its_gradient_is_0(n: int) -> None:
    units = drawn(n, [0.4, -1.0, 0.05], seed=n)
    units /= np.sqrt((units**2).mean(axis=0))
    rng = np.random.default_rng(0)
    counts, centres = rng.integers(0, 4, (6, n)).astype(float), rng.normal(size=(6, 3)) * 3
    found = maximise(units, counts, centres)

    def loss(a: Any, count: Any, centre: Any) -> float:
        return float(
            (count * np.logaddexp(0, -units @ a)).sum() + ((a - centre) ** 2).sum() / (2 * regression.PRIOR**2)
        )

    for a, count, centre in zip(found, counts, centres, strict=True):
        log_odds = units @ a
        slope = (a - centre) / regression.PRIOR**2 - (count / (1 + np.exp(log_odds))) @ units
        assert np.abs(slope).max() < 1e-8
        best = minimize(loss, np.zeros(3), args=(count, centre), method="BFGS", options={"gtol": 1e-7})
        assert a.tolist() == pytest.approx(best.x.tolist(), abs=1e-4)
        assert loss(a, count, centre) <= best.fun + 1e-12


def test_huge_margins_do_not_throw_newton_off() -> None:
    units = np.array([[1e-3], [1.0], [-50.0], [80.0]])
    found = maximise(units, np.ones((1, 4)), np.zeros((1, 1)))
    best = minimize(lambda a: np.logaddexp(0, -units @ a).sum() + a @ a / (2 * regression.PRIOR**2), [0.0])
    assert found[0, 0] == pytest.approx(best.x[0], abs=1e-4)


def test_weights_that_pairs_were_drawn_with_come_back() -> None:
    a = [0.4, -1.0, 0.05]
    fit = fit_pairs(drawn(4000, a, seed=2), range(4000), ["x", "y", "z"])
    for of, true in zip(fit.coefficients, a, strict=True):
        assert abs(of.value - true) < 0.9 * (of.high - of.low)  # 3.5 standard errors
        assert of.high - of.low < 0.3 * abs(true) + 0.1 / of.scale
    assert fit.held_out is not None
    assert fit.held_out.rate == pytest.approx(fit.fitted.rate, abs=0.01)


def test_few_pairs_without_a_mistake_say_what_the_prior_says_they_do() -> None:
    """20 of 20 alike: 20 (1 − σ(z)) = z / 4, and an interval that is no point, which fewer pairs make wider."""
    fits = {n: fit_pairs(np.full((n, 1), 5.0), range(n), ["x"]).coefficients[0] for n in (1, 3, 20)}
    z = fits[20].value * 5.0
    assert 20 / (1 + math.exp(z)) == pytest.approx(z / 4, abs=1e-8)
    assert z == pytest.approx(3.18, abs=0.01)
    assert fits[20].low > 0
    assert fits[1].low < 0 < fits[1].value
    widths = [fit.high - fit.low for fit in fits.values()]
    assert sorted(widths, reverse=True) == widths


def test_intervals_of_twenty_pairs_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights drawn from the prior, pairs drawn from the weights."""
    monkeypatch.setattr(regression, "RESAMPLES", 300)
    rng = np.random.default_rng(5)
    held = []
    for seed in range(100):
        a = rng.normal(size=2) * regression.PRIOR / np.array([3.0, 0.5])
        fit = fit_pairs(drawn(20, a.tolist(), seed=100 + seed), range(20), ["x", "y"])
        held += [of.low < true < of.high for of, true in zip(fit.coefficients, a, strict=True)]
    assert 0.92 < np.mean(held) < 0.98


def test_pairs_of_one_prompt_are_no_more_than_one_witness() -> None:
    margins = drawn(20, [0.2], seed=7)
    five_times = np.repeat(margins, 5, axis=0)
    apart = fit_pairs(five_times, range(100), ["x"])
    together = fit_pairs(five_times, [i // 5 for i in range(100)], ["x"])
    width = [of.coefficients[0].high - of.coefficients[0].low for of in (apart, together)]
    assert width[1] > 1.5 * width[0]
    assert (apart.prompts, together.prompts, together.pairs) == (100, 20, 100)


def test_held_out_pairs_are_no_part_of_their_fit() -> None:
    """Margins that say nothing are right half of the time on other prompts, however well they fit their own."""
    rng = np.random.default_rng(3)
    fit = fit_pairs(rng.normal(size=(60, 25)), range(60), [f"r{i}" for i in range(25)])
    assert fit.held_out is not None
    assert fit.fitted.rate > 0.75
    assert 0.3 < fit.held_out.rate < 0.7


def test_a_reward_that_never_tells_two_responses_apart_is_named() -> None:
    with pytest.raises(DataError, match="the reward 'y' scores both responses of every pair alike"):
        fit_pairs(np.array([[1.0, 0.0], [2.0, 0.0]]), range(2), ["x", "y"])


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_member(tiny_model(seed=0), root / "base")
    save_member(tiny_model("gpt2", seed=1), root / "arm")
    tiny_lora(tiny_model(seed=0), root / "lora", seed=2, base_path=str(root / "base"))
    return root


@pytest.fixture(autouse=True)
def here(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a guided folder, a judge, pairs and prompts in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    compose(
        models / "base",
        {"full": models / "arm"},
        "guided",
        tuned={"near": models / "lora"},
        wishes={"wish": WISH},
        weights={"full": 0.1, "near": 0.5, "wish": 0.5},
    )
    Path("tune_judge.py").write_text(JUDGE, encoding="utf-8")
    Path("prompts.txt").write_text("".join(f"w{i} w{i + 1}\n" for i in range(8)), encoding="utf-8")
    write_pairs(PAIRS)
    yield tmp_path
    sys.modules.pop("tune_judge", None)


_WORDS = np.random.default_rng(11).integers(0, 40, (24, 9)).tolist()
PAIRS = [
    tuple(" ".join(f"w{i}" for i in row[part]) for part in (slice(2), slice(2, 5), slice(5, 5 + 2 + number % 3)))
    for number, row in enumerate(_WORDS)
]


def write_pairs(pairs: list[tuple[str, ...]]) -> None:
    rows = [{"prompt": x, "chosen": y, "rejected": n} for x, y, n in pairs]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def result(name: str) -> Any:
    return json.loads(Path("out", name).read_text(encoding="utf-8"))


def tune_pairs(*more: str) -> int:
    return main(["tune", "guided", "--pairs", "pairs.jsonl", "--output", "out", "--dtype", "float32", *more])


def tune_sweep(*more: str, score: str = "function=tune_judge:score") -> int:
    options = ["--max-new-tokens", "8", "--samples", "3", "--seed", "4", "--dtype", "float32"]
    files = ["--prompts", "prompts.txt", "--output", "out"]
    return main(["tune", "guided", *files, "--score", score, *options, *more])


@torch.no_grad()
def log_prob(model: Any, prompt: list[int], response: list[int]) -> float:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1)[range(len(response)), response].sum())


def test_margins_are_those_of_transformers_and_weights_those_of_the_margins(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune_pairs("--beta", "0.2") == 0
    base, arm = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("base", "arm"))
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "base"), models / "lora")
    tokenizer = tiny_tokenizer()
    expected = []
    for x, *sides in PAIRS:
        found: list[dict[str, float]] = []
        for side in sides:
            ids, reply = encode_pair(tokenizer, [{"role": "user", "content": x}], side)
            turns = [{"role": "system", "content": WISH}, {"role": "user", "content": x}]
            wished, _ = encode_pair(tokenizer, turns, side)
            plain = log_prob(base, ids, reply)
            found.append(
                {
                    "full": log_prob(arm, ids, reply),
                    "near": log_prob(lora, ids, reply) - plain,
                    "wish": log_prob(base, wished, reply) - plain,
                }
            )
        expected.append({name: found[0][name] - found[1][name] for name in found[0]})
    rows = rows_of("out/margins.jsonl")
    for row, own in zip(rows, expected, strict=True):
        assert row["margins"] == pytest.approx(own, abs=1e-3)
    names = [*rows[0]["margins"]]
    margins = np.array([[row["margins"][name] for name in names] for row in rows])
    fit = fit_pairs(margins, [x for x, *_ in PAIRS], names)
    said = result("pairs.json")
    for name, of in zip(names, fit.coefficients, strict=True):
        own = said["rewards"][name]
        assert [own[key] * 0.2 for key in ("value", "low", "high")] == pytest.approx([of.value, of.low, of.high])
        assert said["weights"][name] == pytest.approx(own["value"], rel=5e-3)
        assert own["alone"]["count"] == sum(row["margins"][name] > 0 for row in rows)
    right = margins @ [{"full": 0.1, "near": 0.5, "wish": 0.5}[name] for name in names] > 0
    assert said["right"]["folder"]["count"] == right.sum()
    out = capsys.readouterr().out
    for line in said["certainty"]:
        assert line in out
    assert f"with 24 pairs the weight of full is between {said['rewards']['full']['low']:.2g} and" in out


def test_what_is_undecided_is_called_so() -> None:
    assert tune_pairs() == 0
    said = result("pairs.json")
    for name, line in zip(said["rewards"], said["certainty"], strict=False):
        own = said["rewards"][name]
        undecided = "so they do not tell whether it should count for or against" in line
        assert undecided == (own["low"] <= 0 <= own["high"])
    assert {own["low"] <= 0 <= own["high"] for own in said["rewards"].values()} == {True, False}


def test_an_interrupted_run_goes_on_and_other_pairs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(PAIRS + [(f"w1 {x}", y, n) for x, y, n in PAIRS])
    assert tune_pairs() == 0
    path = Path("out/margins.jsonl")
    whole, said = path.read_bytes(), result("pairs.json")
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:32]) + lines[32][:20])
    assert tune_pairs() == 0
    for one, other in zip(rows_of(path), map(json.loads, lines), strict=True):
        assert one["margins"] == pytest.approx(other["margins"], abs=1e-4)
    assert result("pairs.json")["rewards"]["full"]["value"] == pytest.approx(said["rewards"]["full"]["value"], rel=1e-3)
    write_pairs(PAIRS[1:])
    assert tune_pairs() == 2
    assert "was made with other settings: rows of pairs (pairs.jsonl) has changed" in capsys.readouterr().err


def test_weights_become_the_folders_and_a_preset_that_the_server_reads(capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(Path("guided/config.json").read_text())
    Path("guided/presets.json").write_text('{"old": {"wish": 1}}')
    assert tune_pairs("--write", "--preset", "mine", "--max-kl", "0.4") == 0
    weights = result("pairs.json")["weights"]
    after = json.loads(Path("guided/config.json").read_text())
    assert {reward["name"]: reward["weight"] for reward in after["rewards"]} == weights
    for record in (before, after):
        for reward in record["rewards"]:
            del reward["weight"]
    assert before == after
    presets = read_presets(Path("guided"))
    assert presets == {"old": {"wish": 1.0}, "mine": {**weights, "max_kl": 0.4}}
    config = GuidedConfig.from_pretrained("guided")
    assert config.default_weights == weights
    names = Names(model="guided", rewards=rewards_of(config), largest=1e3, presets=presets)
    assert names.resolve("guided@mine", None) == weights
    assert names.budget("guided@mine") == 0.4
    out = capsys.readouterr().out
    assert "the default weights of" in out
    assert ("--max-weight" in out) == (max(map(abs, weights.values())) > 5)


def test_a_wish_on_a_plain_model_can_be_tuned_and_written_nowhere(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", str(models / "base"), "--pairs", "pairs.jsonl", "--wish", f"kind={WISH}", "--output", "out"]
    assert main([*words, "--dtype", "float32"]) == 0
    assert [*result("pairs.json")["weights"]] == ["kind"]
    kind = [row["margins"]["kind"] for row in rows_of("out/margins.jsonl")]
    assert tune_pairs("--output", "folder") == 0
    assert kind == pytest.approx([row["margins"]["wish"] for row in rows_of("folder/margins.jsonl")], abs=1e-4)
    assert main([*words, "--write"]) == 2
    assert "the wish 'kind' is in none; make one with genarm compose --wish first" in capsys.readouterr().err


def judged(row: dict[str, Any]) -> float:
    words = row["response"].split()
    return words.count("w3") - words.count("w5") + len(words) / 10


def test_a_sweep_is_what_its_replies_say(capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure again from the files, and the replies again by `genarm generate`."""
    assert tune_sweep("--scales", "2", "1", "--budget", "1000") == 0
    said = result("sweep.json")
    assert [point["scale"] for point in said["points"]] == [0, 1, 2]
    scores = {}
    for point in said["points"]:
        scale = point["scale"]
        weights = {"full": 0.1 * scale, "near": 0.5 * scale, "wish": 0.5 * scale}
        assert point["weights"] == pytest.approx(weights)
        rows = rows_of(f"out/replies-{scale:g}.jsonl")
        assert len(rows) == 24
        text = ",".join(f"{name}={weight!r}" for name, weight in weights.items())
        own = ["generate", "guided", "--input", "prompts.txt", "--weights", text, "--num-samples", "3", "--seed", "4"]
        more = ["--max-new-tokens", "8", "--dtype", "float32", "--output", f"own-{scale:g}.jsonl"]
        assert main([*own, *more]) == 0
        assert [row["response"] for row in rows_of(f"own-{scale:g}.jsonl")] == [row["response"] for row in rows]
        scores[scale] = np.array([judged(row) for row in rows]).reshape(8, 3).mean(axis=1)
        assert point["score"]["value"] == pytest.approx(scores[scale].mean())
        assert point["score"]["n"] == 8
        nats, tokens = (sum(row[key] for row in rows) for key in ("kl", "tokens"))
        assert point["kl"]["value"] == pytest.approx(nats / tokens)
        assert point["tokens"] == pytest.approx(tokens / 24)
        assert point["cut"] == sum(row["finish_reason"] == "length" for row in rows)
        assert point["gain"]["value"] == pytest.approx((scores[scale] - scores[0]).mean())
        if point["score"]["low"] is not None:
            assert point["score"]["low"] < point["score"]["value"] < point["score"]["high"]
    assert said["points"][0]["kl"]["value"] == 0
    assert 0 < said["points"][1]["kl"]["value"] < said["points"][2]["kl"]["value"]
    assert said["best"] == max(range(3), key=lambda number: said["points"][number]["score"]["value"])
    assert said["weights"] == said["points"][said["best"]]["weights"]
    out = capsys.readouterr().out
    assert all(line in out for line in said["verdict"])
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_scorer_that_is_silent_about_the_hard_prompts_of_a_point_does_not_make_it_the_best() -> None:
    """Scale 1 is worse by a half on every prompt, and has scores for the easy ones alone."""
    hard = np.arange(40) % 2 == 0
    base = np.where(hard, 2.0, 8.0) + np.random.default_rng(0).normal(size=40)
    scored = {0.0: base.tolist(), 1.0: np.where(hard, np.nan, base - 0.5).tolist()}
    drawn: Any = {scale: [{"tokens": 10, "kl": scale, "finish_reason": "stop"}] * 40 for scale in scored}
    jobs: Any = {scale: [SimpleNamespace(weights={"r": scale})] for scale in scored}
    settings, scorer = (cast(Any, SimpleNamespace(record={}, max_kl=None)) for _ in range(2))
    found = _measured(jobs, drawn, scored, 40, settings, scorer, None)
    assert found.best == 0
    assert (found.points[1].gain.value, found.points[1].gain.n) == (pytest.approx(-0.5), 20)
    assert (found.points[1].score.n, found.points[1].kl.n) == (20, 40)
    better = {0.0: [*base[:39], np.nan], 1.0: np.where(hard, np.nan, base + 1 + np.arange(40) / 40).tolist()}
    said = verdict(_measured(jobs, drawn, better, 40, settings, scorer, None))
    assert said[:2] == ["the best: r=1", "it is better than scale 0 (19 prompts)"]
    with pytest.raises(DataError, match="no prompt has a score at scale 0 and at another scale"):
        _measured(jobs, drawn, {**better, 0.0: [np.nan] * 40}, 40, settings, scorer, None)


def test_the_best_point_is_within_the_budget() -> None:
    assert tune_sweep("--scales", "1", "2", score="function=tune_judge:sometimes") == 0
    points = result("sweep.json")["points"]
    kls = [point["kl"]["value"] for point in points]
    for budget in (0.0, (kls[1] + kls[2]) / 2, 1000.0):
        assert tune_sweep("--scales", "1", "2", "--budget", str(budget), score="function=tune_judge:sometimes") == 0
        within = [number for number, kl in enumerate(kls) if kl <= budget]
        best = max(within, key=lambda number: points[number]["score"]["value"])
        assert result("sweep.json")["best"] == best


def test_a_sweep_goes_on_and_a_further_scale_draws_its_own_replies(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_sweep("--scales", "1", "--max-kl", "0.5") == 0
    files = {path: path.read_bytes() for path in Path("out").glob("*.jsonl")}
    assert len(files) == 4
    torn = Path("out/replies-1.jsonl")
    torn.write_bytes(torn.read_bytes()[: len(files[torn]) // 2])
    Path("out/scores-1.jsonl").unlink()
    assert tune_sweep("--scales", "1", "1.5", "--max-kl", "0.5") == 0
    assert {path: path.read_bytes() for path in files} == files
    assert max(row["kl"] / row["tokens"] for row in rows_of("out/replies-1.5.jsonl")) <= 0.5 + 0.01
    Path("tune_judge.py").write_text(JUDGE + "\n# otherwise\n", encoding="utf-8")
    assert tune_sweep("--scales", "1", "--max-kl", "0.5") == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert tune_sweep("--scales", "1", "--max-kl", "0.25") == 2
    assert "max_kl was 0.5 and is 0.25" in capsys.readouterr().err


def test_one_reward_is_varied_and_what_is_best_is_written() -> None:
    assert tune_sweep("--scales", "0.5", "2", "--vary", "wish", "--weights", "near=0", "--preset", "best") == 0
    points = result("sweep.json")["points"]
    assert [point["weights"] for point in points] == [{"full": 0.1, "near": 0, "wish": w} for w in (0, 0.25, 1)]
    assert points[0]["kl"]["value"] > 0
    assert read_presets(Path("guided")) == {"best": result("sweep.json")["weights"]}


SHORT = ("--max-new-tokens", "8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "pairs.jsonl", "--beta", "0"], "--beta is 0; it must be above 0"),
        (
            ["--pairs", "pairs.jsonl", "--score", "function=a:b"],
            "--score is for --prompts, and with --pairs it would do",
        ),
        (["--pairs", "pairs.jsonl", "--scales", "1", "2"], "--scales is for --prompts"),
        (["--pairs", "pairs.jsonl", "--weights", "full=1"], "--weights is for --prompts"),
        (["--pairs", "pairs.jsonl", "--system", "x"], "--system is for --prompts"),
        (["--pairs", "pairs.jsonl", "--samples", "2"], "--samples is for --prompts"),
        (["--pairs", "pairs.jsonl", "--temperature", "0.5"], "--temperature is for --prompts"),
        (["--pairs", "pairs.jsonl", "--max-kl", "1"], "--max-kl changes nothing in what pairs say"),
        (["--pairs", "pairs.jsonl", "--preset", "a b"], "a preset cannot be named 'a b'"),
        (["--pairs", "none.jsonl"], "there is no file or folder none.jsonl"),
        (["--pairs", "pairs.jsonl", "--objective", "safer"], "is for PKU-SafeRLHF only"),
        (["--pairs", "pairs.jsonl", "--max-response-tokens", "0"], "--max-response-tokens must be at least 1"),
        (["--pairs", "pairs.jsonl", "--batch-size", "0"], "must be at least 1"),
        (["--pairs", "pairs.jsonl", "--device", "mars"], "cannot use the device 'mars'"),
        (["--pairs", "pairs.jsonl", "--wish", "full=x"], "has a reward 'full' already"),
        (["--prompts", "prompts.txt"], "--prompts needs --score"),
        (["--prompts", "prompts.txt", *SHORT, "--score", "luck=1"], "--score is 'luck=1'; it must be one of function="),
        (["--prompts", "prompts.txt", *SHORT, "--score", "function=no:f"], "function=no:f: No module"),
        (["--prompts", "prompts.txt", "--score", "function=tune_judge:score"], "133, more than the 128 positions"),
        (["--prompts", "none.txt", "--score", "function=tune_judge:score"], "none.txt"),
        (
            ["--prompts", "prompts.txt", "--score", "x", "--beta", "1"],
            "--beta is for --pairs, and with --prompts it would",
        ),
        (["--prompts", "prompts.txt", "--score", "x", "--split", "test"], "--split is for --pairs"),
        (
            ["--prompts", "prompts.txt", "--score", "x", "--scales", "-1"],
            "--scales has -1; each must be a number of at",
        ),
        (["--prompts", "prompts.txt", "--score", "x", "--scales", "0"], "--scales has no number above 0"),
        (["--prompts", "prompts.txt", "--score", "x", "--budget", "-1"], "--budget is -1; it must be a number of nats"),
        (["--prompts", "prompts.txt", "--score", "x", "--vary", "half"], "--vary is 'half', and no reward is named so"),
        (["--prompts", "prompts.txt", "--score", "x", "--weights", "full=0,near=0,wish=0"], "is 0, so scaling changes"),
        (["--prompts", "prompts.txt", "--score", "x", "--max-kl", "-1"], "max_kl is -1"),
    ],
)
def test_a_wrong_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "guided", "--output", "out", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("genarm tune: error: ")
    assert message in error
    assert not list(Path().glob("out/*.jsonl"))


def test_folders_that_have_no_weights_or_no_place_for_them(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(models / "base"), "--pairs", "pairs.jsonl"]) == 2
    assert "is not a guided folder, so it has no weights; give a --wish" in capsys.readouterr().err
    Path("guided/presets.json").write_text("[]")
    assert tune_pairs("--preset", "mine") == 2
    assert "presets in" in capsys.readouterr().err
    Path("prompts.jsonl").write_text('{"prompt": "w1", "reward_weights": {"wish": 1}}\n')
    words = ["tune", "guided", "--prompts", "prompts.jsonl", "--score", "function=tune_judge:score"]
    assert main(words) == 2
    assert "has reward_weights of its own, which no sweep could change" in capsys.readouterr().err
