"""Replies as Markdown: what becomes of it, and that nothing else can; in a real browser, under the real policy."""

from __future__ import annotations

import hashlib
import random

from builders.pages import PAGE, Browser, Page, answer, expect, needs_chromium, send, shown, token_view
from builders.serving import Running

pytestmark = needs_chromium

RENDER = """async (texts) => {
    const { Prose } = await import("/assets/markdown.js");
    return texts.map((text) => { const prose = new Prose(); prose.show(text); return prose.element.innerHTML; });
}"""


def rendered(page: Page, *texts: str) -> list[str]:
    return list(page.evaluate(RENDER, list(texts)))


EVERYTHING = """# Title

A *word*, a **strong** one, `code`, ~~gone~~, and [a link](https://example.com/a?b=1&c=2).
Second line &amp; https://example.com/bare too

- one
- two
  1. deep
  2. deeper

3. three
4. four

> quoted
> > twice

| a | b |
|:--|--:|
| 1 | 2 |

---

```python
def f(x):
    return "<b>" + x
```

    indented
"""


def test_markdown_is_shown_as_everywhere(page: Page) -> None:
    answer(page, EVERYTHING, pieces=40)
    send(page, "w1")
    prose = page.locator(".prose")
    assert shown(page) == EVERYTHING  # token by token it is as it was written
    for what in ("em", "strong", "s", "p > code", "ul > li > ol > li", "ol[start='3']", "blockquote blockquote", "hr"):
        assert prose.locator(what).count() >= 1, what
    expect(prose.get_by_role("heading", name="Title")).to_be_visible()
    expect(prose.locator("p").first.locator("br")).to_have_count(1)
    expect(prose.locator("td.to-right")).to_have_text("2")
    expect(prose.locator(".code").first).to_contain_text("python")
    links = prose.get_by_role("link")
    assert links.evaluate_all("all => all.map(a => [a.href, a.target, a.rel])") == [
        ["https://example.com/a?b=1&c=2", "_blank", "noopener noreferrer"],
        ["https://example.com/bare", "_blank", "noopener noreferrer"],
    ]
    prose.get_by_role("button", name="Copy the code").first.click()
    expect(page.get_by_role("status")).to_contain_text("Code copied")
    assert page.evaluate("navigator.clipboard.readText()") == 'def f(x):\n    return "<b>" + x'
    token_view(page)
    expect(prose).to_be_hidden()
    expect(page.locator(".text")).to_be_visible()


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload='window.hacked = 1'></svg><iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "<style>* { display: none }</style><base href='https://example.com/'><form action='/v1'>",
    "[a](javascript:window.hacked=1) [b](JaVaScRiPt:window.hacked=1) [c](java\tscript:window.hacked=1)",
    "[d](data:text/html,<script>1</script>) [e](vbscript:x) [f](file:///etc/passwd) [g](&#106;avascript:hacked=1)",
    "[h](/v1/models) [i](//example.com) [j](mailto:a@example.com) <javascript:alert(1)> [k](blob:x) [l](https://)",
    "![pixel](https://example.com/pixel.png) ![p](data:image/png;base64,AAAA) ![q](javascript:hacked=1)",
    "| <b onclick=hacked=1> |\n|---|\n| <img src=x onerror=hacked=1> |",
    "```<script>window.hacked=1</script>\n</code></pre><script>window.hacked=1</script>\n```",
    '[x](https://example.com/"onmouseover="hacked=1) [y](<https://example.com/ onclick=hacked=1>)',
    "<https://example.com/\"'><img src=x onerror=hacked=1>>",
    '[z]: javascript:hacked=1\n[z] [z][z]\n# <script>hacked=1</script>\n1. <a href="javascript:hacked=1">x</a>',
]
NAMES = "div p h4 ul ol li blockquote hr br em strong s code pre span button a table thead tbody tr th td"


