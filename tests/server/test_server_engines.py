"""Which engine `genarm serve` takes, and what a server says that does not know what each reward makes of a token."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from builders.serving import CHAT, Running, running
from builders.tiny import save_member, tiny_model
from genarm.cli import serve
from genarm.cli.main import build_parser, main
from genarm.errors import ConfigError, MissingExtraError, UnsupportedError
from genarm.model.references import open_files
from genarm.server import vllm_backend
from genarm.server.vllm_backend import VllmOptions, need_vllm, read_options, why_not
from genarm.vllm import VERSIONS


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None, *, gpu: bool = False) -> None:
    """Let this machine have that vLLM, and a GPU or none."""
    import genarm.vllm

    monkeypatch.setattr(genarm.vllm, "vllm_version", lambda: version)
    monkeypatch.setattr(vllm_backend, "vllm_version", lambda: version)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)


def arguments(*options: str) -> argparse.Namespace:
    return build_parser().parse_args(["serve", "folder", *options])


NEWEST = f"{VERSIONS[-1]}.0"


@pytest.mark.parametrize(
    ("version", "gpu", "options", "vllm"),
    [
        (None, True, (), False),
        (NEWEST, False, (), False),
        ("0.1.0", True, (), False),
        (NEWEST, True, (), True),
        (NEWEST, True, ("--device", "cuda"), True),
        (NEWEST, True, ("--device", "cpu"), False),
        (NEWEST, True, ("--device", "cuda:1"), False),
        (NEWEST, True, ("--draft", "small"), False),
        (NEWEST, True, ("--speculate", "4"), False),
        (NEWEST, True, ("--speculate", "0"), True),
        (NEWEST, True, ("--engine", "genarm"), False),
        (None, False, ("--engine", "vllm"), True),
    ],
)
def test_the_engine_that_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    version: str | None,
    gpu: bool,
    options: tuple[str, ...],
    vllm: bool,
) -> None:
    installed(monkeypatch, version, gpu=gpu)
    files = open_files(str(folder))
    assert serve._takes_vllm(arguments(*options), files) is vllm
    wished = files.with_wishes({"warm": "Be warm."})  # which vLLM cannot run
    assert serve._takes_vllm(arguments(*options), wished) is (vllm and "--engine" in options)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, gpu, reason in [(None, True, "not installed"), ("0.1.0", True, "0.1.0"), (NEWEST, False, "no GPU")]:
        installed(monkeypatch, version, gpu=gpu)
        assert reason in str(why_not())
    installed(monkeypatch, NEWEST, gpu=True)
    assert why_not() is None


def test_vllm_that_is_missing_or_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'genarm\[vllm\]'"):
        need_vllm()
    installed(monkeypatch, "0.1.0")
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.1\.0 is installed"):
        need_vllm()
    installed(monkeypatch, NEWEST)
    need_vllm()


def test_options_of_vllm() -> None:
    assert read_options('{"tensor_parallel_size": 2}') == {"tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match="is no JSON"):
        read_options("tensor_parallel_size=2")
    with pytest.raises(ConfigError, match="give a JSON object"):
        read_options("[1]")
    with pytest.raises(ConfigError, match="'max_model_len', which --context of genarm serve decides"):
        read_options('{"max_model_len": 9}')
    with pytest.raises(ConfigError, match="streams is 0"):
        VllmOptions(streams=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_member(tiny_model(), tmp_path_factory.mktemp("engines") / "base")


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        (None, ("--engine", "vllm"), "vllm is not installed; install it with: pip install 'genarm[vllm]'"),
        ("0.1.0", ("--engine", "vllm"), "vLLM 0.1.0 is installed"),
        (NEWEST, ("--engine", "vllm", "--speculate", "4"), "--speculate belongs to genarm's own engine"),
        (NEWEST, ("--engine", "vllm", "--draft", "."), "--draft belongs to genarm's own engine"),
        (NEWEST, ("--engine", "vllm", "--vllm-options", "{"), "which is no JSON"),
        (NEWEST, ("--vllm-options", "{}"), "--vllm-options needs vLLM"),
        (NEWEST, ("--engine", "genarm", "--vllm-options", "{}"), "--vllm-options needs vLLM"),
        (NEWEST, ("--engine", "vllm", "--streams", "0"), "streams is 0"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path,
    version: str | None,
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Before anything is loaded, and before the port is taken."""
    installed(monkeypatch, version)
    options = tuple(str(folder) if option == "." else option for option in options)
    assert main(["serve", str(folder), "--port", "0", "--device", "cpu", *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


# --- a backend that does not explain ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unexplained() -> Iterator[Running]:
    with running() as server:
        server.backend.explains = False
        yield server


def test_the_server_says_whether_it_explains(unexplained: Running) -> None:
    assert httpx2.get(f"{unexplained.url}/v1/rewards").json()["return_rewards"] is False
    unexplained.backend.explains = True
    assert httpx2.get(f"{unexplained.url}/v1/rewards").json()["return_rewards"] is True
    unexplained.backend.explains = False


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/chat/completions", {"messages": CHAT}), ("/v1/completions", {"prompt": "w1"})],
)
def test_return_rewards_is_refused(unexplained: Running, path: str, fields: dict[str, Any], stream: bool) -> None:
    body = {"model": "tiny", "stream": stream, "max_tokens": 2, **fields}
    answer = unexplained.post(path, {**body, "return_rewards": True})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "return_rewards"
    assert "--engine genarm" in error["message"]
    assert unexplained.post(path, {**body, "return_rewards": False}).status_code == 200
    assert unexplained.idle()
