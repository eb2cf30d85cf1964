"""The LLM judge against a real HTTP server that also misbehaves."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from builders.judge_server import Act, JudgeServer, Seen, completion, says
from genarm.errors import ConfigError, DataError, GenarmError
from genarm.lab.judges.cache import ReplyCache, cache_key
from genarm.lab.judges.client import ChatClient, Completion, Failure
from genarm.lab.judges.llm import Answer, Pair, Verdict, estimate, judge_pairs, score_responses, summarise
from genarm.lab.judges.parsing import VerdictTag
from genarm.lab.judges.protocol import load_protocol
from genarm.lab.judges.settings import ClientSettings
from genarm.provenance import digest

KEY = "sk-test/0123456789+abcdef"
PAIRWISE = load_protocol("pairwise")


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def settings(server: JudgeServer, **more: Any) -> ClientSettings:
    return ClientSettings(**{"model": "m", "base_url": server.url, "backoff": 0.01, "timeout": 5.0, **more})


def shown(question: str) -> tuple[str, str]:
    """The answers that a `pairwise` question shows, in its order."""
    first = question.split("[Answer A]\n")[1].split("\n[End of answer A]")[0]
    second = question.split("[Answer B]\n")[1].split("\n[End of answer B]")[0]
    return first, second


def longer(seen: Seen, number: int) -> Act:
    """A judge that prefers the longer answer."""
    first, second = shown(seen.question)
    return says("It is longer. [[A]]" if len(first) > len(second) else "[[B]]" if len(first) < len(second) else "[[C]]")


def pairs(n: int = 4) -> list[Pair]:
    return [Pair(prompt=f"prompt {i}", first="x" * (i + 1), second="y" * 3) for i in range(n)]


def judge(server: JudgeServer, folder: Path, items: list[Pair] | None = None, **more: Any) -> list[Verdict]:
    return judge_pairs(items or pairs(), PAIRWISE, settings(server, **more), ReplyCache(folder))


def ask(server: JudgeServer, **more: Any) -> Completion | Failure:
    async def run() -> Completion | Failure:
        async with ChatClient(settings(server, **more)) as client:
            return await client.complete([{"role": "user", "content": "hello"}], {"max_tokens": 3})

    return asyncio.run(run())


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_verdicts_follow_the_judge_and_both_orders_are_asked(tmp_path: Path) -> None:
    with JudgeServer(longer) as server:
        verdicts = judge(server, tmp_path)
    assert [verdict.outcome for verdict in verdicts] == ["lose", "lose", "tie", "win"]
    assert [verdict.preferences for verdict in verdicts] == [(-1, -1), (-1, -1), (0, 0), (1, 1)]
    orders = Counter(shown(seen.question) for seen in server.seen)
    assert orders == Counter(order for p in pairs() for order in ((p.first, p.second), (p.second, p.first)))
    assert {seen.path for seen in server.seen} == {"/v1/chat/completions"}
    body = server.seen[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 1024)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "Authorization" not in server.seen[0].headers
    summary = summarise(verdicts)
    assert (summary.items, summary.unparsed, summary.failed, summary.inconsistent) == (4, 0, 0, 0)
    assert (summary.prompt_tokens, summary.completion_tokens) == (8 * 100, 8 * 7)


def test_a_judge_that_goes_by_the_place_gives_ties(tmp_path: Path) -> None:
    with JudgeServer(lambda seen, number: says("[[A]]")) as server:
        verdicts = judge(server, tmp_path)
    assert [verdict.outcome for verdict in verdicts] == ["tie"] * 4
    summary = summarise(verdicts)
    assert (summary.inconsistent, summary.for_first, summary.for_second) == (4, 4, 0)


@pytest.mark.parametrize(
    ("straight", "swapped", "outcome"),
    [
        ("[[A]]", "[[B]]", "win"),
        ("[[A]]", "[[C]]", "win"),
        ("[[C]]", "[[B]]", "win"),
        ("[[C]]", "[[C]]", "tie"),
        ("[[A]]", "[[A]]", "tie"),
        ("[[B]]", "[[B]]", "tie"),
        ("[[C]]", "[[A]]", "lose"),
        ("[[B]]", "[[A]]", "lose"),
        ("[[A]]", "no idea", None),
        ("no idea", "[[A]]", None),
        (None, "[[A]]", None),
    ],
)
def test_the_outcome_is_the_sign_of_both_orders(
    tmp_path: Path, straight: str | None, swapped: str | None, outcome: str | None
) -> None:
    def behave(seen: Seen, number: int) -> Act:
        return says(straight if shown(seen.question)[0] == "one" else swapped)

    with JudgeServer(behave) as server:
        verdicts = judge(server, tmp_path, [Pair(prompt="p", first="one", second="two")])
    assert verdicts[0].outcome == outcome
    assert not verdicts[0].failed
    assert summarise(verdicts).unparsed == (outcome is None)
    record = verdicts[0].record()
    assert [order["reply"] for order in record["orders"]] == [straight or "", swapped]
    assert record["outcome"] == outcome


def test_scores_by_a_rubric(tmp_path: Path) -> None:
    rubric = tmp_path / "short.txt"
    rubric.write_text("Short answers are good.")
    protocol = load_protocol(rubric)
    answers = [Answer(prompt="p", response=response) for response in ("a", "bb", "?", "ccc")]

    def behave(seen: Seen, number: int) -> Act:
        response = seen.question.split("[Answer]\n")[1].split("\n[End")[0]
        return says("I decline." if response == "?" else f"Well.\nScore: {10 - len(response)}")

    with JudgeServer(behave) as server:
        scores = score_responses(answers, protocol, settings(server), ReplyCache(tmp_path / "cache"))
        assert [score.value for score in scores] == [9, 8, None, 7]
        assert all("Short answers are good." in seen.question for seen in server.seen)
        assert (summarise(scores).items, summarise(scores).unparsed) == (4, 1)
        with pytest.raises(ConfigError, match="one for pairs"):
            judge_pairs(pairs(), protocol, settings(server), ReplyCache(tmp_path))
        with pytest.raises(ConfigError, match="one for scores"):
            score_responses(answers, PAIRWISE, settings(server), ReplyCache(tmp_path))


def test_progress_and_equal_questions(tmp_path: Path) -> None:
    """Equal questions are asked once; every one of them is settled."""
    steps: list[None] = []
    same = [Pair(prompt="p", first="a", second="a"), Pair(prompt="p", first="a", second="a")]
    with JudgeServer(lambda seen, number: says("[[A]]")) as server:
        verdicts = judge_pairs(same, PAIRWISE, settings(server), ReplyCache(tmp_path), lambda: steps.append(None))
    assert len(steps) == 4
    assert len(server.seen) == 1
    assert [verdict.outcome for verdict in verdicts] == ["tie", "tie"]


def test_in_a_thread_with_an_event_loop(tmp_path: Path) -> None:
    async def notebook() -> list[Verdict]:
        return judge(server, tmp_path)

    with JudgeServer(longer) as server:
        assert [verdict.outcome for verdict in asyncio.run(notebook())] == ["lose", "lose", "tie", "win"]


# --- an endpoint that misbehaves ------------------------------------------------------------------------------------

MISDEEDS: dict[str, Act] = {
    "429": Act(status=429, body={"error": {"message": "slow down"}}),
    "500": Act(status=500, body=b"oh no"),
    "529": Act(status=529, body=b"overloaded"),
    "truncated JSON": Act(body=json.dumps(completion("[[A]]")).encode()[:-20]),
    "truncated body": Act(body=completion("[[A]]"), truncate=True),
    "no choices": Act(body={"choices": []}),
    "an error of 200": Act(body={"error": {"message": "upstream"}}),
    "a list": Act(body=b"[1]"),
    "message is text": Act(body={"choices": [{"message": "hello"}]}),
    "content is a list": Act(body={"choices": [{"message": {"content": [1]}}]}),
    "HTML": Act(body=b"<html>gateway</html>"),
    "deep JSON": Act(body=b"[" * 100_000),
    "empty": Act(body=b""),
    "reset": Act(reset=True),
    "slow": says("[[A]]", wait=2.0),
}


@pytest.mark.parametrize("name", MISDEEDS)
def test_a_misdeed_is_tried_again_and_then_counted(tmp_path: Path, name: str) -> None:
    """Twice wrong and then right is right; always wrong is a failure of that question alone."""
    misdeed, tried = MISDEEDS[name], Counter[str]()

    def behave(seen: Seen, number: int) -> Act:
        tried[seen.question] += 1
        if "prompt 0" in seen.question:
            return misdeed
        return misdeed if "prompt 1" in seen.question and tried[seen.question] <= 2 else longer(seen, number)

    with JudgeServer(behave) as server:
        # Only where slowness is the misdeed may it count: a busy machine is slow as well.
        verdicts = judge(server, tmp_path, pairs(3), timeout=1.0 if name == "slow" else 30.0, retries=2)
    assert [verdict.outcome for verdict in verdicts] == [None, "lose", "tie"]
    assert [verdict.failed for verdict in verdicts] == [True, False, False]
    assert sorted(tried.values()) == [1, 1, 3, 3, 3, 3]
    summary = summarise(verdicts)
    assert (summary.unparsed, summary.failed) == (0, 1)
    assert summary.failure is not None
    assert "tried 3 times" in summary.failure
    record = verdicts[0].record()
    assert record["orders"][0]["reply"] is None
    assert record["orders"][0]["failure"] == summary.failure


def test_a_request_that_cannot_be_answered_is_not_tried_again(tmp_path: Path) -> None:
    refusal = Act(status=400, body={"error": {"message": "prompt too long"}})
    with JudgeServer(lambda seen, number: refusal if "prompt 1" in seen.question else longer(seen, number)) as server:
        verdicts = judge(server, tmp_path)
    assert len(server.seen) == 8
    assert [verdict.failed for verdict in verdicts] == [False, True, False, False]
    assert summarise(verdicts).failure == "HTTP 400: prompt too long"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_question_gets_past_raises_at_once(tmp_path: Path, status: int) -> None:
    refusal = Act(status=status, body={"error": {"message": "no such thing"}})
    with (
        JudgeServer(lambda seen, number: refusal) as server,
        pytest.raises(ConfigError, match=rf"HTTP {status}: no such thing.*check"),
    ):
        judge(server, tmp_path, pairs(50), concurrency=2)
    assert len(server.seen) <= 4


def test_nobody_there(tmp_path: Path) -> None:
    with JudgeServer(longer) as server:
        pass
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="cannot reach http://127"):
        judge(server, tmp_path, backoff=10)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_every_request(tmp_path: Path, form: str) -> None:
    """Nothing is sent before the time that the endpoint asked for, whatever our own backoff would be."""
    free: list[float] = []

    def behave(seen: Seen, number: int) -> Act:
        if number:
            return longer(seen, number)
        value = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        free.append(seen.at + 1)
        return Act(status=429, headers={"Retry-After": value})

    with JudgeServer(behave) as server:
        verdicts = judge(server, tmp_path, concurrency=1)
    assert [verdict.outcome for verdict in verdicts] == ["lose", "lose", "tie", "win"]
    assert len(server.seen) == 9
    assert min(seen.at for seen in server.seen[1:]) >= free[0] - 0.05


def test_requests_under_way_wait_for_a_new_hold(tmp_path: Path) -> None:
    """One that was about to be sent when another's 429 came is held as well."""

    def behave(seen: Seen, number: int) -> Act:
        return longer(seen, number) if number else Act(status=429, headers={"Retry-After": "1"})

    with JudgeServer(behave) as server:
        judge(server, tmp_path, concurrency=8, requests_per_minute=60 / 0.3)
    first, *others = [seen.at - server.seen[0].at for seen in server.seen]
    assert first == 0
    assert min(others) >= 0.95


