"""Chat: the conversation and its commands on a screen that remembers, and the real command on pipes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.tiny import save_member, tiny_model, tiny_tokenizer
from genarm.cli.chat import TerminalScreen
from genarm.cli.conversation import Chat, ChatReply
from genarm.cli.main import main
from genarm.engine import Engine, EngineOptions
from genarm.model.compose import compose
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.references import ModelFiles, open_files
from genarm.model.token_rewards import TokenRewards
from genarm.sampling import Sampling
from genarm.terminal import PlainConsole


@dataclass
class Memory:
    """A screen that keeps what it is shown; `on_piece` runs at each piece, as a signal handler would."""

    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    answers: list[ChatReply] = field(default_factory=list)
    pairs: list[tuple[ChatReply, ChatReply]] = field(default_factory=list)
    sharpened: list[tuple[float, ChatReply] | None] = field(default_factory=list)
    heats: list[TokenRewards] = field(default_factory=list)
    on_piece: Callable[[], None] = lambda: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def error(self, text: str) -> None:
        self.errors.append(text)

    def piece(self, text: str) -> None:
        self.pieces.append(text)
        self.on_piece()

    def answered(self, answer: ChatReply) -> None:
        self.answers.append(answer)

    def compared(self, base: ChatReply, guided: ChatReply, sharpened: tuple[float, ChatReply] | None) -> None:
        self.pairs.append((base, guided))
        self.sharpened.append(sharpened)

    def heat(self, rewards: TokenRewards) -> None:
        self.heats.append(rewards)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    members = [save_member(tiny_model(seed=i), root / f"m{i}") for i in range(3)]
    compose(members[0], {"helpful": members[1], "harmless": members[2]}, root / "guided", weights={"harmless": 0.5})
    return root / "guided"


@pytest.fixture(scope="module")
def opened(folder: Path) -> tuple[Engine, ModelFiles]:
    files = open_files(str(folder))
    model = files.load(device="cpu")
    assert isinstance(model, GuidedForCausalLM)
    return Engine(model, files.tokenizer, EngineOptions(streams=2)), files


@pytest.fixture
def screen() -> Memory:
    return Memory()


@pytest.fixture
def chat(opened: tuple[Engine, ModelFiles], screen: Memory) -> Chat:
    return Chat(*opened, screen, Sampling(max_new_tokens=10, temperature=0))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def greedy(model: Any, messages: list[dict[str, str]], n: int = 10, **options: Any) -> str:
    """The reference: transformers' own generate on transformers' own template."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=n, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# --- the conversation -----------------------------------------------------------------------------------------------


def test_answers_follow_the_conversation(chat: Chat, screen: Memory) -> None:
    assert chat.handle("w1 w2\n")
    first = greedy(chat.engine.model, [user("w1 w2")])
    assert chat.handle("w3")
    second = greedy(chat.engine.model, [user("w1 w2"), assistant(first), user("w3")])
    assert [a.text for a in screen.answers] == [first, second]
    assert "".join(screen.pieces) == first + second
    assert len(screen.pieces) > 4  # it streams
    assert chat.history == [user("w1 w2"), assistant(first), user("w3"), assistant(second)]
    assert first != greedy(chat.engine.model, [user("w3")])


def test_the_same_lines_and_seed_give_the_same_answers(opened: tuple[Engine, ModelFiles]) -> None:
    def talk(seed: int) -> list[str]:
        screen = Memory()
        chat = Chat(*opened, screen, Sampling(max_new_tokens=8), seed=seed)
        for line in ("w1", "/compare w5", "/reset", "w1"):
            chat.handle(line)
        return [a.text for a in screen.answers] + [a.text for pair in screen.pairs for a in pair]

    assert talk(3) == talk(3)
    assert talk(3) != talk(4)
    assert talk(3)[0] != talk(3)[1]  # asking again is another draw


def test_weights_change_in_mid_conversation(chat: Chat, screen: Memory) -> None:
    chat.handle("/weights")
    chat.handle("w1")
    chat.handle("/weights harmless=2 helpful=-0.5")
    chat.handle("w2")
    chat.handle("/weights helpful=0")
    assert screen.notes == ["helpful=1 harmless=0.5", "helpful=-0.5 harmless=2", "helpful=0 harmless=2"]
    first, second = screen.answers
    assert first.weights == {"helpful": 1, "harmless": 0.5}
    assert second.weights == {"helpful": -0.5, "harmless": 2}
    conversation = [user("w1"), assistant(first.text), user("w2")]
    assert second.text == greedy(chat.engine.model, conversation, reward_weights={"helpful": -0.5, "harmless": 2})
    assert second.text != greedy(chat.engine.model, conversation)


