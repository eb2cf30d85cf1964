"""Tables and page of a comparison: every figure is there, what models say is text, and nothing is fetched."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from builders.invented import measured, one_preference, recipe, results, several_objectives
from genarm.lab.evaluation.figures import Figures, figures
from genarm.lab.evaluation.plots import plots
from genarm.lab.evaluation.recipe import Recipe
from genarm.lab.evaluation.report import SAMPLES, plain, report, samples
from genarm.lab.evaluation.results import Results, Verdicts
from genarm.lab.evaluation.sheets import digits, interval, number, sheets
from genarm.lab.evaluation.table import markdown, table
from genarm.statistics import Estimate, mean, win_rate

EVIL = '</p></svg><script>alert(\'1\')</script><img src=x onerror="alert(2)"> & $x^2$ {{ 7*7 }} | `#111111` id="a"'
NAME = '<b id="a">&$x$|#111111</b>'
VOID = {"meta", "img", "br", "hr", "input", "link"}
SVG_TAGS = {"svg", "defs", "style", "g", "path", "use", "text", "tspan", "clippath", "rect"}


class Page(HTMLParser):
    """What a browser reads: elements with their attributes, and the text of each, tags checked to nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[list[str]] = []
        self.open: list[int] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs))
        if tag not in VOID:
            self.open.append(len(self.elements))
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for number_ in self.open:
            self.texts[number_].append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str, css: str | None = None) -> list[str]:
        return [
            "".join(text)
            for (name, attributes), text in zip(self.elements, self.texts, strict=True)
            if name == tag and (css is None or css in str(attributes.get("class", "")).split())
        ]


def evil() -> tuple[Results, Recipe]:
    """Whatever can come from a model, a prompt, a recipe or a judge looks like markup."""
    rows = [
        measured(f"{name} {NAME}", {NAME: [level, level + 1, 0.0]}, 3, replies=(EVIL, "", "a\x00\x1b[31m\ud800b"))
        for name, level in (("base", 0.0), ("other", 1.0))
    ]
    of = results(
        *rows,
        title=EVIL,
        scale=EVIL,
        command=EVIL,
        machine=EVIL,
        prompts=(EVIL, "two\nlines", "\x07"),
        notes=(EVIL,),
        versions={EVIL: EVIL},
        published=({"first": EVIL, "second": NAME, "win": 1, "tie": 2, "lose": 3}, {"what": EVIL, EVIL: 1.0}),
    )
    return of, recipe(of, [NAME], published=of.published)


@pytest.fixture(scope="module", params=["one", "two", "three"])
def made(request: pytest.FixtureRequest) -> tuple[Results, Figures, str]:
    of, by = {"one": one_preference, "two": several_objectives, "three": lambda: several_objectives(3)}[request.param]()
    found = figures(of, by)
    return of, found, report(of, found)


# --- numbers and tables ----------------------------------------------------------------------------------------


def test_numbers():
    assert [number(value, 2) for value in (-1.234, -0.001, 0.0, float("nan"))] == ["−1.23", "0.00", "0.00", "–"]
    assert number(float("inf"), 1) == "∞"
    assert [digits([value]) for value in (0, 250, 1.5, 0.5, 0.0748, 1e-6)] == [2, 2, 2, 3, 4, 4]
    assert interval(Estimate(value=0.5, low=-0.25, high=1, n=3), 2) == "0.50 [−0.25, 1.00]"
    assert interval(win_rate([None]), 3) == "–"
    assert interval(mean([0.5, 0.5]), 2) == "0.50 (no interval)"


def test_the_page_has_every_table_cell_by_cell(made: tuple[Results, Figures, str]):
    _, found, source = made
    page = Page(source)
    drawn = sheets(found)
    assert sorted(page.text("h2")) == sorted(
        [*(sheet.title for sheet in drawn), "Pictures", "Answers side by side", "How this was made"]
        + (["To know first"] if page.all("ul")[1:] else [])
    )
    cells = [cell for row in page.text("tr") for cell in [row]]
    assert sorted(cells) == sorted("".join(row) for sheet in drawn for row in (sheet.head, *sheet.rows))
    assert all(attributes["scope"] in ("col", "row") for attributes in page.all("th"))
    assert len(page.all("th")) == sum(len(sheet.head) + len(sheet.rows) for sheet in drawn)