@pytest.mark.parametrize(
    "refusal",
    [
        Act(status=429, headers={"Retry-After": "7200"}),
        Act(status=429, body={"error": {"message": "pay first", "code": "insufficient_quota"}}),
    ],
)
def test_a_quota_that_is_used_up_ends_the_run(tmp_path: Path, refusal: Act) -> None:
    with (
        JudgeServer(lambda seen, number: longer(seen, number) if number < 3 else refusal) as server,
        pytest.raises(ConfigError, match="run the same command again later"),
    ):
        judge(server, tmp_path, concurrency=1)
    assert len(server.seen) == 4
    assert len(ReplyCache(tmp_path)) == 3


@pytest.mark.parametrize("value", ["soon", "-3", "nan", "inf", "Mon, 99 Foo 2020"])
def test_a_retry_after_that_cannot_be_read_is_none(value: str) -> None:
    with JudgeServer(
        lambda seen, number: says("hi") if number else Act(status=503, headers={"Retry-After": value})
    ) as server:
        assert ask(server) == Completion(text="hi", prompt_tokens=100, completion_tokens=7)


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (completion(None), Completion(text="", prompt_tokens=100, completion_tokens=7)),
        ({"choices": [{"message": {"content": "hi"}}]}, Completion(text="hi")),
        ({"choices": [{"message": {"content": "hi"}}], "usage": None}, Completion(text="hi")),
        (completion("ü\u2028 \x00"), Completion(text="ü\u2028 \x00", prompt_tokens=100, completion_tokens=7)),
    ],
)
def test_unusual_replies(body: dict[str, Any], reply: Completion) -> None:
    with JudgeServer(lambda seen, number: Act(body=body)) as server:
        assert ask(server) == reply


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_than_the_limit_at_once(tmp_path: Path, limit: int) -> None:
    """Retries are within the limit, and it is made use of."""

    def behave(seen: Seen, number: int) -> Act:
        return Act(status=500, wait=0.02) if number % 4 == 1 else says("[[A]]", wait=0.02)

    with JudgeServer(behave) as server:
        verdicts = judge(server, tmp_path, pairs(10), concurrency=limit)
    assert all(verdict.outcome == "tie" for verdict in verdicts)
    assert server.most_at_once == limit