def test_compare_is_the_base_beside_the_guided_model(chat: Chat, screen: Memory) -> None:
    """Against the base model itself; the conversation does not change."""
    chat.handle("/system w9")
    chat.handle("w1")
    history = list(chat.history)
    chat.handle("/compare")
    chat.handle("/compare w2 w3")
    system = {"role": "system", "content": "w9"}
    for pair, messages in zip(screen.pairs, ([system, user("w1")], [system, *history, user("w2 w3")]), strict=True):
        assert pair[0].text == greedy(chat.engine.model.base, messages)
        assert pair[1].text == greedy(chat.engine.model, messages)
        assert pair[0].weights == {"helpful": 0, "harmless": 0}
    assert screen.pairs[0][0].text != screen.pairs[0][1].text
    assert screen.pairs[0][1].text == screen.answers[0].text
    assert chat.history == history


def test_a_comparison_has_the_base_sharpened_as_rewards_that_learnt_nothing_would(
    opened: tuple[Engine, ModelFiles], screen: Memory
) -> None:
    """The third answer is the base's own at T / (1 + Σw); none where that is no lower temperature."""
    chat = Chat(*opened, screen, Sampling(max_new_tokens=8, temperature=0.9), seed=3, weights={"helpful": 1.5})
    chat.handle("/compare w1")
    temperature, answer = screen.sharpened[0] or (0, None)
    assert temperature == pytest.approx(0.9 / 3)
    alone = Chat(*opened, screen, Sampling(max_new_tokens=8, temperature=0.9 / 3), seed=3)
    alone.weights = dict.fromkeys(alone.weights, 0.0)
    alone.handle("w1")
    assert answer == screen.answers[0]
    for weights, sampling in (({"helpful": -2}, {"temperature": 0.9}), ({}, {"temperature": 0.0})):
        Chat(*opened, screen, Sampling(max_new_tokens=8, **sampling), weights=weights).handle("/compare w1")
        assert screen.sharpened[-1] is None


def test_tokens_shows_the_last_answer_as_it_was_given(chat: Chat, screen: Memory) -> None:
    """With the weights, the bound and the system message of that answer, whatever was changed since."""
    chat.handle("/system w9")
    chat.handle("/kl 0.05")
    chat.handle("w1")
    chat.handle("/weights helpful=7")
    chat.handle("/system off")
    chat.handle("/kl off")
    chat.handle("/tokens")
    expected = chat.engine.model.token_rewards(
        [{"role": "system", "content": "w9"}, user("w1")],
        screen.answers[0].text,
        tokenizer=tiny_tokenizer(),
        max_kl=0.05,
    )
    assert screen.heats == [expected]
    assert any("cut" in note for note in screen.notes) == (screen.answers[0].ended == "length")


def test_system_message_and_reset(chat: Chat, screen: Memory) -> None:
    chat.handle("/system w9 w8")
    chat.handle("/system")
    chat.handle("w1")
    chat.handle("/reset")
    assert chat.history == []
    chat.handle("/system off")
    chat.handle("w1")
    assert screen.notes == ["system message: w9 w8"] * 2 + ["new conversation", "no system message"]
    with_system = greedy(chat.engine.model, [{"role": "system", "content": "w9 w8"}, user("w1")])
    assert [a.text for a in screen.answers] == [with_system, greedy(chat.engine.model, [user("w1")])]


