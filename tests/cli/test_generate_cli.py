"""`genarm generate`: what goes in, what comes out, and what a killed run leaves behind."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from builders.templates import THINKING
from builders.tiny import WORDS, save_member, tiny_model, tiny_tokenizer
from genarm.batch.requests import read_requests
from genarm.cli.main import main
from genarm.errors import DataError
from genarm.lab.replies import sample_replies
from genarm.model.compose import compose
from genarm.model.modeling import GuidedForCausalLM
from genarm.sampling import Sampling, derive_seed
from genarm.text.prompts import Reading, as_conversation, encode_prompt

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12", "w3 w3 w3", "w20", "w21 w1 w2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided folder of tiny random models with a chat template, of 128 positions."""
    root = tmp_path_factory.mktemp("models")
    members = [save_member(tiny_model(seed=i), root / f"m{i}") for i in range(3)]
    compose(members[0], {"helpful": members[1], "harmless": members[2]}, root / "guided", weights={"harmless": 0.5})
    return root / "guided"


@pytest.fixture(scope="module")
def model(folder: Path) -> GuidedForCausalLM:
    return GuidedForCausalLM.from_pretrained(folder)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_prompts(path: Path, prompts: list[Any]) -> Path:
    path.write_text("".join(json.dumps(p if isinstance(p, dict) else {"prompt": p}) + "\n" for p in prompts))
    return path


def greedy(model: GuidedForCausalLM, prompt: list[dict[str, str]] | str, weights: dict[str, float], n: int) -> str:
    """The reference: one prompt by itself through transformers' own path."""
    tokenizer = tiny_tokenizer()
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=n, reward_weights=weights)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# --- what comes out -------------------------------------------------------------------------------------------------


def test_rows_of_a_batch_equal_prompts_run_alone(folder: Path, model: GuidedForCausalLM, tmp_path: Path) -> None:
    """Conversations, a system message, weights per row and --weights, all in one padded batch."""
    turns = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3 w4"},
    ]
    own_system = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1 w1 w1"}]
    source = write_prompts(
        tmp_path / "in.jsonl",
        [
            {"prompt": "w1 w2 w3", "id": "a", "topic": "x", "level": {"n": [1, None]}},
            {"prompt": turns, "id": 7, "reward_weights": {"helpful": 0}},
            {"prompt": own_system, "reward_weights": {"helpful": -1, "harmless": 3.5}},
        ],
    )
    out = tmp_path / "out.jsonl"
    options = ["--weights", "helpful=2", "--system", "w8", "--temperature", "0", "--max-new-tokens", "12"]
    assert main(["generate", str(folder), "--input", str(source), "--output", str(out), *options]) == 0
    system = {"role": "system", "content": "w8"}
    expected = [
        ([system, {"role": "user", "content": "w1 w2 w3"}], {"helpful": 2.0, "harmless": 0.5}),
        ([system, *turns], {"helpful": 0.0, "harmless": 0.5}),
        (own_system, {"helpful": -1.0, "harmless": 3.5}),
    ]
    rows = rows_of(out)
    assert [row["response"] for row in rows] == [greedy(model, p, w, 12) for p, w in expected]
    assert len({row["response"] for row in rows}) == 3
    assert [row["weights"] for row in rows] == [w for _, w in expected]
    assert [(row["index"], row["id"], row["sample"]) for row in rows] == [(0, "a", 0), (1, 7, 0), (2, None, 0)]
    assert [row["prompt"] for row in rows] == ["w1 w2 w3", turns, own_system]
    assert (rows[0]["topic"], rows[0]["level"]) == ("x", {"n": [1, None]})
    assert set(rows[1]) == {
        *("index", "id", "sample", "prompt", "response", "finish_reason", "tokens", "kl", "seed", "weights"),
        *("max_kl", "settings"),
    }


