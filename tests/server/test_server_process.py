"""`genarm serve` as a process: what it prints, how it stops, and that nothing is left when it is killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from builders.processes import children, command, read, serving
from builders.tiny import save_member, tiny_lora, tiny_model
from genarm import compose

LONG = {"model": "guided", "prompt": "w1", "max_tokens": 600, "seed": 1, "logit_bias": {"1": -100}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided folder with a preset, whose replies may be long."""
    root = tmp_path_factory.mktemp("serve")
    base, arm = tiny_model(seed=0), tiny_model(seed=1, hidden=16, layers=1)
    for model, name in ((base, "base"), (arm, "arm")):
        model.config.max_position_embeddings = 2048
        save_member(model, root / name)
    tiny_lora(base, root / "lora", seed=3, base_path=str(root / "base"))
    rewards = {"harmless": root / "arm", "helpful": root / "lora"}
    compose(root / "base", rewards, root / "guided", descriptions={"harmless": "avoids harm"})
    (root / "guided" / "presets.json").write_text(json.dumps({"cautious": {"harmless": 2}}))
    return root / "guided"


def test_it_says_where_it_is_drains_and_ends_well(folder: Path, tmp_path: Path) -> None:
    """SIGTERM lets a stream and a whole answer come to their ends, and takes no new connections."""
    keys = tmp_path / "keys"
    keys.write_text("sk-file\n")
    (tmp_path / "presets.toml").write_text("[bold]\nharmless = -1.5\nmax_kl = 0.3\n")
    options = ("--streams", "2", "--api-keys", str(keys), "--presets", str(tmp_path / "presets.toml"))
    with serving(folder, *options, GENARM_API_KEYS="sk-env") as (process, url, lines):
        assert "2 streams of 2048 tokens" in lines[0]
        assert any("helpful" in line for line in lines)
        assert lines[-1].startswith("guided is served at http://127.0.0.1:")
        with httpx2.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer sk-env"}) as client:
            assert httpx2.get(f"{url}/v1/models").status_code == 401
            rewards = client.get("/v1/rewards").json()
            assert rewards["data"][0] == {
                "id": "harmless",
                "default_weight": 1.0,
                "minimum": -5.0,
                "maximum": 5.0,
                "description": "avoids harm",
                "difference": False,
                "wish": None,
            }
            assert rewards["presets"] == [
                {"name": "cautious", "weights": {"harmless": 2.0, "helpful": 1.0}, "max_kl": None},
                {"name": "bold", "weights": {"harmless": -1.5, "helpful": 1.0}, "max_kl": 0.3},
            ]
            expected = client.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
            found: list[Any] = []
            other = threading.Thread(
                target=lambda: found.append(
                    httpx2.post(
                        f"{url}/v1/completions", json=LONG, timeout=60, headers={"Authorization": "Bearer sk-file"}
                    )
                )
            )
            with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
                events = stream.iter_lines()
                first = [next(events) for _ in range(4)]
                other.start()
                while "genarm_running 2.0" not in httpx2.get(f"{url}/metrics").text:
                    time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                with pytest.raises(httpx2.TransportError):
                    httpx2.get(f"{url}/health")
                assert read(iter([*first, *events])) == expected
            other.join()
            assert found[0].json()["choices"][0]["text"] == expected
        assert process.wait(20) == 0
        log = (folder.parent / "log").read_text()
        assert "Traceback" not in log
        assert "w1" not in log
        assert log.count("POST /v1/completions 200") == 3


def test_killed_in_mid_stream_and_started_again(folder: Path) -> None:
    with serving(folder) as (process, url, _):
        with httpx2.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as stream:
            events = stream.iter_lines()
            seen = [next(events) for _ in range(8)]
            process.kill()
            with pytest.raises(httpx2.RemoteProtocolError):
                read(events)
        port = url.rsplit(":", 1)[1]
    with serving(folder, "--port", port) as (process, url, _):  # the very same port
        assert url.endswith(f":{port}")
        answer = httpx2.post(f"{url}/v1/completions", json=LONG, timeout=60)
        begun = "".join(json.loads(line[6:])["choices"][0]["text"] for line in seen if line)
        assert answer.json()["choices"][0]["text"].startswith(begun)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.mark.parametrize("changed", [False, True])