def test_no_more_requests_in_a_minute_than_allowed(tmp_path: Path) -> None:
    """20 in a second, of 24 that could all go at once; retries count."""

    def behave(seen: Seen, number: int) -> Act:
        return Act(status=500) if number % 6 == 2 else longer(seen, number)

    with JudgeServer(behave) as server:
        judge(server, tmp_path, pairs(10), concurrency=20, requests_per_minute=20 * 60)
    times = sorted(seen.at for seen in server.seen)
    assert len(times) >= 24
    for begin in range(len(times) - 10):
        assert times[begin + 10] - times[begin] >= 10 * 0.05 - 0.04  # what the scheduler may shift them


# --- the cache ------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_asked_again(tmp_path: Path) -> None:
    """Not after a break, not with more pairs; but with another model or other sampling."""
    refusal = Act(status=401)
    with JudgeServer(lambda seen, number: longer(seen, number) if number < 5 else refusal) as server:
        with pytest.raises(ConfigError):
            judge(server, tmp_path, concurrency=1)
        server.behave, server.seen = longer, []
        first = judge(server, tmp_path)
        assert len(server.seen) == 3
        server.seen = []
        assert judge(server, tmp_path) == first
        assert server.seen == []
        assert judge(server, tmp_path, pairs(5))[:4] == first
        assert len(server.seen) == 2
        server.seen = []
        judge(server, tmp_path, model="another")
        assert len(server.seen) == 8


