"""Engines that other processes make, which are therefore functions of a module."""

from __future__ import annotations

import os
import signal

from builders.serving import CONTEXT, guided_model
from builders.tiny import TEMPLATE, tiny_tokenizer
from genarm.engine import Engine, EngineOptions
from genarm.errors import MemberError, MissingExtraError

BAD_WORD = 7


def make_engine(streams: int = 4, speculate: int = 3) -> Engine:
    """Of a guided model with a wish."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = guided_model({"warm": "w3 w4"})
    return Engine(model, tokenizer, EngineOptions(streams=streams, context=CONTEXT, speculate=speculate, wishes=2))


def make_engine_that_fails() -> Engine:
    """Its steps fail as soon as a prompt has the token `BAD_WORD`."""
    engine = make_engine(speculate=0)

    def look(module: object, args: object, kwargs: dict[str, object]) -> None:
        ids = kwargs.get("input_ids")
        if ids is not None and (ids == BAD_WORD).any():  # type: ignore[attr-defined]
            raise RuntimeError("a bad word")

    engine.model.base.register_forward_pre_hook(look, with_kwargs=True)  # type: ignore[union-attr]
    return engine


def refuse() -> Engine:
    """An error of ours, as of a folder that is broken."""
    raise MemberError("there is no such model; look again")


def refuse_for_an_extra() -> Engine:
    """An error that is not made of its message."""
    raise MissingExtraError("fastapi", "serve")


def be_killed() -> Engine:
    """As a machine without memory left does it."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def leave() -> Engine:
    """Ends the process."""
    os._exit(3)
