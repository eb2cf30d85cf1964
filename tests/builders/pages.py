"""What a reader does with the page of the server, in a headless Chromium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install 'genarm[dev]'")
Browser, Page, expect = playwright.Browser, playwright.Page, playwright.expect
expect.set_options(timeout=20_000)  # a busy machine is slow, not wrong

PAGE = Path(__file__).resolve().parents[2] / "src/genarm/server/page"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

Opener = Callable[..., Page]


def ready(page: Page) -> Page:
    page.wait_for_selector(".reward", state="attached")
    return page


def send(page: Page, prompt: str, *, seed: int = 7, tokens: int = 24) -> dict[str, Any]:
    """Set what makes the reply repeatable, send, wait for its end; the request that the page made."""
    page.evaluate(
        """([seed, tokens]) => {
            for (const [id, value] of [["seed", seed], ["max_tokens", tokens]]) {
                const field = document.getElementById(id);
                field.value = value;
                field.dispatchEvent(new Event("input"));
            }
        }""",
        [seed, tokens],
    )
    with page.expect_request("**/chat/completions") as made:
        page.fill("#message", prompt)
        page.press("#message", "Enter")
    finished(page)
    return dict(made.value.post_data_json)


def finished(page: Page) -> None:
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)


def watch(page: Page) -> list[Any]:
    """The requests for completions that the page makes from now on."""
    requests: list[Any] = []
    page.on("request", lambda request: requests.append(request) if "completions" in request.url else None)
    return requests


def shown(page: Page, nth: int = -1) -> str:
    """The text of a reply, just as the model wrote it."""
    return str(page.locator(".reply .text").nth(nth).text_content())


def token_view(page: Page) -> None:
    """Have the replies shown token by token."""
    page.locator("#heat").check()


def answer(page: Page, text: str, *, pieces: int = 1) -> None:
    """Have the page receive this text from now on, whatever it asks."""
    size = max(1, -(-len(text) // pieces))
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    chunks = [{"choices": [{"delta": {"content": part}, "finish_reason": None}]} for part in parts]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.unroute("**/chat/completions")
    page.route("**/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