def test_failures_are_asked_again(tmp_path: Path) -> None:
    with JudgeServer(lambda seen, number: Act(status=400) if "prompt 1" in seen.question else says("[[C]]")) as server:
        assert judge(server, tmp_path)[1].failed
        server.behave, server.seen = longer, []
        assert judge(server, tmp_path)[1].outcome == "lose"
        assert len(server.seen) == 2


def test_a_key_is_what_was_asked_of_whom() -> None:
    messages = [{"role": "user", "content": "a"}]
    one = cache_key("m", messages, {"temperature": 0, "max_tokens": 5})
    assert one == cache_key("m", messages, {"max_tokens": 5, "temperature": 0})
    others = [
        cache_key("n", messages, {"temperature": 0, "max_tokens": 5}),
        cache_key("m", messages, {"temperature": 1, "max_tokens": 5}),
        cache_key("m", [{"role": "system", "content": "a"}], {"temperature": 0, "max_tokens": 5}),
        cache_key("m", [*messages, *messages], {"temperature": 0, "max_tokens": 5}),
    ]
    assert len({one, *others}) == 5


def test_a_torn_line_is_overlooked_and_a_broken_one_is_named(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path)
    for key in "abc":
        cache.put(key, Completion(text=f"\n{key}\u2028", prompt_tokens=1))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        assert len(ReplyCache(tmp_path)) == sum(end <= cut for end in ends)
    assert ReplyCache(tmp_path).get("b") == Completion(text="\nb\u2028", prompt_tokens=1)
    for broken in (b"{}\n", b"[]\n", b"{\n", b'{"key": "x", "words": 3}\n', b"\xff\n"):
        file.write_bytes(whole[: ends[0]] + broken + whole[ends[1] :])
        with pytest.raises(DataError, match=r"\.jsonl, line 2 is no reply"):
            ReplyCache(tmp_path)


