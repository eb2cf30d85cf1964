"""Serve a model to OpenAI's clients, with reward weights in every request, and a page to play with at /.

Listens on this machine alone unless --host says otherwise. API keys come from --api-keys and from the environment
variable GENARM_API_KEYS; without any, everybody who can connect may ask. SIGTERM and Ctrl-C let running requests end.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from genarm.cli.options import (
    add_engine_options,
    add_model_options,
    add_reading_options,
    draft_files,
    open_engine,
    quiet_libraries,
    reading_of,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from genarm.model.references import ModelFiles
    from genarm.server.backend import Backend
    from genarm.server.job import Service
    from genarm.server.names import Names

_STREAMS = 8
"""Of our own engine, which reserves the memory for all of them at its start."""

SUMMARY = "serve a model to OpenAI's clients, weights per request, with a page to play with"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm serve`."""
    add_model_options(parser)
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="to listen on; 0.0.0.0 is every network")
    parser.add_argument("--port", type=int, metavar="N", default=8000, help="0 takes a free one, which is printed")
    parser.add_argument("--served-name", metavar="NAME", help="the model's name for clients; by default its folder's")
    parser.add_argument(
        "--engine",
        choices=("auto", "genarm", "vllm"),
        default="auto",
        help="what decodes: genarm's own engine or vLLM; auto is vLLM where it is installed and there is a GPU",
    )
    parser.add_argument(
        "--vllm-options",
        metavar="JSON",
        help='engine options of vLLM\'s own, as in {"tensor_parallel_size": 2}',
    )
    parser.add_argument(
        "--streams",
        type=int,
        metavar="N",
        help="replies that are drawn at once; by default 8, with vLLM its own number",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="the most tokens of a prompt and its reply; by default what the members have, but no more than 2048, with "
        "vLLM than its memory holds",
    )
    parser.add_argument("--queue", type=int, metavar="N", default=64, help="replies that may wait for their turn")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        default=600.0,
        help="seconds for one request from its arrival, waiting included",
    )
    add_engine_options(parser)
    add_reading_options(parser)
    parser.add_argument(
        "--presets", type=Path, metavar="FILE", help="TOML, a table of weights for each preset, as in [cautious]"
    )
    parser.add_argument(
        "--max-weight", type=float, metavar="W", default=5.0, help="reward weights from -W to W are taken"
    )
    parser.add_argument("--api-keys", type=Path, metavar="FILE", help="API keys, one a line")
    parser.add_argument(
        "--cors",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="web pages of this origin may ask; repeatable",
    )
    parser.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="requests may call the server by this name, beside localhost; repeatable. Without keys and on this "
        "machine alone, other names are refused",
    )
    parser.add_argument("--log-prompts", action="store_true", help="write prompts and replies to the log as well")


def run(arguments: argparse.Namespace) -> int:
    """Check everything that needs no model, load it, serve."""
    with quiet_libraries():
        _need_extra()
        from genarm.model.references import find_device, open_files
        from genarm.server.app import build_app
        from genarm.server.listen import bind, listen, url_of
        from genarm.server.log import start_log
        from genarm.server.security import is_loopback, read_keys

        find_device(arguments.device)
        files = open_files(
            arguments.folder, trust_remote_code=arguments.trust_remote_code, reading=reading_of(arguments)
        )
        keys = read_keys(arguments.api_keys)
        names = _names(arguments, files)
        draft = draft_files(arguments)
        _check(arguments)
        start = _backend(arguments, files, draft)
        with bind(arguments.host, arguments.port) as listener:
            start_log()
            backend = start()
            service = _service(arguments, files, names, backend)
            url = url_of(arguments.host, listener)
            alone = is_loopback(listener.getsockname()[0])
            # Keys keep out whoever does not know them; open to a network, everybody may ask by whatever name.
            hosts = arguments.allowed_host if arguments.allowed_host or (alone and not keys) else None

            def announce() -> None:
                say(f"{backend.describe()}\n{names.model} is served at {url}")
                if not keys and not alone:
                    say("there are no API keys: everybody who can connect may ask", stderr=True)

            try:
                app = build_app(service, keys=keys, origins=arguments.cors, hosts=hosts)
                listen(app, listener, drain=arguments.timeout, announce=announce)
            finally:
                backend.close()
                service.close()
    return 0


