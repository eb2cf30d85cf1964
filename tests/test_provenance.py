"""What decides a result is known by content: every input, changed a little, is named; what decides nothing is not."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from builders.judge_server import JudgeServer, says
from builders.tiny import save_member, tiny_lora, tiny_model
from builders.toy_training import write_toy
from genarm.cli.main import main
from genarm.data.sources import SUFFIXES
from genarm.errors import DataError
from genarm.model.compose import compose
from genarm.provenance import AT, claim, code_record, data_record, difference, digest, file_content, model_record
from genarm.training.config import TrainConfig
from genarm.training.run import train

Edit = Callable[[], None]


def nudge(path: Path) -> None:
    """Another number in one tensor: what a training run would do, and no more."""
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, path
    path.write_text(text.replace(old, new, 1))


def edited(path: Path, edit: Callable[[Path], None]) -> Iterator[None]:
    """One file edited, then as it was, to the byte."""
    before = path.read_bytes()
    edit(path)
    yield
    path.write_bytes(before)


def named(path: Path, edit: Callable[[Path], None], command: list[str], capsys: Any) -> str:
    """What the command says once the file is edited; it must refuse."""
    error = ""
    for _ in edited(path, edit):
        capsys.readouterr()
        assert main(command) == 2, path
        error = capsys.readouterr().err
        assert error.count("\n") == 1
    return error


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """`guided` with a base, a whole ARM, an adapter and a tuned model's gain inside of it; the same beside it."""
    root = tmp_path / "models"
    base = tiny_model(seed=0)
    save_member(base, root / "base")
    save_member(tiny_model(seed=1), root / "full")
    tiny_lora(base, root / "adapter", seed=2, base_path=str(root / "base"))
    for name, seed in (("tuned", 3), ("untuned", 4)):
        save_member(tiny_model(seed=seed), root / name)
    rewards, tuned = {"own": root / "full", "low": root / "adapter"}, {"more": root / "tuned"}
    references = {"more": root / "untuned"}
    compose(root / "base", rewards, root / "guided", tuned=tuned, references=references, bundle=True)
    return root


INPUTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights of the base": ("guided/members/base/model.safetensors", nudge, "model.safetensors of base ("),
    "configuration of the base": (
        "guided/members/base/config.json",
        lambda p: replace(p, "1e-06", "1e-05"),
        "config.json of base (",
    ),
    "weights of an ARM": ("guided/members/own/model.safetensors", nudge, "model.safetensors of reward own ("),
    "an adapter, trained again": (
        "guided/members/low/adapter_model.safetensors",
        nudge,
        "adapter_model.safetensors of reward low (",
    ),
    "scale of an adapter": (
        "guided/members/low/adapter_config.json",
        lambda p: replace(p, '"lora_alpha": 8', '"lora_alpha": 9'),
        "adapter_config.json of reward low (",
    ),
    "a tuned model": ("guided/members/more/model.safetensors", nudge, "model.safetensors of reward more ("),
    "what it was before": (
        "guided/members/more.reference/model.safetensors",
        nudge,
        "model.safetensors of reference (",
    ),
    "tokenizer": ("guided/tokenizer.json", lambda p: replace(p, '"w1"', '"w1x"'), "tokenizer.json of model ("),
    "chat template": (
        "guided/chat_template.jinja",
        lambda p: p.write_text(p.read_text() + " "),
        "chat_template.jinja of model (",
    ),
    "generation": (
        "guided/generation_config.json",
        lambda p: replace(p, '"pad_token_id": 0', '"pad_token_id": 2'),
        "generation_config.json of model (",
    ),
    "a prompt": ("../in.jsonl", lambda p: replace(p, "w3", "w4"), "prompts_content has changed"),
    "weights of a prompt": ("../in.jsonl", lambda p: replace(p, "0.25", "0.75"), "prompts_content has changed"),
}