def test_the_first_of_two_replies_counts(tmp_path: Path) -> None:
    caches = [ReplyCache(tmp_path), ReplyCache(tmp_path)]
    for number, cache in enumerate(caches):
        cache.put("k", Completion(text=str(number)))
    assert ReplyCache(tmp_path).get("k") == Completion(text="0")


WRITER = """
import sys
from pathlib import Path
from genarm.lab.judges.cache import ReplyCache
from genarm.lab.judges.client import Completion
cache = ReplyCache(Path(sys.argv[1]))
for number in range(100):
    cache.put(f"{sys.argv[2]}{number}", Completion(text="x" * 5000))
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    cache = ReplyCache(tmp_path)
    assert len(cache) == 200
    assert all(cache.get(f"{name}{number}") == Completion(text="x" * 5000) for name in "ab" for number in range(100))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ReplyCache(tmp_path / "file" / "folder")
    with pytest.raises(DataError, match="cannot write replies"):
        cache.put("k", Completion(text=""))


# --- the estimate ---------------------------------------------------------------------------------------------------


def test_the_estimate_is_what_is_then_asked(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path)
    expected = estimate(pairs(), PAIRWISE, model="m", cache=cache, price_in=10, price_out=30)
    with JudgeServer(longer) as server:
        judge(server, tmp_path)
    sent = [message["content"] for seen in server.seen for message in seen.body["messages"]]
    assert (expected.calls, expected.cached) == (len(server.seen), 0) == (8, 0)
    assert expected.prompt_tokens == sum(-(-len(text) // 4) for text in sent)
    assert expected.completion_tokens == 8 * 1024
    assert expected.price == pytest.approx((expected.prompt_tokens * 10 + 8 * 1024 * 30) / 1e6)
    more = [*pairs(), Pair(prompt="new", first="a", second="b"), Pair(prompt="new", first="a", second="b")]
    rest = estimate(more, PAIRWISE, model="m", cache=ReplyCache(tmp_path), count_tokens=len)
    assert (rest.calls, rest.cached, rest.price) == (2, 8, None)
    assert rest.prompt_tokens == sum(
        len(m["content"]) for order in ("ab", "ba") for m in PAIRWISE.messages("new", *order)
    )
    single = estimate([Answer(prompt="p", response="r")], load_protocol("score"), model="m")
    assert (single.calls, single.completion_tokens) == (1, 256)


def test_the_record_of_a_protocol_is_of_all_that_decides_a_verdict() -> None:
    one = digest(PAIRWISE.record)
    assert one == digest(replace(PAIRWISE, name="renamed", model="n").record)
    changes: list[dict[str, Any]] = [
        {"parser": VerdictTag(tie="[[T]]")},
        {"sampling": {"max_tokens": 9}},
        {"template": f"{PAIRWISE.template} Well?"},
        {"system": None},
        {"template": f"{PAIRWISE.template} {{rubric}}", "rubric": "short"},
        {"template": f"{PAIRWISE.template} {{rubric}}", "rubric": "long"},
    ]
    assert len({one, *(digest(replace(PAIRWISE, **change).record) for change in changes)}) == 7


# --- the key --------------------------------------------------------------------------------------------------------


def echo(status: int) -> Callable[[Seen, int], Act]:
    """An endpoint that says aloud what key it was given."""

    def behave(seen: Seen, number: int) -> Act:
        said = seen.headers["Authorization"]
        body = completion(f"[[A]] {said}") if status == 200 else {"error": {"message": said}}
        text = json.dumps(body)
        return Act(status=status, body=(text.replace("+", "\\u002b") if number % 2 else text).encode())

    return behave


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
def test_the_key_is_sent_and_appears_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any, status: int
) -> None:
    caplog.set_level(0)
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    said = ""
    with JudgeServer(echo(status)) as server:
        chosen = settings(server, key_variable="JUDGE_KEY", retries=1)
        try:
            verdicts = judge_pairs(pairs(), PAIRWISE, chosen, ReplyCache(tmp_path))
            said = repr(verdicts) + repr(summarise(verdicts))
        except GenarmError as error:
            said = "".join(traceback.format_exception(error)) + repr(error)
        said += repr(chosen) + repr(vars(chosen))
    assert {seen.headers["Authorization"] for seen in server.seen} == {f"Bearer {KEY}"}
    assert "***" in said
    said += "".join(capfd.readouterr()) + caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert bool(files) == (status == 200)
    assert KEY not in said
    assert not any(KEY.encode() in path.read_bytes() or KEY in path.name for path in files)


def test_a_key_that_is_no_secret_changes_no_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "8")
    with JudgeServer(lambda seen, number: says("8 7")) as server:
        reply = ask(server)
    assert isinstance(reply, Completion)
    assert reply.text == "8 7"
    assert server.seen[0].headers["Authorization"] == "Bearer 8"


def test_keys_that_are_missing_or_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's endpoint needs one, others only where a variable is named; what is no key is not shown."""
    for url in (ClientSettings(model="m").base_url, "https://api.openai.com/v1/"):
        with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
            ClientSettings(model="m", base_url=url).find_key()
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        ClientSettings(model="m", base_url="http://localhost:1/v1", key_variable="MY_KEY").find_key()
    assert ClientSettings(model="m", base_url="http://localhost:1/v1").find_key() is None
    for broken in (f"{KEY}\nX-More: 1", f"{KEY}ü"):
        monkeypatch.setenv("OPENAI_API_KEY", broken)
        with pytest.raises(ConfigError, match="no key has") as caught:
            ClientSettings(model="m").find_key()
        assert KEY not in str(caught.value)
    for value in (KEY, "gsk_abcdef"):
        with pytest.raises(ConfigError, match="never the key itself") as caught:
            ClientSettings(model="m", key_variable=value)
        assert value not in str(caught.value)
    for url in ("https://user:0123@host/v1", "https://host/v1?key=0123", "https://host/v1#0123"):
        with pytest.raises(ConfigError, match="in the environment") as caught:
            ClientSettings(model="m", base_url=url)
        assert "0123" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": ""}, "model is ''"),
        ({"base_url": "localhost:8000"}, "http://localhost:8000/v1"),
        ({"base_url": "ftp://host/v1"}, "ftp://host/v1"),
        ({"base_url": "http://[::1"}, "no URL"),
        ({"base_url": 3}, "no URL"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"concurrency": 1.5}, "concurrency is 1.5"),
        ({"retries": -1}, "retries is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"backoff": float("nan")}, "backoff is nan"),
        ({"requests_per_minute": -1}, "requests_per_minute is -1"),
        ({"requests_per_minute": "10"}, "requests_per_minute is '10'"),
    ],
)
def test_settings_that_do_not_hold_together(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        ClientSettings(**{"model": "m", **wrong})