def test_tables_of_one_preference_hold_what_was_asked():
    of, by = one_preference()
    found = figures(of, by)
    by_key = {sheet.key: sheet for sheet in sheets(found)}
    assert list(by_key) == ["claims", "quality", "cost", "comparisons", "agreement", "gaps", "trained", "published"]
    assert [row[1] for row in by_key["claims"].rows] == [ruling.verdict for ruling in found.claims]
    assert {row[0]: row[-3:] for row in by_key["quality"].rows}["Best-of-4"] == ("≤ 0.64", "–", "–")
    assert by_key["cost"].rows[3][3:5] == ("211.00", "base 1.00, policy 200.00, reward 10.00")
    unparsed = by_key["comparisons"].head.index("unparsed")
    assert sum(int(row[unparsed]) for row in by_key["comparisons"].rows) == sum(
        verdicts.outcomes.count(None) for verdicts in of.verdicts
    )
    assert by_key["trained"].rows == (
        ("arm", "arm", "arm 0.693", "0.800 [0.740, 0.850] (n=200)", "–", "61"),
        ("rlhf", "rlhf", "–", "reward +0.500  KL 3.000 nats per reply", "–", "90"),
    )
    known, unknown, other = by_key["published"].rows
    assert known[1] == "0.520 (48.33 / 7.33 / 44.33 %)"
    assert interval(found.comparisons[0].rate, 3) in known[2]
    assert unknown[1:] == ("0.350 (30 / 10 / 60 %)", "–")
    assert other == ("raw win rate in %, 70B: GenARM", "82.1", "–")


def test_terminal_and_markdown_have_every_cell(made: tuple[Results, Figures, str]):
    of, found, _ = made
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(table(found))
    printed, written = console.export_text(), markdown(of, found)
    for sheet in sheets(found):
        for row in sheet.rows:
            assert all(" ".join(cell.split()) in " ".join(printed.split()) for cell in row)
            assert f"| {' | '.join(' '.join(cell.split()) for cell in row)} |".replace("_", "\\_") in written
    assert of.command in written


def test_markdown_is_not_broken_by_names():
    of, by = evil()
    lines = markdown(of, figures(of, by)).splitlines()
    tables = [line for line in lines if line.startswith("| ")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    rules = [i for i, line in enumerate(tables) if line.startswith("| :---")]
    for start, end in zip(rules, [*(rule - 1 for rule in rules[1:]), len(tables)], strict=True):
        assert len(set(columns[start - 1 : end])) == 1
    assert not [line for line in lines if "<script>" in line.replace("\\<", "") and line != EVIL]


# --- the page --------------------------------------------------------------------------------------------------


def test_everything_from_models_and_recipes_is_text():
    of, by = evil()
    page = Page(report(of, figures(of, by)))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "link", "a href"}
    assert tags <= SVG_TAGS | {
        *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "nav", "ul", "li"),
        *("h1", "h2", "h3", "p", "a", "div", "figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td"),
        *("details", "summary", "article", "pre", "code", "dl", "dt", "dd"),
    }
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text("h1") == [EVIL]
    assert page.text("code") == [EVIL]
    assert page.text("p", "text")[:3] == [EVIL, EVIL, ""]
    assert page.text("p", "text")[-1] == "a\ufffd\ufffd[31m\ufffdb"
    assert page.text("summary") == [f"1. {EVIL}", "2. two\nlines", "3. \ufffd"]
    assert f"other {NAME}" in page.text("text")  # the legend of a picture
    assert "49" not in "".join(page.text("p", "text"))


def test_the_page_needs_nothing_from_elsewhere(made: tuple[Results, Figures, str]):
    source = made[2]
    page = Page(source)
    addresses = set(re.findall(r"https?://[^\"'\s<]*", source))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, never fetched
    assert not re.search(r"@import|url\((?!#)", source)
    for _, attributes in page.elements:
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith("#")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    source.encode("utf-8")