BAD = {
    "/weights kind=1": "no reward is named 'kind'; this model has: helpful, harmless",
    "/weights helpful": "cannot read the weight 'helpful'",
    "/weights helpful=nan": "cannot read the weight 'helpful=nan'",
    "/weights helpful=1 helpful=2": "given twice",
    "/compare": "there is no message to compare",
    "/tokens": "there is no answer to show yet",
    "/tokens 3": "/tokens takes nothing after it, got '3'",
    "/kl much": "cannot read 'much' as a number of nats; write /kl 0.3, or /kl off",
    "/kl -1": "max_kl is -1.0; it must be a number of nats per token, 0 or more",
    "/reset all": "/reset takes nothing after it",
    "/wieghts": "there is no command '/wieghts'; there are /weights, /wish, /kl, /compare, /tokens, /system, "
    "/reset, /help, "
    "/quit",
    "/": "there is no command '/'",
    "w1 "
    * 200: "this message alone has 203 tokens as the model reads it, and there is room for 128, its answer included; "
    "shorten it",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_changes_nothing(chat: Chat, screen: Memory, line: str) -> None:
    assert chat.handle(line)
    assert [BAD[line] in error for error in screen.errors] == [True]
    assert (chat.history, chat.weights, screen.answers) == ([], {"helpful": 1, "harmless": 0.5}, [])
    assert chat.handle("w1")
    assert len(screen.answers) == 1


def test_lines_that_are_no_commands(chat: Chat, screen: Memory) -> None:
    assert chat.handle("")
    assert chat.handle("  \n")
    assert chat.history == []
    assert chat.handle(" /quit")  # a space before the slash: a message
    assert chat.history[0] == user("/quit")
    assert not chat.handle("/quit")
    assert not chat.handle("/exit")
    assert chat.handle("/help")
    for command in ("/weights", "/compare", "/tokens", "/system", "/reset", "/help", "/quit", "Ctrl-C", "Ctrl-D"):
        assert command in screen.notes[-1]


def test_an_answer_has_only_the_room_that_is_left(opened: tuple[Engine, ModelFiles]) -> None:
    """128 positions; a long conversation is cut there and the next message refused."""
    screen = Memory()
    chat = Chat(*opened, screen, Sampling(max_new_tokens=500, temperature=0), weights={"helpful": 0, "harmless": 0})
    chat.handle("w1 " * 120)
    assert screen.answers[0].ended == "length"
    assert len(screen.answers[0].text.split()) <= 5
    chat.handle("w1")
    assert "begin a new one with /reset" in screen.errors[0]
    chat.handle("/reset")
    chat.handle("w1")
    assert len(screen.answers) == 2


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_stopped_answer_stays_as_far_as_it_came(chat: Chat, screen: Memory, pieces: int) -> None:
    def interrupt() -> None:
        if len(screen.pieces) == pieces:
            raise KeyboardInterrupt

    screen.on_piece = interrupt
    assert chat.handle("w1")
    cut = "".join(screen.pieces)
    assert screen.answers == [ChatReply(text=cut, ended="interrupted", weights=chat.weights)]
    assert greedy(chat.engine.model, [user("w1")]).startswith(cut)
    assert chat.history == [user("w1"), assistant(cut)]
    screen.on_piece = lambda: None
    assert chat.handle("w2")
    assert screen.answers[1].text == greedy(chat.engine.model, [*chat.history[:2], user("w2")])


def test_an_ordinary_causal_lm_can_chat_but_has_no_rewards(folder: Path, screen: Memory) -> None:
    files = open_files(str(folder.parent / "m0"))
    model = files.load(device="cpu")
    chat = Chat(Engine(model, files.tokenizer), files, screen, Sampling(max_new_tokens=6, temperature=0))
    chat.handle("w1")
    assert screen.answers[0].text == greedy(model, [user("w1")], n=6)
    for line in ("/weights", "/weights a=1", "/compare", "/tokens"):
        chat.handle(line)
    assert len(screen.errors) == 4
    assert all("is not a guided model" in error for error in screen.errors)


def test_wishes_are_made_weighed_and_taken_back(folder: Path, opened: tuple[Engine, ModelFiles]) -> None:
    files = open_files(str(folder.parent / "m0"))
    model = files.load(device="cpu")
    plain = Engine(model, files.tokenizer, EngineOptions(streams=3))
    prompted = greedy(model, [{"role": "system", "content": "w7 w8"}, user("w1")], n=6)
    silent = {"helpful": 0.0, "harmless": 0.0}
    for engine, own, weights in ((plain, files, {}), (*opened, silent)):
        screen = Memory()
        chat = Chat(engine, own, screen, Sampling(max_new_tokens=6, temperature=0), weights=weights)
        for line in ("/wish kind=w7 w8", "w1", "/tokens", "/reset", "/weights kind=0", "w1", "/wish kind=off", "/wish"):
            chat.handle(line)
        assert not screen.errors
        assert [answer.text for answer in screen.answers] == [prompted, greedy(model, [user("w1")], n=6)]
        assert screen.answers[0].kl
        assert not screen.answers[1].kl
        assert "kind" in screen.heats[0].rewards
        assert screen.notes[0].startswith("kind=1: w7 w8")
        assert "no wishes" in screen.notes[-1]
        assert "kind" not in chat.weights
        for line in ("/wish kind", "/wish =x", "/wish kind=off", "/wish base=x", "/wish 9=x"):
            chat.handle(line)
        for name in "abcde":
            chat.handle(f"/wish {name}=w1")
        assert len(screen.errors) == 6
        assert "there are 4 wishes already" in screen.errors[-1]


def test_a_message_that_is_too_long_alone(opened: tuple[Engine, ModelFiles], screen: Memory) -> None:
    """/reset would not help there."""
    model, files = opened[0].model, opened[1]
    with Engine(model, files.tokenizer, EngineOptions(streams=2, context=32)) as engine:
        chat = Chat(engine, files, screen, Sampling(max_new_tokens=4), system="w1 w1")
        chat.handle("w2 " * 20)
        chat.handle("w3 " * 40)
        chat.handle("/reset")
        chat.handle("w3 " * 40)
    advice = (
        "this message alone has 47 tokens as the model reads it, and there is room for 32, its answer included; "
        "shorten it, or start genarm chat with a larger --context (up to 128)"
    )
    assert screen.errors == [advice, advice]


def test_a_message_of_several_lines_is_no_command(chat: Chat, screen: Memory) -> None:
    chat.handle("/weights harmless=9\nw2", message=True)
    assert chat.weights["harmless"] == 0.5
    assert chat.history[0] == user("/weights harmless=9\nw2")
    chat.handle("/system w1\nw2")
    assert chat.system == "w1\nw2"


# --- the terminal ---------------------------------------------------------------------------------------------------


def shown(colours: bool) -> tuple[TerminalScreen, io.StringIO]:
    file = io.StringIO()
    system: Any = "truecolor" if colours else None
    return TerminalScreen(PlainConsole(file=file, width=120, force_terminal=colours, color_system=system)), file


def test_two_columns_and_no_tricks_on_the_terminal() -> None:
    """What a model says is text: neither markup nor control sequences."""
    screen, file = shown(colours=False)
    evil = "[bold]x[/bold] \x1b[2J \x9b1m \x07"
    screen.piece(evil)
    screen.note(evil)
    screen.error(f"a\n{evil}")
    weights = {"helpful": 2.0}
    screen.compared(
        ChatReply(text=f"left {evil}", ended="stop", weights={"helpful": 0.0}),
        ChatReply(text="right", ended="interrupted", weights=weights),
        (0.25, ChatReply(text="third", ended="stop", weights={"helpful": 0.0})),
    )
    text = file.getvalue()
    assert not {"\x1b", "\x9b", "\x07"} & set(text)
    assert text.count("[bold]x[/bold]") == 4
    line = next(line for line in text.splitlines() if "left" in line)
    assert "right" in line
    assert "third" in line
    assert "sharpened" in text
    assert "[stopped]" in text
    assert "guided helpful=2" in text


def test_heat_is_colour_where_there_is_colour_and_numbers_where_not(chat: Chat, screen: Memory) -> None:
    chat.handle("w1")
    chat.handle("/tokens")
    rewards = screen.heats[0]
    coloured, file = shown(colours=True)
    coloured.heat(rewards)
    assert "\x1b[38;2;" in file.getvalue()
    assert "helpful − base" in file.getvalue()
    plain, file = shown(colours=False)
    plain.heat(rewards)
    assert "\x1b" not in file.getvalue()
    assert "log π_helpful" in file.getvalue()


def test_chat_on_a_pipe(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"w1\n/weights harmless=2\nbad\xff byte\n/nonsense\n/compare\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert main(["chat", str(folder), "--temperature", "0", "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    model = GuidedForCausalLM.from_pretrained(folder)
    assert out.splitlines()[0] == greedy(model, [user("w1")], n=5)
    assert "helpful=1 harmless=2" in out
    assert "error: there is no command '/nonsense'" in out
    assert "guided helpful=1 harmless=2" in out
    assert max(map(len, out.splitlines())) <= 130


def test_ctrl_c_stops_the_answer_and_nothing_else(tmp_path: Path) -> None:
    """A real signal to the real command, in the middle of an answer that would take minutes."""
    members = []
    for i in range(2):
        model = tiny_model(seed=i)
        model.config.max_position_embeddings = 100_000
        with torch.no_grad():
            model.lm_head.weight[1] = 0  # its greedy answers never end
        members.append(save_member(model, tmp_path / f"m{i}"))
    compose(members[0], {"helpful": members[1]}, tmp_path / "guided")
    options = ["--temperature", "0", "--max-new-tokens", "90000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "genarm", "chat", str(tmp_path / "guided"), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"w1\n")
    process.stdin.flush()
    begun = process.stdout.read(9)  # three words: the answer is on its way
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(b"/weights helpful=3\n", timeout=60)
    assert process.returncode == 0, err.decode()
    answer, *rest = (begun + out).decode().splitlines()
    assert 3 <= len(answer.split()) < 90_000
    assert rest == ["[stopped]", "helpful=3"]
    assert err == b""