def test_an_engine_is_started_again_with_the_same_model_or_not_at_all(changed: bool, tmp_path: Path) -> None:
    """Written anew while the server runs, a reward is another one under the name that clients know."""
    base = tiny_model(seed=0)
    save_member(base, tmp_path / "base")
    tiny_lora(base, tmp_path / "lora", seed=3, base_path=str(tmp_path / "base"))
    compose(tmp_path / "base", {"helpful": tmp_path / "lora"}, tmp_path / "guided")
    asked = {"model": "guided", "prompt": "w1", "max_tokens": 20, "seed": 1}
    with serving(tmp_path / "guided") as (process, url, _), httpx2.Client(base_url=url, timeout=60) as client:
        before = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
        tiny_lora(tiny_model(seed=0), tmp_path / "lora", seed=4 if changed else 3, base_path=str(tmp_path / "base"))
        (engine,) = children(process.pid)
        os.kill(engine, signal.SIGKILL)
        said = "the engine could not be started again" if changed else "the engine was started again"
        until = time.monotonic() + 60
        while said not in (tmp_path / "log").read_text() and time.monotonic() < until:
            time.sleep(0.1)
        ready, after = client.get("/ready"), client.post("/v1/completions", json=asked)
        if changed:
            assert (ready.status_code, after.status_code) == (503, 503)
            changes = (
                f"adapter_model.safetensors of reward helpful ({tmp_path / 'lora'}) has changed; restart the server"
            )
            log = (tmp_path / "log").read_text()
            assert changes in log
            assert "Traceback" not in log
        else:
            assert ready.status_code == 200
            assert after.json()["choices"][0]["text"] == before


def test_few_files_a_log_that_nobody_reads_and_a_second_signal(folder: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    few = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh"]
    log: list[bytes] = []

    def read_log() -> None:
        while piece := os.read(reading, 2**16):
            log.append(piece)

    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            [*few, *command(folder, "--port", "0")], stdout=subprocess.PIPE, stderr=writing, text=True
        )
        stack.callback(process.kill)
        os.close(writing)
        assert process.stdout is not None
        url = next(line for line in process.stdout if "is served at" in line).split()[-1]
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        for _ in range(300):  # heads of requests that do not end
            half = stack.enter_context(socket.create_connection(address, timeout=20))
            with contextlib.suppress(ConnectionError):
                half.sendall(b"GET /health HTTP/1.1\r\n")
        with httpx2.Client(base_url=url, timeout=30) as client:
            for _ in range(200):
                assert client.get("/v1/models").status_code == 200
            assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        reader = threading.Thread(target=read_log)
        reader.start()
        unread = stack.enter_context(socket.socket())
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect(address)
        content = json.dumps({**LONG, "n": 8, "stream": True, "logprobs": 20}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        unread.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None  # it waits for the stream to be read
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        reader.join(20)
        lines = b"".join(log).decode()
        assert "Traceback" not in lines
        assert lines.count("GET /v1/models 200") == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", "70000"), "--port is 70000"),
        (("--host", "nowhere.invalid"), "cannot listen on nowhere.invalid"),
        (("--queue", "-1"), "--queue is -1"),
        (("--timeout", "0"), "--timeout is 0"),
        (("--streams", "0"), "streams is 0"),
        (("--context", "9999"), "context is 9999"),
        (("--served-name", "a@b"), "cannot be served as 'a@b'"),
        (("--max-weight", "0.5"), "'harmless' is 1; .* raise --max-weight"),
        (("--cors", "*"), "--cors is '\\*'"),
        (("--allowed-host", "https://a.example"), "--allowed-host is 'https://a.example'; give a name without"),
        (("--api-keys", "missing"), "cannot read the API keys in missing"),
        (("--presets", "missing"), "cannot read the presets in missing"),
        (("--speculate", "-1"), "speculate is -1"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, options: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    import re

    from genarm.cli.main import main

    assert main(["serve", str(folder), "--port", "0", "--device", "cpu", *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(message, err)
    assert err.count("\n") == 1


def test_a_port_that_is_taken(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from genarm.cli.main import main
    from genarm.server.listen import bind

    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(folder), "--port", port, "--device", "cpu"]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capfd.readouterr().err


def test_a_wish_s_file_is_read_once(folder: Path, tmp_path: Path) -> None:
    """A pipe has its text for one reader; the engine's process has the wish as clients are told of it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("w3 w4\n", encoding="utf-8"), daemon=True)
    writer.start()
    with serving(folder, "--wish", f"warm=@{pipe}") as (_, url, _):
        told = httpx2.get(f"{url}/v1/rewards").json()["data"][-1]
        assert (told["id"], told["wish"]) == ("warm", "w3 w4")
        body = {"model": "guided", "prompt": "w1 w2", "max_tokens": 3, "return_rewards": True}
        choice = httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]
        assert "warm" in choice["rewards"][0]["rewards"]