def test_generate_knows_its_inputs(models: Path, tmp_path: Path, capsys: Any) -> None:
    """Every input is named when it changes; a run of the edited input alone shows that it matters."""
    prompts = [{"prompt": "w1 w2"}, {"prompt": "w3", "reward_weights": {"own": 0.25}}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))

    def command(out: str) -> list[str]:
        options = ["--temperature", "0", "--max-new-tokens", "6", "--output", str(tmp_path / out)]
        return ["generate", str(models / "guided"), "--input", str(tmp_path / "in.jsonl"), *options]

    assert main(command("out.jsonl")) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    for what, (file, edit, message) in INPUTS.items():
        error = named(models / file, edit, command("out.jsonl"), capsys)
        assert "out.jsonl was made with other settings: " in error, what
        assert message in error, what
        assert "has changed; go on with the same ones, choose another --output, or remove" in error
        assert (tmp_path / "out.jsonl").read_bytes() == whole
    for _ in edited(models / "guided" / "members" / "low" / "adapter_model.safetensors", nudge_much):
        assert main(command("fresh.jsonl")) == 0
    rows = [[json.loads(line)["response"] for line in (tmp_path / f).read_text().splitlines()] for f in FRESH]
    assert rows[0] != rows[1]

    # What decides nothing: cards, logs, another time, another place.
    members = models / "guided" / "members"
    (members / "low" / "notes.md").write_text("mine")
    (members / "own" / "README.md").write_text("a card")
    os.utime(members / "base" / "model.safetensors")
    shutil.move(models, tmp_path / "moved")
    again = command("out.jsonl")
    again[1] = str(tmp_path / "moved" / "guided")
    capsys.readouterr()
    assert main(again) == 0
    assert "is complete: 2 of 2 rows" in capsys.readouterr().err

    (tmp_path / "out.jsonl.settings.json").write_text('{"digest": "d", "settings": {"model": "m"}}')
    assert main(again) == 2
    assert "has no record of what" in capsys.readouterr().err


FRESH = ("out.jsonl", "fresh.jsonl")


def nudge_much(path: Path) -> None:
    save_file({name: tensor + torch.randn_like(tensor) for name, tensor in load_file(path).items()}, path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("wish.py").write_text(
        "from help_wish import count\n\ndef score(prompt, response):\n    return count(response)\n"
    )
    Path("help_wish.py").write_text("def count(text):\n    return len(text.split())\n")
    yield tmp_path
    for name in ("wish", "help_wish"):
        sys.modules.pop(name, None)


def test_pairs_know_their_inputs(models: Path, here: Path, capsys: Any) -> None:
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(4)))
    options = ["--samples", "4", "--max-new-tokens", "6", "--output", "pairs.jsonl"]
    command = ["pairs", "--model", str(models / "base"), "--prompts", "p.jsonl", "--score", "function=wish:score"]
    assert main([*command, *options]) == 0
    for file, edit, message in (
        (models / "base" / "model.safetensors", nudge, "model.safetensors of model ("),
        (Path("p.jsonl"), lambda p: replace(p, "w3", "w4"), "prompts_content has changed"),
        (Path("wish.py"), lambda p: replace(p, "count(response)", "-count(response)"), "wish.py of code ("),
        (Path("help_wish.py"), lambda p: replace(p, "len", "-len"), "help_wish.py of code ("),
    ):
        assert message in named(file, edit, [*command, *options], capsys)
    Path("unrelated.py").write_text("import wish\n")
    assert main([*command, *options]) == 0


