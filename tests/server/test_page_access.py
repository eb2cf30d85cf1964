"""The page for everybody: axe-core finds nothing in any of its states, on phones and wide screens, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from builders.pages import Opener, Page, answer, expect, needs_chromium, ready, send
from builders.serving import Running, running

pytestmark = needs_chromium
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing: pip install 'genarm[dev]'")

REPLY = """## A title

Some *words*, `code` and [a link](https://example.com).

- one
- two

| a | b |
|---|---|
| 1 | 2 |

```python
def a_function_with_a_name_that_is_long_enough_to_scroll(argument_one, argument_two, argument_three, argument_four):
    return None
```

> quoted
"""
PHONE, WIDE = {"width": 360, "height": 740}, {"width": 1500, "height": 900}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(wishes={"warm": "w3 w4"}) as served:
        yield served


def check(page: Page, state: str) -> None:
    page.evaluate("Promise.all(document.getAnimations().map((one) => one.finished.catch(() => {})))")
    found = axe.Axe().run(page).response["violations"]
    lines = [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]
    assert lines == [], state
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0, f"{state}: it scrolls sideways"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, WIDE], ids=["phone", "wide"])
def test_axe_finds_nothing_in_any_state(server: Running, open_page: Opener, size: dict[str, int], scheme: Any) -> None:
    page = ready(open_page(server.url, viewport=size, color_scheme=scheme, reduced_motion="reduce"))
    check(page, "nothing said yet")
    answer(page, REPLY)
    send(page, "w1 w2")
    check(page, "a reply with everything")
    page.get_by_role("button", name="Edit the message").click()
    check(page, "a message is edited")
    page.get_by_label("Edited message").press("Escape")
    page.unroute("**/chat/completions")
    send(page, "w1 " * 200)
    expect(page.get_by_role("button", name="Leave out")).to_have_count(0)  # that message alone is too long
    send(page, "w1 " * 75)
    expect(page.get_by_role("button", name="Leave out the oldest turn and try again")).to_be_visible()
    check(page, "errors, and a full context")
    page.get_by_role("button", name="Leave out the oldest turn and try again").click()
    expect(page.locator("#stop")).to_be_hidden()
    page.locator("#heat").check()
    page.locator(".token:visible").last.focus()
    check(page, "turns left out, the heat map, what stands behind a token")
    page.keyboard.press("Escape")
    if size == PHONE:
        page.get_by_role("button", name="Settings", exact=True).click()
        check(page, "settings")
        page.get_by_role("button", name="Done").click()
        page.get_by_role("button", name="Conversations", exact=True).click()
    page.locator(".conversation").first.hover()
    check(page, "the list of conversations")
    page.get_by_role("button", name="Rename").first.click()
    check(page, "a name is typed")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Delete").first.click()
    check(page, "something to undo")
    if size == PHONE:
        page.get_by_role("button", name="Done").click()
    page.get_by_role("radio", name="Compare").check()
    send(page, "w1 w2", tokens=8)
    check(page, "a comparison")


def test_drawers_are_worked_with_the_keyboard(server: Running, open_page: Opener) -> None:
    page = ready(open_page(server.url, viewport=PHONE))
    send(page, "w1", tokens=2)
    opener = page.get_by_role("button", name="Conversations")
    opener.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#close-conversations")).to_be_focused()
    assert page.evaluate("['bar', 'main', 'settings'].every((id) => document.getElementById(id).inert)")
    page.keyboard.press("Escape")
    expect(opener).to_be_focused()
    opener.press("Enter")
    page.locator(".conversation").focus()
    page.keyboard.press("Enter")  # which opens it, and closes the list
    expect(page.locator("#conversations")).to_be_hidden()
    assert page.evaluate("['bar', 'main', 'settings'].every((id) => !document.getElementById(id).inert)")


def test_the_focus_can_be_seen_wherever_it_goes(server: Running, open_page: Opener) -> None:
    page = ready(open_page(server.url, viewport=WIDE))
    answer(page, REPLY)
    send(page, "w1")
    page.locator(".skip").focus()
    unseen, reached = [], set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, seen = page.evaluate(
            """() => {
                const at = document.activeElement;
                const shows = (e) => e && getComputedStyle(e).outlineStyle !== "none";
                const name = at.id || at.getAttribute("aria-label") || at.textContent.trim().slice(0, 20) || at.name;
                return [name, shows(at) || shows(at.nextElementSibling)];
            }"""
        )
        reached.add(name)
        if not seen and not name.startswith(("genarm", "Skip")):  # the document itself; a link that then appears
            unseen.append(name)
    assert unseen == []
    assert {"Edit the message, and go on from there", "Copy the code", "Code, python", "Table", "import"} <= reached
