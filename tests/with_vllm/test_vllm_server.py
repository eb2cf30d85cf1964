"""Our API over vLLM's engine: what `genarm serve --engine vllm` answers, and how it takes the death of its engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
import torch
import uvicorn

from builders.tiny import VOCAB_SIZE, save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM, compose
from genarm.cli import serve
from genarm.cli.arguments import settings_from
from genarm.cli.main import build_parser
from genarm.cli.session import open_session
from genarm.engine import Request
from genarm.errors import ConfigError, DataError, EngineFailure, UnsupportedError, WeightsError
from genarm.model.references import open_files
from genarm.sampling import Sampling
from genarm.server.app import build_app
from genarm.server.job import Service
from genarm.server.listen import bind
from genarm.server.schema import ChatRequest, CompletionRequest
from genarm.server.vllm_backend import VllmBackend, VllmEngine, VllmOptions

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-vllm installs it")

CONTEXT = 128
SHAPE: dict[str, Any] = {"hidden": 64, "num_key_value_heads": 2, "head_dim": 32}  # what vLLM's attention takes on a CPU
OPTIONS = {"enforce_eager": True, "block_size": 32}
PROMPT = [7, 12, 9]
SETTINGS: list[dict[str, float]] = [{}, {"helpful": 2.0}, {"harmless": 0.0, "helpful": 0.0}, {"harmless": -0.5}]
"""Weights of requests, over the folder's."""
END = 1
"""The id that ends a reply."""
ENDLESS = {str(END): -100}
"""A bias against it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided folder: a base, a full ARM of another depth and a LoRA ARM."""
    root = tmp_path_factory.mktemp("served")
    base, arm = tiny_model(seed=0, **SHAPE), tiny_model(seed=1, layers=1, **SHAPE)
    save_member(base, root / "base")
    save_member(arm, root / "arm")
    tiny_lora(base, root / "lora", seed=3, base_path=str(root / "base"))
    rewards = {"harmless": root / "arm", "helpful": root / "lora"}
    compose(root / "base", rewards, root / "guided", weights={"harmless": 1.0, "helpful": 0.5})
    return root / "guided"


@pytest.fixture(scope="module")
def model(folder: Path) -> GuidedForCausalLM:
    """The same folder in transformers."""
    return GuidedForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    service: Service
    backend: VllmBackend

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json={"model": "guided", **body}, timeout=60)

    @property
    def engine(self) -> VllmEngine:
        assert self.backend._engine is not None
        return self.backend._engine

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether nothing runs, here or in vLLM, now or soon."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            inside = self.engine._llm.output_processor.get_num_unfinished_requests()
            if not (inside or self.backend.load().running or self.service.admission.inside):
                return True
            time.sleep(0.02)
        return False


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Running]:
    """What `genarm serve` makes of its options, on a free port."""
    more = ("--engine", "vllm", "--dtype", "float32", "--vllm-options", json.dumps(OPTIONS))
    arguments = build_parser().parse_args(["serve", str(folder), *more, *options])
    session, options = open_session(arguments), settings_from(arguments, serve.ServeOptions)
    names = serve._names(options, session.files)
    backend = serve._backend(arguments, session)()
    assert isinstance(backend, VllmBackend)
    service = serve._service(options, session.files, names, backend)
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(service), log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, backend)
    finally:
        server.should_exit = True
        thread.join(30)
        backend.close()
        service.texts.close()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(folder, "--streams", "4", "--context", str(CONTEXT)) as found:
        yield found


def greedy(model: GuidedForCausalLM, weights: dict[str, float], prompt: list[int] = PROMPT, **options: Any) -> str:
    """The transformers model's reply of up to 12 tokens."""
    if weights:
        options["reward_weights"] = weights
    output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, **options)
    return str(tiny_tokenizer().decode(output[0, len(prompt) :], skip_special_tokens=True))


def test_what_it_says_of_itself(server: Running) -> None:
    assert server.backend.describe().startswith("vLLM 0.3")
    assert f"4 streams of up to {CONTEXT} tokens; float32 on cpu" in server.backend.describe()
    assert (server.backend.streams, server.backend.context) == (4, CONTEXT)
    rewards = httpx2.get(f"{server.url}/v1/rewards").json()
    assert rewards["return_rewards"] is False
    assert {reward["id"]: reward["default_weight"] for reward in rewards["data"]} == {"harmless": 1.0, "helpful": 0.5}
    assert "genarm_ready 1.0" in httpx2.get(f"{server.url}/metrics").text


@pytest.mark.parametrize("weights", SETTINGS)
def test_greedy_replies_are_those_of_transformers(
    server: Running, model: GuidedForCausalLM, weights: dict[str, float]
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "reward_weights": weights}
    answer = server.post("/v1/completions", **body).json()
    assert answer["choices"][0]["text"].strip() == greedy(model, weights)
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)