def test_judge_knows_its_inputs(tmp_path: Path, capsys: Any) -> None:
    for name in ("a", "b"):
        rows = [{"index": i, "sample": 0, "prompt": f"p{i}", "response": name} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {
        "template": "{prompt} {first} {second}",
        "parser": {"kind": "two-scores"},
        "sampling": {"max_tokens": 9, "temperature": 0.5},
    }
    protocol = tmp_path / "own.toml"
    protocol.write_text(tomli_w.dumps(table))
    with JudgeServer(lambda *_: says("2 1")) as server:
        files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
        options = ["--protocol", str(protocol), "--model", "j", "--base-url", server.url]
        command = ["judge", *files, *options, "--output", str(tmp_path / "v.jsonl")]
        assert main(command) == 0
        asked = len(server.seen)
        for file, edit, message in (
            (tmp_path / "a.jsonl", lambda p: replace(p, '"a"', '"c"'), "answers of first ("),
            (tmp_path / "b.jsonl", lambda p: replace(p, '"b"', '"c"'), "answers of second ("),
            (protocol, lambda p: replace(p, "{first} {second}", "{second} {first}"), "template of protocol was"),
            (protocol, lambda p: replace(p, "0.5", "0.7"), "temperature of sampling of protocol was 0.5 and is 0.7"),
            (protocol, lambda p: replace(p, '"two-scores"', '"two-scores"\nhigh = 5'), "parser of protocol was"),
        ):
            assert message in named(file, edit, command, capsys)
        assert main(command) == 0
        assert len(server.seen) == asked


RECIPE: dict[str, Any] = {
    "prompts": {"data": "p.jsonl", "count": 3, "column": "prompt"},
    "sampling": {"max_new_tokens": 4, "batch_size": 2},
    "reference": "base",
    "methods": [{"kind": "sample", "name": "base", "model": "models/base"}],
    "judges": [
        {"name": "wish", "kind": "function", "source": "wish:score"},
        {"name": "right", "kind": "last-number", "source": "answer"},
    ],
}
GUIDED = {"kind": "genarm", "name": "guided", "base": "models/base", "rewards": {"low": "models/adapter"}}


def test_eval_knows_its_inputs(models: Path, here: Path, capsys: Any) -> None:
    def write(**changes: Any) -> None:
        Path("r.toml").write_text(tomli_w.dumps({"tiny": {**RECIPE, **changes}}))

    rows = [{"prompt": f"w{i}", "answer": str(i)} for i in range(3)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write()
    command = ["eval", "r.toml", "--output", "run", "--device", "cpu"]
    assert main(command) == 0
    before = Path("run/answers/base.jsonl").read_bytes()
    write(methods=[*RECIPE["methods"], GUIDED])  # a method may come later
    assert main(command) == 0
    assert Path("run/answers/base.jsonl").read_bytes() == before
    for file, edit, message in (
        (Path("p.jsonl"), lambda p: replace(p, "w2", "w3"), "text of prompts (p.jsonl) has changed"),
        (Path("p.jsonl"), lambda p: replace(p, '"2"', '"3"'), "rows of the prompts has changed"),
        (Path("wish.py"), lambda p: replace(p, "count(response)", "-count(response)"), "wish.py of code ("),
        (Path("help_wish.py"), lambda p: replace(p, "len", "-len"), "help_wish.py of code ("),
        (models / "base" / "model.safetensors", nudge, "model.safetensors of model ("),
        (models / "base" / "tokenizer.json", lambda p: replace(p, '"w39"', '"w39x"'), "tokenizer.json of model ("),
        (models / "adapter" / "adapter_model.safetensors", nudge, "adapter_model.safetensors of low ("),
        (Path("run/answers/base.jsonl"), lambda p: replace(p, '"response": "', '"response": "w0 '), "replies of base"),
        (Path("r.toml"), lambda p: replace(p, "max_new_tokens = 4", "max_new_tokens = 5"), "was 4 and is 5"),
    ):
        assert message in named(file, edit, command, capsys), file
    assert main(command) == 0
    assert Path("run/answers/base.jsonl").read_bytes() == before


def test_resumed_training_knows_its_inputs(tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=16), "max_steps": 1, "lora": True}
    config = TrainConfig(**settings)
    train(config, console=Console(quiet=True))

    def resume() -> str:
        console = Console(file=io.StringIO(), width=300)
        train(config, resume=True, console=console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    for file, edit, message in (
        (tmp_path / "train.jsonl", lambda p: replace(p, "w2", "w3"), "tokens of training data ("),
        (tmp_path / "test.jsonl", lambda p: replace(p, "w2", "w3"), "tokens of held-out data ("),
        (tmp_path / "model" / "model.safetensors", nudge, "model.safetensors of model ("),
    ):
        for _ in edited(file, edit):
            with pytest.raises(DataError, match="arm was made with other settings") as caught:
                resume()
            assert message in str(caught.value)
    for _ in edited(tmp_path / "train.jsonl", lambda p: p.write_text("\n" + p.read_text())):
        assert "is finished already" in resume()
    (tmp_path / "arm" / "inputs.json").unlink()
    with pytest.raises(DataError, match=r"arm has no inputs\.json, .* choose another --output, or remove"):
        resume()


# --- the mechanism ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": {AT: "x", "f": "content 1"}}, {"a": {AT: "y", "f": "content 1"}}, None),
        ({"a": {"b": 0.7}}, {"a": {"b": 1.0}}, "b of a was 0.7 and is 1.0"),
        ({"a": {AT: "x", "f": "content 1"}}, {"a": {AT: "y", "f": "content 2"}}, "f of a (y) has changed"),
        ({"weights": {AT: 1.0}}, {"weights": {AT: 9.0}}, "at of weights was 1.0 and is 9.0"),  # a reward of that name
        ({"wishes": {AT: "x", "b": "z"}}, {"wishes": {AT: "y", "b": "z"}}, "at of wishes was 'x' and is 'y'"),
        (
            {"m": {"a": {AT: "x", "f": "content 1"}}},
            {"m": {"a": {AT: "x", "f": "content 2"}}},
            "f of a (x) has changed",
        ),
        ({"a": {"f": "content 1"}}, {"a": {}}, "f of a is there no more"),
        ({}, {"a": None}, "a was not there"),
        ({"a": None}, {"a": {"b": 1}}, "a was None and is another thing"),
        ({"a": [1, 2]}, {"a": [2, 1]}, "a was [1, 2] and is [2, 1]"),
    ],
)
def test_the_first_difference_in_words(before: Any, now: Any, words: str | None) -> None:
    assert difference(before, now) == words
    assert (digest(before) == digest(now)) == (words is None)