def test_a_budget_of_the_run_and_of_a_prompt(folder: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": "w1 w2"}, {"prompt": "w1 w2", "max_kl": 0.01}, {"prompt": "w1 w2", "max_kl": 50}]
    out = tmp_path / "out.jsonl"
    options = ["--input", str(write_prompts(tmp_path / "in.jsonl", prompts)), "--output", str(out)]
    options += ["--weights", "helpful=3", "--max-kl", "0.2", "--max-new-tokens", "10"]
    assert main(["generate", str(folder), *options]) == 0
    rows = rows_of(out)
    assert [row["max_kl"] for row in rows] == [0.2, 0.01, 50]
    assert [round(row["kl"] / row["tokens"], 3) <= row["max_kl"] for row in rows] == [True] * 3
    assert rows[1]["kl"] < rows[0]["kl"] < rows[2]["kl"]
    for wrong in (-1, "much"):
        source = write_prompts(tmp_path / "wrong.jsonl", [{"prompt": "w1", "max_kl": wrong}])
        with pytest.raises(DataError, match=r"line 1: max_kl is"):
            read_requests(source)


def test_raw_prompts_and_text_files(folder: Path, model: GuidedForCausalLM, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "in.txt"
    source.write_bytes("\ufeffw1 w2\r\n\n  \nw3\n".encode())
    options = ["--raw", "--temperature", "0", "--max-new-tokens", "6", "--json"]
    assert main(["generate", str(folder), "--input", str(source), *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["w1 w2", "w3"]
    assert [row["response"] for row in rows] == [greedy(model, p, {}, 6) for p in ("w1 w2", "w3")]


def test_text_on_stdout(folder: Path, capsys: Any) -> None:
    """One reply alone, several under their prompts, and nothing else on either stream."""
    options = ["--temperature", "0", "--max-new-tokens", "5"]
    assert main(["generate", str(folder), "--prompt", "w1", *options]) == 0
    alone = capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "w1", "--prompt", "w2", *options]) == 0
    both = capsys.readouterr()
    assert both.out.startswith(f"[0] w1\n{alone.out}\n[1] w2\n")
    assert alone.err == both.err == ""


def test_finish_reason_and_token_count(folder: Path, tmp_path: Path) -> None:
    """`stop` exactly where the end-of-turn token was drawn, which the text leaves out."""
    out = tmp_path / "out.jsonl"
    options = ["--max-new-tokens", "30", "--num-samples", "20", "--temperature", "1.5"]
    assert main(["generate", str(folder), "--prompt", "w1", "--prompt", "w2", "--output", str(out), *options]) == 0
    rows = rows_of(out)
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(2) for s in range(20)]
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        assert "<end>" not in row["response"]
        assert "<pad>" not in row["response"]
        if row["finish_reason"] == "length":
            assert row["tokens"] == 30
        else:
            assert row["tokens"] <= 30
    assert len({row["response"] for row in rows}) > 30


def test_ordinary_causal_lm(tmp_path: Path, capsys: Any) -> None:
    """Any folder of a causal LM; its own generation config does not change what the options mean."""
    lm = tiny_model(seed=5)
    plain = save_member(lm, tmp_path / "plain")
    lm.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=1, temperature=0.01)
    opinionated = save_member(lm, tmp_path / "opinionated")
    outputs = []
    for folder in (plain, opinionated):
        for options in (["--temperature", "0"], ["--seed", "3"]):
            assert main(["generate", str(folder), "--prompt", "w1", "--max-new-tokens", "20", "--json", *options]) == 0
            row = json.loads(capsys.readouterr().out)
            row.pop("settings")  # names the folder
            outputs.append(row)
    assert outputs[:2] == outputs[2:]
    assert outputs[0]["response"] != outputs[1]["response"]
    assert outputs[0]["weights"] == {}


def test_sampling_follows_the_temperature_and_top_p() -> None:
    """The first token's frequencies against softmax(logits / T) cut at top-p, computed by hand."""
    lm, tokenizer = tiny_model(seed=1), tiny_tokenizer()
    ids = tokenizer("w1 w2").input_ids
    n = 4000
    sampling = Sampling(max_new_tokens=1, temperature=1.7, top_p=0.6)
    replies = sample_replies(lm, tokenizer, [ids] * n, sampling, seed=0)
    p = torch.softmax(lm(torch.tensor([ids])).logits[0, -1].double() / 1.7, -1)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.6).sum()) + 1]
    expected = torch.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in replies]), minlength=len(p))
    assert set(counts.nonzero().flatten().tolist()) <= set(kept.tolist())
    error = (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() <= 5 * error + 1e-12).all()