LASTING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    (
        {"min_tokens": 5, "logit_bias": {str(END): 20, "9": 8}, "stop_token_ids": [9]},
        {"min_new_tokens": 5, "sequence_bias": {(END,): 20.0, (9,): 8.0}, "eos_token_id": [END, 9]},
    ),
    (
        {"logit_bias": {"9": 60}, "stop_token_ids": [9], "ignore_eos": True},
        {"sequence_bias": {(9,): 60.0}, "eos_token_id": [9]},
    ),
    ({"logit_bias": {str(END): 20}, "ignore_eos": True}, {"sequence_bias": {(END,): 20.0}, "eos_token_id": None}),
]


@pytest.mark.parametrize(("fields", "settings"), LASTING)
def test_penalties_and_endings_are_those_of_transformers(
    server: Running, model: GuidedForCausalLM, fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The penalty counts the prompt; the ids that end a reply wait for the least number of tokens."""
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 0, **fields}
    answer = server.post("/v1/completions", **body).json()
    drawn = [token.strip() for token in answer["choices"][0]["logprobs"]["tokens"]]
    ids = torch.tensor([PROMPT])
    usual = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": END}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **{**usual, **settings})
    assert drawn == tiny_tokenizer().convert_ids_to_tokens(output[0, len(PROMPT) :].tolist())


def test_every_field_of_vllms_own_server_is_known(server: Running) -> None:
    """Taken, accepted where it asks for nothing, or refused by name; and all of vLLM's defaults change nothing."""
    from vllm.entrypoints.openai.chat_completion import protocol as chats
    from vllm.entrypoints.openai.completion import protocol as texts

    for theirs, ours in ((chats.ChatCompletionRequest, ChatRequest), (texts.CompletionRequest, CompletionRequest)):
        assert {*theirs.model_fields} <= {*ours.model_fields}
        given = {
            name: field.get_default(call_default_factory=True)
            for name, field in theirs.model_fields.items()
            if not field.is_required() and name not in {"request_id", "model", "prompt", "messages"}
        }
        body = {"model": "guided", "seed": 1, "max_tokens": 4}
        body |= {"prompt": PROMPT} if ours is CompletionRequest else {"messages": [{"role": "user", "content": "w1"}]}
        path = "/v1/completions" if ours is CompletionRequest else "/v1/chat/completions"
        plain = server.post(path, **body).json()
        answer = server.post(path, **{**given, **body}).json()
        assert answer["choices"] == plain["choices"], answer


def test_streams_with_weights_of_their_own_at_once(server: Running, model: GuidedForCausalLM) -> None:
    """OpenAI's client; more requests than streams."""
    client = server.openai()
    chat = [{"role": "user", "content": "w1 w2"}]
    ids = tiny_tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    def ask(weights: dict[str, float]) -> str:
        stream = client.chat.completions.create(
            model="guided",
            messages=chat,  # type: ignore[arg-type]
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_body={"reward_weights": weights},
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(ask, SETTINGS * 2))
    expected = [greedy(model, weights, list(ids)) for weights in SETTINGS]
    assert replies == expected * 2
    assert len({*expected}) > 2


def test_log_probs_are_the_guided_ones(server: Running, model: GuidedForCausalLM) -> None:
    weights = {"helpful": 2.0}
    body = {"prompt": PROMPT, "max_tokens": 6, "logit_bias": ENDLESS, "logprobs": 3, "reward_weights": weights}
    answer = server.post("/v1/completions", **body, temperature=0.5, seed=3, presence_penalty=1.0).json()
    said = answer["choices"][0]["logprobs"]
    ids = tiny_tokenizer().convert_tokens_to_ids([token.strip() for token in said["tokens"]])
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + ids]), reward_weights=weights).logits[0].float()
    log_probs = torch.log_softmax(logits, dim=-1)[len(PROMPT) - 1 : -1]
    mine = [float(log_probs[i, token]) for i, token in enumerate(ids)]
    assert said["token_logprobs"] == pytest.approx(mine, abs=1e-4)
    for place, top in zip(log_probs, said["top_logprobs"], strict=True):
        assert 3 <= len(top) <= 4  # the chosen one may not be among them
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(place.topk(3).values.tolist(), abs=1e-4)


def test_echo_scores_the_prompt_with_the_default_weights(server: Running, model: GuidedForCausalLM) -> None:
    """As lm-eval asks: no reply, only the prompt's numbers."""
    prompt = [7, 12, 9, 30, 31, 8]
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 2}
    choice = server.post("/v1/completions", **body).json()["choices"][0]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), dim=-1)
    mine = [float(log_probs[i, token]) for i, token in enumerate(prompt[1:])]
    assert choice["logprobs"]["token_logprobs"] == [None, *(pytest.approx(number, abs=1e-4) for number in mine)]
    assert choice["text"] == tiny_tokenizer().decode(prompt)
    again = server.post("/v1/completions", **body, reward_weights={"harmless": 1.0, "helpful": 0.5})
    assert again.json()["choices"][0]["logprobs"] == choice["logprobs"]  # the defaults, said aloud
    refused = server.post("/v1/completions", **body, reward_weights={"helpful": 2.0})
    assert refused.status_code == 400
    assert "default weights only" in refused.json()["error"]["message"]