def _need_extra() -> None:
    from importlib.util import find_spec

    from genarm.errors import MissingExtraError

    for module, package in (("fastapi", "fastapi"), ("uvicorn", "uvicorn"), ("prometheus_client", "prometheus-client")):
        if find_spec(module) is None:
            raise MissingExtraError(package, "serve")


def _check(arguments: argparse.Namespace) -> None:
    """Mistakes that would otherwise show only when the model is loaded."""
    from genarm.engine import EngineOptions
    from genarm.errors import ConfigError
    from genarm.server.admission import Admission

    streams = _STREAMS if arguments.streams is None else arguments.streams
    EngineOptions(streams=streams, context=arguments.context, speculate=arguments.speculate)
    Admission(streams=streams, queue=arguments.queue)
    if not arguments.timeout > 0:
        raise ConfigError(f"--timeout is {arguments.timeout:g}; it must be above 0 seconds")
    for origin in arguments.cors:
        if origin == "*" or "://" not in origin or origin.endswith("/"):
            raise ConfigError(f"--cors is {origin!r}; give an origin as browsers write it, such as https://example.org")

    for host in arguments.allowed_host:
        if not host.strip() or "/" in host or "*" in host:
            raise ConfigError(f"--allowed-host is {host!r:.80}; give a name without scheme and path: gpu.example.org")


def _names(arguments: argparse.Namespace, files: ModelFiles) -> Names:
    from genarm.server.names import Names, read_presets, rewards_of

    path = Path(files.reference)
    return Names(
        model=path.name if arguments.served_name is None else arguments.served_name,
        rewards=rewards_of(files.config),
        largest=arguments.max_weight,
        presets=read_presets(path, arguments.presets),
    )


def _backend(arguments: argparse.Namespace, files: ModelFiles, draft: ModelFiles | None) -> Callable[[], Backend]:
    """What starts the engine that was asked for, or that suits this machine; it is started later.

    Raises:
        ConfigError: options of the other engine.
        MissingExtraError, UnsupportedError: there is no vLLM, or another version of it.
    """
    from genarm.errors import ConfigError
    from genarm.server.backend import EngineBackend
    from genarm.server.vllm_backend import VllmBackend, VllmOptions, need_vllm, read_options

    more = None if arguments.vllm_options is None else read_options(arguments.vllm_options)
    if _takes_vllm(arguments):
        if option := _of_own_engine(arguments):
            raise ConfigError(f"{option} belongs to genarm's own engine; leave it out, or give --engine genarm")
        need_vllm()
        options = VllmOptions(
            streams=arguments.streams,
            context=arguments.context,
            dtype=arguments.dtype,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
            more=more,
        )
        return lambda: VllmBackend(files, options)
    if more is not None:
        raise ConfigError("--vllm-options needs vLLM, and genarm's own engine serves here; give --engine vllm as well")
    streams = _STREAMS if arguments.streams is None else arguments.streams
    return lambda: EngineBackend(
        lambda: open_engine(arguments, files, draft, streams=streams, context=arguments.context)
    )


def _takes_vllm(arguments: argparse.Namespace) -> bool:
    """Whether vLLM serves; `auto` takes it where it runs on a GPU and nothing is asked that only our engine has."""
    from genarm.server.vllm_backend import why_not

    if arguments.engine != "auto":
        return bool(arguments.engine == "vllm")
    return _of_own_engine(arguments) is None and arguments.device in (None, "cuda") and why_not() is None


def _of_own_engine(arguments: argparse.Namespace) -> str | None:
    """An option that was given and that vLLM has no use for."""
    from genarm.engine import EngineOptions

    if arguments.draft is not None:
        return "--draft"
    # 0 never drafts, and so does vLLM.
    return None if arguments.speculate in (EngineOptions().speculate, 0) else "--speculate"


def _service(arguments: argparse.Namespace, files: ModelFiles, names: Names, backend: Backend) -> Service:
    import time

    from genarm.server.admission import Admission
    from genarm.server.job import Service
    from genarm.server.metrics import Metrics
    from genarm.server.texts import Texts

    return Service(
        backend=backend,
        texts=Texts(files.tokenizer, files.reading),
        names=names,
        admission=Admission(streams=backend.streams, queue=arguments.queue),
        metrics=Metrics(backend),
        timeout=arguments.timeout,
        log_prompts=arguments.log_prompts,
        started=int(time.time()),
    )
