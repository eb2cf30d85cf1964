"""Serve a model to OpenAI's clients, with reward weights in every request, and a page to play with at /.

Listens on this machine alone unless --host says otherwise. API keys come from --api-keys and from the environment
variable GENARM_API_KEYS; without any, everybody who can connect may ask. SIGTERM and Ctrl-C let running requests end.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from genarm.cli.arguments import add_options, settings_from
from genarm.cli.console import quiet_libraries, say, stay_quiet
from genarm.cli.options import DraftOptions, ModelOptions, ReadingOptions, WishOptions
from genarm.engine import EngineOptions
from genarm.engine.options import MOST_WISHES
from genarm.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from genarm.cli.session import Session
    from genarm.engine import Engine
    from genarm.model.references import ModelFiles
    from genarm.server.backend import Backend
    from genarm.server.job import Service
    from genarm.server.names import Names

SUMMARY = "serve a model to OpenAI's clients, weights per request, with a page to play with"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server listens, what decodes, whom it answers and how much it takes.

    Raises:
        ConfigError: a value out of range; streams and context are checked where they are used.
    """

    host: str = field(
        default="127.0.0.1", metadata={"metavar": "ADDRESS", "help": "to listen on; 0.0.0.0 is every network"}
    )
    port: int = field(default=8000, metadata={"help": "0 takes a free one, which is printed"})
    served_name: str | None = field(
        default=None, metadata={"help": "the model's name for clients; by default its folder's"}
    )
    engine: str = field(
        default="auto",
        metadata={
            "choices": ("auto", "genarm", "vllm"),
            "help": "what decodes: genarm's own engine or vLLM; auto is vLLM where it is installed and there is a GPU",
        },
    )
    vllm_options: str | None = field(
        default=None,
        metadata={
            "metavar": "JSON",
            "help": 'engine options of vLLM\'s own, as in {"tensor_parallel_size": 2}',
        },
    )
    streams: int | None = field(
        default=None,
        metadata={
            "help": f"replies that are drawn at once; by default {EngineOptions.streams}, with vLLM its own number"
        },
    )
    context: int | None = field(
        default=None,
        metadata={
            "help": "the most tokens of a prompt and its reply together (a token is about three quarters of an English "
            "word); memory for them is reserved at the start. By default what the members have, but no more than 2048, "
            "with vLLM than its memory holds"
        },
    )
    queue: int = field(default=64, metadata={"help": "replies that may wait for their turn"})
    timeout: float = field(
        default=600.0,
        metadata={"metavar": "S", "help": "seconds for one request from its arrival, waiting included"},
    )
    presets: Path | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "TOML, a table of weights, and max_kl, for each preset, as in [cautious]"},
    )
    max_weight: float = field(default=5.0, metadata={"metavar": "W", "help": "reward weights from -W to W are taken"})
    api_keys: Path | None = field(default=None, metadata={"metavar": "FILE", "help": "API keys, one a line"})
    cors: tuple[str, ...] = field(
        default=(), metadata={"metavar": "ORIGIN", "help": "web pages of this origin may ask; repeatable"}
    )
    allowed_host: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "requests may call the server by this name, beside localhost; repeatable. Without keys and on "
            "this machine alone, other names are refused"
        },
    )
    no_request_wishes: bool = field(
        default=False, metadata={"help": "requests may have no wishes of their own, which anybody may write"}
    )
    log_prompts: bool = field(default=False, metadata={"help": "write prompts and replies to the log as well"})

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ConfigError(f"--timeout is {self.timeout:g}; it must be above 0 seconds")
        for origin in self.cors:
            if origin == "*" or "://" not in origin or origin.endswith("/"):
                raise ConfigError(
                    f"--cors is {origin!r}; give an origin as browsers write it, such as https://example.org"
                )
        for host in self.allowed_host:
            if not host.strip() or "/" in host or "*" in host:
                raise ConfigError(
                    f"--allowed-host is {host!r:.80}; give a name without scheme and path: gpu.example.org"
                )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `genarm serve`."""
    add_options(parser, ModelOptions, WishOptions, ServeOptions, EngineOptions, DraftOptions, ReadingOptions)


def run(arguments: argparse.Namespace) -> int:
    """Check everything that needs no model, load it, serve."""
    with quiet_libraries():
        _need_extra()
        from genarm.cli.session import open_session
        from genarm.server.app import build_app
        from genarm.server.listen import bind, listen, url_of
        from genarm.server.log import start_log
        from genarm.server.security import is_loopback, read_keys

        options = settings_from(arguments, ServeOptions)
        session = open_session(arguments)
        keys = read_keys(options.api_keys)
        names = _names(options, session.files)
        start = _backend(arguments, session)
        with bind(options.host, options.port) as listener:
            start_log()
            backend = start()
            service = _service(options, session.files, names, backend)
            url = url_of(options.host, listener)
            alone = is_loopback(listener.getsockname()[0])
            # Keys keep out whoever does not know them; open to a network, everybody may ask by whatever name.
            hosts = options.allowed_host if options.allowed_host or (alone and not keys) else None

            def announce() -> None:
                say(f"{backend.describe()}\n{names.model} is served at {url}")
                if not keys and not alone:
                    say("there are no API keys: everybody who can connect may ask", stderr=True)

            try:
                app = build_app(service, keys=keys, origins=options.cors, hosts=hosts)
                listen(app, listener, drain=options.timeout, announce=announce)
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


def _names(options: ServeOptions, files: ModelFiles) -> Names:
    from genarm.data.presets import read_presets
    from genarm.server.names import Names, rewards_of

    path = Path(files.reference)
    return Names(
        model=path.name if options.served_name is None else options.served_name,
        rewards=rewards_of(files.config),
        largest=options.max_weight,
        presets=read_presets(path, options.presets),
    )


def _backend(arguments: argparse.Namespace, session: Session) -> Callable[[], Backend]:
    """What starts the engine that was asked for, or that suits this machine; it is started later.

    Raises:
        ConfigError: values that no engine takes, or options of the other engine.
        MissingExtraError, UnsupportedError: there is no vLLM, or another version of it.
    """
    from genarm.server.admission import Admission
    from genarm.server.backend import ProcessBackend
    from genarm.server.vllm_backend import VllmBackend, VllmOptions, need_vllm, read_options

    streams = EngineOptions.streams if arguments.streams is None else arguments.streams
    EngineOptions(streams=streams)
    Admission(streams=streams, queue=arguments.queue)
    more = None if arguments.vllm_options is None else read_options(arguments.vllm_options)
    if _takes_vllm(arguments, session.files):
        if wishes := [*session.files.wishes]:
            raise UnsupportedError(
                f"vLLM reads one prompt for all members, so it cannot run the wish {wishes[0]!r}; give --engine genarm"
            )
        if option := _of_own_engine(arguments):
            raise ConfigError(f"{option} belongs to genarm's own engine; leave it out, or give --engine genarm")
        need_vllm()
        options = settings_from(arguments, VllmOptions, more=more)
        return lambda: VllmBackend(session.files, options)
    if more is not None:
        raise ConfigError("--vllm-options needs vLLM, and genarm's own engine serves here; give --engine vllm as well")
    own = 0 if arguments.no_request_wishes else MOST_WISHES
    make = partial(make_engine, arguments, session.files.added_wishes, streams, own)
    return lambda: ProcessBackend(make, content=session.content)


def make_engine(arguments: argparse.Namespace, added: Mapping[str, str], streams: int, own: int) -> Engine:
    """The engine of a command line, for so many replies at once; called in the process that it is for.

    Args:
        arguments: as they were given.
        added: {name: text} of their wishes, whose files are read once: a pipe has nothing more for a second reader, and
            another text than clients were told of would be another reward.
        streams: replies at once.
        own: wishes that a request may have.

    Raises:
        What `Engine` raises.
    """
    from genarm.cli.session import open_session

    stay_quiet()
    session = open_session(argparse.Namespace(**{**vars(arguments), "wish": None}))
    session = replace(session, files=session.files.with_wishes(added))
    return session.engine(streams=streams, context=arguments.context, wishes=own)


def _takes_vllm(arguments: argparse.Namespace, files: ModelFiles) -> bool:
    """Whether vLLM serves; `auto` takes it where it runs on a GPU and nothing is asked that only our engine has."""
    from genarm.server.vllm_backend import why_not

    if arguments.engine != "auto":
        return bool(arguments.engine == "vllm")
    only_here = bool(files.wishes) or _of_own_engine(arguments) is not None
    return not only_here and arguments.device in (None, "cuda") and why_not() is None


def _of_own_engine(arguments: argparse.Namespace) -> str | None:
    """An option that was given and that vLLM has no use for."""
    if arguments.draft is not None:
        return "--draft"
    # 0 never drafts, and so does vLLM.
    return None if arguments.speculate in (EngineOptions.speculate, 0) else "--speculate"


def _service(options: ServeOptions, files: ModelFiles, names: Names, backend: Backend) -> Service:
    import time

    from genarm.server.admission import Admission
    from genarm.server.job import Service
    from genarm.server.metrics import Metrics
    from genarm.server.texts import Texts

    return Service(
        backend=backend,
        texts=Texts(files.tokenizer, files.reading),
        names=names,
        admission=Admission(streams=backend.streams, queue=options.queue),
        metrics=Metrics(backend),
        timeout=options.timeout,
        log_prompts=options.log_prompts,
        request_wishes=not options.no_request_wishes,
        started=int(time.time()),
    )