def test_stop_texts(server: Running, model: GuidedForCausalLM) -> None:
    """The text ends before them, in a stream too, and vLLM stops drawing."""
    words = greedy(model, {}, suppress_tokens=[END]).split()
    stop = f" {words[3]}"
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logit_bias": ENDLESS, "stop": [stop]}
    choice = server.post("/v1/completions", **body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"].split() == words[: words.index(words[3], 1)]
    stream = server.openai().completions.create(model="guided", stream=True, **body)
    assert "".join(chunk.choices[0].text for chunk in stream) == choice["text"]
    assert server.idle()


def test_the_end_of_turn_and_the_limit(server: Running) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 5}
    ended = server.post("/v1/completions", **body, logit_bias={str(END): 100}).json()
    assert (ended["choices"][0]["finish_reason"], ended["choices"][0]["text"]) == ("stop", "")
    assert ended["usage"]["completion_tokens"] == 1
    cut = server.post("/v1/completions", **body, logit_bias=ENDLESS).json()
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 5)


def test_seeds(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 16, "logit_bias": ENDLESS, "n": 2}
    one, same, other = (server.post("/v1/completions", **body, seed=seed).json() for seed in (5, 5, 6))
    texts = [[choice["text"] for choice in answer["choices"]] for answer in (one, same, other)]
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 4


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"reward_weights": {"kind": 1}}, "this model has: harmless, helpful", "reward_weights"),
        ({"model": "guided@kind=1"}, "this model has: harmless, helpful", "reward_weights"),
        ({"reward_weights": {"helpful": 5.5}}, "from -5 to 5", "reward_weights"),
        ({"return_rewards": True}, "--engine genarm", "return_rewards"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, f"ids go from 0 to {VOCAB_SIZE - 1}", None),
        ({"prompt": [VOCAB_SIZE]}, f"from 0 to {VOCAB_SIZE - 1}", None),
        ({"max_tokens": CONTEXT}, f"maximum context length is {CONTEXT}", "prompt"),
        (
            {"prompt": PROMPT * 42 + [7, 7], "max_tokens": 0, "echo": True, "logprobs": 0},
            "room for one new token",
            None,
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(
    server: Running, fields: dict[str, Any], message: str, param: str | None, stream: bool
) -> None:
    answer = server.post("/v1/completions", **{"prompt": PROMPT, "stream": stream, **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param
    assert server.idle()


def test_a_client_that_goes_away_frees_its_place(server: Running) -> None:
    """All places taken by long replies; the next one does not wait for their ends."""
    url = f"{server.url}/v1/completions"
    body = {"model": "guided", "prompt": PROMPT, "max_tokens": 120, "logit_bias": ENDLESS, "stream": True}
    for _ in range(4):
        with httpx2.stream("POST", url, json=body, timeout=60) as response:
            next(response.iter_lines())
    assert server.idle()
    whole = {**body, "stream": False, "n": 4}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(url, json=whole, timeout=0.1)
    assert server.idle()
    load = httpx2.get(f"{server.url}/metrics").text
    assert "genarm_running 0.0" in load
    assert "genarm_queue 0.0" in load


def test_streams_of_the_engine_itself(server: Running) -> None:
    """What the server never asks for."""
    engine = server.engine
    text = engine.stream(
        Request(prompt="w1 w2", ignore_eos=True, sampling=Sampling(max_new_tokens=20, top_k=5, min_p=0.1))
    )
    completion = text.result()
    assert (len(completion.tokens), completion.ending, completion.prompt_tokens) == (20, "length", 2)
    assert all(token.base is None and not token.rewards for token in completion.tokens)
    cancelled = engine.stream(Request(prompt=PROMPT, ignore_eos=True, sampling=Sampling(max_new_tokens=100)))
    cancelled.cancel()
    assert cancelled.result().ending == "cancelled"
    with pytest.raises(WeightsError, match="harmless, helpful"):
        engine.stream(Request(prompt=PROMPT, weights={"kind": 1.0}, sampling=Sampling(max_new_tokens=1)))
    with pytest.raises(DataError, match="more than the 128 positions"):
        engine.stream(Request(prompt=PROMPT, sampling=Sampling(max_new_tokens=126)))
    with pytest.raises(UnsupportedError, match="vLLM refuses the request"):  # more than vLLM reports
        engine.stream(Request(prompt=PROMPT, top_log_probs=50, sampling=Sampling(max_new_tokens=1))).result()
    assert server.idle()


def test_the_death_of_the_engine_and_its_restart(server: Running) -> None:
    """What runs gets a 503, `/ready` says so, one restart brings it back, a second death is final."""
    body = {"prompt": PROMPT, "max_tokens": 100, "logit_bias": ENDLESS}
    expected = server.post("/v1/completions", **body, temperature=0).json()["choices"][0]["text"]
    engine = server.engine
    with httpx2.stream(
        "POST", f"{server.url}/v1/completions", json={"model": "guided", **body, "stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()
        next(lines)
        kill_core(engine)
        error = json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
    assert error["code"] == "engine_failure"
    assert httpx2.get(f"{server.url}/ready").status_code == 503
    refused = server.post("/v1/completions", **body)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    until = time.monotonic() + 120
    while httpx2.get(f"{server.url}/ready").status_code != 200:
        assert time.monotonic() < until, server.backend.state
        time.sleep(0.2)
    assert server.backend.restarts == 1
    assert server.engine is not engine
    assert server.post("/v1/completions", **body, temperature=0).json()["choices"][0]["text"] == expected
    kill_core(server.engine)  # while nothing runs
    while server.backend.state == "ok":
        time.sleep(0.05)
    assert httpx2.get(f"{server.url}/ready").status_code == 503
    assert server.post("/v1/completions", **body).status_code == 503
    assert server.backend.state == "failed"


def kill_core(engine: VllmEngine) -> None:
    """End vLLM's processes as a lack of memory would."""
    for process in engine._llm.engine_core.resources.engine_manager.processes:
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (VllmOptions(more={"tensor-parallel-size": 2}), "did you mean 'tensor_parallel_size'"),
        (VllmOptions(more={"zzz": 2}), "'zzz', which is no engine option of vLLM"),
        (VllmOptions(device="cuda:1"), "--device is 'cuda:1', and the installed vLLM runs on 'cpu'"),
        (VllmOptions(context=4096), "4096"),
        (VllmOptions(more={"enable_lora": True}), "--enable-lora"),
        (VllmOptions(more={"block_size": "many"}), "vLLM cannot serve"),
    ],
)
def test_mistakes_at_the_start(folder: Path, options: VllmOptions, message: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        VllmEngine(open_files(str(folder)), options)


@pytest.mark.slow
def test_an_ordinary_model(folder: Path) -> None:
    """No rewards: the base's numbers are the model's own, and `return_rewards` is taken."""
    with running(folder.parent / "base", "--context", str(CONTEXT), "--served-name", "guided") as server:
        body = {"prompt": PROMPT, "max_tokens": 4, "logit_bias": ENDLESS, "return_rewards": True, "logprobs": 0}
        choice = server.post("/v1/completions", **body).json()["choices"][0]
        said = [token["base_logprob"] for token in choice["rewards"]]
        assert said == choice["logprobs"]["token_logprobs"]
        assert server.post("/v1/completions", prompt=PROMPT, reward_weights={"helpful": 1.0}).status_code == 400
        running_reply = server.engine.stream(
            Request(prompt=PROMPT, ignore_eos=True, sampling=Sampling(max_new_tokens=99))
        )
        server.engine.close()
        with pytest.raises(EngineFailure, match="the engine was closed"):
            running_reply.result()


@contextmanager
def served(folder: Path, log: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`genarm serve --engine vllm` as a process, and the lines that it prints until it answers."""
    options = ["--engine", "vllm", "--port", "0", "--dtype", "float32", "--vllm-options", json.dumps(OPTIONS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "genarm", "serve", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # a process group of its own, as a shell gives it
    )
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if "is served at" in line:
                break
        assert len(lines) == 2, log.read_text()
        yield process, lines
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """One line about the engine; Ctrl-C lets a reply come to its end, and nothing is left behind."""
    log = tmp_path / "log"
    with served(folder, log) as (process, lines):
        assert lines[0].startswith("vLLM 0.3")
        assert f"of up to {CONTEXT} tokens" in lines[0]  # what the members have
        children = psutil.Process(process.pid).children(recursive=True)
        body = {"model": "guided", "prompt": PROMPT, "max_tokens": 120, "logit_bias": ENDLESS, "stream": True}
        with httpx2.stream("POST", f"{lines[1].split()[-1]}/v1/completions", json=body, timeout=60) as response:
            events = response.iter_lines()
            next(events)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            assert [line for line in events if line][-1] == "data: [DONE]"
        assert process.wait(60) == 0, log.read_text()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


@pytest.mark.slow
def test_nothing_is_left_when_it_is_killed(folder: Path, tmp_path: Path) -> None:
    """Not even what holds the model's memory."""
    with served(folder, tmp_path / "log") as (process, _):
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