def test_what_a_reward_is_compared_with_decides(models: Path, tmp_path: Path) -> None:
    """The base, another model, or nothing."""
    folders = [tmp_path / name for name in ("base", "other", "nothing")]
    tuned = {"more": models / "tuned"}
    compose(models / "base", {}, folders[0], tuned=tuned)
    compose(models / "base", {}, folders[1], tuned=tuned, references={"more": models / "untuned"})
    compose(models / "base", tuned, folders[2])
    base, other, nothing = (model_record(str(folder)) for folder in folders)
    for before, now in ((base, other), (other, base), (other, nothing), (nothing, base)):
        assert str(difference(before, now)).startswith("reference ")


def test_the_words_of_a_wish_decide(models: Path, tmp_path: Path) -> None:
    records = []
    for name, words in (("one", "w1 w2"), ("same", "w1 w2"), ("other", "w1 w3")):
        compose(models / "base", {}, tmp_path / name, wishes={"kind": words})
        records.append(model_record(str(tmp_path / name)))
    assert difference(records[0], records[1]) is None
    assert str(difference(records[0], records[2])).startswith("wish of reward kind was 'w1 w2' and is 'w1 w3'")


@pytest.mark.parametrize("ending", [*SUFFIXES, ".jsonl.xz", ".jsonl.bz2", ".ndjson", ".txt"])
def test_whatever_lies_in_a_folder_of_data_decides(ending: str, tmp_path: Path) -> None:
    found = []
    for said in (b"one", b"other"):
        (tmp_path / f"train{ending}").write_bytes(said)
        found.append(data_record(str(tmp_path)))
    assert difference(*found) == f"train{ending} has changed"
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "notes").write_bytes(b"")
    assert difference(found[1], data_record(str(tmp_path))) is None


def test_claims(tmp_path: Path) -> None:
    path, part = tmp_path / "o.jsonl", tmp_path / "part"
    assert claim(path, {"a": 1}) == digest({"a": 1})
    assert claim(path, {"a": 2}) == digest({"a": 2})  # nothing had been written
    part.write_text("begun")
    with pytest.raises(DataError, match="a was 2 and is 3; go on with the same ones, choose another --output, or rem"):
        claim(path, {"a": 3}, parts=[part])
    for written in ("{", "[]", '{"record": 3}'):
        (tmp_path / "o.jsonl.settings.json").write_text(written)
        with pytest.raises(DataError, match=r"o\.jsonl\.settings\.json.*choose another --output, or remove"):
            claim(path, {"a": 2}, parts=[part])


def test_large_files_are_sampled(tmp_path: Path) -> None:
    """Any change of size, header, a tensor's beginning, or 64 KiB together in the right place; in little time."""
    path = tmp_path / "large.safetensors"
    tensors = {f"t{i}": torch.zeros(270 * 2**18 // 30) for i in range(30)}
    save_file(tensors, path)
    started = time.perf_counter()
    found = file_content(path, sampled=True)
    assert time.perf_counter() - started < 2  # 0.03 s on a machine of its own
    for number in (0, 13, 29):
        changed = {**tensors, f"t{number}": tensors[f"t{number}"].clone()}
        changed[f"t{number}"][5] = 1.0
        save_file(changed, path)
        assert file_content(path, sampled=True) != found
    save_file({("u" + name[1:]): tensor for name, tensor in tensors.items()}, path)
    assert file_content(path, sampled=True) != found


def test_hub_names_stand_for_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert model_record("org/none")["commit"] is None
    assert model_record("org/none@v1") == {"hub": "org/none", "revision": "v1", "commit": None}


def test_code_is_followed_into_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "judges_of_mine"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "sub" / "__init__.py").write_text("")
    (package / "sub" / "deep.py").write_text("import json\n")
    (package / "near.py").write_text("VALUE = 1\n")
    (package / "unused.py").write_text("")
    (package / "main.py").write_text(
        "from judges_of_mine.sub import deep\n\ndef score(p, r):\n    from .near import VALUE\n    return VALUE\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from judges_of_mine.main import score  # type: ignore[import-not-found]

    assert set(code_record(score)) == {AT, "main.py", "near.py", "sub/__init__.py", "sub/deep.py"}