def test_a_reply_leaves_the_random_state_and_the_model_alone() -> None:
    lm, tokenizer = tiny_model(), tiny_tokenizer()
    before, config = torch.get_rng_state(), lm.generation_config
    first, second = (
        sample_replies(lm, tokenizer, [tokenizer("w1").input_ids], Sampling(), seed=seed)[0] for seed in (1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert lm.generation_config is config
    assert first != second
    assert len({derive_seed(seed, index) for seed in range(30) for index in range(30)}) == 900


# --- resuming -------------------------------------------------------------------------------------------------------


def command(folder: Path, source: Path, out: Path, *more: str) -> list[str]:
    options = ["--max-new-tokens", "8", "--batch-size", "3", "--seed", "11"]
    return ["generate", str(folder), "--input", str(source), "--output", str(out), *options, *more]


def test_resuming_from_any_byte_gives_the_unbroken_file(folder: Path, tmp_path: Path, capsys: Any) -> None:
    source = write_prompts(tmp_path / "in.jsonl", PROMPTS)
    whole = tmp_path / "whole.jsonl"
    assert main(command(folder, source, whole)) == 0
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == len(PROMPTS)
    cuts = {0: 0, 1: 0, ends[0]: 1, ends[2] - 1: 2, ends[2]: 3, ends[4] + 9: 5, ends[5]: 6, ends[6]: 7}
    for cut, kept in cuts.items():
        broken = tmp_path / f"cut{cut}.jsonl"
        broken.write_bytes(content[:cut])
        (tmp_path / f"cut{cut}.jsonl.settings.json").write_bytes((tmp_path / "whole.jsonl.settings.json").read_bytes())
        capsys.readouterr()
        assert main(command(folder, source, broken)) == 0
        assert broken.read_bytes() == content, cut
        err = capsys.readouterr().err
        if kept == 7:
            assert "is complete: 7 of 7 rows" in err
        else:
            assert (f"resuming {broken} at {kept} of 7 rows" in err) == (kept > 0)


def when_rows(out: Path, rows: int, act: Callable[[], object]) -> None:
    """Wait until the output has so many rows, then act."""
    deadline = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < rows:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    act()


def test_a_killed_run_resumes_to_the_same_file(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Killed, resumed, interrupted, resumed: the bytes of a run that nobody disturbed."""
    source = write_prompts(tmp_path / "in.jsonl", [f"w{i % 40} w{i * 7 % 40}" for i in range(36)])
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert main(command(folder, source, whole, "--max-new-tokens", "40")) == 0
    again = command(folder, source, broken, "--max-new-tokens", "40")
    process = subprocess.Popen([sys.executable, "-m", "genarm", *again], env={**os.environ, "OMP_NUM_THREADS": "1"})
    when_rows(broken, 6, process.kill)
    assert process.wait() == -signal.SIGKILL
    killed_at = broken.read_bytes().count(b"\n")
    assert 6 <= killed_at < 24

    capsys.readouterr()
    interrupt = partial(os.kill, os.getpid(), signal.SIGINT)  # what the terminal does at Ctrl-C
    thread = threading.Thread(target=when_rows, args=(broken, killed_at + 3, interrupt))
    thread.start()
    assert main(again) == 130
    thread.join()
    said = capsys.readouterr().err
    assert f"resuming {broken} at {killed_at // 3 * 3} of 36 rows" in said
    assert "stopped; the same command goes on" in said
    assert killed_at < broken.read_bytes().count(b"\n") < 36

    assert main(again) == 0
    assert broken.read_bytes() == whole.read_bytes()


def test_another_run_never_touches_an_existing_output(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Every setting that changes the rows is named when it differs."""
    source, out = write_prompts(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    assert main(command(folder, source, out)) == 0
    content = out.read_bytes()
    out.write_bytes(content[:-5])
    other = write_prompts(tmp_path / "other.jsonl", [*PROMPTS[:-1], "w40"])
    changes = {
        "temperature was 1.0 and is 0.5": ["--temperature", "0.5"],
        "top_p was 1.0 and is 0.9": ["--top-p", "0.9"],
        "max_new_tokens was 8 and is 9": ["--max-new-tokens", "9"],
        "seed was 11 and is 12": ["--seed", "12"],
        "speculate was 8 and is 0": ["--speculate", "0"],
        "num_samples was 1 and is 2": ["--num-samples", "2"],
        "system was None and is 'w1'": ["--system", "w1"],
        "raw was False and is True": ["--raw"],
        "dtype was 'auto' and is 'bfloat16'": ["--dtype", "bfloat16"],
        "helpful of weights was 1.0 and is 1.5": ["--weights", "helpful=1.5"],
        "prompts_content has changed": ["--input", str(other)],
    }
    for difference, options in changes.items():
        capsys.readouterr()
        assert main(command(folder, source, out, *options)) == 2
        assert difference in capsys.readouterr().err
        assert out.read_bytes() == content[:-5]
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert {row["settings"] for row in map(json.loads, content.splitlines())} == {settings["digest"]}
    assert settings["record"]["max_new_tokens"] == 8


def test_files_that_are_not_ours_are_left_alone(folder: Path, tmp_path: Path, capsys: Any) -> None:
    source = write_prompts(tmp_path / "in.jsonl", PROMPTS)
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text("mine\n")
    assert main(command(folder, source, foreign)) == 2
    assert "notes.jsonl.settings.json" in capsys.readouterr().err
    assert foreign.read_text() == "mine\n"
    out = tmp_path / "out.jsonl"
    assert main(command(folder, source, out)) == 0
    lines = out.read_text().splitlines(keepends=True)
    for changed, problem in (
        ([*lines[:2], "{}\n", *lines[3:]], "line 3 is not row 2"),
        ([lines[1], lines[0], *lines[2:]], "line 1 is not row 0"),
        ([*lines, lines[-1], "torn"], "line 8 is not row 7"),
    ):
        out.write_text("".join(changed))
        capsys.readouterr()
        assert main(command(folder, source, out)) == 2
        assert problem in capsys.readouterr().err
        assert out.read_text() == "".join(changed)


def test_conversations_as_clients_send_them(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Content in text parts, and keys that ask for nothing: the same replies, and rows with the plain form."""
    said = [("user", "w1 w2"), ("assistant", ""), ("user", "w3")]
    plain = [{"role": role, "content": content} for role, content in said]
    sent = [
        {"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": " w2"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "w3"}]},
    ]
    rows = []
    for name, prompt in (("plain", plain), ("sent", sent)):
        source, out = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.out.jsonl"
        source.write_text(json.dumps({"prompt": prompt}) + "\n")
        assert main(command(folder, source, out)) == 0
        rows.append(out.read_text())
    assert rows[0] == rows[1]


# --- what is refused ------------------------------------------------------------------------------------------------

LINES = {
    '{"prompt": "w1"': "in.jsonl, line 2, column 16: Expecting ',' delimiter",
    '["w1"]': "in.jsonl, line 2: a list; expected an object",
    '{"text": "w1"}': "in.jsonl, line 2: there is no key 'prompt' among 'text'",
    '{"prompt": " "}': "in.jsonl, line 2: the prompt is empty",
    '{"prompt": 3}': "in.jsonl, line 2: prompt is 3; expected text, or a list of messages",
    '{"prompt": []}': "in.jsonl, line 2: prompt is []",
    '{"prompt": [{"role": "user"}]}': "in.jsonl, line 2: {'role': 'user'} is no message",
    '{"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}': "only text is understood",
    '{"prompt": [{"role": "user", "content": null}]}': "'content': None} is no message",
    '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}': "must end with one to",
    '{"prompt": "\\ud800"}': "in.jsonl, line 2: the text is not valid Unicode",
    '{"prompt": "w1", "id": 1.5}': "in.jsonl, line 2: id is 1.5",
    '{"prompt": "w1", "reward_weights": 3}': "in.jsonl, line 2: reward_weights is 3",
    '{"prompt": "w1", "reward_weights": {"kind": 1}}': "in.jsonl, line 2 (prompt 1): no reward is named 'kind'",
    '{"prompt": "w1", "reward_weights": {"helpful": "1"}}': "(prompt 1): the weight of 'helpful' is '1'",
    '{"prompt": "w1", "reward_weights": {"helpful": NaN}}': "in.jsonl, line 2: NaN is no JSON number",
    '{"prompt": "w1", "reward_weights": {"helpful": 1e999}}': "(prompt 1): the weight of 'helpful' is inf",
    '{"prompt": "w1", "response": "w2"}': "in.jsonl, line 2: the key 'response' would clash",
    '{"prompt": "w1", "prompt": "w2"}': "in.jsonl, line 2: the key 'prompt' comes twice in one object",
    '{"prompt": "w1", "system": "w2"}': "in.jsonl, line 2: the key 'system' decides nothing here",
    '{"prompt": "w1", "temperature": 0}': "in.jsonl, line 2: the key 'temperature' decides nothing here",
    json.dumps({"prompt": " ".join(WORDS * 3)}): "in.jsonl, line 2 (prompt 1): 123 prompt tokens and up to 8 new ones",
}


@pytest.mark.parametrize("line", LINES)
def test_broken_input_is_refused_before_anything_runs(folder: Path, tmp_path: Path, capsys: Any, line: str) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{{"prompt": "w1"}}\n{line}\n')
    assert main(command(folder, source, out)) == 2
    captured = capsys.readouterr()
    assert LINES[line] in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_weights_under_the_name_of_the_output(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1", "weights": {"a": 2}}\n', encoding="utf-8")
    assert main(["generate", str(folder), "--input", str(tmp_path / "p.jsonl")]) == 2
    assert "write 'reward_weights'" in capsys.readouterr().err


def test_compressed_prompts_and_stdin(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same replies as from a plain file; another encoding is named."""
    options = ["--temperature", "0", "--max-new-tokens", "4", "--json"]
    jsonl, text = '{"prompt": "w1 w2"}\n{"prompt": "w3"}\n', "w1 w2\nw3\n"
    found = []
    for name, content in (("p.jsonl", jsonl), ("p.jsonl.gz", jsonl), ("p.txt.gz", text), ("-", jsonl), ("-", text)):
        raw = content.encode()
        source = name if name == "-" else str(tmp_path / name)
        if name == "-":
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
        else:
            Path(source).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        assert main(["generate", str(folder), "--input", source, *options]) == 0, name
        found.append([json.loads(line)["response"] for line in capsys.readouterr().out.splitlines()])
    assert found == [found[0]] * 5
    (tmp_path / "wide.jsonl").write_bytes(jsonl.encode("utf-16"))
    assert main(["generate", str(folder), "--input", str(tmp_path / "wide.jsonl"), *options]) == 2
    assert "wide.jsonl is in UTF-16" in capsys.readouterr().err


def test_length_is_checked_to_the_token(folder: Path, capsys: Any) -> None:
    """128 positions: 3 tokens of template and one word leave exactly 124."""
    assert main(["generate", str(folder), "--prompt", "w1", "--max-new-tokens", "124"]) == 0
    assert main(["generate", str(folder), "--prompt", "w1", "--max-new-tokens", "125"]) == 2
    assert "4 prompt tokens and up to 125 new ones are 129, more than the 128 positions" in capsys.readouterr().err


# --- how prompts are read -------------------------------------------------------------------------------------------


def test_how_prompts_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments of the template, and control tokens that are typed; an argument that does not exist is named."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    folder = save_member(tiny_model(), tmp_path / "model", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    typed = "w1 <end> w2"
    command = ["generate", str(folder), "--prompt", typed, "--temperature", "0", "--max-new-tokens", "9", "--json"]
    for reading, options in (
        (Reading(), []),
        (Reading(template_args={"enable_thinking": False}), ["--template-arg", "enable_thinking=false"]),
        (Reading(plain_user_text=True), ["--plain-user-text"]),
    ):
        ids = torch.tensor([encode_prompt(tokenizer, as_conversation(typed), reading)])
        assert ("<unk>" in tokenizer.decode(ids[0])) == reading.plain_user_text
        expected = model.generate(ids, do_sample=False, max_new_tokens=9)[0, ids.shape[1] :]
        assert main([*command, *options]) == 0
        said = json.loads(capsys.readouterr().out)["response"]
        assert said == tokenizer.decode(expected, skip_special_tokens=True)
    assert main([*command, "--template-arg", "enable_thinkng=false"]) == 2
    assert "no argument 'enable_thinkng'; did you mean enable_thinking?" in capsys.readouterr().err