def test_the_page_can_be_found_one_s_way_in(made: tuple[Results, Figures, str]):
    page = Page(made[2])
    ids = [str(a["id"]) for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        assert attributes.get("aria-labelledby") is None or attributes["aria-labelledby"] in ids
        for name in ("href", "xlink:href"):
            assert attributes.get(name) is None or str(attributes[name])[1:] in ids
    used = re.findall(r"url\(#([^)]*)\)", made[2])
    assert used
    assert set(used) <= set(ids)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == 1
    pictures = [a for a in page.all("div") if a.get("role") == "img"]
    assert len(pictures) == len(page.all("svg")) == len(page.all("figcaption"))
    assert all(len(str(a["aria-label"])) > 40 for a in pictures)
    assert "width=device-width" in str(page.all("meta"))


def test_the_same_results_give_the_same_page(tmp_path: Path):
    """In another process too, whose sets and dictionaries of other seeds may be in another order."""
    of, by = several_objectives(2)
    here = report(of, figures(of, by))
    program = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1])\n"
        "from builders.invented import several_objectives\n"
        "from genarm.lab.evaluation.figures import figures\n"
        "from genarm.lab.evaluation.report import report\n"
        "of, by = several_objectives(2)\n"
        "print(hashlib.sha256(report(of, figures(of, by)).encode()).hexdigest())\n"
    )
    folder = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_answers_of_a_dozen_prompts_side_by_side():
    of, _ = one_preference()
    shown = samples(of)
    assert len(shown) == SAMPLES
    gaps = {b.number - a.number for a, b in pairwise(shown)}
    assert gaps == {20, 21}
    for sample in shown:
        i = sample.number - 1
        assert sample.prompt == of.prompts[i]
        assert [(a.method, a.text) for a in sample.answers] == [(row.name, row.replies[i]) for row in of.measured]
        base = of.measured[0]
        said = [
            f"truth {number(base.scores['truth'][i], 2)}",
            f"{base.tokens[i]} tokens",
            f"KL {(base.kl or ())[i]:.2f}",
        ]
        assert sample.answers[0].scores == ", ".join(said)
    few = results(*(measured(name, {}, 3) for name in ("base", "other")))
    assert [sample.number for sample in samples(few)] == [1, 2, 3]
    assert plain("a\tb\n\x7f") == "a\tb\n\ufffd"


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_can_be_seen_in_both_schemes(made: tuple[Results, Figures, str]):
    """WCAG 2: a contrast of 4.5 to 1 for text, and of 3 to 1 for marks; every colour of a picture is the page's."""
    source = made[2]
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", source, re.S)
    ]
    assert len(schemes) == 2
    assert schemes[0].keys() == schemes[1].keys()
    for scheme in schemes:
        for name in ("ink", "faint", "good", "bad", "open"):
            assert min(contrast(scheme[name], scheme[back]) for back in ("page", "panel")) >= 4.5
        for name in (name for name in scheme if name.startswith("series-")):
            assert contrast(scheme[name], scheme["page"]) >= 3
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, re.S))
    assert set(re.findall(r"var\(--([\w-]+)\)", drawn)) <= schemes[0].keys()
    assert not re.search(r"(?:fill|stroke): (?!none|var)", drawn)


# --- pictures --------------------------------------------------------------------------------------------------


def test_every_family_is_in_every_picture_that_it_has_figures_for():
    of, by = several_objectives(3)
    found = figures(of, by)
    drawn = plots(found)
    assert len(drawn) == 3 * 2 + 3 + 2 * 3  # cost and KL by judge, verdicts by judge, pairs of objectives by scale
    for plot in drawn[-6:]:
        labels = Page(plot.svg).text("text")
        assert {"GenARM", "Rewarded Soups", "base"} <= set(labels)
        assert all(curve.family in plot.alt for curve in found.fronts[0].curves)


def test_methods_without_a_figure_are_left_out():
    rows = [measured(name, {}, 20) for name in ("base", "A", "B")]
    verdicts = Verdicts(judge="llm", first="A", second="base", outcomes=("win",) * 20)
    of = results(*rows, verdicts=(verdicts,))
    cost, bars = plots(figures(of, recipe(of, ["llm"])))
    assert "A: 1 [" in cost.alt
    assert "B" not in Page(cost.svg).text("text")
    assert "20 won, 0 tied, 0 lost" in bars.alt
    nothing = replace(of, verdicts=())
    assert plots(figures(nothing, recipe(nothing, ["llm"]))) == ()
    assert "Answers side by side" in report(nothing, figures(nothing, recipe(nothing, ["llm"])))
