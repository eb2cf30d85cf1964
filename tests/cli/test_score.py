"""`genarm score`: numbers against each member asked by itself, and the pictures of them."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from builders.tiny import save_member, tiny_model, tiny_tokenizer
from genarm.cli.heatmap import (
    columns,
    format_number,
    heat_text,
    html_page,
    legend,
    print_table,
    quantities,
    visible,
)
from genarm.cli.main import main
from genarm.model.compose import compose
from genarm.model.token_rewards import TokenRewards
from genarm.text.prompts import encode_pair

SAID = TokenRewards(
    tokens=("Hi", " <script>alert(1)</script>", "\n", "</script>", "\x1b[31m", "<end>"),
    token_ids=(5, 6, 7, 8, 9, 1),
    base=(-1.0, -2.0, -0.5, -8.0, -1.0, -0.25),
    rewards={
        "helpful": (-2.0, -1.5, -0.5, -2.0, -1.0, -0.125),
        "harmless": (-1.0, -3.0, -0.5, -16.0, -1.0, -0.5),
    },
    guided=(-1.5, -1.0, -0.25, -7.0, -float("inf"), -0.25),
    weights={"helpful": 2.0, "harmless": -0.5},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    members = [save_member(tiny_model(seed=i), root / f"m{i}") for i in range(3)]
    compose(members[0], {"helpful": members[1], "harmless": members[2]}, root / "guided", weights={"harmless": 0.5})
    return root / "guided"


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
def test_json_equals_each_member_asked_by_itself(folder: Path, capsys: Any, raw: bool) -> None:
    more = ["--raw"] if raw else ["--system", "w9"]
    words = ["--prompt", "w1 w2", "--response", "w3 w4 w5", "--weights", "helpful=-2", "--json"]
    assert main(["score", str(folder), *words, *more]) == 0
    record = json.loads(capsys.readouterr().out)
    messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1 w2"}]
    prompt_ids, response_ids = encode_pair(tiny_tokenizer(), "w1 w2" if raw else messages, "w3 w4 w5")
    ids = torch.tensor([prompt_ids + response_ids])
    with torch.no_grad():
        logits = [tiny_model(seed=i)(ids).logits[0, len(prompt_ids) - 1 : -1] for i in range(3)]
    logs = [torch.log_softmax(member.double(), -1) for member in logits]
    guided = torch.log_softmax(logs[0] - 2 * logs[1] + 0.5 * logs[2], -1)
    at = range(len(response_ids)), response_ids

    def close(found: list[float], expected: torch.Tensor) -> bool:
        return found == pytest.approx(expected[at].tolist(), abs=1e-4)

    tokens = record["tokens"]
    assert [t["id"] for t in tokens] == response_ids
    assert [t["token"] for t in tokens] == ["w3", " w4", " w5", " <end>"]
    assert close([t["base"] for t in tokens], logs[0])
    assert close([t["rewards"]["helpful"] for t in tokens], logs[1])
    assert close([t["contributions"]["helpful"] for t in tokens], -2 * logs[1])
    assert close([t["contributions"]["harmless"] for t in tokens], 0.5 * logs[2])
    assert close([t["guided"] for t in tokens], guided)
    assert record["weights"] == {"helpful": -2, "harmless": 0.5}
    assert record["totals"]["harmless"] == pytest.approx(float(logs[2][at].sum()), abs=1e-4)


def test_members_in_bfloat16_are_scored_exactly_on_a_cpu(tmp_path: Path, capsys: Any) -> None:
    """A token's log-prob does not depend on what follows it; where it is computed in bfloat16, that is said."""
    members = [save_member(tiny_model(seed=i, dtype=torch.bfloat16), tmp_path / f"m{i}") for i in range(2)]
    compose(members[0], {"r": members[1]}, tmp_path / "guided")
    exact = AutoModelForCausalLM.from_pretrained(members[0], dtype=torch.float32)
    capsys.readouterr()
    found = []
    for response in ("w3 w4", "w3 w4 w5 w6 w7 w8 w9"):
        words = ["--raw", "--prompt", "w1 w2", "--response", response, "--json"]
        assert main(["score", str(tmp_path / "guided"), *words]) == 0
        out, err = capsys.readouterr()
        assert "computed in" not in err
        found.append([token["base"] for token in json.loads(out)["tokens"][:2]])
    ids = tiny_tokenizer()("w1 w2 w3 w4", return_tensors="pt").input_ids
    with torch.no_grad():
        logs = exact(ids).logits[0].double().log_softmax(-1)
    expected = [float(logs[1, ids[0, 2]]), float(logs[2, ids[0, 3]])]
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert found[1] == pytest.approx(expected, abs=1e-5)
    assert main(["score", str(tmp_path / "guided"), *words, "--dtype", "bfloat16"]) == 0
    assert "computed in bfloat16" in capsys.readouterr().err