def test_nothing_that_a_model_writes_becomes_markup(page: Page) -> None:
    """Elements of the list alone, without handlers; addresses of the web alone; nothing is fetched, nothing runs."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answer(page, "\n\n".join(HOSTILE))
    send(page, "w1")
    assert [url for url in asked if "example.com" in url or "chat/completions" not in url] == []
    found = page.evaluate(
        """() => [...document.querySelectorAll(".prose *")].map((e) => [
            e.localName, e.getAttributeNames().filter((name) => /^on|style|src|srcdoc|action/.test(name)).length])"""
    )
    assert {name for name, _ in found} <= set(NAMES.split())
    assert not any(count for _, count in found)
    links = page.locator(".prose a").evaluate_all("all => all.map(a => [a.protocol, a.host, a.rel])")
    assert links
    assert {tuple(link) for link in links} == {("https:", "example.com", "noopener noreferrer")}
    assert page.evaluate("window.hacked") is None
    prose = str(page.locator(".prose").text_content())
    for visible in ("<script>window.hacked = 1</script>", "onerror='window.hacked = 1'", "[a](javascript:", "[h](/v1"):
        assert visible in prose


def test_the_policy_lets_no_text_become_html(server: Running, browser: Browser) -> None:
    """Even if some script of the page tried to: the browser itself refuses."""
    page = browser.new_page()
    page.goto(server.url)
    policy = page.evaluate("fetch('/').then((answer) => answer.headers.get('Content-Security-Policy'))")
    assert "unsafe" not in policy
    refused = page.evaluate("() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } }")
    assert refused == "TypeError"
    page.close()


LONG = 100_000
SLOW = {
    "one line": "x" * LONG,
    "words": "word " * (LONG // 5),
    "emphasis": "*a **b " * (LONG // 7),
    "stars": "*" * LONG,
    "brackets": "[" * LONG,
    "links": "[a](" * (LONG // 4),
    "images": "![" * (LONG // 2),
    "backticks": "".join("`" * (i % 300) + " " for i in range(700)),
    "colons": "http://" * (LONG // 7),
    "quotations": "> " * (LONG // 2) + "x",
    "lists": "- " * (LONG // 2) + "x",
    "stairs": "\n".join("  " * depth + "- x" for depth in range(250)),
    "quoted stairs": "\n".join(">" * depth + " x" for depth in range(250)),
    "open fence": "```\n" + "line\n" * (LONG // 5),
    "table": "| " * 200 + "|\n" + "|-" * 200 + "|\n" + "| x" * (LONG // 3),
    "rows": "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 1500,
    "entities": "&amp" * (LONG // 4),
    "autolinks": "<" * LONG,
    "tildes": "~~a" * (LONG // 3),
    "references": "[a]: x\n" * (LONG // 7),
    "tabs": "\t" * LONG + "x",
    "lines": "\n" * LONG,
}


def test_nothing_freezes_the_page(page: Page) -> None:
    """Each is shown whole, and the letters of all are there; in a time that a reader would not notice much."""
    found = page.evaluate(
        """async (texts) => {
            const { Prose } = await import("/assets/markdown.js");
            const letters = (text) => text.replace(/[^a-wyz]/g, "").length;
            return Object.entries(texts).map(([name, text]) => {
                const began = performance.now();
                const prose = new Prose();
                prose.show(text);
                return [name, performance.now() - began, letters(prose.element.textContent), letters(text)];
            });
        }""",
        SLOW,
    )
    slow = {name: took for name, took, _, _ in found if took > 1500}
    assert slow == {}
    markup = {"links", "entities", "tildes", "emphasis", "colons", "table"}
    assert [name for name, _, got, wanted in found if name not in markup and got < wanted] == []


def test_deep_nesting_loses_no_words(page: Page) -> None:
    """The parser leaves out what is nested deeper than it goes; then the text is shown as it was written."""
    stairs = "\n".join("  " * depth + f"- step{depth}" for depth in range(120))
    quoted = "\n\n".join(">" * depth + f" step{depth}" for depth in range(120))
    for html in rendered(page, stairs, quoted, f"> {stairs}"):
        assert all(f"step{depth}" in html for depth in range(120))


def test_piece_by_piece_is_as_at_once(page: Page) -> None:
    """However a text arrives, what is on the page in the end is the same, and at every moment as if that were all."""
    source = random.Random(5)
    lines = [
        *EVERYTHING.split("\n"),
        "* ",
        "**b",
        "===",
        "---",
        "1",
        "1. x",
        "  more",
        "> q",
        "```",
        "~~~",
        "| a |",
        "|---|",
    ]
    texts = ["\n".join(source.choices(lines, k=source.randint(1, 12))) for _ in range(60)]
    texts += [EVERYTHING, "- a\n*", "- a\n**b**", "a\r\n\r\nb\r\n", "- a\n\n\n  b\n\nc", "- a\n| h |\n|---|\n| c |"]
    wrong = page.evaluate(
        """async (texts) => {
            const { Prose } = await import("/assets/markdown.js");
            const whole = (text) => { const prose = new Prose(); prose.show(text); return prose.element.innerHTML; };
            return texts.filter((text) => {
                const growing = new Prose();
                for (let end = 1; end <= text.length; end += 1) {
                    growing.show(text.slice(0, end));
                    if (end % 7 && end < text.length) continue;
                    if (growing.element.innerHTML !== whole(text.slice(0, end))) return true;
                }
                return false;
            });
        }""",
        texts,
    )
    assert wrong == []


def test_what_is_selected_and_focused_stays_while_a_reply_grows(page: Page) -> None:
    kept = page.evaluate(
        """async () => {
            const { Prose } = await import("/assets/markdown.js");
            const prose = new Prose();
            document.getElementById("turns").append(prose.element);
            prose.show("first\\n\\n```js\\nlet x;");
            const [first, pre] = [prose.element.querySelector("p"), prose.element.querySelector("pre")];
            pre.focus();
            getSelection().selectAllChildren(first);
            prose.show("first\\n\\n```js\\nlet x;\\nlet y;\\n```\\n\\nlast");
            return [document.activeElement === pre, String(getSelection()), pre.textContent];
        }"""
    )
    assert kept == [True, "first", "let x;\nlet y;"]


def test_a_long_reply_stays_smooth(page: Page) -> None:
    """Hundreds of paragraphs, piece by piece: each picture costs no more than the first ones, roughly."""
    took = page.evaluate(
        """async (part) => {
            const { Prose } = await import("/assets/markdown.js");
            const prose = new Prose();
            document.getElementById("turns").append(prose.element);
            const times = [];
            for (let text = part; text.length < 80_000; text += part) {
                const began = performance.now();
                prose.show(text);
                times.push(performance.now() - began);
            }
            return times.sort((a, b) => a - b);
        }""",
        EVERYTHING + "\nmore\n\n",
    )
    assert took[len(took) // 2] < 30


def test_scripts_of_all_kinds(page: Page) -> None:
    arabic, mixed = "**مرحبا** بالعالم", "👩‍👩‍👧‍👦 café é 日本語 **日本** \u202eevil\u202c \ud83d"
    answer(page, f"{arabic}\n\n{mixed}\n\n```\nx = 'مرحبا'\n```")
    send(page, "w1")
    prose = page.locator(".prose")
    expect(prose.locator("strong").first).to_have_text("مرحبا")
    expect(prose).to_contain_text("👩‍👩‍👧‍👦 café é 日本語 日本")
    assert prose.evaluate("e => e.dir") == "auto"


def test_the_parser_is_the_published_one_with_its_licences() -> None:
    vendor = PAGE / "vendor"
    listed = (vendor / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((vendor / "markdown-it.min.js").read_bytes()).hexdigest() in listed
    licences = (vendor / "LICENSES.txt").read_text(encoding="utf-8")
    for name in ("markdown-it", "entities", "linkify-it", "mdurl", "punycode.js", "uc.micro"):
        assert f"--- {name} " in licences
