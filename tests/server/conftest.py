"""A browser for the tests of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from builders.pages import CHROMIUM, FLAGS, playwright

    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages, and holds them to: no exception, nothing that the content security policy had to stop."""
    contexts, complaints = [], []

    def heard(message: Any) -> None:
        if "Content Security Policy" in message.text or "Trusted" in message.text:
            complaints.append(message.text)

    def opened(url: str, **options: Any) -> Any:
        context = browser.new_context(
            viewport=options.pop("viewport", {"width": 1400, "height": 900}),
            permissions=["clipboard-read", "clipboard-write"],
            **options,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", heard)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A server of a tiny guided model; tests of others have their own."""
    from builders.serving import running

    with running() as served:
        yield served


@pytest.fixture
def page(server: Any, open_page: Callable[..., Any]) -> Any:
    """Its page, ready to be typed into."""
    from builders.pages import ready

    return ready(open_page(server.url))