def test_table_on_a_pipe_has_every_number_and_no_colour(folder: Path, capsys: Any) -> None:
    words = ["--prompt", "w1 w2", "--response", "w3 w4"]
    assert main(["score", str(folder), *words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main(["score", str(folder), *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    header, *lines = out.splitlines()
    assert re.split(r"  +", header.strip()) == [
        *("token", "log π_base", "log π_helpful", "1 × helpful", "log π_harmless", "0.5 × harmless"),
        *("log π guided", "guided − base"),
    ]
    for line, token in zip(lines[:-1], record["tokens"], strict=True):
        helpful, harmless = token["rewards"].values()
        numbers = [token["base"], helpful, helpful, harmless, 0.5 * harmless, token["guided"]]
        expected = [*map(format_number, numbers), format_number(token["guided"] - token["base"], signed=True)]
        assert line.split() == [token["token"].replace(" ", "␣"), *expected]
    assert lines[-1].split()[:2] == ["total", format_number(record["totals"]["base"])]


# --- the pictures ---------------------------------------------------------------------------------------------------


def test_quantities_are_differences_from_the_base() -> None:
    guided, helpful, harmless, base = quantities(SAID)
    assert guided.values == (-0.5, 1.0, 0.25, 1.0, -float("inf"), 0.0)
    assert helpful.values == (-1.0, 0.5, 0.0, 6.0, 0.0, 0.125)
    assert harmless.values == (0.0, -1.0, 0.0, -8.0, 0.0, -0.25)
    assert base.values == SAID.base
    # Full colour where nine tokens in ten are below, at least 1 nat; what is beyond stays at full.
    assert (guided.limit, base.limit) == (1.0, 8.0)
    assert guided.strengths == (-0.5, 1.0, 0.25, 1.0, -1.0, 0.0)
    assert base.strengths[3] == -1.0
    assert base.strengths[5] == -0.03125


def test_limit_is_not_set_by_one_odd_token() -> None:
    many = TokenRewards(
        tokens=tuple("abcdefghijklmnopqrst"),
        token_ids=tuple(range(20)),
        base=(-2.0,) * 20,
        rewards={"r": (-40.0, *(-2.0 - 0.1 * i for i in range(19)))},
        guided=(-2.0,) * 20,
        weights={"r": 1.0},
    )
    assert quantities(many)[1].limit == pytest.approx(1.7)
    assert quantities(many)[1].strengths[0] == -1


def test_columns_add_up() -> None:
    for column in columns(SAID):
        assert column.total == pytest.approx(sum(column.values))
    by_label = {column.label: column for column in columns(SAID)}
    assert by_label["2 × helpful"].values == tuple(2 * v for v in SAID.rewards["helpful"])
    assert by_label["-0.5 × harmless"].total == 11.0
    assert by_label["guided − base"].number(1) == "+1.00"
    assert by_label["log π guided"].number(4) == "−∞"


@pytest.mark.parametrize(
    ("value", "plain", "signed"),
    [(1.5, "1.50", "+1.50"), (-0.001, "0.00", "0.00"), (-12.345, "−12.35", "−12.35"), (float("inf"), "∞", "+∞")],
)
def test_numbers(value: float, plain: str, signed: str) -> None:
    assert format_number(value) == plain
    assert format_number(value, signed=True) == signed


def test_white_space_and_control_characters_become_visible() -> None:
    assert [visible(t) for t in (" a b ", "\n\n", "\t", "  ", "\x1b[2J", "é")] == [
        *("␣a b␣", "⏎⏎", "⇥", "␣␣", "\ufffd[2J", "é"),
    ]


def rendered(width: int, **options: Any) -> str:
    file = io.StringIO()
    console = Console(width=width, file=file, **options)
    print_table(console, SAID)
    for quantity in quantities(SAID):
        console.print(legend(quantity), heat_text(SAID, quantity))
    return file.getvalue()


def test_terminal_colours_say_the_sign_and_respect_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blue for less, orange for more, in three steps; no style near zero."""
    text = heat_text(SAID, quantities(SAID)[0])
    assert [(text.plain[span.start : span.end], str(span.style)) for span in text.spans] == [
        ("Hi", "#000000 on #6baed6"),
        (" <script>alert(1)</script>", "#ffffff on #c04000"),
        ("⏎\n", "#000000 on #fdd0a2"),
        ("</script>", "#ffffff on #c04000"),
        ("\ufffd[31m", "#ffffff on #2171b5"),
    ]
    assert text.plain.endswith("<end>")
    assert "\x1b[31m" not in rendered(150, force_terminal=True, color_system="truecolor")
    assert "48;2;" in rendered(150, force_terminal=True, color_system="truecolor")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "48;2;" not in rendered(150, force_terminal=True, color_system="truecolor")


@pytest.mark.parametrize("width", [40, 80, 100])
def test_a_narrow_terminal_never_breaks_a_number(width: int) -> None:
    text = rendered(width)
    for column in columns(SAID):
        for i in range(len(SAID.tokens)):
            assert column.number(i) in text
        assert column.number(None) in text


# --- the page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of the page: its elements, and the text inside each token and cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append((tag if "token" not in (dict(attrs).get("class") or "") else "token", ""))

    def handle_data(self, data: str) -> None:
        if self.texts:
            tag, text = self.texts[-1]
            self.texts[-1] = (tag, text + data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text.rstrip() if tag != "token" else text for name, text in self.texts if name == tag]


EVIL = '"><img src=x onerror=alert(1)></title><script>alert(2)</script>{{ 7 * 7 }}'


@pytest.fixture(scope="module")
def source() -> str:
    return html_page(SAID, model=EVIL, prompt=EVIL)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_all_text_is_escaped(page: Page) -> None:
    """The page has its own two scripts and no element that a token, a prompt or a name brought in."""
    assert [attributes.get("type") for attributes in page.all("script")] == ["application/json", None]
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "h1", "h2", "p"),
        *("div", "label", "select", "option", "span", "noscript", "table", "thead", "tbody", "tfoot", "tr", "th", "td"),
        "script",
    }
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text("title") == [f"Token rewards · {EVIL}"]
    assert EVIL in page.text("p")
    assert page.text("token") == [
        *("Hi", " <script>alert(1)</script>", "⏎\n", "</script>", "\ufffd[31m"),
        page.text("token")[-1],
    ]
    data = json.loads(page.text("script")[0])
    assert [token["text"] for token in data["tokens"]][:2] == ["Hi", " <script>alert(1)</script>"]


def test_the_page_needs_nothing_from_elsewhere(page: Page, source: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(", source)
    assert not [
        a for _, attributes in page.elements for a in attributes if a in ("src", "href", "action", "background")
    ]
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_the_page_has_every_number(page: Page) -> None:
    cells = page.text("td")
    listed = columns(SAID)
    rows = [cells[i : i + len(listed)] for i in range(0, len(cells), len(listed))]
    assert [[cell.strip() for cell in row] for row in rows] == [
        *([c.number(i) for c in listed] for i in range(len(SAID.tokens))),
        [c.number(None) for c in listed],
    ]
    scales = [attributes["value"] for attributes in page.all("option")]
    assert scales == ["0", "1", "2", "3"]


def test_the_page_can_be_used_without_a_mouse(page: Page) -> None:
    tokens = [a for a in page.all("span") if a.get("role") == "option"]
    assert [a["tabindex"] for a in tokens] == ["0", *["-1"] * 5]
    assert tokens[1]["aria-label"] == "␣<script>alert(1)</script>: guided − base +1.00"
    assert ["plus" in str(a["class"]) for a in tokens] == [False, True, True, True, False, False]
    assert ["minus" in str(a["class"]) for a in tokens] == [True, False, False, False, True, False]
    ids = {a["id"] for _, a in page.elements if "id" in a}
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert attributes.get(name) is None or attributes[name] in ids
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("main")) == len(page.all("header")) == len(page.all("footer")) == 1
    assert "width=device-width" in str(page.all("meta"))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_is_readable_on_every_colour_in_both_schemes(source: str) -> None:
    """WCAG 2: a contrast of 4.5 to 1 against the page and the full colours."""
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", source, re.S)]
    assert len(schemes) == 2
    for scheme in schemes:
        pairs = [("ink", on) for on in ("page", "panel", "plus", "minus")] + [("faint", "page"), ("faint", "panel")]
        for ink, on in pairs:
            high, low = sorted((luminance(scheme[ink]), luminance(scheme[on])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, on, scheme)


def test_html_is_written_beside_the_table(folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "new" / "page.html"
    options = ["--prompt", "w1", "--system", "w8 w9", "--response", "w3 w4", "--html", str(path)]
    assert main(["score", str(folder), *options]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("token")
    assert err == f"wrote {path}\n"
    page = Page(path.read_text(encoding="utf-8"))
    assert "w8 w9\n\nw1" in page.text("p")
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
