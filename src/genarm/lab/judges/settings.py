"""Whom a judge's questions go to; nothing heavy is imported here."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field

from genarm.errors import ConfigError

OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """Whom to ask, and how hard.

    Attributes:
        model: as the endpoint calls it.
        base_url: of the endpoint; /chat/completions comes after it.
        key_variable: name of the environment variable that holds the key. Only OpenAI's own endpoint needs one; where
            another name is given, the variable must be set.
        concurrency: questions under way at once.
        requests_per_minute: the most requests sent in a minute, evenly spaced; None has no limit.
        timeout: seconds for one try.
        retries: more tries after the first.
        backoff: seconds before the first retry; doubled with each, up to a minute.
    """

    model: str
    base_url: str = field(
        default=OPENAI,
        metadata={
            "metavar": "URL",
            "help": "of an OpenAI-compatible endpoint; /chat/completions comes after it",
        },
    )
    key_variable: str = field(
        default=KEY_VARIABLE,
        metadata={"help": "environment variable with the key; an endpoint of your own may need none"},
    )
    concurrency: int = field(default=8, metadata={"help": "questions under way at once"})
    requests_per_minute: float | None = field(
        default=None, metadata={"option": "--rate", "metavar": "N", "help": "the most requests in a minute"}
    )
    timeout: float = field(default=120.0, metadata={"metavar": "S", "help": "seconds for one try"})
    retries: int = field(default=5, metadata={"help": "tries after a question's first one"})
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"the judge's model is {self.model!r}; give the name that the endpoint knows it by")
        _check_url(self.base_url)
        if not isinstance(self.key_variable, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_variable):
            raise ConfigError(  # without the value: it may be a key that was put into the wrong place
                "the key variable must be the name of an environment variable, in capitals, such as OPENAI_API_KEY; "
                "never the key itself"
            )
        for name, lowest in (("concurrency", 1), ("retries", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least {lowest}")
        for name in ("timeout", "backoff", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value!r}; it must be a number above 0")

    def find_key(self) -> str | None:
        """The key, where the environment has one.

        Raises:
            ConfigError: there is none and one is needed, or it has characters that no header can carry.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            if self.key_variable != KEY_VARIABLE or self.base_url.rstrip("/") == OPENAI:
                raise ConfigError(
                    f"the environment variable {self.key_variable} is not set; put the key for {self.base_url} into "
                    "it, or name another variable or endpoint"
                )
            return None
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the value of {self.key_variable} has characters that no key has; set it again")
        return key


def _check_url(url: str) -> None:
    """Refuse what is no plain address; the message repeats none of it, since it may hold a password or a key."""
    import httpx2

    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ConfigError("base_url is no URL; expected something like http://localhost:8000/v1") from error
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ConfigError(
            "base_url has a user name, a query or a fragment; give the plain address, and keep keys in the environment"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"base_url is {url!r}; expected something like http://localhost:8000/v1")
